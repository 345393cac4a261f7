"""The threads of a pool in its owner: none is left when its end has been waited for."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from whitepool_mp import Executor, Pool

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""
ROUNDS = 10


def ours() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("whitepool")]


@pytest.mark.parametrize("callback", [False, True])
def test_an_executor_that_was_shut_down_and_waited_for_has_no_thread(callback: bool) -> None:
    for _ in range(ROUNDS):
        executor = Executor(1)
        future = executor.submit(abs, -1)
        if callback:
            future.add_done_callback(lambda _, executor=executor: executor.shutdown(wait=False))
        executor.shutdown(wait=True)
        assert ours() == []
        assert future.result() == 1


@pytest.mark.parametrize("end", ["safe_shutdown", "terminate"])
@pytest.mark.parametrize("within", ["safe_shutdown", "terminate", None])
def test_a_pool_that_was_ended_has_no_thread(end: str, within: str | None) -> None:
    """Also if a job's callback has begun to end it."""
    for _ in range(ROUNDS // 2):
        session = Pool(1).run_service()
        begun = threading.Event()

        def called(_: Future[int], session=session, begun=begun) -> None:  # type: ignore[no-untyped-def]
            begun.set()
            if within is not None:
                getattr(session, within)()

        session.submit(abs, -1).add_done_callback(called)
        assert begun.wait(T)
        getattr(session, end)()
        assert ours() == []


def test_a_pool_that_an_event_loop_has_ended_has_no_thread() -> None:
    async def use() -> None:
        async with Pool(1) as session:
            assert await session.run(abs, -1) == 1
        assert ours() == []

    for _ in range(ROUNDS // 2):
        asyncio.run(asyncio.wait_for(use(), 60))


def test_threads_that_end_a_pool_together_all_find_it_ended() -> None:
    for _ in range(ROUNDS // 2):
        session = Pool(1).run_service()
        session.submit(abs, -1)
        left: list[list[threading.Thread]] = []

        def end(session=session, left=left) -> None:  # type: ignore[no-untyped-def]
            session.safe_shutdown()
            left.append(ours())

        enders = [threading.Thread(target=end) for _ in range(3)]
        for each in enders:
            each.start()
        for each in enders:
            each.join(T)
        assert left == [[], [], []]
