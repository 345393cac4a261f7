"""What the tests have workers do, good and bad. Workers import it, so it imports nothing heavy."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref


def add(x, y=0, *, z=0):
    return x + y + z


_remembered = []


def remember(array):
    """Keep the last five arrays in the worker, and tell of each what it is full of."""
    _remembered.append(array)
    del _remembered[:-5]
    return [int(each[0]) if (each == each[0]).all() else None for each in _remembered]


def echo(value):
    return value


def named(**kwargs):
    return kwargs


def read_pipe(path):
    """Wait for whatever the test writes into a named pipe, to the end."""
    with open(path) as pipe:
        return pipe.read()


def wait_in(path, *_):
    """Note this process's pid in a file, and wait to be ended."""
    note(path)
    while True:
        signal.pause()


def note(path):
    """Add this process's pid to a file; how many lines it has now."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        os.write(fd, b"%d\n" % os.getpid())
        return os.pread(fd, 1 << 20, 0).count(b"\n")
    finally:
        os.close(fd)


def noted(path):
    """The pids in such a file."""
    try:
        with open(path) as file:
            return [int(line) for line in file]
    except FileNotFoundError:
        return []


def count(path, number, seconds=0.0):
    """Add a number to a file, in one write, take so many seconds, and return it."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, b"%d\n" % number)
    finally:
        os.close(fd)
    time.sleep(seconds)
    return number


# --- deaths -----------------------------------------------------------------------------------


def segfault():
    ctypes.string_at(0)


def abort():
    os.abort()


def leave():
    os._exit(3)


def ask_to_exit():
    sys.exit(4)


def libc_exit():
    ctypes.CDLL(None).exit(0)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def overflow_stack():
    """Recurse through C until its stack is full, or the interpreter notices."""
    sys.setrecursionlimit(10**7)

    def deeper(_):
        return list(map(deeper, [0]))

    deeper(0)


class OnUnpickling:
    """Does its deed when it is unpickled."""

    def __init__(self, deed, *args):
        self.deed, self.args = deed, args

    def __reduce__(self):
        return self.deed, self.args

    def __call__(self):
        """It stands for the function that its deed gives."""
        raise AssertionError("not unpickled")


class OnPickling:
    """Does its deed when it is pickled."""

    def __init__(self, deed):
        self.deed = deed

    def __reduce__(self):
        self.deed()
        return OnPickling, (self.deed,)


def on_pickling(deed):
    return OnPickling(deed)


class OnDeletion:
    """Does its deed when it goes, in another process than the one that made it."""

    def __init__(self, deed):
        self.deed, self.home = deed, os.getpid()

    def __del__(self):
        if os.getpid() != self.home:
            self.deed()


def broken():
    raise ValueError("broken while unpickling")


def on_unpickling(deed):
    return OnUnpickling(deed)


# --- exceptions -------------------------------------------------------------------------------


class Plain(Exception):
    """An exception of the user's."""


class Base(BaseException):
    """One that `except Exception` does not catch."""


class NeedsArguments(Exception):
    """Cannot be made again from its `args`."""

    def __init__(self, code, *, detail):
        super().__init__(f"code {code}: {detail}")


class Unpicklable(Exception):
    """Holds what cannot travel."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Speechless(Exception):
    """Cannot even be printed."""

    def __str__(self):
        raise RuntimeError("no words")


class Changeling(Exception):
    """Unpickles as something else."""

    def __reduce__(self):
        return str, ("not an exception",)


class Spiteful(Exception):
    """Raises where it is unpickled."""

    def __reduce__(self):
        return broken, ()


def throw(kind, *args, **kwargs):
    raise kind(*args, **kwargs)


def throw_with_field():
    error = Plain("with a field")
    error.code = 42
    raise error


def throw_from():
    try:
        raise KeyError("the first")
    except KeyError as first:
        raise Plain("the second") from first


def recurse():
    return recurse()


def nest(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def pickle_badly():
    raise KeyboardInterrupt("while pickling")


# --- objects ----------------------------------------------------------------------------------


class Node:
    """One that can point to itself."""

    def __init__(self, name):
        self.name = name
        self.next = self


class Counter:
    """A resource with a state of its own."""

    def __init__(self, start=0):
        self.count = start
        self.lock = threading.Lock()
        self._made = weakref.WeakSet()

    def add(self, n):
        self.count += n
        return self.count

    def myself(self):
        return self

    def make(self):
        """An object that cannot travel."""
        thing = Thing()
        self._made.add(thing)
        return thing

    def alive(self):
        return len(self._made)

    def fail(self):
        raise Plain("in a method")


class Thing:
    """Cannot be pickled, and says so."""

    def hello(self):
        return "hello"

    def __reduce__(self):
        raise TypeError("a Thing stays where it is")


def deaf_counter():
    """A resource in a process that ignores SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return Counter()


