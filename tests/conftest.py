"""What every test gets: a hang guard, and a check that nothing is left behind.

And what many ask for: pools, executors and threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from anatomy import workers
from support import NewPool, arm_hang_guard, descriptors, files, last_pid, pids, processes

from whitepool_mp import Executor, Pool, Session
from whitepool_mp.executor import SessionExecutor

HANG_SECONDS = 120
_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # While a test runs its output is captured, and what the hang guard wrote would end with it.
    config.stash[_stderr] = os.dup(2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m slow"))


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, a descriptor, a thread or a temporary file behind."""
    before = pids(), descriptors(), files(), set(threading.enumerate())
    began = last_pid()
    mark = request.node.get_closest_marker("hang")
    seconds = HANG_SECONDS if mark is None else mark.args[0]
    stderr = request.config.stash[_stderr]
    arm_hang_guard(seconds, stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if last_pid() != began:
        gc.collect()  # it started processes: what it forgot shows now, and in this test
    deadline = time.monotonic() + 5.0
    while True:
        left = {
            "processes": processes(pids() - before[0]),
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


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Threads to block in."""
    with ThreadPoolExecutor(16) as executor:
        yield executor


@pytest.fixture
def session(start_method: str, threads: ThreadPoolExecutor) -> Iterator[Session]:
    """A pool of two workers, both ready. Its end lets go of whoever waits in `threads`."""
    running = Pool(2, start_method=start_method).run_service()
    try:
        workers(running, 2)
        yield running
    finally:
        running.terminate()


@pytest.fixture(params=["own", "borrowed"])
def executor(request: pytest.FixtureRequest) -> Iterator[SessionExecutor]:
    """One with a pool of its own, and one over a running pool."""
    if request.param == "own":
        with Executor(2) as own:
            yield own
    else:
        with Pool(2) as running, running.executor() as borrowed:
            yield borrowed


@pytest.fixture
def new_pool(start_method: str) -> NewPool:
    """`Pool` with the start method under test."""

    def make(size: int = 2, overflow: int = 0, factory: object = None, **options: object) -> Pool:
        return Pool(size, overflow, factory, start_method=start_method, **options)  # type: ignore

    return make
