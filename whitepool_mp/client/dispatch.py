"""Which job goes to which worker, and when: the part of an engine that thinks.

    submit --> pending --assign--> lease.tasks --answered, failed--> sinks
                 ^                     |
                 '--- taken back, lost-'

Jobs queue here, in order, and the manager is asked for as many workers as they could use. A lease
that may be kept stays here for the next job until the pool recalls it; the others go back after one
turn. Short jobs are sent to a worker many at a time, as many as take about `TURN_SECONDS` by what
is known of their function, so that it need not wait for this process between them. A job sent
ahead is taken back as soon as a worker is free for it, or the one before it takes long.

Guarantees: a worker's death fails the call that it had begun, and what it had not begun goes to
another one; a cancelled or late call has its worker killed, and no other call is lost with it.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from whitepool_mp.client.engine_lease import LOST, EngineChannel, EngineLease
from whitepool_mp.client.member import refusal, worker_died
from whitepool_mp.client.tasks import MAX_DEATHS, Task
from whitepool_mp.errors import CallTimeout, PoolClosed, WhitepoolError
from whitepool_mp.wire import frames, messages

if TYPE_CHECKING:
    from whitepool_mp.client.engine import Engine

TURN_SECONDS = 0.005
"""How much work is sent to a worker at once; what somebody else waits for it at most."""
CALL_SECONDS = 10e-6
"""What a call costs besides its function's own time."""
BULK_SECONDS = 1e-6
"""The same for a call of a BULK."""
AHEAD_SECONDS = 0.05
"""No job is sent ahead to a worker that has work for as long as this."""
MOST_TASKS = 512
"""How many tasks may be in flight to one worker."""
PATIENCE_SECONDS = 0.006
"""How long a call may at least take before those behind it are taken back; longer than a worker
holds answers back."""
WORTH_SECONDS = 0.002
"""How much queued work it takes to ask for another worker."""
LAST_NUMBER = 0xF0_0000
"""A channel whose calls have been numbered up to this begins anew under another lease."""
_MOST_NAMES = 4096


