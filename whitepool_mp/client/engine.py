"""The non-blocking driver: many calls in flight from one place, no thread per call.

    submit, map  --Task-->  Engine  --CHECKOUT...-->  manager
    asyncio                   |     <--GRANT--------
                              |=====calls, answers=====  workers

An engine owns a control connection, a channel to each worker it met, and an epoll over them. It
never blocks: whoever drives it waits until `fileno()` is readable or `next_deadline()` is due, and
calls `pump()`: a thread of its own (`threaded`), or an event loop (`looped`).

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

from whitepool_mp.client.engine_lease import LOST, EngineChannel, EngineLease
from whitepool_mp.client.link import Handshake, dial, take_pair
from whitepool_mp.client.member import Member, refusal, worker_died
from whitepool_mp.client.tasks import MAX_DEATHS, Task
from whitepool_mp.errors import (
    CallTimeout,
    PoolClosed,
    ProtocolError,
    WhitepoolError,
    WorkerDied,
)
from whitepool_mp.wire import descriptors, frames

MAX_TICKETS = 256
"""How many checkouts the queued jobs of an engine ask for at once."""

Done = Callable[[Any], None]
"""Called once with the result, or with an exception object."""


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """See the module's text. Everything but `post` is for the driver's thread alone.

    Args:
        path, key, token: how to join.
        member: the membership, for its errors; weak, so that an idle engine keeps no pool alive.
    """

    def __init__(self, path: str, key: bytes, token: bytes, member: weakref.ref[Member]) -> None:
        self._member = member
        self._sock = dial(path)
        self._sock.setblocking(False)
        self._handshake: Handshake | None = Handshake(key, token)
        self._decoder = frames.FrameDecoder()
        self._fds: deque[int] = deque()
        self._outbox = bytearray()
        self._writing = False
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.RLock()  # a collected lease posts from anywhere
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._epoll.register(self._sock.fileno(), select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._numbers = itertools.count(1)
        self._replies: dict[int, Callable[[bytes], None]] = {}
        self._pending: deque[Task] = deque()
        self._tickets: set[int] = set()
        self._site = ""
        self._channels: dict[int, EngineChannel] = {}
        self._by_fd: dict[int, EngineChannel] = {}
        self._deadlines: list[tuple[float, int, EngineLease, int]] = []
        self._order = itertools.count()
        self.running = 0
        self.broken: WhitepoolError | None = None
        # An event loop may end and leave its engine behind.
        self._collected = weakref.finalize(
            self, _close, self._sock, self._channels, self._epoll, self._wake
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

    def next_deadline(self) -> float | None:
        """When `pump` must be called at the latest, on the monotonic clock."""
        while self._deadlines:
            when, _, lease, number = self._deadlines[0]
            if lease.ended is None and lease.task is not None and lease.number == number:
                return when
            heapq.heappop(self._deadlines)
        return None

    def pump(self, timeout: float = 0.0) -> None:
        """Deal with everything that is ready, waiting at most `timeout` seconds (-1: for ever)."""
        for fd, events in self._epoll.poll(min(timeout, 2_000_000.0)):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._run_posted()
            elif self._sock.fileno() == fd:
                if events & ~select.EPOLLOUT:
                    self._hear_manager()
            elif (channel := self._by_fd.get(fd)) is not None:
                if events & select.EPOLLOUT and channel.push():
                    self._epoll.modify(fd, select.EPOLLIN)
                if events & ~select.EPOLLOUT:
                    self._hear_worker(channel)
        now = time.monotonic()
        while (when := self.next_deadline()) is not None and when <= now:
            lease = heapq.heappop(self._deadlines)[2]
            self._late(lease)
        self._flush()

    @property
    def idle(self) -> bool:
        """Whether no job is queued or running."""
        return not self._pending and not self.running and not self._posted

    def close(self) -> None:
        """Let go of everything; what has not ended fails with `PoolClosed`."""
        if self.broken is None:
            self._break(self._gone())
        self.discard()
        self._run_posted()

    def discard(self) -> None:
        """Close this process's descriptors, and nothing else."""
        with self._wake_lock:
            if self._collected.detach() is not None:
                _close(self._sock, self._channels, self._epoll, self._wake)
            self._wake = -1
        self._by_fd.clear()

    # --- requests to the manager ----------------------------------------------------------

    def request(self, kind: int, done: Done) -> None:
        """A request without fields; `done` gets its JSON answer."""
        number = next(self._numbers)
        self._ask(
            number, frames.request(kind, number), lambda body: done(frames.read_reply(body)), done
        )

    def resize(self, pool_size: int, max_overflow: int, done: Done) -> None:
        """Ask for other sizes."""
        number = next(self._numbers)
        data = frames.resize(number, pool_size, max_overflow)
        self._ask(number, data, lambda body: done(frames.read_reply(body)), done)

    def checkout(self, block: bool, deadline: float | None, site: str, done: Done) -> int:
        """Ask for a worker; `done` gets an `EngineLease`, a `Refused` or an exception.

        Returns:
            The ticket, for `cancel_checkout`.
        """
        number = next(self._numbers)

        def answer(body: bytes) -> None:
            if body[0] == frames.GRANT:
                done(EngineLease(frames.read_grant(body), kept=True))
            else:
                done(frames.read_refused(body))

        self._ask(number, frames.checkout(number, block, deadline, site), answer, done)
        return number

    def cancel_checkout(self, ticket: int, done: Done | None) -> None:
        """Give a checkout up: `done` gets the `Refused` for it; a grant under way is void."""

        def answer(body: bytes) -> None:
            if body[0] == frames.GRANT:
                self._replies[ticket] = answer  # it crossed the cancel; the refusal follows
            elif done is not None:
                done(frames.read_refused(body))

        if self.broken is None:
            self._replies[ticket] = answer
            self._say(frames.request(frames.CANCEL, ticket))

    def checkin(self, lease: EngineLease) -> None:
        """Give a worker back."""
        if lease.ended is None:
            lease.ended = "checked in"
            if lease.channel is not None:
                lease.channel.lease = None
            self._say(frames.checkin(lease.id))

    def destroy(self, lease: EngineLease, reason: str) -> None:
        """Have a leased worker killed and replaced; a call running on it is the caller's to end."""
        if lease.ended is None:
            lease.ended = f"destroyed ({reason})"
            self._drop(lease)
            self._say(frames.destroy(lease.id, reason))

    def _ask(self, number: int, data: bytes, answer: Callable[[bytes], None], done: Done) -> None:
        if self.broken is not None:
            done(self.broken)
            return

        def heard(body: bytes) -> None:
            if not body:
                assert self.broken is not None
                done(self.broken)
            else:
                answer(body)

        self._replies[number] = heard
        self._say(data)

    def _say(self, data: bytes) -> None:
        self._outbox += data

    def flush(self) -> None:
        """Send what was asked for outside `pump`."""
        self._flush()

    def _flush(self) -> None:
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
            events = select.EPOLLIN | (select.EPOLLOUT if self._writing else 0)
            self._epoll.modify(self._sock.fileno(), events)

    def _run_posted(self) -> None:
        while self._posted:
            function, args = self._posted.popleft()
            function(*args)

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
            self._break(self._gone())
            return
        for body in self._decoder.feed(data):
            if self._handshake is not None:
                try:
                    answer = self._handshake.hear(body)
                except WhitepoolError as error:
                    self._break(error)
                    return
                if answer is not None:
                    with contextlib.suppress(OSError):  # it is gone: reading finds out
                        self._sock.send(answer)
                if self._handshake.done:
                    self._handshake = None
                continue
            heard = self._replies.pop(frames.read_request(body), None)
            if heard is not None:
                heard(body)
            elif body[0] == frames.CHANNEL and frames.read_channel(body):
                raise ProtocolError("a channel that nobody asked for")

    def _gone(self) -> WhitepoolError:
        member = self._member()
        return member.gone() if member is not None else PoolClosed("the pool was shut down")

    def _break(self, error: WhitepoolError) -> None:
        """The manager is gone: everything that waits for it, or for its workers, ends."""
        if self.broken is not None:
            return
        self.broken = error
        if self._sock.fileno() >= 0:
            self._epoll.unregister(self._sock.fileno())
        replies, self._replies = self._replies, {}
        for heard in replies.values():
            heard(b"")
        for channel in list(self._channels.values()):
            lease = channel.lease
            if lease is not None:
                lease.ended = "lost (the manager is gone)"
                task, lease.task = lease.task, None
                if task is not None:
                    self.running -= 1
                    self._fail_all(task, error)
        while self._pending:
            self._fail_all(self._pending.popleft(), error)

    def _fail_all(self, task: Task, error: BaseException) -> None:
        while task.left:
            index = task.first + task.at
            task.at += 1
            task.sink.failed(task, index, error)

    # --- jobs -----------------------------------------------------------------------------

    def submit(self, task: Task, site: str = "") -> None:
        """Queue a task for whichever worker becomes free."""
        if self.broken is not None:
            self._fail_all(task, self.broken)
            return
        self._site = site or self._site
        self._pending.append(task)
        self._want()

    def _want(self) -> None:
        """Ask for as many workers as the queued jobs could use."""
        missing = min(len(self._pending), MAX_TICKETS) - len(self._tickets)
        for _ in range(missing):
            number = next(self._numbers)
            self._tickets.add(number)
            self._replies[number] = self._heard_ticket
            self._say(frames.checkout(number, True, None, self._site))

    def _heard_ticket(self, body: bytes) -> None:
        if not body:
            return  # the manager is gone, and `_break` ends the jobs
        self._tickets.discard(frames.read_request(body))
        if body[0] == frames.GRANT:
            lease = EngineLease(frames.read_grant(body), kept=False)
            task = self._next_task()
            if task is None:
                self.checkin(lease)
            else:
                self.start(task, lease)
                self._want()
            return
        refused = frames.read_refused(body)
        member = self._member()
        error = (
            refusal(refused, member.name, None, None)
            if member is not None
            else PoolClosed("the pool was shut down")
        )
        # One refusal ends one job; the others ask on their own behalf.
        task = self._next_task()
        if task is not None:
            self._fail_all(task, error)
        self._want()

    def _next_task(self) -> Task | None:
        while self._pending:
            task = self._pending.popleft()
            if not task.cancelled and task.sink.began(task):
                return task
        return None

    def start(self, task: Task, lease: EngineLease) -> None:
        """Send a task to a leased worker."""
        self.running += 1
        lease.task = task
        task.runner = lease
        channel = self._channels.get(lease.worker)
        if channel is not None:
            self._send(lease, channel)
            return
        number = next(self._numbers)
        self._replies[number] = lambda body: self._heard_channel(lease, body)
        self._say(frames.request_lease(frames.OPEN, number, lease.id))
        self._set_deadline(lease, task)  # until it is sent: the manager may be stuck

    def _heard_channel(self, lease: EngineLease, body: bytes) -> None:
        if not body:
            task, lease.task = lease.task, None
            if task is not None:
                self.running -= 1
                assert self.broken is not None
                self._fail_all(task, self.broken)
            return
        if not frames.read_channel(body):
            if lease.ended is None:
                self._lost(lease)
            return
        self._forget_dead()
        try:
            channel = EngineChannel(*take_pair(self._fds))
        except OSError as error:
            self._give_up(lease, error)
            return
        self._channels[lease.worker] = channel
        fd = channel.sock.fileno()
        self._by_fd[fd] = channel
        self._epoll.register(fd, select.EPOLLIN)
        if lease.ended is None:
            self._send(lease, channel)
        else:
            self._close_channel(lease.worker)

    def _give_up(self, lease: EngineLease, error: OSError) -> None:
        """This process has no room for a channel: one task fails for it, the worker goes back."""
        task, lease.task = lease.task, None
        if not lease.kept:
            self.checkin(lease)
        if task is not None:
            self.running -= 1
            self._fail_all(task, error)

    def _forget_dead(self) -> None:
        for worker, channel in list(self._channels.items()):
            if channel.lease is None and channel.dead():
                self._close_channel(worker)

    def _send(self, lease: EngineLease, channel: EngineChannel) -> None:
        task = lease.task
        assert task is not None
        lease.channel, channel.lease = channel, lease
        number = lease.number + 1
        lease.number = number
        pieces = task.pieces(number, lease.id)
        channel.unsent = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        if not channel.push():
            self._epoll.modify(channel.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        self._set_deadline(lease, task)

    def _set_deadline(self, lease: EngineLease, task: Task) -> None:
        if task.timeout is not None:
            due = time.monotonic() + task.timeout
            heapq.heappush(self._deadlines, (due, next(self._order), lease, lease.number))

    # --- from the workers -----------------------------------------------------------------

    def _hear_worker(self, channel: EngineChannel) -> None:
        reader = channel.reader
        try:
            count = channel.sock.recv_into(reader.want())
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._hung_up(channel)
            return
        reader.received(count)
        lease = channel.lease
        while True:
            try:
                message = reader.pop()
            except ProtocolError:  # something in the worker wrote to descriptors not its own
                self._hung_up(channel)
                return
            if message is None:
                return
            task = lease.task if lease is not None else None
            if lease is None or task is None or message.number != lease.number:
                continue  # the answer of a call that was given up
            index = task.first + task.at
            task.at += 1
            if task.left:
                lease.number += 1
                self._set_deadline(lease, task)
                task.sink.answered(task, index, message)
                continue
            lease.task = None
            self.running -= 1
            if not lease.kept:
                self.checkin(lease)
            task.sink.answered(task, index, message)

    def _hung_up(self, channel: EngineChannel) -> None:
        """Nothing more can come through a channel."""
        if channel.lease is not None:
            self._lost(channel.lease)
        else:
            self._close_channel(
                next(worker for worker, known in self._channels.items() if known is channel)
            )

    def _lost(self, lease: EngineLease) -> None:
        """A worker is gone: find out why for the call it had begun, move the others on."""
        task, lease.task = lease.task, None
        channel = lease.channel
        lease.ended = LOST
        if task is None:
            self._drop(lease)
            self._say(frames.destroy(lease.id, "its channel broke"))
            return
        self.running -= 1
        began = channel is not None and channel.began(lease.id, lease.number)
        self._drop(lease)
        if not began:
            task.deaths += 1
            if task.deaths < MAX_DEATHS and not lease.kept:
                # If it is dead the manager knows nothing of this lease any more.
                self._say(frames.destroy(lease.id, "its channel broke"))
                self._requeue(task)
                return
        index = task.first + task.at
        task.at += 1
        task.deaths = 0
        self.running += 1  # until its end is known
        number = next(self._numbers)

        def told(body: bytes) -> None:
            self.running -= 1
            if not body:
                assert self.broken is not None
                task.sink.failed(task, index, self.broken)
                return
            member = self._member()
            name = member.name if member is not None else ""
            answer = frames.read_reply(body)
            error: WorkerDied = worker_died(name, lease.slot, lease.pid, task.name, began, answer)
            task.sink.failed(task, index, error)

        self._replies[number] = told
        self._say(frames.request_lease(frames.WHY, number, lease.id))
        self._requeue(task)

    def _requeue(self, task: Task) -> None:
        rest = task.rest()
        if rest is not None and not rest.cancelled:
            self._pending.appendleft(rest)
            self._want()

    def _late(self, lease: EngineLease) -> None:
        task, lease.task = lease.task, None
        assert task is not None and task.timeout is not None
        self.running -= 1
        self.destroy(lease, f"a call took longer than {task.timeout:g} s")
        index = task.first + task.at
        task.at += 1
        task.sink.failed(
            task,
            index,
            CallTimeout(
                f"{task.name} took longer than {task.timeout:g} s in worker {lease.slot} (pid "
                f"{lease.pid}); the worker was killed and is being replaced"
            ),
        )
        self._requeue(task)

    def cancel(self, task: Task) -> None:
        """Nobody wants a task any more: take it off the queue, or kill the worker that runs it."""
        task.cancelled = True
        lease = task.runner
        if lease is not None and lease.task is task:
            lease.task = None
            self.running -= 1
            self.destroy(lease, "its call was cancelled")

    def _drop(self, lease: EngineLease) -> None:
        channel, lease.channel = lease.channel, None
        if channel is not None:
            channel.lease = None
            self._close_channel(lease.worker)

    def _close_channel(self, worker: int) -> None:
        channel = self._channels.pop(worker, None)
        if channel is not None:
            fd = channel.sock.fileno()
            self._epoll.unregister(fd)
            del self._by_fd[fd]
            channel.close()


def _close(
    sock: socket.socket, channels: dict[int, EngineChannel], epoll: select.epoll, wake: int
) -> None:
    """Close what an engine has open."""
    sock.close()
    for channel in channels.values():
        channel.close()
    channels.clear()
    epoll.close()
    os.close(wake)


def _after_fork_in_child() -> None:
    for engine in list(_engines):
        engine._wake_lock = threading.RLock()  # its holder may have stayed in the parent
        engine.discard()


os.register_at_fork(after_in_child=_after_fork_in_child)
