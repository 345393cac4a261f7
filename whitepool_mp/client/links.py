"""The control connections of a process, each of which is one thread's while it asks the manager.

    thread --use--> Link --ask, wait--> manager
             <--back--'                            idle: for the next thread, at most IDLE_LINKS

A thread has a connection only for as long as it waits for an answer. So a process has as many as
threads that ask at once, whatever becomes of the threads, and few are left after many have asked.
What was granted over a connection belongs to it: it stays open until all of that has ended.
"""

from __future__ import annotations

import contextlib
import errno
import threading
import weakref
from collections.abc import Callable, Iterator

from whitepool_mp.client.link import Link

IDLE_LINKS = 16
"""How many connections that nobody uses are kept open for the next thread."""


class Links:
    """The connections of a process's membership."""

    def __init__(self) -> None:
        # Reentrant: a lease that is collected while its own thread has the lock ends over a link.
        self._lock = threading.RLock()
        self._idle: dict[Link, None] = {}  # used last comes last
        self._all: weakref.WeakSet[Link] = weakref.WeakSet()
        self._closed = False

    @contextlib.contextmanager
    def use(self, make: Callable[[float | None], Link], deadline: float | None) -> Iterator[Link]:
        """A connection for the calling thread alone, while the block runs.

        Args:
            make: makes one, until a deadline. (It is not kept: it leads back to the membership,
                which ends when nothing refers to it any more.)
            deadline: until when to try to connect, on the monotonic clock; None for as long as the
                manager lives.

        Raises:
            TimedOut, LinkBroken: as for `Link`.
            OSError: no descriptor is left.
        """
        link = self._take(make, deadline)
        try:
            yield link
        finally:
            self._put(link)

    @contextlib.contextmanager
    def use_again(self, link: Link) -> Iterator[bool]:
        """The same for a connection of before, if no thread uses it now; whether that is so."""
        with self._lock:
            found = link in self._idle
            self._idle.pop(link, None)
        try:
            yield found
        finally:
            if found:
                self._put(link)

    def _take(self, make: Callable[[float | None], Link], deadline: float | None) -> Link:
        with self._lock:
            if self._idle:
                return self._idle.popitem()[0]
        try:
            link = make(deadline)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise OSError(
                error.errno,
                "no file descriptor is left in this process for a connection to the pool's "
                "manager: close some, or raise the limit (ulimit -n)",
            ) from None
        with self._lock:
            self._all.add(link)
            if self._closed:
                link.hang_up()
        return link

    def _put(self, link: Link) -> None:
        """A thread has its answer: let others have the connection, or close it."""
        over = []
        with self._lock:
            if link.broken or self._closed:
                over.append(link)
            else:
                self._idle[link] = None
                if len(self._idle) > IDLE_LINKS:
                    surplus = len(self._idle) - IDLE_LINKS
                    over = [idle for idle in list(self._idle) if not idle.holds][:surplus]
                    for idle in over:
                        self._idle.pop(idle, None)
        for each in over:
            each.retire()

    def close(self) -> None:
        """The pool has ended: end them all, under whoever waits on one."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
            for link in list(self._all):
                link.hang_up()
        for link in idle:
            link.retire()

    def forked(self) -> None:
        """In a forked child, where no other thread is: close the copies."""
        self._closed = True
        for link in list(self._all):
            link.close()
