"""Take system calls away from this process, and from what it starts: for scripts of tests.

Source: seccomp(2), SECCOMP_SET_MODE_FILTER by way of prctl(2); linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

NUMBERS = {
    "x86_64": {
        "prctl": 157,
        "memfd_create": 319,
        "membarrier": 324,
        "pidfd_send_signal": 424,
        "pidfd_open": 434,
        "close_range": 436,
    },
    "aarch64": {
        "prctl": 167,
        "memfd_create": 279,
        "membarrier": 283,
        "pidfd_send_signal": 424,
        "pidfd_open": 434,
        "close_range": 436,
    },
}.get(platform.machine(), {})

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_PR_SET_CHILD_SUBREAPER = 36


def without(call: str, error: int) -> None:
    """From now on a system call fails; of `prctl` only PR_SET_CHILD_SUBREAPER.

    Raises:
        OSError: the kernel has no filters, or allows none.
    """
    steps = [(_LOAD, 0, 0, 0), (_EQUAL, 0, 3, NUMBERS[call])]  # the number, else to the end
    steps += [(_LOAD, 0, 0, 16)]  # its first argument, the lower half
    matters = _PR_SET_CHILD_SUBREAPER if call == "prctl" else None
    steps += [(_EQUAL, 0, 1, matters)] if matters else [(_EQUAL, 0, 0, 0)]
    steps += [(_RETURN, 0, 0, _ERRNO | error), (_RETURN, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = Program(len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or libc.prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(program), zero, zero
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
