"""What is in flight: the moves of a dispatcher's tasks and of the leases they run under.

    pending        lease.tasks --_send--> channel
       ^      start--^   |
       '-- taken back ---+--> _freed: kept for the next job, or checked in

The lowest part of a dispatcher. `dispatch` says which task goes to which worker, `endings` what
becomes of a call that ends; here every move leaves the records of tasks and leases consistent. What
was sent ahead is not committed: the page that is shared with the worker says which calls it has
begun, and the others are had back without asking it.

Guarantees: what is taken back has not begun and never will under that lease; it comes next in the
queue, in the order in which that worker was sent it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from whitepool_mp.client.durations import Durations
from whitepool_mp.client.engine_lease import EngineChannel, EngineLease
from whitepool_mp.client.tasks import Task

if TYPE_CHECKING:
    from whitepool_mp.client.engine import Engine

PATIENCE_SECONDS = 0.006
"""How long a call may at least take before those behind it are taken back; longer than a worker
holds answers back."""
LAST_NUMBER = 0xF0_0000
"""A channel whose calls have been numbered up to this begins anew: under another lease, or if its
holder decides when that ends, when nothing is in flight."""


class Flights:
    """The state of a dispatcher, and its moves.

    Args:
        engine: what sends, and asks the manager.

    Attributes:
        free: the leases that are kept and have nothing to do.
        passing: those that have nothing to do but pass what was taken back.
        kept: both of these.
        running: how many tasks are in flight.
        draining: whether the pool is shutting down: what was submitted is finished, no more.
        unserved: how many calls were accepted, and failed because the pool had ended, or because
            their worker was killed during a shutdown in order.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending: deque[Task] = deque()
        self._leases: dict[int, EngineLease] = {}  # by worker
        self.free: dict[EngineLease, None] = {}
        self.passing: dict[EngineLease, None] = {}
        self.kept = self.free, self.passing
        self._roomy: dict[EngineLease, None] = {}  # busy, and might take more
        self._unkept: dict[EngineLease, None] = {}  # not to be kept, or without a job so far
        self._long: dict[EngineLease, None] = {}  # with work for longer than a turn, perhaps
        self._stacked: dict[EngineLease, None] = {}  # with calls behind the first one, perhaps
        self._unpushed: dict[EngineChannel, None] = {}
        self._unwanted = 0  # how many of the pending were cancelled
        self._durations = Durations()
        self.running = 0
        self.draining = False
        self.unserved = 0

    # --- into flight ----------------------------------------------------------------------

    def start(self, task: Task, lease: EngineLease) -> None:
        """Send a task to a leased worker."""
        self.running += 1
        task.runner = lease
        lease.tasks.append(task)
        lease.load += task.cost * task.count
        channel = lease.channel
        if channel is None:
            channel = self._engine.channel(lease)
            if channel is not None:
                self._meet(lease, channel)
        if channel is not None:
            self._send(lease, channel, task)
        elif len(lease.tasks) == 1:
            self._engine.set_deadline(lease)  # until it is sent: the manager may be stuck

    def _meet(self, lease: EngineLease, channel: EngineChannel) -> None:
        """There is a way to the worker, on whose page it says how many calls it has left."""
        lease.channel = channel
        if not lease.manual:
            lease.left = max(1, channel.page.left)

    def _send(self, lease: EngineLease, channel: EngineChannel, task: Task) -> None:
        rest = task.cut(lease.left)
        if rest is not None:  # the worker will not serve that many
            lease.load -= rest.cost * rest.count
            self._pending.appendleft(rest)
        lease.left -= task.count
        channel.lease = lease
        task.number = channel.number + 1
        channel.number += task.count
        if task.small and task.items is None:
            channel.queue_call(task.kind, task.flags, lease.id, task.payload)
        else:
            channel.queue(task.pieces(task.number, lease.id))
        self._unpushed[channel] = None
        if len(lease.tasks) == 1:
            self._begins(lease)
        if len(lease.tasks) > 1 or task.count > 1:
            self._stacked[lease] = None
        if not lease.watched:
            self._watch(lease)

    def _begins(self, lease: EngineLease) -> None:
        """Another call is the first one in flight."""
        lease.since = time.monotonic()
        if lease.tasks[0].timeout is not None:
            self._engine.set_deadline(lease)

    def opened(self, lease: EngineLease, channel: EngineChannel) -> None:
        """The channel that a task waited for is there."""
        self._meet(lease, channel)
        for task in lease.tasks:
            self._send(lease, channel, task)
        if lease.tasks:
            self._begins(lease)

    # --- nothing in flight ----------------------------------------------------------------

    def _freed(self, lease: EngineLease) -> None:
        """Nothing is in flight any more."""
        lease.load = 0.0
        lease.stuck = False
        self._roomy.pop(lease, None)
        self._stacked.pop(lease, None)
        self._long.pop(lease, None)
        channel = lease.channel
        if lease.manual:
            if channel is not None and channel.number >= LAST_NUMBER and channel.taken is None:
                channel.renumber()  # it may be held for as long as its holder likes
            return
        if channel is not None and channel.taken is not None:
            self.passing[lease] = None  # until the worker has passed what was taken back
            return
        self.passing.pop(lease, None)
        used_up = channel is not None and channel.number >= LAST_NUMBER
        due = (
            channel is None
            or lease.left <= 0
            or channel.page.due(lease.id)
            or not channel.page.used(lease.id)
        )
        if lease.keep and not (used_up or due or self.draining):
            self.free[lease] = None
        else:
            self._check_in(lease)
            if used_up and channel is not None:
                channel.number = 0

    def _check_in(self, lease: EngineLease) -> None:
        self._forget(lease)
        self._engine.checkin(lease)

    def _forget(self, lease: EngineLease) -> None:
        if self._leases.get(lease.worker) is lease:
            del self._leases[lease.worker]
        self.free.pop(lease, None)
        self.passing.pop(lease, None)
        self._roomy.pop(lease, None)
        self._stacked.pop(lease, None)
        self._unkept.pop(lease, None)
        self._long.pop(lease, None)

    # --- taking back ----------------------------------------------------------------------

    def _take_back(self, lease: EngineLease) -> None:
        """Take back what is in flight behind the first call, as far as it has not begun.

        What has begun by now has been answered, but for the last: `hear_all` finds the answers.
        """
        channel = lease.channel
        if channel is None or not lease.tasks:
            return
        after = lease.tasks[0].next_number if channel.taken is None else channel.taken[0]
        begun = channel.page.take_back(lease.id, after, channel.number)
        if begun is None:
            return
        if begun < channel.number:
            channel.taken = after, channel.number
        while lease.tasks:
            task = lease.tasks[-1]
            rest = task.cut(max(task.at, begun + 1 - task.number))
            if rest is not None:
                lease.load -= rest.cost * rest.left
                lease.left += rest.left
                self._pending.appendleft(rest)
            if task.left and rest is not task:
                break
            lease.tasks.pop()
            self.running -= 1
        lease.stuck = True
        self._roomy.pop(lease, None)
        self._stacked.pop(lease, None)
        if not lease.tasks:
            self._freed(lease)

    def _skipped(self, lease: EngineLease) -> None:
        """The first call in flight was about to begin when it was taken back."""
        task = lease.tasks[0]
        rest = task.rest()
        assert rest is not None
        self._pending.appendleft(rest)
        lease.load -= rest.cost * rest.left
        lease.left += rest.left
        lease.tasks.popleft()
        self.running -= 1
        if lease.tasks:
            self._begins(lease)
        else:
            self._freed(lease)

    def _watch(self, lease: EngineLease) -> None:
        if not lease.watched:
            lease.watched = True
            self._engine.set_look(lease, lease.since + self._patience(lease))

    def _patience(self, lease: EngineLease) -> float:
        return max(PATIENCE_SECONDS, 2 * lease.tasks[0].cost)

    def look(self, lease: EngineLease) -> None:
        """It is time to see whether the first call in flight holds others up."""
        lease.watched = False
        if lease.channel is not None:
            self._engine.hear_all(lease.channel)  # it may be this process that is slow
        if not lease.tasks:
            return
        if time.monotonic() < lease.since + self._patience(lease):
            self._watch(lease)
            return
        self._long[lease] = None
        if len(lease.tasks) > 1 or lease.tasks[0].left > 1:
            self._take_back(lease)

    def sent(self, channel: EngineChannel) -> bool:
        """Something was sent: find out whether the lease had been taken back by then."""
        lease = channel.lease
        if lease is None or lease.channel is not channel:
            return False
        return channel.page.is_recalled(lease.id) and self._is_refused(lease)

    def _is_refused(self, lease: EngineLease) -> bool:
        """Whether the first call in flight will never begin, since the lease was taken back.

        The worker refuses what was sent before it begins anything under another lease. What came
        later it may only find when that has ended.
        """
        channel = lease.channel
        if channel is None or not lease.tasks:
            return False
        number = lease.tasks[0].next_number
        if not channel.page.refuses(lease.id, number):
            return False
        self._engine.hear_all(channel)  # it may have been answered
        if lease.ended is None and lease.tasks and lease.tasks[0].next_number == number:
            self.recalled(lease)
        return True

    # --- a whole lease --------------------------------------------------------------------

    def recalled(self, lease: EngineLease) -> None:
        """The pool took a lease back: nothing that is in flight under it has begun."""
        lease.ended = "recalled"
        self._forget(lease)
        if lease.channel is not None:
            lease.channel.lease = lease.channel.taken = None
        self._requeue(self._withdraw(lease))

    def superseded(self, worker: int) -> None:
        """A worker was granted that was kept here: the pool had recalled it."""
        lease = self._leases.get(worker)
        if lease is not None:
            channel = lease.channel
            if channel is not None and lease.tasks:
                self._engine.hear_all(channel)  # all that it began has been answered
            if lease.ended is None:
                self.recalled(lease)

    def _withdraw(self, lease: EngineLease) -> list[Task]:
        """Take everything off a lease."""
        tasks = list(lease.tasks)
        lease.tasks.clear()
        lease.load = 0.0
        self.running -= len(tasks)
        return tasks

    def _requeue(self, tasks: list[Task]) -> None:
        """What is left of these comes next."""
        for task in reversed(tasks):
            rest = task.rest()
            if rest is not None:
                self._pending.appendleft(rest)
