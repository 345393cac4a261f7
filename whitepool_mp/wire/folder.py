"""A pool's folder: what there is to remove of it, by whoever comes to it first.

In it there is at most the socket by which the manager is reached. The owner makes it
(`client.folder`), and holds a lock of it for as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "whitepool-"
SOCKET = "manager"


def remove(folders: Iterable[str]) -> None:
    """Remove a pool's folder, wherever of these it is.

    It takes no descriptor, which `shutil.rmtree` would: there may be none left.
    """
    for folder in folders:
        for end, path in ((os.unlink, os.path.join(folder, SOCKET)), (os.rmdir, folder)):
            with contextlib.suppress(OSError):  # somebody was quicker, or it is elsewhere
                end(path)


def sweep(base: str) -> None:
    """Remove the folders of this user's pools that were killed at one stroke, with all that would
    have removed them.

    An owner binds the socket when it has locked the folder, so a folder with a socket and without a
    lock is nobody's.

    Args:
        base: where to look.
    """
    with contextlib.suppress(OSError):  # it cannot be read, or no descriptor is left
        with os.scandir(base) as entries:
            for entry in entries:
                if entry.name.startswith(PREFIX):
                    _remove_if_dead(entry.path)


def _remove_if_dead(folder: str) -> None:
    with contextlib.suppress(OSError):  # it lives; or it is no folder, or not ours to enter
        if os.lstat(folder).st_uid != os.geteuid():
            return
        os.lstat(os.path.join(folder, SOCKET))
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove((folder,))
        finally:
            os.close(fd)
