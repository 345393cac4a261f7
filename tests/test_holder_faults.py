"""Holders of a lease that do wrong by it: nobody else's worker or call is touched.

Each time another worker is in a call, which must end unharmed, and the pool must have all of
`pool_size` again.
"""

from __future__ import annotations

import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import deeds
import pytest
from support import sibling, until

from whitepool_mp import Lease, LeaseError, Pool, PoolFull, Session

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""


@pytest.fixture
def session(start_method: str, tmp_path: Path) -> Iterator[Session]:
    """A pool of two workers, one of them in a call. None of them is to be killed, or to crash."""
    with Pool(2, start_method=start_method) as running:
        with sibling(running, tmp_path):
            until(lambda: running.status().available == 1)
            yield running
            counters = running.status().counters
            assert (counters["killed"], counters["crashes"]) == (0, 0)


def usable(session: Session, pid: int) -> None:
    """The worker is free, and serves."""
    with session.checkout(T) as lease:
        assert lease.pid == lease.call(os.getpid, timeout=T) == pid


def test_a_holder_that_raises_inside_with_gives_its_worker_back(session: Session) -> None:
    for kind in (ZeroDivisionError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind), session.checkout(T) as lease:
            lease.call(abs, -1, timeout=T)
            raise kind
        usable(session, lease.pid)


def test_a_thread_that_ends_with_a_lease_leaves_it_good(session: Session) -> None:
    leases: list[Lease] = []

    def hold() -> None:
        leases.append(session.checkout(T))
        leases[0].call(abs, -1, timeout=T)

    _thread(hold)
    gc.collect()
    with pytest.raises(PoolFull):
        session.nonblock_checkout()
    assert leases[0].call(os.getpid, timeout=T) == leases[0].pid
    leases[0].checkin()
    usable(session, leases[0].pid)


def test_a_lease_that_is_forgotten_is_given_back(session: Session) -> None:
    """By the thread that goes on, by one that ends, in a cycle."""

    def forget(cyclic: bool = False) -> None:
        lease = session.checkout(T)
        pids.append(lease.call(os.getpid, timeout=T))
        if cyclic:
            holder: list[object] = [lease]
            holder.append(holder)

    pids: list[int] = []
    ways: list[Callable[[], None]] = [forget, lambda: _thread(forget), lambda: forget(True)]
    for way in ways:
        with pytest.warns(ResourceWarning, match="never checked in"):  # noqa: PT031
            way()
            gc.collect()
        usable(session, pids[-1])
    assert len(set(pids)) == 1


def test_a_second_checkin_and_calls_after_the_first_reach_nobody(session: Session) -> None:
    first = session.checkout(T)
    first.call(abs, -1, timeout=T)
    first.checkin()
    with session.checkout(T) as second:
        assert second.pid == first.pid
        uses: list[Callable[[], object]] = [
            first.checkin,
            first.destroy,
            lambda: session.checkin(first),
            lambda: session.destroyed(first),
            lambda: first.call(deeds.kill_self, timeout=T),
        ]
        for use in uses:
            with pytest.raises(LeaseError, match="was used after it was checked in"):
                use()
        with pytest.raises(PoolFull):
            session.nonblock_checkout()
        assert second.call(os.getpid, timeout=T) == second.pid
    usable(session, first.pid)


def test_a_checkin_to_another_pool_is_refused(session: Session, start_method: str) -> None:
    with Pool(1, start_method=start_method) as other:
        with session.checkout(T) as lease, other.checkout(T) as theirs:
            for give in (other.checkin, other.destroyed):
                with pytest.raises(LeaseError, match="give it back to its own"):
                    give(lease)
            assert lease.call(os.getpid, timeout=T) == lease.pid
            assert theirs.call(os.getpid, timeout=T) == theirs.pid
        assert other.run(abs, -1, timeout=T) == 1
        usable(session, lease.pid)


def test_a_fork_while_a_lease_is_held_leaves_it_to_the_parent(session: Session) -> None:
    with session.checkout(T) as lease:
        lease.call(abs, -1, timeout=T)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            refused = 0
            for use in (lambda: lease.call(deeds.kill_self), lease.checkin, lease.destroy):
                try:
                    use()
                except LeaseError:
                    refused += 1
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        for number in range(20):
            assert lease.call(deeds.add, number, 1, timeout=T) == number + 1
    usable(session, lease.pid)


def _thread(work: Callable[[], None]) -> None:
    """Run it in a thread, to its end."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(T)
    assert not thread.is_alive()
