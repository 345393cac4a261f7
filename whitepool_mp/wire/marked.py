"""Finding what is left of a pool by the marker that all its processes are born with.

What a worker left behind may have detached itself from every other trace of the pool; its
environment at birth still tells.
"""

from __future__ import annotations

import contextlib
import os

from whitepool_mp.wire import boot as boots

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable, Collection


def kill(
    pool_id: str,
    living: Collection[int] = (),
    spared: Callable[[int], bool] = lambda _: False,
) -> None:
    """SIGKILL to every process born with a pool's marker, but not to this one.

    It ends with a pass that finds nobody new.

    Args:
        pool_id: the pool's, as in the marker.
        living: the pids of those that are to be left alone, with whatever descends from them.
        spared: whether the process with a pid, which descends from none of these, is to be as well.
    """
    import psutil

    killed: set[psutil.Process] = {psutil.Process()}
    while True:
        parents: dict[int, int] = {}
        marked: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # it has ended, or is another user's
                parents[process.pid] = process.ppid()
                if process not in killed and process.environ().get(boots.MARKER) == pool_id:
                    marked.append(process)
        found = set()
        for process in marked:
            pid: int | None = process.pid
            while pid and pid not in living:
                pid = parents.get(pid)
            if not pid and process.pid != os.getpid() and not spared(process.pid):
                with contextlib.suppress(psutil.Error):  # it has ended (this asks which it is)
                    process.kill()
                    found.add(process)
        if not found:
            return
        killed |= found
