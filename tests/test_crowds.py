"""Many at once: 10,000 waiters, 500 client threads, 200 workers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from pathlib import Path

import deeds
import psutil
import pytest
from anatomy import manager
from support import pipe_writer, sibling, until, whole

from whitepool_mp import CheckoutTimeout, Pool, Session, WorkerDied

T = 60.0
"""Seconds that nothing here should need: a deadline against hanging."""


def test_ten_thousand_waiters_are_served_in_their_turn(start_method: str, tmp_path: Path) -> None:
    """But those who give up, those whose time is up, and one whose call kills the worker."""
    served: list[int] = []

    async def wait(session: Session, count: int) -> Counter[str]:
        aio = session.aio()
        held = await aio.checkout(T)

        async def turn(number: int) -> None:
            async with aio.checkout(0.01 if number % 10 == 5 else T) as lease:
                served.append(number)
                if number % 1000 == 7:
                    await lease.call(deeds.kill_self)

        tasks = [asyncio.create_task(turn(number)) for number in range(count)]
        # Those with little time are late while nobody is served.
        while (await aio.status()).waiting != count - count // 10:
            await asyncio.sleep(0.01)
        for number in range(3, count, 10):
            tasks[number].cancel()
        await held.checkin()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        return Counter(type(end).__name__ for end in ended)

    count = 10_000
    with Pool(2, start_method=start_method) as session, sibling(session, tmp_path):
        ended = asyncio.run(asyncio.wait_for(wait(session, count), 100))
        tenth = count // 10
        assert ended == {
            "NoneType": 8 * tenth - 10,
            CheckoutTimeout.__name__: tenth,
            "CancelledError": tenth,
            WorkerDied.__name__: 10,
        }
        assert served == sorted(served) and len(served) == 8 * tenth
        assert session.status().waiting == 0


def test_500_client_threads_get_each_their_own_results(start_method: str, tmp_path: Path) -> None:
    """By each way of calling, at once; one in a hundred has its worker killed under it."""
    count = 500
    ended: Counter[str] = Counter()
    start = threading.Barrier(count)

    def work(session: Session, number: int) -> None:
        start.wait(T)
        if number % 100 == 99:
            with pytest.raises(WorkerDied):
                session.run(deeds.kill_self, timeout=T)
            ended["died"] += 1
            return
        with session.checkout(T) as lease:
            assert lease.call(deeds.add, number, 1, timeout=T) == number + 1
        assert session.run(deeds.add, number, 2, timeout=T) == number + 2
        assert session.submit(deeds.add, number, 3).result(T) == number + 3
        ended["served"] += 1

    with Pool(3, start_method=start_method) as session, sibling(session, tmp_path):
        threads = [threading.Thread(target=work, args=(session, n)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(T)
        assert ended == {"died": 5, "served": 495}
        status = session.status()
        assert (status.waiting, status.counters["crashes"]) == (0, 5)


@pytest.mark.parametrize(
    "start_method", ["forkserver", pytest.param("loky", marks=pytest.mark.slow)], indirect=True
)
def test_200_workers_serve_at_once_and_their_deaths_cost_no_other(
    start_method: str, tmp_path: Path
) -> None:
    size = 200
    pipe, path = str(tmp_path / "pipe"), str(tmp_path / "pids")
    with Pool(size, start_method=start_method) as session, pipe_writer(pipe) as connect:
        futures = [session.submit(_pid_after, pipe, path) for _ in range(size)]
        until(lambda: len(deeds.noted(path)) == size, T)
        assert session.status().leased == size
        pids = set(deeds.noted(path))
        assert len(pids) == size
        victims = sorted(pids)[::20]
        for pid in victims:
            os.kill(pid, 9)
        until(lambda: not any(map(psutil.pid_exists, victims)))
        os.write(connect(), b"x" * size)
        ends = [future.exception(T) or future.result() for future in futures]
        died = [end for end in ends if isinstance(end, WorkerDied)]
        assert {error.pid for error in died} == set(victims)
        assert sorted(end for end in ends if isinstance(end, int)) == sorted(pids - set(victims))
        whole(session, T)
        assert {row.slot for row in session.workers()} == set(range(size))
        process = manager(session)
    until(lambda: not process.is_running())


def _pid_after(pipe: str, path: str) -> int:
    """Note this process, and wait for a byte."""
    deeds.note(path)
    with open(pipe, "rb", buffering=0) as end:
        end.read(1)
    return os.getpid()


_pid_after.__module__ = "__main__"
