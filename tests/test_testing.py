"""What the package gives to its users' own tests."""

from __future__ import annotations

import signal

import pytest

from whitepool_mp import CallTimeout, Pool, WorkerDied, testing


@pytest.mark.parametrize(
    ("fault", "args", "exitcode"),
    [
        (testing.segfault, (), -signal.SIGSEGV),
        (testing.exit_now, (7,), 7),
        (testing.kill_self, (), -signal.SIGKILL),
        (testing.kill_self, (signal.SIGABRT,), -signal.SIGABRT),
    ],
)
def test_a_fault_kills_the_worker_that_runs_it(fault, args, exitcode):
    with Pool(pool_size=1) as session:
        with pytest.raises(WorkerDied) as caught:
            session.run(fault, *args, timeout=20)
        assert caught.value.exitcode == exitcode
        testing.wait_until_whole(session)
        assert session.run(abs, -1, timeout=20) == 1


def test_hang_ends_at_the_deadline_only():
    with Pool(pool_size=1) as session, pytest.raises(CallTimeout):
        session.run(testing.hang, timeout=1)


def test_a_worker_killed_from_outside_is_replaced_in_its_slot():
    with Pool(pool_size=2) as session:
        testing.wait_until_whole(session)
        pid = testing.kill_worker(session, slot=1)
        testing.wait_until_whole(session)
        now = {row.slot: row.pid for row in session.workers()}
        assert set(now) == {0, 1}
        assert now[1] != pid


def test_killing_in_a_slot_that_nobody_has_says_so():
    with Pool(pool_size=1) as session, pytest.raises(LookupError, match="slot 5"):
        testing.kill_worker(session, slot=5)


def test_a_pool_that_cannot_become_whole_is_told_with_its_state():
    with Pool(pool_size=1, factory=testing.exit_now) as session:
        with pytest.raises(TimeoutError, match="failing=True"):
            testing.wait_until_whole(session, timeout=0.5)
        session.terminate()
