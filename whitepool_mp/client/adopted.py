"""What this process adopted of a pool of its own: reaped when it ends, and nothing else is.

A manager that was killed leaves its workers, and what they started, to the nearest process above it
that adopts: mostly init, which reaps them. In a container it may be the owner itself (process 1),
or an owner that made itself a subreaper. User code there knows nothing of them.

    manager dies --> look() --> a pidfd of each that lives, in the owner's one wait
                       ^------- one of these ended: reap it, and see who came meanwhile

Whom user code started itself is never waited for here: those have no number of a pool (`lineage`).
"""

from __future__ import annotations

import contextlib
import os
import select
import time

from whitepool_mp.wire import lineage


class Adopted:
    """The processes of this process's pools that have become its own children.

    Attributes:
        held: a pidfd of each that lives, by its pid.
    """

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def look(self) -> None:
        """Reap those that have ended, and hold those that have not."""
        for pid in [pid for pid, fd in self.held.items() if _reap(fd)]:
            os.close(self.held.pop(pid))
        with contextlib.suppress(OSError, ImportError):  # no descriptor: at the next occasion
            for pid in _children():
                if pid in self.held or lineage.number(pid) is None:
                    continue
                fd = os.pidfd_open(pid)
                # Another thread may have reaped it; what has its number now is not to be touched.
                if lineage.number(pid) is None or _reap(fd):
                    os.close(fd)
                else:
                    self.held[pid] = fd

    def end(self, seconds: float) -> None:
        """Wait for the last of them, but no longer than that; then let go of them."""
        deadline = time.monotonic() + seconds
        self.look()
        while self.held and (left := deadline - time.monotonic()) > 0:
            poller = select.poll()
            for fd in self.held.values():
                poller.register(fd, select.POLLIN)
            poller.poll(left * 1000)
            self.look()
        self.close()

    def close(self) -> None:
        """Let go of them."""
        while self.held:
            os.close(self.held.popitem()[1])


def _children() -> list[int]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process().children()]
    return []


def _reap(pidfd: int) -> bool:
    """Reap a process if it has ended; whether it is gone."""
    try:
        return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:  # another thread was quicker, or it is nobody's any more
        return True
