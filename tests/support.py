"""What tests share: waiting for something, and counting what a pool must not leave behind."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable

import psutil
import pytest

MARK = "WHITEPOOL_TEST_RUN"
RUN = uuid.uuid4().hex
os.environ[MARK] = RUN  # inherited by every process that a test starts


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
            if (
                target.startswith(("socket:", "pipe:", "anon_inode:", "/memfd:"))
                or "whitepool" in target
            ):
                found[int(name)] = target
    return found


def files() -> set[str]:
    """Temporary folders of pools, and shared memory."""
    pools = {entry for entry in os.listdir(tempfile.gettempdir()) if entry.startswith("whitepool-")}
    return pools | {f"/dev/shm/{entry}" for entry in os.listdir("/dev/shm")}
