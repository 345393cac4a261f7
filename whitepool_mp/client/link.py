"""A control connection to the manager, driven by the thread that waits on it.

Every request has a number and its answer carries it, so an answer to a request that was given up
(timed out, interrupted) is known by its number when it comes late, and is dropped.

If the manager is killed the link joins the one that the owner starts in its place, under the same
number, and says again what may not have been heard (`unheard`). What the manager granted it stays
granted.
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
from collections import deque
from typing import Any

from whitepool_mp.client import poller
from whitepool_mp.client.address import Address
from whitepool_mp.client.joining import JOINS, Handshake, LinkBroken, TimedOut, dial, new_link
from whitepool_mp.client.unheard import Unheard
from whitepool_mp.wire import descriptors, frames

_LONGEST_POLL = 2**31 - 1
_DONTWAIT = socket.MSG_DONTWAIT
_SAY_SECONDS = 10.0
"""How long what has no answer may take to be said, when the manager has just died."""


class ChannelBroken(Exception):
    """The worker closed the channel, or is gone, or cannot be reached. Internal."""


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


class Link:
    """One proven control connection, for one thread at a time.

    Sending a checkin or a destroy is allowed from any thread.

    Args:
        address, key, member: how to join.
        deadline: until when to try, on the monotonic clock; None for as long as the manager lives.

    Raises:
        TimedOut: the manager did not answer in time.
        LinkBroken: it is gone.
        AuthenticationFailed: one side does not have the key.
    """

    def __init__(
        self, address: Address, key: bytes, member: bytes, deadline: float | None = None
    ) -> None:
        poller.check()
        self._joining = address, key, member
        self._id = new_link()
        self._fds: deque[int] = deque()
        self._inbox: deque[bytes] = deque()
        self._expect_fds = False
        self._number = 0
        self._unheard = Unheard()
        self._asked, self._said = self._unheard.asked, self._unheard.said
        # Reentrant: a lease that is collected while its own thread is sending checks itself in.
        self._send_lock = threading.RLock()
        self._poll = select.poll()
        self.broken = False  # not to be used for requests any more
        self._over = False
        self._rejoining = False
        self.holds: set[int] = set()  # the leases granted here that have not ended
        self._retired = False
        self._sock, self._decoder, self._generation = self._join(deadline)
        self._poll.register(self._sock.fileno(), select.POLLIN)

    def _join(self, deadline: float | None) -> tuple[socket.socket, frames.FrameDecoder, int]:
        """A proven connection to whoever is the manager."""
        address, key, member = self._joining
        for _ in range(JOINS):
            sock = dial(address, deadline)
            try:
                handshake, decoder = Handshake(key, member, self._id), frames.FrameDecoder()
                while not handshake.done:
                    sock.settimeout(
                        None if deadline is None else max(0.001, deadline - time.monotonic())
                    )
                    data = sock.recv(4096)
                    if not data:
                        break
                    for body in decoder.feed(data):
                        if handshake.done:
                            self._inbox.append(body)
                        elif (answer := handshake.hear(body)) is not None:
                            sock.sendall(answer)
                else:
                    sock.settimeout(None)
                    return sock, decoder, handshake.generation
                sock.close()
            except TimeoutError:
                sock.close()
                raise TimedOut from None
            except OSError:
                sock.close()  # that manager died, or has no descriptor for us
            except BaseException:
                sock.close()
                raise
        raise LinkBroken("the manager closes every connection")

    def _rejoin(self, seen: int, deadline: float | None) -> None:
        """The connection ended: join the next manager, and say to it what this one may not have
        heard.

        Args:
            seen: the generation of the manager whose connection ended.
            deadline: until when to try, on the monotonic clock.

        Raises:
            TimedOut, LinkBroken: there is none; or it is the same one, which does not want this
                connection.
        """
        with self._send_lock:
            if self._over:
                raise LinkBroken("the pool is gone")
            if self._generation != seen:
                return  # another thread did it
            self._rejoining = True
            try:
                said = self._join_next(seen, deadline)
            finally:
                self._rejoining = False
            for _, data in list(self._said)[said:]:
                self._send(data, deadline)

    def _join_next(self, seen: int, deadline: float | None) -> int:
        """Join, and say all again; how much of what has no answer that was."""
        try:
            sock, decoder, generation = self._join(deadline)
        except LinkBroken:
            self.broken = self._over = True
            raise
        if generation == seen:
            sock.close()
            self.broken = self._over = True
            raise LinkBroken("the manager closed the connection, and lives on")
        if not self._inbox:
            while self._fds:
                os.close(self._fds.popleft())
        # In the place of the old one, also for a thread that is waiting on that just now.
        os.dup2(sock.fileno(), self._sock.fileno(), inheritable=False)
        sock.close()
        self._decoder, self._generation = decoder, generation
        said, asked = self._unheard.again()
        try:
            self._sock.sendall(b"".join([*said, *asked]))
        except OSError:
            return self._join_next(generation, deadline)
        except BaseException:
            self.broken = True  # an interrupt: half a frame may have been sent
            self._sock.shutdown(socket.SHUT_RDWR)
            raise
        return len(said)

    def say(self, data: bytes) -> None:
        """Send a frame that has no answer; it is said again should the manager die over it.

        Raises:
            LinkBroken: the pool is gone.
        """
        with self._send_lock:
            self._said.append((self._number, data))
            if not self._rejoining:  # by this very thread, which then says it
                self._send(data, time.monotonic() + _SAY_SECONDS)

    def ask(self, number: int, data: bytes, deadline: float | None) -> bytes:
        """Send a request and wait for the body of its answer.

        Args:
            number: the request's.
            data: its frame.
            deadline: until when to wait, on the monotonic clock; None for ever.

        Raises:
            TimedOut: it did not come in time.
            LinkBroken: the pool is gone.
        """
        self._asked[number] = data
        try:
            self._send(data, deadline)
            return self.wait(number, deadline)
        finally:
            self._asked.pop(number, None)

    def cancel(self, number: int, deadline: float) -> bytes:
        """Give a request up, and wait for the refusal that ends it.

        Args:
            number: the request's.
            deadline: until when to wait, on the monotonic clock.

        Returns:
            The body of the refusal.

        Raises:
            TimedOut: it did not come in time. The next manager is told, too, should it be killed.
            LinkBroken: the pool is gone.
        """
        data = frames.request(frames.CANCEL, number)
        self._asked[number] = data
        try:
            self._send(data, deadline)
            body = self.wait(number, deadline)
            if body[0] == frames.GRANT:  # it crossed the cancel, which makes it a checkin
                body = self.wait(number, deadline)
            return body
        except TimedOut:
            self._said.append((self._number, data))
            raise
        finally:
            self._asked.pop(number, None)

    def _send(self, data: bytes, deadline: float | None) -> None:
        with self._send_lock:
            seen = self._generation
            try:
                self._sock.sendall(data)
                return
            except OSError:
                pass  # it is gone, or has closed this connection
            self._rejoin(seen, deadline)  # says it again, too

    def next_number(self) -> int:
        """The number of the next request."""
        self._number += 1
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
                    if self._said:
                        self._unheard.answered(number)
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
        try:
            body = self.ask(number, frames.request_lease(frames.OPEN, number, lease), deadline)
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
        data = frames.request_lease(frames.WHY, number, lease)
        return frames.read_reply(self.ask(number, data, deadline))

    def resize(self, pool_size: int, max_overflow: int, deadline: float | None) -> None:
        """Ask for other sizes, and wait until they are in force."""
        number = self.next_number()
        self.ask(number, frames.resize(number, pool_size, max_overflow), deadline)

    def question(self, kind: int, deadline: float | None = None) -> Any:
        """Send a request without fields and return its JSON answer."""
        number = self.next_number()
        return frames.read_reply(self.ask(number, frames.request(kind, number), deadline))

    @property
    def asking(self) -> bool:
        """Whether an answer is waited for; this may be a collected lease's turn meanwhile."""
        return bool(self._asked)

    def ping(self, deadline: float) -> None:
        """Wait until the manager has heard all that was said."""
        number = self.next_number()
        self.ask(number, frames.request(frames.PING, number), deadline)

    def retire(self) -> None:
        """Nobody will ask here again: close it, when all that was granted here has ended."""
        self._retired = True
        if not self.holds:
            self.close()

    def ended(self, lease: int) -> None:
        """A lease that was granted here has ended, and the manager was told if it had to be."""
        self.holds.discard(lease)
        if self._retired and not self.holds:
            self.close()

    def hang_up(self) -> None:
        """End the connection under whoever waits on it; they, or the last reference, close it."""
        self.broken = self._over = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        if hasattr(self, "_sock"):
            self.close()

    def close(self) -> None:
        """Close this process's copy of the socket."""
        self.broken = self._over = True
        self._sock.close()
        with contextlib.suppress(IndexError):
            while True:
                os.close(self._fds.popleft())

    def _receive(self, deadline: float | None) -> bytes:
        inbox = self._inbox
        while not inbox:
            if deadline is not None and not self._poll.poll(left_ms(deadline)):
                raise TimedOut
            seen, decoder = self._generation, self._decoder
            flags = 0 if deadline is None else _DONTWAIT
            try:
                if self._expect_fds:
                    data, fds = descriptors.receive(self._sock, 65536, 16, flags)
                    self._fds.extend(fds)
                else:
                    data = self._sock.recv(65536, flags)
                if data:
                    inbox.extend(decoder.feed(data))
                    continue
            except BlockingIOError:
                continue  # another thread has just joined the next manager
            except OSError:
                data = b""
            except BaseException:
                # Also an interrupt, with bytes in hand that are lost now: the rest would make no
                # sense. What was leased here can still be given back here.
                self.broken = True
                raise
            self._rejoin(seen, deadline)
        return inbox.popleft()
