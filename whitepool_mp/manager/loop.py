"""One persistent epoll: descriptors and what to do when they are ready. No ticks, no threads."""

from __future__ import annotations

import select

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable

    Handler = Callable[[int], None]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

_LONGEST_WAIT = 2_000_000.0
"""Seconds; epoll takes no more than 2**31 milliseconds at once."""


class Loop:
    """A selector whose entries are callbacks."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def add(self, fd: int, handler: Handler, events: int = READ) -> None:
        """Call `handler(events)` whenever `fd` is ready."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of `fd`."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; call it before closing the descriptor."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def turn(self, timeout: float | None) -> int:
        """Wait for at most `timeout` seconds (None: for ever) and call what is ready.

        Returns:
            How many descriptors were ready.
        """
        ready = self._epoll.poll(-1 if timeout is None else min(max(0.0, timeout), _LONGEST_WAIT))
        handlers = self._handlers
        for fd, events in ready:
            # An earlier handler of this round may have removed it.
            handler = handlers.get(fd)
            if handler is not None:
                handler(events)
        return len(ready)

    def close(self) -> None:
        """Close the epoll itself."""
        self._epoll.close()
