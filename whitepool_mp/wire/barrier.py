"""Memory ordering between two processes, paid for by the one that seldom needs it.

Two processes that each write a word and then read the other's may both read the old one: processors
delay writes. One side (the manager, a client) asks the kernel to run a memory barrier on every
processor that runs a process which has registered; the other side (the worker, for each call it
begins) needs none of its own.

Source: membarrier(2), MEMBARRIER_CMD_GLOBAL_EXPEDITED (Linux 4.16).
"""

from __future__ import annotations

import os

from whitepool_mp.wire import libc

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable

_GLOBAL_EXPEDITED = 1 << 1
_REGISTER_GLOBAL_EXPEDITED = 1 << 2
_NUMBERS = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}


_syscall: Callable[..., int] | None = None


def _call(command: int) -> bool:
    """Make the system call; whether that could be done. Not where its number is not known."""
    global _syscall
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        return False
    if _syscall is None:
        _syscall = libc.function("syscall")
    return _syscall(number, command, 0, 0) == 0


def register() -> bool:
    """Take part in the barriers that others issue; whether that could be done."""
    return _call(_REGISTER_GLOBAL_EXPEDITED)


def issue() -> bool:
    """Have every processor that runs a registered process pass a barrier; whether it did."""
    return _call(_GLOBAL_EXPEDITED)
