"""Any history: a state machine feeds the broker, and an observer judges every effect.

The observer knows the rules and not the code. It keeps its own books from the events it sent and
the effects it got, in the plainest containers: lists that are scanned, nothing shared, nothing
incremental. Each effect must be allowed by the books at that point; after each step the books must
be in balance, and the broker's own account must agree with them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from whitepool_mp.broker import (
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
    Finished,
    Grant,
    Kill,
    Recall,
    Refuse,
    Released,
    Report,
    Resize,
    Resume,
    Resumed,
    Retire,
    Spawn,
    Start,
    Terminate,
    Tick,
    Unfinished,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerState,
)
from whitepool_mp.config import Policy

START_TIMEOUT = 8.0
STOP_TIMEOUT = 2.0
BACKOFF_FIRST = 0.5
BACKOFF_MAX = 4.0
PATIENCE = 3
LINGER = 5.0


EXAMPLES = 800
STEPS = 60


class FullDelay(random.Random):
    """A generator whose jitter takes nothing off, so that delays are exact."""

    def random(self) -> float:
        return 1.0


@dataclass(eq=False)
class W:
    id: int
    slot: int
    state: str
    born: float
    since: float
    grants: int = 0
    dirty: bool = False
    # Spawned after the last lengthening of the backoff.
    fresh: bool = True
    # Has served for long enough; from when on it has, once it is ready.
    worn: bool = False
    expires: float = math.inf


@dataclass(eq=False)
class T:
    client: int
    ticket: int
    block: bool
    deadline: float | None
    keep: bool
    spare_own: bool
    outcome: str = "open"

    def expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline


@dataclass(eq=False)
class L:
    id: int
    ticket: T
    worker: W
    kept: bool
    # Asked for to be kept: whether it is clean is to be seen when its client is gone.
    for_jobs: bool
    # From the Recall on; coming until the worker is found busy.
    recalled: bool = False
    coming: bool = False


class Observer:
    """The books, and what may be entered into them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.pool_size = policy.pool_size
        self.limit = policy.pool_size + policy.max_overflow
        self.workers: list[W] = []  # in order of spawning
        self.idle: list[W] = []  # in order of becoming idle
        self.waiting: list[T] = []  # in order of arrival
        self.leases: list[L] = []
        self.last_worker = 0
        self.last_lease = 0
        self.spawned_before = 0  # by the brokers before this one
        self.closing = False
        self.terminated = False
        self.finishing: set[int] = set()
        self.unfinished: set[int] = set()
        self.quiet = math.inf  # since when nothing but the unfinished is waited for
        self.drained = 0
        self.attempt = 0
        self.not_before = 0.0
        self.unused_deaths = 0
        self.granted = 0
        self.late = 0
        self.released = 0
        self.recycled = 0
        self.last_failure = ""
        # What this one step allows and requires.
        self.event: Event = Tick()
        self.now = 0.0
        self.asking: T | None = None
        self.freed: list[W] = []
        self.may_kill: list[W] = []
        self.failure: str | None = None
        self.due_refusals: list[T] = []
        self.due_reports: list[tuple[str, int | None]] = []
        self.recalls = 0
        self.answers: list[Refuse] = []

    def by_state(self, *states: str) -> list[W]:
        return [worker for worker in self.workers if worker.state in states]

    @property
    def alive(self) -> list[W]:
        return self.by_state("booting", "idle", "leased")

    @property
    def live(self) -> list[W]:
        return self.by_state("idle", "leased")

    @property
    def want(self) -> int:
        need = len(self.by_state("leased")) + len(self.waiting) - self.coming
        if self.closing:
            return min(self.limit, need)
        need += len(self.by_state("idle"))
        return min(self.limit, max(self.pool_size, need))

    @property
    def coming(self) -> int:
        return sum(lease.coming for lease in self.leases)

    @property
    def unrecalled(self) -> list[L]:
        """The longest kept first."""
        return [lease for lease in self.leases if lease.kept and not lease.recalled]

    @property
    def recallable(self) -> list[L]:
        return [lease for lease in self.unrecalled if self.wanted(lease.ticket.client)]

    def wanted(self, holder: int) -> bool:
        """Whether anybody waits for whom a lease of this client may be recalled."""
        return any(t.client != holder or not t.spare_own for t in self.waiting)

    @property
    def surplus(self) -> int:
        """Leased workers that will retire, whoever waits."""
        return max(0, len(self.leases) - self.limit)

    @property
    def too_many_kept(self) -> bool:
        recalled = sum(lease.recalled for lease in self.leases)
        too_many = len(self.leases) - recalled > self.limit or (
            len(self.unrecalled) > self.pool_size
        )
        return too_many and bool(self.unrecalled)

    def about_to_come(self, place: int) -> bool:
        """Whether a lease that is coming serves who stands there."""
        return place < self.coming - self.surplus

    def find(self, worker_id: int) -> W:
        return next(worker for worker in self.workers if worker.id == worker_id)

    # Before the step: what the event alone implies.

    def expect(self, event: Event, now: float) -> None:
        self.event = event
        self.now = now
        self.asking = None
        self.begun = False
        self.freed = []
        self.may_kill = []
        self.failure = None
        self.due_refusals = []
        self.due_reports = []
        self.recalls = 0
        self.answers = []
        if isinstance(event, Checkout):
            if any(t.client == event.client and t.ticket == event.ticket for t in self.open()):
                return
            self.asking = T(*event)
            self.begun = event.client in self.finishing or any(
                ticket.client == event.client for ticket in self.open()
            )
            self.waiting.append(self.asking)
        elif isinstance(event, Cancel):
            for lease in self.leases:
                if (lease.ticket.client, lease.ticket.ticket) == event:
                    self.free(lease)
        elif isinstance(event, (Checkin, Destroy)):
            for lease in self.leases:
                if lease.id == event.lease and lease.ticket.client == event.client:
                    if isinstance(event, Checkin):
                        self.wear(lease.worker, event.worn)
                        self.free(lease)
                    else:
                        self.soil(lease)
        elif isinstance(event, ClientGone):
            self.finishing.discard(event.client)
            self.unfinished.discard(event.client)
            for ticket in list(self.waiting):
                if ticket.client == event.client:
                    self.end(ticket, "gone")
            released = {each.lease: each.worn for each in event.released}
            for lease in list(self.leases):
                if lease.ticket.client != event.client:
                    continue
                if lease.for_jobs and lease.id in released:
                    self.released += 1
                    self.wear(lease.worker, released[lease.id])
                    self.free(lease)
                else:
                    self.soil(lease)
        elif isinstance(event, (Released, Busy)):
            self.late += 1
            for lease in self.leases:
                if (lease.worker.id, lease.id) == event[:2] and lease.kept:
                    if isinstance(event, Released):
                        self.released += 1
                        self.late -= 1
                        self.wear(lease.worker, event.worn)
                        self.free(lease)
                    elif lease.coming or lease.worker.worn:
                        self.late -= 1
                        lease.coming = False
        elif isinstance(event, WorkerReady):
            self.late += event.worker not in [w.id for w in self.workers if w.state != "killed"]
            for worker in self.by_state("booting"):
                if worker.id == event.worker:
                    worker.state = "idle"
                    worker.since = now
                    worker.expires = now + self.policy.max_lifetime
                    self.idle.append(worker)
                    self.freed = [worker]
                    if self.attempt and self.unused_deaths <= self.limit:
                        self.attempt = 0
                        self.due_reports.append(("recovered", worker.id))
        elif isinstance(event, WorkerFailed):
            self.late += event.worker not in [w.id for w in self.workers if w.state != "killed"]
            for worker in self.by_state("booting"):
                if worker.id == event.worker:
                    worker.state = "failed"
                    self.may_kill.append(worker)
                    self.fail([worker], event.reason)
        elif isinstance(event, WorkerExited):
            self.late += event.worker not in [w.id for w in self.workers]
            for worker in list(self.workers):
                if worker.id == event.worker:
                    self.bury(worker, event.reason)
        elif isinstance(event, Tick):
            late = [w for w in self.by_state("booting") if now >= w.born + START_TIMEOUT]
            for worker in late:
                worker.state = "failed"
            self.may_kill += late
            self.fail(late, f"did not start within {START_TIMEOUT:g} s")
            for worker in self.by_state("retiring"):
                if now >= worker.since + STOP_TIMEOUT:
                    self.may_kill.append(worker)
                    self.due_reports.append(("stop_overrun", worker.id))
            for worker in self.live:
                self.wear(worker, now >= worker.expires)
            for lease in self.leases:
                lease.coming = lease.coming and not lease.worker.worn
        elif isinstance(event, Resize):
            self.pool_size = event.pool_size
            self.limit = event.pool_size + event.max_overflow
        elif isinstance(event, Drain) and not self.terminated:
            self.closing = True
            self.finishing |= {ticket.client for ticket in self.waiting if ticket.spare_own}
            self.finishing |= {
                lease.ticket.client
                for lease in self.leases
                if lease.kept and lease.ticket.spare_own
            }
            self.finishing |= self.unfinished
        elif isinstance(event, Unfinished):
            if not (self.terminated or self.drained):
                self.unfinished.add(event.client)
                if self.closing:
                    self.finishing.add(event.client)
        elif isinstance(event, Finished):
            self.unfinished.discard(event.client)
        elif isinstance(event, Terminate):
            self.closing = True
            self.terminated = True
            self.finishing = set()
            self.unfinished = set()
            self.due_refusals = list(self.waiting)
            self.may_kill = [w for w in self.workers if w.state != "killed"]

    def wear(self, worker: W, worn: bool) -> None:
        worker.worn = worker.worn or worn

    def take_over(self) -> list[T]:
        """Another broker begins, with what the last one had written down; who has to ask again."""
        waiting, self.waiting = self.waiting, []
        self.spawned_before = self.last_worker
        self.closing = self.terminated = False
        self.finishing = set()
        self.unfinished = set()
        self.quiet = math.inf
        self.attempt = self.unused_deaths = self.granted = self.late = self.released = 0
        self.recycled = 0
        self.not_before = 0.0
        self.last_failure = ""
        for worker in self.workers:
            worker.fresh = True
            worker.worn = False
            if worker.state in ("idle", "leased"):
                ready = worker.born if worker.grants else worker.since
                worker.expires = ready + self.policy.max_lifetime
        for lease in self.leases:
            lease.recalled = lease.coming = False
            lease.for_jobs = lease.kept
        self.leases.sort(key=lambda lease: (lease.worker.since, lease.id))
        self.idle.sort(key=lambda worker: (worker.since, worker.id))
        return waiting

    def resume(self) -> Resume:
        """What the last broker had written down."""
        under = {lease.worker: lease for lease in self.leases}
        workers = []
        for worker in self.workers:
            state = WorkerState.__dict__[worker.state.upper()]
            known = Resumed(worker.id, worker.slot, state, worker.born, worker.since, worker.grants)
            if worker in under:
                lease = under[worker]
                known = known._replace(
                    lease=lease.id,
                    client=lease.ticket.client,
                    ticket=lease.ticket.ticket,
                    kept=lease.kept,
                    spare_own=lease.kept and lease.ticket.spare_own,
                )
            workers.append(known)
        sizes = self.pool_size, self.limit - self.pool_size
        return Resume(tuple(workers), *sizes, self.last_worker, self.last_lease)

    def open(self) -> list[T]:
        return self.waiting + [lease.ticket for lease in self.leases]

    def end(self, ticket: T, outcome: str) -> None:
        assert ticket.outcome == "open", f"{ticket} ended twice"
        ticket.outcome = outcome
        self.waiting.remove(ticket)

    def free(self, lease: L) -> None:
        self.leases.remove(lease)
        lease.worker.state = "idle"
        lease.worker.since = self.now
        self.idle.append(lease.worker)
        self.freed.append(lease.worker)

    def soil(self, lease: L) -> None:
        self.leases.remove(lease)
        lease.worker.dirty = True
        lease.worker.state = "dirty"
        self.may_kill.append(lease.worker)

    def bury(self, worker: W, reason: str) -> None:
        state = worker.state
        self.workers.remove(worker)
        if state == "booting":
            self.fail([worker], reason, told=False)
        elif state in ("idle", "leased"):
            self.due_reports.append(("crashed", worker.id))
            if worker in self.idle:
                self.idle.remove(worker)
            self.leases = [lease for lease in self.leases if lease.worker is not worker]
            if not worker.grants:
                self.unused_deaths += 1
                if self.unused_deaths > self.limit:
                    self.fail([worker], reason, told=False)

    def fail(self, failed: list[W], reason: str, told: bool = True) -> None:
        """Starts failed, one after the other."""
        if not failed:
            return
        self.failure = self.last_failure = reason
        for worker in failed:
            self.due_reports.append(("start_failed", worker.id))
            if worker.fresh:
                full = min(BACKOFF_MAX, BACKOFF_FIRST * 2**self.attempt)
                self.not_before = self.now + full
                self.attempt += 1
                self.due_reports.append(("backing_off", None))
                for other in self.workers + failed:
                    other.fresh = False
        if not self.by_state("booting"):
            if self.live or (not told and self.attempt < PATIENCE):
                self.due_refusals = [
                    ticket
                    for place, ticket in enumerate(self.waiting)
                    if not ticket.block and not self.about_to_come(place)
                ]
            else:
                self.due_refusals = list(self.waiting)

    # During the step: each effect is judged by the books as they stand, then entered.

    def enter(self, effect: Effect) -> None:
        getattr(self, "enter_" + type(effect).__name__.lower())(effect)

    def enter_spawn(self, effect: Spawn) -> None:
        assert effect.worker > self.last_worker, "worker numbers only grow"
        self.last_worker = effect.worker
        slots = {worker.slot for worker in self.alive}
        assert effect.slot == min(set(range(self.limit)) - slots), "the lowest free slot"
        assert effect[2:] == (self.policy.max_calls, self.policy.max_rss)
        assert len(self.alive) < self.limit, "growth above the limit"
        assert len(self.alive) < self.want, "growth without demand"
        if self.attempt:
            assert self.now >= self.not_before, "a spawn during the backoff"
            assert not self.by_state("booting"), "more than one probe"
        self.workers.append(W(effect.worker, effect.slot, "booting", self.now, self.now))

    def enter_grant(self, effect: Grant) -> None:
        assert effect.lease > self.last_lease, "lease numbers only grow"
        self.last_lease = effect.lease
        worker = self.find(effect.worker)
        assert not worker.dirty, "a dirty worker was granted again"
        assert not worker.worn, "a worn worker was granted again"
        assert worker.state == "idle", f"granted while {worker.state}"
        assert len(self.alive) <= self.limit, "a surplus worker was granted"
        newest = self.policy.strategy == "lifo" and len(self.freed) < 2
        expected = self.idle[-1 if newest else 0]  # of several one after the other is free
        assert worker is expected, f"{self.policy.strategy} is {expected}, not {worker}"
        assert self.waiting, "granted though nobody waits"
        ticket = self.waiting[0]
        assert (ticket.client, ticket.ticket) == effect[:2], "not first come, first served"
        assert not ticket.expired(self.now), "granted after its deadline"
        self.end(ticket, "granted")
        self.idle.remove(worker)
        worker.state = "leased"
        worker.since = self.now
        worker.grants += 1
        may_keep = len(self.alive) <= self.pool_size and not self.closing
        keep = ticket.keep and may_keep and not self.wanted(ticket.client)
        assert effect.keep is keep, "kept against the rules" if effect.keep else "not kept"
        self.leases.append(L(effect.lease, ticket, worker, keep, ticket.keep))
        self.unused_deaths = 0
        self.granted += 1

    def enter_recall(self, effect: Recall) -> None:
        (lease,) = (lease for lease in self.leases if lease.id == effect.lease)
        assert lease.worker.id == effect.worker
        assert lease.kept, "recalled though it is not kept"
        assert not lease.recalled, "recalled twice"
        demand = len(self.waiting) + self.surplus > self.coming and self.wanted(lease.ticket.client)
        shrunk = isinstance(self.event, (Resize, Resume)) and self.too_many_kept
        draining = isinstance(self.event, Drain)
        patient = draining and lease.ticket.spare_own
        assert effect.patient is patient, "jobs in flight are lost, or others wait for them"
        aged = isinstance(self.event, Tick) and lease.worker.worn
        assert demand or shrunk or draining or aged, "recalled without a reason"
        if aged:
            assert not draining
        elif draining or shrunk or self.recallable == self.unrecalled:
            assert lease is self.unrecalled[0], "not the longest kept"
        else:
            own = [x for x in self.unrecalled if x.ticket.client == lease.ticket.client]
            assert lease is own[0], "not the longest kept of its client"
        lease.recalled = True
        lease.coming = not lease.worker.worn
        self.recalls += 1

    def enter_refuse(self, effect: Refuse) -> None:
        if isinstance(self.event, Cancel):
            self.answers.append(effect)
        ticket = next((t for t in self.waiting if (t.client, t.ticket) == effect[:2]), None)
        if ticket is None:
            assert isinstance(self.event, Cancel), "refused what nobody waits for"
            assert effect.why == "cancelled"
            return
        place = self.waiting.index(ticket)
        leased = len(self.by_state("leased"))
        if isinstance(self.event, Cancel) and self.event == effect[:2]:
            failing = self.attempt and not self.live
            assert effect.why == ("factory_failed" if failing else "cancelled")
        elif effect.why == "full":
            assert not ticket.block
            assert ticket is self.asking or isinstance(self.event, (Resize, Busy, Tick))
            assert not self.idle
            loose = self.coming + len(self.recallable)
            assert leased - loose + place >= self.limit, "refused as full though one may come"
        elif effect.why == "closed":
            assert self.closing
            if ticket is self.asking:
                assert not (ticket.spare_own and self.begun), "its queued jobs are lost"
            assert ticket is self.asking or isinstance(self.event, Terminate)
        elif effect.why == "timeout":
            assert ticket.expired(self.now), "refused before its deadline"
            assert ticket is self.asking or (place == 0 and self.freed)
        elif effect.why == "factory_failed":
            assert not self.by_state("booting")
            loose = self.coming + len(self.recallable)
            if ticket is self.asking:
                assert self.attempt
                assert self.now < self.not_before
                assert ticket.block or place >= loose - self.surplus, "one would have come"
                if ticket.block:
                    assert not self.live
                    assert ticket.deadline is not None
                    assert ticket.deadline < self.not_before
            elif ticket not in self.due_refusals:
                # What was to come for it does not, or another took what had been started.
                assert not ticket.block
                assert self.attempt
                assert self.now < self.not_before
                assert place >= loose - self.surplus, "one would have come"
                assert leased < self.limit
                assert effect.detail == self.last_failure
            else:
                assert effect.detail == self.failure, "the reason reaches whoever waits"
        else:
            raise AssertionError(f"unexpected {effect}")
        self.end(ticket, effect.why)

    def enter_retire(self, effect: Retire) -> None:
        worker = self.find(effect.worker)
        assert worker.state == "idle", f"retired while {worker.state}"
        surplus = len(self.alive) > self.limit
        drained = self.closing and not self.waiting
        over = len(self.alive) > self.pool_size
        warm = self.now < worker.since + self.policy.overflow_ttl
        assert worker.worn or surplus or drained or (over and not warm), "retired without a reason"
        oldest = worker in self.freed or worker is self.idle[0]
        assert oldest or worker.worn, "not the longest idle"
        self.idle.remove(worker)
        self.recycled += worker.worn
        worker.state = "retiring"
        worker.since = self.now

    def enter_kill(self, effect: Kill) -> None:
        worker = self.find(effect.worker)
        assert worker.state != "killed", "killed twice"
        if worker in self.may_kill:
            self.may_kill.remove(worker)
        else:
            assert worker.state == "booting", f"killed while {worker.state}"
            surplus = isinstance(self.event, Resize) and len(self.alive) > self.limit
            assert surplus or (self.closing and not self.waiting), "killed without a reason"
        if worker in self.idle:
            self.idle.remove(worker)
        self.leases = [lease for lease in self.leases if lease.worker is not worker]
        worker.state = "killed"
        worker.since = self.now

    def enter_report(self, effect: Report) -> None:
        entry = (effect.what, effect.worker)
        assert entry in self.due_reports, f"unexpected {effect}"
        self.due_reports.remove(entry)

    def enter_drained(self, effect: Drained) -> None:
        assert self.closing
        assert not self.workers
        assert not self.waiting
        assert not self.unfinished or self.now >= self.quiet + LINGER, "somebody is about to ask"
        self.unfinished = set()
        self.drained += 1
        self.finishing = set()

    # After the step: the balance.

    def balance(self, broker: Broker) -> None:
        now = self.now
        booting = self.by_state("booting")
        leased = self.by_state("leased")
        assert not self.may_kill, f"not killed: {self.may_kill}"
        assert not self.due_reports, f"not reported: {self.due_reports}"
        assert all(t.outcome != "open" for t in self.due_refusals), "left waiting"
        if isinstance(self.event, Cancel):
            answers = [answer for answer in self.answers if answer[:2] == self.event]
            assert len(answers) == 1, "a cancel is answered once"
        for place, ticket in enumerate(self.waiting):
            if not ticket.block:
                room = self.limit - len(leased) + self.coming
                assert place < room, "would wait for a checkin"
                assert booting or self.about_to_come(place), "would wait for nothing"
        if self.asking in self.waiting and self.attempt and not booting:
            # It waits for a later attempt, for a checkin or for what was recalled, and can.
            assert self.asking.block or self.about_to_come(self.waiting.index(self.asking))
            deadline = self.asking.deadline
            assert self.live or deadline is None or deadline >= self.not_before
        if self.asking and self.asking not in self.waiting:
            assert not self.recalls, "recalled for who does not wait"
        assert not (self.waiting and self.idle), "waits while a worker is idle"
        if len(self.alive) > self.limit:
            assert not booting, "booting above the limit"
            assert not self.idle, "idle above the limit"
        if len(self.waiting) + self.surplus > self.coming:
            assert not self.recallable, "not recalled though somebody waits"
        assert not self.too_many_kept, "not recalled though they are too many"
        assert not (self.closing and self.unrecalled), "kept while the pool drains"
        assert not any(worker.worn for worker in self.idle), "worn and not retired"
        assert not any(lease.worker.worn for lease in self.unrecalled), "worn and not recalled"
        asking = self.asking
        if self.closing and asking is not None and asking.outcome in ("open", "granted"):
            assert asking.spare_own, "served though the pool drains"
            assert self.begun, "served though the pool drains"
        slots = [worker.slot for worker in self.alive]
        assert len(slots) == len(set(slots)), "two of the alive share a slot"

        missing = len(self.alive) < self.want
        paused = self.attempt and (booting or now < self.not_before)
        untold = self.attempt and not isinstance(self.event, Tick)
        assert not missing or paused or untold, "a missing worker was not replaced"
        if isinstance(self.event, Tick):
            assert all(now < w.born + START_TIMEOUT for w in booting)
            assert all(now < w.since + STOP_TIMEOUT for w in self.by_state("retiring"))
        if isinstance(self.event, (Tick, Resize)) and len(self.alive) > self.pool_size:
            assert all(now < w.since + self.policy.overflow_ttl for w in self.idle)
        if any(w in self.idle for w in self.freed) and self.policy.overflow_ttl == 0:
            assert len(self.alive) <= self.pool_size, "overflow kept at a checkin"
        if self.closing and not self.waiting:
            assert not booting, "booting with nobody to serve"
            assert not self.idle, "idle with nobody to serve"
            assert self.drained == (not self.workers and not self.unfinished), "drained, once"
        else:
            assert not self.drained
        if isinstance(self.event, Terminate):
            assert not self.alive
            assert not self.waiting

        due = [w.born + START_TIMEOUT for w in booting]
        due += [w.since + STOP_TIMEOUT for w in self.by_state("retiring")]
        if len(self.alive) > self.pool_size:
            due += [w.since + self.policy.overflow_ttl for w in self.idle]
        if self.attempt and missing and not booting:
            due.append(self.not_before)
        alone = self.closing and not self.workers and not self.waiting and self.unfinished
        self.quiet = min(self.quiet, now) if alone else math.inf
        if alone:
            due.append(self.quiet + LINGER)
        due += [w.expires for w in self.live if not w.worn and w.expires < math.inf]
        assert broker.next_deadline() == (min(due) if due else None)
        if self.waiting:
            assert booting or leased or due, "waits for nothing"
        self.compare(broker)

    def compare(self, broker: Broker) -> None:
        """The broker's account agrees with the books."""
        status = broker.status()
        assert status.pool_size == self.pool_size
        assert status.limit == self.limit
        assert status.booting == len(self.by_state("booting"))
        assert status.idle == len(self.by_state("idle")) == len(self.idle)
        assert status.leased == len(self.by_state("leased")) == len(self.leases)
        assert status.kept == sum(lease.kept for lease in self.leases)
        assert status.retiring == len(self.by_state("retiring", "killed"))
        assert status.waiting == len(self.waiting)
        assert status.alive == len(self.alive)
        assert status.overflow == max(0, len(self.alive) - self.pool_size)
        assert status.failing == bool(self.attempt)
        assert status.draining == self.closing
        assert status.counters["granted"] == self.granted
        assert status.counters["recalled"] == self.released
        assert status.counters["late_events"] == self.late
        assert status.counters["recycled"] == self.recycled
        assert status.counters["spawned"] == self.last_worker - self.spawned_before
        holders = {lease.worker.id: lease for lease in self.leases}
        records = list(broker.workers())
        assert [record.id for record in records] == [worker.id for worker in self.workers]
        for record, worker in zip(records, self.workers, strict=True):
            assert broker.worker(worker.id) is record
            assert record.state.value == worker.state
            assert record.alive == (worker in self.alive)
            assert record.slot == worker.slot
            assert record.born == worker.born
            assert record.since == worker.since
            assert record.leases_served == worker.grants
            lease = holders.get(worker.id)
            assert record.lease == (lease.id if lease else None)
            assert record.client == (lease.ticket.client if lease else None)
            assert record.kept == (lease is not None and lease.kept)
            assert record.recalled == (lease is not None and lease.recalled)
            assert record.coming == (lease is not None and lease.coming)
            assert record.worn == worker.worn
        kept = [lease.worker.id for lease in self.leases if lease.kept]
        assert [record.id for record in broker.kept_workers()] == kept
        for lease in self.leases:
            assert broker.lease_worker(lease.ticket.client, lease.id) == lease.worker.id
            assert broker.lease_worker(lease.ticket.client + 1, lease.id) is None


