"""What happens after an idle worker was killed with SIGKILL."""

from __future__ import annotations

import os
import signal
import threading
import time

from benchmarks import jobs
from benchmarks.adapter import Adapter, Cannot, both_workers

_SETTLE = 0.05


def replacement(pool: Adapter) -> float:
    """Milliseconds from the kill of the only worker until another has answered."""
    for _ in range(5):
        pid = pool.call(os.getpid)
    time.sleep(_SETTLE)
    start = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    until_good(pool, pid, start)
    return (time.perf_counter() - start) * 1e3


def next_good(pool: Adapter) -> float:
    """Microseconds from the kill of one of two idle workers to the next good result."""
    both_by_threads(pool)
    pid = pool.call(os.getpid)
    time.sleep(_SETTLE)
    start = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    until_good(pool, pid, start)
    elapsed = time.perf_counter() - start
    try:
        both_workers(pool)  # whole again, before the next
    except Exception as error:
        raise Cannot(f"broken ({type(error).__name__}), after one more result") from None
    return elapsed * 1e6


def ordinary(pool: Adapter) -> float:
    """Microseconds of one call in a pool that nothing happened to, after the same preparations."""
    both_by_threads(pool)
    pool.call(os.getpid)
    time.sleep(_SETTLE)
    start = time.perf_counter()
    pool.call(os.getpid)
    return (time.perf_counter() - start) * 1e6


def until_good(pool: Adapter, dead: int, start: float) -> None:
    """Call until a call succeeds, in another process than the dead one.

    Raises:
        Cannot: nothing but errors came.
    """
    while True:
        try:
            if pool.call(os.getpid) != dead:
                return
        except Exception as error:
            if time.perf_counter() - start > pool.patience:
                raise Cannot(f"broken ({type(error).__name__})") from None
            time.sleep(0.0005)


def both_by_threads(pool: Adapter) -> None:
    """Two threads use the pool at once, so that each worker has been used."""
    threads = [threading.Thread(target=pool.call, args=(jobs.sleepy_pid, 0.01)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
