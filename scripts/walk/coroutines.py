"""Clients that are tasks of one event loop: run, map, checkout, and tasks that are cancelled."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from walk import ends, jobs
from walk.client import Client
from walk.ledger import PATIENCE
from whitepool_mp.aio import AsyncSession
from whitepool_mp.aio_lease import AsyncLease

_RUNNERS = 3


def by_asyncio(client: Client) -> None:
    """An event loop with a few clients."""
    asyncio.run(_clients(client))


async def _clients(client: Client) -> None:
    form = client.session.aio()
    tasks = [asyncio.create_task(_by_run(client, form)) for _ in range(_RUNNERS)]
    tasks.append(asyncio.create_task(_by_map(client, form)))
    tasks.append(asyncio.create_task(_by_lease(client, form)))
    while not client.stop.is_set():
        done, _ = await asyncio.wait(tasks, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
        if done:
            break
    _, stuck = await asyncio.wait(tasks, timeout=PATIENCE)
    for task in stuck:
        task.print_stack(file=sys.stderr)
        client.ledger.strange(f"a task hangs: {task.get_coro()}")
        task.cancel()
    for task in tasks:
        if task not in stuck and task.exception() is not None:
            raise task.exception() or AssertionError


async def _ended(client: Client, task: asyncio.Task[Any], cancel: bool) -> Any:
    """What came of a task, which is cancelled after a moment if it is to be."""
    if cancel:
        await asyncio.wait([task], timeout=client.rng.choice((0.0, 0.001, 0.01, 0.05)))
        task.cancel()
    await asyncio.wait([task])
    if task.cancelled():
        return asyncio.CancelledError()
    return task.exception() or task.result()


async def _goes_on(client: Client) -> bool:
    """Wait for the end of a lull; whether the walk goes on."""
    while not client.stop.is_set() and (left := client.lull()):
        await asyncio.sleep(min(left, 0.1))
    return not client.stop.is_set()


async def _by_run(client: Client, form: AsyncSession) -> None:
    while await _goes_on(client):
        timeout, tight = client.timeout()
        cancel = client.luck(0.01)
        job = client.draw("asyncio run", timeout, long=tight or cancel)
        running = asyncio.create_task(form.run(jobs.job, *job.arguments, timeout=timeout))
        result = await _ended(client, running, cancel)
        client.ledger.close(job.number, ends.of_result(result, job.number, job.wanted))


async def _by_map(client: Client, form: AsyncSession) -> None:
    while await _goes_on(client):
        numbers = client.ledger.open_many("asyncio bulk", client.rng.randrange(1, 100))
        enough = client.rng.choice(numbers) if client.luck(0.1) else None
        results = form.map(jobs.number_of, numbers, return_exceptions=True)
        left = list(numbers)
        try:
            async for result in results:
                number = left.pop(0)
                if isinstance(result, BaseException):
                    end = ends.of_error(result, number)
                else:
                    end = ends.RETURNED if result == number else ends.WRONG
                client.ledger.close(number, end)
                if number == enough:
                    break
        finally:
            await results.aclose()  # type: ignore[attr-defined]
        if left and enough is None:
            client.ledger.strange(f"an asyncio map ended before its end: {len(left)} are missing")
        for number in left:
            client.ledger.close(number, ends.UNDONE)


async def _by_lease(client: Client, form: AsyncSession) -> None:
    turn = 0
    while await _goes_on(client):
        turn += 1
        holder = f"{client.name}-async-{turn}"
        cancel = client.luck(0.03)
        timeout = client.rng.choice((0.0, 0.001, 0.02)) if client.luck(0.03) else 20.0
        job = client.draw("asyncio lease", timeout, long=cancel, holder=holder)
        checkout: asyncio.Task[Any] = asyncio.ensure_future(_checkout(form, timeout))
        lease = await _ended(client, checkout, cancel and client.luck(0.5))
        if isinstance(lease, BaseException):
            client.ledger.close(job.number, ends.of_error(lease, job.number))
            continue
        entered = await _ended(client, asyncio.ensure_future(lease.call(jobs.enter, holder)), False)
        if isinstance(entered, BaseException):
            client.ledger.close(job.number, ends.of_error(entered, job.number))
            continue
        calling = asyncio.ensure_future(lease.call(jobs.held, *job.arguments))
        result = await _ended(client, calling, cancel)
        client.ledger.close(job.number, ends.of_result(result, job.number, job.wanted))
        await _give_back(client, lease, holder)


async def _checkout(form: AsyncSession, timeout: float) -> AsyncLease:
    return await form.checkout(timeout)


async def _give_back(client: Client, lease: AsyncLease, holder: str) -> None:
    if not lease.valid:
        return
    try:
        if client.luck(0.05):
            await lease.destroy()
            return
        await lease.call(jobs.leave, holder)
        await lease.checkin()
    except Exception as error:
        end = ends.of_error(error, 0)
        if end not in (ends.DIED, ends.UNBEGUN):
            client.ledger.strange(f"an asyncio checkin ended so: {end}")
