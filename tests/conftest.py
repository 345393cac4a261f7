"""What every test gets: a hang guard, and a check that nothing is left behind."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator

import psutil
import pytest

MARK = "WHITEPOOL_TEST_RUN"
RUN = uuid.uuid4().hex
os.environ[MARK] = RUN  # inherited by every process that a test starts

HANG_SECONDS = 120


def until(condition: Callable[[], object], seconds: float = 10.0) -> object:
    """Wait for a condition and return what made it true; fail when it does not come true."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {getattr(condition, '__doc__', None) or condition}")
        time.sleep(0.002)


def processes() -> set[psutil.Process]:
    """Every living process that this test run started, itself excepted."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == RUN:
                found.add(process)
    return found


def descriptors() -> dict[int, str]:
    """This process's sockets, pipes, epolls, pidfds, memory files and pool files."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(("socket:", "pipe:", "anon_inode:", "/memfd:")) or "whitepool" in target:
                found[int(name)] = target
    return found


def files() -> set[str]:
    """Temporary folders of pools, and shared memory."""
    pools = {entry for entry in os.listdir(tempfile.gettempdir()) if entry.startswith("whitepool-")}
    return pools | {f"/dev/shm/{entry}" for entry in os.listdir("/dev/shm")}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a process, a descriptor, a thread or a temporary file behind."""
    gc.collect()
    before = processes(), descriptors(), files(), set(threading.enumerate())
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    gc.collect()
    deadline = time.monotonic() + 5.0
    while True:
        left = {
            "processes": processes() - before[0],
            "descriptors": {
                fd: target for fd, target in descriptors().items() if before[1].get(fd) != target
            },
            "files": files() - before[2],
            "threads": {
                thread
                for thread in set(threading.enumerate()) - before[3]
                if thread.name.startswith("whitepool")
            },
        }
        if not any(left.values()):
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
        gc.collect()
    for process in left["processes"]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    pytest.fail(f"left behind: { {key: value for key, value in left.items() if value} }")


@pytest.fixture(params=["forkserver", "loky"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Each way of starting workers."""
    return str(request.param)
