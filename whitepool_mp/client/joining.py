"""How a connection comes to be one of the pool's: dialled, and proven in both directions.

    dial --socket--> Handshake --CHALLENGE, AUTH, WELCOME--> a link's, or an engine's

A `Link` blocks while it joins, an `Engine` does not; the steps are the same.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref

from whitepool_mp.client.address import Address
from whitepool_mp.errors import AuthenticationFailed, ProtocolError
from whitepool_mp.wire import auth, frames

JOINS = 8
"""How many connections in a row may end before the manager has let them in."""


class LinkBroken(Exception):
    """The manager closed the connection, or is gone. Internal: callers find out which."""


class TimedOut(Exception):
    """The answer did not come in time. Internal."""


_dialled: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def dial(address: Address, deadline: float | None = None) -> socket.socket:
    """A connected, not yet proven, socket.

    Args:
        address: where the manager listens.
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
        address.connect(sock)
        sock.settimeout(None)
    except TimeoutError:
        sock.close()
        raise TimedOut from None
    except OSError as error:
        sock.close()
        raise LinkBroken(f"{type(error).__name__}: {error}") from None
    return sock


class Handshake:
    """The client's part of joining, without I/O: feed it frames, send what it returns.

    Args:
        key: the pool's key.
        member: 16 bytes that all connections of this process's membership have in common; what one
            of them was granted, each may use.
        link: the connection's own number, by which the next manager knows it again.
        engine: whether it is an engine's.

    Attributes:
        generation: the how manieth manager of the pool it was, once `done`.
        place: where the connection's mark is in the ledger.
    """

    def __init__(self, key: bytes, member: bytes, link: int = 0, engine: bool = False) -> None:
        self._key = key
        self._member = member
        self._link = link, engine
        self.generation = self.place = 0
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
            return frames.auth(self._nonce, proof, self._member, os.getpid(), thread, *self._link)
        if body[0] == frames.DENIED:
            raise AuthenticationFailed("the pool refused this session's key")
        if body[0] != frames.WELCOME or self._expected is None:
            raise ProtocolError(f"the peer sent a frame of kind {body[0]} while joining")
        proof, self.generation, self.place = frames.read_welcome(body)
        if not auth.same(self._expected, proof):
            raise AuthenticationFailed(
                "the process that listens there does not have the pool's key"
            )
        self.done = True
        return None


def new_link() -> int:
    """A number for a connection, unlike every other."""
    return int.from_bytes(os.urandom(8), "little") | 1


def _after_fork_in_child() -> None:
    """Close the child's copies, also of connections that another thread was just making."""
    for sock in list(_dialled):
        sock.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
