"""What is measured of a contestant that works as it should. Each function gives one figure."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks import jobs
from benchmarks.adapter import Adapter

_TAIL_LONGEST = 0.2
_checked: set[Adapter] = set()
"""Contestants whose arrays have been compared; once each, since that takes as long as a call."""


def round_trip(pool: Adapter, count: int) -> float:
    """Microseconds for one call of a no-op, one after the other."""
    call, noop = pool.call, jobs.noop
    for _ in range(20):
        call(noop)
    start = time.perf_counter()
    for _ in range(count):
        call(noop)
    return (time.perf_counter() - start) / count * 1e6


def lease_call(pool: Any, count: int) -> float:
    """Microseconds for one call of a no-op on a worker that is checked out. Ours alone has it."""
    noop = jobs.noop
    with pool.session.checkout() as lease:
        for _ in range(20):
            lease.call(noop)
        start = time.perf_counter()
        for _ in range(count):
            lease.call(noop)
        return float((time.perf_counter() - start) / count * 1e6)


def many(pool: Adapter, count: int, noop: Callable[[], Any] = jobs.noop) -> float:
    """Thousands of no-ops in a second: submit all, then take all results."""
    arguments: list[tuple[Any, ...]] = [()] * count
    start = time.perf_counter()
    results = pool.many(noop, arguments)
    elapsed = time.perf_counter() - start
    if len(results) != count:
        raise AssertionError(f"{len(results)} results of {count} calls")
    return count / elapsed / 1e3


def many_by_value(pool: Adapter, count: int) -> float:
    """The same of a function that has to be pickled by value."""
    return many(pool, count, lambda: None)


def map_noops(pool: Adapter, count: int, parts: int | None = None) -> float:
    """Thousands of no-ops in a second by an ordered map.

    Args:
        pool: the contestant.
        count: how many.
        parts: cut them into so many chunks (0: chunks of one); None for the contestant's default.
    """
    items = range(count)
    chunksize = None if parts is None else max(1, count // parts) if parts else 1
    start = time.perf_counter()
    results = pool.map(abs, items, chunksize)
    elapsed = time.perf_counter() - start
    if results != list(items):
        raise AssertionError("the results are not those of the items, in their order")
    return count / elapsed / 1e3


def map_sleeps(pool: Adapter, count: int, seconds: float) -> float:
    """The share of the ideal: what the jobs take on the workers, by what the map took."""
    return _efficiency(pool, [seconds] * count)


def map_tail(pool: Adapter, count: int, seed: int = 13) -> float:
    """The same for jobs of very different length: the same list for everybody, as drawn."""
    return _efficiency(pool, heavy_tail(count, seed))


def heavy_tail(count: int, seed: int) -> list[float]:
    """Seconds, from a Pareto distribution with a mean of about 2 ms, cut at 200 ms."""
    draw = random.Random(seed)
    return [min(_TAIL_LONGEST, 0.00055 * draw.paretovariate(1.3)) for _ in range(count)]


def _efficiency(pool: Adapter, sleeps: list[float]) -> float:
    start = time.perf_counter()
    results = pool.map(jobs.last, sleeps, None)
    elapsed = time.perf_counter() - start
    if len(results) != len(sleeps):
        raise AssertionError(f"{len(results)} results of {len(sleeps)} items")
    return sum(sleeps) / pool.workers / elapsed


def array(pool: Adapter, mebibytes: int, count: int) -> float:
    """Megabytes a second of an array there and back, both directions counted."""
    import numpy

    sent = numpy.arange(mebibytes * 2**20 // 8, dtype=numpy.int64)
    if pool not in _checked:
        if not numpy.array_equal(sent, pool.call(jobs.echo, sent)):
            raise AssertionError("what came back is not what was sent")
        _checked.add(pool)
    back = pool.call(jobs.echo, sent)  # as in other rows: not the first one after a pause
    del back
    start = time.perf_counter()
    for _ in range(count):
        back = pool.call(jobs.echo, sent)
        del back
    elapsed = time.perf_counter() - start
    return 2 * sent.nbytes * count / elapsed / 1e6


def payload(pool: Adapter, size: int, count: int) -> float:
    """Microseconds for so many bytes there and back."""
    data = bytes(range(256)) * (size // 256)
    for _ in range(3):
        if pool.call(jobs.echo, data) != data:
            raise AssertionError("what came back is not what was sent")
    start = time.perf_counter()
    for _ in range(count):
        pool.call(jobs.echo, data)
    return (time.perf_counter() - start) / count * 1e6


def gather(pool: Adapter, count: int) -> float:
    """Thousands of no-ops in a second, all awaited at once."""
    loop = getattr(pool, "loop", None)
    if loop is None:
        loop = asyncio.new_event_loop()
        pool.loop = loop  # type: ignore[attr-defined]
    start = time.perf_counter()
    loop.run_until_complete(pool.gather(jobs.noop, count))
    return count / (time.perf_counter() - start) / 1e3


def import_time(pool: Adapter) -> float:
    """Milliseconds to import the contestant, in a bare interpreter."""
    start = time.perf_counter()
    pool.load()
    return (time.perf_counter() - start) * 1e3


def first_result(pool: Adapter) -> float:
    """Milliseconds from the constructor to the first result, after the import."""
    pool.load()
    start = time.perf_counter()
    pool.start()
    pool.call(jobs.noop)
    return (time.perf_counter() - start) * 1e3