class Dispatcher:
    """The jobs of an engine and the leases they run under.

    Attributes:
        free: the leases that are kept and have nothing to do.
        running: how many tasks are in flight.
        hungry: whether another job could be sent, or a worker asked for, at once; if not, the next
            answer is soon enough to look at it.
        draining: whether the pool is shutting down: what was submitted is finished, no more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending: deque[Task] = deque()
        self._leases: dict[int, EngineLease] = {}  # by worker
        self.free: dict[EngineLease, None] = {}
        self._roomy: dict[EngineLease, None] = {}  # busy, and might take more
        self._unkept: dict[EngineLease, None] = {}  # those that may not be kept
        self._long: dict[EngineLease, None] = {}  # with work for longer than a turn, perhaps
        self._stacked: dict[EngineLease, None] = {}  # with calls behind the first one, perhaps
        self._unpushed: dict[EngineChannel, None] = {}
        self._unwanted = 0  # how many of the pending were cancelled
        self._tickets: set[int] = set()
        self._seconds: dict[str, float] = {}  # a call of this function takes ...
        self.running = 0
        self.hungry = True
        self.draining = False
        self._refused: WhitepoolError | None = None  # the pool takes no more checkouts

    @property
    def idle(self) -> bool:
        """Whether no job is queued or running."""
        return not self._pending and not self.running

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
            self._cancel_tickets()
            if self.free and self._stacked:
                self._share_out()
            for lease in list(self.free if self.draining else self._unkept):
                if lease in self.free:
                    self._check_in(lease)
        self.hungry = (
            bool(self.free)
            or len(self._leases) + len(self._tickets) < self._engine.capacity()
            or (bool(self._long) and not self._tickets)
        )
        if self._unpushed:
            for channel in self._unpushed:
                self._engine.push(channel)
            self._unpushed.clear()

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

    def _next(self) -> Task | None:
        """The next task that somebody wants, if that is the next one."""
        task = self._pending.popleft()
        return task if not task.cancelled and task.sink.began(task) else None

    def _fill(self, lease: EngineLease, share: int) -> None:
        """Send up to `share` more tasks to a busy worker, as far as there is room for them."""
        pending, seconds, channel = self._pending, self._seconds, lease.channel
        if (
            channel is None
            or lease.stuck
            or not channel.page.ordered
            or channel.blocked
            or channel.page.is_recalled(lease.id)
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
        task.cost = self._seconds.get(task.known_as, AHEAD_SECONDS)
        self.start(task, lease)
        self._roomy[lease] = None
        if lease.load > TURN_SECONDS:
            self._long[lease] = None

    def start(self, task: Task, lease: EngineLease) -> None:
        """Send a task to a leased worker."""
        self.running += 1
        task.runner = lease
        lease.tasks.append(task)
        lease.load += task.cost * task.count
        channel = lease.channel
        if channel is None:
            channel = lease.channel = self._engine.channel(lease)
        if channel is not None:
            self._send(lease, channel, task)
        elif len(lease.tasks) == 1:
            self._engine.set_deadline(lease)  # until it is sent: the manager may be stuck

    def _send(self, lease: EngineLease, channel: EngineChannel, task: Task) -> None:
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
        lease.channel = channel
        for task in lease.tasks:
            self._send(lease, channel, task)
        if lease.tasks:
            self._begins(lease)

    def give_up(self, lease: EngineLease, error: Exception) -> None:
        """This process has no room for a channel: its tasks fail for it, the worker goes back."""
        tasks = self._withdraw(lease)
        if not lease.manual:
            self._check_in(lease)
        for task in tasks:
            self.fail_all(task, error)

    # --- asking for workers ---------------------------------------------------------------

    def _ask(self) -> None:
        """Ask for as many workers as the queued jobs could use."""
        pending = self._pending
        held = len(self._leases)
        if self._refused is not None:
            if not held:
                self._fail_pending(self._refused)
            return
        useful = len(pending)
        known = self._seconds.get(pending[0].known_as)
        if known is not None and useful > 1:
            # Not for what is done before another worker is there.
            useful = 1 + int(useful * pending[0].count * known / WORTH_SECONDS)
        # One ticket at least while jobs wait: by it the pool knows of them, also when it drains.
        room = max(self._engine.capacity() - held, 1)
        for _ in range(min(useful, len(pending), room) - len(self._tickets)):
            self._tickets.add(self._engine.ask_for_worker(pending[0].site, self._heard))

    def _cancel_tickets(self) -> None:
        while self._tickets:
            self._engine.cancel_checkout(self._tickets.pop(), None)

    def _heard(
        self, ticket: int, grant: frames.Grant | None, refused: frames.Refused | None
    ) -> None:
        """The manager answered a request for a worker."""
        self._tickets.discard(ticket)
        if grant is not None:
            lease = EngineLease(grant, manual=False)
            self.superseded(lease.worker)
            self._leases[lease.worker] = lease
            self.free[lease] = None
            if not lease.keep:
                self._unkept[lease] = None
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

    def superseded(self, worker: int) -> None:
        """A worker was granted that was kept here: the pool had recalled it."""
        lease = self._leases.get(worker)
        if lease is not None:
            channel = lease.channel
            if channel is not None and lease.tasks:
                self._engine.hear_all(channel)  # all that it began has been answered
            if lease.ended is None:
                self.recalled(lease)

    # --- answers --------------------------------------------------------------------------

    def answered(self, channel: EngineChannel, message: messages.Message) -> None:
        """A message came from a worker."""
        number = message.number
        lease = channel.lease
        if message.kind == messages.RESULTS:
            number += messages.count_results(message.payload) - 1
        if channel.taken is not None and number >= channel.taken[1]:
            channel.taken = None
            if lease is not None and not lease.tasks:
                self._freed(lease)
        if lease is None or not lease.tasks:
            return
        task = lease.tasks[0]
        if message.kind == messages.RESULTS:
            self._returned(lease, task, message)
            return
        if number != task.number + task.at:
            return  # of a call that was taken back or given up
        if message.kind == messages.ERROR and message.flags >= messages.FENCED:
            if not lease.manual:
                if message.flags == messages.FENCED:
                    self.recalled(lease)
                else:
                    self._skipped(lease)
                return
        else:
            seconds = message.token * 1e-9 + CALL_SECONDS
            if not task.cost * 0.7 < seconds < task.cost * 1.5:
                self._learn(task.known_as, seconds)
        index = task.first + task.at
        self._ended(lease, task, 1)
        task.sink.answered(task, index, message)

    def _returned(self, lease: EngineLease, task: Task, message: messages.Message) -> None:
        """Several calls of a BULK returned, perhaps some that are known to have."""
        count = messages.count_results(message.payload)
        skip = task.next_number - message.number
        if not 0 <= skip < count:
            return
        if message.token:
            self._learn(task.known_as, message.token / count * 1e-9 + BULK_SECONDS)
        seconds = message.token / count * 1e-9
        count = min(count - skip, task.left)
        index = task.first + task.at
        self._ended(lease, task, count)
        task.sink.returned(task, index, count, skip, seconds, bytes(message.payload))

    def _ended(self, lease: EngineLease, task: Task, count: int) -> None:
        """The first calls in flight have ended."""
        task.at += count
        lease.load -= task.cost * count
        if task.at == task.count:
            lease.tasks.popleft()
            self.running -= 1
        if not lease.tasks:
            self._freed(lease)
            return
        lease.since = time.monotonic()
        if lease.tasks[0].timeout is not None:
            self._engine.set_deadline(lease)
        if lease.keep and not (lease.manual or self.draining):
            lease.stuck = False
            self._roomy[lease] = None

    def _learn(self, name: str, seconds: float) -> None:
        """A call of this function took so long."""
        known = self._seconds.get(name)
        if known is None and len(self._seconds) >= _MOST_NAMES:
            self._seconds.clear()
        self._seconds[name] = seconds if known is None else known + (seconds - known) * 0.2

    def _freed(self, lease: EngineLease) -> None:
        """Nothing is in flight any more."""
        lease.load = 0.0
        lease.stuck = False
        self._roomy.pop(lease, None)
        self._stacked.pop(lease, None)
        self._long.pop(lease, None)
        channel = lease.channel
        if channel is not None and channel.taken is not None:
            return  # until the worker has passed what was taken back
        if lease.manual:
            return
        worn = channel is not None and channel.number >= LAST_NUMBER
        if lease.keep and not (worn or self.draining):
            self.free[lease] = None
        else:
            self._check_in(lease)
            if worn and channel is not None:
                channel.number = 0

    def _check_in(self, lease: EngineLease) -> None:
        self._forget(lease)
        self._engine.checkin(lease)

    def _forget(self, lease: EngineLease) -> None:
        if self._leases.get(lease.worker) is lease:
            del self._leases[lease.worker]
        self.free.pop(lease, None)
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

    def recalled(self, lease: EngineLease) -> None:
        """The pool took a lease back: nothing that is in flight under it has begun."""
        lease.ended = "recalled"
        self._forget(lease)
        if lease.channel is not None:
            lease.channel.lease = lease.channel.taken = None
        self._requeue(self._withdraw(lease))

    def _skipped(self, lease: EngineLease) -> None:
        """The first call in flight was about to begin when it was taken back."""
        task = lease.tasks[0]
        rest = task.rest()
        assert rest is not None
        self._pending.appendleft(rest)
        lease.load -= rest.cost * rest.left
        lease.tasks.popleft()
        self.running -= 1
        if lease.tasks:
            self._begins(lease)
        else:
            self._freed(lease)

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

    # --- ends -----------------------------------------------------------------------------

    def lost(self, lease: EngineLease) -> None:
        """A worker is gone: find out why for the call it had begun, move the others on."""
        channel = lease.channel
        tasks = self._withdraw(lease)
        lease.ended = LOST
        self._forget(lease)
        began = (
            bool(tasks) and channel is not None and channel.began(lease.id, tasks[0].next_number)
        )
        self._engine.drop(lease)
        if not tasks:
            self._engine.say_destroyed(lease, "its channel broke")
            return
        task = tasks[0]
        if not began:
            task.deaths += 1
            if task.deaths < MAX_DEATHS and not lease.manual:
                # If it is dead the manager knows nothing of this lease any more.
                self._engine.say_destroyed(lease, "its channel broke")
                self._requeue(tasks)
                return
        index = task.first + task.at
        task.at += 1
        task.deaths = 0
        self.running += 1  # until its end is known
        name = task.name

        def told(answer: object) -> None:
            self.running -= 1
            if isinstance(answer, WhitepoolError):
                task.sink.failed(task, index, answer)
                return
            member = self._engine.member()
            pool = member.name if member is not None else ""
            assert answer is None or isinstance(answer, dict)
            error = worker_died(pool, lease.slot, lease.pid, name, began, answer)
            task.sink.failed(task, index, error)

        self._engine.ask_why(lease, told)
        self._requeue(tasks)

    def late(self, lease: EngineLease) -> None:
        """The first call in flight is over its time."""
        task = lease.tasks[0]
        number = task.next_number
        self._take_back(lease)
        if lease.channel is not None:
            self._engine.hear_all(lease.channel)
        if not lease.tasks or lease.tasks[0] is not task or task.next_number != number:
            return  # its answer had come, or it had not begun
        tasks = self._withdraw(lease)
        self.destroy(lease, f"a call took longer than {task.timeout:g} s")
        index = task.first + task.at
        task.at += 1
        self._requeue(tasks)
        task.sink.failed(
            task,
            index,
            CallTimeout(
                f"{task.name} took longer than {task.timeout:g} s in worker {lease.slot} (pid "
                f"{lease.pid}); the worker was killed and is being replaced"
            ),
        )

    def cancel(self, task: Task) -> None:
        """Nobody wants a task any more: take it off the queue, or kill the worker that runs it."""
        task.cancelled = True
        lease: EngineLease | None = task.runner
        if lease is None:
            self._unwanted += 1
            if self._unwanted * 2 > len(self._pending):
                self._unwanted = 0
                self._pending = deque(task for task in self._pending if not task.cancelled)
            return
        if task in lease.tasks and not lease.manual:
            self._take_back(lease)
            if lease.channel is not None:
                self._engine.hear_all(lease.channel)
        if lease.tasks and lease.tasks[0] is task:
            tasks = self._withdraw(lease)
            self.destroy(lease, "its call was cancelled")
            self._requeue(tasks[1:])

    def destroy(self, lease: EngineLease, reason: str) -> None:
        """Have a leased worker killed and replaced; a call running on it is the caller's to end."""
        if lease.ended is None:
            lease.ended = f"destroyed ({reason})"
            self._forget(lease)
            self._engine.drop(lease)
            self._engine.say_destroyed(lease, reason)

    def break_all(self, error: WhitepoolError, leases: list[EngineLease]) -> None:
        """The manager is gone, and the workers with it: everything ends."""
        for lease in {*leases, *self._leases.values()}:
            lease.ended = "lost (the manager is gone)"
            for task in self._withdraw(lease):
                self.fail_all(task, error)
        self._leases.clear()
        self.free.clear()
        self._roomy.clear()
        self._stacked.clear()
        self._long.clear()
        self._unkept.clear()
        self._fail_pending(error)

    def _fail_pending(self, error: BaseException) -> None:
        while self._pending:
            self.fail_all(self._pending.popleft(), error)

    def fail_all(self, task: Task, error: BaseException) -> None:
        """No call of a task will be answered."""
        while task.left:
            index = task.first + task.at
            task.at += 1
            task.sink.failed(task, index, error)

    def _closing(self) -> WhitepoolError:
        member = self._engine.member()
        name = "" if member is None else f" {member.name!r}"
        return PoolClosed(f"pool{name} is shutting down: it takes no new jobs")
