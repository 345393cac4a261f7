"""The few things that only the kernel can promise, in functions named after the promise."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import struct

from whitepool_mp.wire import libc

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
else:
    # The module below `signal`, which makes enums of the numbers: with importing `enum` that takes
    # several milliseconds of a start, in each of the pool's own processes.
    import _signal as signal

_PR_SET_CHILD_SUBREAPER = 36
_F_SETSIG = 10

_prctl = libc.function("prctl")
_sigaltstack = libc.function("sigaltstack")
_SIGNAL_STACK = 1 << 18
"""Bytes, of which the kernel gives only what is used."""


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none escapes.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    if _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        error = libc.get_errno()
        raise OSError(error, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error)}")


def die_with(lifeline: int) -> int:
    """Have the kernel kill this process group the moment the last writer of a pipe is gone.

    The signal is SIGKILL and the kernel sends it: it works for a process that is stopped, holds the
    interpreter's lock or runs nothing of Python's, and costs no thread.

    Args:
        lifeline: the read end of the pipe; it is closed, and the one returned takes its place (a
            description of its own, since the kernel keeps one owner for each).

    Source: fcntl(2), F_SETOWN, F_SETSIG and O_ASYNC.
    """
    fd = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.close(lifeline)
    fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if poller.poll(0):  # the last writer went before the switch was armed
        os.kill(os.getpid(), signal.SIGKILL)
    return fd


def disarm(fd: int) -> None:
    """Take `die_with` back; the pipe stays open for reading."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC)


_SOONER = 500
"""In thousandths of all memory. With it a worker goes before its owner unless the owner has more
than half of the memory more than the worker: then the owner is the one to look at."""


def be_killed_first() -> None:
    """Have the kernel, out of memory, choose this process, and what it starts, before the pool's
    owner.

    Source: proc(5), /proc/pid/oom_score_adj. Raising it takes no privilege.
    """
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # it is not to be had here
        return
    try:
        inherited = int(os.pread(fd, 16, 0))
        os.pwrite(fd, b"%d" % min(1000, inherited + _SOONER), 0)
    except (OSError, ValueError):
        pass
    finally:
        os.close(fd)


def widen_signal_stack() -> None:
    """Give the handlers of this thread room for many signals at once.

    faulthandler gives them a stack of about 12 KiB, on which all handlers of Python run as well.
    Signals that come together nest there, some 4 KiB each (11 KiB on some processors): those that a
    service manager sends while a terminal closes overflow it, and the kernel ends the process.
    """
    address = libc.malloc(_SIGNAL_STACK)
    if address is not None:
        _sigaltstack(struct.pack("PiP", address, 0, _SIGNAL_STACK), None)


def limit_descriptors(soft: int) -> None:
    """Set this process's soft limit of open files, or the hard one if that is lower."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and (soft == unlimited or soft > hard):
        soft = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


_PAGE = os.sysconf("SC_PAGE_SIZE")
_statm = -1


def resident() -> int:
    """This process's resident memory in bytes; 0 if it cannot be told.

    The file is kept open: it is read after each call that takes a while.

    Source: proc(5), /proc/pid/statm.
    """
    global _statm
    try:
        if _statm < 0:
            _statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        return int(os.pread(_statm, 128, 0).split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):  # user code closed it
        return 0
