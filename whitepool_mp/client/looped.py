"""The asyncio driver of an engine: no thread, the event loop waits for everything.

event loop --add_reader(epoll), call_later(next deadline)--> Looped --pump--> Engine
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator
from typing import Any

from whitepool_mp.client.answers import open_answer
from whitepool_mp.client.engine import Engine
from whitepool_mp.client.joining import LinkBroken
from whitepool_mp.client.member import Member
from whitepool_mp.client.tasks import Task
from whitepool_mp.wire.messages import Message


class Looped:
    """An engine in an event loop."""

    def __init__(self, member: Member, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        try:
            self.engine = Engine(*member.joining(), weakref.ref(member))
        except LinkBroken:
            raise member.gone() from None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._idle: list[asyncio.Future[None]] = []
        self.closed = False
        loop.add_reader(self.engine.fileno(), self.pump)
        # Begun, so that the loop knows of it, and ends it when it ends itself.
        self._end = self._until_the_end()
        with contextlib.suppress(StopIteration):
            self._end.asend(None).send(None)

    async def _until_the_end(self) -> AsyncGenerator[None, None]:
        """What the event loop closes when it ends (`loop.shutdown_asyncgens`, which `asyncio.run`
        calls): nobody would drive the engine any more, and workers that it holds would wait for it.
        """
        try:
            yield
        finally:
            self._leave()

    def pump(self) -> None:
        """Something is ready or due."""
        self.engine.pump(0)
        self.settle()

    def _on_time(self) -> None:
        self._timer = None
        self.pump()

    def settle(self) -> None:
        """After anything was asked of the engine: send it, and wake up when it is next due."""
        if self.closed:
            return
        self.engine.flush()
        due = self.engine.next_deadline()
        if due is not None and (self._timer is None or due < self._due):
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self.loop.call_later(max(0.0, due - time.monotonic()), self._on_time)
        if self._idle and self.engine.idle:
            waiting, self._idle = self._idle, []
            for future in waiting:
                resolve(future, None)

    async def wait_idle(self) -> None:
        """Wait until no job is queued or running."""
        if not self.engine.idle and not self.closed:
            future: asyncio.Future[None] = self.loop.create_future()
            self._idle.append(future)
            await future

    def close(self) -> None:
        """Leave the event loop; what has not ended fails."""
        if not self._detach():
            return
        self.engine.close()
        for future in self._idle:
            resolve(future, None)

    def _leave(self) -> None:
        """The event loop ends, and nobody waits for anything any more: let go of all workers."""
        if self._detach():
            self.engine.give_back()
            self.engine.discard()

    def _detach(self) -> bool:
        """Have the loop call no more; whether it still did."""
        if self.closed:
            return False
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        if not self.loop.is_closed():
            self.loop.remove_reader(self.engine.fileno())
        return True


def resolve(future: asyncio.Future[Any], value: Any) -> None:
    """Give a future its result or exception, unless it was cancelled."""
    if future.done():
        return
    if isinstance(value, BaseException):
        # asyncio refuses StopIteration in a future; a generator would too.
        if isinstance(value, StopIteration):
            wrapped = RuntimeError(f"the call raised {value!r}")
            wrapped.__cause__ = value
            value = wrapped
        future.set_exception(value)
    else:
        future.set_result(value)


class FutureSink:
    """Hears of one call on behalf of an asyncio future."""

    def __init__(self, future: asyncio.Future[Any], name: str, pool: str) -> None:
        self._future = future
        self._name = name
        self._pool = pool

    def began(self, task: Task) -> bool:
        return not self._future.done()

    def answered(self, task: Task, index: int, message: Message) -> None:
        returned, value = open_answer(message, self._name, 0, self._pool)
        if not self._future.done():
            if returned:
                self._future.set_result(value)
            else:
                resolve(self._future, value)

    def returned(
        self, task: Task, index: int, count: int, skip: int, seconds: float, results: bytes
    ) -> None:
        raise AssertionError("a single call is not part of a bulk")

    def failed(self, task: Task, index: int, error: BaseException) -> None:
        resolve(self._future, error)
