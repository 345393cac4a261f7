"""A process's membership of a pool: what all its sessions, leases and threads share.

    Session, Lease, ... --> Member --has--> a Link for each thread that asks the manager (`Links`)
                                   --has--> a Channel for each worker met
                                   --has--> a Hold of each worker kept between calls of `run`
                                   --may have--> an Engine (submit, map), one more (runs that
                                                 queue: `run_queue`) and, in the owner, an Owner

A channel belongs to the process, not to a thread: a lease is exclusive, so whoever holds it has the
worker's channel to themselves, and 500 threads need no 500 channels to every worker.

After `os.fork` the child closes its copies of everything and joins anew when it first needs to: the
parent's end-of-file still comes, and no byte of the parent's is read by the child.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from whitepool_mp.client.address import Address
from whitepool_mp.client.channel import Channel
from whitepool_mp.client.joining import LinkBroken, TimedOut, dial
from whitepool_mp.client.link import Link
from whitepool_mp.client.links import Links
from whitepool_mp.errors import (
    CheckoutTimeout,
    FactoryFailed,
    LeaseError,
    ManagerDied,
    PoolClosed,
    PoolFull,
    ProtocolError,
    WhitepoolError,
    WorkerDied,
    headline,
)
from whitepool_mp.wire import frames, payload, rooms

if TYPE_CHECKING:
    from whitepool_mp.client.hold import Hold
    from whitepool_mp.client.owner import Owner
    from whitepool_mp.client.threaded import Threaded


class Leased(Protocol):
    """A lease of either form."""

    id: int
    name: str
    _member: Member


class Forgettable(Protocol):
    """A lease of blocking code, which may be forgotten."""

    id: int

    def forget(self) -> bool: ...


L = TypeVar("L", bound=Leased)

Ticket = tuple[str, str, Address, bytes, bool, int]
"""What makes a session in another process: pool id, name, address, key, has a factory, capacity."""

_members: weakref.WeakValueDictionary[str, Member] = weakref.WeakValueDictionary()
_everyone: weakref.WeakSet[Member] = weakref.WeakSet()


class Member:
    """This process's part in one pool.

    Args:
        ticket: where the pool is and how to join.
        owner: in the process that made the pool, its manager.
    """

    def __init__(self, ticket: Ticket, owner: Owner | None = None) -> None:
        self.ticket = ticket
        self.pool_id, self.name, self._address, self._key, self.has_factory, self.capacity = ticket
        self.path = self._address.path
        self.owner = owner
        self.closed = False
        self.draining = False
        self.terminated = False  # from here: a shutdown need not tell what was lost by that
        self._reset()
        if owner is not None:
            self._end = weakref.finalize(self, _collected, owner, self.name)
            self._end.atexit = False
        _members[self.pool_id] = self
        _everyone.add(self)

    @classmethod
    def join(cls, ticket: Ticket) -> Member:
        """The member that this process already is, or a new one."""
        return _members.get(ticket[0]) or cls(ticket)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # of a lease that is collected in the midst of it
        self._token = os.urandom(frames.MEMBER_BYTES)
        self._local = threading.local()
        self._links = Links()
        self._channels: dict[int, Channel] = {}  # those that no lease uses, by worker
        self._opened: weakref.WeakSet[Channel] = weakref.WeakSet()
        self._engines: dict[str, Threaded] = {}
        # The threads that ask for a worker to keep (`run_queue`).
        self.asking: set[int] = set()
        self.ending: threading.Thread | None = None  # shuts the pool down, for a callback of a job
        # Whoever runs a job takes the one used last, or asks the manager; both ends are atomic.
        self.kept: list[Hold] = []

    # --- links ----------------------------------------------------------------------------

    def link(self, deadline: float | None = None) -> contextlib.AbstractContextManager[Link]:
        """A control connection, the calling thread's for as long as the block runs.

        Args:
            deadline: until when to try to connect, on the monotonic clock; None for as long as the
                manager lives.

        Raises:
            TimedOut: the manager did not answer in time.
            PoolClosed: the pool was shut down.
            ManagerDied: its manager is gone.
            OSError: this process has no descriptor left for one.
        """
        return self._links.use(self._connect, deadline)

    def _connect(self, deadline: float | None) -> Link:
        if self.closed:
            raise self.gone()
        try:
            return Link(*self.joining(), deadline)
        except LinkBroken:
            raise self.gone() from None

    def make_sure(self, link: Link) -> None:
        """Wait until the manager has heard what was said on a link, if no thread uses it. (One that
        does says all of it again, should that manager die.)"""
        with self._links.use_again(link) as idle:
            if idle:
                with contextlib.suppress(LinkBroken, TimedOut):
                    link.ping(time.monotonic() + 1.0)

    def leases_here(self) -> dict[int, weakref.ref[Forgettable]]:
        """The leases that this thread has checked out and that have not ended, by number."""
        found: dict[int, weakref.ref[Forgettable]] | None = getattr(self._local, "leases", None)
        if found is None:
            found = self._local.leases = {}
        return found

    def gone(self) -> WhitepoolError:
        """The error that says why the manager does not answer."""
        title = f"pool {self.name!r}"
        if self.owner is not None and not self.closed:
            problem = ""
            if not self.owner.wait(0) and not (problem := self._unreachable()):
                return self._unwelcome(title)
            if self.owner.listens:
                return WhitepoolError(
                    f"the manager of {title} lives, and its socket {self.path} cannot be reached: "
                    f"{problem}"
                )
            if self.owner.wait(1.0) and self.owner.lost:
                code = self.owner.exitcode
                how = "died"
                if code is not None:
                    how = f"died with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
                return ManagerDied(
                    f"the manager of {title} (pid {self.owner.manager}) {how}, and so did those "
                    f"before it, or none can be started{self.owner.why}: the pool is gone and its "
                    "workers with it; make a new one"
                )
        elif not self.closed and not self._unreachable():
            return self._unwelcome(title)
        elif not self.closed and os.path.exists(self.path):
            return ManagerDied(
                f"the owner of {title} died, and its manager: the pool is gone; make a new one"
            )
        elif not self.closed:
            return PoolClosed(
                f"{title} was shut down, or cannot be reached from this process: its folder "
                f"{os.path.dirname(self.path)} is gone; make a new pool"
            )
        return PoolClosed(f"{title} was shut down: no worker can be had from it; make a new pool")

    def _unwelcome(self, title: str) -> WhitepoolError:
        return ProtocolError(
            f"the manager of {title} closed this connection and serves on: this process sent "
            "what it could not read, left its answers unread, or the manager has no "
            "descriptor left; try again"
        )

    def joining(self) -> tuple[Address, bytes, bytes]:
        """What a connection needs to join: address, key and this membership's token."""
        return self._address, self._key, self._token

    def closing(self) -> WhitepoolError:
        """The error for a checkout after a shutdown was begun here."""
        if self.closed:
            return self.gone()
        return PoolClosed(f"pool {self.name!r} is shutting down: it takes no new checkouts")

    def return_forgotten(self) -> None:
        """Check in what this thread still holds, idle, when it leaves the pool's `with` block."""
        for reference in list(self.leases_here().values()):
            lease = reference()
            if lease is not None and lease.forget():
                warnings.warn(
                    f"lease {lease.id} of pool {self.name!r} was still checked out at the end of "
                    "the pool's with block; it is checked in now",
                    ResourceWarning,
                    stacklevel=4,
                )

    def _unreachable(self) -> str:
        """Why nobody is to be reached at the pool's socket; empty if somebody is."""
        try:
            dial(self._address).close()
        except LinkBroken as error:
            return str(error)
        return ""

    # --- leases ---------------------------------------------------------------------------

    def own(self, lease: L, kind: type[L]) -> L:
        """A lease that somebody gives back to this pool, if it is one and is this pool's.

        Raises:
            TypeError, LeaseError: it is not.
        """
        if not isinstance(lease, kind):
            raise TypeError(f"a {kind.__name__} is needed, not {payload.shorten(lease)}")
        if lease._member.pool_id != self.pool_id:
            raise LeaseError(
                f"lease {lease.id} is of pool {lease.name!r}, and was given to pool {self.name!r}: "
                "give it back to its own"
            )
        return lease

    def require_factory(self) -> None:
        """Check that workers have a resource.

        Raises:
            LeaseError: they have none.
        """
        if not self.has_factory:
            raise LeaseError(
                f"pool {self.name!r} has no factory, so its workers have no resource to get(): "
                "give Pool(factory=...), or use lease.call(fn, ...)"
            )

    # --- channels -------------------------------------------------------------------------

    def channel(self, worker: int, lease: int, deadline: float | None) -> Channel:
        """A channel to a leased worker, for the lease's holder alone until it is returned; made on
        the first meeting.

        Raises:
            ChannelBroken: the worker died, or cannot be reached.
            LeaseError: the manager knows of no such lease (it has been recalled).
            LinkBroken, TimedOut: as for any request.
        """
        with self._lock:
            channel = self._channels.pop(worker, None)
        if channel is None:
            channel = self._from_kept(worker)
        if channel is None:
            with self.link(deadline) as link:
                fds = link.open(lease, deadline)
            if fds is None:
                raise LeaseError(f"lease {lease} has no worker")
            channel = Channel(*fds)
            with self._lock:
                self._opened.add(channel)
                for key in [key for key, old in self._channels.items() if old.dead()]:
                    self._channels.pop(key).close()
        return channel

    def _from_kept(self, worker: int) -> Channel | None:
        """A worker is leased anew: if it was kept here it has been recalled; take its channel."""
        for hold in list(self.kept):
            if hold.worker == worker:
                try:
                    self.kept.remove(hold)
                except ValueError:
                    break  # another thread just took it, and will find out
                return hold.recalled()
        return None

    def return_channel(self, worker: int, channel: Channel | None) -> None:
        """A lease is over, and nothing is under way on its channel: keep it for the next."""
        if channel is None:
            return
        over = channel
        with self._lock:
            if not (self.closed or worker in self._channels):
                self._channels[worker] = channel
                # Of those that wait look at one, in turn: after the pool has shrunk no other is
                # opened for a while.
                first = next(iter(self._channels))
                over = self._channels.pop(first)
                if not over.dead():
                    self._channels[first] = over
                    return
        over.close()

    # --- the engine -----------------------------------------------------------------------

    def threaded(self, what: str = "jobs") -> Threaded:
        """The engine behind `submit` and `map`, or behind "runs"; started when it is first wanted.

        Raises:
            PoolClosed: the pool was shut down, or is being shut down here.
            ManagerDied: its manager is gone.
        """
        running = self._engines.get(what)
        if running is not None and not (running.stopped or self.closed or self.draining):
            return running
        with self._lock:
            if self.closed or self.draining:
                raise self.closing()
            running = self._engines.get(what)
            if running is None or running.stopped:
                from whitepool_mp.client.threaded import Threaded

                running = Threaded(*self.joining(), weakref.ref(self), what)
                self._engines[what] = running
            return running

    def running_engine(self, what: str = "jobs") -> Threaded | None:
        """The engine, if there is one."""
        return self._engines.get(what)

    def running_engines(self) -> list[Threaded]:
        """All of them."""
        return list(self._engines.values())

    # --- the end --------------------------------------------------------------------------

    def close(self) -> None:
        """The pool has ended: let go of everything here. Twice is harmless."""
        with self._lock:
            again, self.closed = self.closed, True
        if again:
            if self.owner is not None:
                self.owner.end()  # the first time, its end may have been interrupted
            return
        for engine in self.running_engines():
            engine.stop()
        if self.owner is not None:
            self._end.detach()
            self.owner.end()
        self._links.close()
        with self._lock:
            self.kept.clear()
            rooms.let_go()
            self._channels.clear()
            self._local = threading.local()

    def forked(self) -> None:
        """In a forked child: close the copies and start from nothing."""
        self._links.forked()
        for channel in list(self._opened):
            channel.close()
        for engine in self._engines.values():
            engine.forked()
        if self.owner is not None:
            self._end.detach()
            self.owner.forked()
            self.owner = None
        self._reset()


