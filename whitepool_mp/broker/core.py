"""The broker: who gets which worker, and how many workers there are.

It stands between the clients' requests and the workers' lives, and does nothing itself:
`step(event, now)` takes what happened and gives what is to be done. The manager turns readiness of
descriptors into events and performs the effects; its wait time is `next_deadline()`.

What becomes of a worker, by state and event:

              Ready    Failed    Exited    Checkin,  Released  Destroy,  start_   stop_    overflow_
                                           Cancel              Gone      timeout  timeout  ttl
    BOOTING   place    KILLED *  gone *    .         late      .         KILLED*  .        .
    IDLE      error    error     gone +    .         late      .         .        .        RETIRING
    LEASED    error    error     gone +    place     place k   KILLED g  .        .        .
    RETIRING  error    error     gone      .         late      .         .        KILLED   .
    KILLED    late     late      gone      .         late      .         .        .        .
    gone      late     late      late      .         late      .         .        .        .
    unborn    error    error     error     .         error     .         .        .        .

      place   RETIRING if it is worn; else LEASED to the first waiter in time; else RETIRING if it
              is one too many; else IDLE
      *       a failed start                    +     a crash
      late    a race: counted, ignored          .     does not happen
      error   BrokerError, and nothing changes  k     late if it is not about the kept lease it has
      g       place, if its client has gone and its lease was for jobs, and is released

Busy moves nobody; it is late where Released is, and when it is not the first answer to a Recall.
max_lifetime after Ready makes IDLE into RETIRING and LEASED worn, as a Checkin or Released can say.
Drain makes IDLE into RETIRING and BOOTING into KILLED once nobody waits. A Resize below what is
alive kills BOOTING, then retires IDLE. Terminate makes everything KILLED.

The rules
1.  alive = booting + idle + leased; limit = pool_size + max_overflow. A worker is spawned only
    below the limit. Above it, after a Resize, only leased workers are left, and retire at checkin.
2.  Waiters are served in order. Whoever finds its deadline passed when its turn comes is refused;
    before that the client watches its own clock and sends Cancel. Nobody waits while a worker is
    idle.
3.  Each Cancel is answered by one Refuse. A cancelled grant counts as a checkin.
4.  want = min(limit, max(pool_size, leased + idle + waiting - coming)) workers are kept alive; a
    draining pool has no pool_size. For `coming` see rule 10.
5.  A failed start sets a backoff: no spawn before its end, then one at a time until a worker
    is ready. Failures of one wave (starts before the last lengthening of the backoff) lengthen it
    once.
6.  A failed start that leaves nobody booting and nobody live (idle or leased) refuses all who wait,
    with its reason. One that leaves only leased workers refuses those who wait for a start only.
7.  A crash is replaced at once. Workers that die without ever having been granted, more than limit
    of them with no grant in between, count as failed starts: a crash loop is a failing factory.
8.  A non-blocking checkout waits for a start or for a recalled lease that is coming, and for
    nobody's checkin. It is refused, at once or when it comes to that, as soon as neither will serve
    it: the pool is full, or no worker can be started now.
9.  A checkout may ask to keep its lease from call to call. It may if nobody waits for whom the
    lease may be recalled, the pool is not draining, and alive <= pool_size. A kept lease counts as
    leased, and its holder may check it in at any time.
10. A lease is coming from its Recall until it ends or is found to be Busy: a call runs under it, or
    none has begun yet. A lease that was granted is not revoked before its first call: its holder is
    told to give it back after that. (Who asked again would have the next one's revoked before its
    first call, and so on: hundreds of grants for each call of a burst.) While waiting > coming,
    kept leases are recalled, oldest first; workers about to retire because alive > limit are not
    counted as coming. None of a client's is recalled for its own waiters that `spare_own`. If only
    such waiters of one client wait, the oldest lease of another client is recalled, which need not
    be the oldest of all others'.
11. Drain recalls every kept lease. Who asked for one with `spare_own` has jobs queued behind it:
    the worker does what it has been sent before it releases that lease; and `spare_own` checkouts
    of a client that held or waited for a worker in that way, or does so now, or is Unfinished, are
    not refused until all is drained; all others are. All is not drained before who is Unfinished is
    Finished or gone, or has not asked for LINGER seconds while no worker was left. A Resize
    recalls the oldest until no more than pool_size are left unrecalled, and no more than limit of
    all leases. Each is recalled once in its life; whether it is still needed when it is Released
    makes no difference.
12. A worn worker serves on under the lease that it is under, and retires when that ends. If the
    lease is kept it is recalled; it is never coming, since it will serve nobody. Each worker's
    limits are drawn when it is spawned (its age when it is ready), at most a fifth below those of
    the policy, so that workers that began together are not worn together.

Every event costs O(1) amortised, plus O(log limit) for a spawn's slot, whatever the number of
workers and waiters; a client's end costs what it held. Drain and Resize may look at each worker and
at as many waiters as the limit.
"""

