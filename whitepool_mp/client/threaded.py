"""The threaded driver of an engine: what `submit`, `map` and `run`s that queue run on outside an
event loop."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from whitepool_mp.client.address import Address
from whitepool_mp.client.engine import Engine
from whitepool_mp.client.future import JobFuture
from whitepool_mp.client.joining import LinkBroken
from whitepool_mp.client.member import Member
from whitepool_mp.client.tasks import Sink, Task
from whitepool_mp.errors import PoolClosed


def _look() -> None:
    """Nothing to do but to go round once."""


class Threaded:
    """An engine with a daemon thread that drives it.

    Args:
        address, key, token, member: as for the engine.
        what: what it is for, as its thread's name says.
    """

    def __init__(
        self,
        address: Address,
        key: bytes,
        token: bytes,
        member: weakref.ref[Member],
        what: str = "jobs",
    ) -> None:
        try:
            self.engine = Engine(address, key, token, member, in_turn=what == "runs")
        except LinkBroken:
            present = member()
            raise (present.gone() if present else PoolClosed("the pool was shut down")) from None
        self.stopped = False
        self._idle = threading.Condition()
        self._waiters = 0
        self._thread = threading.Thread(target=self._drive, name=f"whitepool-{what}", daemon=True)
        self._thread.start()
        owner = member()
        if owner is not None:
            weakref.finalize(owner, self.stop).atexit = False

    def _drive(self) -> None:
        engine = self.engine
        try:
            while not self.stopped and engine.broken is None:
                due = engine.next_deadline()
                engine.pump(-1 if due is None else max(0.0, due - time.monotonic()))
                if self._waiters and engine.idle:
                    with self._idle:
                        self._idle.notify_all()
        finally:
            self.stopped = True
            engine.close()
            with self._idle:
                self._idle.notify_all()

    def call(
        self,
        member: Member,
        name: str,
        flags: int,
        seconds: float | None,
        data: bytes,
        buffers: Sequence[Any],
        site: str,
    ) -> JobFuture:
        """Queue a call; its future."""
        future = JobFuture(member, name, self)
        future._task = task = Task(name, future, flags, seconds, data, buffers, site=site)
        self.submit(task)
        return future

    def submit(self, task: Task) -> None:
        """Queue a task."""
        if self.stopped:
            raise PoolClosed("the pool was shut down")
        self.engine.put(task)

    def cancel(self, task: Task) -> None:
        """Give a task up."""
        self.engine.post(self.engine.cancel, task)

    def recant(self, task: Task, recanted: Callable[[], None]) -> None:
        """Give a task of one call up if it has not begun, and say so then."""
        self.engine.post(self.engine.recant, task, recanted)

    def take_out(self, sink: Sink, taken: Callable[[list[Task]], None], running: bool) -> None:
        """Have back what a sink waits for; unless `running`, what has not begun; `taken` gets it
        soon."""
        self.engine.post(self.engine.take_out, sink, taken, running)

    def inside(self) -> bool:
        """Whether the calling code runs in the engine's thread (a future's callback)."""
        return threading.current_thread() is self._thread

    def wait_idle(self, deadline: float | None = None) -> bool:
        """Wait until no job is queued or running; whether that came to be."""
        with self._idle:
            self._waiters += 1
            try:
                while not self.stopped and not self.engine.idle:
                    self.engine.post(_look)  # it looks at the waiters after each round
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        return False
                    self._idle.wait(left)
                return True
            finally:
                self._waiters -= 1

    def stop(self) -> None:
        """End the thread; what has not ended fails with `PoolClosed`."""
        self.stopped = True
        self.engine.post(_look)
        self.join()

    def join(self) -> None:
        """Wait for the end of the thread, which was told to end (unless it is that which asks)."""
        if not self.inside() and self._thread.is_alive():
            self._thread.join()

    def forked(self) -> None:
        """In a forked child, where the thread is not."""
        self.stopped = True
