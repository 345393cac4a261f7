"""The user's `preload` modules, imported in the process that workers are forked from.

A fork copies one thread. A worker would have none of the others, and what they hold stays locked in
it, so a module that leaves threads behind is refused by name, and not found out by a call that
hangs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import sys
import time

_MOMENT = 1.0
"""How long a thread may take to end, in seconds, when it has run its code."""
_PF_EXITING = 4


def load(modules: tuple[str, ...]) -> str:
    """Import modules.

    Args:
        modules: their names.

    Returns:
        What was wrong with one of them; empty if nothing was.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:
            import traceback

            return f"preload of {name!r} failed:\n{traceback.format_exc()}"
        threads = _threads_left()
        if threads:
            return (
                f"preload of {name!r} left threads in the process that workers are forked from: "
                f"{threads}. No worker would have them, and what they hold (a lock, for instance) "
                "would stay so for ever. Take it out of preload, have it start them when it is "
                "first used, or use start_method='loky'"
            )
    return ""


def _threads_left() -> str:
    """Name the threads of this process that a forked one would miss; empty if there are none.

    Some libraries end their threads for a fork, and start others after it (OpenBLAS does, and so
    NumPy): those that outlast a fork belong to a library that does not.
    """
    if _count_threads() == 1:
        return ""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    # A Python thread counts as ended, and is joined, a moment before it has; nothing tells when.
    deadline = time.monotonic() + _MOMENT
    while (count := _count_threads() - 1) and time.monotonic() < deadline:
        select.poll().poll(1)
    if not count:
        return ""
    threading = sys.modules.get("threading")
    names = []
    if threading is not None:
        main = threading.main_thread()
        names = [repr(each.name) for each in threading.enumerate() if each is not main]
    if count > len(names):
        names.append(f"{count - len(names)} that Python did not start")
    return ", ".join(names)


def _count_threads() -> int:
    """How many threads of this process have not begun to end.

    Source: proc(5), /proc/pid/stat, field 9: PF_EXITING, which a thread has before it is joined.
    """
    count = 0
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            with open(f"/proc/self/task/{thread}/stat", "rb") as file:
                count += not int(file.read().rpartition(b")")[2].split()[6]) & _PF_EXITING
    return count
