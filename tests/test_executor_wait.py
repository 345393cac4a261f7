"""What `wait` and `as_completed` tell of this pool's futures, whatever has become of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    as_completed,
    wait,
)
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import deeds
import errands
import pytest
from support import gated, until

from whitepool_mp import Executor, PoolClosed, WorkerDied
from whitepool_mp.executor import SessionExecutor

SOON = 20.0


Gate = Callable[[], tuple[Future[Any], Callable[[], None]]]


@pytest.fixture
def held(executor: SessionExecutor, tmp_path: Path) -> Iterator[Gate]:
    """Makes a future of a job that runs until it is let go."""
    ends: list[Callable[[], None]] = []

    def make() -> tuple[Future[Any], Callable[[], None]]:
        future, fd = gated(executor, tmp_path)
        gone: list[bool] = []

        def let_go() -> None:
            if not gone:
                gone.append(True)
                os.close(fd)

        ends.append(let_go)
        return future, let_go

    yield make
    for end in ends:
        end()


def ended(executor: SessionExecutor) -> dict[str, Future[Any]]:
    """A future of each way to have ended: and of one that nobody's pool knows."""
    futures = {
        "result": executor.submit(errands.square, 3),
        "exception": executor.submit(errands.bad_number, 4),
        "death": executor.submit(errands.die),
        "cancelled": executor.submit(deeds.hang),
    }
    futures["cancelled"].cancel()
    for future in futures.values():
        until(future.done)
    foreign: Future[Any] = Future()
    foreign.set_result(1)
    return {**futures, "foreign": foreign}


# --- wait -------------------------------------------------------------------------------------


def test_what_has_ended_is_done_however_it_ended(executor: SessionExecutor) -> None:
    futures = set(ended(executor).values())
    for until_when in (ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION):
        assert wait(futures, 0, until_when) == (futures, set())


def test_the_first_to_end_ends_the_wait(executor: SessionExecutor, held: Gate) -> None:
    (slow, _), (other, let_go) = held(), held()
    threading.Timer(0.05, let_go).start()
    done, not_done = wait([slow, other], SOON, FIRST_COMPLETED)
    assert (done, not_done) == ({other}, {slow})


def test_one_that_has_ended_ends_the_wait_at_once(executor: SessionExecutor, held: Gate) -> None:
    slow, _ = held()
    for name, future in ended(executor).items():
        assert wait([slow, future], SOON, FIRST_COMPLETED) == ({future}, {slow}), name


@pytest.mark.parametrize("how", ["raises", "dies"])
def test_the_first_exception_ends_the_wait(
    executor: SessionExecutor, held: Gate, how: str, tmp_path: Path
) -> None:
    """A worker's death is an exception like others; a result and a cancelled future are none."""
    slow, _ = held()
    fine = executor.submit(errands.square, 2)
    assert fine.result(SOON) == 4
    cancelled = executor.submit(deeds.hang)
    assert cancelled.cancel()
    assert wait([slow, fine, cancelled], 0.05, FIRST_EXCEPTION).not_done == {slow}
    deed = errands.bad_number if how == "raises" else os._exit
    bad = executor.submit(deed, 5)
    done, not_done = wait([slow, bad, fine, cancelled], SOON, FIRST_EXCEPTION)
    assert (done, not_done) == ({bad, fine, cancelled}, {slow})


def test_without_an_exception_the_wait_is_for_all(executor: SessionExecutor) -> None:
    futures = {executor.submit(errands.square, number) for number in range(20)}
    assert wait(futures, SOON, FIRST_EXCEPTION) == (futures, set())


def test_a_wait_ends_in_time_and_tells_what_has_not_ended(
    executor: SessionExecutor, held: Gate
) -> None:
    slow, let_go = held()
    futures = set(ended(executor).values())
    assert wait({slow, *futures}, 0.1) == (futures, {slow})
    assert wait({slow, *futures}, 0) == (futures, {slow})
    assert slow.running() and not slow.done()
    let_go()
    assert wait([slow], SOON) == ({slow}, set())
    assert slow.result(0) == 42


def test_duplicates_count_once(executor: SessionExecutor, held: Gate) -> None:
    slow, let_go = held()
    threading.Timer(0.05, let_go).start()
    assert wait([slow, slow], SOON) == ({slow}, set())
    assert list(as_completed([slow, slow], SOON)) == [slow]


def test_a_wait_of_nothing_ends_at_once() -> None:
    assert wait([], SOON) == (set(), set())
    assert list(as_completed([], SOON)) == []


def test_many_threads_wait_for_the_same_futures(executor: SessionExecutor, held: Gate) -> None:
    slow, let_go = held()
    quick = [executor.submit(errands.square, number) for number in range(50)]
    seen: list[Any] = []

    def each(kind: int) -> None:
        if kind == 0:
            seen.append(wait([slow, *quick], SOON).not_done)
        elif kind == 1:
            seen.append(set(as_completed([slow, *quick], SOON)) - {slow, *quick})
        elif kind == 2:
            seen.append(slow.result(SOON) - 42 or set())
        else:
            seen.append(slow.exception(SOON) or set())

    threads = [threading.Thread(target=each, args=(n % 4,)) for n in range(20)]
    for thread in threads:
        thread.start()
    let_go()
    for thread in threads:
        thread.join(SOON)
    assert seen == [set()] * 20


