"""Giving back a lease whose worker is gone is no error; giving back twice is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import deeds
import pytest
from support import until, whole

from whitepool_mp import CallTimeout, Lease, LeaseError, Pool, WorkerDied

T = 20.0


def dies_in_a_call(lease: Lease) -> None:
    with pytest.raises(WorkerDied):
        lease.call(os._exit, 3, timeout=T)


def is_killed_at_a_timeout(lease: Lease) -> None:
    with pytest.raises(CallTimeout):
        lease.call(deeds.hang, timeout=0.1)


def dies_idle(lease: Lease) -> None:
    """Nobody has noticed yet, or the manager alone has."""
    os.kill(lease.pid, signal.SIGKILL)


def dies_idle_and_is_reaped(lease: Lease) -> None:
    dies_idle(lease)
    until(lambda: not os.path.exists(f"/proc/{lease.pid}"))


def is_destroyed(lease: Lease) -> None:
    lease.destroy()


ENDS = [dies_in_a_call, is_killed_at_a_timeout, dies_idle, dies_idle_and_is_reaped, is_destroyed]


@pytest.mark.parametrize("how", ["checkin", "destroyed"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_giving_back_a_lease_whose_worker_is_gone_is_no_error(
    start_method: str, end: Callable[[Lease], None], how: str
) -> None:
    with Pool(2, start_method=start_method) as session:
        lease = session.checkout(T)
        end(lease)
        getattr(session, how)(lease)
        until(lambda: not os.path.exists(f"/proc/{lease.pid}"))
        whole(session)
        assert session.run(abs, -1, timeout=T) == 1


def test_the_error_of_the_call_is_what_a_finally_lets_through() -> None:
    with Pool(1) as session:
        lease = session.checkout(T)
        with pytest.raises(WorkerDied):
            try:
                lease.call(deeds.segfault, timeout=T)
            finally:
                session.checkin(lease)


def test_a_lease_that_was_given_back_once_is_still_refused() -> None:
    with Pool(1) as session:
        lease = session.checkout(T)
        session.checkin(lease)
        for give in (session.checkin, session.destroyed):
            with pytest.raises(LeaseError, match="checked in"):
                give(lease)


def test_a_lease_that_outlives_its_pool_can_be_given_back() -> None:
    session = Pool(1).run_service()
    lease = session.checkout(T)
    lease.call(abs, -1, timeout=T)
    session.terminate()
    lease.checkin()
    assert not lease.valid


@pytest.mark.parametrize("how", ["checkin", "destroyed"])
def test_giving_back_a_lease_whose_worker_is_gone_is_no_error_for_asyncio(how: str) -> None:
    async def main() -> None:
        async with Pool(2) as session:
            calls: list[tuple[Any, ...]] = [(os._exit, 3), (deeds.hang,)]
            for call, error in zip(calls, (WorkerDied, CallTimeout), strict=True):
                lease = await session.checkout(timeout=T)
                with pytest.raises(error):
                    await lease.call(*call, timeout=0.5 if error is CallTimeout else T)
                await getattr(session, how)(lease)
            lease = await session.checkout(timeout=T)
            os.kill(lease.pid, signal.SIGKILL)
            until(lambda: not os.path.exists(f"/proc/{lease.pid}"))
            await asyncio.sleep(0)
            await getattr(session, how)(lease)
            lease = await session.checkout(timeout=T)
            await lease.destroy()
            await getattr(session, how)(lease)
            assert await session.run(abs, -1, timeout=T) == 1

    asyncio.run(asyncio.wait_for(main(), 60))
