"""What the pool's processes have from their owner, as it was when the pool started.

It is read once, so a worker that replaces another one, and a worker of a manager that took over,
have the same. (What the kernel hands down to each process besides, such as the umask, is what the
owner's thread had when it started that manager.) Paths and texts may be of any kind that the
standard library takes; other processes are told exact strings.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Any

from whitepool_mp.config import PoolConfig, exact_text, worker_env
from whitepool_mp.wire import boot as boots
from whitepool_mp.wire.boot import Family


def environment(config: PoolConfig) -> dict[str, str]:
    """The environment: this process's, and on top what the pool's options say.

    The manager is started with it, and so are all that it starts: what an interpreter, the C
    library or the loader reads at a start has effect in workers, also in those that are forked.
    """
    result = {**os.environ, **worker_env(config)}
    result.pop(boots.STARTING, None)  # the pool's own business, as is `boots.MARKER`
    return result


def search_path(config: PoolConfig) -> list[str]:
    """What `sys.path` is to be.

    The entries of a `PYTHONPATH` among the pool's options come first: the workers' path is this
    process's, and it would have no effect otherwise. An entry that is no path at all is left out,
    as imports pass it over.
    """
    path = worker_env(config).get("PYTHONPATH", "")
    first = [] if sys.flags.ignore_environment else path.split(os.pathsep) if path else []
    return [_absolute(_text(entry)) for entry in (*first, *sys.path) if _is_path(entry)]


def arguments() -> list[str]:
    """What `sys.argv` is to be; an embedded interpreter may have none."""
    given = getattr(sys, "argv", [""])
    return [_text(entry) if _is_path(entry) else str(entry) for entry in given]


def descriptor_limit() -> int:
    """The soft limit of open files; the manager raises its own."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def family() -> Family:
    """What `multiprocessing` is to say in a worker.

    It is imported for that: the key is made when it is, and the key of a worker must be the one
    that a `Manager` has which is started here later.
    """
    import multiprocessing

    me = multiprocessing.current_process()
    level, to_stderr = _logging()
    return (
        bytes(me.authkey),
        exact_text(me.name),
        multiprocessing.get_start_method(allow_none=True),
        level,
        to_stderr,
    )


def _logging() -> tuple[int, bool]:
    """The level of multiprocessing's logger (0 if it has none), and whether it goes to stderr."""
    logging = sys.modules.get("logging")
    if logging is None:
        return 0, False
    logger = logging.getLogger("multiprocessing")
    return int(logger.level), any(type(h) is logging.StreamHandler for h in logger.handlers)


def _is_path(entry: Any) -> bool:
    return isinstance(entry, (str, bytes, os.PathLike))


def _text(entry: str | bytes | os.PathLike[Any]) -> str:
    return exact_text(os.fsdecode(entry))


def _absolute(entry: str) -> str:
    """An empty entry stands for the working directory, which may be another one later."""
    if entry == "":
        with contextlib.suppress(FileNotFoundError):  # it was deleted
            return os.getcwd()
    return entry
