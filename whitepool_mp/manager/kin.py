"""Processes that are not this one's children: to be sure which they are, and how they ended.

After a manager was killed its workers belong to somebody else, who reaps them. The next manager
holds a pidfd of each: it names one process for ever, it is readable when that has ended, and a
signal sent through it reaches no other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # as in `worker.linux`

_INFO = struct.Struct("=QQ11Ii")
_GET_INFO = 0xC040FF0B
"""PIDFD_GET_INFO: _IOWR(0xFF, 11) of the 64 bytes of `_INFO`, its exit code last."""
_INFO_EXIT = 1 << 3


def started(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None if there is none.

    Source: proc(5), /proc/pid/stat, field 22.
    """
    return _stat(pid, 19)


def parent(pid: int) -> int | None:
    """The pid of a process's parent; None if there is no such process.

    Source: proc(5), /proc/pid/stat, field 4.
    """
    return _stat(pid, 1)


def _stat(pid: int, field: int) -> int | None:
    """A number from a process's `stat`, counted from its state on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[field])
    except (FileNotFoundError, ProcessLookupError):
        return None


def hold(pid: int, created: int) -> int | None:
    """A pidfd of the process with this number that was started then; None if it has ended.

    Raises:
        OSError: no descriptor is left.
    """
    try:
        fd = os.pidfd_open(pid)
    except (ProcessLookupError, ValueError, OverflowError):
        return None
    try:
        # The number cannot pass to another process and back: what is there now is what `fd` names,
        # or that has ended.
        if started(pid) == created and not ended(fd):
            return fd
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def ended(pidfd: int) -> bool:
    """Whether the process has ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def exit_code(pid: int, pidfd: int) -> int | None:
    """How a process ended, as from `os.waitstatus_to_exitcode`; None where that cannot be known.

    Source: proc(5), /proc/pid/stat, field 52, until it is reaped; from then on linux/pidfd.h,
    PIDFD_GET_INFO with PIDFD_INFO_EXIT (Linux 6.15).
    """
    status = _last_status(pidfd)
    if status is None:
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            if fields[0] == b"Z":
                return os.waitstatus_to_exitcode(int(fields[49]))
        status = _last_status(pidfd)  # it was reaped meanwhile
    return None if status is None else os.waitstatus_to_exitcode(status)


def _last_status(pidfd: int) -> int | None:
    asked = bytearray(_INFO.pack(_INFO_EXIT, 0, *(0,) * 11, 0))
    try:
        fcntl.ioctl(pidfd, _GET_INFO, asked)
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(asked)
    return status if mask & _INFO_EXIT else None


def kill_group(pid: int, pidfd: int) -> None:
    """SIGKILL to a process and to the group it leads, if it lives."""
    if ended(pidfd):
        return  # and the group's number may be anybody's
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        # `signal.pidfd_send_signal` is one of what `_signal` has too.
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
