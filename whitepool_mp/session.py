"""What users hold: a way to a pool's workers. Cheap to clone, pickle, and use from many threads."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from whitepool_mp.client.answers import open_answer
from whitepool_mp.client.channel import Refused
from whitepool_mp.client.hold import Hold
from whitepool_mp.client.joining import LinkBroken, TimedOut
from whitepool_mp.client.link import ChannelBroken, Link
from whitepool_mp.client.member import Member, Ticket, refusal
from whitepool_mp.client.run_queue import asking, run_queued, to_join
from whitepool_mp.client.shutdown import drain, terminate
from whitepool_mp.client.tasks import MAX_DEATHS
from whitepool_mp.config import check_count, check_timeout
from whitepool_mp.errors import CallTimeout, CheckoutTimeout, LeaseError
from whitepool_mp.lease import Lease, broken_off, unreached
from whitepool_mp.status import (
    Status,
    WorkerInfo,
    WorkerStack,
    check_sizes,
    make_status,
    statistics,
)
from whitepool_mp.wire import frames, messages, passed, payload

if TYPE_CHECKING:
    from typing_extensions import Self

    from whitepool_mp.aio import AsyncSession
    from whitepool_mp.client.future import JobFuture
    from whitepool_mp.executor import SessionExecutor
    from whitepool_mp.jobs import MapJob

T = TypeVar("T")

_CANCEL_SECONDS = 1.0
"""How long a checkout whose time is up waits for the manager's last word on it."""
INSTANT = 0.01
"""How long a checkout with timeout=0 waits: the request itself takes a moment."""
_ASK_SECONDS = 30.0
"""How long a question about the pool waits for the manager's answer."""
_PACKAGE = __name__.rpartition(".")[0]


