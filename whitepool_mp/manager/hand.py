"""One worker process, as the manager has it in hand, and who is told what becomes of it."""

from __future__ import annotations

import contextlib
import os

from whitepool_mp.manager import kin
from whitepool_mp.wire import frames, pages

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from typing import Any, Protocol

    from whitepool_mp.manager.obituary import Obituary
    from whitepool_mp.wire.descriptors import Socket
else:
    import _signal as signal  # as in `worker.linux`

    Protocol = object


class Listener(Protocol):
    """Who is told what happens to workers."""

    def worker_born(self, worker: int, pid: int) -> None: ...
    def worker_ready(self, worker: int) -> None: ...
    def worker_failed(self, worker: int, reason: str) -> None: ...
    def worker_released(self, worker: int, lease: int) -> None: ...
    def worker_exited(self, worker: int, obituary: Obituary) -> None: ...


class Hand:
    """One worker process, from the order to start it until it is reaped.

    Attributes:
        stderr, stacks: the read ends of its pipes, None if there are none.
    """

    __slots__ = (
        "born",
        "channels",
        "control",
        "decoder",
        "dump",
        "inherited",
        "kill_reason",
        "page",
        "page_fd",
        "pid",
        "pidfd",
        "process",
        "said",
        "slot",
        "stacks",
        "stderr",
        "unfinished",
        "worker",
    )

    def __init__(
        self,
        worker: int,
        slot: int,
        control: Socket,
        page_fd: int,
        born: float,
        stderr: int | None = None,
        stacks: int | None = None,
    ):
        self.page = pages.Page(page_fd, pages.NUMBERS)
        self.page_fd = page_fd
        self.worker = worker
        self.slot = slot
        self.control = control
        self.decoder = frames.FrameDecoder(limit=64 * 1024)
        self.born = born
        self.channels = 0  # how many it was given
        self.pid: int | None = None
        self.inherited = False  # whether another manager started it
        self.pidfd = -1  # of one that was inherited
        self.kill_reason: str | None = None
        self.process: Any = None  # psutil.Process, made when it is first asked about
        self.stderr = stderr
        self.said = b""  # the last of it
        self.unfinished = b""  # of a line that came in parts
        self.stacks = stacks
        self.dump: bytearray | None = None  # what has come of a stack that was asked for

    def close(self) -> None:
        """Let go of the page."""
        self.page.close()
        os.close(self.page_fd)
        if self.pidfd >= 0:
            os.close(self.pidfd)


def kill(hand: Hand) -> None:
    """SIGKILL to a worker and its group."""
    assert hand.pid is not None
    if not hand.inherited:
        kill_group(hand.pid)
    elif hand.pidfd >= 0:
        kin.kill_group(hand.pid, hand.pidfd)


def kill_group(pid: int) -> None:
    """SIGKILL to an unreaped child and to the group it leads."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


__all__ = ["Hand", "Listener", "kill", "kill_group"]
