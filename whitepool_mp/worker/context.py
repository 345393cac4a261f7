"""Who am I? For code that runs in a worker: its slot, its pid, its pool."""

from __future__ import annotations

from whitepool_mp.errors import WhitepoolError
from whitepool_mp.records import Record


class WorkerContext(Record):
    """The worker that this code runs in.

    Attributes:
        slot: 0 to pool_size + max_overflow - 1; unique among the living workers of the pool and
            inherited by a replacement. Pin a GPU or a CPU by it.
        pid: the worker's process id.
        pool: the pool's name.
    """

    slot: int
    pid: int
    pool: str


_current: WorkerContext | None = None


def current_worker() -> WorkerContext:
    """The worker that the calling code runs in (in a factory, a call or a teardown).

    Raises:
        WhitepoolError: this process is not a worker of a pool.
    """
    if _current is None:
        raise WhitepoolError(
            "current_worker() was called outside a worker process: it answers only in a factory, "
            "in a teardown and in functions that a pool runs"
        )
    return _current


def _set(context: WorkerContext) -> None:
    global _current
    _current = context