def hang(*_):
    while True:
        time.sleep(60)


# --- last words -------------------------------------------------------------------------------


def complain(text, code):
    """Write to standard error, and leave."""
    print(text, file=sys.stderr)
    os._exit(code)


def complain_in_bytes(data):
    os.write(2, data)
    os._exit(1)


class Complains:
    """A factory that does so."""

    def __init__(self, text, code):
        self.text, self.code = text, code

    def __call__(self):
        complain(self.text, self.code)


def child_complains():
    os.system("echo a child speaks >&2")
    os._exit(1)


def ask_to_exit_badly():
    try:
        raise RuntimeError("in a teardown of sorts")
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def named_file(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


def close_stderr():
    os.close(2)
    return "closed"


def free_what_is_not_allocated():
    ctypes.CDLL(None).free(ctypes.c_void_p(ctypes.addressof(ctypes.create_string_buffer(64)) + 8))


def line(number, index):
    """What the next one writes."""
    return f"worker {number} line {index} " + "." * (index % 50)


def talk(number, lines):
    for index in range(lines):
        os.write(2, f"{line(number, index)}\n".encode())  # (print may write the end by itself)
    return lines


def says_at_exit():
    atexit.register(lambda: print("atexit", file=sys.stderr))


def says(_):
    print("the teardown", file=sys.stderr)


# --- memory -----------------------------------------------------------------------------------


class Hoard:
    """A resource that takes memory, and some time over it."""

    def __init__(self):
        self.taken = []

    def take(self, size):
        time.sleep(0.005)
        self.taken.append(bytearray(b"x") * size)
        return size

    def take_and_raise(self, size):
        self.take(size)
        raise Plain("too much")

    def take_and_return(self, size):
        self.take(size)
        return bytes(1 << 20)


def short():
    return None


def reads(pid):
    """How many reads a process has made, of files and the like; not what it received."""
    with open(f"/proc/{pid}/io") as file:
        counts = dict(line.split(": ") for line in file)
    return int(counts["syscr"])


def take_all_memory():
    taken = []
    while True:
        taken.append(bytearray(b"x") * (8 << 20))


# --- busy until the test writes into a pipe ---------------------------------------------------


def spinning(fd):
    while True:
        try:
            os.read(fd, 1)
        except BlockingIOError:
            continue
        return "told"


def spin_until_told(path, noted):
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    note(noted)
    return spinning(fd)


def sleeping(fd):
    os.read(fd, 1)
    return "told"


def sleep_until_told(path, noted):
    fd = os.open(path, os.O_RDWR)
    note(noted)
    return sleeping(fd)


def holding_gil(fd):
    buffer = ctypes.create_string_buffer(1)
    if ctypes.PyDLL(None).read(fd, buffer, 1) != 1:
        raise OSError("the read was interrupted")
    return "told"


def hold_gil_until_told(path, noted):
    fd = os.open(path, os.O_RDWR)
    note(noted)
    return holding_gil(fd)


def block_signals_until_told(path, noted):
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    try:
        return sleep_until_told(path, noted)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def wait_in_thread(event):
    event.wait()


def sleep_with_threads_until_told(path, noted, count=3):
    event = threading.Event()
    threads = [threading.Thread(target=wait_in_thread, args=(event,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        return sleep_until_told(path, noted)
    finally:
        event.set()
        for thread in threads:
            thread.join()


def sleep_with_many_threads_until_told(path, noted):
    return sleep_with_threads_until_told(path, noted, 120)


def deeper(depth, path, noted):
    return deeper(depth - 1, path, noted) if depth > 1 else sleep_until_told(path, noted)


deep = {depth: functools.partial(deeper, depth) for depth in (50, 99, 100, 101, 500)}


def ignore(number):
    signal.signal(number, signal.SIG_IGN)


def default(number):
    signal.signal(number, signal.SIG_DFL)


def summing():
    return sum(itertools.repeat(1, 10**11))


def sum_for_long():
    return summing()


def timed_sleep(seconds):
    began = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - began


def start_sleep():
    return os.posix_spawn("/bin/sleep", ["sleep", "600"], os.environ)


class Slow:
    """A factory that takes as long as a pipe says."""

    def __init__(self, path):
        self.path = path

    def __call__(self):
        return read_pipe(self.path)


# --- other misdeeds ---------------------------------------------------------------------------


def stop_self():
    os.kill(os.getpid(), signal.SIGSTOP)
    return "continued"


def hold_gil():
    ctypes.PyDLL(None).sleep(60)


def take_memory():
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        return len(bytearray(1 << 30))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def leave_daemon(path):
    """Leave a process that has detached itself, note its pid, and die."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            note(path)
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(pid, 0)
    while not noted(path):
        time.sleep(0.01)
    kill_self()


def linger(path, deed="stay"):
    """Leave a process behind that keeps every descriptor; its pid."""
    pid = os.fork() if deed != "raw" else ctypes.PyDLL(None).fork()
    if pid:
        return pid
    if deed == "detach":
        os.setsid()
        if os.fork():
            os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_in(path)


def close_everything():
    os.closerange(3, 1024)


def become(*command):
    os.execv(command[0], command)


def leave_thread():
    """A thread that never ends, and is no daemon."""
    threading.Thread(target=hang).start()
    return "left"


def kill(pid):
    os.kill(pid, signal.SIGKILL)


# --- factories --------------------------------------------------------------------------------


def failing_factory():
    raise LookupError("no database here")


def chatty_factory():
    for number in range(20_000):
        print("line", number, "of a factory that talks a lot")
    return "done"


class FailsFirst:
    """A factory that does its deed the first `times` times, counted in a file, then works."""

    def __init__(self, path, times, deed, *args):
        self.path, self.times, self.deed, self.args = path, times, deed, args

    def __call__(self):
        number = note(self.path)
        if number <= self.times:
            self.deed(*self.args)
        return number


class HangsLater:
    """A factory that works the first `times` times, and then takes as long as a pipe says."""

    def __init__(self, path, times, pipe):
        self.path, self.times, self.pipe = path, times, pipe

    def __call__(self):
        number = note(self.path)
        if number > self.times:
            read_pipe(self.pipe)
        return number


class AsTold:
    """A factory that does what a file names: a deed of this module, or nothing.

    It notes in a second file that it is about to.
    """

    def __init__(self, path):
        self.path = path

    def __call__(self):
        with open(self.path) as file:
            deed = file.read()
        note(f"{self.path}.pids")
        if deed:
            globals()[deed]()
        return os.getpid()


def hoard() -> None:
    """Open files until there are no descriptors left."""
    taken = []
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))


# --- at the wrong door ------------------------------------------------------------------------


def witness(path, value):
    """`note` where this is unpickled, and give the value."""
    note(path)
    return value


class Witnessed(Exception):
    """Notes where it is unpickled."""

    def __init__(self, path):
        super().__init__(path)
        self.path = path

    def __reduce__(self):
        return again_witnessed, (self.path,)


def again_witnessed(path):
    """What a pickle of the above calls."""
    return witness(path, Witnessed(path))


def write_to_manager(data):
    """Write to every socket of this process, the manager's among them, and wait to be killed."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), data)
        except OSError:
            continue
    hang()


def cut_page():
    """Take the memory away that this process and others share; whether that could be done."""
    done = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if "whitepool-page" in os.readlink(f"/proc/self/fd/{name}"):
                os.ftruncate(int(name), 0)
                done.append(name)
        except OSError:
            continue
    return done


class False_(Exception):
    """An exception that is false."""

    def __bool__(self):
        return False


# --- with something in hand -------------------------------------------------------------------


def leave_with(_):
    os._exit(3)


def die_behind(data):
    """Be killed at about the moment in which the result is sent."""
    threading.Timer(0.001, kill_self).start()
    return data


def nap():
    time.sleep(0.02)


# --- the end of a worker ----------------------------------------------------------------------


def leave_background(count, *command):
    """Run shell commands that leave a process behind, which ends soon unless it is told."""
    line = " ".join(command or ("sleep", "0.01"))
    for _ in range(count):
        subprocess.run(["sh", "-c", f"{line} & true"], check=True, close_fds=True)
    return os.getpid()


def leave_exec_daemon(path):
    """Leave a daemon that knows nothing of where it comes from: not by session, parent or
    environment."""
    code = f"echo $$ >> {path}; exec sleep 1000"
    subprocess.run(["sh", "-c", f"env -i setsid sh -c '{code}' >&- 2>&- & true"], check=True)
    while not noted(path):
        time.sleep(0.01)


def leave_forked_daemon(path):
    """Leave a daemon that was forked twice and runs no other program."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            note(path)
            while True:
                signal.pause()
        os._exit(0)
    os.waitpid(pid, 0)
    while not noted(path):
        time.sleep(0.01)


def exit_codes():
    """The exit codes of children, each waited for in another way, while orphans end as well."""
    import asyncio
    import multiprocessing

    leave_background(5)
    popen = subprocess.Popen(["sh", "-c", "exit 3"])
    forked = os.fork()
    if forked == 0:
        os._exit(4)
    spawned = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 5"], os.environ)
    process = multiprocessing.get_context("fork").Process(target=sys.exit, args=(6,))
    process.start()

    async def child():
        started = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
        return await started.wait()

    last = asyncio.run(child())
    for pid in popen.pid, forked, spawned, process.pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # they have ended, and wait to be reaped
    leave_background(5)
    process.join()
    codes = [popen.wait()]
    codes += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (forked, spawned)]
    return [*codes, process.exitcode, last]


def finish_in_thread(path, text):
    """Leave a thread, no daemon, that takes a moment to write something."""
    threading.Thread(target=finish_later, args=(path, text)).start()


def finish_later(path, text):
    time.sleep(0.2)
    append(path, text)


def append(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def finish_in_executor(path, text):
    """Leave jobs to an executor of threads that is never shut down."""
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(1)
    for _ in range(2):
        executor.submit(finish_later, path, text)


def finish_in_processes(path, text):
    """Leave a child of multiprocessing to be waited for, and a daemon of it to be terminated."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    context.Process(target=finish_later, args=(path, text)).start()
    context.Process(target=hang, daemon=True).start()


def finish_at_exit(path, text):
    """Have it written by a handler of atexit."""
    atexit.register(append, path, text)


def teardown_with_thread(path):
    append(path, "teardown")
    finish_in_thread(path, "its thread")


def hang_at_exit(path):
    atexit.register(hang)
    return os.getpid()


def print_at_exit(text):
    atexit.register(lambda: print(text, end=""))


def multiply(size):
    import numpy

    square = numpy.ones((size, size))
    return int((square @ square).sum())


def call_by_name(module, name):
    return getattr(sys.modules.get(module) or __import__(module), name)()


def hold(module, name):
    with getattr(sys.modules[module], name):
        return True


def begin_pool(start_method):
    """Have a pool in this worker, and its manager killed; the pids of its workers."""
    import whitepool_mp

    global inner, inner_child
    inner = whitepool_mp.Pool(2, start_method=start_method).run_service()
    while len(pids_of_pool()) < 2:
        inner.run(abs, 1)
    before = pids_of_pool()
    inner_child = subprocess.Popen(["sh", "-c", "exit 3"])
    os.waitid(os.P_PID, inner_child.pid, os.WEXITED | os.WNOWAIT)
    kill(inner._member.owner.manager)
    inner.run(abs, 1)
    return before


def pids_of_pool():
    return sorted(row.pid for row in inner.workers() if row.state == "idle" and row.pid)


def end_pool():
    inner.safe_shutdown()
    return inner_child.wait()
