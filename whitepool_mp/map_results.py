"""The results of a map: put in order, and handed out one by one to a blocking caller."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, TimeoutError
from typing import Any

from whitepool_mp.jobs import MapJob


class Ordering:
    """Puts results back in the order of their inputs, or hands them out as they come."""

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._early: dict[int, tuple[bool, list[Any], int]] = {}
        self._next = 0

    def add(self, index: int, returned: bool, values: list[Any], size: int) -> None:
        """Results came."""
        self._early[index] = (returned, values, size)

    def pop(self) -> tuple[bool, list[Any], int] | None:
        """The next results to hand out, if they are there."""
        if not self._ordered:
            return self._early.pop(next(iter(self._early))) if self._early else None
        found = self._early.pop(self._next, None)
        if found is not None:
            self._next += len(found[1])
        return found


def iterate(
    job: MapJob,
    ordered: bool,
    return_exceptions: bool,
    bar: Any,
    deadline: float | None = None,
) -> Iterator[Any]:
    """The results of a map, for a blocking caller; they are counted from now on.

    Raises:
        concurrent.futures.TimeoutError: a result had not come by the deadline, on the monotonic
            clock.
    """
    signals: queue.SimpleQueue[None] = queue.SimpleQueue()
    job.notify = lambda: signals.put(None)
    job.ordered = ordered
    return _iterate(job, signals, ordered, return_exceptions, bar, deadline)


def _iterate(
    job: MapJob,
    signals: queue.SimpleQueue[None],
    ordered: bool,
    return_exceptions: bool,
    bar: Any,
    deadline: float | None,
) -> Iterator[Any]:
    ordering = Ordering(ordered)
    try:
        while True:
            job.feed()
            if job.done:
                return
            if job.is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            while (found := ordering.pop()) is None:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    signals.get(timeout=left)
                except queue.Empty:
                    job.close(running=True)
                    raise TimeoutError(
                        f"a result of {job.name} had not come in time; the map was given up, and "
                        "the workers of its calls that were running are being replaced"
                    ) from None
                result = job.take()
                if result is not None:
                    ordering.add(*result)
                    if bar is not None:
                        bar.update(len(result[2]))
                elif job.cut_short:
                    raise CancelledError
                job.feed()
            returned, values, size = found
            job.hand_out(len(values), size)
            # The only reference to a value is the taker's, also while this waits.
            if not returned and not return_exceptions:
                raise values.pop()
            if len(values) == 1:
                yield values.pop()
            else:
                yield from values
    finally:
        job.close()
        if bar is not None:
            bar.close()
