"""Bursts: many threads, or tasks of an event loop, that each want one call at the same moment."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from benchmarks import jobs
from benchmarks.adapter import Adapter

_SECONDS = 120.0


def threads(pool: Adapter, count: int, way: str = "call") -> float:
    """Milliseconds until each of many waiting threads has called a no-op once.

    Args:
        pool: the contestant.
        count: how many threads.
        way: "call", as for one call at a time; "submit", and wait for the future (ours alone).
    """
    call = _submit(pool) if way == "submit" else pool.call
    gate, there, done = threading.Event(), threading.Semaphore(0), threading.Semaphore(0)
    answers: list[int] = []

    def one() -> None:
        there.release()
        gate.wait()
        try:
            answers.append(call(jobs.noop))
        finally:
            done.release()

    crowd = [threading.Thread(target=one, daemon=True) for _ in range(count)]
    for thread in crowd:
        thread.start()
    _take(there, count)
    start = time.perf_counter()
    gate.set()
    _take(done, count)
    elapsed = time.perf_counter() - start
    for thread in crowd:
        thread.join()
    if len(answers) != count:
        raise AssertionError(f"{len(answers)} answers to {count} calls")
    return elapsed * 1e3


def tasks(pool: Adapter, count: int) -> float:
    """Milliseconds until so many no-ops, all awaited at once, have been answered."""
    loop = getattr(pool, "loop", None)
    if loop is None:
        loop = asyncio.new_event_loop()
        pool.loop = loop  # type: ignore[attr-defined]
    start = time.perf_counter()
    loop.run_until_complete(pool.gather(jobs.noop, count))
    return (time.perf_counter() - start) * 1e3


def _submit(pool: Any) -> Any:
    submit = pool.session.submit
    return lambda fn: submit(fn).result()


def _take(semaphore: threading.Semaphore, count: int) -> None:
    deadline = time.monotonic() + _SECONDS
    for _ in range(count):
        if not semaphore.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError("the burst did not end")
