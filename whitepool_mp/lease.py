"""One checked-out worker: call it, give it back."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.answers import Reference, open_answer
from whitepool_mp.client.channel import Channel, ChannelBroken
from whitepool_mp.client.link import Link, LinkBroken, TimedOut
from whitepool_mp.client.member import Member, worker_died
from whitepool_mp.config import check_timeout
from whitepool_mp.errors import CallTimeout, LeaseError, WhitepoolError
from whitepool_mp.proxy import Proxy
from whitepool_mp.wire import frames, messages, payload

if TYPE_CHECKING:
    from typing_extensions import Self

_WHY_SECONDS = 10.0


class Lease:
    """A worker that is yours until you check it in.

    Got from `Session.checkout`, used as a context manager or given back by `checkin`. A lease that
    is forgotten is checked in when it is collected, with a `ResourceWarning`.

    Attributes:
        id: the lease's number; it only grows, and a worker refuses calls under an older one.
        pid: the worker's process id.
        slot: the worker's slot, 0 to pool_size + max_overflow - 1.
        name: the pool's name.
    """

    def __init__(self, member: Member, link: Link, grant: frames.Grant) -> None:
        self.id = grant.lease
        self.pid = grant.pid
        self.slot = grant.slot
        self.name = member.name
        self._worker = grant.worker
        self._member = member
        self._link = link
        self._channel: Channel | None = None
        self._number = 0
        self._ended: str | None = None
        self._busy = threading.Lock()
        self._process = os.getpid()
        self._references = False
        link.leases[self.id] = weakref.ref(self)
        self._told = False  # whether the manager knows that it has ended

    def __repr__(self) -> str:
        state = "valid" if self.valid else self._ended or "of another process"
        return f"<Lease {self.id} of {self.name!r} slot={self.slot} pid={self.pid} {state}>"

    @property
    def valid(self) -> bool:
        """Whether it may be used: not given back, its worker not known to be dead, not forked."""
        return self._ended is None and self._process == os.getpid()

    # --- using it -------------------------------------------------------------------------

    def get(self) -> Any:
        """A proxy of the worker's resource: its methods run in the worker.

        A result that cannot be pickled (a cursor) stays in the worker, and you get a proxy of it,
        good until the lease ends.

        Raises:
            LeaseError: the lease has ended, or the pool has no factory.
        """
        self._check()
        self._member.require_factory()
        return Proxy(self, 0, "resource")

    def call(
        self, fn: Callable[..., Any], /, *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> Any:
        """Run `fn(resource, *args, **kwargs)` in the worker; `fn(*args, **kwargs)` if no factory.

        Args:
            fn: any function; one that lives in no importable module travels by value.
            args: its arguments after the resource.
            timeout: at most how many seconds; None for no limit. The worker of a call that takes
                longer is killed and replaced.
            kwargs: its keyword arguments (but `timeout`: bind that one with `functools.partial`).

        Returns:
            What `fn` returned.

        Raises:
            Exception: what `fn` raised, in its own type, with the remote traceback as its cause.
            CallTimeout: it took too long; the lease has ended.
            WorkerDied: the worker died; the lease has ended.
            SerializationError: something cannot be pickled or unpickled; the lease goes on.
            LeaseError: the lease has ended, or another thread's call is running on it.
        """
        seconds = check_timeout("timeout", timeout)
        data, buffers = payload.dump_call(fn, args, kwargs)
        flags = messages.WITH_RESOURCE if self._member.has_factory else 0
        deadline = None if seconds is None else time.monotonic() + seconds
        return self._exchange(messages.CALL, flags, data, buffers, deadline, seconds, fn)

    def _method(self, target: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data, buffers = payload.dump_method(target, name, args, kwargs)
        return self._exchange(messages.METHOD, 0, data, buffers, None, None, name)

    def _check(self) -> None:
        if self._process != os.getpid():
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} belongs to process {self._process}, from "
                "which this one was forked: check out a worker of your own"
            )
        if self._ended is not None:
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} was used after it was {self._ended}: its "
                "worker may serve somebody else by now; check out another"
            )

    def _exchange(
        self,
        kind: int,
        flags: int,
        data: bytes,
        buffers: Any,
        deadline: float | None,
        seconds: float | None,
        what: Any,
    ) -> Any:
        if not self._busy.acquire(blocking=False):
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} is in use by a call of another thread: "
                "a worker does one thing at a time, so check out one for each thread"
            )
        try:
            self._check()
            self._number = number = self._number + 1
            try:
                channel = self._channel
                if channel is None:
                    channel = self._channel = self._member.channel(self._worker, self.id, deadline)
                pieces = messages.pack(kind, flags, number, self.id, data, buffers)
                message = channel.exchange(pieces, deadline)
                while message.number != number:
                    raise ChannelBroken
            except TimedOut:
                self._abandon("ended by a timeout", f"a call took longer than {seconds:g} s")
                raise CallTimeout(
                    f"{_name(what)} took longer than {seconds:g} s in worker {self.slot} of pool "
                    f"{self.name!r} (pid {self.pid}); the worker was killed and is being replaced"
                ) from None
            except (ChannelBroken, LinkBroken, LeaseError):
                raise self._died(number, what) from None
            except BaseException:
                self._abandon("ended by an interrupt", "its call was interrupted")
                raise
            returned, value = open_answer(message, _name(what), self.id, self.name)
            if not returned:
                raise value
            if isinstance(value, Reference):
                self._references = True
                return Proxy(self, *value)
            return value
        finally:
            self._busy.release()

    # --- giving it back -------------------------------------------------------------------

    def checkin(self) -> None:
        """Give the worker back. A worker with a call still running is replaced, not reused.

        Raises:
            LeaseError: it was given back already, or is another process's.
        """
        self._check()
        if not self._busy.acquire(blocking=False):
            self._interrupt("it was checked in while a call was running")
            return
        try:
            self._release("checked in")
        finally:
            self._busy.release()

    def destroy(self) -> None:
        """Have the worker killed and replaced: its resource is broken.

        Called from another thread while a call runs, it ends that call with a `LeaseError`.

        Raises:
            LeaseError: it was given back already, or is another process's.
        """
        self._check()
        if not self._busy.acquire(blocking=False):
            self._interrupt("its holder had it destroyed")
            return
        try:
            self._abandon("destroyed", "its holder had it destroyed")
        finally:
            self._busy.release()

    def forget(self) -> bool:
        """Check in unless it has ended or a call is running; whether that was done."""
        if not self.valid or not self._busy.acquire(blocking=False):
            return False
        try:
            self._release("checked in at the end of the pool")
        finally:
            self._busy.release()
        return True

    def _release(self, how: str) -> None:
        self._end(how)
        channel = self._channel
        if channel is not None:
            if self._references:
                channel.tell(messages.pack(messages.RELEASE, 0, 0, self.id, b""))
            channel.in_use = False
            self._channel = None
        self._tell_manager(frames.checkin(self.id))
        self._told = True

    def _abandon(self, ended: str, reason: str) -> None:
        """Have the worker killed; the lease and its channel are over."""
        self._end(ended)
        self._channel = None
        self._tell_manager(frames.destroy(self.id, reason))
        self._told = True
        self._member.drop_channel(self._worker)

    def _interrupt(self, reason: str) -> None:
        """Have the worker killed under another thread's call, which finds its channel ended."""
        self._end(f"ended ({reason})")
        self._tell_manager(frames.destroy(self.id, reason))
        self._told = True
        channel = self._channel
        if channel is not None:
            channel.hang_up()

    def _end(self, how: str) -> None:
        self._ended = how
        self._link.leases.pop(self.id, None)

    def _tell_manager(self, data: bytes) -> None:
        try:
            self._link.send(data)
        except LinkBroken:
            return  # the manager is gone, and every worker with it

    def _died(self, number: int, what: Any) -> WhitepoolError:
        """Find out how the worker ended; the lease is over."""
        channel, self._channel = self._channel, None
        started = channel is not None and channel.began(self.id, number)
        self._member.drop_channel(self._worker)
        if self._ended is not None:
            return LeaseError(
                f"lease {self.id} of pool {self.name!r} {self._ended} under the call of "
                f"{_name(what)}"
            )
        self._end("lost (its worker died)")
        self._told = True
        try:
            deadline = time.monotonic() + _WHY_SECONDS
            told = self._member.link(deadline).why(self.id, deadline)
        except (LinkBroken, WhitepoolError):
            return self._member.gone()
        except TimedOut:
            told = None
            self._tell_manager(frames.destroy(self.id, "its channel broke"))
        return worker_died(self.name, self.slot, self.pid, _name(what), started, told)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.valid:
            self.checkin()

    def __del__(self) -> None:
        # A lease whose __init__ failed, or that a forked child holds a copy of, is nobody's to end.
        if getattr(self, "_told", True) or self._process != os.getpid():
            return
        if self._ended is not None:
            self._abandon(self._ended, "its end was interrupted")
            return
        self._release("forgotten, and so checked in")
        warnings.warn(
            f"lease {self.id} of pool {self.name!r} was never checked in; it is now",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )


def _name(what: Any) -> str:
    return what if isinstance(what, str) else payload.qualified_name(what)
