"""Receiving descriptors over a Unix socket, so that no program started later inherits them."""

from __future__ import annotations

import array
import socket

_FD_BYTES = array.array("i").itemsize


def receive(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Receive bytes and the descriptors that came with them, close-on-exec from the start.

    (`socket.recv_fds` drops the flags that it is given, and so cannot do that.)

    Args:
        sock: a Unix socket.
        size: at most how many bytes.
        most: at most how many descriptors.

    Raises:
        OSError: as for `socket.socket.recvmsg`.
    """
    data, ancillary, _, _ = sock.recvmsg(
        size, socket.CMSG_LEN(most * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    return data, fds.tolist()