def caller_site() -> str:
    """The line outside this package that the current call comes from."""
    frame: FrameType | None = sys._getframe(1)  # a greenlet's stack may have no more than this
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith(_PACKAGE):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Session:
    """A running pool, as its users see it.

    Got from `Pool(...)` as a context manager or from `Pool(...).run_service()`. Any number of
    threads may use one; `clone()` and pickling give others that talk to the same pool, also from
    other processes (a pickle holds the pool's key: send it only to whom you would let run code
    here). After `os.fork` it works in both processes; leases stay with the parent.
    """

    def __init__(self, member: Member) -> None:
        self._member = member

    def __reduce__(self) -> tuple[Callable[[Ticket], Session], tuple[Ticket]]:
        return _join, (self._member.ticket,)

    def __repr__(self) -> str:
        member = self._member
        return f"<Session of {member.name!r}{' closed' if member.closed else ''}>"

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._member.name

    def clone(self) -> Session:
        """Another session of the same pool (Whitepool's word; a session may as well be shared)."""
        return Session(self._member)

    # --- checkout and checkin -------------------------------------------------------------

    def checkout(self, timeout: float | None = 5.0, *, block: bool = True) -> Lease:
        """Lease a worker, for this caller alone, until it is checked in.

        Args:
            timeout: at most how many seconds to wait; None for as long as it takes, 0 for only if
                a worker is free.
            block: False to be refused at once if every worker is leased and no more may start. (A
                worker that is being started, or may be, is waited for.)

        Returns:
            The lease; use it as a context manager.

        Raises:
            CheckoutTimeout: no worker became free in time.
            PoolFull: with block=False, all workers are leased.
            FactoryFailed: no worker lives and none can be started; has the remote traceback.
            PoolClosed: the pool was shut down.
            ManagerDied: its manager process is gone.

        Source: Poolboy's checkout/3, Whitepool's block_checkout and nonblock_checkout.
        """
        return self._lease(check_timeout("timeout", timeout), block)

    def block_checkout(self, timeout: float | None = 5.0) -> Lease:
        """`checkout(timeout)`, by Whitepool's name."""
        return self._lease(check_timeout("timeout", timeout), True)

    def nonblock_checkout(self) -> Lease:
        """`checkout(block=False)`, by Whitepool's name."""
        return self._lease(5.0, False)

    def _lease(self, seconds: float | None, block: bool) -> Lease:
        return Lease(self._member, self._checkout(seconds, block))

    def _checkout(self, seconds: float | None, block: bool = True, keep: bool = False) -> Hold:
        member = self._member
        if member.closed or member.draining:
            raise member.closing()
        site = frames.in_thread(caller_site(), threading.current_thread().name)
        now = time.monotonic()
        deadline = None if seconds is None else now + (seconds or INSTANT)
        try:
            with member.link(deadline) as link:
                return self._ask_for_worker(link, seconds, block, keep, site, now, deadline)
        except TimedOut:
            raise self._unanswered(seconds) from None

    def _ask_for_worker(
        self,
        link: Link,
        seconds: float | None,
        block: bool,
        keep: bool,
        site: str,
        now: float,
        deadline: float | None,
    ) -> Hold:
        member = self._member
        number = link.next_number()
        try:
            data = frames.checkout(number, block, deadline, site, keep, asked=now)
            body = link.ask(number, data, deadline)
            if body[0] == frames.GRANT:
                return Hold(link, frames.read_grant(body))
        except TimedOut:
            raise self._too_late(link, number, seconds) from None
        except LinkBroken:
            raise member.gone() from None
        except BaseException:
            # Interrupted: whatever the manager answers, or has answered, is void.
            try:
                link.say(frames.request(frames.CANCEL, number))
            except (LinkBroken, TimedOut):
                pass  # then there is no worker to give back either
            raise
        raise refusal(frames.read_refused(body), member.name, seconds, block)

    def _too_late(self, link: Link, number: int, seconds: float | None) -> Exception:
        """Cancel a checkout whose time is up; the manager's answer says what was in the way."""
        member = self._member
        until = time.monotonic() + _CANCEL_SECONDS
        try:
            body = link.cancel(number, until)
            return refusal(frames.read_refused(body), member.name, seconds, None)
        except TimedOut:
            return self._unanswered(seconds)
        except LinkBroken:
            return member.gone()

    def _unanswered(self, seconds: float | None) -> CheckoutTimeout:
        return CheckoutTimeout(
            f"no worker of pool {self.name!r} was granted within {seconds:g} s, and its manager "
            "does not answer (still starting, stopped, or the machine is overloaded)"
        )

    def checkin(self, lease: Lease) -> None:
        """Give a lease back, from any thread.

        Raises:
            LeaseError: it is another pool's, or was given back already.
        """
        self._member.own(lease, Lease).checkin()

    def destroyed(self, lease: Lease) -> None:
        """Say that a lease's resource is broken: its worker is killed and replaced.

        Raises:
            LeaseError: it is another pool's, or was given back already.
        """
        self._member.own(lease, Lease).destroy()

    recycle = destroyed

    def transaction(self, fn: Callable[[Lease], T], timeout: float | None = 5.0) -> T:
        """Check out, run `fn(lease)` here in the caller, check in.

        Args:
            fn: gets the lease.
            timeout: as for `checkout`.

        Returns:
            What `fn` returned.

        Raises:
            Exception: as for `checkout`, and what `fn` raised.

        Source: Poolboy's transaction/2.
        """
        with self._lease(check_timeout("timeout", timeout), True) as lease:
            return fn(lease)

    # --- calls ----------------------------------------------------------------------------

    def run(
        self,
        fn: Callable[..., T],
        /,
        *args: Any,
        timeout: float | None = None,
        with_resource: bool = False,
        **kwargs: Any,
    ) -> T:
        """Check out, run `fn(*args, **kwargs)` in the worker, check in.

        Args:
            fn: any function; one that lives in no importable module travels by value.
            args: its arguments.
            timeout: at most how many seconds for all of it, waiting for a worker included; None
                for as long as it takes.
            with_resource: whether the worker's resource is the first argument.
            kwargs: keyword arguments of `fn` (but `timeout` and `with_resource`: bind those with
                `functools.partial`).

        Returns:
            What `fn` returned.

        Raises:
            Exception: what `fn` raised, in its own type, with the remote traceback as its cause.
            CallTimeout: it took too long; its worker was killed and replaced.
            WorkerDied: its worker died when it had begun. (A call that had not begun is given to
                another worker, to three in all.)
            SerializationError: something cannot be pickled or unpickled.
            CheckoutTimeout, FactoryFailed, PoolClosed, ManagerDied: as for `checkout`.
            OSError: this process has no descriptor left for a way to the worker.
        """
        seconds = check_timeout("timeout", timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        flags = self._flags(with_resource) if with_resource else 0
        data, buffers, _ = job = payload.dump_job(fn, args, kwargs)
        member = self._member
        deaths = 0
        while True:
            if member.closed or member.draining:
                raise member.closing()
            try:
                hold, found = member.kept.pop(), True
                if hold.is_recalled():  # a call would wait behind somebody else's, to be refused
                    member.return_channel(hold.worker, hold.recalled())
                    continue
            except IndexError:
                queue = to_join(member)
                if queue is not None:
                    site = caller_site()
                    queued: T = run_queued(queue, member, job, flags, seconds, deadline, site)
                    return queued
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                with asking(member):
                    hold, found = self._checkout(left, keep=True), False
            try:
                message = hold.exchange(member, messages.CALL, flags, data, buffers, deadline)
                if message.kind == messages.ERROR and message.flags == messages.FENCED:
                    member.return_channel(hold.worker, hold.recalled())
                    continue
                returned, value = open_answer(message, fn, hold.id, member.name)
                passed.let_go(buffers)
            except (TimedOut, ChannelBroken, LinkBroken, LeaseError, Refused) as error:
                if isinstance(error, LeaseError) and hold.keep:
                    hold.recalled()  # before its first call
                    continue
                if not isinstance(error, TimedOut) and hold.refused(isinstance(error, Refused)):
                    continue
                if isinstance(error, (ChannelBroken, LeaseError)) and not hold.began():
                    # It died before the call began: while it was kept, or else just now.
                    deaths += not (found or hold.is_recalled())
                    if deaths < MAX_DEATHS:
                        hold.lose()
                        continue
                passed.let_go(buffers)
                raise broken_off(member, hold, error, fn, seconds) from None
            except BaseException as error:
                passed.let_go(buffers)
                if unreached(hold, error):
                    hold.release(member)
                else:
                    hold.abandon("ended by an interrupt", "its call was interrupted")
                raise
            if hold.keep and not hold.is_due():
                member.kept.append(hold)
            else:
                hold.release(member)
            if not returned:
                raise value
            result: T = value
            return result

    def _flags(self, with_resource: bool) -> int:
        if not with_resource:
            return 0
        if not self._member.has_factory:
            raise ValueError(
                f"with_resource=True, but pool {self.name!r} has no factory and so no resources"
            )
        return messages.WITH_RESOURCE

    def submit(
        self,
        fn: Callable[..., T],
        /,
        *args: Any,
        timeout: float | None = None,
        with_resource: bool = False,
        **kwargs: Any,
    ) -> Future[T]:
        """Run `fn(*args, **kwargs)` in a worker, in the background.

        Args:
            fn, args, with_resource, kwargs: as for `run`.
            timeout: at most how many seconds the call may run, from when a worker begins it.

        Returns:
            A `concurrent.futures.Future`. Its `cancel()` also ends a running call, by killing the
            worker; its exceptions are those of `run`. Its callbacks run in the thread that serves
            all jobs of this process: they may submit others, and must not wait for any.

        Raises:
            SerializationError: the function or an argument cannot be pickled.
            PoolClosed, ManagerDied: as for `checkout`.
        """
        seconds = check_timeout("timeout", timeout)
        flags = self._flags(with_resource) if with_resource else 0
        return self._queue(payload.dump_job(fn, args, kwargs), flags, seconds)

    def _queue(self, job: payload.Job, flags: int = 0, seconds: float | None = None) -> JobFuture:
        """`submit` what is pickled already."""
        data, buffers, name = job
        member = self._member
        return member.threaded().call(member, name, flags, seconds, data, buffers, caller_site())

    def map(
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
    ) -> Iterator[T]:
        """Run `fn` on each item (or on items of several iterables together) in the workers.

        The input is read as the results are taken, at most a few windows ahead: it may be endless.
        When 64 MiB of results wait to be taken no more calls are begun until they are; but there
        may be two results for each worker, however large.
        Each call ends on its own: one that raises, or whose worker dies, costs no other its result.

        Args:
            fn: the function; it is pickled once.
            iterables: as for the built-in `map`.
            timeout: at most how many seconds each call may run.
            chunksize: how many calls to send to a worker together; None to have it measured.
            ordered: False to have results in the order in which they come.
            progress: True for a progress bar on standard error (tqdm's, when it is installed), or
                its title.
            with_resource: whether the worker's resource is the first argument.
            return_exceptions: True to have an exception object in the place of a failed call's
                result; otherwise it is raised there and ends the iteration.

        Returns:
            An iterator. Closing it leaves what no worker has begun undone.

        Raises:
            Exception: as for `run`, from the iterator.
        """
        from whitepool_mp.map_results import iterate
        from whitepool_mp.progress import progress_bar

        if not iterables:
            raise TypeError("map() needs at least one iterable")
        job = self._map_job(fn, iterables, timeout, chunksize, with_resource)
        self._send_map(job)
        bar = progress_bar(progress, job.total, job.name)
        return iterate(job, ordered, return_exceptions, bar)

    def _send_map(self, job: MapJob) -> None:
        """Have a map's calls made by this process's engine."""
        threaded = self._member.threaded()
        job._send = threaded.submit
        job.take_out = lambda running: threaded.take_out(job, job.taken_out, running)
        job.site = caller_site()

    def _map_job(
        self,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int | None,
        with_resource: bool,
        **reading: Any,
    ) -> Any:
        from whitepool_mp.jobs import MapJob, known_length

        if chunksize is not None:
            check_count("chunksize", chunksize)
        seconds = check_timeout("timeout", timeout)
        flags = self._flags(with_resource)
        total = known_length(iterables)
        return MapJob(
            self._member, fn, iterables, total, flags, seconds, chunksize, _nowhere, **reading
        )

    # --- looking --------------------------------------------------------------------------

    def status(self) -> Status:
        """The pool's counts now.

        Raises:
            PoolClosed, ManagerDied: the pool is gone.
            CallTimeout: its manager does not answer (it is stopped).
        """
        return make_status(self._member.name, self._ask(frames.STATUS))

    def workers(self) -> list[WorkerInfo]:
        """A record of each worker, with what psutil measures now.

        Raises:
            PoolClosed, ManagerDied: the pool is gone.
            CallTimeout: its manager does not answer (it is stopped).
        """
        return [WorkerInfo(**row) for row in self._ask(frames.WORKERS)]

    def stacks(self) -> list[WorkerStack]:
        """What every worker is doing now: the Python stacks of its threads, busy or not.

        Each worker is sent a signal, and writes its stack in the handler, also while C code runs
        that holds the interpreter's lock. A system call that it interrupts goes on afterwards; but
        those that the kernel never restarts (sleep, poll, select) return early in C code that does
        not expect signals. Python's own functions do.

        Returns:
            A record for each worker, in no more than about a second: one that is stopped, or is
            just being started, is told as such.

        Raises:
            PoolClosed, ManagerDied: the pool is gone.
            CallTimeout: its manager does not answer (it is stopped).
        """
        return [WorkerStack(**row) for row in self._ask(frames.STACKS)]

    def print_statistics(self, file: TextIO | None = None) -> None:
        """Print the counts, one line for the pool and one for each worker.

        Args:
            file: where to; standard output if None.
        """
        print(statistics(self.status(), self.workers()), file=file)

    def resize(self, pool_size: int | None = None, max_overflow: int | None = None) -> None:
        """Change the pool's sizes while it runs; leased workers above them go when checked in.

        Args:
            pool_size: the new number of workers to keep, at least 1; None to leave it.
            max_overflow: the new number of those above; None to leave it.

        Raises:
            ValueError, TypeError: an impossible size.
        """
        now = self.status()
        size, overflow = check_sizes(pool_size, max_overflow, now)
        self._answered(lambda link, until: link.resize(size, overflow, until))
        self._member.capacity = size + overflow

    def _ask(self, kind: int) -> Any:
        return self._answered(lambda link, until: link.question(kind, until))

    def _answered(self, question: Callable[[Link, float], Any]) -> Any:
        """Put a question to the manager, which may be gone, or stopped."""
        deadline = time.monotonic() + _ASK_SECONDS
        try:
            with self._member.link(deadline) as link:
                return question(link, deadline)
        except TimedOut:
            raise CallTimeout(
                f"the manager of pool {self.name!r} did not answer within {_ASK_SECONDS:g} s: "
                "it is stopped, or the machine is overloaded"
            ) from None
        except LinkBroken:
            raise self._member.gone() from None

    # --- other forms ----------------------------------------------------------------------

    def aio(self) -> AsyncSession:
        """The asyncio form of this session, for the running event loop."""
        from whitepool_mp.aio import AsyncSession

        return AsyncSession(self._member)

    def executor(self) -> SessionExecutor:
        """A `concurrent.futures.Executor` over this pool; its shutdown leaves the pool running."""
        from whitepool_mp.executor import SessionExecutor

        return SessionExecutor(self)

    # --- the end --------------------------------------------------------------------------

    def safe_shutdown(self, timeout: float | None = None) -> None:
        """Refuse new checkouts, finish what was submitted, serve who waits, then end.

        Doing it twice, or from several threads, is harmless. Called in a future's callback, it does
        its work in a thread of its own and returns at once.

        Args:
            timeout: at most how many seconds; None for as long as the leases take. What is left
                then is killed.

        Raises:
            ShutdownTimeout: not everything was given back in time; says what was killed.
            ShutdownIncomplete: the pool has ended, and something was lost: somebody killed a worker
                under its lease or terminated the pool meanwhile, or had done so before jobs of this
                process were done.
            ManagerDied: the manager process died meanwhile.
        """
        drain(self._member, check_timeout("timeout", timeout))

    def terminate(self) -> None:
        """End the pool now: every worker is killed, every waiter refused, running calls fail.

        Harmless when it has ended already.
        """
        terminate(self._member)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.terminate()
            return
        self._member.return_forgotten()
        self.safe_shutdown()


def _join(ticket: Ticket) -> Session:
    return Session(Member.join(ticket))


def _nowhere(task: Any) -> None:
    raise AssertionError("a map was fed before it had an engine")
