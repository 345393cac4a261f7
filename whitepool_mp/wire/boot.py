"""What a fresh interpreter is told when it starts: one anonymous memory file, no pipe to wait on.

The owner writes it for the manager; with `start_method="loky"` the nursery hands the same file to
each worker. Everything in it is plain data (`marshal`: both sides are the same interpreter); the
user's factory and teardown are opaque bytes, which only a worker unpickles.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False  # `typing` is half of what a manager would import before its first fork
if TYPE_CHECKING:
    from typing import Any

    Family = tuple[bytes, str, str | None, int, bool]
    """What `multiprocessing` has from the owner: the key, the owner's name, the start method if one
    was set, the level of its logger, and whether that goes to standard error."""
else:
    Family = tuple


class Boot:
    """Everything that the manager, the nursery and the workers must know from the start."""

    def __init__(
        self,
        sys_path: list[str],
        pool_id: str,
        name: str,
        key: bytes,
        owner: int,
        folders: tuple[str, ...],
        policy: tuple[Any, ...],
        start_method: str,
        preload: tuple[str, ...],
        factory: bytes | None,
        teardown: bytes | None,
        argv: list[str],
        interpreter: list[str],
        descriptor_limit: int,
        family: Family,
        stock: int = -1,
    ) -> None:
        self.sys_path = sys_path
        self.pool_id = pool_id
        self.name = name
        self.key = key
        self.owner = owner
        self.folders = folders
        self.policy = policy
        self.start_method = start_method
        self.preload = preload
        self.factory = factory
        self.teardown = teardown
        self.argv = argv
        self.interpreter = interpreter
        self.descriptor_limit = descriptor_limit
        self.family = family
        self.stock = stock  # the manager's number of the descriptors for the factory (`passed`)


_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder that this package is in."""

MARKER = "WHITEPOOL_POOL"
"""Environment variable that every process of a pool, and what those start, is born with."""

STARTING = "WHITEPOOL_STARTING"
"""Environment variable of what is started as a first manager, until that has proven to be one."""


def write(boot: Boot) -> int:
    """Put it into an anonymous memory file and return the descriptor (close-on-exec)."""
    fd = os.memfd_create("whitepool-boot", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(marshal.dumps(tuple(vars(boot).values())))
    return fd


def read(fd: int) -> Boot:
    """What `write` put there. Several processes may read the same file."""
    size = os.fstat(fd).st_size
    data = bytearray()
    while len(data) < size:
        data += os.pread(fd, min(size - len(data), 1 << 30), len(data))
    return Boot(*marshal.loads(data))


def command(
    interpreter: list[str],
    fd: int,
    module: str,
    *numbers: int,
    site: bool = True,
    proof: int = -1,
) -> list[str]:
    """The command line of a fresh interpreter that runs `module`'s `main(fd, *numbers)`.

    The owner's `sys.path` (the first thing in the file) is in place before anything of ours is
    imported, and `__main__` is never the owner's script. Importing goes without garbage collection,
    which would find nothing.

    Args:
        interpreter: how the command line begins, as `Boot.interpreter`.
        fd: the memory file.
        module: whose `main` to run.
        numbers: what else to call it with.
        site: whether it does what `site` does, which takes a quarter of its start: `.pth` files and
            `sitecustomize` are run. Whatever is to run the user's code has to.
        proof: a descriptor to write a byte to first of all, or -1.
    """
    flags = [] if site else ["-S"]
    # Without `site` there are no import hooks of an editable installation to find this package by.
    more = "" if site else f"sys.path.append({_ROOT!a})\n"
    args = ", ".join(str(number) for number in (fd, *numbers))
    version = sys.version.split()[0]
    prove = (
        f"os.environ.pop({STARTING!r}, None)\n"
        # Where the owner is dead by now, this process is the one that removes what it has made.
        f"try: os.write({proof}, b'!'); os.close({proof})\n"
        f"except BrokenPipeError: os.close({proof})\n"
        if proof >= 0
        else ""
    )
    code = (
        "import gc, marshal, os, sys; gc.disable()\n"
        f"if sys.hexversion >> 16 != {sys.hexversion >> 16}:"
        f" sys.exit('whitepool_mp: ' + sys.executable + ' is no Python {version}')\n"
        f"{prove}"
        f"n = os.fstat({fd}).st_size; d = b''\n"
        f"while len(d) < n: d += os.pread({fd}, min(n - len(d), 1 << 30), len(d))\n"
        f"sys.path[:] = marshal.loads(d)[0]; del d\n{more}"
        f"from {module} import main; main({args})"
    )
    return [*interpreter, *flags, "-c", code]
