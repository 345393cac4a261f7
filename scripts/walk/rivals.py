"""One way to submit a job to each contestant of `scripts/bench`, and to wait for its end."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

from benchmarks.adapter import Adapter
from benchmarks.ours import Whitepool
from benchmarks.peers import Executor, Mpire, Pebble, StandardPool

NAMES = {
    "whitepool_mp": "whitepool",
    "ProcessPoolExecutor": "ppe-fork",
    "loky": "loky",
    "multiprocessing.Pool": "mp-pool",
    "billiard.Pool": "billiard",
    "pebble.ProcessPool": "pebble",
    "mpire.WorkerPool": "mpire",
}
"""What takes part: the names in the table, and those of `benchmarks.contestant`."""


def submit(pool: Adapter, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Have a call made in the background; its handle."""
    if isinstance(pool, Whitepool):
        return pool.session.submit(fn, *args)
    if isinstance(pool, Executor):
        return pool.executor.submit(fn, *args)
    if isinstance(pool, Pebble):
        return pool.pool.schedule(fn, args=args)
    if isinstance(pool, (StandardPool, Mpire)):
        return pool.pool.apply_async(fn, args)
    raise TypeError(f"{type(pool).__name__} has no way to submit a job")


def ended(handle: Any, seconds: float) -> bool:
    """Wait for the end of a call, for so long at most; whether it came."""
    if isinstance(handle, concurrent.futures.Future):
        return bool(concurrent.futures.wait([handle], seconds).done)
    handle.wait(seconds)
    return bool(handle.ready())


def outcome(handle: Any) -> Any:
    """The result of a call that has ended, or its exception."""
    try:
        if isinstance(handle, concurrent.futures.Future):
            return handle.result(0)
        return handle.get(0)
    except BaseException as error:  # a future may have been cancelled
        return error


def declares_broken(error: Any) -> bool:
    """Whether this end of a job says that the pool takes no more."""
    return isinstance(error, concurrent.futures.BrokenExecutor)