TIMES = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 5.0])
PICK = st.integers(0, 10**6)


class BrokerMachine(RuleBasedStateMachine):
    """Feeds the broker with anything that clients, workers, the clock and the owner can do."""

    @initialize(
        pool_size=st.integers(0, 4),
        max_overflow=st.integers(0, 3),
        fifo=st.booleans(),
        ttl=st.sampled_from([0.0, 1.0]),
        lifetime=st.sampled_from([math.inf, math.inf, 3.0, 20.0]),
        booted=st.booleans(),
        keepers=st.booleans(),
        lasting=st.booleans(),
        gentle=st.booleans(),
    )
    def start(
        self,
        pool_size: int,
        max_overflow: int,
        fifo: bool,
        ttl: float,
        lifetime: float,
        booted: bool,
        keepers: bool,
        lasting: bool,
        gentle: bool,
    ) -> None:
        policy = Policy(
            pool_size=pool_size,
            max_overflow=max_overflow or int(pool_size == 0),
            strategy="fifo" if fifo else "lifo",
            overflow_ttl=ttl,
            start_timeout=START_TIMEOUT,
            stop_timeout=STOP_TIMEOUT,
            backoff_first=BACKOFF_FIRST,
            backoff_max=BACKOFF_MAX,
            max_calls=7,
            max_lifetime=lifetime,
            max_rss=9 if fifo else 0,
        )
        self.lasting = lasting
        self.gentle = gentle
        self.now = 0.0
        self.policy = policy
        self.broker = Broker(policy, rng=FullDelay())
        self.books = Observer(policy)
        self.clients = [1, 3, 5]
        self.last_ticket = 0
        self.ended_leases: list[tuple[int, int]] = []
        self.ended_recalls: list[tuple[int, int]] = []
        self.failures = 0
        self.send(Start())
        if booted or keepers:
            self.all_ready()
        if keepers:
            self.lease_all_that_are_idle(0, lasting, 1 + gentle)

    def send(self, event: Event) -> None:
        held = {(lease.ticket.client, lease.id) for lease in self.books.leases}
        before = list(self.books.leases)
        self.books.expect(event, self.now)
        for effect in self.broker.step(event, self.now):
            self.books.enter(effect)
        self.books.balance(self.broker)
        held -= {(lease.ticket.client, lease.id) for lease in self.books.leases}
        self.ended_leases += sorted(held)
        for lease in before:
            if lease not in self.books.leases and lease.recalled:
                self.ended_recalls.append((lease.worker.id, lease.id))

    @precondition(lambda self: not self.books.drained)
    @rule()
    def another_broker_takes_over(self) -> None:
        """The process of this one is killed; waiters ask again, in their order, and so does whoever
        wanted the pool to end."""
        closing = self.books.closing
        self.ended_recalls += [(x.worker.id, x.id) for x in self.books.leases if x.recalled]
        event = self.books.resume()
        waiting = self.books.take_over()
        self.broker = Broker(self.policy, rng=FullDelay())
        self.books.expect(event, self.now)
        again = {w.id: w.state for w in self.books.by_state("retiring", "killed")}
        for effect in self.broker.step(event, self.now):
            if isinstance(effect, (Retire, Kill)) and effect.worker in again:
                state = again.pop(effect.worker)
                assert state == ("retiring" if isinstance(effect, Retire) else "killed")
            else:
                self.books.enter(effect)
        assert not again, "not told again to end"
        self.books.balance(self.broker)
        for ticket in waiting:
            self.send(Checkout(*list(vars(ticket).values())[:6]))
        if closing:
            self.send(Drain())

    def reason(self) -> str:
        self.failures += 1
        return f"reason {self.failures}"

    # Clients

    @rule(
        pick=PICK,
        block=st.sampled_from([True, True, False]),
        patience=st.none() | TIMES,
        keep=st.booleans(),
        spare_own=st.booleans(),
    )
    def checkout(
        self, pick: int, block: bool, patience: float | None, keep: bool, spare_own: bool
    ) -> None:
        self.last_ticket += 1
        deadline = None if patience is None else self.now + patience
        client = self.clients[pick % len(self.clients)]
        self.send(Checkout(client, self.last_ticket, block, deadline, keep, spare_own))
        ticket = self.books.asking
        assert ticket is not None

    @rule(
        count=st.integers(2, 8),
        pick=PICK,
        block=st.sampled_from([True, True, False]),
        keep=st.booleans(),
        spare_own=st.booleans(),
    )
    def rush(self, count: int, pick: int, block: bool, keep: bool, spare_own: bool) -> None:
        for number in range(count):
            self.checkout(pick + number, block, None, keep, spare_own)

    @precondition(lambda self: self.books.idle)
    @rule(pick=PICK, turns=st.booleans(), every=st.integers(1, 3))
    def lease_all_that_are_idle(self, pick: int, turns: bool, every: int) -> None:
        for number in range(len(self.books.idle)):
            self.checkout(pick + number * turns, True, None, number % every == 0, False)

    @precondition(lambda self: self.books.unrecalled)
    @rule(pick=PICK, count=st.integers(1, 4), block=st.booleans())
    def an_engine_asks_for_more(self, pick: int, count: int, block: bool) -> None:
        lease = self.books.unrecalled[pick % len(self.books.unrecalled)]
        for _ in range(count):
            self.checkout(self.clients.index(lease.ticket.client), block, None, True, True)

    @precondition(lambda self: self.books.open())
    @rule(pick=PICK)
    def checkout_again(self, pick: int) -> None:
        ticket = self.books.open()[pick % len(self.books.open())]
        event = Checkout(ticket.client, ticket.ticket, True, None)
        self.books.expect(event, self.now)
        told = self.broker.step(event, self.now)
        granted = [
            Grant(ticket.client, ticket.ticket, lease.id, lease.worker.id, lease.kept)
            for lease in self.books.leases
            if lease.ticket is ticket
        ]
        assert told == granted, "told again what it was granted, and nothing else happens"
        self.books.balance(self.broker)

    @precondition(lambda self: self.books.waiting)
    @rule(pick=PICK)
    def cancel_waiting(self, pick: int) -> None:
        ticket = self.books.waiting[pick % len(self.books.waiting)]
        self.send(Cancel(ticket.client, ticket.ticket))

    @precondition(lambda self: self.books.leases)
    @rule(pick=PICK)
    def cancel_that_crossed_the_grant(self, pick: int) -> None:
        ticket = self.books.leases[pick % len(self.books.leases)].ticket
        self.send(Cancel(ticket.client, ticket.ticket))

    @rule(pick=PICK, ticket=st.integers(1, 60))
    def cancel_anything(self, pick: int, ticket: int) -> None:
        self.send(Cancel(self.clients[pick % len(self.clients)], ticket))

    @precondition(lambda self: self.books.leases)
    @rule(pick=PICK, worn=st.sampled_from([False, False, True]))
    def checkin(self, pick: int, worn: bool = False) -> None:
        lease = self.books.leases[pick % len(self.books.leases)]
        self.send(Checkin(lease.ticket.client, lease.id, worn))

    @precondition(lambda self: self.books.leases)
    @rule()
    def checkin_all(self) -> None:
        for lease in list(self.books.leases):
            self.send(Checkin(lease.ticket.client, lease.id))

    @precondition(lambda self: self.books.leases)
    @rule(pick=PICK)
    def checkin_by_another(self, pick: int) -> None:
        lease = self.books.leases[pick % len(self.books.leases)]
        self.send(Checkin(lease.ticket.client + 1, lease.id))

    @precondition(lambda self: self.ended_leases)
    @rule(pick=PICK, destroy=st.booleans())
    def checkin_too_late(self, pick: int, destroy: bool) -> None:
        client, lease = self.ended_leases[pick % len(self.ended_leases)]
        self.send(Destroy(client, lease, "late") if destroy else Checkin(client, lease))

    @precondition(lambda self: self.books.leases)
    @rule(pick=PICK, foreign=st.sampled_from([False, False, True]))
    def destroy(self, pick: int, foreign: bool) -> None:
        lease = self.books.leases[pick % len(self.books.leases)]
        self.send(Destroy(lease.ticket.client + foreign, lease.id, "broken"))

    @precondition(lambda self: self.books.open())
    @rule(pick=PICK, other=st.sampled_from([False, False, False, True]))
    def client_gone(self, pick: int, other: bool) -> None:
        if other:
            self.lose_client(pick)
        else:
            ticket = self.books.open()[pick % len(self.books.open())]
            self.lose_client(self.clients.index(ticket.client))

    def lose_client(self, pick: int) -> None:
        """It is looked at each of its leases whether it is free; a few are others', or untrue."""
        place = pick % len(self.clients)
        client = self.clients[place]
        released = [
            Released(lease.worker.id, lease.id, (pick >> number) % 8 == 0)
            for number, lease in enumerate(self.books.leases)
            if (pick >> number) % 3 and (lease.ticket.client == client or (pick >> number) % 5 == 0)
        ]
        for_jobs = [x for x in self.books.leases if x.for_jobs and x.ticket.client == client]
        told = {each.lease for each in self.broker.job_leases(client)}
        assert told == {lease.id for lease in for_jobs}
        self.send(ClientGone(client, tuple(released)))
        self.clients[place] = max(self.clients) + 2

    # Workers

    def booting(self) -> list[W]:
        return self.books.by_state("booting")

    @precondition(lambda self: self.booting())
    @rule(pick=PICK)
    def ready(self, pick: int) -> None:
        self.send(WorkerReady(self.booting()[pick % len(self.booting())].id))

    @precondition(lambda self: self.booting())
    @rule()
    def all_ready(self) -> None:
        for worker in self.booting():
            self.send(WorkerReady(worker.id))

    @precondition(lambda self: self.booting())
    @rule(pick=PICK, exits=st.booleans())
    def fails(self, pick: int, exits: bool) -> None:
        worker = self.booting()[pick % len(self.booting())]
        event = WorkerExited if exits else WorkerFailed
        self.send(event(worker.id, self.reason()))

    @precondition(lambda self: self.booting())
    @rule()
    def all_fail(self) -> None:
        for worker in self.booting():
            if worker.state == "booting":
                self.send(WorkerFailed(worker.id, self.reason()))

    @precondition(lambda self: self.books.workers)
    @rule(pick=PICK)
    def exits(self, pick: int) -> None:
        worker = self.books.workers[pick % len(self.books.workers)]
        self.send(WorkerExited(worker.id, self.reason()))

    @precondition(lambda self: self.books.by_state("retiring", "killed"))
    @rule()
    def stopped_ones_exit(self) -> None:
        for worker in self.books.by_state("retiring", "killed"):
            self.send(WorkerExited(worker.id, "as asked"))

    @precondition(lambda self: self.books.idle)
    @rule(pick=PICK)
    def idle_one_crashes(self, pick: int) -> None:
        worker = self.books.idle[pick % len(self.books.idle)]
        self.send(WorkerExited(worker.id, self.reason()))

    @precondition(lambda self: self.books.by_state("killed"))
    @rule(pick=PICK, failed=st.booleans())
    def answer_of_a_killed_one(self, pick: int, failed: bool) -> None:
        killed = self.books.by_state("killed")
        worker = killed[pick % len(killed)]
        self.send(WorkerFailed(worker.id, "late") if failed else WorkerReady(worker.id))

    @precondition(lambda self: self.books.last_worker > len(self.books.workers))
    @rule(pick=PICK, kind=st.sampled_from(["ready", "failed", "exited"]))
    def news_of_a_forgotten_one(self, pick: int, kind: str) -> None:
        known = {worker.id for worker in self.books.workers}
        gone = [n for n in range(1, self.books.last_worker + 1) if n not in known]
        number = gone[pick % len(gone)]
        if kind == "ready":
            self.send(WorkerReady(number))
        else:
            self.send((WorkerFailed if kind == "failed" else WorkerExited)(number, "late"))

    # Workers under kept leases

    def coming(self) -> list[L]:
        return [lease for lease in self.books.leases if lease.coming]

    @precondition(lambda self: self.coming())
    @rule(pick=PICK, worn=st.sampled_from([False, False, True]))
    def released_at_once(self, pick: int, worn: bool) -> None:
        lease = self.coming()[pick % len(self.coming())]
        self.send(Released(lease.worker.id, lease.id, worn))

    @precondition(lambda self: self.coming())
    @rule(pick=PICK)
    def found_busy(self, pick: int) -> None:
        lease = self.coming()[pick % len(self.coming())]
        self.send(Busy(lease.worker.id, lease.id))

    @precondition(lambda self: self.coming())
    @rule()
    def all_found_busy(self) -> None:
        while self.coming():
            self.found_busy(0)

    @precondition(lambda self: any(x.recalled and not x.coming for x in self.books.leases))
    @rule(pick=PICK, again=st.sampled_from([False, False, True]))
    def released_after_its_call(self, pick: int, again: bool) -> None:
        busy = [lease for lease in self.books.leases if lease.recalled and not lease.coming]
        lease = busy[pick % len(busy)]
        self.send((Busy if again else Released)(lease.worker.id, lease.id))

    @precondition(lambda self: self.coming())
    @rule(pick=PICK, how=st.sampled_from(["checkin", "destroy", "cancel", "exit", "gone"]))
    def ends_before_it_is_released(self, pick: int, how: str) -> None:
        lease = self.coming()[pick % len(self.coming())]
        client, ticket = lease.ticket.client, lease.ticket.ticket
        if how == "checkin":
            self.send(Checkin(client, lease.id))
        elif how == "destroy":
            self.send(Destroy(client, lease.id, "broken"))
        elif how == "cancel":
            self.send(Cancel(client, ticket))
        elif how == "exit":
            self.send(WorkerExited(lease.worker.id, self.reason()))
        else:
            self.lose_client(self.clients.index(client))

    @precondition(lambda self: self.ended_recalls)
    @rule(pick=PICK, busy=st.booleans())
    def answers_too_late(self, pick: int, busy: bool) -> None:
        self.send((Busy if busy else Released)(*self.ended_recalls[pick % len(self.ended_recalls)]))

    @precondition(lambda self: self.books.leases)
    @rule(pick=PICK, other=st.sampled_from([0, 0, 1]), busy=st.booleans())
    def answers_unasked(self, pick: int, other: int, busy: bool) -> None:
        lease = self.books.leases[pick % len(self.books.leases)]
        self.send((Busy if busy else Released)(lease.worker.id, lease.id + other))

    # The clock and the owner

    @rule(delay=TIMES)
    def advance(self, delay: float) -> None:
        """Events may come in before the tick that is due."""
        self.now += delay

    @precondition(lambda self: any(t.deadline is not None for t in self.books.waiting))
    @rule(pick=PICK)
    def advance_to_the_deadline_of_a_waiter(self, pick: int) -> None:
        """It watches its own clock, so its cancel may come after other events."""
        deadlines = [t.deadline for t in self.books.waiting if t.deadline is not None]
        self.now = max(self.now, deadlines[pick % len(deadlines)])
        if pick % 2 and self.books.leases:
            self.checkin(pick)

    @rule(delay=TIMES)
    def advance_and_tick(self, delay: float) -> None:
        self.now += delay
        self.send(Tick())

    @precondition(lambda self: self.broker.next_deadline() is not None)
    @rule()
    def tick_at_the_deadline(self) -> None:
        due = self.broker.next_deadline()
        assert due is not None
        self.now = max(self.now, due)
        self.send(Tick())
        after = self.broker.next_deadline()
        assert after is None or after > self.now, "a tick that changes nothing: a busy loop"

    @rule(pool_size=st.integers(0, 5), max_overflow=st.integers(0, 3), pick=st.integers(0, 2))
    def resize(self, pool_size: int, max_overflow: int, pick: int) -> None:
        if pick == 0:
            self.send(Resize(pool_size, max_overflow or int(pool_size == 0)))

    @precondition(lambda self: self.books.limit > 1)
    @precondition(lambda self: any(not t.block for t in self.books.waiting))
    @rule()
    def shrink_by_one(self) -> None:
        pool_size = min(self.books.pool_size, self.books.limit - 1)
        self.send(Resize(pool_size, self.books.limit - 1 - pool_size))

    @precondition(lambda self: self.books.unrecalled)
    @rule(less=st.integers(0, 2), max_overflow=st.sampled_from([0, 0, 1]), pick=PICK)
    def shrink_below_what_is_kept(self, less: int, max_overflow: int, pick: int) -> None:
        taken = self.books.unrecalled if pick % 3 else self.books.leases
        pool_size = max(0, len(taken) - less)
        self.send(Resize(pool_size, max_overflow or int(pool_size == 0)))
        if pick % 2:
            self.checkout(pick, pick % 3 > 0, None, True, False)

    @precondition(lambda self: self.last_ticket > 6 and not self.lasting)
    @rule(pick=st.integers(0, 3), count=st.integers(0, 2))
    def drain(self, pick: int, count: int) -> None:
        if pick == 0:
            for client in self.clients[:count]:
                self.send(Unfinished(client))
            self.send(Drain())
            if count == 2:
                self.send(Unfinished(self.clients[2]))

    @precondition(lambda self: self.books.unfinished)
    @rule(pick=PICK, block=st.booleans())
    def an_engine_with_jobs_left_asks(self, pick: int, block: bool) -> None:
        client = sorted(self.books.unfinished)[pick % len(self.books.unfinished)]
        self.checkout(self.clients.index(client), block, None, True, True)
        ticket = self.books.asking
        assert ticket is not None and ticket.outcome != "closed"

    @precondition(lambda self: self.books.unfinished)
    @rule(pick=PICK)
    def an_engine_finishes(self, pick: int) -> None:
        self.send(Finished(sorted(self.books.unfinished)[pick % len(self.books.unfinished)]))

    @rule(pick=PICK)
    def one_without_jobs_finishes(self, pick: int) -> None:
        if pick % 10 == 0:
            self.send(Finished(self.clients[pick % len(self.clients)]))

    @precondition(lambda self: self.books.closing)
    @rule(pick=PICK, again=st.booleans())
    def an_engine_says_late_what_is_left(self, pick: int, again: bool) -> None:
        self.send(Unfinished(self.clients[pick % len(self.clients)]))
        if again:
            self.send(Drain())

    @precondition(lambda self: self.last_ticket > 6 and not self.lasting)
    @rule(pick=st.integers(0, 7))
    def terminate(self, pick: int) -> None:
        if pick == 0:
            self.send(Terminate())

    @rule(kind=st.integers(0, 8), pick=PICK)
    def impossible(self, kind: int, pick: int) -> None:
        started = self.books.by_state("idle", "leased", "retiring")
        events: list[Event] = [
            WorkerReady(self.books.last_worker + 1),
            WorkerExited(0, "no such worker"),
            Resize(-1, 5),
            Resize(0, 0),
            Start(),
            Released(self.books.last_worker + 1, max(1, self.books.last_lease)),
            Busy(0, 1),
        ]
        if started:
            events.append(WorkerReady(started[pick % len(started)].id))
            events.append(WorkerFailed(started[pick % len(started)].id, "twice"))
        before = repr(self.broker.status())
        with pytest.raises(BrokerError):
            self.broker.step(events[kind % len(events)], self.now)
        assert repr(self.broker.status()) == before
        self.books.compare(self.broker)

    def teardown(self) -> None:
        """Whatever came before, a pool that is closed comes to its end."""
        if not hasattr(self, "broker"):
            return
        self.send(Drain() if self.gentle else Terminate())
        for _ in range(10_000):
            if self.books.drained:
                break
            for lease in list(self.books.leases):
                if lease.coming and lease.id % 3 == 0:
                    self.send(Busy(lease.worker.id, lease.id))
                if lease.recalled and lease.id % 2:
                    self.send(Released(lease.worker.id, lease.id))
                else:
                    self.send(Checkin(lease.ticket.client, lease.id))
            for worker in self.booting():
                if worker.state == "booting":
                    self.send(WorkerReady(worker.id))
            self.stopped_ones_exit()
            if not self.books.waiting and self.gentle:
                for client in sorted(self.books.unfinished):
                    self.send(Finished(client))
            if self.broker.next_deadline() is not None:
                self.tick_at_the_deadline()
        assert self.books.drained == 1
        assert not self.broker._clients, "a client with nothing open is remembered"


@pytest.mark.hang(400)  # a history that fails is made shorter, which takes up to five minutes
def test_any_history_keeps_the_invariants() -> None:
    run_state_machine_as_test(
        BrokerMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
