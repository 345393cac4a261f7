"""The non-blocking driver: many calls in flight from one place, no thread per call.

    submit, map  --Task-->  Engine  --CHECKOUT...-->  manager
    asyncio                   |     <--GRANT--------
                              |=====calls, answers=====  workers

An engine owns a control connection, a channel to each worker it met, and an epoll over them. It
never blocks: whoever drives it waits until `fileno()` is readable or `next_deadline()` is due, and
calls `pump()`: a thread of its own (`threaded`), or an event loop (`looped`).

Here are the connection, the timers and the turns of the pump. The arrow to the manager is
`requests`, the one to the workers `channels`, and what is to go along them says `dispatch`.

Guarantees: jobs queue here and ask for workers first come, first served among all who ask the
manager; a worker's death fails the call that it had begun, and what it had not begun is sent to
another worker; a cancelled or late call has its worker killed.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from whitepool_mp.client.address import Address
from whitepool_mp.client.channels import Channels
from whitepool_mp.client.dispatch import Dispatcher
from whitepool_mp.client.engine_lease import EngineLease
from whitepool_mp.client.joining import JOINS, Handshake, LinkBroken, TimedOut, dial, new_link
from whitepool_mp.client.member import Member
from whitepool_mp.client.poller import IN, OUT
from whitepool_mp.client.tasks import Sink, Task
from whitepool_mp.errors import PoolClosed, ProtocolError, WhitepoolError
from whitepool_mp.wire import descriptors, frames, ledger

Kept = tuple[dict[EngineLease, None], dict[EngineLease, None]]
_LOOK = -1
"""In the place of a call's number: not its timeout is due but a look at its lease."""

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine(Channels):
    """See the module's text. Everything but `post` and `put` is for the driver's thread alone.

    Args:
        address, key, token: how to join.
        member: the membership, for its errors; weak, so that an idle engine keeps no pool alive.
        in_turn: as for its dispatcher.
    """

    def __init__(
        self,
        address: Address,
        key: bytes,
        token: bytes,
        member: weakref.ref[Member],
        in_turn: bool = False,
    ) -> None:
        self._member = member
        self._sock = dial(address)  # before the epoll: if it fails nothing has been opened
        self._sock.setblocking(False)
        super().__init__()
        self._joining = address, key, token
        self._link = new_link()
        self._generation = 0  # of the manager: none yet
        self._joins = 0
        self._handshake: Handshake | None = Handshake(key, token, self._link, engine=True)
        self._decoder = frames.FrameDecoder()
        self._writing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.RLock()  # a collected lease posts from anywhere
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._epoll.register(self._sock.fileno(), select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self.jobs = Dispatcher(self, in_turn)
        self._inbox: deque[Task] = deque()
        self._mark = _no_mark()  # whether there may be jobs: soon one that the manager sees
        self._marks = [self._mark]  # the same, for whoever cleans up
        self._mustered = False  # whether the pool is about to drain, and is to be told what is left
        self._unfinished = False  # whether it was told that something is
        self._asleep = False
        self._closed = False
        self._deadlines: list[tuple[float, int, EngineLease, int]] = []
        self._order = itertools.count()
        # An event loop may end and leave its engine behind. (Channels close themselves; here they
        # must not be held: what is in flight on them leads back to the engine.)
        self._collected = weakref.finalize(
            self,
            _leave,
            self._outbox,
            self.jobs.kept,
            self._sock,
            (address, self._link, self._marks),
            self._epoll,
            self._wake,
        )
        self._collected.atexit = False
        _engines.add(self)

    # --- for the driver -------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when there is something to `pump`."""
        return self._epoll.fileno()

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Have the driver's thread call `function(*args)` soon; from any thread.

        After the end it is called at once, where it finds the engine broken.
        """
        with self._wake_lock:
            if self._wake >= 0:
                self._posted.append((function, args))
                os.eventfd_write(self._wake, 1)
                return
        function(*args)

    def put(self, task: Task) -> None:
        """Queue a task, from any thread."""
        with self._wake_lock:
            self._inbox.append(task)
            self._mark[0] = 1
            if self._asleep and self.jobs.hungry and self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        if self._closed:
            self._fail_inbox()

    def _fail_inbox(self) -> None:
        """The end came before these were looked at; whoever takes one fails it."""
        error = self.broken or PoolClosed("the pool was shut down")
        with contextlib.suppress(IndexError):
            while True:
                self.jobs.fail_all(self._inbox.popleft(), error)

    def next_deadline(self) -> float | None:
        """When `pump` must be called at the latest, on the monotonic clock."""
        while self._deadlines:
            when, _, lease, number = self._deadlines[0]
            if lease.tasks and number in (_LOOK, lease.tasks[0].next_number):
                return when
            heapq.heappop(self._deadlines)
            lease.watched = lease.watched and number != _LOOK
        return None

    def pump(self, timeout: float = 0.0) -> None:
        """Deal with everything that is ready, waiting at most `timeout` seconds (-1: for ever)."""
        self._asleep = True  # said before looking: who puts a task there after that sees it
        if self._inbox:
            timeout = 0.0
        ready = self._epoll.poll(min(timeout, 2_000_000.0))
        self._asleep = False
        for fd, events in ready:
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._run_posted()
            elif self._sock.fileno() == fd:
                if events & ~OUT:
                    self._hear_manager()
            elif (channel := self._by_fd.get(fd)) is not None:
                if events & OUT:
                    if channel.push():
                        self._epoll.modify(fd, IN)
                    self.jobs.sent(channel)
                if events & ~OUT and channel.sock.fileno() >= 0:
                    self._hear_worker(channel)
        now = time.monotonic()
        while (when := self.next_deadline()) is not None and when <= now:
            _, _, lease, number = heapq.heappop(self._deadlines)
            if number == _LOOK:
                self.jobs.look(lease)
            else:
                self.jobs.late(lease)
        self.flush()

    def flush(self) -> None:
        """Send whatever can be sent of what was asked for."""
        self._take_in()
        if self._mustered and not self.jobs.idle:
            self._unfinished = True
            self._outbox += frames.draining("unfinished")  # so that what it asks for is heard
        self.jobs.dispatch()
        if self._mark[0] and self.jobs.idle:
            with self._wake_lock:  # never cleared, not even for a moment, when a task was put
                self._mark[0] = bool(self._inbox)
        if self._unfinished and self.jobs.idle:
            self._unfinished = False
            self._outbox += frames.draining("finished")
        if self._mustered:
            self._mustered = False
            self._outbox += frames.draining("asked")
        if not self._outbox or self._handshake is not None or self.broken is not None:
            return
        try:
            sent = self._sock.send(self._outbox)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # reading finds out
        del self._outbox[:sent]
        if bool(self._outbox) is not self._writing:
            self._writing = bool(self._outbox)
            events = IN | (OUT if self._writing else 0)
            self._epoll.modify(self._sock.fileno(), events)

    def _take_in(self) -> None:
        inbox = self._inbox
        while inbox:
            self.jobs.submit(inbox.popleft())

    def _run_posted(self) -> None:
        while self._posted:
            function, args = self._posted.popleft()
            function(*args)

    @property
    def idle(self) -> bool:
        """Whether no job is queued or running."""
        return self.jobs.idle and not self._inbox and not self._posted

    def give_back(self) -> None:
        """Check in the workers that are kept here and have nothing to do, and say that this is the
        end: nothing may be asked any more."""
        if self.broken is None and not self._closed:
            if self._handshake is not None:
                self._outbox.clear()  # nobody would read it
            _give_back(self._outbox, self.jobs.kept, self._sock)
            with self._wake_lock:  # whoever puts a task now must not take it back
                _say_over(self._joining[0], self._link, self._marks, self._sock)
                self._use_mark(_no_mark())

    def close(self) -> None:
        """Let go of everything; what has not ended fails with `PoolClosed`."""
        if self.broken is None:
            self.give_back()
            self._break(self._gone())
        self.discard()
        self._run_posted()
        self.jobs.unserved += sum(task.left for task in self._inbox)
        self._fail_inbox()

    def discard(self) -> None:
        """Close this process's descriptors, and nothing else."""
        self._closed = True
        self._use_mark(_no_mark())  # in a forked child the other one is the parent's
        with self._wake_lock:
            if self._collected.detach() is not None:
                for channel in self._channels.values():
                    channel.close()
                self._channels.clear()
                _close(self._sock, self._epoll, self._wake)
            self._wake = -1
        self._by_fd.clear()

    # --- from the manager -----------------------------------------------------------------

    def _hear_manager(self) -> None:
        try:
            data, fds = descriptors.receive(self._sock, 65536, 64)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._fds.extend(fds)
        if not data:
            self._rejoin()
            return
        for body in self._decoder.feed(data):
            if self._handshake is not None:
                if not self._shake(self._handshake, body):
                    return
                continue
            if body[0] == frames.DRAINING:
                self._take_in()  # these came before it
                self.jobs.draining = self._mustered = True
                continue
            heard = self._answered(body)
            if heard is not None:
                heard(body)
            elif body[0] == frames.CHANNEL and frames.read_channel(body)[0]:
                raise ProtocolError("a channel that nobody asked for")

    def _shake(self, handshake: Handshake, body: bytes) -> bool:
        """Get on with joining; whether that goes well."""
        try:
            answer = handshake.hear(body)
        except WhitepoolError as error:
            self._break(error)
            return False
        if answer is not None:
            with contextlib.suppress(OSError):  # it is gone: reading finds out
                self._sock.send(answer)
        if handshake.done:
            self._handshake = None
            self._joins = 0
            self._have_mark(handshake.place)
            if handshake.generation == self._generation:
                self._break(self._gone())  # it closed the connection before this, and lives on
                return False
            if self._generation:
                self._again()
            self._generation = handshake.generation
            self._take_in()
            if not self.jobs.idle:
                # Before all that was asked for meanwhile: this manager may be draining the pool.
                self._unfinished = True
                self._outbox[:0] = frames.draining("unfinished")
        return True

    def _have_mark(self, place: int) -> None:
        """Let the manager see whether there are jobs, if there is room for that here."""
        if not self._fds:
            return  # the descriptor was lost: the mark stays as the manager made it, set
        fd = self._fds.popleft()
        try:
            self._use_mark(ledger.mark(fd, place))
        except OSError:
            return
        finally:
            os.close(fd)
        self._mark[0] = 1  # until the next `flush`

    def _use_mark(self, mark: memoryview) -> None:
        self._mark = self._marks[0] = mark

    def _rejoin(self) -> None:
        """The connection ended: join the manager that takes over, if there is to be one."""
        address, key, token = self._joining
        self._joins += 1
        try:
            sock = dial(address) if self._joins <= JOINS else None
        except LinkBroken:
            sock = None
        if sock is None:
            self._break(self._gone())
            return
        sock.setblocking(False)
        fd = self._sock.fileno()
        # In the place of the old one, which whoever cleans up knows. A duplicate is another entry
        # for the epoll.
        self._epoll.unregister(fd)
        os.dup2(sock.fileno(), fd, inheritable=False)
        sock.close()
        self._epoll.register(fd, IN)
        self._writing = False
        self._decoder = frames.FrameDecoder()
        while self._fds:
            os.close(self._fds.popleft())
        self._handshake = Handshake(key, token, self._link, engine=True)

    def _gone(self) -> WhitepoolError:
        member = self._member()
        return member.gone() if member is not None else PoolClosed("the pool was shut down")

    def _break(self, error: WhitepoolError) -> None:
        """The manager is gone: everything that waits for it, or for its workers, ends."""
        if self.broken is not None:
            return
        self.broken = error
        self._use_mark(_no_mark())
        if self._sock.fileno() >= 0:
            self._epoll.unregister(self._sock.fileno())
        for channel in list(self._channels.values()):
            self.hear_all(channel)  # what workers answered before it ended
        replies, self._replies = self._replies, {}
        for heard in replies.values():
            heard(b"")
        held = [channel.lease for channel in self._channels.values() if channel.lease is not None]
        self.jobs.break_all(error, held)

    # --- what the dispatcher needs besides ------------------------------------------------

    def member(self) -> Member | None:
        """The membership, if it is still there."""
        return self._member()

    def capacity(self) -> int:
        """How many workers the pool has at most."""
        member = self._member()
        return 1 if member is None else member.capacity

    def set_deadline(self, lease: EngineLease) -> None:
        """The first call in flight on a lease has begun, or is about to: watch its timeout."""
        task = lease.tasks[0]
        if task.timeout is not None:
            due = time.monotonic() + task.timeout
            heapq.heappush(self._deadlines, (due, next(self._order), lease, task.next_number))

    def set_look(self, lease: EngineLease, due: float) -> None:
        """Have the dispatcher `look` at a lease then."""
        heapq.heappush(self._deadlines, (due, next(self._order), lease, _LOOK))

    # --- jobs and calls -------------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Queue a task for whichever worker becomes free; in the driver's thread."""
        self._mark[0] = 1
        self.jobs.submit(task)

    def start(self, task: Task, lease: EngineLease) -> None:
        """Send a task to a worker that its caller has leased."""
        self.jobs.start(task, lease)

    def cancel(self, task: Task) -> None:
        """Nobody wants a task any more."""
        self.jobs.cancel(task)

    def recant(self, task: Task, recanted: Callable[[], None]) -> None:
        """Nobody wants a task of one call any more, unless it has begun; `recanted` hears of it."""
        if not self._closed:
            self.jobs.recant(task, recanted)

    def take_out(self, sink: Sink, taken: Callable[[list[Task]], None], running: bool) -> None:
        """Give back what a sink waits for; unless `running`, what of it has not begun."""
        if not self._closed:
            self._take_in()
            taken(self.jobs.take_out(sink, running))

    def destroy(self, lease: EngineLease, reason: str) -> None:
        """Have a leased worker killed and replaced; a call running on it is the caller's to end."""
        self.jobs.destroy(lease, reason)


def _no_mark() -> memoryview:
    """A mark that nobody else sees."""
    return memoryview(bytearray(8)).cast("Q")


def _give_back(outbox: bytearray, kept: Kept, sock: socket.socket) -> None:
    """Check in what is kept and has nothing to do, so that it need not be replaced."""
    leases = [lease for part in kept for lease in part]
    for lease in leases:
        lease.note_returned()
    data = bytes(outbox) + b"".join(frames.checkin(lease.id) for lease in leases)
    with contextlib.suppress(OSError):  # then the manager sees the connection end
        sock.send(data)


def _say_over(address: Address, link: int, marks: list[memoryview], sock: socket.socket) -> None:
    """Say that a connection is over where also the next manager sees it.

    One that was killed does not see the connection end, or read what was sent last; and the one
    after it has seen it neither, and would keep for a client that lives what it held.

    Args:
        address: where the manager listens.
        link: the connection's own number; in its mark it says that it is over.
        marks: its mark.
        sock: the connection, about to be closed.
    """
    marks[0][0] = link
    poller = select.poll()
    poller.register(sock, 0)
    if poller.poll(0):  # hung up: that manager is gone, and another may have read the marks before
        with contextlib.suppress(LinkBroken, TimedOut):
            dial(address, time.monotonic()).close()  # it looks again when a stranger goes


def _leave(
    outbox: bytearray,
    kept: Kept,
    sock: socket.socket,
    over: tuple[Address, int, list[memoryview]],
    epoll: select.epoll,
    wake: int,
) -> None:
    """An engine was left behind."""
    _give_back(outbox, kept, sock)
    _say_over(*over, sock)
    _close(sock, epoll, wake)


def _close(sock: socket.socket, epoll: select.epoll, wake: int) -> None:
    """Close what an engine has open, but for its channels."""
    sock.close()
    epoll.close()
    os.close(wake)


def give_back_all() -> None:
    """The process ends: give back what the engines of event loops that are over have kept."""
    for engine in list(_engines):
        engine.give_back()
        engine.discard()


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine._wake_lock = threading.RLock()  # its holder may have stayed in the parent
        engine.discard()


os.register_at_fork(after_in_child=_after_fork_in_child)
