"""Jobs that leave a trace. Workers import this, so it imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
import time


def write(path, line):
    """Add a line to a file in one write, which cannot mix with another process's."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


def lines(path):
    """The lines of such a file; none if nobody wrote yet."""
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def run_count(path):
    """How many jobs were begun."""
    return len(lines(path))


def trace(path, number):
    """Note that this job ran; gives its number back."""
    write(path, number)
    return number


def trace_or(path, bad, deed, number):
    """`trace`, but the bad numbers do something else after it."""
    write(path, number)
    if number in bad:
        deed()
    return number


def trace_then_wait(path, number, pipe):
    """`trace`, and end when the test opens the pipe and closes it again."""
    write(path, number)
    with open(pipe) as end:
        end.read()
    return number


def pid_and_wait(path):
    """Note this process's pid, and wait to be killed."""
    write(path, os.getpid())
    while True:
        signal.pause()


def wait_to_be_killed():
    while True:
        signal.pause()


def die():
    os._exit(9)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_iteration():
    raise StopIteration(7)


def bad_number(number):
    raise ValueError(f"number {number}")


def square(x):
    return x * x


def square_unless(bad, x):
    if x == bad:
        raise ValueError(f"number {x}")
    return x * x


def add(x, y, z=0):
    return x + y + z


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def call(function):
    return function()


def size_and_sum(array):
    return array.nbytes, int(array.sum())


def doubled(array):
    return array * 2


def keywords(**given):
    return given


def write_nonsense():
    """Write to every socket that is open here."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), b"nonsense" * 8)
        except OSError:
            continue
    wait_to_be_killed()


class ExitsWhenLoaded:
    """Pickled in the worker; ends whatever thread unpickles it."""

    def __reduce__(self):
        return sys.exit, (5,)


def exit_when_loaded():
    return ExitsWhenLoaded()


class Ledger:
    """A resource."""

    def __init__(self):
        self.entries = []

    def add(self, entry):
        self.entries.append(entry)
        return len(self.entries)

    def cursor(self):
        return (entry for entry in self.entries)

    def traced(self, path):
        """A generator that notes its end."""
        try:
            yield "open"
        finally:
            write(path, "closed")

    def fail(self):
        raise KeyError("no such entry")


def entries_and(ledger, number):
    return type(ledger).__name__, number


def step(path, number, deed=None, *args):
    """`trace`, and do a deed if there is one: long or short, whatever it is called."""
    write(path, number)
    if deed is not None:
        deed(*args)
    return number


def wait_for(pipe):
    """Wait until the test writes a byte into a pipe."""
    with open(pipe, "rb", buffering=0) as end:
        end.read(1)


def pid():
    """The number of this process."""
    return os.getpid()


def pid_after(seconds):
    """The same, a while later."""
    time.sleep(seconds)
    return os.getpid()


def trace_pid(path, number, seconds=0.0):
    """`trace`, with the number of the process."""
    write(path, f"{number} {os.getpid()}")
    time.sleep(seconds)
    return number


class PidTracer:
    """`trace_pid` as a function of the number alone."""

    def __init__(self, path):
        self.path = path

    def __call__(self, number):
        return trace_pid(self.path, number)


_leaked = []


def leak(size):
    """Use so many bytes for good; the number of this process."""
    _leaked.append(b"x" * size)
    return os.getpid()


def by_run(session):
    assert session.run(abs, -1) == 1


def by_submit(session):
    assert session.submit(abs, -1).result(20) == 1


def by_map(session):
    assert list(session.map(abs, [-1, -2])) == [1, 2]


def by_loop(session):
    """It is not closed before this process ends."""
    import asyncio

    assert asyncio.new_event_loop().run_until_complete(in_loop(session)) == 1


async def in_loop(session):
    return await session.aio().run(abs, -1)


def large(job):
    """Note that this job ran, wait for the test if it names a pipe, and return many bytes."""
    path, number, size, *pipe = job
    write(path, number)
    if pipe and pipe[0] is not None:
        wait_for(pipe[0])
    return number.to_bytes(4, "little") + bytes(size - 4)


def number_of(result):
    return int.from_bytes(result[:4], "little")
