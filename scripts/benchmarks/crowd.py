"""What a checkout and its checkin cost, alone and in a crowd; in the real pool and in its core."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from typing import Any

from benchmarks.footprint import cpu_seconds

_FILL_SECONDS = 60.0


def alone(pool: Any, count: int, what: str) -> float:
    """Microseconds for a checkout and its checkin, with one client and nobody else.

    Args:
        pool: ours.
        count: how many.
        what: "wall" time here, or "manager": the manager's CPU time.
    """
    session = pool.session
    manager = _manager(pool)
    cpu = cpu_seconds([manager])
    start = time.perf_counter()
    for _ in range(count):
        session.checkin(session.checkout())
    elapsed = time.perf_counter() - start
    used = cpu_seconds([manager]) - cpu
    return (used if what == "manager" else elapsed) / count * 1e6


def crowded(pool: Any, threads: int, waiters: int, each: int, what: str) -> float:
    """The same in a crowd: every worker is held until all wait, then they are let go.

    Args:
        pool: ours.
        threads: how many client threads check out and in.
        waiters: how many asyncio checkouts wait besides.
        each: how often each thread does it.
        what: as for `alone`.
    """
    session = pool.session
    manager = _manager(pool)
    _wait(lambda: session.status().available == pool.workers)
    held = [session.checkout() for _ in range(pool.workers)]

    def client() -> None:
        for _ in range(each):
            session.checkin(session.checkout(timeout=None))

    async def wait_in_line(form: Any) -> None:
        async with form.checkout(timeout=None):
            pass

    async def line() -> None:
        form = session.aio()
        await asyncio.gather(*(wait_in_line(form) for _ in range(waiters)))

    crowd = [threading.Thread(target=client, daemon=True) for _ in range(threads)]
    crowd.append(threading.Thread(target=asyncio.run, args=(line(),), daemon=True))
    for thread in crowd:
        thread.start()
    _wait(lambda: session.status().waiting >= waiters + threads)
    cpu = cpu_seconds([manager])
    start = time.perf_counter()
    for lease in held:
        session.checkin(lease)
    for thread in crowd:
        thread.join()
    elapsed = time.perf_counter() - start
    used = cpu_seconds([manager]) - cpu
    return (used if what == "manager" else elapsed) / (threads * each + waiters) * 1e6


def _manager(pool: Any) -> int:
    import psutil

    with pool.session.checkout() as lease:
        parent = psutil.Process(lease.pid).ppid()
    if parent == os.getpid():
        raise AssertionError("the workers' parent is not a manager")
    return parent


def _wait(condition: Any) -> None:
    deadline = time.monotonic() + _FILL_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the crowd did not gather")
        time.sleep(0.05)


def core(pool: Any, workers: int, clients: int, waiters: int, count: int) -> float:
    """Microseconds for a checkout and its checkin in the broker alone, without any I/O.

    Args:
        pool: ours, not used.
        workers: how many it keeps.
        clients: how many take turns.
        waiters: how long the queue is, all the time.
        count: how many.
    """
    from whitepool_mp.broker import Broker, Checkin, Checkout, Grant, Spawn, Start, WorkerReady
    from whitepool_mp.config import Policy

    broker = Broker(Policy(pool_size=workers, max_overflow=0))
    for effect in broker.step(Start(), 0.0):
        if isinstance(effect, Spawn):
            broker.step(WorkerReady(effect.worker), 0.0)
    leases: deque[tuple[int, int]] = deque()
    tickets = iter(range(1, 10**9))

    def check_out(now: float) -> None:
        number = next(tickets)
        event = Checkout(number % clients, number, True, None)
        for effect in broker.step(event, now):
            if type(effect) is Grant:
                leases.append((effect.client, effect.lease))

    def check_in(now: float) -> None:
        client, lease = leases.popleft()
        for effect in broker.step(Checkin(client, lease), now):
            if type(effect) is Grant:
                leases.append((effect.client, effect.lease))

    if waiters:
        for _ in range(workers + waiters):
            check_out(1.0)
    start = time.perf_counter()
    for turn in range(count):
        check_out(2.0 + turn * 1e-5)
        check_in(2.0 + turn * 1e-5)
    return (time.perf_counter() - start) / count * 1e6
