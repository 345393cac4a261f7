"""What tests share: waiting for something, and counting what a pool must not leave behind."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

from whitepool_mp import Pool, Session

NewPool = Callable[..., Pool]

# Locks of multiprocessing (tqdm has one) start a process that stays. It is not a test's, and has no
# mark of one.
resource_tracker.ensure_running()
MARK = "WHITEPOOL_TEST_RUN"
RUN = uuid.uuid4().hex
os.environ[MARK] = RUN  # inherited by every process that a test starts

# A temporary folder of this run's own: other pools on the machine are not to be mistaken for ours.
# Others may pass through it (the tests' PostgreSQL server runs as somebody else).
tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="wp-")
os.chmod(tempfile.tempdir, 0o711)
atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)


_guard: list[float] = []


def arm_hang_guard(seconds: float, stderr: int) -> None:
    """Have the process end, and dump its stacks there, if this is not called off in time."""
    _guard[:] = seconds, stderr
    faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)


def fork() -> int:
    """Fork a test's own process, without the hang guard's thread beside it.

    Python 3.15 counts that thread, and warns.
    """
    threads = len(os.listdir("/proc/self/task"))
    faulthandler.cancel_dump_traceback_later()
    until(lambda: len(os.listdir("/proc/self/task")) < threads)
    pid = os.fork()
    if pid:
        arm_hang_guard(_guard[0], int(_guard[1]))
    return pid


def until(condition: Callable[[], object], seconds: float = 10.0) -> object:
    """Wait for a condition and return what made it true; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(
                f"not within {seconds} s: {getattr(condition, '__doc__', None) or condition}"
            )
        time.sleep(0.002)


def pids() -> set[int]:
    """Every process of the machine."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def last_pid() -> str:
    """The number of the process that was started last, whoever did."""
    with open("/proc/loadavg") as file:
        return file.read().split()[-1]


def processes(among: set[int] | None = None) -> set[psutil.Process]:
    """Every living process that this test run started, itself excepted."""
    found = set()
    for pid in pids() if among is None else among:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if pid != os.getpid() and process.environ().get(MARK) == RUN:
                found.add(process)
    return found


def descriptors() -> dict[int, str]:
    """This process's sockets, pipes, epolls, pidfds, memory files and pool files."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if (
                target.startswith(("socket:", "pipe:", "anon_inode:", "/memfd:"))
                or "whitepool" in target
            ):
                found[int(name)] = target
    return found


def files() -> set[str]:
    """Temporary folders of pools, and shared memory."""
    pools = {entry for entry in os.listdir(tempfile.gettempdir()) if entry.startswith("whitepool-")}
    # Other programs have some there, too, and tests of what multiprocessing shares.
    foreign = ("PostgreSQL.", "psm_", "pym-", "sem.loky-", "sem.mp-")
    shared = {entry for entry in os.listdir("/dev/shm") if not entry.startswith(foreign)}
    return pools | {f"/dev/shm/{entry}" for entry in shared}


def whole(session: Session, seconds: float = 10.0) -> None:
    """Wait until all of pool_size live and are free, and nothing else is going on."""

    def is_whole() -> bool:
        """a whole pool"""
        now = session.status()
        if now.available != now.pool_size or (
            now.leased or now.waiting or now.booting or now.overflow or now.retiring
        ):
            return False
        # The manager may be about to learn that one of them has just died.
        return all(psutil.pid_exists(row.pid) for row in session.workers() if row.pid is not None)

    until(is_whole, seconds)


@contextlib.contextmanager
def pipe_writer(path: os.PathLike[str] | str) -> Iterator[Callable[[], int]]:
    """Make a named pipe; gives a function that waits until somebody reads it, for its write end."""
    os.mkfifo(path)
    opened: list[int] = []

    def attempt() -> int | None:
        """a reader of the pipe"""
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # ENXIO: nobody reads yet
            return None

    def connect() -> int:
        fd = until(attempt)
        assert isinstance(fd, int)
        opened.append(fd)
        return fd

    try:
        yield connect
    finally:
        for fd in opened:
            os.close(fd)


@contextlib.contextmanager
def sibling(session: Session, folder: os.PathLike[str]) -> Iterator[None]:
    """A call in another worker all the while: it must end unharmed, and the pool be whole."""
    import deeds

    path = os.path.join(folder, f"sibling-{uuid.uuid4().hex}")
    with pipe_writer(path) as connect:
        future = session.submit(deeds.read_pipe, path)
        fd = connect()
        yield
        os.write(fd, b"unharmed")
    assert future.result(timeout=10) == "unharmed"
    whole(session)


def gated(executor: Executor, folder: Path) -> tuple[Future[int], int]:
    """A running job that gives 42, and the descriptor whose closing lets it end."""
    import errands

    number = len(list(folder.iterdir()))
    ran, pipe = folder / f"ran-{number}", folder / f"pipe-{number}"
    os.mkfifo(pipe)
    future = executor.submit(errands.trace_then_wait, ran, 42, pipe)
    until(lambda: errands.run_count(ran))
    return future, os.open(pipe, os.O_WRONLY)
