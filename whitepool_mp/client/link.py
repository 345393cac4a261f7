"""A control connection to the manager, driven by the thread that waits on it.

Every request has a number and its answer carries it, so an answer to a request that was given up
(timed out, interrupted) is known by its number when it comes late, and is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from typing import Any

from whitepool_mp.errors import AuthenticationFailed, ProtocolError
from whitepool_mp.wire import auth, descriptors, frames

_LONGEST_POLL = 2**31 - 1


class LinkBroken(Exception):
    """The manager closed the connection, or is gone. Internal: callers find out which."""


class ChannelBroken(Exception):
    """The worker closed the channel, or is gone, or cannot be reached. Internal."""


class TimedOut(Exception):
    """The answer did not come in time. Internal."""


_dialled: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def dial(path: str, deadline: float | None = None) -> socket.socket:
    """A connected, not yet proven, socket.

    Args:
        path: where the manager listens.
        deadline: until when to try, on the monotonic clock; None for ever. (It connects at once,
            unless thousands queue up before a manager that is stopped.)

    Raises:
        TimedOut: there was no room in the queue in time.
        LinkBroken: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    _dialled.add(sock)
    try:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.connect(path)
        sock.settimeout(None)
    except TimeoutError:
        sock.close()
        raise TimedOut from None
    except OSError as error:
        sock.close()
        raise LinkBroken(str(error)) from None
    return sock


def left_ms(deadline: float) -> int:
    """What is left until a deadline on the monotonic clock, in the form that poll() takes."""
    return min(max(0, math.ceil((deadline - time.monotonic()) * 1000)), _LONGEST_POLL)


def take_pair(fds: deque[int]) -> tuple[int, int]:
    """The socket's and the page's descriptor that came with a CHANNEL.

    Raises:
        OSError: EMFILE; the kernel drops what a process has no room for.
    """
    if len(fds) < 2:
        while fds:
            os.close(fds.popleft())
        raise OSError(
            errno.EMFILE,
            "no file descriptor is left in this process for a channel to the worker: close some, "
            "or raise the limit (ulimit -n)",
        )
    return fds.popleft(), fds.popleft()


class Handshake:
    """The client's part of joining, without I/O: feed it frames, send what it returns.

    Args:
        key: the pool's key.
        member: 16 bytes that all connections of this process's membership have in common; what one
            of them was granted, each may use.
    """

    def __init__(self, key: bytes, member: bytes) -> None:
        self._key = key
        self._member = member
        self._nonce = os.urandom(frames.NONCE_BYTES)
        self._expected: bytes | None = None
        self.done = False

    def hear(self, body: bytes) -> bytes | None:
        """Deal with a frame of the manager's; what to send in answer, if anything.

        Raises:
            AuthenticationFailed: one side does not have the key.
            ProtocolError: the peer is no manager.
        """
        if self._expected is None and body[0] == frames.CHALLENGE:
            challenge = frames.read_nonce(body)
            self._expected = auth.server_proof(self._key, challenge, self._nonce)
            proof = auth.client_proof(self._key, challenge, self._nonce)
            thread = threading.current_thread().name
            return frames.auth(self._nonce, proof, self._member, os.getpid(), thread)
        if body[0] == frames.DENIED:
            raise AuthenticationFailed("the pool refused this session's key")
        if body[0] != frames.WELCOME or self._expected is None:
            raise ProtocolError(f"the peer sent a frame of kind {body[0]} while joining")
        if not auth.same(self._expected, frames.read_nonce(body)):
            raise AuthenticationFailed(
                "the process that listens there does not have the pool's key"
            )
        self.done = True
        return None


