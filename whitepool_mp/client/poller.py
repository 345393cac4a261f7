"""What an engine waits on: an epoll, or a poll where the process has been patched for greenlets.

gevent's `monkey.patch_all()` takes away `select.epoll`, which would block all greenlets, and puts
a `select.poll` in its place that blocks one. It patches everything else that this package waits
with. eventlet takes both away, so it cannot be supported.
"""

from __future__ import annotations

import select

from whitepool_mp.errors import WhitepoolError

IN, OUT = select.POLLIN, select.POLLOUT
"""An epoll uses the same numbers."""


def check() -> None:
    """Check that this process can wait.

    Raises:
        WhitepoolError: it has been patched in a way that leaves it nothing to wait with.
    """
    if not hasattr(select, "poll"):
        raise WhitepoolError(
            "this process has been monkey-patched: select.poll is gone (eventlet removes it), and "
            "nothing is left to wait for workers with; patch without select "
            "(eventlet.monkey_patch(select=False)), or use gevent, threads or asyncio"
        )


def new_poller() -> select.epoll:
    """An epoll, or what does the same in a process in which greenlets take turns."""
    check()
    return select.epoll() if hasattr(select, "epoll") else _Cooperative()  # type: ignore[return-value]


class _Cooperative:
    """A patched `select.poll` with the interface of an epoll; other greenlets run meanwhile."""

    __slots__ = ("_poll", "modify", "register", "unregister")

    def __init__(self) -> None:
        self._poll = select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self._poll.unregister

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        return self._poll.poll(seconds if seconds < 0 else 1000 * seconds)

    def fileno(self) -> int:
        raise WhitepoolError(
            "asyncio needs select.epoll, which gevent's monkey.patch_all() removes; use the "
            "blocking form of the session in greenlets"
        )

    def close(self) -> None:
        """There is nothing to close."""


__all__ = ["IN", "OUT", "check", "new_poller"]
