"""The asyncio form: the same pool, driven by the event loop, without a thread of its own.

    AsyncSession --> Engine (non-blocking) <-- add_reader(epoll), call_at(next deadline) -- loop

Cancelling a task that waits for a worker gives the place in the queue up; cancelling one whose call
runs kills the worker, which is replaced.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from whitepool_mp.aio_lease import AsyncLease
from whitepool_mp.client.engine_lease import EngineLease
from whitepool_mp.client.looped import FutureSink, Looped, resolve
from whitepool_mp.client.member import Member, refusal
from whitepool_mp.client.run_queue import too_long
from whitepool_mp.client.shutdown import complain
from whitepool_mp.client.tasks import Task
from whitepool_mp.config import check_timeout
from whitepool_mp.errors import (
    CheckoutTimeout,
    ManagerDied,
    PoolClosed,
    ShutdownTimeout,
)
from whitepool_mp.jobs import MapJob
from whitepool_mp.map_results import Ordering
from whitepool_mp.progress import progress_bar
from whitepool_mp.session import INSTANT, Session, caller_site
from whitepool_mp.status import (
    Status,
    WorkerInfo,
    WorkerStack,
    check_sizes,
    make_status,
    statistics,
)
from whitepool_mp.wire import frames, payload

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_CANCEL_SECONDS = 1.0
_PATIENCE = 10.0


class AsyncSession:
    """A running pool for code in an event loop; made by `async with Pool(...)` or `session.aio()`.

    It belongs to the event loop in which it is first used. The names and meanings are those of
    `Session`; what waits there is awaited here.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._running: Looped | None = None
        self._process = os.getpid()

    def __repr__(self) -> str:
        member = self._member
        return f"<AsyncSession of {member.name!r}{' closed' if member.closed else ''}>"

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._member.name

    def clone(self) -> AsyncSession:
        """Another session of the same pool, for another event loop for instance."""
        return AsyncSession(self._member)

    def session(self) -> Session:
        """The blocking form."""
        return Session(self._member)

    def _driver(self) -> Looped:
        member = self._member
        if member.closed or member.draining:
            raise member.closing()
        return self._any_driver()

    def _any_driver(self) -> Looped:
        loop = asyncio.get_running_loop()
        driver = self._running
        ours = driver is not None and self._process == os.getpid()
        if driver is None or not ours or driver.closed or driver.engine.broken is not None:
            if driver is not None and ours:
                driver.close()
            self._running = driver = Looped(self._member, loop)
            self._process = os.getpid()
        elif driver.loop is not loop:
            raise RuntimeError(
                f"this session of pool {self.name!r} belongs to another event loop: use "
                "session.clone() for this one"
            )
        return driver

    # --- checkout and checkin -------------------------------------------------------------

    def checkout(self, timeout: float | None = 5.0, *, block: bool = True) -> AsyncCheckout:
        """Lease a worker: `async with session.checkout() as lease`, or `await session.checkout()`.

        Arguments and errors are those of `Session.checkout`.
        """
        return AsyncCheckout(self, check_timeout("timeout", timeout), block, caller_site())

    def block_checkout(self, timeout: float | None = 5.0) -> AsyncCheckout:
        """`checkout(timeout)`, by Whitepool's name."""
        return AsyncCheckout(self, check_timeout("timeout", timeout), True, caller_site())

    def nonblock_checkout(self) -> AsyncCheckout:
        """`checkout(block=False)`, by Whitepool's name."""
        return AsyncCheckout(self, 5.0, False, caller_site())

    async def _checkout(self, seconds: float | None, block: bool, site: str) -> AsyncLease:
        driver = self._driver()
        engine, loop = driver.engine, driver.loop
        future: asyncio.Future[Any] = loop.create_future()
        deadline = None if seconds is None else time.monotonic() + (seconds or INSTANT)
        ticket = engine.checkout(block, deadline, site, lambda value: resolve(future, value))
        driver.settle()
        timers: list[asyncio.TimerHandle] = []

        def too_late() -> None:
            # The refusal that answers the cancel says what was in the way.
            if not future.done():
                engine.cancel_checkout(ticket, lambda value: resolve(future, value))
                driver.settle()
                timers.append(loop.call_later(_CANCEL_SECONDS, no_answer))

        def no_answer() -> None:
            resolve(
                future,
                CheckoutTimeout(
                    f"no worker of pool {self.name!r} was granted within {seconds:g} s, and its "
                    "manager does not answer (stopped, or the machine is overloaded)"
                ),
            )

        if seconds is not None:
            timers.append(loop.call_later(seconds or INSTANT, too_late))
        try:
            value = await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                granted = future.result()
                if isinstance(granted, EngineLease):
                    engine.checkin(granted)
            else:
                engine.cancel_checkout(ticket, None)
            driver.settle()
            raise
        finally:
            for timer in timers:
                timer.cancel()
        if isinstance(value, EngineLease):
            return AsyncLease(self._member, driver, value)
        raise refusal(value, self.name, seconds, block)

    async def checkin(self, lease: AsyncLease) -> None:
        """Give a lease back.

        Raises:
            LeaseError: it is another pool's, or was given back already.
        """
        await self._member.own(lease, AsyncLease).checkin()

    async def destroyed(self, lease: AsyncLease) -> None:
        """Say that a lease's resource is broken: its worker is killed and replaced.

        Raises:
            LeaseError: it is another pool's, or was given back already.
        """
        await self._member.own(lease, AsyncLease).destroy()

    recycle = destroyed

    async def transaction(
        self, fn: Callable[[AsyncLease], Awaitable[T]], timeout: float | None = 5.0
    ) -> T:
        """Check out, `await fn(lease)` here, check in."""
        async with AsyncCheckout(
            self, check_timeout("timeout", timeout), True, caller_site()
        ) as lease:
            return await fn(lease)

    # --- calls ----------------------------------------------------------------------------

    async def run(
        self,
        fn: Callable[..., T],
        /,
        *args: Any,
        timeout: float | None = None,
        with_resource: bool = False,
        **kwargs: Any,
    ) -> T:
        """Run `fn(*args, **kwargs)` in a worker; as `Session.run`, arguments and errors too."""
        seconds = check_timeout("timeout", timeout)
        flags = Session(self._member)._flags(with_resource) if with_resource else 0
        data, buffers, name = payload.dump_job(fn, args, kwargs)
        driver = self._driver()
        future: asyncio.Future[T] = driver.loop.create_future()
        sink = FutureSink(future, name, self.name)
        task = Task(name, sink, flags, None, data, buffers, site=caller_site())
        driver.engine.submit(task)
        if driver.engine.jobs.hungry:  # else the next answer is soon enough, for many at once
            driver.settle()
        return await self._await_task(driver, task, future, seconds)

    async def _await_task(
        self, driver: Looped, task: Task, future: asyncio.Future[T], seconds: float | None
    ) -> T:
        def too_late() -> None:
            if future.done():
                return
            driver.engine.cancel(task)  # finds out whether it has begun, or even ended
            driver.settle()
            if future.done():
                return
            error: Exception
            if task.runner is None:
                error = CheckoutTimeout(
                    f"no worker of pool {self.name!r} became free for {task.name} within "
                    f"{seconds:g} s"
                )
            else:
                assert seconds is not None
                error = too_long(task, self.name, seconds)
            future.set_exception(error)

        timer = None if seconds is None else driver.loop.call_later(seconds, too_late)
        try:
            return await future
        except asyncio.CancelledError:
            if not driver.closed:
                driver.engine.cancel(task)
                driver.settle()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    async def map(
        self,
        fn: Callable[..., T],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        ordered: bool = True,
        progress: bool | str = False,
        with_resource: bool = False,
        return_exceptions: bool = False,
    ) -> AsyncIterator[T]:
        """Run `fn` on each item: `async for y in session.map(fn, xs)`; as `Session.map`."""
        if not iterables:
            raise TypeError("map() needs at least one iterable")
        session = Session(self._member)
        job: MapJob = session._map_job(fn, iterables, timeout, chunksize, with_resource)
        driver = self._driver()
        job._send = driver.engine.submit
        # (Not at once: an iterator that is dropped is closed at any moment.)
        job.take_out = lambda running: driver.engine.post(
            driver.engine.take_out, job, job.taken_out, running
        )
        job.site = caller_site()
        bar = progress_bar(progress, job.total, job.name)
        came = asyncio.Event()
        job.notify = came.set
        job.ordered = ordered
        ordering = Ordering(ordered)
        try:
            while True:
                job.feed()
                driver.settle()
                while (result := job.take()) is not None:
                    ordering.add(*result)
                    if bar is not None:
                        bar.update(len(result[2]))
                found = ordering.pop()
                if found is None:
                    if job.done:
                        return
                    came.clear()
                    await came.wait()
                    continue
                returned, values, size = found
                job.hand_out(len(values), size)
                if not returned and not return_exceptions:
                    raise values[0]
                for value in values:
                    yield value
        finally:
            job.close()
            if bar is not None:
                bar.close()

    # --- looking --------------------------------------------------------------------------

    async def _ask(self, kind: int) -> Any:
        driver = self._any_driver()
        future: asyncio.Future[Any] = driver.loop.create_future()
        driver.engine.request(kind, lambda value: resolve(future, value))
        driver.settle()
        return await future

    async def status(self) -> Status:
        """The pool's counts now."""
        self._driver()
        return make_status(self.name, await self._ask(frames.STATUS))

    async def workers(self) -> list[WorkerInfo]:
        """A record of each worker, with what psutil measures now."""
        self._driver()
        return [WorkerInfo(**row) for row in await self._ask(frames.WORKERS)]

    async def stacks(self) -> list[WorkerStack]:
        """What every worker is doing now; as `Session.stacks`."""
        self._driver()
        return [WorkerStack(**row) for row in await self._ask(frames.STACKS)]

    async def print_statistics(self, file: TextIO | None = None) -> None:
        """Print the counts, one line for the pool and one for each worker."""
        print(statistics(await self.status(), await self.workers()), file=file)

    async def resize(self, pool_size: int | None = None, max_overflow: int | None = None) -> None:
        """Change the pool's sizes while it runs; as `Session.resize`."""
        size, overflow = check_sizes(pool_size, max_overflow, await self.status())
        driver = self._driver()
        future: asyncio.Future[Any] = driver.loop.create_future()
        driver.engine.resize(size, overflow, lambda value: resolve(future, value))
        driver.settle()
        await future
        self._member.capacity = size + overflow

    # --- the end --------------------------------------------------------------------------

    async def safe_shutdown(self, timeout: float | None = None) -> None:
        """Refuse new checkouts, finish what was begun, serve who waits, wait for all leases, end.

        Arguments and errors are those of `Session.safe_shutdown`.
        """
        seconds = check_timeout("timeout", timeout)
        member = self._member
        if member.closed:
            return
        answer = None
        try:
            driver = self._any_driver()
            member.draining = True
            answer = await asyncio.wait_for(self._drain(driver), seconds)
        except asyncio.TimeoutError:
            await self.terminate()
            raise ShutdownTimeout(
                f"pool {self.name!r} did not drain within {seconds:g} s and was ended: its workers "
                "were killed"
            ) from None
        except PoolClosed:
            pass  # somebody else ended it meanwhile
        except ManagerDied:
            await self._end()
            raise
        await self._end()
        if not member.terminated:
            drivers = self._running, member.running_engine()
            unserved = sum(each.engine.jobs.unserved for each in drivers if each is not None)
            complain(self.name, unserved, answer)

    async def _drain(self, driver: Looped) -> Any:
        threaded = self._member.running_engine()
        if threaded is not None and not threaded.engine.idle:
            await driver.loop.run_in_executor(None, threaded.wait_idle)
        await driver.wait_idle()
        return await self._ask(frames.DRAIN)

    async def terminate(self) -> None:
        """End the pool now: every worker is killed, every waiter refused, running calls fail."""
        member = self._member
        if member.closed:
            return
        member.terminated = True
        if member.owner is None:
            member.draining = True
            try:
                await self._ask(frames.TERMINATE)
            except (PoolClosed, ManagerDied):
                pass  # it is gone already
        await self._end()

    async def _end(self) -> None:
        """See the manager off, if it is ours, and let go of everything here."""
        member = self._member
        owner = member.owner
        pidfd = owner.ask_to_end() if owner is not None and not member.closed else None
        if pidfd is not None:
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            loop.add_reader(pidfd, lambda: resolve(ended, None))
            try:
                await asyncio.wait_for(ended, _PATIENCE)
            except asyncio.TimeoutError:
                pass  # stuck: `close` kills it
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        if self._running is not None:
            self._running.close()
        member.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            await self.terminate()
        else:
            await self.safe_shutdown()


class AsyncCheckout:
    """What `AsyncSession.checkout` returns: await it for the lease, or use it with `async with`."""

    def __init__(self, session: AsyncSession, seconds: float | None, block: bool, site: str):
        self._session = session
        self._args = (seconds, block, site)
        self._lease: AsyncLease | None = None

    def __await__(self) -> Generator[Any, None, AsyncLease]:
        return self._session._checkout(*self._args).__await__()

    async def __aenter__(self) -> AsyncLease:
        self._lease = await self
        return self._lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        lease, self._lease = self._lease, None
        if lease is not None and lease.valid:
            await lease.checkin()
