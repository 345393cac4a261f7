"""Who works here: every worker from its spawn to its exit, by state, and the slots they sit in.

Each state but KILLED has a container of its own, ordered by when the worker entered it. Timeouts
are the same for all workers of a state, so the first of a container is also the next one due, and
the number of workers in a state is the length of its container: no timers to cancel, no counts to
keep in step. Every method is O(1), or O(log slots) where a slot changes hands.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict

from whitepool_mp.broker.errors import BrokerError
from whitepool_mp.broker.events import Resume
from whitepool_mp.broker.keeps import Keeps
from whitepool_mp.broker.state import BOOTING, IDLE, KILLED, LEASED, RETIRING, Worker, WorkerState

__all__ = ["Roster"]


class Roster:
    """The workers of a pool. It keeps records and makes no decisions.

    Attributes:
        changed: the workers whose record changed, since whoever looks at it emptied it.
    """

    __slots__ = ("_free", "_last_lease", "_last_worker", "booting", "changed", "idle", "keeps",
                 "known", "leases", "retiring")  # fmt: skip

    def __init__(self) -> None:
        self.changed: list[Worker] = []
        self.known: dict[int, Worker] = {}
        self.booting: OrderedDict[int, Worker] = OrderedDict()
        self.idle: OrderedDict[int, Worker] = OrderedDict()
        self.retiring: OrderedDict[int, Worker] = OrderedDict()
        self.leases: dict[int, Worker] = {}
        self.keeps = Keeps()
        self._free: list[int] = []
        self._last_worker = 0
        self._last_lease = 0

    @property
    def alive(self) -> int:
        """How many workers count against the limit."""
        return len(self.booting) + len(self.idle) + len(self.leases)

    @property
    def live(self) -> bool:
        """Whether any worker has started and serves or could serve."""
        return bool(self.idle or self.leases)

    def get(self, worker_id: int) -> Worker | None:
        """Find a worker; None if it has exited.

        Raises:
            BrokerError: there never was such a worker.
        """
        worker = self.known.get(worker_id)
        if worker is None and not 0 < worker_id <= self._last_worker:
            raise BrokerError(f"worker {worker_id} was never spawned")
        return worker

    def add(self, now: float, wave: int) -> Worker:
        """Make a new booting worker in the lowest free slot."""
        # Slots 0..n-1 are each either held by one of the alive or in the heap, so with an empty
        # heap n is how many are alive; and the lowest free slot never exceeds that number.
        slot = heapq.heappop(self._free) if self._free else self.alive
        self._last_worker += 1
        worker = Worker(self._last_worker, slot, now, wave)
        self.known[worker.id] = self.booting[worker.id] = worker
        self.changed.append(worker)
        return worker

    def resume(self, event: Resume) -> None:
        """Take over the workers of another roster; this one is empty.

        Raises:
            BrokerError: two of them cannot be in one pool, or a number is above the last. Nothing
                has changed.
        """
        alive = [each for each in event.workers if each.state in (BOOTING, IDLE, LEASED)]
        leases = [each.lease for each in alive if each.state is LEASED]
        for what, numbers, last in (
            ("worker", [each.id for each in event.workers], event.last_worker),
            ("lease", leases, event.last_lease),
            ("slot", [each.slot for each in alive], math.inf),
        ):
            if len(set(numbers)) != len(numbers):
                raise BrokerError(f"expected every {what} once; got {sorted(map(repr, numbers))}")
            if any(number is None or not 0 <= number <= last for number in numbers):
                raise BrokerError(f"expected {what} numbers up to {last}; got {numbers!r}")
        self._last_worker = event.last_worker
        self._last_lease = event.last_lease
        taken = {each.slot for each in alive}
        self._free = [slot for slot in range(max(taken, default=-1) + 1) if slot not in taken]
        for each in sorted(event.workers):
            worker = Worker(each.id, each.slot, each.born, 0)
            worker.state = each.state
            worker.since = each.since
            worker.leases_served = each.leases_served
            worker.lease, worker.client, worker.ticket = each.lease, each.client, each.ticket
            self.known[worker.id] = worker
            self.changed.append(worker)
        for each in sorted(event.workers, key=lambda each: (each.since, each.lease or 0)):
            worker = self.known[each.id]
            if each.state is LEASED:
                assert each.lease is not None
                self.leases[each.lease] = worker
                if each.kept:
                    self.keeps.add(worker, each.spare_own)
            elif each.state is not KILLED:
                self._of(each.state)[worker.id] = worker

    def _of(self, state: WorkerState) -> OrderedDict[int, Worker]:
        """The container of a state that has workers by their numbers."""
        return {BOOTING: self.booting, IDLE: self.idle, RETIRING: self.retiring}[state]

    def detach(self, worker: Worker) -> None:
        """Take a worker out of its state's container, on its way to another one."""
        state = worker.state
        if state is LEASED:
            assert worker.lease is not None
            if worker.kept:
                self.keeps.drop(worker)
            del self.leases[worker.lease]
            worker.lease = worker.client = worker.ticket = None
            worker.for_jobs = False
        elif state is BOOTING:
            del self.booting[worker.id]
        elif state is IDLE:
            del self.idle[worker.id]
        elif state is RETIRING:
            del self.retiring[worker.id]

    def rest(self, worker: Worker, now: float) -> None:
        """Make a detached worker idle."""
        worker.state = IDLE
        worker.since = now
        self.idle[worker.id] = worker
        self.changed.append(worker)

    def lease(self, worker: Worker, client: int, ticket: int, now: float) -> int:
        """Lease a detached worker, under a number higher than all before."""
        self._last_lease = lease = self._last_lease + 1
        worker.state = LEASED
        worker.since = now
        worker.lease = lease
        worker.client = client
        worker.ticket = ticket
        worker.leases_served += 1
        self.leases[lease] = worker
        self.changed.append(worker)
        return lease

    def stop(self, worker: Worker, state: WorkerState, now: float) -> None:
        """Make a detached worker RETIRING or KILLED; its slot is free if it was alive."""
        if worker.alive:
            heapq.heappush(self._free, worker.slot)
        worker.state = state
        worker.since = now
        if state is RETIRING:
            self.retiring[worker.id] = worker
        self.changed.append(worker)

    def forget(self, worker: Worker) -> None:
        """Strike a detached worker off; its slot is free if it was alive."""
        if worker.alive:
            heapq.heappush(self._free, worker.slot)
        del self.known[worker.id]
        self.changed.append(worker)
