"""What a pool needs of the kernel: asked for once, before anything is started.

A system call that an old kernel does not have, or that a container forbids (seccomp), would be
missed somewhere in the midst of things, by the manager or at a death. Each is tried here, in this
process, from which the pool's own inherit what is allowed.

Not asked for is what is made do without: `membarrier` (then nothing is sent ahead), `close_range`,
locks of files.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import libc

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_ALLOW = (
    "in a container allow it in the seccomp profile (docker's and podman's do by default, if they "
    "are up to date)"
)
_MOUNT = "mount it (mount -t proc proc /proc)"

_met = False


def require() -> None:
    """Check that the kernel offers what a pool is built on.

    Raises:
        WhitepoolError: it does not; the text names the system call, what for, and what to do.
        OSError: no descriptor is left to try it with.
    """
    global _met
    if _met:
        return
    if not sys.platform.startswith("linux"):
        raise WhitepoolError(f"whitepool_mp needs Linux 5.3 or newer; this is {sys.platform}")
    for name, purpose, attempt in _NEEDS:
        try:
            attempt()
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            remedy = _MOUNT if attempt is _proc else _ALLOW
            raise WhitepoolError(
                f"no pool can run here: {name} fails with {type(error).__name__}: {error}. It is "
                f"needed {purpose}. whitepool_mp takes Linux 5.3 or newer; {remedy}"
            ) from error
    _met = True


def _pidfd_open() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _pidfd_send_signal() -> None:
    fd = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(fd, 0)
    finally:
        os.close(fd)


def _memfd_create() -> None:
    os.close(os.memfd_create("whitepool-probe", os.MFD_CLOEXEC))


def _proc() -> None:
    for name in ("fd", "stat", "environ"):
        os.stat(f"/proc/self/{name}")


def _subreaper() -> None:
    prctl = libc.function("prctl")
    now, reference = libc.integer()
    failed = prctl(_PR_GET_CHILD_SUBREAPER, reference, 0, 0, 0)
    failed = failed or prctl(_PR_SET_CHILD_SUBREAPER, now.value, 0, 0, 0)  # to what it is
    if failed:
        error = libc.get_errno()
        raise OSError(error, os.strerror(error))


_NEEDS: tuple[tuple[str, str, Callable[[], None]], ...] = (
    ("/proc", "to find what a pool leaves behind, and to have workers end with their owner", _proc),
    ("pidfd_open", "to see that a process has ended, and not another by its number", _pidfd_open),
    ("pidfd_send_signal", "to signal a process, and not another by its number", _pidfd_send_signal),
    ("memfd_create", "for the memory that a pool's processes share", _memfd_create),
    ("prctl(PR_SET_CHILD_SUBREAPER)", "so that no child of a worker's escapes", _subreaper),
)


__all__ = ["require"]
