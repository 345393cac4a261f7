"""This process's children, as the kernel lists them."""

from __future__ import annotations

import contextlib
import os

from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import lineage

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Container, Iterable
else:
    import _signal as signal  # as in `worker.linux`

_MARK = boots.MARKER.encode() + b"="


def open_list() -> int | None:
    """The kernel's list of this process's children, if it keeps one."""
    own = os.getpid()
    try:
        return os.open(f"/proc/{own}/task/{own}/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def pids(listed: int | None) -> list[int]:
    """The pids of this process's children, zombies included.

    Source: proc(5), /proc/pid/task/tid/children; psutil where the kernel does not have it.
    """
    if listed is None:
        import psutil

        return [child.pid for child in psutil.Process().children()]
    text = b""
    while piece := os.pread(listed, 1 << 16, len(text)):
        text += piece
    return [int(pid) for pid in text.split()]


def descends(pid: int, workers: Iterable[int], leaders: Container[int], nursery: bool) -> bool:
    """Whether a process, or zombie, descends from a living worker or the nursery.

    Args:
        pid: its pid.
        workers: the numbers of the workers that live.
        leaders: their pids. Each leads a session: that tells where there is no number to tell by.
        nursery: whether the nursery lives.
    """
    number = lineage.number(pid)
    if number is None:
        with contextlib.suppress(OSError):  # it has ended, or may not be asked
            return os.getsid(pid) in leaders
        return False
    if number == lineage.NURSERY:
        return nursery
    return any(lineage.of(worker) == number for worker in workers)


def kill(pids: Iterable[int], but_for: str | None) -> None:
    """Kill unreaped children.

    Args:
        pids: theirs. Only this process reaps its children, so each is still that child's.
        but_for: a pool's id: what is part of another pool is spared. None to kill all.
    """
    for pid in pids:
        if but_for is None or not of_another_pool(pid, but_for):
            with contextlib.suppress(PermissionError):  # it became another user's, by sudo or su
                os.kill(pid, signal.SIGKILL)


def of_another_pool(pid: int, pool_id: str) -> bool:
    """Whether an unreaped child is part of another pool (one that a worker of ours made)."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            marks = [entry for entry in file.read().split(b"\0") if entry.startswith(_MARK)]
    except OSError:
        return False  # it is a zombie, or another user's by now
    return bool(marks) and marks != [_MARK + pool_id.encode()]
