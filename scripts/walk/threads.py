"""Clients that are threads, one kind each: run, submit, map, and checkout."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from walk import ends, jobs
from walk.client import Client, Job
from whitepool_mp import LeaseError, WhitepoolError
from whitepool_mp.lease import Lease

_WINDOW = 20
"""How many jobs a submitting client has under way."""


def by_run(client: Client) -> None:
    """One job after the other."""
    while client.goes_on():
        timeout, tight = client.timeout()
        job = client.draw("run", timeout, long=tight)
        try:
            result: Any = client.session.run(jobs.job, *job.arguments, timeout=timeout)
        except Exception as error:
            result = error
        client.ledger.close(job.number, ends.of_result(result, job.number, job.wanted))


def by_submit(client: Client) -> None:
    """A few dozen jobs in the background, of which some are cancelled, queued or running."""
    room = threading.Semaphore(_WINDOW)
    under_way: dict[int, Future[Any]] = {}

    def ended(job: Job, future: Future[Any]) -> None:
        if future.cancelled():
            end = ends.CANCELLED
        else:
            end = ends.of_result(future.exception() or future.result(), job.number, job.wanted)
        client.ledger.close(job.number, end)
        under_way.pop(job.number, None)
        room.release()

    while client.goes_on():
        room.acquire()
        timeout, tight = client.timeout()
        to_cancel = client.luck(0.01)
        job = client.draw("submit", timeout, long=tight or to_cancel)
        try:
            future = client.session.submit(jobs.job, *job.arguments, timeout=timeout)
        except Exception as error:
            client.ledger.close(job.number, ends.of_error(error, job.number))
            room.release()
            continue
        under_way[job.number] = future
        future.add_done_callback(functools.partial(ended, job))
        if to_cancel:
            if client.luck(0.5):  # until a worker has probably begun it
                time.sleep(0.02)
            future.cancel()
        elif client.luck(0.01):
            random.Random(job.number).choice(list(under_way.values()) or [future]).cancel()
    for _ in range(_WINDOW):
        room.acquire()


def by_map(client: Client) -> None:
    """One map after the other: of jobs, of plain values in bulk, given up half-way."""
    while client.goes_on():
        kind = client.rng.choice((_map_jobs, _map_jobs, _map_numbers, _map_texts))
        kind(client, client.rng.randrange(1, 200))


def _take(
    client: Client,
    results: Iterator[Any],
    opened: list[Any],
    end_of: Callable[[Any, Any], tuple[int, str]],
) -> None:
    """Take the results of a map, and perhaps leave the rest undone."""
    enough = client.rng.randrange(len(opened) + 50) if client.luck(0.1) else None
    taken = 0
    try:
        for result in results:
            client.ledger.close(*end_of(opened[taken], result))
            taken += 1
            if taken == enough:
                break
    except WhitepoolError as error:
        client.ledger.strange(f"a map ended with {type(error).__name__}: {error}")
    finally:
        results.close()  # type: ignore[attr-defined]
    for left in opened[taken:]:
        if enough is None:
            client.ledger.strange(f"a map ended before its end: {taken} of {len(opened)}")
        client.ledger.close(left.number if isinstance(left, Job) else int(left), ends.UNDONE)


def _map_jobs(client: Client, count: int) -> None:
    """A map whose input is made as it is read."""
    timeout, tight = client.timeout()
    opened: list[Job] = []

    def read() -> Iterator[tuple[Any, ...]]:
        for _ in range(min(count, 60)):
            job = client.draw("map", timeout, long=tight and client.luck(0.05))
            opened.append(job)
            yield job.arguments

    results = client.session.map(
        jobs.spread,
        read(),
        timeout=timeout,
        chunksize=client.rng.choice((None, None, 1, 7)),
        return_exceptions=True,
    )
    _take(
        client,
        results,
        opened,
        lambda job, result: (job.number, ends.of_result(result, job.number, job.wanted)),
    )


def _plain_end(number: Any, result: Any) -> tuple[int, str]:
    value = int(number)
    if isinstance(result, BaseException):
        return value, ends.of_error(result, value)
    return value, ends.RETURNED if result == number else ends.WRONG


def _map_numbers(client: Client, count: int) -> None:
    numbers: Any = client.ledger.open_many("bulk", count)
    opened = list(numbers)
    given = numbers if client.luck(0.5) else list(opened)
    results = client.session.map(jobs.number_of, given, return_exceptions=True)
    _take(client, results, opened, _plain_end)


def _map_texts(client: Client, count: int) -> None:
    opened = [str(number) for number in client.ledger.open_many("bulk", count)]
    results = client.session.map(jobs.text_of, tuple(opened), return_exceptions=True)
    _take(client, results, opened, _plain_end)


def by_lease(client: Client) -> None:
    """Check out, call a few times, and check in, or have the worker destroyed."""
    turn = 0
    while client.goes_on():
        turn += 1
        tight = client.luck(0.03)
        block = not client.luck(0.05)
        timeout = client.rng.choice((0.0, 0.001, 0.02)) if tight else 20.0
        job = client.draw("lease", timeout, holder=f"{client.name}-{turn}")
        try:
            lease = client.session.checkout(timeout, block=block)
        except Exception as error:
            client.ledger.close(job.number, ends.of_error(error, job.number))
            continue
        _use(client, lease, job)


def _use(client: Client, lease: Lease, job: Job) -> None:
    """Call with a fresh lease, and end it."""
    holder = job.holder
    try:
        lease.call(jobs.enter, holder)
    except Exception as error:
        client.ledger.close(job.number, ends.of_error(error, job.number))
        return
    calls = client.rng.choice((1, 1, 1, 2, 5))
    fate = client.rng.random()
    for index in range(calls):
        last = index == calls - 1
        if not _call(client, lease, job, destroy=last and fate < 0.02):
            return
        if not last:
            job = client.draw("lease", holder=holder)
    if client.luck(0.1):
        time.sleep(client.rng.uniform(0.0, 0.03))  # held for nothing
    try:
        if fate < 0.05:
            client.session.destroyed(lease)
            return
        lease.call(jobs.leave, holder)
        client.session.checkin(lease)
    except Exception as error:
        end = ends.of_error(error, 0)
        if end not in (ends.DIED, ends.UNBEGUN):
            client.ledger.strange(f"a checkin ended so: {end}")


def _call(client: Client, lease: Lease, job: Job, destroy: bool) -> bool:
    """One call, under which the worker is perhaps destroyed; whether the lease goes on."""
    timeout, tight = client.timeout()
    if destroy or tight:
        job = client.describe(job.number, long=True, holder=job.holder)
    ender = threading.Timer(client.rng.uniform(0.0, 0.2), _destroy, (client, lease))
    if destroy:
        ender.start()
    try:
        result: Any = lease.call(jobs.held, *job.arguments, timeout=timeout)
    except Exception as error:
        result = error
    finally:
        if destroy:
            ender.join()
    end = (
        ends.of_error(result, job.number, destroy)
        if isinstance(result, Exception)
        else ends.of_result(result, job.number, job.wanted)
    )
    client.ledger.close(job.number, end)
    return lease.valid and end not in (ends.DIED, ends.UNBEGUN, ends.LATE)


def _destroy(client: Client, lease: Lease) -> None:
    try:
        lease.destroy()
    except LeaseError:
        pass  # the worker died first, or the call was late
    except Exception as error:
        client.ledger.strange(f"destroy() ended with {type(error).__name__}: {error}")
