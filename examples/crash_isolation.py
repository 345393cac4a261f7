"""What happens to a pool whose jobs crash, exit, run out of memory, are killed or never end.

Each of those costs at most the one worker that ran it, and the caller gets an error that names what
happened. Meanwhile another job runs in a sibling worker, from before the first crash until after
the last: it notices nothing.

    python crash_isolation.py
"""

import ctypes
import os
import resource
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from whitepool_mp import CallTimeout, Pool, WorkerDied


def null_pointer():
    ctypes.string_at(0)  # what a bug in a C extension does


def exit_process():
    os._exit(3)


def too_much_memory():
    """Allocate more than the process may have. The limit is put back, for the worker lives on."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, old[1]))
    try:
        return len(bytearray(64 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def out_of_memory_killer():
    os.kill(os.getpid(), signal.SIGKILL)  # the kernel does this to the process it picks


def never_ends():
    while True:
        pass


def long_call(beat, stop):
    """The sibling: leaves a byte for each step until it is told to stop."""
    steps = 0
    with open(beat, "ab", buffering=0) as heart:
        while not os.path.exists(stop):
            steps += heart.write(b".")
            time.sleep(0.01)
    return os.getpid(), steps


def add(a, b):
    return a + b


CASES = [
    # what the job does, how long it may take, what its caller gets
    (null_pointer, None, WorkerDied),
    (exit_process, None, WorkerDied),
    (too_much_memory, None, MemoryError),
    (out_of_memory_killer, None, WorkerDied),
    (never_ends, 0.5, CallTimeout),
]

as_expected = True
folder = tempfile.TemporaryDirectory(prefix="crash_isolation-")
beat, stop = Path(folder.name, "beat"), Path(folder.name, "stop")

with folder, Pool(pool_size=3, name="crashes") as session:
    sibling = session.submit(long_call, str(beat), str(stop))
    try:
        while not beat.exists() and not sibling.done():
            time.sleep(0.01)
        for job, timeout, expected in CASES:
            limit = f", timeout={timeout}" if timeout else ""
            print(f"session.run({job.__name__}{limit})")
            began = time.perf_counter()
            try:
                session.run(job, timeout=timeout)
            except Exception as error:
                took = time.perf_counter() - began
                as_expected &= type(error) is expected
                told = f"after {took:.3f} s: {type(error).__name__}: {error}".rstrip(": ")
                print(textwrap.indent(told, "  "))
                if isinstance(error, WorkerDied):
                    print(f"  pid {error.pid}, slot {error.slot}, ", end="")
                    print(f"exit code {error.exitcode}, signal {error.signal}")
            else:
                as_expected = False
                print("  came back, which it should not")
            began = time.perf_counter()
            answers = list(session.map(add, range(100), range(100)))
            took = time.perf_counter() - began
            served = answers == [2 * n for n in range(100)]
            steps = beat.stat().st_size
            as_expected &= served and not sibling.done()
            print(f"  the pool serves on: {len(answers)} jobs in {took:.3f} s;", end=" ")
            print(f"the sibling is at step {steps}, {'ended' if sibling.done() else 'running'}\n")
    finally:
        stop.touch()
    pid, steps = sibling.result(timeout=10)
    print(f"the sibling's call ended by itself after {steps} steps, in pid {pid}")

print("every job ended as it should:", "yes" if as_expected else "NO")
sys.exit(0 if as_expected else 1)
