"""One checked-out worker: call it, give it back."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.answers import open_answer
from whitepool_mp.client.hold import FORGOTTEN, Hold
from whitepool_mp.client.joining import LinkBroken, TimedOut
from whitepool_mp.client.link import ChannelBroken
from whitepool_mp.client.member import Member, worker_died
from whitepool_mp.config import check_timeout
from whitepool_mp.errors import CallTimeout, LeaseError, WhitepoolError
from whitepool_mp.proxy import Proxy
from whitepool_mp.wire import messages, passed, payload

if TYPE_CHECKING:
    from typing_extensions import Self


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

    def __init__(self, member: Member, hold: Hold) -> None:
        self.id = hold.id
        self.pid = hold.pid
        self.slot = hold.slot
        self.name = member.name
        self._member = member
        self._hold = hold
        self._busy = threading.Lock()
        self._references = False
        self._siblings = member.leases_here()
        self._siblings[self.id] = weakref.ref(self)

    def __repr__(self) -> str:
        state = "valid" if self.valid else self._hold.ended or "of another process"
        return f"<Lease {self.id} of {self.name!r} slot={self.slot} pid={self.pid} {state}>"

    @property
    def valid(self) -> bool:
        """Whether it may be used: not given back, its worker not known to be dead, not forked."""
        return self._hold.ended is None and self._hold.process == os.getpid()

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
            OSError: this process has no descriptor left for a way to the worker; the lease goes on.
        """
        seconds = check_timeout("timeout", timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        flags = messages.WITH_RESOURCE if self._member.has_factory else 0
        data, buffers, _ = payload.dump_job(fn, args, kwargs)
        return self._exchange(messages.CALL, flags, data, buffers, deadline, seconds, fn)

    def _method(self, target: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data, buffers = payload.dump_method(target, name, args, kwargs)
        return self._exchange(messages.METHOD, 0, data, buffers, None, None, name)

    def _check(self) -> None:
        hold = self._hold
        if hold.process != os.getpid():
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} belongs to process {hold.process}, from "
                "which this one was forked: check out a worker of your own"
            )
        if hold.ended is not None:
            raise LeaseError(
                f"lease {self.id} of pool {self.name!r} was used after it was {hold.ended}: its "
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
            hold, member = self._hold, self._member
            try:
                message = hold.exchange(member, kind, flags, data, buffers, deadline)
            except (TimedOut, ChannelBroken, LinkBroken, LeaseError) as error:
                self._forget()
                raise broken_off(member, hold, error, what, seconds) from None
            except BaseException as error:
                if not unreached(hold, error):
                    self._forget()
                    hold.abandon("ended by an interrupt", "its call was interrupted")
                raise
            returned, value = open_answer(message, what, self.id, self.name)
            if not returned:
                raise value
            if message.kind == messages.RESULT and message.flags:
                self._references = True
                return Proxy(self, *value)
            return value
        finally:
            passed.let_go(buffers)
            self._busy.release()

    # --- giving it back -------------------------------------------------------------------

    def checkin(self) -> None:
        """Give the worker back. A worker with a call still running is replaced, not reused.

        If the worker is gone (it died, or was killed at a timeout) there is nothing to do.

        Raises:
            LeaseError: it was given back already, or is another process's.
        """
        if self._worker_gone():
            return
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

        Called from another thread while a call runs, it ends that call with a `LeaseError`. If the
        worker is gone already there is nothing to do.

        Raises:
            LeaseError: it was given back already, or is another process's.
        """
        if self._worker_gone():
            return
        self._check()
        if not self._busy.acquire(blocking=False):
            self._interrupt("its holder had it destroyed")
            return
        try:
            self._forget()
            self._hold.abandon("destroyed", "its holder had it destroyed", self._member)
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

    def _worker_gone(self) -> bool:
        """Whether the lease ended with its worker, so that there is nothing to give back."""
        hold = self._hold
        return hold.ended is not None and not hold.returned and hold.process == os.getpid()

    def _release(self, how: str) -> None:
        self._forget()
        hold = self._hold
        if self._references and hold.channel is not None:
            hold.channel.tell(messages.pack(messages.RELEASE, 0, 0, self.id, b""))
        hold.release(self._member, how)

    def _interrupt(self, reason: str) -> None:
        self._forget()
        self._hold.interrupt(reason)

    def _forget(self) -> None:
        self._siblings.pop(self.id, None)

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
        # One whose __init__ failed, or that a forked child holds a copy of, is nobody's to end; and
        # an end that was interrupted is told to the manager by the hold.
        if not hasattr(self, "_references") or self._hold.process != os.getpid():
            return
        if self._hold.ended is None:
            self._release(FORGOTTEN)
        elif self._hold.ended != FORGOTTEN:  # the two may be collected in either order
            return
        warnings.warn(
            f"lease {self.id} of pool {self.name!r} was never checked in; it is now",
            ResourceWarning,
            stacklevel=2,
            source=self,
        )


def unreached(hold: Hold, error: BaseException) -> bool:
    """Whether a call failed for want of a descriptor for the way to the worker, which then knows
    nothing of it."""
    return (
        isinstance(error, OSError)
        and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        and hold.channel is None
        and hold.ended is None
    )


def broken_off(
    member: Member, hold: Hold, error: Exception, what: Any, seconds: float | None
) -> WhitepoolError:
    """The error of a call whose exchange failed; its hold is over.

    Args:
        member, hold: whose worker it was.
        error: why there was no answer.
        what: the function or the name of the method that was called.
        seconds: how long it was allowed to take.
    """
    name, title = payload.named(what), f"pool {member.name!r}"
    if isinstance(error, TimedOut):
        hold.abandon("ended by a timeout", f"a call took longer than {seconds:g} s")
        return CallTimeout(
            f"{name} took longer than {seconds:g} s in worker {hold.slot} of {title} (pid "
            f"{hold.pid}); the worker was killed and is being replaced"
        )
    if hold.ended is not None:
        hold.drop_channel()
        return LeaseError(f"lease {hold.id} of {title} {hold.ended} under the call of {name}")
    started = hold.began()
    told = hold.autopsy(member)
    if isinstance(told, WhitepoolError):
        return told
    return worker_died(member.name, hold.slot, hold.pid, name, started, told)
