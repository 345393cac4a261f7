"""The pool's ledger: what a manager must know to take over from one that was killed.

    owner --makes it, counts managers--> ledger <--writes, before it acts-- manager
                                           '--reads-----------------------> the next manager

It is a memory file, made by the owner and given to each manager, so what has been written is there
whatever becomes of the writer. Only the manager writes records, one for each worker and one for
each client connection, and always before anybody is told what they say. Behind the records each
client has a mark, which is its own to write: whether it has jobs of which the manager need not know
yet, or, with the number of its link, that it has ended. So it is known before the client has been
asked, and of one that cannot answer.

Guarantees: each number is written whole. A record that was being changed when its writer died is
known as such: a worker's STATE is 0 then, a client's NUMBER.
"""

from __future__ import annotations

import mmap
import os

# The header's words.
LAUNCHED = 0
"""How many managers the owner has started."""
SERVED = 1
"""How many of them came to serve."""
FINISHED = 2
"""Whether the pool has ended in order."""
LAST_WORKER = 3
LAST_LEASE = 4
POOL_SIZE = 5
MAX_OVERFLOW = 6
DRAINING = 7
"""0, or that the pool drains (1) or was terminated (2)."""
NEWCOMERS = 8
"""How many connections had not proved themselves yet."""
LOST = 9
"""How much was lost that a shutdown had promised to finish."""
_HEADER = 32

# A worker's words.
STATE, ID, SLOT, PID, STARTED, LEASE, CLIENT, TICKET, FLAGS, LEASES_SERVED, BORN, SINCE = range(12)
KEPT, SPARE_OWN = 1, 2
WORKER_WORDS = 16
WORKERS = 16_384
"""How many workers there is room for: more than can live."""

# A client's words.
NUMBER, LINK, MEMBER, MEMBER_REST, CLIENT_PID, CLIENT_STARTED, WAITING = range(7)
CLIENT_WORDS = 8
CLIENTS = 65_536
"""How many connections there is room for; of more nothing is known to the next manager."""

_CLIENTS_BEGIN = _HEADER + WORKERS * WORKER_WORDS
_CLIENTS_END = _CLIENTS_BEGIN + CLIENTS * CLIENT_WORDS
_PAGE_WORDS = mmap.ALLOCATIONGRANULARITY // 8
_MARKS_BEGIN = -(-_CLIENTS_END // _PAGE_WORDS) * _PAGE_WORDS  # where a client can map its own
SIZE = 8 * (_MARKS_BEGIN + CLIENTS)
"""Bytes of all of it; what was never written takes no memory."""


def create() -> int:
    """Make an empty ledger; its descriptor (close-on-exec)."""
    fd = os.memfd_create("whitepool-ledger", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
    except OSError:
        os.close(fd)
        raise
    return fd


class Ledger:
    """One process's view of it.

    Args:
        fd: the memory file, which stays the caller's to close.

    Attributes:
        fd: the same, for clients to have their marks from.
        words: all of it, as numbers of 64 bits.
    """

    __slots__ = ("_map", "fd", "words")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self.words = memoryview(self._map).cast("Q")

    @staticmethod
    def worker(index: int) -> int:
        """Where a worker's record begins."""
        return _HEADER + index * WORKER_WORDS

    @staticmethod
    def client(index: int) -> int:
        """Where a client's record begins."""
        return _CLIENTS_BEGIN + index * CLIENT_WORDS

    @staticmethod
    def place(record: int) -> int:
        """The how manieth client's record begins there."""
        return (record - _CLIENTS_BEGIN) // CLIENT_WORDS

    @staticmethod
    def mark(record: int) -> int:
        """Where the mark of the client is whose record begins there."""
        return _MARKS_BEGIN + Ledger.place(record)

    def close(self) -> None:
        """Unmap it here."""
        self.words.release()
        self._map.close()


def mark(fd: int, place: int) -> memoryview:
    """A client's view of its mark, and of no more of the ledger than the page where that is.

    Args:
        fd: the memory file; it may be closed afterwards.
        place: the how manieth client it is.

    Returns:
        One number of 64 bits; it is mapped for as long as it is held.

    Raises:
        OSError: it cannot be mapped.
    """
    page, word = divmod(_MARKS_BEGIN + place, _PAGE_WORDS)
    mapped = mmap.mmap(fd, _PAGE_WORDS * 8, offset=page * _PAGE_WORDS * 8)
    return memoryview(mapped).cast("Q")[word : word + 1]
