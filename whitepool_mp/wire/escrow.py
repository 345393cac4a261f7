"""Descriptors that outlive the manager: sent into a socket that nobody reads while it lives.

    manager --worker + [its socket, its page]--> queue (both ends also held by the owner)
                                                   '--> the next manager

A message in the queue of a socket holds the descriptors that were sent with it. The owner keeps the
queue and never looks into it, so workers see no end-of-file when a manager dies, and what they say
meanwhile waits to be read. When the owner has ended too, the kernel closes everything in it.

Guarantees: what is in the queue stays there, be the manager killed at any moment: an entry that has
to move is sent again before it is taken out. An entry may therefore be found twice.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import deque

from whitepool_mp.wire import descriptors
from whitepool_mp.wire.descriptors import Socket

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Sequence

NURSERY = 0
"""The key of a nursery's socket; workers have their numbers."""

_ENTRY = struct.Struct("!Q")
_MARK = 1 << 63
_MOST = 8
_SLACK = 16


class Escrow:
    """The manager's view of the queue.

    Args:
        inlet, outlet: its two ends.

    Attributes:
        refused: how many descriptors' entries the kernel had no room for. Their workers serve as
            others do, but no other manager will find them.
    """

    def __init__(self, inlet: Socket, outlet: Socket) -> None:
        self._inlet = inlet
        self._outlet = outlet
        inlet.setblocking(False)
        outlet.setblocking(False)
        self._queue: deque[int] = deque()
        self._entries: dict[int, int] = {}  # how many of them are there of each key
        self._live: dict[int, tuple[int, ...]] = {}
        self.refused = 0

    def park(self, key: int, fds: Sequence[int]) -> bool:
        """Put copies of descriptors into the queue.

        Args:
            key: whose they are.
            fds: the descriptors; they have to stay open until `drop`.

        Returns:
            Whether there was room.
        """
        if not self._send(key, tuple(fds)):
            self.refused += 1
            return False
        self._live[key] = tuple(fds)
        return True

    def drop(self, key: int) -> None:
        """Whose they are has ended: let go of the copies, soon."""
        self._live.pop(key, None)
        queue, live = self._queue, self._live
        while queue:
            head = queue[0]
            # Of a key that was used again (a nursery's) the last entry counts.
            needed = head in live and self._entries[head] == 1
            if needed and len(queue) <= 2 * len(live) + _SLACK:
                break
            if needed and not self._send(head, live[head]):
                break
            self._pop()

    def take(self, generation: int) -> dict[int, list[int]]:
        """Copies of all that was put there by others, by whose they are; they stay in the queue.

        Args:
            generation: the number of the manager that asks, another one for each.

        Raises:
            OSError: there are not enough descriptors left for them.
        """
        found: dict[int, list[int]] = {}
        mark = _ENTRY.pack(_MARK | generation)
        self._queue.clear()
        self._entries.clear()
        try:
            self._inlet.send(mark)
        except BlockingIOError:
            # It is full. Its first entry makes room.
            first, fds = self._first()
            self._discard()
            self._inlet.send(mark)
            if not self._found(first, fds, found):
                self.refused += 1
        while True:
            key, fds = self._first()
            if key == _MARK | generation:
                self._discard()
                break
            if not self._found(key, fds, found):
                self._discard()
                self._send(key, tuple(fds))
            else:
                self._discard()
        if NURSERY in self._live:  # this manager's own, which was among them
            self._send(NURSERY, self._live[NURSERY])
        return found

    def _first(self) -> tuple[int, list[int]]:
        """The first entry, which stays where it is, and copies of its descriptors."""
        data, fds = descriptors.receive(self._outlet, _ENTRY.size, _MOST, descriptors.PEEK)
        key: int = _ENTRY.unpack(data)[0]
        return key, fds

    def _found(self, key: int, fds: list[int], found: dict[int, list[int]]) -> bool:
        """Take an entry over, and send it again; False if there is no room for that before it is
        taken out."""
        if key & _MARK or key == NURSERY or key in found:
            for fd in fds:
                os.close(fd)
            return True
        found[key] = fds
        self._live[key] = tuple(fds)
        return self._send(key, self._live[key])

    def clear(self) -> None:
        """Let go of all that others put there."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._discard()

    def _send(self, key: int, fds: tuple[int, ...]) -> bool:
        try:
            descriptors.send(self._inlet, _ENTRY.pack(key), fds)
        except OSError:  # the queue is full, or as many descriptors are under way as may be
            return False
        self._queue.append(key)
        self._entries[key] = self._entries.get(key, 0) + 1
        return True

    def _pop(self) -> None:
        key = self._queue.popleft()
        self._entries[key] -= 1
        if not self._entries[key]:
            del self._entries[key]
        self._discard()

    def _discard(self) -> None:
        for fd in descriptors.receive(self._outlet, _ENTRY.size, _MOST)[1]:
            os.close(fd)
