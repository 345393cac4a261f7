"""Which job goes to which worker, and when: the part of an engine that thinks.

    submit --> pending --assign--> lease.tasks --answered, failed--> sinks
                 ^                     |
                 '--- taken back, lost-'

Jobs queue here, in order, and the manager is asked for as many workers as they could use. A lease
that may be kept stays here for the next job until the pool recalls it; the others go back after one
turn. Short jobs are sent to a worker many at a time, as many as take about `TURN_SECONDS` by what
is known of their function, so that it need not wait for this process between them. A job sent
ahead is taken back as soon as a worker is free for it, or the one before it takes long.

Here are the decisions. Below are `endings` (the arrow to the sinks), `flights` (what is done to the
tasks of one lease: sent, taken back) and `durations` (what is known of a function).

Guarantees: a worker's death fails the call that it had begun, and what it had not begun goes to
another one; a cancelled or late call has its worker killed, and no other call is lost with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from whitepool_mp.client.endings import Endings
from whitepool_mp.client.engine_lease import EngineLease
from whitepool_mp.client.flights import LAST_NUMBER
from whitepool_mp.client.member import refusal
from whitepool_mp.client.tasks import Task
from whitepool_mp.errors import PoolClosed, WhitepoolError
from whitepool_mp.wire import frames

if TYPE_CHECKING:
    from whitepool_mp.client.engine import Engine

TURN_SECONDS = 0.005
"""How much work is sent to a worker at once; what somebody else waits for it at most."""
AHEAD_SECONDS = 0.05
"""No job is sent ahead to a worker that has work for as long as this."""
MOST_TASKS = 512
"""How many tasks may be in flight to one worker."""
WORTH_SECONDS = 0.002
"""How much queued work it takes to ask for another worker."""


class Dispatcher(Endings):
    """The jobs of an engine and the leases they run under.

    Args:
        engine: what sends, and asks the manager.
        in_turn: whether each job waits for its turn among all who ask the manager: there is a
            ticket for each that is queued, and a lease that may not be kept serves one.

    Attributes:
        hungry: whether another job could be sent, or a worker asked for, at once; if not, the next
            answer is soon enough to look at it.
    """

    def __init__(self, engine: Engine, in_turn: bool = False) -> None:
        super().__init__(engine)
        self.hungry = True
        self._in_turn = in_turn
        self._tickets: dict[int, None] = {}  # oldest first
        self._refused: WhitepoolError | None = None  # the pool takes no more checkouts

    @property
    def idle(self) -> bool:
        """Whether no job is queued or running."""
        return not self._pending and not self.running

    @property
    def waiting(self) -> bool:
        """Whether jobs wait for a worker, or behind others; for any thread to look at."""
        return bool(self._pending or self._stacked)

    # --- from pending to the workers ------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Queue a task for whichever worker becomes free."""
        error = self._engine.broken
        if error is None and self.draining:
            error = self._closing()
        if error is not None:
            self.fail_all(task, error)
        else:
            self._pending.append(task)

    def _closing(self) -> WhitepoolError:
        member = self._engine.member()
        name = "" if member is None else f" {member.name!r}"
        return PoolClosed(f"pool{name} is shutting down: it takes no new jobs")

    def dispatch(self) -> None:
        """Send what can be sent, and ask for more workers if that is not all."""
        pending = self._pending
        self._feed_free()
        if pending and self._roomy:
            share = max(1, len(pending) // len(self._roomy))
            for lease in list(self._roomy):
                self._fill(lease, share)
        if pending:
            self._ask()
        else:
            self._cancel_tickets(0)
            if self.free and self._stacked:
                self._share_out()
            for lease in list(self.free if self.draining else self._unkept):
                if lease in self.free:
                    self._check_in(lease)
        # In turn each has its ticket at once, unless every worker is here, and for a moment only.
        tickets = 0 if self._in_turn else len(self._tickets)
        self.hungry = (
            bool(self.free)
            or len(self._leases) + tickets < self._engine.capacity()
            or (bool(self._long) and not tickets)
        )
        if self._unpushed:
            pushed = list(self._unpushed)
            self._unpushed.clear()
            refused = False
            for channel in pushed:
                self._engine.push(channel)
                refused |= self.sent(channel)
            if refused:
                self.dispatch()  # what is to be sent to somebody else

    def _feed_free(self) -> None:
        """Give every free worker a task."""
        while self.free and self._pending:
            lease = next(reversed(self.free))
            if lease.channel is not None and lease.channel.page.is_recalled(lease.id):
                self.recalled(lease)
                continue
            task = self._next()
            if task is not None:
                del self.free[lease]
                self._assign(lease, task)
                if lease.keep:
                    self._unkept.pop(lease, None)

    def _next(self) -> Task | None:
        """The next task that somebody wants, if that is the next one."""
        task = self._pending.popleft()
        return task if not task.cancelled and task.sink.began(task) else None

    def _fill(self, lease: EngineLease, share: int) -> None:
        """Send up to `share` more tasks to a busy worker, as far as there is room for them."""
        pending, seconds, channel = self._pending, self._durations.seconds, lease.channel
        if (
            channel is None
            or lease.stuck
            or not channel.page.ordered
            or channel.blocked
            or channel.page.is_recalled(lease.id)
            or channel.page.due(lease.id)
            or (self._in_turn and not lease.keep)
        ):
            self._roomy.pop(lease, None)
            return
        while share and pending:
            task = pending[0]
            known = seconds.get(task.known_as)
            if (
                known is None
                or not task.small
                or len(lease.tasks) >= MOST_TASKS
                or channel.number >= LAST_NUMBER
                or lease.left <= 0
            ):
                break
            load = lease.load + known * task.count
            if load > TURN_SECONDS and (len(lease.tasks) > 1 or load > AHEAD_SECONDS):
                break
            pending.popleft()
            if task.cancelled or not task.sink.began(task):
                continue
            task.cost = known
            task.runner = lease
            lease.tasks.append(task)
            lease.load = load
            self.running += 1
            self._send(lease, channel, task)
            share -= 1
        else:
            if lease.keep:
                return
        self._roomy.pop(lease, None)  # until an answer comes, or for good if it may not be kept

    def _assign(self, lease: EngineLease, task: Task) -> None:
        """Put a task in flight."""
        task.cost = self._durations.seconds.get(task.known_as, AHEAD_SECONDS)
        self.start(task, lease)
        self._roomy[lease] = None
        if lease.load > TURN_SECONDS:
            self._long[lease] = None

    def _share_out(self) -> None:
        """Workers have nothing to do while jobs wait behind others: let them have those."""
        for lease in list(self._stacked):
            if not lease.tasks or (len(lease.tasks) == 1 and lease.tasks[0].left == 1):
                del self._stacked[lease]
        victim = max(self._stacked, key=lambda lease: lease.load, default=None)
        if victim is None or victim.load < WORTH_SECONDS / 4:
            return
        self._take_back(victim)
        self._feed_free()
        for lease in list(self._roomy):
            self._fill(lease, len(self._pending))

    # --- asking for workers ---------------------------------------------------------------

    def _ask(self) -> None:
        """Ask for as many workers as the queued jobs could use."""
        pending = self._pending
        held = len(self._leases)
        if self._refused is not None:
            while pending and not held:
                self.lose(pending.popleft(), self._refused)
            return
        useful = len(pending)
        if self._in_turn:
            if self._unwanted:
                self._drop_unwanted()
                pending = self._pending
                useful = len(pending)
            self._cancel_tickets(useful)
            for nth in range(len(self._tickets), useful):
                site = pending[nth].site
                self._tickets[self._engine.ask_for_worker(site, self._heard)] = None
            return
        known = self._durations.seconds.get(pending[0].known_as)
        if known is not None and useful > 1:
            # Not for what is done before another worker is there.
            useful = 1 + int(useful * pending[0].count * known / WORTH_SECONDS)
        # One ticket at least while jobs wait: by it the pool knows of them, also when it drains.
        room = max(self._engine.capacity() - held, 1)
        for _ in range(min(useful, len(pending), room) - len(self._tickets)):
            self._tickets[self._engine.ask_for_worker(pending[0].site, self._heard)] = None

    def _cancel_tickets(self, needed: int) -> None:
        """Give up all but the oldest tickets."""
        while len(self._tickets) > needed:
            self._engine.cancel_checkout(self._tickets.popitem()[0], None)

    def _heard(
        self, ticket: int, grant: frames.Grant | None, refused: frames.Refused | None
    ) -> None:
        """The manager answered a request for a worker."""
        self._tickets.pop(ticket, None)
        if grant is not None:
            lease = EngineLease(grant, manual=False)
            self.superseded(lease.worker)
            self._leases[lease.worker] = lease
            self.free[lease] = self._unkept[lease] = None
            return
        if refused is None:
            return  # the manager is gone, and `break_all` ends the jobs
        member = self._engine.member()
        error: WhitepoolError = (
            refusal(refused, member.name, None, None)
            if member is not None
            else PoolClosed("the pool was shut down")
        )
        if refused.why == "closed":
            self._refused = error
        elif not self._leases:
            self._fail_pending(error)  # every job here waits for what could not be had
