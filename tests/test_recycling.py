"""Workers that are replaced when they have served for long enough: by calls, by age, by memory."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import errands
import psutil
import pytest
from anatomy import kill, manager
from support import NewPool, until, whole

from whitepool_mp import Pool, Session, WorkerDied

T = 60.0
MIB = 1 << 20


def recycled(session: Session) -> int:
    return session.status().counters["recycled"]


def once_each(path: Path, count: int) -> Counter[str]:
    """Check that jobs 0 to `count` - 1 ran, each once; how many ran in each process."""
    told = [line.split() for line in errands.lines(path)]
    assert sorted(int(number) for number, _ in told) == list(range(count))
    return Counter(pid for _, pid in told)


# --- by calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "submit", "map", "many values", "asyncio"])
def test_with_max_calls_1_every_call_has_a_process_of_its_own(
    new_pool: NewPool, tmp_path: Path, how: str
) -> None:
    path, count = tmp_path / "trace", 12
    with new_pool(2, max_calls=1) as session:
        if how == "run":
            results = [session.run(errands.trace_pid, path, n, timeout=T) for n in range(count)]
        elif how == "submit":
            futures = [session.submit(errands.trace_pid, path, n) for n in range(count)]
            results = [future.result(T) for future in futures]
        elif how == "map":
            results = list(session.map(errands.trace_pid, [path] * count, range(count)))
        elif how == "many values":
            results = list(session.map(errands.PidTracer(path), range(count), chunksize=5))
        else:
            results = asyncio.run(_run_each(session, path, count))
        assert results == list(range(count))
        assert set(once_each(path, count).values()) == {1}
        whole(session, T)
        assert recycled(session) == count


async def _run_each(session: Session, path: Path, count: int) -> list[int]:
    aio = session.aio()
    jobs = (aio.run(errands.trace_pid, path, n, timeout=T) for n in range(count))
    return await asyncio.gather(*jobs)


def test_a_backlog_is_served_by_one_worker_after_the_other(
    new_pool: NewPool, tmp_path: Path
) -> None:
    """Threads that run, jobs that are queued and a map, each more than the workers can do."""
    path, count = tmp_path / "trace", 150
    with new_pool(2, 1, max_calls=9) as session, ThreadPoolExecutor(4) as threads:
        for n in range(0, count, 3):
            threads.submit(session.run, errands.trace_pid, path, n, timeout=T)
        futures = [session.submit(errands.trace_pid, path, n) for n in range(1, count, 3)]
        mapped = session.map(errands.PidTracer(path), range(2, count, 3), ordered=False)
        assert sorted(mapped) == list(range(2, count, 3))
        assert [future.result(T) for future in futures] == list(range(1, count, 3))
        threads.shutdown()
        served = once_each(path, count)
        assert max(served.values()) <= 9
        assert len(served) >= count / 9
        whole(session, T)
        counters = session.status().counters
        assert counters["recycled"] >= len(served) - 3
        assert counters["crashes"] == counters["killed"] == 0


def test_limits_differ_from_worker_to_worker() -> None:
    """Down to a fifth less than what was asked for, so that they do not all go together."""
    with Pool(1, max_calls=40) as session:
        pids = [session.run(errands.pid, timeout=T) for _ in range(800)]
        counts = list(Counter(pids).values())[:-1]
        assert all(32 <= count <= 40 for count in counts)
        assert len(set(counts)) > 1


def test_a_lease_that_is_held_keeps_its_worker(new_pool: NewPool) -> None:
    with new_pool(1, max_calls=2, max_lifetime=0.05) as session:
        with session.checkout(T) as lease:
            pids = {lease.call(errands.pid, timeout=T) for _ in range(6)}
            time.sleep(0.1)
            pids.add(lease.call(errands.pid, timeout=T))
            assert pids == {lease.pid}
        with session.checkout(T) as lease:
            assert lease.pid not in pids


def test_a_failed_call_counts_as_well(new_pool: NewPool) -> None:
    with new_pool(1, max_calls=1) as session:
        first = session.run(errands.pid, timeout=T)
        with pytest.raises(ValueError, match="number 3"):
            session.run(errands.bad_number, 3, timeout=T)
        with pytest.raises(WorkerDied):
            session.run(errands.die, timeout=T)
        assert session.run(errands.pid, timeout=T) != first
        whole(session, T)
        assert recycled(session) == 3, "the one that died was not recycled"


def test_a_recycled_worker_is_torn_down_cleanly(new_pool: NewPool, tmp_path: Path) -> None:
    path = tmp_path / "torn down"

    def take_down(resource: object) -> None:
        errands.write(path, resource)

    with new_pool(1, 0, errands.pid, max_calls=1, teardown=take_down) as session:
        pids = [session.run(errands.pid, timeout=T) for _ in range(3)]
        until(lambda: errands.lines(path) == [str(pid) for pid in pids], T)


def test_a_shutdown_finishes_a_backlog_that_takes_many_workers(
    new_pool: NewPool, tmp_path: Path
) -> None:
    path, count = tmp_path / "trace", 20
    session = new_pool(2, max_calls=1).run_service()
    futures = [session.submit(errands.trace_pid, path, n) for n in range(count)]
    session.safe_shutdown(T)
    assert [future.result(0) for future in futures] == list(range(count))
    assert set(once_each(path, count).values()) == {1}


def test_the_next_manager_knows_how_long_a_worker_has_served(new_pool: NewPool) -> None:
    with new_pool(1, max_calls=5) as session:
        pids = [session.run(errands.pid, timeout=T) for _ in range(3)]
        kill(manager(session))
        pids += [session.run(errands.pid, timeout=T) for _ in range(17)]
        counts = Counter(pids)
        assert pids[2] == pids[3], "the worker outlives its manager"
        assert max(counts.values()) <= 5
        assert len(counts) >= 4


# --- by age -----------------------------------------------------------------------------------


def test_idle_workers_are_replaced_when_they_are_old(new_pool: NewPool) -> None:
    with new_pool(2, max_lifetime=0.3) as session:
        whole(session, T)
        first = {row.pid for row in session.workers()}
        until(lambda: first.isdisjoint({row.pid for row in session.workers()}), T)
        until(lambda: recycled(session) >= 4, T)
        assert session.run(errands.square, 3, timeout=T) == 9
        assert session.status().counters["killed"] == 0


def test_a_call_is_let_to_end_and_its_worker_goes_then(new_pool: NewPool) -> None:
    with new_pool(1, max_lifetime=0.1) as session:
        for how in (session.run, lambda *args: session.submit(*args).result(T)):
            long = how(errands.pid_after, 0.4)
            assert how(errands.pid_after, 0.0) != long


def test_jobs_and_waiters_are_served_while_workers_grow_old(
    new_pool: NewPool, tmp_path: Path
) -> None:
    path, count = tmp_path / "trace", 400
    with new_pool(2, max_lifetime=0.15) as session, ThreadPoolExecutor(3) as threads:
        jobs = [
            threads.submit(session.run, errands.trace_pid, path, n, 0.005, timeout=T)
            for n in range(0, count, 2)
        ]
        futures = [
            session.submit(errands.trace_pid, path, n, 0.005, timeout=T) for n in range(1, count, 2)
        ]
        for n in range(5):
            with session.checkout(T) as lease:
                assert lease.call(errands.square, n, timeout=T) == n * n
        assert [job.result(T) for job in jobs] == list(range(0, count, 2))
        assert [future.result(T) for future in futures] == list(range(1, count, 2))
        assert len(once_each(path, count)) >= 4
        counters = session.status().counters
        assert counters["recycled"] >= 2
        assert counters["crashes"] == counters["killed"] == 0


def test_a_worker_that_nobody_gives_back_is_asked_for(new_pool: NewPool) -> None:
    """One that is kept between calls of `run` is recalled when it is old."""
    with new_pool(1, max_lifetime=0.2) as session:
        first = session.run(errands.pid, timeout=T)
        until(lambda: not psutil.pid_exists(first), T)
        assert session.run(errands.pid, timeout=T) != first


# --- by memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "submit", "many values"])
def test_a_worker_that_leaks_is_replaced(new_pool: NewPool, how: str) -> None:
    count = 60
    with new_pool(1) as session:
        base = psutil.Process(session.run(errands.pid, timeout=T)).memory_info().rss
    with new_pool(1, max_rss=base + 32 * MIB) as session:
        if how == "run":
            pids = [session.run(errands.leak, MIB, timeout=T) for _ in range(count)]
        elif how == "submit":
            futures = [session.submit(errands.leak, MIB) for _ in range(count)]
            pids = [future.result(T) for future in futures]
        else:
            pids = list(session.map(errands.leak, [MIB] * count))
        assert len(set(pids)) > 1
        counts = list(Counter(pids).values())
        assert max(counts) < count
        assert len(counts) - 1 <= recycled(session) <= len(counts)
        steady = {session.run(errands.pid, timeout=T) for _ in range(count)}
        assert len(steady) <= 2, "one that does not grow stays"


def test_a_worker_that_is_too_large_from_the_start_serves_one_call(new_pool: NewPool) -> None:
    """A limit below what a fresh worker has is no way to stop the pool."""
    with new_pool(1, max_rss=1) as session:
        pids = [session.run(errands.pid, timeout=T) for _ in range(4)]
        assert len(set(pids)) == 4
        assert sorted(session.map(errands.square, range(6))) == [0, 1, 4, 9, 16, 25]


def test_memory_is_looked_at_after_large_answers_too(new_pool: NewPool) -> None:
    with new_pool(1, max_rss=1) as session:
        for _ in range(2):
            with session.checkout(T) as lease:
                assert len(lease.call(bytes, MIB, timeout=T)) == MIB
                first = lease.pid
        until(lambda: not psutil.pid_exists(first), T)
        assert recycled(session) == 2
