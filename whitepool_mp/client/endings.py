"""How calls end: each is answered, or it fails with the reason, and its sink hears that once.

    channel --RESULT, ERROR, RESULTS--> answered --.
    a worker's death ------------------> lost      |--> sinks
    time passes -----------------------> late      |
    the manager's death ---------------> break_all-'

The part of a dispatcher between what happens to calls in flight and who hears of it. What was in
flight behind a call that ends badly goes back to the queue (`flights`), and `dispatch` sends it to
another worker.

Guarantees: a worker's death fails the call that it had begun, and what it had not begun goes to
another one, to three in all; a cancelled or late call has its worker killed, and no other call is
lost with it.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable

from whitepool_mp.client.durations import BULK_SECONDS, CALL_SECONDS
from whitepool_mp.client.engine_lease import LOST, EngineChannel, EngineLease
from whitepool_mp.client.flights import Flights
from whitepool_mp.client.member import worker_died
from whitepool_mp.client.tasks import MAX_DEATHS, Sink, Task
from whitepool_mp.errors import CallTimeout, WhitepoolError
from whitepool_mp.wire import frames, messages, signals


class Endings(Flights):
    """What ends calls, and who is told of it: see the module's text."""

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
                self._durations.learn(task.known_as, seconds)
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
            self._durations.learn(task.known_as, message.token / count * 1e-9 + BULK_SECONDS)
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
            if task.buffers:
                task.let_go()
        if not lease.tasks:
            self._freed(lease)
            return
        lease.since = time.monotonic()
        if lease.tasks[0].timeout is not None:
            self._engine.set_deadline(lease)
        if lease.keep and not (lease.manual or self.draining):
            lease.stuck = False
            self._roomy[lease] = None

    # --- without an answer ----------------------------------------------------------------

    def lost(self, lease: EngineLease) -> None:
        """A worker is gone: find out why for the call it had begun, move the others on."""
        channel = lease.channel
        tasks = self._withdraw(lease)
        lease.ended = LOST
        self._forget(lease)
        began, died = False, True
        if tasks and channel is not None:
            began = channel.began(lease.id, tasks[0].next_number)
            died = not channel.page.is_recalled(lease.id)  # else it may have stopped in order
        self._engine.drop(lease)
        if not tasks:
            self._engine.say_destroyed(lease, "its channel broke")
            return
        task = tasks[0]
        if not began:
            task.deaths += died
            if task.deaths < MAX_DEATHS and not lease.manual:
                # If it is dead the manager knows nothing of this lease any more.
                self._engine.say_destroyed(lease, "its channel broke")
                self._requeue(tasks)
                return
        index = task.first + task.at
        task.at += 1
        task.deaths = 0
        task.let_go()
        self.running += 1  # until its end is known
        name = task.name

        def told(answer: object) -> None:
            self.running -= 1
            if isinstance(answer, WhitepoolError):
                self.unserved += 1
                task.sink.failed(task, index, copy.copy(answer))
                return
            member = self._engine.member()
            pool = member.name if member is not None else ""
            assert answer is None or isinstance(answer, dict)
            error = worker_died(pool, lease.slot, lease.pid, name, began, answer)
            draining = member is not None and member.draining
            if draining or error.reason == frames.TERMINATED:
                self.unserved += signals.was_killed(error.exitcode)
            task.sink.failed(task, index, error)

        self._engine.ask_why(lease, told)
        self._requeue(tasks)

    def late(self, lease: EngineLease) -> None:
        """The first call in flight is over its time."""
        task = lease.tasks[0]
        number = task.next_number
        if self._is_refused(lease):
            return
        self._take_back(lease)
        if lease.channel is not None:
            self._engine.hear_all(lease.channel)
        if not lease.tasks or lease.tasks[0] is not task or task.next_number != number:
            return  # its answer had come, or it had not begun
        tasks = self._withdraw(lease)
        self.destroy(lease, f"a call took longer than {task.timeout:g} s")
        index = task.first + task.at
        task.at += 1
        task.let_go()
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
            task.let_go()
            self._unwanted += 1
            if self._unwanted * 2 > len(self._pending):
                self._drop_unwanted()
            return
        if task in lease.tasks and not lease.manual:
            self._take_back(lease)
            if lease.channel is not None:
                self._engine.hear_all(lease.channel)
        self._unwanted += task.runner is None  # it is queued again
        if lease.tasks and lease.tasks[0] is task:
            tasks = self._withdraw(lease)
            task.let_go()
            self.destroy(lease, "its call was cancelled")
            self._requeue(tasks[1:])

    def _drop_unwanted(self) -> None:
        """Take what was cancelled off the queue."""
        self._unwanted = 0
        self._pending = deque(task for task in self._pending if not task.cancelled)

    def recant(self, task: Task, recanted: Callable[[], None]) -> None:
        """Nobody wants a task of one call any more, unless it has begun.

        Args:
            task: one that was sent to a worker, which may be taken back, ended or dead by now.
            recanted: told that the task has not begun and never will; its sink is not.
        """
        lease: EngineLease | None = task.runner
        if lease is not None and task in lease.tasks:
            self._take_back(lease)
            if lease.channel is not None:
                self._engine.hear_all(lease.channel)  # if it died this one may be queued again
        if task.runner is None and task.left and not task.cancelled:
            self.cancel(task)
            recanted()

    def take_out(self, sink: Sink, running: bool) -> list[Task]:
        """Take back what has not begun of all that a sink waits for.

        Args:
            sink: it hears of none of these calls, unless they are submitted again.
            running: whether to take calls that have begun as well, and kill their workers.

        Returns:
            The tasks, or what is left of them.
        """
        for lease in list(self._leases.values()):
            if any(task.sink is sink for task in lease.tasks):
                self._take_back(lease)
        taken = [task for task in self._pending if task.sink is sink]
        self._pending = deque(task for task in self._pending if task.sink is not sink)
        for lease in list(self._leases.values()) if running else ():
            if lease.tasks and lease.tasks[0].sink is sink:
                task = lease.tasks[0]
                self.cancel(task)
                taken.append(task)
        return taken

    def destroy(self, lease: EngineLease, reason: str) -> None:
        """Have a leased worker killed and replaced; a call running on it is the caller's to end."""
        if lease.ended is None:
            lease.ended = f"destroyed ({reason})"
            self._forget(lease)
            self._engine.drop(lease)
            self._engine.say_destroyed(lease, reason)

    def give_up(self, lease: EngineLease, error: Exception) -> None:
        """This process has no room for a channel: its tasks fail for it, the worker goes back."""
        tasks = self._withdraw(lease)
        if not lease.manual:
            self._check_in(lease)
        for task in tasks:
            self.fail_all(task, error)

    # --- all of them ----------------------------------------------------------------------

    def break_all(self, error: WhitepoolError, leases: list[EngineLease]) -> None:
        """The manager is gone, and the workers with it: everything ends."""
        for lease in {*leases, *self._leases.values()}:
            lease.ended = "lost (the manager is gone)"
            for task in self._withdraw(lease):
                self.lose(task, error)
        self._leases.clear()
        self.free.clear()
        self.passing.clear()
        self._roomy.clear()
        self._stacked.clear()
        self._long.clear()
        self._unkept.clear()
        while self._pending:
            self.lose(self._pending.popleft(), error)

    def _fail_pending(self, error: BaseException) -> None:
        while self._pending:
            self.fail_all(self._pending.popleft(), error)

    def lose(self, task: Task, error: BaseException) -> None:
        """A task was accepted, and the pool has ended."""
        if not task.cancelled:
            self.unserved += task.left
        self.fail_all(task, error)

    def fail_all(self, task: Task, error: BaseException) -> None:
        """No call of a task will be answered.

        Each gets an exception of its own: one that is raised in several places collects the
        tracebacks of all.
        """
        task.let_go()
        while task.left:
            index = task.first + task.at
            task.at += 1
            task.sink.failed(task, index, copy.copy(error))
