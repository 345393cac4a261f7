"""`concurrent.futures.Executor` over a pool: for code that is written against that interface."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor as _Base
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, TypeVar

from whitepool_mp.client.shutdown import drain
from whitepool_mp.config import check_count, check_timeout
from whitepool_mp.errors import PoolClosed
from whitepool_mp.jobs import MapJob
from whitepool_mp.map_results import iterate
from whitepool_mp.pool import Pool
from whitepool_mp.wire import payload

if TYPE_CHECKING:
    from whitepool_mp.client.future import JobFuture
    from whitepool_mp.session import Session

T = TypeVar("T")

_CLOSED = "cannot schedule new futures after shutdown"


class SessionExecutor(_Base):
    """An executor over a running pool; shutting it down leaves the pool running.

    Args:
        session: the pool. `session.executor()` makes one of these.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.RLock()  # code that is run at any moment may submit, or end this
        self._open: set[JobFuture] = set()
        self._maps: dict[Future[None], MapJob] = {}
        self._closed = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn(*args, **kwargs)` in a worker.

        Returns:
            A future; its `cancel()` also ends a call that is running.

        Raises:
            RuntimeError: after `shutdown`, or the end of the pool.
            SerializationError: the function or an argument cannot be pickled.
        """
        if self._closed:
            raise RuntimeError(_CLOSED)
        # Not under the lock, which those need whose calls end: it runs code of the user's.
        job = payload.dump_job(fn, args, kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError(_CLOSED)
            try:
                future = self._session._queue(job)
            except PoolClosed as error:
                raise RuntimeError(f"{_CLOSED}: {error}") from error
            self._open.add(future)
        future.add_done_callback(self._ended)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Call `fn` with each item (or items of several iterables together) in the workers.

        All input is read now, and every call is made, also if nobody takes the results.

        Args:
            fn: the function; it is pickled once.
            iterables: as for the built-in `map`.
            timeout: at most how many seconds from now until a result is there; None for no limit.
            chunksize: how many calls to send to a worker together; with 1, short calls travel
                together, as many as fit.
            buffersize: how many calls may be sent before the first result that was not taken; the
                input is read as results are taken. None for all of them.

        Returns:
            An iterator over the results, in order. One that ends early (closed, or by an exception)
            leaves what no worker has begun undone.

        Raises:
            RuntimeError: after `shutdown`, or the end of the pool.
            SerializationError: the function cannot be pickled. (An argument that cannot be fails
                its call.)
            concurrent.futures.TimeoutError: from the iterator: a result was not there in time.
            TypeError, ValueError: an impossible `chunksize`, `buffersize` or `timeout`.
        """
        check_count("chunksize", chunksize)
        if buffersize is not None:
            check_count("buffersize", buffersize)
        seconds = check_timeout("timeout", timeout)
        deadline = None if seconds is None else time.monotonic() + seconds
        if self._closed:
            raise RuntimeError(_CLOSED)
        job = self._session._map_job(
            fn,
            iterables,
            None,
            None if chunksize == 1 else chunksize,
            False,
            whole=buffersize is None,
            ahead=buffersize,
        )
        end: Future[None] = Future()
        job.finished = lambda: self._finished(end)
        results = iterate(job, True, False, None, deadline)
        with self._lock:
            if self._closed:
                raise RuntimeError(_CLOSED)
            try:
                self._session._send_map(job)
            except PoolClosed as error:
                raise RuntimeError(f"{_CLOSED}: {error}") from error
            self._maps[end] = job
        job.feed()
        return results

    def _finished(self, end: Future[None]) -> None:
        """Every call of a map has ended, or never will begin."""
        with self._lock:
            known = self._maps.pop(end, None) is not None
        if known:
            end.set_result(None)
            self._ended(end)

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._open.discard(future)
            last = self._closed and not (self._open or self._maps)
        if last:
            self._after_last()

    def _after_last(self) -> None:
        """Everything has ended after a shutdown."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept nothing more.

        Args:
            wait: whether to return only when everything submitted has ended. (In a future's
                callback it is not waited for: others end only after it.)
            cancel_futures: whether to cancel what has not begun. (What was sent to a worker and
                waits there is asked back, and cancelled a moment later.)
        """
        with self._lock:
            already, self._closed = self._closed, True
            futures, maps = set(self._open), dict(self._maps)
        if cancel_futures:
            for future in futures:
                future.cancel(running=False)
        for job in maps.values():
            (job.close if cancel_futures else job.shut)()
        remaining: set[Future[Any]] = {*futures, *maps}
        if not remaining and not already:
            self._after_last()
        engine = self._session._member.running_engine()
        if wait and not (engine is not None and engine.inside()):
            self._wait_for(remaining)

    def _wait_for(self, remaining: Iterable[Future[Any]]) -> None:
        wait(remaining)


class Executor(SessionExecutor):
    """An executor with a pool of its own, which ends with it.

    Args:
        max_workers: how many workers; by default, as many as there are usable CPUs.
        initializer: called once in each worker with `initargs`.
        initargs: its arguments.
        options: the keyword-only options of `Pool`.

    Raises:
        TypeError, ValueError: a wrong option, as for `Pool`.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        **options: Any,
    ) -> None:
        if initializer is not None:
            if "factory" in options:
                raise TypeError("give factory or initializer, not both")
            options["factory"] = functools.partial(_initialize, initializer, initargs)
        self._pool = Pool(max_workers, **options)
        super().__init__(self._pool.run_service())

    def _after_last(self) -> None:
        drain(self._session._member, None, tell=False)  # each future tells what became of it

    def _wait_for(self, remaining: Iterable[Future[Any]]) -> None:
        wait(remaining)
        self._after_last()


def _initialize(initializer: Callable[..., Any], initargs: tuple[Any, ...]) -> None:
    initializer(*initargs)
