"""A shutdown in order that could not finish what it had promised says so."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deeds
import psutil
import pytest
from anatomy import kill, manager
from support import NewPool, pipe_writer, until
from test_failover import succeeded
from user_script import script

from whitepool_mp import (
    CallTimeout,
    Executor,
    PoolClosed,
    Session,
    ShutdownIncomplete,
    WhitepoolError,
    WorkerDied,
)

SOON = 10.0


def drains(session: Session) -> None:
    """Wait until no more checkouts are taken."""
    until(lambda: session.status().draining)


def test_a_worker_killed_during_a_shutdown_is_told(
    new_pool: NewPool, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    session = new_pool(2).run_service()
    with pipe_writer(tmp_path / "pipe") as connect, pipe_writer(tmp_path / "other") as other:
        lost = session.submit(deeds.read_pipe, tmp_path / "pipe")
        connect()
        (victim,) = [row.pid for row in session.workers() if row.state == "leased"]
        assert victim is not None
        kept = session.submit(deeds.read_pipe, tmp_path / "other")
        fd = other()
        ending = threads.submit(session.safe_shutdown)
        until(lambda: session._member.draining)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            lost.result(SOON)
        os.write(fd, b"done")
    assert kept.result(SOON) == "done"
    with pytest.raises(ShutdownIncomplete, match="1 submitted job") as caught:
        ending.result(SOON)
    assert (caught.value.jobs, caught.value.leases) == (1, 0)


def test_a_lease_whose_worker_is_killed_during_a_shutdown_is_told(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(2).run_service()
    with session.checkout(SOON):
        lost = session.checkout(SOON)
        ending = threads.submit(session.safe_shutdown)
        drains(session)
        os.kill(lost.pid, signal.SIGKILL)
        until(lambda: session.status().leased == 1)
        lost.destroy()
    with pytest.raises(ShutdownIncomplete, match=f"pid {lost.pid}.*SIGKILL") as caught:
        ending.result(SOON)
    assert (caught.value.jobs, caught.value.leases) == (0, 1)


@pytest.mark.parametrize("crash", [deeds.segfault, deeds.leave], ids=["crash", "exit"])
def test_a_worker_that_its_own_call_ends_is_told_by_its_future_alone(
    new_pool: NewPool, crash: Callable[[], None]
) -> None:
    with new_pool(1) as session:
        future = session.submit(crash)
        other = session.submit(pow, 2, 3)
    assert isinstance(future.exception(0), WorkerDied)
    assert other.result(0) == 8


def test_a_call_over_its_timeout_and_a_cancelled_one_are_no_losses(
    new_pool: NewPool, tmp_path: Path
) -> None:
    with pipe_writer(tmp_path / "pipe") as connect, new_pool(2) as session:
        session.run(pow, 1, 1)
        late = session.submit(time.sleep, 1000, timeout=0.2)
        cancelled = session.submit(deeds.read_pipe, tmp_path / "pipe")
        connect()
        cancelled.cancel()
    assert isinstance(late.exception(0), CallTimeout)
    assert cancelled.cancelled()


TERMINATES = """
    session = given()
    sys.stdin.readline()
    session.terminate()
    tell("done")
"""


@pytest.mark.parametrize("queued", [0, 3])
@pytest.mark.parametrize("first", ["shutdown", "terminate"])
def test_a_pool_that_another_process_terminates_is_told(
    new_pool: NewPool,
    threads: ThreadPoolExecutor,
    tmp_path: Path,
    start_method: str,
    first: str,
    queued: int,
) -> None:
    session = new_pool(1).run_service()
    with script(TERMINATES, start_method) as other, pipe_writer(tmp_path / "pipe") as connect:
        other.give(session)
        futures = [session.submit(deeds.read_pipe, tmp_path / "pipe")]
        connect()
        futures += [session.submit(pow, 2, n) for n in range(queued)]
        ending = threads.submit(session.safe_shutdown) if first == "shutdown" else None
        if ending is not None:
            until(lambda: session._member.draining)
        other.say()
        assert other.hear() == "done"
        if ending is None:
            ending = threads.submit(session.safe_shutdown)
        with pytest.raises(ShutdownIncomplete) as caught:
            ending.result(SOON)
        ends = [type(future.exception(SOON)) for future in futures]
        assert set(ends) <= {WorkerDied, PoolClosed}
        assert caught.value.jobs == 1 + queued
        other.finish()


def test_a_shutdown_after_an_end_that_was_asked_for_here_is_harmless(
    new_pool: NewPool, tmp_path: Path
) -> None:
    session = new_pool(1).run_service()
    with pipe_writer(tmp_path / "pipe") as connect:
        future = session.submit(deeds.read_pipe, tmp_path / "pipe")
        connect()
        session.terminate()
        session.safe_shutdown()
        assert isinstance(future.exception(SOON), WhitepoolError)


def test_the_next_manager_knows_what_was_lost_under_the_last(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(2).run_service()
    lost, held = session.checkout(SOON), session.checkout(SOON)
    ending = threads.submit(session.safe_shutdown)
    drains(session)
    os.kill(lost.pid, signal.SIGKILL)
    until(lambda: session.status().leased == 1)
    dead = manager(session)
    kill(dead)
    succeeded(session, dead)
    held.checkin()
    lost.destroy()
    with pytest.raises(ShutdownIncomplete) as caught:
        ending.result(SOON)
    assert caught.value.leases == 1


def test_a_worker_killed_with_a_draining_manager_is_told(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(2).run_service()
    lost, held = session.checkout(SOON), session.checkout(SOON)
    ending = threads.submit(session.safe_shutdown)
    drains(session)
    dead = manager(session)
    kill(dead, psutil.Process(lost.pid))
    succeeded(session, dead)
    held.checkin()
    lost.destroy()
    with pytest.raises(ShutdownIncomplete) as caught:
        ending.result(SOON)
    assert caught.value.leases == 1


def test_asyncio_is_told_as_well(new_pool: NewPool) -> None:
    async def main() -> None:
        counts = new_pool(2).run_service()
        session = counts.aio()
        lost, held = await session.checkout(SOON), await session.checkout(SOON)
        ending = asyncio.ensure_future(session.safe_shutdown())
        while not counts.status().draining:
            await asyncio.sleep(0)
        os.kill(lost.pid, signal.SIGKILL)
        while counts.status().leased != 1:
            await asyncio.sleep(0)
        await held.checkin()
        await lost.destroy()
        await ending

    with pytest.raises(ShutdownIncomplete, match="SIGKILL"):
        asyncio.run(main())


def test_an_executor_leaves_that_to_its_futures(tmp_path: Path) -> None:
    """As `concurrent.futures` does: its shutdown raises nothing."""
    with pipe_writer(tmp_path / "pipe") as connect:
        executor = Executor(1)
        future = executor.submit(deeds.read_pipe, tmp_path / "pipe")
        connect()
        session = executor._session
        (pid,) = [row.pid for row in session.workers()]
        executor.shutdown(wait=False)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert isinstance(future.exception(SOON), WorkerDied)
        executor.shutdown()
