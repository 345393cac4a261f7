"""The interpreter that the pool's processes are started with, and the proof that it is one.

    choose() --command line--> the owner starts a manager with it --> Proof.wait()

`sys.executable` may be an application that Python is embedded in, or was frozen into, which ignores
what it is told to run, and starts anew, pool and all. So nobody starts what says that it is frozen,
the first manager has to prove itself before anything more is started, and an application that was
started in place of an interpreter (its environment says so) starts none.
"""

from __future__ import annotations

import fcntl
import os
import select
import subprocess
import sys
import time

from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import boot as boots

_PROOF_SECONDS = 60.0
"""How long an interpreter may take to come to its first line."""


def choose() -> list[str]:
    """How the command line of an interpreter begins that is like this one, flags included.

    Raises:
        WhitepoolError: there is none.
    """
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    remedy = (
        f"call multiprocessing.set_executable() with the path of a Python {version} interpreter "
        "before the pool is started"
    )
    if boots.STARTING in os.environ:
        raise WhitepoolError(
            "this process was itself started as the Python interpreter of a pool's manager, but is "
            f"an application (sys.executable is {sys.executable!r}): in the application, {remedy}"
        )
    spawn = sys.modules.get("multiprocessing.spawn")  # without it, nobody has set one
    chosen = spawn.get_executable() if spawn is not None else None
    path = os.fsdecode(chosen or sys.executable or "")
    if not path:
        raise WhitepoolError(
            "a pool needs a Python interpreter to start its processes with, and sys.executable is "
            f"{sys.executable!r}, as in an application that embeds Python: {remedy}"
        )
    if getattr(sys, "frozen", False) and path == sys.executable:
        raise WhitepoolError(
            "a pool needs a Python interpreter to start its processes with, and sys.executable, "
            f"{path!r}, is a frozen application (sys.frozen is set), which would start itself "
            f"again: {remedy}"
        )
    return [_found(path, remedy), *_flags()]


def _found(path: str, remedy: str) -> str:
    """The absolute path of a program; a later `chdir` or `PATH` makes no difference to it.

    Whether it may be run is for the kernel to say: `os.access` does not count capabilities.
    """
    found: str | None = path
    if os.sep not in path:
        import shutil

        found = shutil.which(path)
    if found is None or not os.path.isfile(found):
        raise WhitepoolError(
            f"a pool needs a Python interpreter to start its processes with, and {path!r} "
            "(sys.executable, or what multiprocessing.set_executable() was given) is no program: "
            f"{remedy}"
        )
    return os.path.abspath(found)


def _flags() -> list[str]:
    """The options that this interpreter was started with, -X options of any name included."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    for name, value in getattr(sys, "_xoptions", {}).items():
        text = name if value is True else f"{name}={value}"
        if text not in flags:
            flags += ["-X", text]
    return flags


class Proof:
    """That a process is an interpreter that runs what it was told to: it writes a byte.

    Attributes:
        fd: the descriptor to which it does; the process has to inherit it.
    """

    def __init__(self) -> None:
        self._read, end = os.pipe2(os.O_CLOEXEC)
        try:
            # Clear of the numbers of standard streams, which this process may have closed.
            self.fd = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3)
        except BaseException:
            os.close(self._read)
            raise
        finally:
            os.close(end)

    def wait(self, pidfd: int, command: list[str]) -> None:
        """Wait for the proof.

        Args:
            pidfd: the process.
            command: how its command line began.

        Raises:
            WhitepoolError: it has ended without, or does not come to it.
        """
        os.close(self.fd)
        self.fd = -1
        poller = select.poll()
        poller.register(self._read, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        began = time.monotonic()
        ready = dict(poller.poll(_PROOF_SECONDS * 1000))
        if ready.get(self._read, 0) & select.POLLIN:
            return
        if pidfd in ready or self._read in ready:
            what = "ended, or closed what it was given, before it ran what it was told to"
        else:
            what = f"did not run what it was told to within {time.monotonic() - began:.0f} s"
        raise WhitepoolError(
            f"{command[0]!r} (sys.executable, or what multiprocessing.set_executable() was given) "
            f"was started as a Python interpreter and {what}. If it is an application, call "
            "multiprocessing.set_executable() with the path of a Python "
            f"{sys.version_info[0]}.{sys.version_info[1]} interpreter; if it is an interpreter, "
            "what it wrote to standard error says more (a variable in its environment, or in the "
            f"pool's env=, may keep it from starting). Its options were {command[1:]}"
        )

    def close(self) -> None:
        """Close this process's ends."""
        for fd in (self._read, self.fd):
            if fd >= 0:
                os.close(fd)
        self._read = self.fd = -1
