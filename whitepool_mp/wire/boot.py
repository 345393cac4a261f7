"""What a fresh interpreter is told when it starts: one anonymous memory file, no pipe to wait on.

The owner writes it for the manager; with `start_method="loky"` the nursery hands the same file to
each worker. Everything in it is plain data (`marshal`: both sides are the same interpreter); the
user's factory and teardown are opaque bytes, which only a worker unpickles.
"""

from __future__ import annotations

import marshal
import os
import sys
from typing import Any, NamedTuple


class Boot(NamedTuple):
    """Everything that the manager, the nursery and the workers must know from the start."""

    pool_id: str
    name: str
    key: bytes
    owner: int
    folder: str
    policy: tuple[Any, ...]
    start_method: str
    preload: tuple[str, ...]
    env: dict[str, str]
    factory: bytes | None
    teardown: bytes | None
    sys_path: list[str]
    argv: list[str]


MARKER = "WHITEPOOL_POOL"
"""Environment variable that every process of a pool, and what those start, is born with."""


def write(boot: Boot) -> int:
    """Put it into an anonymous memory file and return the descriptor (close-on-exec)."""
    fd = os.memfd_create("whitepool-boot", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(marshal.dumps(tuple(boot)))
    return fd


def read(fd: int) -> Boot:
    """What `write` put there. Several processes may read the same file."""
    size = os.fstat(fd).st_size
    data = bytearray()
    while len(data) < size:
        data += os.pread(fd, min(size - len(data), 1 << 30), len(data))
    return Boot(*marshal.loads(data))


def command(fd: int, module: str, *numbers: int) -> list[str]:
    """The command line of a fresh interpreter that runs `module`'s `main(fd, *numbers)`.

    The owner's `sys.path` is in place before anything of ours is imported, and `__main__` is never
    the owner's script. Importing goes without garbage collection, which would find nothing.
    """
    import subprocess

    args = ", ".join(str(number) for number in (fd, *numbers))
    code = (
        "import gc, marshal, os, sys; gc.disable(); "
        f"n = os.fstat({fd}).st_size; d = b''\n"
        f"while len(d) < n: d += os.pread({fd}, min(n - len(d), 1 << 30), len(d))\n"
        f"sys.path[:] = marshal.loads(d)[{Boot._fields.index('sys_path')}]; del d\n"
        f"from {module} import main; main({args})"
    )
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]
