"""Descriptors that travel with a call message, and who owns them on the way.

    pickle --Outgoing--> message ==SCM_RIGHTS==> reader --Incoming--> unpickle

A pickle names a descriptor by its place among those that travel with it, never by its number. The
sender owns copies until the call has ended, so that a call whose worker died before it began can be
sent again. What the receiver's unpickling does not take is closed there. What nobody receives is
closed by the kernel.
"""

from __future__ import annotations

import errno
import os
from contextvars import ContextVar

from whitepool_mp.errors import SerializationError
from whitepool_mp.wire import descriptors
from whitepool_mp.wire.descriptors import Socket

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

MOST = 253
"""How many descriptors the kernel passes at once (SCM_MAX_FD)."""


class NeedsDescriptors(SerializationError):
    """A descriptor would have to travel with what is kept or sent without any. Internal."""


class Outgoing:
    """What travels with a pickle: copies of descriptors, and what has to outlive the journey.

    It stands before the out-of-band buffers of a message. Owned by whoever sends that.

    Args:
        kept: an object that is kept alive until `close`: a lock is found by a name that its owner
            removes, and shared memory is given to others, when they are collected.

    Attributes:
        fds: the copies.
        lends: whether there is something in the pickle that needs the object to be kept.
    """

    __slots__ = ("_kept", "fds", "lends")

    def __init__(self, kept: Any) -> None:
        self._kept = kept
        self.fds: list[int] = []
        self.lends = False

    def add(self, fd: int) -> int:
        """Have a copy of a descriptor travel; its place.

        Raises:
            NeedsDescriptors: there are too many.
            OSError: it cannot be copied.
        """
        if len(self.fds) >= MOST:
            raise NeedsDescriptors(f"more than {MOST} descriptors cannot travel with one call")
        self.fds.append(os.dup(fd))
        return len(self.fds) - 1

    def close(self) -> None:
        """It will not be sent again."""
        fds, self.fds, self._kept = self.fds, [], None
        for fd in fds:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "fds"):
            self.close()


class Incoming:
    """The descriptors that came with a message. Owned by whoever reads that.

    It stands before the message's out-of-band buffers.

    Args:
        expected: how many the message told of.
        fds: those that came: fewer if this process has no room for more.
    """

    __slots__ = ("_fds", "expected")

    def __init__(self, expected: int, fds: list[int]) -> None:
        self.expected = expected
        self._fds: list[int | None] = [*fds]

    def take(self, place: int) -> int:
        """The descriptor at a place, owned by the caller from here on.

        Raises:
            OSError: it did not come, or was taken.
        """
        if not 0 <= place < self.expected:
            raise OSError(errno.EBADF, f"no descriptor {place} travels with this message")
        fd = self._fds[place] if place < len(self._fds) else -1
        if fd == -1:
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}: a descriptor was lost")
        if fd is None:
            raise OSError(errno.EBADF, f"descriptor {place} of this message was taken before")
        self._fds[place] = None
        return fd

    def close(self) -> None:
        """Close what was not taken."""
        fds, self._fds = self._fds, []
        self.expected = 0
        for fd in fds:
            if fd is not None:
                os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fds"):
            self.close()


class Passing(bytes):
    """The byte that descriptors travel with; whoever sends it asks for them then."""

    outgoing: Outgoing

    @classmethod
    def of(cls, outgoing: Outgoing) -> Passing:
        """The byte for these."""
        byte = cls(b"\0")
        byte.outgoing = outgoing
        return byte


_arriving: ContextVar[Incoming | None] = ContextVar("arriving", default=None)


def let_go(buffers: Sequence[Any]) -> None:
    """A message with these buffers will not be sent again: close what travels with it."""
    if buffers and type(buffers[0]) is Outgoing:
        buffers[0].close()


def take(loads: Callable[..., Any], data: bytes | memoryview, buffers: Sequence[Any]) -> Any:
    """Unpickle what came with out-of-band buffers, or descriptors, or both.

    Descriptors that are not taken are closed.

    Args:
        loads: `pickle.loads`. (The manager loads this file, and has no pickle.)
        data: the pickle.
        buffers: what came with it.
    """
    if not buffers or type(buffers[0]) is not Incoming:
        return loads(data, buffers=buffers)
    before = _arriving.set(buffers[0])
    try:
        return loads(data, buffers=buffers[1:])
    finally:
        _arriving.reset(before)
        buffers[0].close()


class Arrived:
    """A descriptor that came with the pickle that is being loaded; pickles name this class.

    Args:
        place: its place among those that came.
    """

    def __init__(self, place: int) -> None:
        self._incoming = _arriving.get()
        self._place = place

    def detach(self) -> int:
        """The descriptor, owned by the caller from here on. (multiprocessing's name for that.)

        Raises:
            OSError: as for `Incoming.take`.
            RuntimeError: the pickle did not come with a message.
        """
        if self._incoming is None:
            raise RuntimeError("this pickle is of use only with the descriptors it travelled with")
        return self._incoming.take(self._place)


def store(outgoing: Outgoing) -> Socket:
    """Put descriptors where any number of processes can have copies of them (`hand_out`).

    They lie in the queue of a socket, whose reader only looks at them.
    """
    outlet, inlet = descriptors.pair(descriptors.SEQPACKET)
    with inlet:
        descriptors.send(inlet, b"\0", outgoing.fds)
    outgoing.close()
    return outlet


def hand_out(stock: int, sock: Socket) -> None:
    """Send copies of what is stored, as far as this process has room for them for a moment.

    Args:
        stock: what `store` returned, as this process's descriptor.
        sock: the first thing that is sent there.
    """
    outlet = Socket(fileno=os.dup(stock))
    with outlet:
        data, fds = descriptors.receive(outlet, 1, MOST, descriptors.PEEK)
    try:
        if fds:
            descriptors.send(sock, data, fds)
        else:
            sock.sendall(data)
    finally:
        for fd in fds:
            os.close(fd)


def take_out(sock: Socket) -> Incoming:
    """Receive what was handed out."""
    return Incoming(MOST, descriptors.receive(sock, 1, MOST)[1])


def receive_due(sock: Any, reader: Any, flags: int = 0) -> int:
    """Receive the byte that is due, and the descriptors with it; how many bytes came.

    Args:
        sock: a Unix socket.
        reader: the `messages.MessageReader` for it.
        flags: as for `socket.socket.recvmsg`.

    Raises:
        OSError: as for `socket.socket.recvmsg`.
    """
    data, fds = descriptors.receive(sock, 1, reader.due, flags)
    if data:
        reader.room[:] = data
        reader.incoming = Incoming(reader.due, fds)
    return len(data)


__all__ = [
    "MOST",
    "Arrived",
    "Incoming",
    "NeedsDescriptors",
    "Outgoing",
    "Passing",
    "hand_out",
    "let_go",
    "receive_due",
    "store",
    "take",
    "take_out",
]
