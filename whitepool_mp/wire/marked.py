"""Finding what is left of a pool by the marker that all its processes are born with.

What a worker left behind may have detached itself from every other trace of the pool; its
environment at birth still tells. It takes nothing but the kernel: it is the last act of a pool
whose files may be gone by then.
"""

from __future__ import annotations

import os

from whitepool_mp.wire import boot as boots

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Collection
else:
    import _signal as signal  # as in `worker.linux`

_GONE = FileNotFoundError, ProcessLookupError, PermissionError
"""It has ended, or is another user's."""


def kill(
    pool_id: str,
    living: Collection[int] = (),
    spared: Callable[[int], bool] = lambda _: False,
) -> None:
    """SIGKILL to every process born with a pool's marker, but not to this one.

    It ends with a pass that finds nobody new.

    Args:
        pool_id: the pool's, as in the marker.
        living: the pids of those that are to be left alone, with whatever descends from them.
        spared: whether the process with a pid, which descends from none of these, is to be as well.

    Raises:
        OSError: no descriptor is left to look with, or there is no /proc.
    """
    mark = f"{boots.MARKER}={pool_id}".encode()
    known: set[tuple[int, int]] = set()
    while True:
        found = set()
        for pid in _marked(mark):
            process = None if spared(pid) else _kill(pid, mark, living, known)
            if process is not None:
                found.add(process)
        if not found:
            return
        known |= found


def _marked(mark: bytes) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and _has(pid, mark)]


def _has(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except _GONE:
        return False


def _kill(
    pid: int, mark: bytes, living: Collection[int], known: Collection[tuple[int, int]]
) -> tuple[int, int] | None:
    """Kill a process unless it is to live, or is known; which it was, by pid and time of start."""
    try:
        fd = os.pidfd_open(pid)
    except _GONE:
        return None
    try:
        # What has this number now is what `fd` names; or that has ended, and no signal goes there.
        if not _has(pid, mark) or _descends(pid, living):
            return None
        process = pid, _stat(pid)[1]
        if process in known:
            return None
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        return process
    except _GONE:
        return None
    finally:
        os.close(fd)


def _descends(pid: int, living: Collection[int]) -> bool:
    ancestor = pid
    while living and ancestor:
        if ancestor in living:
            return True
        try:
            ancestor = _stat(ancestor)[0]
        except _GONE:
            if ancestor == pid:
                raise
            ancestor = pid  # it has ended just now, and its children have another parent
    return False


def _stat(pid: int) -> tuple[int, int]:
    """A process's parent, and when it was started, in clock ticks since the boot.

    Source: proc(5), /proc/pid/stat, fields 4 and 22.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[1]), int(fields[19])
