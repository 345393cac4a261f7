"""Unix sockets, and descriptors that travel over them, without the `socket` module.

That module makes enums of some hundred constants; with importing `enum` and `selectors` it takes
longer than most of a start. What the pool's own processes need of it is here.
"""

from __future__ import annotations

import _socket
from struct import calcsize, pack, unpack

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket as Socket
else:

    class Socket(_socket.socket):
        """What of `socket.socket` is wanted here."""

        __slots__ = ("__weakref__",)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def accept(self):
            fd, address = self._accept()
            return Socket(fileno=fd), address


STREAM = int(_socket.SOCK_STREAM)
SEQPACKET = int(_socket.SOCK_SEQPACKET)
DONTWAIT = int(_socket.MSG_DONTWAIT)
PEEK = int(_socket.MSG_PEEK)

_FD_BYTES = calcsize("i")


def pair(kind: int = STREAM) -> tuple[Socket, Socket]:
    """Two connected Unix sockets, close-on-exec."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, kind)
    return Socket(fileno=ours.detach()), Socket(fileno=theirs.detach())


def send(sock: Socket, data: bytes | memoryview, fds: Sequence[int], flags: int = 0) -> int:
    """Send bytes and descriptors with them; how many bytes went.

    Raises:
        OSError: as for `socket.socket.sendmsg`.
    """
    passed = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, pack(f"{len(fds)}i", *fds))
    return sock.sendmsg([data], [passed], flags)


def receive(sock: Socket, size: int, most: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors that came with them, close-on-exec from the start.

    (`socket.recv_fds` drops the flags that it is given, and so cannot do that.)

    Args:
        sock: a Unix socket.
        size: at most how many bytes.
        most: at most how many descriptors.
        flags: with `PEEK`, what is received stays to be received again.

    Raises:
        OSError: as for `socket.socket.recvmsg`.
    """
    data, ancillary, _, _ = sock.recvmsg(
        size, _socket.CMSG_LEN(most * _FD_BYTES), _socket.MSG_CMSG_CLOEXEC | flags
    )
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            whole = len(content) // _FD_BYTES
            fds += unpack(f"{whole}i", content[: whole * _FD_BYTES])
    return data, fds


__all__ = ["DONTWAIT", "PEEK", "SEQPACKET", "STREAM", "Socket", "pair", "receive", "send"]
