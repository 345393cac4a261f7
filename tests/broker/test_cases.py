"""The broker by example: the names of the tests are its specification."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Sequence
from typing import Any

import pytest

from whitepool_mp.broker import (
    Backoff,
    Broker,
    BrokerError,
    Busy,
    Cancel,
    Checkin,
    Checkout,
    ClientGone,
    Destroy,
    Drain,
    Drained,
    Effect,
    Event,
    Grant,
    Kill,
    Recall,
    Refuse,
    Released,
    Report,
    Resize,
    Retire,
    Spawn,
    Start,
    Terminate,
    Tick,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerState,
)
from whitepool_mp.config import Policy

ALICE, BOB, CAROL = 1, 2, 3


class FullDelay(random.Random):
    """A generator whose jitter takes nothing off, so that delays are exact."""

    def random(self) -> float:
        return 1.0


class Bench:
    """A broker with a clock, and words for what happens to it."""

    def __init__(self, pool_size: int = 1, max_overflow: int = 0, **policy: Any) -> None:
        policy = {"backoff_first": 1.0, "backoff_max": 8.0} | policy
        self.broker = Broker(Policy(pool_size, max_overflow, **policy), rng=FullDelay())
        self.now = 0.0
        self.log: list[Effect] = []
        self.tickets = itertools.count(1)

    @classmethod
    def ready(cls, pool_size: int = 1, max_overflow: int = 0, **policy: Any) -> Bench:
        """A bench whose first workers are idle."""
        bench = cls(pool_size, max_overflow, **policy)
        for spawn in bench.step(Start()):
            assert isinstance(spawn, Spawn)
            bench.step(WorkerReady(spawn.worker))
        bench.log.clear()
        return bench

    def step(self, event: Event, at: float | None = None) -> list[Effect]:
        if at is not None:
            self.now = at
        effects = self.broker.step(event, self.now)
        self.log += effects
        return effects

    def acts(self, event: Event, at: float | None = None) -> list[Effect]:
        """Step, and give the effects other than reports."""
        return [effect for effect in self.step(event, at) if not isinstance(effect, Report)]

    def checkout(
        self,
        client: int = ALICE,
        block: bool = True,
        deadline: float | None = None,
        keep: bool = False,
        spare_own: bool = False,
    ) -> list[Effect]:
        ticket = next(self.tickets)
        return self.step(Checkout(client, ticket, block, deadline, keep, spare_own))

    def keep(self, client: int, spare_own: bool = False) -> list[Effect]:
        return self.checkout(client, keep=True, spare_own=spare_own)

    def lease(self, client: int = ALICE) -> Grant:
        (grant,) = self.checkout(client)
        assert isinstance(grant, Grant)
        return grant

    def checkin(self, grant: Grant) -> list[Effect]:
        return self.step(Checkin(grant.client, grant.lease))

    def take(self, kind: type) -> list[Any]:
        """Give all effects of one kind so far, and forget them."""
        found = [effect for effect in self.log if type(effect) is kind]
        self.log = [effect for effect in self.log if type(effect) is not kind]
        return found

    def counter(self, name: str) -> int:
        return self.broker.status().counters[name]

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """Booting, idle, leased, retiring, waiting."""
        status = self.broker.status()
        return status.booting, status.idle, status.leased, status.retiring, status.waiting


def same(got: Sequence[Effect], expected: Sequence[Effect]) -> bool:
    """Compare effects by type and value; as tuples alone, `Retire(1)` would equal `(1,)`."""
    return [(type(e), e) for e in got] == [(type(e), e) for e in expected]


# The start


def test_start_spawns_pool_size_workers_in_the_lowest_slots() -> None:
    assert same(Bench(3, 2).step(Start()), [Spawn(1, 0), Spawn(2, 1), Spawn(3, 2)])


def test_an_overflow_only_pool_starts_empty_and_grows_by_demand() -> None:
    bench = Bench(0, 2)
    assert bench.step(Start()) == []
    assert same(bench.checkout(), [Spawn(1, 0)])
    assert same(bench.step(WorkerReady(1)), [Grant(ALICE, 1, 1, 1)])


@pytest.mark.parametrize("event", [Checkout(1, 1, True, None), Tick(), Terminate()])
def test_nothing_comes_before_start(event: Event) -> None:
    bench = Bench()
    with pytest.raises(BrokerError, match="expected one of Start"):
        bench.step(event)
    assert same(bench.step(Start()), [Spawn(1, 0)])


def test_a_second_start_is_impossible() -> None:
    bench = Bench.ready(1)
    with pytest.raises(BrokerError, match="Start"):
        bench.step(Start())


def test_what_is_no_event_is_impossible() -> None:
    bench = Bench.ready(1)
    with pytest.raises(BrokerError, match="got 'checkout'"):
        bench.broker.step("checkout", 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "event",
    [
        WorkerReady(2),
        WorkerFailed(2, "x"),
        WorkerExited(2, "x"),
        WorkerExited(0, "x"),
        WorkerReady(1),
        WorkerFailed(1, "x"),
        Resize(-1, 4),
        Resize(4, -1),
        Resize(0, 0),
    ],
)
def test_an_impossible_event_raises_and_changes_nothing(event: Event) -> None:
    bench = Bench.ready(1)
    before = bench.broker.status(), bench.broker.next_deadline()
    with pytest.raises(BrokerError):
        bench.step(event)
    assert (bench.broker.status(), bench.broker.next_deadline()) == before


def test_time_that_runs_backwards_stands_still() -> None:
    bench = Bench.ready(1, start_timeout=10.0)
    bench.step(Tick(), at=100.0)
    bench.step(WorkerExited(1, "crash"), at=50.0)
    assert bench.broker.next_deadline() == 110.0


# Checkout and checkin


def test_an_idle_worker_is_granted_at_once() -> None:
    bench = Bench.ready(1)
    assert same(bench.step(Checkout(ALICE, 7, True, None)), [Grant(ALICE, 7, 1, 1)])
    assert bench.counts == (0, 0, 1, 0, 0)


def test_lease_numbers_only_grow() -> None:
    bench = Bench.ready(2)
    leases = []
    for _ in range(5):
        grant = bench.lease()
        leases.append(grant.lease)
        bench.checkin(grant)
    assert leases == [1, 2, 3, 4, 5]


def test_lifo_grants_the_most_recently_used() -> None:
    bench = Bench.ready(3, strategy="lifo")
    grants = [bench.lease() for _ in range(3)]
    assert [grant.worker for grant in grants] == [3, 2, 1]
    for grant in grants:
        bench.checkin(grant)
    assert bench.lease().worker == 1


def test_fifo_grants_the_longest_idle() -> None:
    bench = Bench.ready(3, strategy="fifo")
    first = bench.lease()
    assert first.worker == 1
    bench.checkin(first)
    assert [bench.lease().worker for _ in range(3)] == [2, 3, 1]


def test_a_checked_in_worker_goes_to_the_first_waiter() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    assert bench.checkout(BOB) == []
    assert bench.checkout(CAROL) == []
    assert same(bench.checkin(grant), [Grant(BOB, 2, 2, 1)])


def test_a_deadline_is_checked_when_the_turn_comes() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB, deadline=5.0)
    bench.checkout(CAROL, deadline=5.5)
    bench.now = 5.0
    refusal, granted = bench.checkin(grant)
    assert isinstance(refusal, Refuse)
    assert refusal[:3] == (BOB, 2, "timeout")
    assert same([granted], [Grant(CAROL, 3, 2, 1)])


def test_a_deadline_that_passed_on_arrival_is_refused_though_a_worker_is_idle() -> None:
    bench = Bench.ready(1)
    bench.now = 5.0
    (refusal,) = bench.checkout(deadline=5.0)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "timeout"
    assert bench.counts == (0, 1, 0, 0, 0)


def test_the_broker_keeps_no_timer_for_waiters() -> None:
    bench = Bench.ready(1)
    bench.lease()
    bench.checkout(BOB, deadline=5.0)
    assert bench.broker.next_deadline() is None
    assert bench.step(Tick(), at=6.0) == []


def test_a_ticket_that_is_open_already_is_counted_and_told_again() -> None:
    bench = Bench.ready(1)
    granted = bench.step(Checkout(ALICE, 1, True, None))
    bench.step(Checkout(ALICE, 2, True, None))
    assert bench.step(Checkout(ALICE, 1, True, None)) == granted
    assert bench.step(Checkout(ALICE, 2, True, None)) == []
    assert bench.counter("duplicate_checkouts") == 2
    assert bench.counts == (0, 0, 1, 0, 1)


def test_two_clients_may_use_the_same_ticket_number() -> None:
    bench = Bench.ready(2)
    assert same(bench.step(Checkout(ALICE, 1, True, None)), [Grant(ALICE, 1, 1, 2)])
    assert same(bench.step(Checkout(BOB, 1, True, None)), [Grant(BOB, 1, 2, 1)])


def test_a_second_checkin_frees_nobody_elses_worker() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.checkin(grant)
    other = bench.lease(BOB)
    assert other.worker == grant.worker
    assert bench.checkin(grant) == []
    assert bench.counter("stale_checkins") == 1
    assert bench.broker.lease_worker(BOB, other.lease) == other.worker


def test_a_foreign_checkin_frees_nobody_elses_worker() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    assert bench.step(Checkin(BOB, grant.lease)) == []
    assert bench.step(Destroy(BOB, grant.lease, "mine")) == []
    assert bench.counter("foreign_checkins") == 2
    assert bench.broker.lease_worker(ALICE, grant.lease) == 1
    assert bench.broker.lease_worker(BOB, grant.lease) is None
    assert bench.broker.lease_worker(ALICE, 99) is None


# Not blocking


def test_a_nonblocking_checkout_of_a_full_pool_is_refused() -> None:
    bench = Bench.ready(1)
    bench.lease()
    (refusal,) = bench.checkout(BOB, block=False)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "full"
    assert bench.broker.status().state == "full"


def test_a_nonblocking_checkout_waits_for_the_overflow_worker_it_started() -> None:
    bench = Bench.ready(1, 1)
    bench.lease(ALICE)
    assert same(bench.checkout(BOB, block=False), [Spawn(2, 1)])
    (refusal,) = bench.checkout(CAROL, block=False)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "full"
    assert same(bench.step(WorkerReady(2)), [Grant(BOB, 2, 2, 2)])


def test_a_nonblocking_checkout_waits_for_a_worker_that_boots_anyway() -> None:
    bench = Bench(1)
    bench.step(Start())
    assert bench.checkout(block=False) == []
    assert same(bench.step(WorkerReady(1)), [Grant(ALICE, 1, 1, 1)])


def test_a_nonblocking_checkout_does_not_wait_out_a_backoff() -> None:
    bench = Bench.ready(1, 1)
    bench.lease(ALICE)
    bench.checkout(BOB)
    bench.step(WorkerFailed(2, "no database"))
    bench.step(Cancel(BOB, 2))
    (refusal,) = bench.checkout(CAROL, block=False)
    assert same([refusal], [Refuse(CAROL, 3, "factory_failed", "no database")])


def test_a_failed_start_refuses_nonblocking_waiters_while_blocking_ones_wait_for_a_checkin() -> (
    None
):
    bench = Bench.ready(1, 2)
    grant = bench.lease(ALICE)
    bench.checkout(BOB, block=True)
    bench.checkout(CAROL, block=False)
    bench.step(WorkerFailed(2, "no database"))
    bench.step(WorkerFailed(3, "no database"))
    assert same(bench.take(Refuse), [Refuse(CAROL, 3, "factory_failed", "no database")])
    assert same(bench.checkin(grant), [Grant(BOB, 2, 2, 1)])


def test_a_nonblocking_waiter_does_not_wait_out_the_backoff_of_a_crash_loop() -> None:
    bench = Bench.ready(2, 2)
    for number in (2, 3, 4):
        bench.step(WorkerExited(number, "out of memory"))
        bench.step(WorkerReady(number + 1))
    bench.step(WorkerExited(1, "out of memory"))
    bench.step(WorkerExited(5, "out of memory"))
    assert bench.checkout(ALICE) == []
    assert bench.checkout(BOB, block=False) == []
    assert same(
        bench.step(WorkerReady(6)),
        [Grant(ALICE, 1, 1, 6), Refuse(BOB, 2, "factory_failed", "out of memory")],
    )


# Cancel


def test_a_cancelled_waiter_is_never_granted() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB)
    assert same(bench.step(Cancel(BOB, 2)), [Refuse(BOB, 2, "cancelled", "")])
    assert bench.checkin(grant) == []
    assert bench.counts == (0, 1, 0, 0, 0)


def test_a_cancel_that_crosses_the_grant_acts_as_a_checkin() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB)
    effects = bench.step(Cancel(ALICE, 1))
    assert same(effects, [Refuse(ALICE, 1, "cancelled", ""), Grant(BOB, 2, 2, 1)])
    assert bench.checkin(grant) == []
    assert bench.counter("stale_checkins") == 1
    assert bench.counter("cancelled_grants") == 1


def test_a_cancel_of_an_unknown_ticket_is_answered_and_counted() -> None:
    bench = Bench.ready(1)
    bench.checkin(bench.lease(ALICE))
    assert same(bench.step(Cancel(ALICE, 1)), [Refuse(ALICE, 1, "cancelled", "")])
    assert same(bench.step(Cancel(BOB, 1)), [Refuse(BOB, 1, "cancelled", "")])
    assert bench.counter("unknown_cancels") == 2
    assert bench.counts == (0, 1, 0, 0, 0)


def test_a_cancel_when_nothing_can_start_tells_the_factorys_failure_and_not_a_bare_timeout() -> (
    None
):
    bench = Bench(1)
    bench.step(Start())
    bench.step(WorkerFailed(1, "no database"))
    bench.checkout(BOB, deadline=3.0)
    assert same(bench.step(Tick(), at=1.0), [Spawn(2, 0)])
    effects = bench.step(Cancel(BOB, 1), at=3.0)
    assert same(effects, [Refuse(BOB, 1, "factory_failed", "no database")])


def test_a_cancelled_demand_starts_no_second_worker() -> None:
    bench = Bench.ready(1, 3)
    bench.lease(ALICE)
    assert same(bench.checkout(BOB), [Spawn(2, 1)])
    bench.step(Cancel(BOB, 2))
    assert bench.checkout(CAROL) == []


def test_ten_thousand_waiters_may_leave_in_any_order() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    waiting = list(range(2, 10_002))
    for ticket in waiting:
        bench.step(Checkout(ticket % 7 + 10, ticket, True, None))
    assert bench.broker.status().waiting == 10_000
    leaving = random.Random(1).sample(waiting, 9_990)
    for ticket in leaving:
        client = ticket % 7 + 10
        assert same(bench.step(Cancel(client, ticket)), [Refuse(client, ticket, "cancelled", "")])
    served = []
    while bench.broker.status().waiting:
        (grant,) = bench.checkin(grant)  # type: ignore[assignment]
        served.append(grant.ticket)
    assert served == sorted(set(waiting) - set(leaving))


# Dirty workers


def test_a_destroyed_worker_is_killed_and_replaced_in_its_slot() -> None:
    bench = Bench.ready(2)
    grant = bench.lease()
    effects = bench.step(Destroy(ALICE, grant.lease, "broken pipe"))
    assert same(effects, [Kill(2, "broken pipe"), Spawn(3, 1)])
    assert bench.counts == (1, 1, 0, 1, 0)
    assert bench.step(WorkerExited(2, "SIGKILL")) == []
    assert bench.counts == (1, 1, 0, 0, 0)


def test_a_gone_client_loses_its_place_and_its_workers_are_dirty() -> None:
    bench = Bench.ready(2)
    bench.lease(ALICE)
    bench.lease(BOB)
    bench.checkout(ALICE)
    bench.checkout(CAROL)
    effects = bench.step(ClientGone(ALICE))
    assert same(effects, [Kill(2, "its client has gone"), Spawn(3, 1)])
    assert bench.counts == (1, 0, 1, 1, 1)
    assert same(bench.step(WorkerReady(3)), [Grant(CAROL, 4, 3, 3)])
    assert bench.step(ClientGone(ALICE)) == []


def test_a_gone_client_s_released_workers_are_clean_if_it_had_them_for_jobs() -> None:
    bench = Bench.ready(3)
    (kept,), (other,) = bench.keep(ALICE), bench.keep(ALICE)
    own = bench.lease(ALICE)
    assert isinstance(kept, Grant) and isinstance(other, Grant)
    found = bench.broker.job_leases(ALICE)
    assert [worker.lease for worker in found] == [kept.lease, other.lease]
    released = tuple(Released(grant.worker, grant.lease) for grant in (kept, own))
    assert same(
        bench.step(ClientGone(ALICE, released)),
        [
            *(Kill(grant.worker, "its client has gone") for grant in (other, own)),
            *(Spawn(4, 0), Spawn(5, 1)),
        ],
    )
    assert bench.counts == (2, 1, 0, 2, 0)


def test_a_gone_client_s_released_worker_goes_to_who_waits_and_not_to_itself() -> None:
    bench = Bench.ready(2)
    bench.lease(CAROL)
    (grant,) = bench.keep(ALICE)
    assert isinstance(grant, Grant) and grant.keep
    bench.checkout(ALICE)
    bench.checkout(BOB)
    released = (Released(grant.worker, grant.lease),)
    assert same(bench.step(ClientGone(ALICE, released)), [Grant(BOB, 4, 3, grant.worker)])


def test_a_gone_client_s_released_worker_retires_if_it_is_worn() -> None:
    bench = Bench.ready(1)
    (grant,) = bench.keep(ALICE)
    assert isinstance(grant, Grant)
    released = (Released(grant.worker, grant.lease, True),)
    effects = bench.step(ClientGone(ALICE, released))
    assert same(effects, [Retire(grant.worker), Spawn(2, 0)])


def test_a_job_s_lease_that_may_not_be_kept_is_clean_as_well_if_released() -> None:
    bench = Bench.ready(1)
    own = bench.lease(BOB)
    bench.keep(ALICE)
    bench.checkout(CAROL)
    (grant,) = bench.checkin(own)
    assert isinstance(grant, Grant) and not grant.keep
    released = (Released(grant.worker, grant.lease),)
    assert same(bench.step(ClientGone(ALICE, released)), [Grant(CAROL, 3, 3, 1)])


# Crashes


@pytest.mark.parametrize("leased", [False, True])
def test_a_crashed_worker_is_replaced_at_once_and_its_slot_inherited(leased: bool) -> None:
    bench = Bench.ready(3)
    grants = [bench.lease() for _ in range(3)]
    if not leased:
        bench.checkin(grants[1])
    effects = bench.step(WorkerExited(2, "signal 11"))
    assert same(effects, [Report("crashed", 2, "signal 11"), Spawn(4, 1)])
    assert bench.broker.worker(2) is None
    assert bench.broker.lease_worker(ALICE, grants[1].lease) is None


def test_a_checkin_after_the_crash_is_stale() -> None:
    bench = Bench.ready(1)
    grant = bench.lease()
    bench.step(WorkerExited(1, "signal 11"))
    assert bench.checkin(grant) == []
    assert bench.counter("stale_checkins") == 1
    assert same(bench.step(Cancel(ALICE, 1)), [Refuse(ALICE, 1, "cancelled", "")])


def test_a_crash_loop_of_unused_workers_becomes_a_failing_factory() -> None:
    bench = Bench.ready(2)
    number = 2
    for _ in range(2):
        effects = bench.acts(WorkerExited(number, "out of memory"))
        number += 1
        assert len(effects) == 1, "replaced at once"
        bench.step(WorkerReady(number))
    assert bench.acts(WorkerExited(number, "out of memory")) == []
    assert bench.take(Report)[-1].what == "backing_off"
    assert bench.broker.status().last_failure == "out of memory"
    assert bench.broker.next_deadline() == 1.0
    assert same(bench.acts(Tick(), at=1.0), [Spawn(number + 1, 1)])
    # Getting ready proves nothing in a crash loop, so the next pause is longer.
    bench.step(WorkerReady(number + 1))
    assert bench.acts(WorkerExited(number + 1, "out of memory")) == []
    assert bench.broker.next_deadline() == 3.0


def test_a_grant_ends_a_crash_loop() -> None:
    bench = Bench.ready(1)
    for number in range(1, 20):
        bench.checkin(bench.lease())
        assert len(bench.acts(WorkerExited(number, "crash"))) == 1
        bench.step(WorkerReady(number + 1))
    assert bench.counter("crashes") == 19
    assert bench.counter("start_failures") == 0


def test_the_exit_of_a_forgotten_worker_is_counted_and_ignored() -> None:
    bench = Bench.ready(1)
    bench.step(WorkerExited(1, "crash"))
    assert bench.step(WorkerExited(1, "again")) == []
    assert bench.step(WorkerReady(1)) == []
    assert bench.counter("late_events") == 2


# Failing starts


def test_a_failed_start_backs_off_and_is_tried_again() -> None:
    bench = Bench(1)
    bench.step(Start())
    effects = bench.step(WorkerFailed(1, "no database"))
    assert same(
        effects,
        [
            Kill(1, "its start failed"),
            Report("start_failed", 1, "no database"),
            Report("backing_off", None, "next start in 1 s"),
        ],
    )
    assert bench.broker.next_deadline() == 1.0
    assert bench.step(Tick(), at=0.5) == []
    assert same(bench.step(Tick(), at=1.0), [Spawn(2, 0)])


def test_a_wave_of_parallel_failures_lengthens_the_backoff_once() -> None:
    bench = Bench(8)
    bench.step(Start())
    for number in range(1, 9):
        bench.step(WorkerExited(number, "no such file"))
    assert bench.counter("start_failures") == 8
    assert bench.broker.next_deadline() == 1.0
    assert len(bench.acts(Tick(), at=1.0)) == 1, "one probe"
    bench.step(WorkerExited(9, "no such file"))
    assert bench.broker.next_deadline() == 3.0


def test_the_backoff_doubles_up_to_its_maximum() -> None:
    bench = Bench(1, backoff_first=1.0, backoff_max=5.0)
    bench.step(Start())
    delays = []
    for number in range(1, 6):
        bench.step(WorkerExited(number, "x"))
        due = bench.broker.next_deadline()
        assert due is not None
        delays.append(due - bench.now)
        bench.step(Tick(), at=due)
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_worker_that_gets_ready_ends_the_backoff_for_all() -> None:
    bench = Bench(3)
    bench.step(Start())
    for number in (1, 2, 3):
        bench.step(WorkerExited(number, "x"))
    bench.step(Tick(), at=1.0)
    assert same(
        bench.step(WorkerReady(4)),
        [Report("recovered", 4, "a worker started"), Spawn(5, 1), Spawn(6, 2)],
    )
    assert not bench.broker.status().failing
    assert bench.broker.status().last_failure == "x"


def test_waiters_learn_why_starts_fail_when_no_live_worker_could_serve_them() -> None:
    bench = Bench(2)
    bench.step(Start())
    bench.checkout(ALICE)
    bench.checkout(BOB)
    bench.step(WorkerFailed(1, "no database"))
    assert bench.take(Refuse) == [], "one still boots"
    bench.step(WorkerFailed(2, "no database"))
    assert same(
        bench.take(Refuse),
        [
            Refuse(ALICE, 1, "factory_failed", "no database"),
            Refuse(BOB, 2, "factory_failed", "no database"),
        ],
    )


def test_workers_that_die_while_starting_are_tried_three_times_before_waiters_are_refused() -> None:
    bench = Bench(1)
    bench.step(Start())
    bench.checkout(ALICE)
    for worker in (1, 2):
        bench.step(WorkerExited(worker, "signal 9"))
        assert bench.take(Refuse) == []
        due = bench.broker.next_deadline()
        assert due is not None
        bench.step(Tick(), at=due)
    bench.step(WorkerExited(3, "signal 9"))
    assert same(bench.take(Refuse), [Refuse(ALICE, 1, "factory_failed", "signal 9")])


def test_waiters_keep_waiting_for_a_live_worker_while_starts_fail() -> None:
    bench = Bench.ready(1, 1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB)
    assert same(bench.acts(WorkerFailed(2, "no database")), [Kill(2, "its start failed")])
    assert same(bench.checkin(grant), [Grant(BOB, 2, 2, 1)])


def test_a_checkout_that_cannot_outlast_the_backoff_is_refused_with_the_reason_at_once() -> None:
    bench = Bench(1)
    bench.step(Start())
    bench.step(WorkerFailed(1, "no database"))
    assert same(bench.checkout(deadline=0.9), [Refuse(ALICE, 1, "factory_failed", "no database")])
    assert bench.checkout(deadline=1.5) == []
    assert bench.checkout(deadline=None) == []
    assert same(bench.step(Tick(), at=1.0), [Spawn(2, 0)])
    effects = bench.acts(WorkerReady(2))
    assert same(effects, [Grant(ALICE, 2, 1, 2)])


def test_without_demand_a_failing_overflow_start_is_not_repeated() -> None:
    bench = Bench(0, 1)
    bench.step(Start())
    bench.checkout()
    bench.step(WorkerFailed(1, "x"))
    bench.step(WorkerExited(1, "x"))
    assert bench.broker.next_deadline() is None
    assert bench.step(Tick(), at=100.0) == []


def test_a_start_that_takes_too_long_is_killed_and_counts_as_failed() -> None:
    bench = Bench(1, start_timeout=30.0)
    bench.step(Start())
    bench.checkout()
    assert bench.broker.next_deadline() == 30.0
    reason = "did not start within 30 s"
    assert same(
        bench.acts(Tick(), at=30.0),
        [Kill(1, reason), Refuse(ALICE, 1, "factory_failed", reason)],
    )
    assert bench.step(WorkerReady(1)) == []
    assert bench.counter("late_events") == 1


def test_a_slow_start_blocks_nobody_else() -> None:
    bench = Bench.ready(1, 1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB)
    assert bench.counts == (1, 0, 1, 0, 1)
    assert same(bench.checkin(grant), [Grant(BOB, 2, 2, 1)])


def test_a_failed_worker_is_known_until_it_exits() -> None:
    bench = Bench(1)
    bench.step(Start())
    bench.step(WorkerFailed(1, "x"))
    record = bench.broker.worker(1)
    assert record is not None
    assert record.state is WorkerState.KILLED
    bench.step(WorkerExited(1, "exit code 1"))
    assert bench.broker.worker(1) is None
    assert bench.counter("start_failures") == 1


# Overflow


def test_overflow_with_a_ttl_of_zero_is_retired_at_checkin() -> None:
    bench = Bench.ready(1, 1, overflow_ttl=0.0)
    first = bench.lease(ALICE)
    bench.checkout(BOB)
    bench.step(WorkerReady(2))
    assert same(bench.checkin(first), [Retire(1)])
    assert same(bench.step(Checkin(BOB, 2)), [])
    assert bench.counts == (0, 1, 0, 1, 0)


def test_overflow_stays_warm_for_its_ttl_and_the_longest_idle_goes_first() -> None:
    bench = Bench.ready(1, 2, overflow_ttl=5.0)
    bench.lease()
    for number in (2, 3):
        bench.checkout()
        bench.step(WorkerReady(number))
    grants = bench.take(Grant)
    for at, grant in zip((10.0, 11.0, 12.0), grants, strict=True):
        bench.step(Checkin(grant.client, grant.lease), at)
    assert bench.broker.next_deadline() == 15.0
    assert bench.step(Tick(), at=14.9) == []
    assert same(bench.step(Tick(), at=15.0), [Retire(1)])
    assert same(bench.step(Tick(), at=16.0), [Retire(2)])
    for number in (1, 2):
        bench.step(WorkerExited(number, "stopped"))
    assert bench.broker.next_deadline() is None
    assert bench.step(Tick(), at=100.0) == [], "pool_size workers stay"
    assert bench.counts == (0, 1, 0, 0, 0)


def test_warm_overflow_is_used_again() -> None:
    bench = Bench.ready(1, 1, overflow_ttl=5.0)
    bench.lease()
    bench.checkout(BOB)
    bench.step(WorkerReady(2))
    bench.step(Checkin(BOB, 2), at=1.0)
    assert bench.lease(CAROL).worker == 2
    assert bench.broker.next_deadline() is None


def test_a_worker_that_boots_for_a_cancelled_waiter_is_overflow() -> None:
    bench = Bench.ready(1, 1, overflow_ttl=0.0)
    bench.lease()
    bench.checkout(BOB)
    bench.step(Cancel(BOB, 2))
    assert same(bench.step(WorkerReady(2)), [Retire(2)])


def test_a_stop_that_takes_too_long_is_killed() -> None:
    bench = Bench.ready(1, 1, overflow_ttl=0.0, stop_timeout=3.0)
    grant = bench.lease()
    bench.checkout(BOB)
    bench.step(WorkerReady(2))
    bench.checkin(grant)
    assert bench.broker.next_deadline() == 3.0
    assert same(
        bench.step(Tick(), at=3.0),
        [
            Report("stop_overrun", 1, "did not stop within 3 s"),
            Kill(1, "did not stop within 3 s"),
        ],
    )
    assert bench.broker.next_deadline() is None


def test_a_retiring_worker_does_not_count_against_the_limit() -> None:
    bench = Bench.ready(1, 1, overflow_ttl=0.0)
    grant = bench.lease()
    bench.checkout(BOB)
    bench.step(WorkerReady(2))
    assert same(bench.checkin(grant), [Retire(1)])
    assert same(bench.checkout(CAROL), [Spawn(3, 0)])
    assert bench.counts == (1, 0, 1, 1, 1)


def test_an_endless_ttl_needs_no_tick() -> None:
    bench = Bench.ready(0, 1, overflow_ttl=math.inf)
    bench.checkout()
    bench.step(WorkerReady(1))
    bench.step(Checkin(ALICE, 1))
    assert bench.broker.next_deadline() is None


# Kept leases


def test_a_lease_is_kept_by_whoever_asks_while_nobody_waits() -> None:
    bench = Bench.ready(2)
    assert same(bench.keep(ALICE), [Grant(ALICE, 1, 1, 2, keep=True)])
    assert same(bench.checkout(BOB), [Grant(BOB, 2, 2, 1, keep=False)])
    assert bench.counts == (0, 0, 2, 0, 0)
    assert bench.broker.status().kept == 1
    (record,) = bench.broker.kept_workers()
    assert (record.id, record.kept, record.recalled) == (2, True, False)


def test_a_kept_lease_may_be_checked_in_all_the_same() -> None:
    bench = Bench.ready(1)
    (grant,) = bench.keep(ALICE)
    assert isinstance(grant, Grant)
    assert bench.checkin(grant) == []
    assert bench.broker.status().kept == 0
    assert same(bench.checkout(BOB), [Grant(BOB, 2, 2, 1)])


def test_a_kept_lease_is_recalled_for_who_waits_and_goes_to_them() -> None:
    bench = Bench.ready(1)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB), [Recall(1, 1)])
    (record,) = bench.broker.kept_workers()
    assert record.recalled
    assert same(bench.step(Released(1, 1)), [Grant(BOB, 2, 2, 1)])
    assert not record.kept and not record.recalled
    assert bench.counter("recalled") == 1
    assert bench.broker.lease_worker(ALICE, 1) is None


def test_a_released_worker_goes_to_the_first_in_time_whoever_it_was_recalled_for() -> None:
    bench = Bench.ready(2)
    bench.lease(CAROL)
    bench.keep(ALICE)
    bench.checkout(ALICE, spare_own=True, deadline=5.0)
    bench.checkout(ALICE, spare_own=True)
    assert same(bench.checkout(BOB), [Recall(1, 2)])
    effects = bench.step(Released(1, 2), at=5.0)
    assert isinstance(effects[0], Refuse) and effects[0].why == "timeout"
    assert same(effects[1:], [Grant(ALICE, 4, 3, 1)])


def test_the_longest_kept_is_recalled_and_one_for_each_who_waits() -> None:
    bench = Bench.ready(3)
    for client in (ALICE, BOB, ALICE):
        bench.keep(client)
    assert same(bench.checkout(CAROL), [Recall(3, 1)])
    assert same(bench.checkout(CAROL), [Recall(2, 2)])
    assert same(bench.checkout(CAROL), [Recall(1, 3)])
    assert bench.checkout(CAROL) == []


def test_a_lease_is_recalled_once_and_a_released_worker_that_nobody_wants_is_idle() -> None:
    bench = Bench.ready(1)
    bench.keep(ALICE)
    bench.checkout(BOB)
    bench.step(Cancel(BOB, 2))
    assert bench.checkout(BOB) == []
    bench.step(Cancel(BOB, 3))
    assert bench.step(Released(1, 1)) == []
    assert bench.counts == (0, 1, 0, 0, 0)


def test_no_overflow_is_started_for_who_is_served_by_a_recall() -> None:
    bench = Bench.ready(1, 2)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB), [Recall(1, 1)])
    assert same(bench.checkout(CAROL), [Spawn(2, 1)])


def test_a_busy_worker_makes_another_be_recalled_and_then_overflow_be_started() -> None:
    bench = Bench.ready(2, 1)
    bench.keep(ALICE)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB), [Recall(2, 1)])
    assert same(bench.step(Busy(2, 1)), [Recall(1, 2)])
    assert same(bench.step(Busy(1, 2)), [Spawn(3, 2)])
    assert same(bench.step(Released(2, 1)), [Grant(BOB, 3, 3, 2)])
    assert bench.step(Released(1, 2)) == []
    assert bench.counter("recalled") == 2


def test_a_lease_granted_while_somebody_waits_is_not_kept() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.keep(BOB)
    bench.keep(CAROL)
    assert same(bench.checkin(grant), [Grant(BOB, 2, 2, 1, keep=False)])
    assert same(bench.step(Checkin(BOB, 2)), [Grant(CAROL, 3, 3, 1, keep=True)])


def test_a_lease_granted_while_only_its_own_sparing_client_waits_is_kept() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.keep(BOB, spare_own=True)
    bench.keep(BOB, spare_own=True)
    assert same(bench.checkin(grant), [Grant(BOB, 2, 2, 1, keep=True)])
    assert same(bench.checkout(CAROL), [Recall(1, 2)])


def test_an_overflow_lease_is_not_kept() -> None:
    bench = Bench.ready(1, 1)
    bench.lease(ALICE)
    bench.keep(BOB)
    assert same(bench.step(WorkerReady(2)), [Grant(BOB, 2, 2, 2, keep=False)])


def test_a_client_that_spares_its_own_takes_none_from_itself_and_grows_instead() -> None:
    bench = Bench.ready(1, 1)
    bench.keep(ALICE)
    assert same(bench.keep(ALICE, spare_own=True), [Spawn(2, 1)])
    assert same(bench.keep(ALICE, spare_own=False), [Recall(1, 1)])


def test_a_client_that_spares_its_own_takes_from_others() -> None:
    bench = Bench.ready(3)
    bench.keep(ALICE)
    bench.keep(ALICE)
    bench.keep(BOB)
    assert same(bench.keep(ALICE, spare_own=True), [Recall(1, 3)])
    assert bench.keep(ALICE, spare_own=True) == []
    # Somebody else is behind them: now there are three who wait, and nothing is spared.
    assert same(bench.keep(CAROL, spare_own=True), [Recall(3, 1), Recall(2, 2)])


def test_a_recalled_lease_that_ends_otherwise_is_replaced_by_the_next() -> None:
    for end in (
        Destroy(ALICE, 1, "broken"),
        WorkerExited(3, "signal 9"),
    ):
        bench = Bench.ready(3)
        bench.keep(ALICE)
        bench.keep(BOB)
        bench.keep(BOB)
        assert same(bench.checkout(CAROL), [Recall(3, 1)])
        effects = bench.acts(end)
        assert Recall(2, 2) in effects and Spawn(4, 2) in effects
        assert bench.acts(Released(3, 1)) == []
        assert bench.counter("late_events") == 1


def test_a_recalled_lease_that_is_checked_in_serves_at_once_and_its_release_is_late() -> None:
    bench = Bench.ready(2)
    bench.keep(ALICE)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB), [Recall(2, 1)])
    assert same(bench.step(Checkin(ALICE, 1)), [Grant(BOB, 3, 3, 2)])
    assert bench.step(Released(2, 1)) == []
    assert bench.step(Busy(2, 1)) == []
    assert bench.counter("late_events") == 2
    assert bench.counts == (0, 0, 2, 0, 0)
    assert same(bench.checkout(CAROL), [Recall(1, 2)])


def test_a_gone_client_takes_what_it_kept_with_it() -> None:
    bench = Bench.ready(2)
    bench.keep(ALICE)
    bench.keep(ALICE)
    bench.checkout(BOB)
    reason = "its client has gone"
    assert same(
        bench.step(ClientGone(ALICE)),
        [Kill(2, reason), Kill(1, reason), Spawn(3, 0), Spawn(4, 1)],
    )
    assert bench.broker.status().kept == 0


def test_answers_about_leases_that_are_not_kept_are_late_and_of_unborn_workers_impossible() -> None:
    bench = Bench.ready(2)
    bench.lease(ALICE)
    bench.keep(ALICE)
    for event in (Released(2, 1), Busy(2, 1), Released(1, 1), Busy(1, 2)):
        assert bench.step(event) == []
    assert bench.counter("late_events") == 4
    assert bench.counts == (0, 0, 2, 0, 0)
    for event in (Released(3, 1), Busy(0, 1)):
        with pytest.raises(BrokerError, match="never spawned"):
            bench.step(event)


def test_a_nonblocking_checkout_waits_for_a_kept_lease_and_is_refused_when_it_is_in_use() -> None:
    bench = Bench.ready(2)
    bench.keep(ALICE)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB, block=False), [Recall(2, 1)])
    assert same(bench.step(Busy(2, 1)), [Recall(1, 2)])
    assert same(bench.step(Busy(1, 2)), [Refuse(BOB, 3, "full", "all 2 workers are taken")])
    (refusal,) = bench.checkout(BOB, block=False)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "full"


def test_a_nonblocking_checkout_is_refused_at_once_if_all_that_is_kept_is_spared_or_promised() -> (
    None
):
    bench = Bench.ready(1)
    bench.keep(ALICE)
    (refusal,) = bench.checkout(ALICE, block=False, spare_own=True)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "full"
    assert same(bench.checkout(BOB), [Recall(1, 1)])
    (refusal,) = bench.checkout(CAROL, block=False)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "full"


def test_nothing_is_recalled_for_a_nonblocking_checkout_that_is_refused() -> None:
    bench = Bench.ready(1)
    bench.keep(ALICE)
    assert bench.checkout(ALICE, spare_own=True) == []
    effects = bench.checkout(BOB, block=False)
    assert same(effects, [Refuse(BOB, 3, "full", "all 1 workers are taken")])
    bench = Bench.ready(1, 1)
    bench.keep(ALICE)
    bench.checkout(ALICE, spare_own=True)
    bench.step(WorkerFailed(2, "no database"))
    effects = bench.checkout(BOB, block=False)
    assert same(effects, [Refuse(BOB, 3, "factory_failed", "no database")])


def test_only_those_nonblocking_waiters_are_refused_that_neither_a_recall_nor_a_start_serves() -> (
    None
):
    bench = Bench.ready(2, 1)
    bench.keep(ALICE)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB, block=False), [Recall(2, 1)])
    assert same(bench.checkout(CAROL), [Recall(1, 2)])
    assert same(bench.checkout(CAROL, block=False), [Spawn(3, 2)])
    effects = bench.step(Busy(2, 1))
    assert same(effects, [Refuse(CAROL, 5, "full", "all 3 workers are taken")])
    assert bench.step(Busy(1, 2)) == [], "a start is under way for BOB"
    assert same(bench.step(WorkerReady(3)), [Grant(BOB, 3, 3, 3)])


def test_a_nonblocking_waiter_that_lost_what_was_coming_does_not_wait_out_a_backoff() -> None:
    bench = Bench.ready(1, 1)
    bench.keep(ALICE)
    bench.checkout(ALICE, spare_own=True)
    bench.acts(WorkerFailed(2, "no database"))
    bench.step(Cancel(ALICE, 2))
    assert same(bench.checkout(BOB, block=False), [Recall(1, 1)])
    effects = bench.step(Busy(1, 1))
    assert same(effects, [Refuse(BOB, 3, "factory_failed", "no database")])


def test_a_failed_start_does_not_refuse_those_that_a_recall_serves() -> None:
    bench = Bench.ready(1, 1)
    bench.keep(ALICE)
    assert same(bench.checkout(ALICE, block=False, spare_own=True), [Spawn(2, 1)])
    bench.step(Cancel(ALICE, 2))
    assert same(bench.checkout(BOB, block=False), [Recall(1, 1)])
    assert bench.checkout(CAROL, block=False) == []
    effects = bench.acts(WorkerFailed(2, "no database"))
    assert same(
        effects,
        [Kill(2, "its start failed"), Refuse(CAROL, 4, "factory_failed", "no database")],
    )
    assert same(bench.step(Released(1, 1)), [Grant(BOB, 3, 2, 1)])


def test_draining_recalls_every_kept_lease_and_lets_none_be_kept() -> None:
    bench = Bench.ready(3)
    bench.lease(CAROL)
    bench.keep(ALICE)
    bench.keep(ALICE)
    assert same(bench.keep(BOB), [Recall(2, 2)])
    assert same(bench.step(Drain()), [Recall(1, 3)])
    assert bench.step(Drain()) == []
    assert same(bench.step(Released(1, 3)), [Grant(BOB, 4, 4, 1, keep=False)])
    assert same(bench.step(Checkin(BOB, 4)), [Retire(1)])
    assert bench.step(Busy(2, 2)) == []
    assert same(bench.step(Released(2, 2)), [Retire(2)])
    assert bench.counts == (0, 0, 1, 2, 0)


def test_terminate_kills_under_kept_leases_without_a_recall() -> None:
    bench = Bench.ready(1)
    bench.keep(ALICE)
    assert same(bench.step(Terminate()), [Kill(1, "the pool was terminated")])
    assert bench.step(Released(1, 1)) == []
    assert bench.broker.status().kept == 0


def test_a_shrink_recalls_what_is_kept_above_pool_size_and_no_more() -> None:
    bench = Bench.ready(4, overflow_ttl=5.0)
    for _ in range(4):
        bench.keep(ALICE)
    assert same(bench.step(Resize(2, 2)), [Recall(4, 1), Recall(3, 2)])
    assert bench.step(Released(4, 1)) == []
    assert bench.counts == (0, 1, 3, 0, 0)
    assert same(bench.step(Tick(), at=5.0), [Retire(4)])
    assert bench.step(Resize(2, 2)) == []


def test_a_shrink_recalls_kept_leases_for_ordinary_ones_above_the_limit() -> None:
    bench = Bench.ready(3)
    bench.lease(BOB)
    bench.keep(ALICE)
    bench.keep(ALICE)
    assert same(bench.step(Resize(2, 0)), [Recall(2, 2)])
    assert same(bench.step(Released(2, 2)), [Retire(2)])


def test_who_waits_during_a_shrink_is_not_served_by_those_that_retire() -> None:
    bench = Bench.ready(3)
    for _ in range(3):
        bench.keep(ALICE)
    bench.step(Resize(2, 0))
    assert bench.take(Recall) == [Recall(3, 1)]
    assert same(bench.checkout(BOB, block=False), [Recall(2, 2)])
    assert same(bench.step(Released(2, 2)), [Retire(2)])
    assert same(bench.step(Released(3, 1)), [Grant(BOB, 4, 4, 3)])


def test_many_busy_answers_among_many_waiters_cost_little_each() -> None:
    bench = Bench.ready(300)
    for _ in range(300):
        bench.keep(ALICE)
    for number in range(3_000):
        bench.step(Checkout(BOB, number, number >= 300, None))
    assert len(bench.take(Recall)) == 300
    refused = []
    for lease in range(1, 301):
        effects = bench.step(Busy(301 - lease, lease))
        assert len(effects) == 1
        refused += [effect.ticket for effect in effects if isinstance(effect, Refuse)]
    assert refused == list(range(299, -1, -1)), "who would have been served last goes first"
    assert bench.broker.status().waiting == 2_700


# Resize


def test_resize_up_spawns_what_pool_size_and_waiters_need() -> None:
    bench = Bench.ready(1)
    bench.lease(ALICE)
    bench.checkout(BOB)
    bench.checkout(CAROL)
    assert same(bench.step(Resize(1, 1)), [Spawn(2, 1)])
    assert same(bench.step(Resize(4, 0)), [Spawn(3, 2), Spawn(4, 3)])


def test_resize_down_kills_booting_then_retires_idle_then_waits_for_checkins() -> None:
    bench = Bench.ready(3)
    grants = [bench.lease(), bench.lease()]
    bench.step(Resize(5, 0))
    bench.take(Spawn)
    effects = bench.step(Resize(1, 0))
    assert same(
        effects,
        [Kill(5, "the pool shrank"), Kill(4, "the pool shrank"), Retire(1)],
    )
    assert bench.counts == (0, 0, 2, 3, 0)
    assert bench.broker.status().overflow == 1
    assert same(bench.checkin(grants[0]), [Retire(grants[0].worker)])
    assert bench.checkin(grants[1]) == []
    assert bench.counts == (0, 1, 0, 4, 0)


def test_a_surplus_worker_is_retired_though_somebody_waits() -> None:
    bench = Bench.ready(2)
    grants = [bench.lease(), bench.lease()]
    bench.checkout(BOB)
    bench.step(Resize(1, 0))
    assert same(bench.checkin(grants[0]), [Retire(2)])
    assert same(bench.checkin(grants[1]), [Grant(BOB, 3, 3, 1)])


def test_after_a_shrink_new_workers_sit_in_the_lower_slots() -> None:
    bench = Bench.ready(3)
    grants = [bench.lease() for _ in range(3)]
    bench.step(Resize(2, 0))
    bench.checkin(next(grant for grant in grants if grant.worker == 1))
    crashed = next(grant.worker for grant in grants if grant.worker == 3)
    assert same(bench.acts(WorkerExited(crashed, "crash")), [Spawn(4, 0)])


def test_a_shrink_of_pool_size_alone_turns_idle_workers_into_overflow() -> None:
    bench = Bench.ready(2, overflow_ttl=5.0)
    assert bench.step(Resize(1, 1), at=3.0) == []
    assert bench.broker.next_deadline() == 5.0
    assert same(bench.step(Tick(), at=5.0), [Retire(1)])


def test_a_shrink_refuses_nonblocking_waiters_that_would_have_to_wait_for_a_checkin() -> None:
    bench = Bench.ready(1, 2)
    bench.lease()
    bench.checkout(BOB, block=False)
    bench.checkout(CAROL, block=False)
    effects = bench.step(Resize(1, 1))
    assert same(
        effects,
        [
            Kill(3, "the pool shrank"),
            Refuse(CAROL, 3, "full", "the pool shrank to 2 workers"),
        ],
    )
    assert same(bench.step(WorkerReady(2)), [Grant(BOB, 2, 2, 2)])


# The end


def test_drain_still_serves_the_jobs_that_a_client_has_queued_behind_its_ticket() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB, spare_own=True)
    bench.step(Drain())
    (refusal,) = bench.checkout(CAROL, spare_own=True)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "closed"
    for _ in range(3):
        (granted,) = bench.checkin(grant)
        assert isinstance(granted, Grant)
        assert granted.client == BOB
        assert bench.checkout(BOB, spare_own=True) == []
        grant = granted
    bench.step(ClientGone(BOB))
    assert bench.broker.status().waiting == 0


def test_drain_refuses_new_checkouts_serves_waiters_and_then_stops_every_worker() -> None:
    bench = Bench.ready(1)
    grant = bench.lease(ALICE)
    bench.checkout(BOB)
    assert bench.step(Drain()) == []
    (refusal,) = bench.checkout(CAROL)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "closed"
    (granted,) = bench.checkin(grant)
    assert isinstance(granted, Grant)
    assert granted.client == BOB
    assert same(bench.checkin(granted), [Retire(1)])
    assert same(bench.step(WorkerExited(1, "stopped")), [Drained()])


def test_drain_stops_idle_and_booting_workers_at_once_when_nobody_waits() -> None:
    bench = Bench.ready(2)
    bench.step(Resize(3, 0))
    effects = bench.step(Drain())
    assert same(effects, [Retire(1), Retire(2), Kill(3, "the pool is draining")])
    bench.step(WorkerExited(1, ""))
    bench.step(WorkerExited(2, ""))
    assert same(bench.step(WorkerExited(3, "")), [Drained()])


def test_draining_starts_workers_for_waiters_only() -> None:
    bench = Bench.ready(2)
    grants = [bench.lease(ALICE), bench.lease(ALICE)]
    bench.checkout(BOB)
    bench.step(Drain())
    assert bench.acts(WorkerExited(grants[0].worker, "crash")) == [Spawn(3, 1)]
    assert bench.acts(WorkerExited(grants[1].worker, "crash")) == []
    bench.step(WorkerReady(3))
    assert same(bench.step(Checkin(BOB, 3)), [Retire(3)])


def test_draining_ends_when_the_last_waiter_cancels() -> None:
    bench = Bench(1)
    bench.step(Start())
    bench.checkout()
    assert bench.step(Drain()) == []
    effects = bench.step(Cancel(ALICE, 1))
    assert same(effects, [Refuse(ALICE, 1, "cancelled", ""), Kill(1, "the pool is draining")])


def test_draining_with_a_failing_factory_ends() -> None:
    bench = Bench(1)
    bench.step(Start())
    bench.checkout()
    bench.step(Drain())
    bench.step(WorkerFailed(1, "x"))
    assert same(bench.take(Refuse), [Refuse(ALICE, 1, "factory_failed", "x")])
    assert same(bench.acts(WorkerExited(1, "x")), [Drained()])


def test_an_empty_pool_is_drained_at_once_and_once() -> None:
    bench = Bench(0, 1)
    bench.step(Start())
    assert same(bench.step(Drain()), [Drained()])
    assert bench.step(Drain()) == []
    assert bench.step(Terminate()) == []
    assert bench.step(Tick()) == []


def test_a_drained_pool_takes_no_more_jobs_of_anybody() -> None:
    """ALICE had jobs queued when the drain began, and so could go on until all had ended."""
    bench = Bench(1)
    bench.step(Start())
    bench.checkout(ALICE, spare_own=True)
    bench.step(Drain())
    bench.step(WorkerReady(1))
    assert bench.step(Checkin(ALICE, 1)) == [Retire(1)]
    assert bench.step(WorkerExited(1, "exit code 0")) == [Drained()]
    (refusal,) = bench.checkout(ALICE, spare_own=True)
    assert isinstance(refusal, Refuse) and refusal.why == "closed"


def test_terminate_refuses_all_and_kills_all() -> None:
    bench = Bench.ready(1, 1, overflow_ttl=0.0)
    bench.lease(ALICE)
    bench.checkout(BOB)
    bench.step(WorkerReady(2))
    bench.step(Checkin(ALICE, 1))
    bench.checkout(CAROL)
    bench.checkout(CAROL)
    assert bench.counts == (1, 0, 1, 1, 2)
    reason = "the pool was terminated"
    assert same(
        bench.step(Terminate()),
        [
            Refuse(CAROL, 3, "closed", reason),
            Refuse(CAROL, 4, "closed", reason),
            Kill(1, reason),
            Kill(2, reason),
            Kill(3, reason),
        ],
    )
    assert bench.step(Terminate()) == []
    assert bench.step(Checkin(BOB, 2)) == []
    for number in (1, 2):
        assert bench.step(WorkerExited(number, "SIGKILL")) == []
    assert same(bench.step(WorkerExited(3, "SIGKILL")), [Drained()])


# What it tells


def test_status_is_poolboys_word_and_counts() -> None:
    bench = Bench.ready(1, 1)
    assert bench.broker.status().state == "ready"
    bench.lease()
    assert bench.broker.status().state == "overflow"
    bench.checkout()
    bench.step(WorkerReady(2))
    status = bench.broker.status()
    assert status.state == "full"
    assert (status.alive, status.overflow, status.limit) == (2, 1, 2)
    assert (status.counters["granted"], status.counters["spawned"]) == (2, 2)
    assert repr(bench.broker) == "<Broker size=1+1 booting=0 idle=0 leased=2 waiting=0>"


def test_status_is_frozen_detached_and_can_be_pickled() -> None:
    bench = Bench.ready(1)
    status = bench.broker.status()
    bench.lease()
    assert status.counters["granted"] == 0
    assert pickle.loads(pickle.dumps(status)) == status
    with pytest.raises(AttributeError):
        status.idle = 7  # type: ignore[misc]


def test_a_worker_record_tells_its_life() -> None:
    bench = Bench.ready(1)
    bench.now = 5.0
    grant = bench.lease(BOB)
    (record,) = bench.broker.workers()
    assert record is bench.broker.worker(1)
    assert record.state is WorkerState.LEASED
    assert (record.slot, record.born, record.since) == (0, 0.0, 5.0)
    assert (record.lease, record.client, record.leases_served) == (grant.lease, BOB, 1)
    assert repr(record) == "<Worker 1 slot=0 leased lease=1 client=2>"
    bench.checkin(grant)
    assert (record.lease, record.client, record.leases_served) == (None, None, 1)
    assert repr(record) == "<Worker 1 slot=0 idle>"


# The backoff


def test_backoff_is_a_value() -> None:
    backoff = Backoff(1.0, 10.0)
    delay, following = backoff.next(random.Random(1))
    assert 0.5 <= delay <= 1.0
    assert backoff == Backoff(1.0, 10.0)
    assert following == Backoff(1.0, 10.0, attempt=1)
    assert following.reset() == backoff


def test_backoff_never_exceeds_its_maximum_however_long_it_lasts() -> None:
    rng = random.Random(1)
    backoff = Backoff(0.05, 10.0)
    for attempt in range(5_000):
        delay, backoff = backoff.next(rng)
        full = min(10.0, 0.05 * 2.0 ** min(attempt, 100))
        assert full / 2 <= delay <= full


def test_a_seeded_broker_repeats_itself() -> None:
    def history(seed: int) -> float | None:
        broker = Broker(Policy(1, 0), rng=random.Random(seed))
        broker.step(Start(), 0.0)
        broker.step(WorkerExited(1, "x"), 0.0)
        return broker.next_deadline()

    assert history(1) == history(1) != history(2)
    assert Broker(Policy(1, 0)).next_deadline() is None


def test_the_first_worker_is_the_one_that_the_manager_orders_before_there_is_a_broker() -> None:
    from whitepool_mp.worker import nursery

    assert Broker(Policy(3, 1)).step(Start(), 0.0)[0] == Spawn(*nursery.FIRST)


# Workers that have served for long enough


def test_a_worn_worker_is_replaced_at_its_checkin_whoever_waits() -> None:
    bench = Bench.ready(1)
    grant = bench.lease()
    assert same(bench.checkout(BOB), [])
    worn = Checkin(grant.client, grant.lease, worn=True)
    assert same(bench.step(worn), [Retire(1), Spawn(2, 0)])
    (granted,) = bench.acts(WorkerReady(2))
    assert isinstance(granted, Grant) and (granted.client, granted.worker) == (BOB, 2)
    assert bench.counter("recycled") == 1


def test_an_idle_worker_is_replaced_when_it_is_too_old() -> None:
    bench = Bench.ready(2, max_lifetime=100.0)
    assert bench.broker.next_deadline() == 100.0
    assert same(bench.step(Tick(), at=99.0), [])
    spawns = [Spawn(3, 0), Spawn(4, 1)]
    assert same(bench.step(Tick(), at=100.0), [Retire(1), Retire(2), *spawns])


def test_the_age_of_a_worker_begins_when_it_is_ready() -> None:
    bench = Bench(1, max_lifetime=10.0)
    bench.step(Start())
    bench.step(WorkerReady(1), at=5.0)
    assert same(bench.step(Tick(), at=14.0), [])
    assert same(bench.step(Tick(), at=15.0), [Retire(1), Spawn(2, 0)])


def test_a_leased_worker_serves_on_when_it_is_too_old_and_goes_then() -> None:
    bench = Bench.ready(1, max_lifetime=10.0)
    grant = bench.lease()
    assert same(bench.step(Tick(), at=20.0), [])
    assert bench.broker.next_deadline() is None, "it is said once"
    assert same(bench.checkin(grant), [Retire(1), Spawn(2, 0)])


def test_a_kept_lease_of_a_worker_that_is_too_old_is_recalled_and_comes_to_nobody() -> None:
    bench = Bench.ready(1, 1, max_lifetime=10.0)
    bench.keep(ALICE)
    assert same(bench.step(Tick(), at=10.0), [Recall(1, 1)])
    assert same(bench.checkout(BOB), [Spawn(2, 1)]), "who waits does not wait for that one"
    assert same(bench.step(Released(1, 1)), [Retire(1)])


def test_a_recalled_lease_that_grows_too_old_is_waited_for_no_longer() -> None:
    bench = Bench.ready(1, 1, max_lifetime=10.0)
    bench.keep(ALICE)
    assert same(bench.checkout(BOB), [Recall(1, 1)])
    assert same(bench.step(Tick(), at=10.0), [Spawn(2, 1)])


def test_limits_are_drawn_for_each_worker_and_never_above_what_was_asked_for() -> None:
    broker = Broker(Policy(50, 0, max_calls=10, max_rss=1000), rng=random.Random(1))
    spawns = [effect for effect in broker.step(Start(), 0.0) if isinstance(effect, Spawn)]
    assert {spawn.max_calls for spawn in spawns} == {9, 10}
    assert all(800 <= spawn.max_rss <= 1000 for spawn in spawns)
    assert len({spawn.max_rss for spawn in spawns}) > 25


def test_one_call_is_always_one_call() -> None:
    broker = Broker(Policy(50, 0, max_calls=1), rng=random.Random(1))
    assert {effect.max_calls for effect in broker.step(Start(), 0.0)} == {1}  # type: ignore


def test_what_is_known_of_workers_that_have_gone_does_not_pile_up() -> None:
    bench = Bench.ready(1, max_lifetime=1000.0)
    for number in range(1, 5000):
        bench.lease()
        bench.step(WorkerExited(number, "killed"))
        bench.step(WorkerReady(number + 1))
    assert len(bench.broker._ages._times) < 200
