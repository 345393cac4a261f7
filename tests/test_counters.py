"""Numbers that come to the end of their width: nobody who calls notices."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal

import psutil
import pytest
from support import until

from whitepool_mp import Pool, WorkerDied
from whitepool_mp.client.flights import LAST_NUMBER
from whitepool_mp.wire import frames, pages

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""
WIDE = 1 << 32
CALLS = 1 << pages.NUMBER_BITS


def die(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize("end", [CALLS, WIDE])
def test_runs_under_one_kept_lease_go_on_when_the_numbers_of_calls_wrap(
    start_method: str, end: int
) -> None:
    with Pool(1, start_method=start_method) as session:
        session.run(abs, -1)
        (hold,) = session._member.kept
        hold.number = end - 5
        assert [session.run(abs, -number) for number in range(10)] == list(range(10))
        assert session._member.kept == [hold]
        assert session.status().counters["granted"] == 1


@pytest.mark.parametrize("end", [CALLS, WIDE])
def test_a_worker_that_dies_at_the_wrap_had_not_begun_the_next_run(
    start_method: str, end: int
) -> None:
    with Pool(1, start_method=start_method) as session:
        session.run(abs, -1)
        (hold,) = session._member.kept
        hold.number = end - 2
        pid = session.run(os.getpid)
        assert hold.number == end - 1
        die(pid)
        assert session.run(os.getpid, timeout=T) != pid


@pytest.mark.parametrize("end", [CALLS, WIDE])
def test_calls_under_one_lease_go_on_when_their_numbers_wrap(start_method: str, end: int) -> None:
    with Pool(1, start_method=start_method) as session, session.checkout(T) as lease:
        lease.call(abs, -1)
        lease._hold.number = end - 5
        assert [lease.call(abs, -number) for number in range(10)] == list(range(10))
        with pytest.raises(WorkerDied) as caught:
            lease.call(os._exit, 3)
        assert caught.value.started


@pytest.mark.parametrize("way", ["call", "call_and_death"])
def test_calls_under_a_lease_of_an_event_loop_go_on_when_their_numbers_end(way: str) -> None:
    async def calls() -> None:
        async with Pool(1) as session, session.checkout(T) as lease:
            pid = await lease.call(os.getpid)
            channel = lease._lease.channel
            assert channel is not None
            for begin in (LAST_NUMBER - 3, LAST_NUMBER - 1, LAST_NUMBER):
                channel.number = begin
                found = [await lease.call(abs, -number) for number in range(6)]
                assert found == list(range(6))
                assert channel.number < LAST_NUMBER
            if way == "call_and_death":
                channel.number = LAST_NUMBER - 1
                await lease.call(abs, -1)
                assert channel.number == 0
                os.kill(pid, signal.SIGSTOP)
                task = asyncio.create_task(lease.call(abs, -1))
                while channel.number == 0:
                    await asyncio.sleep(0)
                die(pid)
                with pytest.raises(WorkerDied) as caught:
                    await task
                assert not caught.value.started

    asyncio.run(asyncio.wait_for(calls(), 60))


def test_requests_of_an_engine_go_on_beyond_32_bits(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        session.submit(abs, -1).result(T)
        session._member.threaded().engine._numbers = itertools.count(WIDE - 4)
        for number in range(6):  # each time the worker is another's in between
            with session.checkout(T) as lease:
                assert lease.call(abs, -1) == 1
            assert session.submit(abs, -number).result(T) == number
        assert next(session._member.threaded().engine._numbers) > WIDE
        assert session.status().counters["killed"] == 0


def test_requests_of_an_event_loop_go_on_beyond_32_bits() -> None:
    async def calls() -> None:
        async with Pool(1) as session:
            await session.run(abs, -1)
            session._driver().engine._numbers = itertools.count(WIDE - 4)
            for number in range(6):
                async with session.checkout(T) as lease:
                    assert await lease.call(abs, -number) == number
                assert await session.run(abs, -number) == number
                assert (await session.status()).pool_size == 1

    asyncio.run(asyncio.wait_for(calls(), 60))


def test_requests_of_a_thread_go_on_beyond_32_bits(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        session.status()
        with session._member.link() as link:
            link._number = WIDE - 4
        for number in range(6):
            with session.checkout(T) as lease:
                assert lease.call(abs, -number) == number
            assert session.status().leased == 0
        assert link._number > WIDE
        assert len(link._said) <= 1  # what was heard is not kept


def test_requests_and_workers_have_numbers_of_64_bits() -> None:
    last = (1 << 64) - 1
    (body,) = frames.FrameDecoder().feed(frames.grant(last, last, last, 7, 3, True))
    assert frames.read_grant(body) == (last, last, last, 7, 3, True)
