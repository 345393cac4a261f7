"""This process's children, as the kernel lists them."""

from __future__ import annotations

import os

from whitepool_mp.wire import boot as boots

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


def of_another_pool(pid: int, pool_id: str) -> bool:
    """Whether an unreaped child is part of another pool (one that a worker of ours made)."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            marks = [entry for entry in file.read().split(b"\0") if entry.startswith(_MARK)]
    except OSError:
        return False  # it is a zombie, or another user's by now
    return bool(marks) and marks != [_MARK + pool_id.encode()]
