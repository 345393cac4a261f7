"""The moves a broker can make: what happens to one worker or one waiter, and the balance.

`core` says which event leads to which move. Here every move leaves the records consistent and notes
its effect; `_settle` then restores the balance of supply and demand, once, at the end of an event.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from whitepool_mp.broker.ages import Ages, spread
from whitepool_mp.broker.backoff import Backoff
from whitepool_mp.broker.effects import (
    Drained,
    Effect,
    Grant,
    Kill,
    Recall,
    Refuse,
    Report,
    ReportKind,
    Retire,
    Spawn,
    Why,
)
from whitepool_mp.broker.roster import Roster
from whitepool_mp.broker.starts import Starts
from whitepool_mp.broker.state import IDLE, KILLED, LEASED, RETIRING, Waiter, Worker
from whitepool_mp.broker.waitlist import Waitlist
from whitepool_mp.policy import Policy

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import random

__all__ = ["Moves", "oldest"]

_COUNTERS = (
    "granted",
    "refused_full",
    "refused_closed",
    "refused_timeout",
    "refused_factory_failed",
    "refused_cancelled",
    "cancelled_grants",
    "unknown_cancels",
    "duplicate_checkouts",
    "stale_checkins",
    "foreign_checkins",
    "spawned",
    "start_failures",
    "crashes",
    "retired",
    "killed",
    "late_events",
    "recalled",
    "recycled",
    "stop_overruns",
)

_REFUSED: dict[Why, str] = {
    "full": "refused_full",
    "closed": "refused_closed",
    "timeout": "refused_timeout",
    "factory_failed": "refused_factory_failed",
    "cancelled": "refused_cancelled",
}


PATIENCE = 3
"""How many rounds of starts may die without a word until waiters are refused."""
LINGER = 5.0
"""Seconds for which a drained pool without workers waits for who has jobs left to ask for one."""


def oldest(workers: OrderedDict[int, Worker]) -> Worker:
    """Give the worker that has been longest in this state."""
    return next(iter(workers.values()))


class Moves:
    """The state of a broker, and its moves.

    Args:
        policy: sizes, strategy and timeouts (seconds).
        rng: the source of jitter, in the backoff and in the limits of workers.
    """

    def __init__(self, policy: Policy, rng: random.Random) -> None:
        self._policy = policy
        self._pool_size = policy.pool_size
        self._limit = policy.pool_size + policy.max_overflow
        self._draining = False
        self._finishing: set[int | None] = set()  # clients with jobs queued as the drain began
        self._unfinished: set[int] = set()  # those of them that are waited for
        self._quiet_since: float | None = None  # since when nothing but those is waited for
        self._terminated = False
        self._drained = False
        self._roster = Roster()
        self._waitlist = Waitlist()
        self._starts = Starts(Backoff(policy.backoff_first, policy.backoff_max), rng)
        self._ages = Ages(policy.max_lifetime, self._roster.known, rng)
        self._rng = rng
        # What each client has open: a Waiter, or the Worker it was granted, by ticket.
        self._clients: dict[int, dict[int, Waiter | Worker]] = {}
        self._counters = dict.fromkeys(_COUNTERS, 0)

    # Supply and demand

    def _missing(self) -> int:
        """Tell how many workers demand and pool_size ask for beyond those alive; may be < 0."""
        roster = self._roster
        want = len(roster.leases) + len(self._waitlist) - roster.keeps.coming
        if not self._draining:
            want = max(self._pool_size, want + len(roster.idle))
        return min(self._limit, want) - roster.alive

    def _grow(self, now: float, out: list[Effect]) -> None:
        """Spawn what is missing, as far as failing starts allow."""
        missing = self._missing()
        if missing > 0 and self._starts.failing:
            missing = 0 if self._roster.booting or now < self._starts.not_before else 1
        for _ in range(missing):
            worker = self._roster.add(now, self._starts.wave)
            self._counters["spawned"] += 1
            calls, rss = (
                math.ceil(spread(limit, self._rng))
                for limit in (self._policy.max_calls, self._policy.max_rss)
            )
            out.append(Spawn(worker.id, worker.slot, calls, rss))

    def _trim(self, now: float, out: list[Effect]) -> None:
        """Retire overflow that has been idle for long enough, longest idle first."""
        roster = self._roster
        while roster.idle and roster.alive > self._pool_size:
            worker = oldest(roster.idle)
            if now < worker.since + self._policy.overflow_ttl:
                break
            self._retire_idle(worker, now, out)

    def _paused(self, now: float) -> bool:
        """Tell whether nobody is booting and, because starts fail, nobody can be started now."""
        starts = self._starts
        return starts.failing and not self._roster.booting and now < starts.not_before

    def _surplus(self) -> int:
        """Tell how many of the leased workers retire as soon as they are given back."""
        return max(0, len(self._roster.leases) - self._limit)

    def _returning(self) -> int:
        """Tell how many of those who wait are about to be served by a recalled lease."""
        return max(0, self._roster.keeps.coming - self._surplus())

    def _call_back(self, out: list[Effect]) -> None:
        """Recall kept leases for those who wait, as far as they may have them."""
        keeps = self._roster.keeps
        needed = len(self._waitlist) + self._surplus()
        spared = self._waitlist.spared()
        while keeps.coming < needed:
            worker = keeps.oldest(spared)
            if worker is None:
                break
            self._recall(worker, out)

    def _shrink_kept(self, out: list[Effect]) -> None:
        """Recall the oldest kept leases until there are no more of them than may be."""
        roster, keeps = self._roster, self._roster.keeps
        while (kept := keeps.oldest()) is not None and (
            keeps.unrecalled() > self._pool_size
            or len(roster.leases) - keeps.recalled > self._limit
        ):
            self._recall(kept, out)

    def _turn_away(self, detail: str, now: float, out: list[Effect]) -> None:
        """Refuse non-blocking waiters that neither a start nor a recalled lease will serve."""
        places = self._returning()
        why: Why = "full"
        room = self._limit - len(self._roster.leases)
        if room > 0:
            if self._paused(now):
                why, detail = "factory_failed", self._starts.last_failure or ""
            else:
                places += room
        for waiter in self._waitlist.beyond(places):
            self._unwait(waiter)
            self._refuse(waiter.client, waiter.ticket, why, detail, out)

    def _settle(self, now: float, out: list[Effect]) -> None:
        """Restore the balance after anything that may have changed supply or demand."""
        if self._waitlist:
            self._call_back(out)
            if self._waitlist.impatient:
                self._turn_away(f"all {self._limit} workers are taken", now, out)
        if self._draining and not self._waitlist:
            roster = self._roster
            while roster.idle:
                self._retire_idle(oldest(roster.idle), now, out)
            while roster.booting:
                self._kill(oldest(roster.booting), "the pool is draining", now, out)
            if not roster.known:
                self._end(now, out)
                return
        else:
            self._grow(now, out)
        self._quiet_since = None

    def _end(self, now: float, out: list[Effect]) -> None:
        """A draining pool has no workers, and nobody waits: it has ended, but for a moment in which
        who has jobs left may ask for one."""
        if self._unfinished:
            if self._quiet_since is None:
                self._quiet_since = now
            if now < self._quiet_since + LINGER:
                return
            self._unfinished.clear()
        self._quiet_since = None
        if not self._drained:
            self._drained = True
            self._finishing.clear()
            out.append(Drained())

    def _start_failed(
        self, worker: Worker, reason: str, now: float, out: list[Effect], *, told: bool
    ) -> None:
        """Draw the consequences of a failed start, except for the worker itself.

        A factory that raised, or took too long, has told why, and who waits is told at once. A
        process that merely died while it started may have been killed by anybody: that is worth
        `PATIENCE` attempts before those who would wait for a worker are turned away.
        """
        self._counters["start_failures"] += 1
        self._report("start_failed", worker.id, reason, out)
        delay = self._starts.failed(worker, reason, now)
        if delay is not None:
            self._report("backing_off", None, f"next start in {delay:.3g} s", out)
        if not self._roster.booting:
            wait_on = self._roster.live or not (told or self._starts.attempts >= PATIENCE)
            waitlist = self._waitlist
            for waiter in waitlist.beyond(self._returning()) if wait_on else waitlist.all():
                self._unwait(waiter)
                self._refuse(waiter.client, waiter.ticket, "factory_failed", reason, out)

    # Moves of one worker or waiter

    def _held(self, client: int, lease: int) -> Worker | None:
        """Find the worker under a lease, if this client holds it; count it if not."""
        worker = self._roster.leases.get(lease)
        if worker is None:
            self._counters["stale_checkins"] += 1
        elif worker.client != client:
            self._counters["foreign_checkins"] += 1
        else:
            return worker
        return None

    def _give_back(self, worker: Worker, now: float, out: list[Effect], worn: bool = False) -> None:
        """Take a clean worker back from its holder, and restore the balance."""
        self._take_back(worker, now, out, worn)
        self._settle(now, out)

    def _take_back(self, worker: Worker, now: float, out: list[Effect], worn: bool) -> None:
        """Take a clean worker back from its holder."""
        worker.worn = worker.worn or worn
        self._detach(worker)
        self._place(worker, now, out)

    def _place(self, worker: Worker, now: float, out: list[Effect]) -> None:
        """Decide what a worker does that was detached, clean."""
        others = self._roster.alive
        if others < self._limit and not worker.worn:
            while self._waitlist:
                waiter = self._waitlist.first()
                self._unwait(waiter)
                if now < waiter.deadline:
                    self._grant(
                        worker,
                        waiter.client,
                        waiter.ticket,
                        waiter.keep,
                        waiter.spare_own,
                        now,
                        out,
                    )
                    return
                detail = "the deadline had passed when its turn came"
                self._refuse(waiter.client, waiter.ticket, "timeout", detail, out)
            if others < self._pool_size or self._policy.overflow_ttl > 0:
                self._roster.rest(worker, now)
                return
        self._retire(worker, now, out)

    def _grant(
        self,
        worker: Worker,
        client: int,
        ticket: int,
        keep: bool,
        spare_own: bool,
        now: float,
        out: list[Effect],
    ) -> None:
        """Lease a detached worker; to keep, if that is asked for and nobody wants it back."""
        self._starts.used()
        self._counters["granted"] += 1
        lease = self._roster.lease(worker, client, ticket, now)
        worker.for_jobs = keep
        if keep:
            wanted = bool(self._waitlist) and self._waitlist.spared() != client
            keep = not wanted and not self._draining and self._roster.alive <= self._pool_size
            if keep:
                self._roster.keeps.add(worker, spare_own)
        self._clients.setdefault(client, {})[ticket] = worker
        out.append(Grant(client, ticket, lease, worker.id, keep))

    def _recall(self, worker: Worker, out: list[Effect], patient: bool = False) -> None:
        assert worker.lease is not None
        self._roster.keeps.recall(worker)
        out.append(Recall(worker.id, worker.lease, patient))

    def _age(self, worker: Worker, now: float, out: list[Effect]) -> None:
        """A worker is too old to serve on: it retires now, or when its lease ends."""
        worker.worn = True
        if worker.state is IDLE:
            self._retire_idle(worker, now, out)
        elif worker.coming:
            self._roster.keeps.detain(worker)
        elif worker.kept and not worker.recalled:
            self._recall(worker, out)

    def _retire_idle(self, worker: Worker, now: float, out: list[Effect]) -> None:
        self._roster.detach(worker)
        self._retire(worker, now, out)

    def _retire(self, worker: Worker, now: float, out: list[Effect]) -> None:
        self._counters["retired"] += 1
        self._counters["recycled"] += worker.worn
        self._roster.stop(worker, RETIRING, now)
        out.append(Retire(worker.id))

    def _kill(self, worker: Worker, reason: str, now: float, out: list[Effect]) -> None:
        self._counters["killed"] += 1
        self._detach(worker)
        self._roster.stop(worker, KILLED, now)
        out.append(Kill(worker.id, reason))

    def _detach(self, worker: Worker) -> None:
        """Take a worker out of where it is, its holder's hands included."""
        if worker.state is LEASED:
            assert worker.client is not None
            assert worker.ticket is not None
            self._close(worker.client, worker.ticket)
        self._roster.detach(worker)

    def _unwait(self, waiter: Waiter) -> None:
        """Take a waiter off the list."""
        self._waitlist.remove(waiter)
        self._close(waiter.client, waiter.ticket)

    def _close(self, client: int, ticket: int) -> None:
        """Forget a ticket, and a client that has no other."""
        tickets = self._clients[client]
        del tickets[ticket]
        if not tickets:
            del self._clients[client]

    def _refuse(self, client: int, ticket: int, why: Why, detail: str, out: list[Effect]) -> None:
        self._counters[_REFUSED[why]] += 1
        out.append(Refuse(client, ticket, why, detail))

    def _report(self, what: ReportKind, worker: int | None, detail: str, out: list[Effect]) -> None:
        out.append(Report(what, worker, detail))
