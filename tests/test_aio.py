"""The asyncio form, on real workers: it never blocks the loop and needs no thread to wait."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import io
import itertools
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import errands
import numpy as np
import pytest
from anatomy import no_successor
from support import descriptors, processes, until

from whitepool_mp import (
    AsyncLease,
    AsyncSession,
    CallTimeout,
    CheckoutTimeout,
    FactoryFailed,
    LeaseError,
    ManagerDied,
    Pool,
    PoolClosed,
    PoolFull,
    SerializationError,
    Session,
    ShutdownTimeout,
    WhitepoolError,
    WorkerDied,
    jobs,
    testing,
)

SOON = 20.0
ENDED = (PoolClosed, WorkerDied)
"""What a running call ends with when its pool is terminated: what is heard of first."""

Test = Callable[..., Coroutine[Any, Any, None]]


def in_loop(test: Test) -> Callable[..., None]:
    """A test that is a coroutine, in an event loop of its own, with a deadline."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


async def comes_true(condition: Callable[[], Any]) -> Any:
    """Wait for a condition, while the loop goes on."""

    async def look() -> Any:
        while True:
            value = condition()
            if isinstance(value, Awaitable):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.002)

    return await asyncio.wait_for(look(), SOON)


async def whole(session: AsyncSession) -> None:
    async def is_whole() -> bool:
        now = await session.status()
        return now.available == now.pool_size and not (now.booting or now.retiring or now.waiting)

    await comes_true(is_whole)


async def waiting(session: AsyncSession, count: int) -> None:
    async def so_many() -> bool:
        return (await session.status()).waiting == count

    await comes_true(so_many)