def test_a_wait_over_two_pools(executor: SessionExecutor, held: Gate) -> None:
    with Executor(1) as other:
        slow, _ = held()
        quick = other.submit(errands.square, 3)
        assert wait([slow, quick], SOON, FIRST_COMPLETED) == ({quick}, {slow})


# --- as_completed -----------------------------------------------------------------------------


def test_what_has_ended_comes_first(executor: SessionExecutor, held: Gate) -> None:
    slow, let_go = held()
    futures = set(ended(executor).values())
    seen = []
    for future in as_completed([slow, *futures], SOON):
        seen.append(future)
        if len(seen) == len(futures):
            assert set(seen) == futures
            let_go()
    assert seen[-1] is slow


def test_no_time_at_all_gives_what_has_ended(executor: SessionExecutor, held: Gate) -> None:
    slow, _ = held()
    futures = set(ended(executor).values())
    seen = set()
    with pytest.raises(FutureTimeout):
        for future in as_completed([slow, *futures], 0):
            seen.add(future)
    assert seen == futures


def test_futures_come_in_the_order_in_which_they_end(executor: SessionExecutor, held: Gate) -> None:
    (first, let_first), (second, let_second) = held(), held()
    coming = as_completed([first, second], SOON)
    let_second()
    assert next(coming) is second
    let_first()
    assert next(coming) is first


def test_no_reference_to_a_future_that_was_handed_out_is_kept(executor: SessionExecutor) -> None:
    import weakref

    futures = [executor.submit(errands.square, number) for number in range(20)]
    wait(futures, SOON)
    coming = as_completed(futures, SOON)
    futures = [next(coming)]
    seen = weakref.ref(futures.pop())
    del futures
    until(lambda: seen() is None)
    assert len(list(coming)) == 19


# --- a future by itself -----------------------------------------------------------------------


def test_a_future_s_result_comes_in_time_or_not(executor: SessionExecutor, held: Gate) -> None:
    slow, let_go = held()
    for ask in (slow.result, slow.exception):
        for seconds in (0, 0.05):
            with pytest.raises(FutureTimeout):
                ask(seconds)
    let_go()
    assert slow.result(SOON) == 42
    assert slow.exception(0) is None


def test_what_a_cancelled_future_says(executor: SessionExecutor) -> None:
    future = executor.submit(deeds.hang)
    assert future.cancel() and future.cancel()
    assert future.cancelled() and future.done() and not future.running()
    for ask in (future.result, future.exception):
        with pytest.raises(CancelledError):
            ask(0)


def test_an_exception_that_is_false_is_raised_all_the_same(executor: SessionExecutor) -> None:
    future = executor.submit(deeds.throw, deeds.False_, 1)
    with pytest.raises(deeds.False_):
        future.result(SOON)
    with pytest.raises(deeds.False_):
        future.result(0)
    assert isinstance(future.exception(0), deeds.False_)
    with pytest.raises(deeds.False_):
        list(executor.map(deeds.throw, [deeds.False_], [1]))


def test_a_callback_is_called_at_once_when_the_future_has_ended(executor: SessionExecutor) -> None:
    called: list[tuple[Any, Any]] = []
    for future in ended(executor).values():
        future.add_done_callback(lambda done: called.append((done, threading.current_thread())))
        assert called.pop() == (future, threading.current_thread())
        assert called == []


def test_callbacks_are_called_in_their_order_and_once_whatever_one_does(
    executor: SessionExecutor, held: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    slow, let_go = held()
    called: list[int] = []
    ended = threading.Event()
    for number in range(5):
        slow.add_done_callback(lambda _, number=number: called.append(number))
        slow.add_done_callback(lambda _: 1 / 0)
    slow.add_done_callback(lambda _: ended.set())
    let_go()
    assert ended.wait(SOON)
    assert called == [0, 1, 2, 3, 4]
    assert caplog.text.count("ZeroDivisionError: ") == 5
    assert executor.submit(errands.square, 3).result(SOON) == 9


def test_each_future_has_an_exception_of_its_own(executor: SessionExecutor) -> None:
    """One that many shared would collect the tracebacks of all who look."""
    futures = [executor.submit(errands.die) for _ in range(4)]
    errors = [future.exception(SOON) for future in futures]
    assert all(isinstance(error, WorkerDied) for error in errors)
    assert len(set(map(id, errors))) == 4


def test_each_future_has_one_also_when_the_pool_ends(executor: SessionExecutor) -> None:
    futures = [executor.submit(deeds.hang) for _ in range(6)]
    until(lambda: sum(future.running() for future in futures) >= 2)
    executor._session.terminate()
    errors = [future.exception(SOON) for future in futures]
    assert all(isinstance(error, PoolClosed) for error in errors)
    assert len(set(map(id, errors))) == 6