class Link:
    """One proven control connection, for one thread at a time.

    Sending a checkin or a destroy is allowed from any thread.

    Args:
        path, key, member: how to join.
        deadline: until when to try, on the monotonic clock; None for as long as the manager lives.

    Raises:
        TimedOut: the manager did not answer in time.
        LinkBroken: it is gone.
        AuthenticationFailed: one side does not have the key.
    """

    def __init__(self, path: str, key: bytes, member: bytes, deadline: float | None = None) -> None:
        self._sock = dial(path, deadline)
        self._fds: deque[int] = deque()
        self._decoder = frames.FrameDecoder()
        self._inbox: deque[bytes] = deque()
        self._expect_fds = False
        self._number = 0
        # Reentrant: a lease that is collected while its own thread is sending checks itself in.
        self._send_lock = threading.RLock()
        self._poll = select.poll()
        self._poll.register(self._sock.fileno(), select.POLLIN)
        self.broken = False
        self.leases: dict[int, weakref.ref[Any]] = {}
        try:
            handshake = Handshake(key, member)
            while not handshake.done:
                answer = handshake.hear(self._receive(deadline))
                if answer is not None:
                    self.send(answer)
        except BaseException:
            self.close()
            raise

    def send(self, data: bytes) -> None:
        """Send a frame that has no answer.

        Raises:
            LinkBroken: the manager is gone.
        """
        try:
            with self._send_lock:
                self._sock.sendall(data)
        except OSError as error:
            self.broken = True
            raise LinkBroken(str(error)) from None

    def next_number(self) -> int:
        """The number of the next request."""
        self._number = self._number % 0xFFFF_FFFF + 1
        return self._number

    def wait(self, number: int, deadline: float | None) -> bytes:
        """The body of the answer to request `number`.

        Args:
            number: which request.
            deadline: until when to wait, on the monotonic clock; None for ever.

        Raises:
            TimedOut: it did not come in time.
            LinkBroken: the manager is gone.
        """
        try:
            while True:
                body = self._receive(deadline)
                if frames.read_request(body) == number:
                    return body
                if body[0] == frames.CHANNEL and frames.read_channel(body)[0]:
                    for fd in take_pair(self._fds):
                        os.close(fd)
        except Exception:
            raise
        except BaseException:
            # An interrupt: descriptors that were not taken would be taken for those of another.
            self.broken = True
            raise

    def open(self, lease: int, deadline: float | None) -> tuple[int, int, int] | None:
        """Ask for a channel to a leased worker.

        Returns:
            Its socket's and its page's descriptors and its place on the page; None if the lease has
            been taken back.

        Raises:
            ChannelBroken: the worker died, or cannot be reached.
        """
        number = self.next_number()
        self._expect_fds = True  # and from now on: this may be interrupted before they come
        self.send(frames.request_lease(frames.OPEN, number, lease))
        try:
            body = self.wait(number, deadline)
            slot, lost = frames.read_channel(body)
            if lost:
                raise ChannelBroken
            return (*take_pair(self._fds), slot) if slot else None
        except Exception:
            raise
        except BaseException:
            # An interrupt: descriptors that were not taken would be taken for those of another.
            self.broken = True
            raise

    def why(self, lease: int, deadline: float | None) -> Any:
        """Ask how the worker of a lease ended, its channel being broken; None if nobody knows."""
        number = self.next_number()
        self.send(frames.request_lease(frames.WHY, number, lease))
        return frames.read_reply(self.wait(number, deadline))

    def resize(self, pool_size: int, max_overflow: int, deadline: float | None) -> None:
        """Ask for other sizes, and wait until they are in force."""
        number = self.next_number()
        self.send(frames.resize(number, pool_size, max_overflow))
        self.wait(number, deadline)

    def ask(self, kind: int, deadline: float | None = None) -> Any:
        """Send a request without fields and return its JSON answer."""
        number = self.next_number()
        self.send(frames.request(kind, number))
        return frames.read_reply(self.wait(number, deadline))

    def hang_up(self) -> None:
        """End the connection under whoever waits on it; they, or the last reference, close it."""
        self.broken = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        if hasattr(self, "_fds"):
            self.close()

    def close(self) -> None:
        """Close this process's copy of the socket."""
        self.broken = True
        self._sock.close()
        while self._fds:
            os.close(self._fds.popleft())

    def _receive(self, deadline: float | None) -> bytes:
        inbox = self._inbox
        while not inbox:
            if deadline is not None and not self._poll.poll(left_ms(deadline)):
                raise TimedOut
            try:
                if self._expect_fds:
                    data, fds = descriptors.receive(self._sock, 65536, 16)
                    self._fds.extend(fds)
                else:
                    data = self._sock.recv(65536)
                if not data:
                    raise LinkBroken("the manager closed the connection")
                inbox.extend(self._decoder.feed(data))
            except OSError as error:
                self.broken = True
                raise LinkBroken(str(error)) from None
            except BaseException:
                # Also an interrupt, with bytes in hand that are lost now: the rest would make no
                # sense. What was leased here can still be given back here.
                self.broken = True
                raise
        return inbox.popleft()


def _after_fork_in_child() -> None:
    """Close the child's copies, also of connections that another thread was just making."""
    for sock in list(_dialled):
        sock.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