async def called_off(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def busy(session: AsyncSession, path: Path) -> asyncio.Task[Any]:
    """A task whose call runs until it is killed."""
    return asyncio.create_task(session.run(errands.pid_and_wait, path))


async def pids(path: Path, count: int = 1) -> list[int]:
    await comes_true(lambda: errands.run_count(path) >= count)
    return [int(line) for line in errands.lines(path)]


# --- checkout ---------------------------------------------------------------------------------


@in_loop
async def test_a_checkout_as_a_context_manager() -> None:
    async with Pool(1) as session:
        async with session.checkout() as lease:
            assert isinstance(lease, AsyncLease)
            assert lease.valid
            assert await lease.call(os.getpid) == lease.pid
            assert (await session.status()).leased == 1
        assert not lease.valid
        assert (await session.status()).leased == 0


@in_loop
async def test_a_checkout_that_is_awaited_is_checked_in_by_hand() -> None:
    async with Pool(2) as session:
        lease = await session.checkout(timeout=SOON)
        other = await session.block_checkout(SOON)
        assert lease.id != other.id and {lease.slot, other.slot} == {0, 1}
        await lease.checkin()
        await session.checkin(other)
        for gone in (lease, other):
            assert not gone.valid
            with pytest.raises(LeaseError, match="checked in"):
                await gone.call(os.getpid)
            with pytest.raises(LeaseError):
                await gone.checkin()


@in_loop
async def test_a_full_pool_refuses_who_does_not_wait() -> None:
    async with Pool(1) as session:
        async with session.checkout():
            for attempt in (session.nonblock_checkout(), session.checkout(block=False)):
                with pytest.raises(PoolFull, match="is full"):
                    await attempt
        async with session.nonblock_checkout():
            pass


@in_loop
async def test_a_checkout_whose_time_is_up_says_what_was_in_the_way() -> None:
    async with Pool(1) as session:
        async with session.checkout():
            with pytest.raises(CheckoutTimeout, match=r"within 0.05 s: size=1\+0 idle=0 leased=1"):
                await session.checkout(timeout=0.05)
        async with session.checkout():
            pass


@in_loop
async def test_waiters_are_served_in_order() -> None:
    async with Pool(1) as session:
        served: list[int] = []

        async def wait_for_it(number: int) -> None:
            async with session.checkout(timeout=SOON):
                served.append(number)

        async with session.checkout():
            tasks = []
            for number in range(10):
                tasks.append(asyncio.create_task(wait_for_it(number)))
                await waiting(session, number + 1)
        await asyncio.gather(*tasks)
        assert served == list(range(10))


@in_loop
async def test_a_cancelled_waiter_gives_its_place_up() -> None:
    async with Pool(1) as session:
        async with session.checkout():
            quitter = asyncio.create_task(session._checkout(None, True, "here"))
            await waiting(session, 1)
            other = asyncio.create_task(session._checkout(None, True, "here"))
            await waiting(session, 2)
            await called_off(quitter)
            await waiting(session, 1)
        lease = await other
        await lease.checkin()
        assert (await session.status()).leased == 0


@in_loop
async def test_a_waiter_cancelled_while_its_grant_is_on_the_way_leaks_no_worker() -> None:
    async with Pool(1) as session:
        await whole(session)
        for turns in range(8):
            task = asyncio.create_task(session._checkout(None, True, "here"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await (await task).checkin()
            except asyncio.CancelledError:
                pass
        await whole(session)
        assert (await session.status()).counters["killed"] == 0


@in_loop
async def test_a_wait_for_around_a_checkout_gives_the_place_up() -> None:
    async with Pool(1) as session:
        async with session.checkout():
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.checkout(timeout=None), 0.05)
            await waiting(session, 0)


@in_loop
async def test_a_forgotten_lease_warns_and_is_recovered() -> None:
    async with Pool(1) as session:
        lease = await session.checkout()
        held = [lease]
        del lease
        with pytest.warns(ResourceWarning, match="never checked in"):
            held.clear()
        async with session.checkout(timeout=SOON):
            pass


@in_loop
async def test_a_destroyed_worker_is_replaced() -> None:
    async with Pool(1) as session:
        first = await session.checkout()
        await first.destroy()
        assert "destroyed" in repr(first)
        second = await session.checkout(timeout=SOON)
        assert second.pid != first.pid
        await session.destroyed(second)
        await whole(session)


@in_loop
async def test_a_lease_of_another_pool_is_refused() -> None:
    async with Pool(1) as one, Pool(1) as other:
        async with one.checkout() as lease:
            with pytest.raises(LeaseError, match="give it back to its own"):
                await other.checkin(lease)
            with pytest.raises(TypeError, match="AsyncLease"):
                await other.checkin("lease")  # type: ignore[arg-type]
            assert lease.valid


# --- calls ------------------------------------------------------------------------------------


@in_loop
async def test_run_gives_the_result() -> None:
    async with Pool(2) as session:
        assert await session.run(errands.add, 1, 2, z=3) == 6
        assert await session.run(lambda: os.getpid()) != os.getpid()


@in_loop
async def test_three_hundred_calls_at_once() -> None:
    async with Pool(2) as session:
        results = await asyncio.gather(*(session.run(errands.square, n) for n in range(300)))
        assert results == [n * n for n in range(300)]


@in_loop
async def test_an_exception_arrives_as_itself() -> None:
    async with Pool(1) as session:
        with pytest.raises(ValueError, match="number 3") as caught:
            await session.run(errands.bad_number, 3)
        assert "in bad_number" in str(caught.value.__cause__)
        async with session.checkout() as lease:
            with pytest.raises(ValueError, match="number 4"):
                await lease.call(errands.bad_number, 4)
            assert await lease.call(errands.square, 4) == 16


@in_loop
async def test_a_stop_iteration_arrives_as_the_cause_of_a_runtime_error() -> None:
    """A coroutine cannot raise it: the same happens to a generator's."""
    async with Pool(1) as session:
        with pytest.raises(RuntimeError, match=r"StopIteration\(7\)") as caught:
            await session.run(errands.stop_iteration)
        assert isinstance(caught.value.__cause__, StopIteration)
        assert await session.run(errands.square, 2) == 4


@in_loop
async def test_what_cannot_be_pickled_fails_alone() -> None:
    async with Pool(1) as session:
        with pytest.raises(SerializationError, match="argument 0 of"):
            await session.run(errands.square, threading.Lock())
        with pytest.raises(SerializationError, match="result of"):
            await session.run(threading.Lock)
        async with session.checkout() as lease:
            with pytest.raises(SerializationError, match="argument 0 of"):
                await lease.call(errands.square, threading.Lock())
            assert await lease.call(errands.square, 3) == 9


@in_loop
async def test_a_dead_worker_says_how_it_died(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with Pool(1) as session:
        task = busy(session, path)
        (pid,) = await pids(path)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="SIGKILL") as caught:
            await task
        assert (caught.value.pid, caught.value.started) == (pid, True)
        lease = await session.checkout(timeout=SOON)
        with pytest.raises(WorkerDied, match="exited with code 9"):
            await lease.call(errands.die)
        assert not lease.valid
        await whole(session)


@in_loop
async def test_large_arrays_go_both_ways_at_once() -> None:
    async with Pool(2) as session:
        arrays = [np.full(500_000, number) for number in range(6)]
        results = await asyncio.gather(*(session.run(errands.doubled, each) for each in arrays))
        for array, back in zip(arrays, results, strict=True):
            np.testing.assert_array_equal(back, 2 * array)


@in_loop
async def test_a_call_that_is_cancelled_has_its_worker_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with Pool(1) as session:
        task = busy(session, path)
        (pid,) = await pids(path)
        await called_off(task)
        assert await session.run(os.getpid, timeout=SOON) != pid
        async with session.checkout() as lease:
            call = asyncio.create_task(lease.call(errands.pid_and_wait, path))
            await pids(path, 2)
            await called_off(call)
            assert not lease.valid
        await whole(session)
        assert (await session.status()).counters["killed"] == 2


@in_loop
async def test_a_call_that_is_cancelled_in_the_queue_never_runs(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    async with Pool(1) as session:
        async with session.checkout():
            tasks = [asyncio.create_task(session.run(errands.trace, path, n)) for n in range(4)]
            await waiting(session, 1)  # one asks for all of them
            await called_off(tasks[1])
            await called_off(tasks[2])
        assert [await tasks[0], await tasks[3]] == [0, 3]
        assert errands.lines(path) == ["0", "3"]
        assert (await session.status()).counters["killed"] == 0


@in_loop
async def test_a_run_whose_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with Pool(1) as session:
        await whole(session)
        with pytest.raises(CallTimeout, match=r"pid_and_wait took longer than 0.3 s"):
            await session.run(errands.pid_and_wait, path, timeout=0.3)
        async with session.checkout(timeout=SOON):
            with pytest.raises(CheckoutTimeout, match=r"for errands.square within 0.05 s"):
                await session.run(errands.square, 1, timeout=0.05)
        assert await session.run(errands.square, 3, timeout=SOON) == 9
        assert (await session.status()).counters["killed"] == 1


@in_loop
async def test_a_lease_s_call_whose_time_is_up(tmp_path: Path) -> None:
    async with Pool(1) as session:
        async with session.checkout() as lease:
            with pytest.raises(CallTimeout, match=r"longer than 0.2 s"):
                await lease.call(errands.pid_and_wait, tmp_path / "pids", timeout=0.2)
            assert not lease.valid
        await whole(session)


@in_loop
async def test_the_time_of_a_call_is_up_also_when_the_manager_is_stuck() -> None:
    async with Pool(1) as session:
        manager = session._member.owner.manager  # type: ignore[union-attr]
        lease = await session.checkout()
        os.kill(manager, signal.SIGSTOP)
        try:
            with pytest.raises(CallTimeout):
                await lease.call(errands.square, 3, timeout=0.1)
            with pytest.raises(CheckoutTimeout, match="does not answer"):
                await session.checkout(timeout=0.1)
            with pytest.raises(CheckoutTimeout):
                await session.run(errands.square, 3, timeout=0.1)
        finally:
            os.kill(manager, signal.SIGCONT)
        await whole(session)
        assert await session.run(errands.square, 3) == 9


@in_loop
async def test_one_lease_serves_one_call_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with Pool(1) as session:
        lease = await session.checkout()
        call = asyncio.create_task(lease.call(errands.pid_and_wait, path))
        await pids(path)
        with pytest.raises(LeaseError, match="another task"):
            await lease.call(errands.square, 2)
        await lease.checkin()  # with a call still running: the worker is replaced
        with pytest.raises(LeaseError, match="ended under a running call"):
            await call
        await whole(session)


@in_loop
async def test_the_loop_is_never_blocked(tmp_path: Path) -> None:
    path, pipe = tmp_path / "ran", tmp_path / "pipe"
    os.mkfifo(pipe)
    async with Pool(1) as session:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            await comes_true(lambda: errands.run_count(path))
            while ticks < 100:
                ticks += 1
                await asyncio.sleep(0.001)
            fd = await comes_true(lambda: open_for_writing(pipe))
            os.write(fd, b"go")
            os.close(fd)

        # If waiting for the call blocked the loop, nobody would ever end the call.
        ticking = asyncio.create_task(tick())
        assert await session.run(errands.trace_then_wait, path, 5, pipe) == 5
        await ticking
        assert ticks == 100


def open_for_writing(pipe: Path) -> int | None:
    """The write end, if somebody reads already."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None


@in_loop
async def test_waiting_takes_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with Pool(1) as session:
        before = set(threading.enumerate())
        running = busy(session, path)
        await pids(path)
        queued = [asyncio.create_task(session.run(errands.square, n)) for n in range(20)]
        waiters = [asyncio.create_task(session._checkout(None, True, "here")) for _ in range(20)]
        mapping = asyncio.create_task(collect(session.map(errands.square, range(5))))
        await waiting(session, 20 + 1)  # one asks for all jobs
        assert set(threading.enumerate()) == before
        await called_off(running)
        for waiter in waiters:
            await called_off(waiter)
        assert await asyncio.gather(*queued) == [n * n for n in range(20)]
        assert await mapping == [0, 1, 4, 9, 16]
        assert set(threading.enumerate()) == before


# --- proxies ----------------------------------------------------------------------------------


@in_loop
async def test_a_proxy_s_methods_run_in_the_worker() -> None:
    async with Pool(1, 0, errands.Ledger) as session:
        async with session.checkout() as lease:
            ledger = lease.get()
            assert await ledger.add("a") == 1
            assert await ledger.add("b") == 2
            assert await lease.call(lambda resource: resource.entries) == ["a", "b"]
            with pytest.raises(KeyError, match="no such entry"):
                await ledger.fail()
            cursor = await ledger.cursor()
            assert "generator" in repr(cursor)
            assert await cursor.send(None) == "a"
            with pytest.raises(SerializationError, match="add"):
                await ledger.add(threading.Lock())
            with pytest.raises(AttributeError, match="through a proxy"):
                ledger.__len__()
        with pytest.raises(LeaseError):
            await ledger.add("c")
        with pytest.raises(LeaseError):
            lease.get()


@in_loop
async def test_a_pool_without_a_factory_has_no_resource_to_get() -> None:
    async with Pool(1) as session:
        async with session.checkout() as lease:
            with pytest.raises(LeaseError, match="no factory"):
                lease.get()
        with pytest.raises(ValueError, match="with_resource"):
            await session.run(errands.square, 1, with_resource=True)


@in_loop
async def test_what_stayed_in_the_worker_goes_at_the_checkin(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    async with Pool(1, 0, errands.Ledger) as session:
        async with session.checkout() as lease:
            cursor = await lease.get().traced(path)
            assert await cursor.send(None) == "open"
            assert errands.lines(path) == []
        await comes_true(lambda: errands.lines(path) == ["closed"])


@in_loop
async def test_a_transaction_holds_a_lease_for_its_function() -> None:
    async with Pool(1, 0, errands.Ledger) as session:

        async def add_two(lease: AsyncLease) -> int:
            await lease.get().add("a")
            return int(await lease.get().add("b"))

        assert await session.transaction(add_two) == 2

        async def fail(lease: AsyncLease) -> None:
            raise ValueError("in the caller")

        with pytest.raises(ValueError, match="in the caller"):
            await session.transaction(fail)
        assert (await session.status()).leased == 0


# --- map --------------------------------------------------------------------------------------


async def collect(results: AsyncIterator[Any]) -> list[Any]:
    return [each async for each in results]


@in_loop
async def test_map_gives_results_in_order() -> None:
    async with Pool(2) as session:
        results = await collect(session.map(errands.square, range(1000)))
        assert results == [n * n for n in range(1000)]
        assert await collect(session.map(errands.add, [1, 2], [10, 20])) == [11, 22]
        assert await collect(session.map(errands.square, [])) == []
        unordered = await collect(session.map(errands.square, range(100), ordered=False))
        assert sorted(unordered) == [n * n for n in range(100)]


@in_loop
async def test_map_raises_an_exception_at_its_place() -> None:
    async with Pool(2) as session:
        run = functools.partial(errands.square_unless, 5)
        got: list[int] = []
        with pytest.raises(ValueError, match="number 5"):
            async for each in session.map(run, range(10), chunksize=3):
                got.append(each)
        assert got == [0, 1, 4, 9, 16]
        results = await collect(session.map(run, range(10), return_exceptions=True))
        assert isinstance(results.pop(5), ValueError)
        assert results == [n * n for n in range(10) if n != 5]


@in_loop
async def test_a_crash_in_a_map_costs_its_one_item(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    async with Pool(2) as session:
        run = functools.partial(errands.trace_or, path, {17}, errands.kill_self)
        results = await collect(session.map(run, range(50), chunksize=10, return_exceptions=True))
        assert isinstance(results.pop(17), WorkerDied)
        assert results == [n for n in range(50) if n != 17]
        assert sorted(map(int, errands.lines(path))) == list(range(50))


@in_loop
async def test_an_endless_map_is_read_a_window_ahead() -> None:
    async with Pool(2) as session:
        read = 0

        def endless() -> Iterator[int]:
            nonlocal read
            while True:
                read += 1
                yield read

        got = []
        async with contextlib.aclosing(
            session.map(errands.square, endless(), chunksize=1)  # type: ignore[type-var]
        ) as results:
            async for each in results:
                got.append(each)
                assert read <= len(got) + (jobs.AHEAD + 1) * 4
                if len(got) == 100:
                    break
        assert got == [n * n for n in range(1, 101)]
        await whole(session)


@in_loop
async def test_a_map_that_is_cancelled_stops_feeding(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    async with Pool(1) as session:
        run = functools.partial(errands.trace, path)
        task = asyncio.create_task(collect(session.map(run, itertools.count(), chunksize=1)))
        await comes_true(lambda: errands.run_count(path) > 20)
        await called_off(task)
        assert await session.run(errands.square, 2) == 4  # behind what had been sent to the worker
        ran = errands.run_count(path)
        assert await session.run(errands.square, 3) == 9
        assert errands.run_count(path) == ran
        await whole(session)


# --- looking ----------------------------------------------------------------------------------


@in_loop
async def test_status_workers_and_statistics() -> None:
    async with Pool(2, 1, name="looked-at") as session:
        await whole(session)
        async with session.checkout() as lease:
            status = await session.status()
            assert (status.name, status.pool_size, status.max_overflow) == ("looked-at", 2, 1)
            assert (status.available, status.leased, status.state) == (1, 1, "ready")
            rows = await session.workers()
            (held,) = [row for row in rows if row.state == "leased"]
            assert (held.pid, held.lease, held.holder_pid) == (lease.pid, lease.id, os.getpid())
            assert held.site is not None and "test_aio.py" in held.site
            out = io.StringIO()
            await session.print_statistics(out)
            assert "'looked-at' size=2+1 idle=1 leased=1" in out.getvalue()
        assert "looked-at" in repr(session) and session.name == "looked-at"


@in_loop
async def test_a_resize_changes_the_pool_while_it_runs() -> None:
    async with Pool(1, overflow_ttl=0) as session:
        await session.resize(pool_size=3)
        await whole(session)
        assert (await session.status()).pool_size == 3
        await session.resize(pool_size=1, max_overflow=1)
        await whole(session)
        status = await session.status()
        assert (status.pool_size, status.max_overflow, status.available) == (1, 1, 1)
        with pytest.raises(ValueError, match="pool_size"):
            await session.resize(pool_size=0)


# --- the end ----------------------------------------------------------------------------------


@in_loop
async def test_a_safe_shutdown_waits_for_leases_and_jobs() -> None:
    session = Pool(1).run_service().aio()
    lease = await session.checkout()
    queued = asyncio.create_task(session.run(errands.square, 4))
    await waiting(session, 1)
    ending = asyncio.create_task(session.safe_shutdown())
    await asyncio.sleep(0)
    with pytest.raises(PoolClosed, match="shutting down"):
        await session.checkout()
    with pytest.raises(PoolClosed):
        await session.run(errands.square, 1)
    assert await lease.call(errands.square, 3) == 9
    assert not ending.done()
    await lease.checkin()
    assert await queued == 16
    await ending
    assert not processes()


@in_loop
async def test_a_safe_shutdown_whose_time_is_up_ends_the_pool(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    session = Pool(1).run_service().aio()
    task = busy(session, path)
    await pids(path)
    with pytest.raises(ShutdownTimeout, match=r"within 0.1 s"):
        await session.safe_shutdown(timeout=0.1)
    with pytest.raises(ENDED):
        await task
    assert not processes()


@in_loop
async def test_a_termination_ends_everything_now(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    session = Pool(1).run_service().aio()
    running = busy(session, path)
    await pids(path)
    queued = asyncio.create_task(session.run(errands.square, 1))
    waiter = asyncio.create_task(session._checkout(None, True, "here"))
    await waiting(session, 2)
    await session.terminate()
    with pytest.raises(ENDED):
        await running
    for task in (queued, waiter):
        with pytest.raises(PoolClosed):
            await task
    assert not processes()
    await session.terminate()
    await session.safe_shutdown()


@in_loop
async def test_nothing_can_be_done_after_the_end() -> None:
    async with Pool(1) as session:
        lease = await session.checkout()
        await lease.checkin()
    for attempt in (
        session.run(errands.square, 1),
        session._checkout(1.0, True, "here"),
        session.status(),
        session.workers(),
        session.resize(2),
        collect(session.map(errands.square, [1])),
    ):
        with pytest.raises(PoolClosed):
            await attempt


@in_loop
async def test_an_exception_in_the_block_ends_the_pool_now(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with pytest.raises(LookupError):
        async with Pool(1) as session:
            task = busy(session, path)
            await pids(path)
            raise LookupError
    with pytest.raises(ENDED):
        await task
    assert not processes()


@in_loop
async def test_ending_a_pool_is_quick_and_does_not_block_the_loop() -> None:
    loop = asyncio.get_running_loop()
    async with Pool(2) as session:
        assert await session.run(errands.square, 3) == 9
        began = loop.time()
    assert loop.time() - began < 5  # it waits for the end, not for a timeout of 10


@in_loop
async def test_who_waits_learns_that_the_manager_died(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with pytest.raises(ManagerDied):
        async with Pool(1) as session:
            running = busy(session, path)
            await pids(path)
            waiter = asyncio.create_task(session._checkout(None, True, "here"))
            await waiting(session, 1)
            no_successor(session)
            os.kill(session._member.owner.manager, signal.SIGKILL)  # type: ignore[union-attr]
            for task in (running, waiter):
                with pytest.raises(ManagerDied, match="exit code 1"):
                    await task
            with pytest.raises(ManagerDied):
                await session.run(errands.square, 1)
            with pytest.raises(ManagerDied):
                await session.status()
            await session.safe_shutdown()
    assert "closed" in repr(session)
    await comes_true(lambda: not processes())


@in_loop
async def test_a_shutdown_after_the_manager_s_death_says_so_and_lets_go() -> None:
    session = Pool(1).run_service().aio()
    assert await session.run(errands.square, 1) == 1
    no_successor(session)
    os.kill(session._member.owner.manager, signal.SIGKILL)  # type: ignore[union-attr]
    with pytest.raises(ManagerDied):
        await session.safe_shutdown()
    await session.safe_shutdown()
    await session.terminate()


@in_loop
async def test_a_failing_factory_reaches_who_waits() -> None:
    def no_database() -> None:
        raise LookupError("no database")

    async with Pool(1, 0, no_database) as session:
        with pytest.raises(FactoryFailed, match="no database"):
            await session.checkout(timeout=SOON)
        with pytest.raises(FactoryFailed, match="no database"):
            await session.run(errands.square, 1)


# --- several loops, several forms -------------------------------------------------------------


def test_the_asyncio_form_of_a_running_session() -> None:
    with Pool(2) as session:

        async def main() -> int:
            form = session.aio()
            assert form.session().name == session.name
            async with form.checkout() as lease:
                await lease.call(errands.square, 2)
            return await form.run(errands.square, 5)

        for _ in range(3):
            assert asyncio.run(main()) == 25
        assert session.run(errands.square, 6) == 36


def test_a_form_whose_loop_is_gone_leaves_nothing_behind() -> None:
    with Pool(1) as session:
        for _ in range(5):
            form = session.aio()
            assert asyncio.run(form.run(errands.square, 5)) == 25
            del form
        gc.collect()
        until(lambda: session.status().counters["connections"] == 6)
        assert session.run(errands.square, 6) == 36


def test_a_loop_that_ends_with_a_map_under_way_gives_its_workers_back() -> None:
    """Whoever ends the loop early neither keeps workers nor leaves descriptors behind."""

    async def first(session: Session) -> object:
        async for value in session.aio().map(time.sleep, [0, *[30] * 7]):
            return value
        raise AssertionError

    with Pool(2) as session:
        assert session.run(errands.square, 2) == 4
        gc.disable()  # not when it happens to be collected, but at the end of the loop
        try:
            for _ in range(5):
                assert asyncio.run(first(session)) is None
                assert session.run(errands.square, 3, timeout=10) == 9
        finally:
            gc.enable()
        testing.wait_until_whole(session)


def test_a_loop_that_is_dropped_with_a_call_under_way_is_collected_with_it() -> None:
    def drop_one(session: Session) -> None:
        loop = asyncio.new_event_loop()
        form = session.aio()
        running = loop.create_task(form.run(time.sleep, 30))
        until(lambda: loop.run_until_complete(form.status()).leased)
        loop.close()
        running._log_destroy_pending = False  # type: ignore[attr-defined]

    with Pool(1) as session:
        assert session.run(errands.square, 2) == 4
        before = len(descriptors())
        drop_one(session)
        gc.collect()
        assert session.run(errands.square, 3, timeout=10) == 9
        assert len(descriptors()) <= before


def test_a_form_belongs_to_the_loop_it_was_first_used_in() -> None:
    with Pool(1) as session:
        form = session.aio()
        loop = asyncio.new_event_loop()
        try:
            assert loop.run_until_complete(form.run(errands.square, 2)) == 4

            async def elsewhere() -> int:
                with pytest.raises(RuntimeError, match="another event loop"):
                    await form.run(errands.square, 3)
                return await form.clone().run(errands.square, 3)

            assert asyncio.run(elsewhere()) == 9
            assert loop.run_until_complete(form.run(errands.square, 4)) == 16
        finally:
            loop.close()


def test_two_loops_in_two_threads_use_one_pool() -> None:
    with Pool(2) as session:
        results: list[list[int]] = []

        async def main() -> list[int]:
            form = session.aio()
            return await asyncio.gather(*(form.run(errands.square, n) for n in range(100)))

        threads = [
            threading.Thread(target=lambda: results.append(asyncio.run(main()))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[n * n for n in range(100)]] * 2


@in_loop
async def test_the_blocking_form_s_jobs_are_finished_before_an_asyncio_shutdown(
    tmp_path: Path,
) -> None:
    path = tmp_path / "ran"
    async with Pool(1) as session:
        futures = [session.session().submit(errands.trace, path, n) for n in range(50)]
        assert await asyncio.wrap_future(futures[0]) == 0
    assert [future.result(0) for future in futures] == list(range(50))


@in_loop
async def test_a_future_of_the_blocking_form_can_be_awaited_and_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    async with Pool(1) as session:
        future = session.session().submit(errands.pid_and_wait, path)
        (pid,) = await pids(path)
        awaited = asyncio.wrap_future(future)
        awaited.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaited
        await comes_true(future.cancelled)
        assert await session.run(os.getpid, timeout=SOON) != pid


def test_every_error_of_the_pool_is_a_whitepool_error() -> None:
    for error in (CallTimeout, CheckoutTimeout, LeaseError, PoolClosed, PoolFull, ManagerDied):
        assert issubclass(error, WhitepoolError)
