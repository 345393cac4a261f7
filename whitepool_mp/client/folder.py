"""A pool's folder under the temporary directory, with the socket by which its manager is reached.

    owner --starts--> manager     which removes the folder when the owner has died, and
      '--makes--> folder          waits until it is there

In that order: whenever the owner is killed, somebody is there who removes what it made. What is
left of a pool all of whose processes were killed at one stroke, the next pool's manager sweeps
(`wire.folder`): nobody holds the lock of its folder any more. By the same lock (tmpfiles.d(5))
systemd's cleaner knows a folder in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys

from whitepool_mp.client.address import Address
from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire.folder import PREFIX, SOCKET, remove

_LONGEST_PATH = 100
"""A Unix socket's path has at most 107 bytes."""


def candidates(pool_id: str) -> tuple[str, ...]:
    """Where a pool's folder may come to be, the best first.

    It is where `tempfile` would put it, without the 3 ms that importing that takes.
    """
    chosen = getattr(sys.modules.get("tempfile"), "tempdir", None)
    wishes = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    found: list[str] = []
    for base in (chosen, *wishes, "/tmp", "/var/tmp"):
        if not base:
            continue
        with contextlib.suppress(FileNotFoundError):  # relative to a folder that is gone
            path = os.path.join(os.path.abspath(os.fsdecode(base)), f"{PREFIX}{pool_id[:16]}")
            if len(os.fsencode(path)) + len(f"/{SOCKET}") <= _LONGEST_PATH:
                found.append(path)
    return tuple(dict.fromkeys(found))


def listen(
    folders: tuple[str, ...], listener: socket.socket, stack: contextlib.ExitStack
) -> tuple[str, Address]:
    """Make a folder that only this user may enter, and listen there.

    Args:
        folders: where it may be.
        listener: the socket, which has no name yet.
        stack: what closes the descriptors by which this process holds both.

    Returns:
        The folder, and how to reach the socket.

    Raises:
        WhitepoolError: no folder can be made; or the socket in it, and the folder is removed.
    """
    folder = _make(folders)
    path = os.path.join(folder, SOCKET)
    try:
        os.chmod(folder, 0o700)  # whatever the umask
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, lock)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        listener.bind(path)  # after the lock: of a folder with a socket it is held, or was
        os.chmod(path, 0o600)
        listener.listen(4096)
        held = os.open(path, os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, held)
    except BaseException as error:
        remove((folder,))
        if isinstance(error, OSError):  # its disk is full
            raise WhitepoolError(
                f"the pool's socket could not be made in {folder}: {type(error).__name__}: {error}"
            ) from error
        raise
    return folder, Address(path, f"/proc/{os.getpid()}/fd/{held}")


def _make(folders: tuple[str, ...]) -> str:
    problem: OSError | None = None
    for folder in folders:
        try:
            os.mkdir(folder, 0o700)
        except OSError as error:
            problem = problem or error
        else:
            return folder
    raise WhitepoolError(f"there is no temporary folder to be had: {problem}") from problem