from __future__ import annotations

import math

from whitepool_mp.broker.effects import Effect, Grant, Kill, Retire, Why
from whitepool_mp.broker.errors import BrokerError
from whitepool_mp.broker.events import (
    Busy,
    Cancel,
    Checkin,
    Checkout,
    ClientGone,
    Destroy,
    Drain,
    Event,
    Finished,
    Released,
    Resize,
    Resume,
    Start,
    Terminate,
    Tick,
    Unfinished,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
)
from whitepool_mp.broker.moves import LINGER, Moves, oldest
from whitepool_mp.broker.state import BOOTING, IDLE, KILLED, LEASED, RETIRING, Waiter, Worker
from whitepool_mp.broker.status import BrokerStatus
from whitepool_mp.policy import Policy

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from typing import Any
else:
    import _random as random  # the generator alone: importing `random` makes many more things

__all__ = ["Broker"]


class Broker(Moves):
    """The pure state machine of one pool.

    Args:
        policy: sizes, strategy and timeouts (seconds).
        rng: the source of all jitter; seed one to make a run repeatable.
    """

    def __init__(self, policy: Policy, rng: random.Random | None = None) -> None:
        super().__init__(policy, random.Random() if rng is None else rng)
        self._handlers = _BEFORE_START
        self._now = -math.inf

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take in one event and decide.

        Args:
            event: what happened.
            now: when, in seconds on any clock that does not run backwards; an earlier time than
                before is taken to be the time before.

        Returns:
            What is to be done, in this order.

        Raises:
            BrokerError: the event cannot have happened. Nothing has changed.
        """
        handler = self._handlers.get(type(event))
        if handler is None:
            expected = ", ".join(kind.__name__ for kind in self._handlers)
            raise BrokerError(f"expected one of {expected}; got {event!r}")
        now = max(now, self._now)
        effects: list[Effect] = []
        self._roster.changed.clear()
        handler(self, event, now, effects)
        self._now = now
        return effects

    def next_deadline(self) -> float | None:
        """Tell when the broker next needs a `Tick`.

        Returns:
            An absolute time in seconds on the clock of `now`, perhaps a past one, or None if only
            other events can change anything.
        """
        roster = self._roster
        policy = self._policy
        due = math.inf
        if roster.booting:
            due = oldest(roster.booting).born + policy.start_timeout
        elif self._starts.failing and self._missing() > 0:
            due = self._starts.not_before
        if roster.retiring:
            due = min(due, oldest(roster.retiring).since + policy.stop_timeout)
        if roster.idle and roster.alive > self._pool_size:
            due = min(due, oldest(roster.idle).since + policy.overflow_ttl)
        if self._quiet_since is not None:
            due = min(due, self._quiet_since + LINGER)
        due = min(due, self._ages.next())
        return due if due < math.inf else None

    def status(self) -> BrokerStatus:
        """Take the counts."""
        roster = self._roster
        return BrokerStatus(
            pool_size=self._pool_size,
            max_overflow=self._limit - self._pool_size,
            booting=len(roster.booting),
            idle=len(roster.idle),
            leased=len(roster.leases),
            kept=len(roster.keeps.leases),
            retiring=len(roster.known) - roster.alive,
            waiting=len(self._waitlist),
            failing=self._starts.failing,
            draining=self._draining,
            last_failure=self._starts.last_failure,
            counters=dict(self._counters),
        )

    def worker(self, worker_id: int) -> Worker | None:
        """Find the record of a worker that has not exited; read it only.

        After the step that takes its `WorkerExited` it is gone, so ask before it.
        """
        return self._roster.known.get(worker_id)

    def workers(self) -> Iterator[Worker]:
        """Iterate over all workers that have not exited, oldest first; read them only."""
        return iter(self._roster.known.values())

    def changed(self) -> list[Worker]:
        """The workers whose state, lease or existence the last step changed, some of them more than
        once; read them only."""
        return self._roster.changed

    @property
    def draining(self) -> bool:
        """Whether new checkouts are refused for good."""
        return self._draining

    def kept_workers(self) -> Iterator[Worker]:
        """Iterate over the workers under kept leases, recalled ones included; read them only."""
        return iter(self._roster.keeps.leases.values())

    def job_leases(self, client: int) -> list[Worker]:
        """Find the workers that a client holds for jobs and not for its user, kept or not; read
        them only."""
        held = self._clients.get(client, {}).values()
        return [each for each in held if type(each) is Worker and each.for_jobs]

    def lease_worker(self, client: int, lease: int) -> int | None:
        """Tell which worker this client holds under this lease, or None if it does not."""
        worker = self._roster.leases.get(lease)
        return worker.id if worker is not None and worker.client == client else None

    def lease_holder(self, lease: int) -> int | None:
        """Tell which client holds a lease, or None if nobody does."""
        worker = self._roster.leases.get(lease)
        return None if worker is None else worker.client

    def __repr__(self) -> str:
        roster = self._roster
        return (
            f"<Broker size={self._pool_size}+{self._limit - self._pool_size}"
            f" booting={len(roster.booting)} idle={len(roster.idle)}"
            f" leased={len(roster.leases)} waiting={len(self._waitlist)}>"
        )

    # Requests of clients

    def _on_checkout(self, event: Checkout, now: float, out: list[Effect]) -> None:
        client, ticket, block, until, keep, spare_own = event
        tickets = self._clients.get(client)
        if tickets is not None and ticket in tickets:
            self._counters["duplicate_checkouts"] += 1
            held = tickets[ticket]
            if type(held) is Worker and held.lease is not None:
                out.append(Grant(client, ticket, held.lease, held.id, held.kept))
            return
        deadline = math.inf if until is None else until
        refusal = self._objection(event, deadline, now)
        if refusal is not None:
            self._refuse(client, ticket, *refusal, out)
        elif self._roster.idle:
            _, worker = self._roster.idle.popitem(last=self._policy.strategy == "lifo")
            self._grant(worker, client, ticket, keep, spare_own, now, out)
        else:
            waiter = Waiter(client, ticket, block, deadline, keep, spare_own)
            self._waitlist.add(waiter)
            self._clients.setdefault(client, {})[ticket] = waiter
            self._settle(now, out)

    def _objection(self, event: Checkout, deadline: float, now: float) -> tuple[Why, str] | None:
        """Say why a checkout can be neither granted nor made to wait, if so."""
        roster = self._roster
        if self._draining and not (
            event.spare_own and (event.client in self._clients or event.client in self._finishing)
        ):
            return "closed", "the pool is closed"
        if now >= deadline:
            return "timeout", "the deadline had passed on arrival"
        if roster.idle:
            return None
        if event.block:
            # Nothing can be ready before the next attempt: do not let those wait for it who cannot.
            doomed = not roster.live and deadline < self._starts.not_before
        else:
            waitlist = self._waitlist
            own = event.spare_own and (not waitlist or waitlist.spared() == event.client)
            # Who would not be in use if this one waited too.
            loose = roster.keeps.coming + roster.keeps.unrecalled(event.client if own else None)
            if len(roster.leases) - loose + len(waitlist) >= self._limit:
                return "full", f"all {self._limit} workers are taken"
            doomed = len(waitlist) >= loose
        if doomed and self._paused(now):
            return "factory_failed", self._starts.last_failure or ""
        return None

    def _on_cancel(self, event: Cancel, now: float, out: list[Effect]) -> None:
        client, ticket = event
        holder = self._clients.get(client, {}).get(ticket)
        why: Why = "cancelled"
        detail = ""
        if holder is None:
            self._counters["unknown_cancels"] += 1
        elif type(holder) is Waiter and self._starts.failing and not self._roster.live:
            why, detail = "factory_failed", self._starts.last_failure or ""
        self._refuse(client, ticket, why, detail, out)
        if type(holder) is Worker:
            self._counters["cancelled_grants"] += 1
            self._give_back(holder, now, out)
        elif type(holder) is Waiter:
            self._unwait(holder)
            self._settle(now, out)

    def _on_checkin(self, event: Checkin, now: float, out: list[Effect]) -> None:
        worker = self._held(event.client, event.lease)
        if worker is not None:
            self._give_back(worker, now, out, event.worn)

    def _on_destroy(self, event: Destroy, now: float, out: list[Effect]) -> None:
        worker = self._held(event.client, event.lease)
        if worker is not None:
            self._kill(worker, event.reason, now, out)
            self._settle(now, out)

    def _on_client_gone(self, event: ClientGone, now: float, out: list[Effect]) -> None:
        self._finishing.discard(event.client)
        self._unfinished.discard(event.client)
        released = {each.lease: each.worn for each in event.released}
        holders = list(self._clients.get(event.client, {}).values())
        for holder in holders:
            if type(holder) is Waiter:
                self._unwait(holder)  # before a worker is free, which would be granted to it
        clean: dict[int, Worker] = {}
        for holder in holders:
            if type(holder) is Worker and holder.for_jobs and holder.lease in released:
                clean[holder.lease] = holder
            elif type(holder) is Worker:
                self._kill(holder, "its client has gone", now, out)
        self._counters["recalled"] += len(clean)
        for lease in sorted(clean):
            self._take_back(clean[lease], now, out, released[lease])
        self._settle(now, out)

    # Lives of workers

    def _on_ready(self, event: WorkerReady, now: float, out: list[Effect]) -> None:
        worker = self._booting(event)
        if worker is None:
            return
        if self._starts.succeeded(self._limit):
            self._report("recovered", worker.id, "a worker started", out)
        self._roster.detach(worker)
        self._ages.begin(worker, now)
        self._place(worker, now, out)
        self._settle(now, out)

    def _on_failed(self, event: WorkerFailed, now: float, out: list[Effect]) -> None:
        worker = self._booting(event)
        if worker is None:
            return
        self._kill(worker, "its start failed", now, out)
        self._start_failed(worker, event.reason, now, out, told=True)
        self._settle(now, out)

    def _on_released(self, event: Released, now: float, out: list[Effect]) -> None:
        worker = self._kept(event)
        if worker is not None:
            self._counters["recalled"] += 1
            self._give_back(worker, now, out, event.worn)

    def _on_busy(self, event: Busy, now: float, out: list[Effect]) -> None:
        worker = self._kept(event)
        if worker is not None and worker.coming:
            self._roster.keeps.detain(worker)
            self._settle(now, out)
        elif worker is not None and not worker.worn:
            self._counters["late_events"] += 1

    def _on_exited(self, event: WorkerExited, now: float, out: list[Effect]) -> None:
        worker = self._roster.get(event.worker)
        if worker is None:
            self._counters["late_events"] += 1
            return
        state = worker.state
        self._detach(worker)
        self._roster.forget(worker)
        if state is BOOTING:
            self._start_failed(worker, event.reason, now, out, told=False)
        elif state is IDLE or state is LEASED:
            self._counters["crashes"] += 1
            self._report("crashed", worker.id, event.reason, out)
            if not worker.leases_served and self._starts.died_unused(self._limit):
                self._start_failed(worker, event.reason, now, out, told=False)
        self._settle(now, out)

    def _booting(self, event: WorkerReady | WorkerFailed) -> Worker | None:
        """Find the worker that an answer to a spawn is about; None if the answer came too late."""
        worker = self._roster.get(event.worker)
        if worker is None or worker.state is KILLED:
            self._counters["late_events"] += 1
            return None
        if worker.state is not BOOTING:
            raise BrokerError(f"expected a booting worker; got {event!r} about {worker!r}")
        return worker

    def _kept(self, event: Released | Busy) -> Worker | None:
        """Find the worker under a kept lease; None if news of it came too late."""
        worker = self._roster.get(event.worker)
        if worker is None or not worker.kept or worker.lease != event.lease:
            self._counters["late_events"] += 1
            return None
        return worker

    # The owner and the clock

    def _on_start(self, event: Start, now: float, out: list[Effect]) -> None:
        self._handlers = _AFTER_START
        self._grow(now, out)

    def _on_resume(self, event: Resume, now: float, out: list[Effect]) -> None:
        sizes = event.pool_size, event.max_overflow
        if min(sizes) < 0 or sum(sizes) < 1:
            raise BrokerError(f"expected sizes >= 0 with a sum >= 1; got {sizes!r}")
        self._roster.resume(event)
        self._handlers = _AFTER_START
        self._pool_size = event.pool_size
        self._limit = sum(sizes)
        for worker in self._roster.known.values():
            # The other broker decided this, and may not have lived to see it done.
            if worker.state is RETIRING:
                out.append(Retire(worker.id))
            elif worker.state is KILLED:
                out.append(Kill(worker.id, ""))
            elif worker.state is LEASED:
                assert worker.client is not None
                assert worker.ticket is not None
                self._clients.setdefault(worker.client, {})[worker.ticket] = worker
            if worker.state is IDLE or worker.state is LEASED:
                # When a worker was ready is not known any more, but for one that was never used.
                ready = worker.born if worker.leases_served else worker.since
                self._ages.begin(worker, ready)
        self._shrink_kept(out)
        self._settle(now, out)

    def _on_tick(self, event: Tick, now: float, out: list[Effect]) -> None:
        roster = self._roster
        policy = self._policy
        while roster.booting:
            worker = oldest(roster.booting)
            if now < worker.born + policy.start_timeout:
                break
            reason = f"did not start within {policy.start_timeout:g} s"
            self._kill(worker, reason, now, out)
            self._start_failed(worker, reason, now, out, told=True)
        while roster.retiring:
            worker = oldest(roster.retiring)
            if now < worker.since + policy.stop_timeout:
                break
            reason = f"did not stop within {policy.stop_timeout:g} s"
            self._counters["stop_overruns"] += 1
            self._report("stop_overrun", worker.id, reason, out)
            self._kill(worker, reason, now, out)
        for worker in self._ages.due(now):
            self._age(worker, now, out)
        self._settle(now, out)
        self._trim(now, out)

    def _on_resize(self, event: Resize, now: float, out: list[Effect]) -> None:
        if event.pool_size < 0 or event.max_overflow < 0 or sum(event) < 1:
            raise BrokerError(f"expected sizes >= 0 with a sum >= 1; got {event!r}")
        roster = self._roster
        self._pool_size = event.pool_size
        self._limit = sum(event)
        while roster.booting and roster.alive > self._limit:
            newest = next(reversed(roster.booting.values()))
            self._kill(newest, "the pool shrank", now, out)
        while roster.idle and roster.alive > self._limit:
            self._retire_idle(oldest(roster.idle), now, out)
        self._shrink_kept(out)
        if self._waitlist:
            self._call_back(out)
            # Those behind the limit would now have to wait for a checkin.
            self._turn_away(f"the pool shrank to {self._limit} workers", now, out)
        self._settle(now, out)
        self._trim(now, out)

    def _on_drain(self, event: Drain, now: float, out: list[Effect]) -> None:
        if self._terminated:
            return
        self._draining = True
        leases = self._roster.keeps.leases.values()
        self._finishing |= {kept.client for kept in leases if kept.spare_own}
        self._finishing |= {each.client for each in self._waitlist.all() if each.spare_own}
        self._finishing |= self._unfinished
        while (kept := self._roster.keeps.oldest()) is not None:
            self._recall(kept, out, patient=kept.spare_own)
        self._settle(now, out)

    def _on_unfinished(self, event: Unfinished, now: float, out: list[Effect]) -> None:
        if not (self._terminated or self._drained):
            self._unfinished.add(event.client)
            if self._draining:
                self._finishing.add(event.client)

    def _on_finished(self, event: Finished, now: float, out: list[Effect]) -> None:
        self._unfinished.discard(event.client)
        self._settle(now, out)

    def _on_terminate(self, event: Terminate, now: float, out: list[Effect]) -> None:
        self._draining = self._terminated = True
        self._finishing.clear()
        self._unfinished.clear()
        for waiter in self._waitlist.all():
            self._unwait(waiter)
            self._refuse(waiter.client, waiter.ticket, "closed", "the pool was terminated", out)
        for worker in self._roster.known.values():
            if worker.state is not KILLED:
                self._kill(worker, "the pool was terminated", now, out)
        self._settle(now, out)


if TYPE_CHECKING:
    # The event types are the keys, so what a handler takes is known only to itself.
    _Handlers = dict[type, Callable[[Broker, Any, float, list[Effect]], None]]

_BEFORE_START: _Handlers = {Start: Broker._on_start, Resume: Broker._on_resume}

_AFTER_START: _Handlers = {
    Checkout: Broker._on_checkout,
    Cancel: Broker._on_cancel,
    Checkin: Broker._on_checkin,
    Destroy: Broker._on_destroy,
    ClientGone: Broker._on_client_gone,
    WorkerReady: Broker._on_ready,
    WorkerFailed: Broker._on_failed,
    WorkerExited: Broker._on_exited,
    Released: Broker._on_released,
    Busy: Broker._on_busy,
    Tick: Broker._on_tick,
    Resize: Broker._on_resize,
    Drain: Broker._on_drain,
    Unfinished: Broker._on_unfinished,
    Finished: Broker._on_finished,
    Terminate: Broker._on_terminate,
}
