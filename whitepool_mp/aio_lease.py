"""One checked-out worker, for code in an event loop."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable
from typing import Any

from whitepool_mp.client.answers import Reference
from whitepool_mp.client.engine_lease import LOST, RETURNED, EngineLease
from whitepool_mp.client.looped import FutureSink, Looped
from whitepool_mp.client.member import Member
from whitepool_mp.client.tasks import Task
from whitepool_mp.config import check_timeout
from whitepool_mp.errors import LeaseError, WorkerDied
from whitepool_mp.proxy import Proxy
from whitepool_mp.wire import messages, payload


class AsyncLease:
    """One checked-out worker, for code in an event loop; as `Lease`.

    Attributes:
        id, pid, slot, name: as of `Lease`.
    """

    def __init__(self, member: Member, driver: Looped, lease: EngineLease) -> None:
        self.id = lease.id
        self.pid = lease.pid
        self.slot = lease.slot
        self.name = member.name
        self._member = member
        self._driver = driver
        self._lease = lease
        self._process = os.getpid()
        self._references = False

    def __repr__(self) -> str:
        state = "valid" if self.valid else self._lease.ended or "of another process"
        return f"<AsyncLease {self.id} of {self.name!r} slot={self.slot} pid={self.pid} {state}>"

    @property
    def valid(self) -> bool:
        """Whether it may be used."""
        return self._lease.ended is None and self._process == os.getpid()

    def _check(self) -> None:
        if self._lease.ended == LOST:
            raise WorkerDied(pool=self.name, pid=self.pid, slot=self.slot, started=False)
        if not self.valid:
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} was used after it was "
                f"{self._lease.ended or 'forked'}: check out another"
            )

    def get(self) -> Any:
        """A proxy of the worker's resource, whose methods are awaited; as `Lease.get`."""
        self._check()
        self._member.require_factory()
        return Proxy(self, 0, "resource")

    async def call(
        self, fn: Callable[..., Any], /, *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> Any:
        """Run `fn(resource, *args, **kwargs)` in the worker; as `Lease.call`."""
        seconds = check_timeout("timeout", timeout)
        flags = messages.WITH_RESOURCE if self._member.has_factory else 0
        data, buffers, name = payload.dump_job(fn, args, kwargs)
        return await self._send(messages.CALL, flags, data, buffers, name, seconds)

    async def _method(
        self, target: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        data, buffers = payload.dump_method(target, name, args, kwargs)
        return await self._send(messages.METHOD, 0, data, buffers, name, None)

    async def _send(
        self, kind: int, flags: int, data: bytes, buffers: Any, name: str, seconds: float | None
    ) -> Any:
        self._check()
        if self._lease.task is not None:
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} is in use by a call of another task: a "
                "worker does one thing at a time, so check out one for each task"
            )
        driver = self._driver
        future: asyncio.Future[Any] = driver.loop.create_future()
        sink = FutureSink(future, name, self.name)
        task = Task(name, sink, flags, seconds, data, buffers, kind=kind)
        driver.engine.start(task, self._lease)
        driver.settle()
        try:
            value = await future
        except asyncio.CancelledError:
            driver.engine.cancel(task)
            driver.settle()
            raise
        if isinstance(value, Reference):
            self._references = True
            return Proxy(self, *value)
        return value

    async def checkin(self) -> None:
        """Give the worker back. A worker with a call still running is replaced, not reused.

        If the worker is gone (it died, or was killed at a timeout) there is nothing to do.

        Raises:
            LeaseError: it was given back already.
        """
        if self._worker_gone():
            return
        self._check()
        if self._lease.task is not None:
            await self.destroy()
            return
        channel = self._lease.channel
        if self._references and channel is not None:
            channel.tell(messages.pack(messages.RELEASE, 0, 0, self.id, b""))
        self._driver.engine.checkin(self._lease)
        self._driver.settle()

    async def destroy(self) -> None:
        """Have the worker killed and replaced; a call still running ends with `LeaseError`.

        If the worker is gone already there is nothing to do.

        Raises:
            LeaseError: it was given back already.
        """
        if self._worker_gone():
            return
        self._check()
        task = self._lease.task
        if task is not None:
            self._driver.engine.cancel(task)
            error = LeaseError(f"lease {self.id} of pool {self.name!r} ended under a running call")
            task.sink.failed(task, 0, error)
        else:
            self._driver.engine.destroy(self._lease, "its holder had it destroyed")
        self._driver.settle()

    def _worker_gone(self) -> bool:
        """Whether the lease ended with its worker, so that there is nothing to give back."""
        ended = self._lease.ended
        return ended is not None and ended != RETURNED and self._process == os.getpid()

    def __del__(self) -> None:
        lease = getattr(self, "_lease", None)
        if lease is None or lease.ended is not None or self._process != os.getpid():
            return
        if self._driver.closed:
            return  # its connection is closed, and the manager has taken the worker back
        warnings.warn(
            f"lease {self.id} of pool {self.name!r} was never checked in; it is now",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )
        self._driver.engine.post(self._driver.engine.checkin, lease)