def worker_died(
    name: str, slot: int, pid: int, running: str | None, started: bool, told: dict[str, Any] | None
) -> WorkerDied:
    """The error for a worker's death, from what the manager told of it."""
    told = told or {}
    return WorkerDied(
        pool=name,
        pid=told.get("pid") or pid,
        slot=slot,
        exitcode=told.get("exitcode"),
        age=told.get("age"),
        calls=told.get("calls"),
        rss=told.get("rss"),
        peak_rss=told.get("peak_rss"),
        running=running,
        started=started,
        stack=told.get("stack"),
        stderr=told.get("stderr"),
        oom_killed=told.get("oom_killed"),
        reason=told.get("reason"),
    )


def refusal(
    refused: frames.Refused, name: str, seconds: float | None, block: bool | None
) -> WhitepoolError:
    """The exception for a refused checkout."""
    title, detail = f"pool {name!r}", refused.detail
    if refused.why == "full":
        return PoolFull(f"{title} is full: {detail}; wait (block=True), or raise max_overflow")
    if refused.why == "closed":
        return PoolClosed(f"{title} is shutting down: it takes no new checkouts")
    if refused.why == "factory_failed":
        return FactoryFailed(f"no worker of {title} could start: {headline(detail)}", detail)
    waited = "" if seconds is None else f" within {seconds:g} s"
    return CheckoutTimeout(
        f"no worker of {title} became free{waited}: {detail}; hold leases for less long, or raise "
        "pool_size, max_overflow or the timeout"
    )


def _collected(owner: Owner, name: str) -> None:
    """The last session went out of use and nobody shut the pool down."""
    warnings.warn(
        f"pool {name!r} was never shut down; it is ended now", ResourceWarning, stacklevel=2
    )
    owner.end()


def _at_exit() -> None:
    """At interpreter exit: finish what was submitted, as concurrent.futures does; end our pools."""
    members = list(_everyone)
    for member in members:
        engine = member.running_engine()
        if engine is not None:
            engine.wait_idle()
    for member in members:
        if member.owner is not None:
            member.close()
        else:  # what is kept is given back, not left to be found with a dead holder
            member.kept.clear()
            for engine in list(member._engines.values()):
                engine.stop()
    engines = sys.modules.get("whitepool_mp.client.engine")
    if engines is not None:
        engines.give_back_all()


def _after_fork_in_child() -> None:
    for member in list(_everyone):
        member.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
