"""The future of `submit`."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.answers import open_answer
from whitepool_mp.client.tasks import Task
from whitepool_mp.wire.messages import Message

if TYPE_CHECKING:
    from whitepool_mp.client.member import Member
    from whitepool_mp.client.threaded import Threaded

_making = threading.RLock()  # code that runs at any moment may look at a future
"""Held for the moment in which a future's condition is made, or found not to be there."""


class JobFuture(Future[Any]):
    """A `concurrent.futures.Future` whose `cancel` also ends a job that is running.

    Cancelling a running job kills its worker, which is replaced; the future ends cancelled. Only a
    job that has ended cannot be cancelled.

    Its condition, half of what a future costs, is made when somebody first needs it: nobody does if
    the job has ended before its result is asked for.
    """

    def __init__(self, member: Member, name: str, threaded: Threaded) -> None:
        # All that the base class sets, but for the condition (a property here).
        self._condition_made: threading.Condition | None = None
        self._state = "PENDING"
        self._result = None
        self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []
        self._pool_member: Member | None = member  # a job under way keeps its pool alive
        self._name = name
        self._pool_name = member.name
        self._threaded = threaded
        self._task: Task | None = None

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        made = self._condition_made
        if made is None:
            new = threading.Condition()
            with _making:
                made = self._condition_made
                if made is None:
                    made = self._condition_made = new
        return made

    def done(self) -> bool:
        """Whether the job has ended or was cancelled."""
        return self._state in ("FINISHED", "CANCELLED", "CANCELLED_AND_NOTIFIED")

    def result(self, timeout: float | None = None) -> Any:
        """What the call returned, when it has; as `concurrent.futures.Future.result`."""
        if self._state == "FINISHED" and self._exception is None:
            return self._result
        try:
            value = super().result(timeout)
            if self._exception is not None:  # one that is false, which older Pythons overlook
                raise self._exception
            return value
        finally:
            self = None  # type: ignore[assignment]  # or it and what it raises keep each other

    def cancel(self, running: bool = True) -> bool:
        """Cancel the job, running or not.

        Args:
            running: whether to do so if it is running. If not, one that was sent to a worker and
                has not begun is taken back, and cancelled a moment later.

        Returns:
            Whether the future is cancelled now; False if the job has ended.
        """
        with self._condition:
            if self._state in ("CANCELLED", "CANCELLED_AND_NOTIFIED"):
                return True
            sent = self._state == "RUNNING" and not running
            if self._state == "FINISHED":
                return False
            task = self._task if sent else self._end_cancelled()
        if sent:
            if task is not None:
                self._threaded.recant(task, self._recanted)
            return False
        if task is not None:
            self._threaded.cancel(task)
        self._invoke_callbacks()
        return True

    def _end_cancelled(self) -> Task | None:
        """It is cancelled, and whoever waits is told; its task. (With the condition held.)"""
        self._state = "CANCELLED"
        self._condition.notify_all()
        # Tells wait() and as_completed() as well.
        self.set_running_or_notify_cancel()
        return self._let_go()

    def _recanted(self) -> None:
        """The engine has taken the job back, which had not begun."""
        with self._condition:
            if self._state != "RUNNING":
                return  # cancelled meanwhile in the other way
            self._end_cancelled()
        self._invoke_callbacks()

    # Sink

    def began(self, task: Task) -> bool:
        with _making:
            if self._condition_made is None:  # so nobody can cancel it just now
                self._state = "RUNNING"
                return True
        with self._condition:
            if self._state == "PENDING":
                self._state = "RUNNING"
            return self._state == "RUNNING"

    def answered(self, task: Task, index: int, message: Message) -> None:
        returned, value = open_answer(message, self._name, 0, self._pool_name)
        self._task = self._pool_member = None
        if returned:
            with _making:
                if self._condition_made is None:  # so nobody waits, listens or has cancelled it
                    self._result = value
                    self._state = "FINISHED"
                    return
        self._settle(returned, value)

    def returned(
        self, task: Task, index: int, count: int, skip: int, seconds: float, results: bytes
    ) -> None:
        raise AssertionError("a single call is not part of a bulk")

    def failed(self, task: Task, index: int, error: BaseException) -> None:
        self._task = self._pool_member = None
        self._settle(False, error)

    def _invoke_callbacks(self) -> None:
        callbacks, self._done_callbacks = self._done_callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except BaseException as error:
                # An exit is not this thread's, on which every other future depends.
                if not (isinstance(error, Exception) or self._threaded.inside()):
                    raise
                logging.getLogger("concurrent.futures").exception(
                    "exception calling callback for %r", self
                )

    def _let_go(self) -> Task | None:
        """Keep neither the pool nor the arguments alive as long as somebody keeps the future."""
        task, self._task, self._pool_member = self._task, None, None
        return task

    def _settle(self, returned: bool, value: Any) -> None:
        try:
            if returned:
                self.set_result(value)
            else:
                self.set_exception(value)
        except InvalidStateError:
            return  # cancelled while its answer was on the way


def _after_fork_in_child() -> None:
    global _making
    _making = threading.RLock()  # its holder may have stayed in the parent


os.register_at_fork(after_in_child=_after_fork_in_child)
