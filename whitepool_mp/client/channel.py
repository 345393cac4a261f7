"""A direct channel to one worker, driven by the thread that calls."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

from whitepool_mp.client.joining import TimedOut
from whitepool_mp.client.link import ChannelBroken, left_ms
from whitepool_mp.wire import messages
from whitepool_mp.wire.messages import HEAD, Message, MessageReader
from whitepool_mp.wire.pages import RECALLED, Page
from whitepool_mp.wire.passed import receive_due

_SMALL = 64 * 1024
"""Bytes of a pickle that is copied to be sent in one piece with its head."""


class Refused(Exception):
    """The lease was taken back and the call has not begun, which it never will. The channel is of
    no more use: the request lies in it. Internal."""


class Channel:
    """The client's end. One call at a time, by whoever of this process holds the worker's lease.

    Args:
        sock_fd: the socket; owned from here on.
        page_fd: the worker's page; mapped and closed.
        slot: the channel's place on that page.
    """

    def __init__(self, sock_fd: int, page_fd: int, slot: int) -> None:
        self.sock = socket.socket(fileno=sock_fd)
        self.sock.setblocking(True)
        self.reader = MessageReader()
        try:
            self.page = Page(page_fd, slot=slot)
        except OSError:  # it takes a descriptor of its own, and there may be none
            self.sock.close()
            raise
        finally:
            os.close(page_fd)
        self._poll = select.poll()
        self._poll.register(sock_fd, select.POLLIN)

    def exchange(
        self,
        kind: int,
        flags: int,
        number: int,
        lease: int,
        data: bytes,
        buffers: Sequence[Any],
        deadline: float | None,
    ) -> Message:
        """Send a request and return its answer.

        Args:
            kind, flags, number, lease, data, buffers: the message (see `messages`).
            deadline: until when, on the monotonic clock; None for ever.

        Raises:
            TimedOut: the answer was not there in time; the channel is of no more use.
            ChannelBroken: the worker is gone.
            Refused: the lease was taken back too late for the worker to say so at once.
        """
        sock, reader = self.sock, self.reader
        try:
            if deadline is None and not buffers and len(data) < _SMALL:
                sock.sendall(HEAD.pack(kind, flags, 0, number, lease, len(data)) + data)
            else:
                pieces = messages.pack(kind, flags, number, lease, data, buffers)
                self._send_until(pieces, deadline, lease, number)
            self._look(lease, number)
            while True:
                if deadline is not None and not self._poll.poll(left_ms(deadline)):
                    raise TimedOut
                count = receive_due(sock, reader) if reader.due else sock.recv_into(reader.room)
                if not count:
                    raise ChannelBroken
                message = reader.take(count)
                if message is not None:
                    return message
        except TimeoutError:
            raise TimedOut from None
        except OSError:
            raise ChannelBroken from None

    def _look(self, lease: int, number: int) -> None:
        """After something was sent: find out whether the lease had been taken back by then.

        If not, the worker sees what was sent before it begins anything under another lease, and
        refuses it. Otherwise it may have begun that, and come to refuse this only when that ends.
        """
        page = self.page
        if page.words[RECALLED] < lease or not page.refuses(lease, number):
            return
        if not self._poll.poll(0):  # else it has been answered
            raise Refused

    def _send_until(
        self,
        pieces: list[bytes | memoryview],
        deadline: float | None,
        lease: int,
        number: int,
    ) -> None:
        """Send to a worker that may not read: each write waits for room until the deadline."""
        rest = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        with contextlib.suppress(BlockingIOError):
            messages.send_some(self.sock, rest, socket.MSG_DONTWAIT)
        if not rest:
            return
        self._look(lease, number)
        if deadline is not None:
            self.sock.settimeout(max(0.0, deadline - time.monotonic()) or 1e-6)
        try:
            while rest:
                messages.send_some(self.sock, rest)
        finally:
            self.sock.settimeout(None)

    def tell(self, pieces: list[bytes | memoryview]) -> None:
        """Send a message that has no answer, if the worker is there to take it."""
        try:
            messages.send_all(self.sock, pieces)
        except OSError:
            return  # it died: there is nothing left to release

    def began(self, lease: int, number: int) -> bool:
        """Whether the worker had begun this call, also after its death."""
        return self.page.began(lease, number)

    def note(self, word: int, lease: int) -> None:
        """Write on the page how a lease is about to end: `RETURNED` or `DESTROYED`. Should the
        manager be killed before it is told, the next one reads it there."""
        if self.sock.fileno() >= 0:  # the two may be collected in either order
            self.page.words[word] = lease

    def dead(self) -> bool:
        """Whether the worker's end is closed."""
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in self._poll.poll(0))

    def hang_up(self) -> None:
        """End an exchange that another thread is in; that thread then closes the channel."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        if hasattr(self, "page"):
            self.close()

    def close(self) -> None:
        """Close this process's copies."""
        self.sock.close()
        self.page.close()
