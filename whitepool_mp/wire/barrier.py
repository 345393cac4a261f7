"""Memory ordering between two processes, paid for by the one that seldom needs it.

Two processes that each write a word and then read the other's may both read the old one: processors
delay writes. One side (the manager, a client) asks the kernel to run a memory barrier on every
processor that runs a process which has registered; the other side (the worker, for each call it
begins) needs none of its own.

Source: membarrier(2), MEMBARRIER_CMD_GLOBAL_EXPEDITED (Linux 4.16).
"""

from __future__ import annotations

import functools
import os

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable

_GLOBAL_EXPEDITED = 1 << 1
_REGISTER_GLOBAL_EXPEDITED = 1 << 2
_NUMBERS = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}


@functools.cache
def _call() -> Callable[[int], int] | None:
    """The system call, or None where its number is not known."""
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        return None
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return lambda command: int(syscall(number, command, 0, 0))


def register() -> bool:
    """Take part in the barriers that others issue; whether that could be done."""
    call = _call()
    return call is not None and call(_REGISTER_GLOBAL_EXPEDITED) == 0


def issue() -> bool:
    """Have every processor that runs a registered process pass a barrier; whether it did."""
    call = _call()
    return call is not None and call(_GLOBAL_EXPEDITED) == 0
