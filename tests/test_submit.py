"""Jobs in the background: `submit`'s futures and `map`'s iterators, on real workers."""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import os
import pickle
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import errands
import numpy as np
import pytest
from anatomy import no_successor
from support import pipe_writer, until, whole

from whitepool_mp import (
    CallTimeout,
    Pool,
    PoolClosed,
    SerializationError,
    Session,
    WhitepoolError,
    WorkerDied,
    jobs,
)

SOON = 20.0
"""Seconds: far more than anything here takes, far less than what never ends."""


@pytest.fixture
def pool() -> Iterator[Session]:
    with Pool(2) as session:
        yield session


@pytest.fixture
def single() -> Iterator[Session]:
    with Pool(1) as session:
        yield session


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def busy(session: Session, path: Path) -> tuple[Future[Any], int]:
    """A job that runs until it is killed, and the pid of the process that it runs in."""
    before = errands.run_count(path)
    future = session.submit(errands.pid_and_wait, path)
    until(lambda: errands.run_count(path) > before)
    return future, int(errands.lines(path)[-1])


class Hold:
    """A worker kept busy until `release`."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.lease = session.checkout(timeout=SOON)

    def __enter__(self) -> Hold:
        return self

    def release(self) -> None:
        self.lease.checkin()

    def __exit__(self, *_: object) -> None:
        if self.lease.valid:
            self.lease.checkin()


# --- submit -----------------------------------------------------------------------------------


def test_a_future_gets_the_result(pool: Session) -> None:
    future = pool.submit(errands.add, 1, 2, z=3)
    assert isinstance(future, Future)
    assert future.result(SOON) == 6
    assert future.done() and not future.running() and not future.cancelled()
    assert future.exception() is None


def test_lambdas_and_partials_run_too(pool: Session) -> None:
    n = 5
    assert pool.submit(lambda x: x + n, 1).result(SOON) == 6
    assert pool.submit(functools.partial(pow, 2), 10).result(SOON) == 1024


def test_a_future_gets_the_exception_with_the_remote_traceback(pool: Session) -> None:
    future = pool.submit(errands.bad_number, 3)
    error = future.exception(SOON)
    assert isinstance(error, ValueError) and error.args == ("number 3",)
    assert "in bad_number" in str(error.__cause__)
    with pytest.raises(ValueError, match="number 3"):
        future.result()


@pytest.mark.parametrize("kind", [StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_any_exception_at_all_arrives(pool: Session, kind: type[BaseException]) -> None:
    def fail() -> None:
        raise kind(7)

    error = pool.submit(fail).exception(SOON)
    assert type(error) is kind and error.args == (7,)
    assert pool.submit(errands.square, 2).result(SOON) == 4


def test_an_argument_that_cannot_be_pickled_fails_at_once_and_costs_nothing(pool: Session) -> None:
    with pytest.raises(SerializationError, match=r"argument 0 of .*square"):
        pool.submit(errands.square, threading.Lock())
    assert pool.submit(errands.square, 2).result(SOON) == 4


def test_a_result_that_cannot_be_pickled_fails_that_one_job(pool: Session) -> None:
    with pytest.raises(SerializationError, match="cannot be pickled"):
        pool.submit(threading.Lock).result(SOON)


def test_a_result_that_exits_when_it_is_unpickled_reaches_who_waits_for_it(pool: Session) -> None:
    assert isinstance(pool.submit(errands.exit_when_loaded).exception(SOON), SystemExit)
    assert pool.submit(errands.square, 2).result(SOON) == 4


def test_a_job_over_its_time_is_killed_and_says_so(pool: Session, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    future = pool.submit(errands.pid_and_wait, path, timeout=0.3)
    with pytest.raises(CallTimeout, match=r"longer than 0.3 s"):
        future.result(SOON)
    whole(pool)
    assert int(errands.lines(path)[0]) not in [row.pid for row in pool.workers()]


def test_the_time_in_the_queue_does_not_count(single: Session) -> None:
    with Hold(single) as hold:
        future = single.submit(errands.square, 3, timeout=0.05)
        with pytest.raises(FutureTimeout):
            future.result(0.2)
        hold.release()
        assert future.result(SOON) == 9


def test_a_wrong_timeout_is_refused(pool: Session) -> None:
    with pytest.raises(ValueError, match="timeout"):
        pool.submit(errands.square, 1, timeout=-1)
    with pytest.raises(ValueError, match="with_resource"):
        pool.submit(errands.square, 1, with_resource=True)


def test_the_resource_is_the_first_argument_on_request() -> None:
    with Pool(1, 0, errands.Ledger) as session:
        future = session.submit(errands.entries_and, 3, with_resource=True)
        assert future.result(SOON) == ("Ledger", 3)
        assert session.submit(errands.square, 3).result(SOON) == 9


def test_five_thousand_jobs_end_each_with_its_own_result(pool: Session) -> None:
    futures = [pool.submit(errands.square, number) for number in range(5000)]
    assert [future.result(60) for future in futures] == [n * n for n in range(5000)]


def test_jobs_from_many_threads_end_each_with_its_own_result(pool: Session) -> None:
    results: dict[int, list[int]] = {}

    def work(thread: int) -> None:
        futures = [pool.submit(errands.add, thread, n) for n in range(50)]
        results[thread] = [future.result(SOON) for future in futures]

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1000 * n: [1000 * n + m for m in range(50)] for n in range(30)}


def test_large_payloads_go_both_ways(pool: Session) -> None:
    arrays = [np.full(1_000_000, number) for number in range(4)]
    futures = [pool.submit(errands.doubled, array) for array in arrays]
    for array, future in zip(arrays, futures, strict=True):
        back = future.result(SOON)
        np.testing.assert_array_equal(back, array * 2)
        back[0] = 1  # it is writable


def test_more_buffers_than_a_message_holds_still_arrive(pool: Session) -> None:
    count = 8_400
    arrays = [np.full(2048, number, dtype=np.int64) for number in range(count)]
    assert pool.submit(len, arrays).result(60) == count
    sums = pool.submit(lambda them: sum(int(each[-1]) for each in them), arrays).result(60)
    assert sums == count * (count - 1) // 2


def test_a_future_keeps_no_arguments_alive_after_its_job(pool: Session) -> None:
    array = np.zeros(100_000)
    gone = weakref.ref(array)
    future = pool.submit(errands.size_and_sum, array)
    del array
    assert future.result(SOON) == (800_000, 0)

    def freed() -> bool:
        """the arguments are freed"""
        gc.collect()
        return gone() is None

    until(freed)


def test_done_callbacks_are_called_once_each(pool: Session) -> None:
    called: list[tuple[str, Any]] = []
    ended = threading.Event()
    future = pool.submit(errands.square, 4)
    future.add_done_callback(lambda done: called.append(("first", done.result())))
    future.add_done_callback(lambda done: 1 / 0)  # logged, and harms nobody
    future.add_done_callback(lambda done: (called.append(("second", done.result())), ended.set()))
    assert ended.wait(SOON)
    assert called == [("first", 16), ("second", 16)]
    assert pool.submit(errands.square, 5).result(SOON) == 25


def test_a_done_callback_may_submit(pool: Session) -> None:
    second: list[Future[int]] = []
    ended = threading.Event()

    def again(done: Future[int]) -> None:
        second.append(pool.submit(errands.square, done.result()))
        ended.set()

    pool.submit(errands.square, 3).add_done_callback(again)
    assert ended.wait(SOON)
    assert second[0].result(SOON) == 81


def test_as_completed_and_wait_see_every_future(pool: Session) -> None:
    futures = [pool.submit(errands.square, number) for number in range(20)]
    assert sorted(f.result() for f in as_completed(futures, SOON)) == [n * n for n in range(20)]
    assert wait(futures, SOON).not_done == set()


# --- cancel -----------------------------------------------------------------------------------


def test_a_queued_job_that_is_cancelled_never_runs(single: Session, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    with Hold(single):
        futures = [single.submit(errands.trace, path, number) for number in range(5)]
        assert futures[1].cancel() and futures[3].cancel()
        assert futures[1].cancelled() and futures[1].done()
        assert futures[1].cancel()  # as good as before
        with pytest.raises(CancelledError):
            futures[1].result(0)
    assert [futures[number].result(SOON) for number in (0, 2, 4)] == [0, 2, 4]
    assert errands.lines(path) == ["0", "2", "4"]


def test_cancelling_a_running_job_kills_its_worker(single: Session, tmp_path: Path) -> None:
    future, pid = busy(single, tmp_path / "pids")
    assert future.running()
    assert future.cancel()
    assert future.cancelled() and not future.running()
    with pytest.raises(CancelledError):
        future.result(0)
    assert single.submit(os.getpid).result(SOON) != pid
    whole(single)
    assert single.status().counters["killed"] == 1


def test_wait_and_as_completed_see_a_running_job_cancelled(pool: Session, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    first, _ = busy(pool, path)
    second, _ = busy(pool, path)
    seen: list[Any] = []
    waiter = threading.Thread(target=lambda: seen.append(wait([first, second], SOON)))
    completer = threading.Thread(target=lambda: seen.append(list(as_completed([second], SOON))))
    waiter.start()
    completer.start()
    called: list[Future[Any]] = []
    second.add_done_callback(called.append)
    first.cancel()
    second.cancel()
    waiter.join()
    completer.join()
    assert called == [second]
    assert [second] in seen
    assert wait([first, second], 0).done == {first, second}
    whole(pool)


def test_a_job_that_has_ended_cannot_be_cancelled(pool: Session) -> None:
    future = pool.submit(errands.square, 2)
    future.result(SOON)
    assert not future.cancel()
    assert future.result() == 4


def test_cancel_racing_the_start_and_the_end_leaves_one_outcome(pool: Session) -> None:
    for _ in range(5):
        futures = [pool.submit(errands.square, number) for number in range(60)]
        cancelled = [future.cancel() for future in futures]
        for number, (future, yes) in enumerate(zip(futures, cancelled, strict=True)):
            if yes:
                with pytest.raises(CancelledError):
                    future.result(SOON)
            else:
                assert future.result(SOON) == number * number
    whole(pool)


def test_cancel_from_many_threads_at_once_succeeds_for_all(pool: Session, tmp_path: Path) -> None:
    for _ in range(10):
        future = pool.submit(errands.pid_and_wait, tmp_path / "pids")
        outcomes: list[bool] = []

        def cancel(future: Future[Any] = future, outcomes: list[bool] = outcomes) -> None:
            outcomes.append(future.cancel())

        threads = [threading.Thread(target=cancel) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == [True] * 4
        assert future.cancelled()
    whole(pool)


# --- death ------------------------------------------------------------------------------------


def test_the_job_of_a_dead_worker_says_how_it_died(pool: Session, tmp_path: Path) -> None:
    future, pid = busy(pool, tmp_path / "pids")
    kill(pid)
    error = future.exception(SOON)
    assert isinstance(error, WorkerDied)
    assert (error.pid, error.signal, error.started) == (pid, "SIGKILL", True)
    assert error.running == "errands.pid_and_wait"
    assert pool.submit(errands.square, 3).result(SOON) == 9


def test_queued_jobs_survive_crashes_and_run_exactly_once(pool: Session, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    bad = {7, 8, 50, 99}
    run = functools.partial(errands.trace_or, path, bad, errands.kill_self)
    futures = [pool.submit(run, number) for number in range(100)]
    for number, future in enumerate(futures):
        if number in bad:
            assert isinstance(future.exception(SOON), WorkerDied)
        else:
            assert future.result(SOON) == number
    assert Counter(map(int, errands.lines(path))) == Counter(range(100))


def test_a_job_that_had_not_begun_when_its_worker_died_runs_elsewhere(
    single: Session, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    assert single.submit(errands.square, 2).result(SOON) == 4  # the channel is open
    pid = single.workers()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    future = single.submit(errands.trace, path, 1)
    until(future.running)
    assert errands.lines(path) == []
    kill(pid)
    assert future.result(SOON) == 1
    assert errands.lines(path) == ["1"]


def test_a_job_whose_worker_died_before_its_channel_was_open_runs_elsewhere(
    single: Session, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    whole(single)
    pid = single.workers()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    future = single.submit(errands.trace, path, 1)
    until(future.running)
    kill(pid)
    assert future.result(SOON) == 1
    assert errands.lines(path) == ["1"]


def test_a_worker_that_writes_nonsense_ends_its_own_job_only(pool: Session, tmp_path: Path) -> None:
    other, _ = busy(pool, tmp_path / "pids")
    with pytest.raises(WhitepoolError):
        pool.submit(errands.write_nonsense).result(SOON)
    assert not other.done()
    assert pool.submit(errands.square, 3).result(SOON) == 9
    other.cancel()


def test_every_job_ends_when_the_manager_dies(pool: Session, tmp_path: Path) -> None:
    running, _ = busy(pool, tmp_path / "pids")
    queued = [pool.submit(errands.pid_and_wait, tmp_path / "pids") for _ in range(300)]
    owner = pool._member.owner
    assert owner is not None
    no_successor(pool)
    kill(owner.manager)
    for future in (running, *queued):
        assert isinstance(future.exception(SOON), WhitepoolError)
    with pytest.raises(WhitepoolError):
        pool.submit(errands.square, 1).result(SOON)
    pool.terminate()


# --- with others ------------------------------------------------------------------------------


def test_a_checkout_is_served_though_a_thousand_jobs_are_queued(
    single: Session, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    with Hold(single) as hold:
        futures = [single.submit(errands.trace, path, number) for number in range(1000)]
        until(lambda: single.status().waiting == 1)
        ran_before: list[int] = []

        def check_out() -> None:
            with single.checkout(timeout=60):
                ran_before.append(errands.run_count(path))

        thread = threading.Thread(target=check_out)
        thread.start()
        until(lambda: single.status().waiting == 2)
        hold.release()
        thread.join()
    assert ran_before == [1]  # the job that had asked before; the others are its engine's affair
    assert [future.result(SOON) for future in futures] == list(range(1000))


def test_jobs_are_begun_in_the_order_of_their_submission(single: Session, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    for future in [single.submit(errands.trace, path, number) for number in range(300)]:
        future.result(SOON)
    assert errands.lines(path) == [str(number) for number in range(300)]


def test_a_shutdown_finishes_what_was_submitted(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    session = Pool(2).run_service()
    futures = [session.submit(errands.trace, path, number) for number in range(200)]
    session.safe_shutdown()
    assert [future.result(0) for future in futures] == list(range(200))
    with pytest.raises(PoolClosed):
        session.submit(errands.square, 1)


def test_a_termination_fails_what_was_submitted(tmp_path: Path) -> None:
    session = Pool(1).run_service()
    running, _ = busy(session, tmp_path / "pids")
    queued = session.submit(errands.square, 2)
    session.terminate()
    for future in (running, queued):
        assert isinstance(future.exception(SOON), PoolClosed)


def test_every_job_ends_whenever_the_pool_is_terminated() -> None:
    for _ in range(3):
        session = Pool(1).run_service()
        futures: list[Future[int]] = []

        def submit(session: Session = session, futures: list[Future[int]] = futures) -> None:
            try:
                while True:
                    futures.append(session.submit(errands.square, 3))
            except WhitepoolError:
                return

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda futures=futures: len(futures) > 50)
        session.terminate()
        for thread in threads:
            thread.join()
        for future in futures:
            assert future.exception(SOON) is None or isinstance(future.exception(), PoolClosed)


# --- map --------------------------------------------------------------------------------------


def test_map_gives_results_in_the_order_of_the_input(pool: Session) -> None:
    assert list(pool.map(errands.square, range(500))) == [n * n for n in range(500)]


def test_an_unordered_map_gives_results_as_they_come(pool: Session, tmp_path: Path) -> None:
    path, pipe = tmp_path / "ran", tmp_path / "pipe"

    def first_waits(number: int) -> int:
        if number == 0:
            return errands.trace_then_wait(path, number, pipe)
        return errands.trace(path, number)

    with pipe_writer(pipe) as connect:
        results = pool.map(first_waits, range(30), ordered=False, chunksize=1)
        early = [next(results) for _ in range(29)]
        assert sorted(early) == list(range(1, 30))
        os.write(connect(), b"go")
    assert list(results) == [0]


def test_an_unordered_map_gives_every_result_once(pool: Session) -> None:
    results = list(pool.map(errands.square, range(2000), ordered=False))
    assert sorted(results) == [n * n for n in range(2000)]


def test_map_takes_several_iterables_and_stops_at_the_shortest(pool: Session) -> None:
    assert list(pool.map(errands.add, range(5), [10, 20, 30], itertools.count(100))) == [
        110,
        122,
        134,
    ]


def test_map_of_nothing_is_empty(pool: Session) -> None:
    assert list(pool.map(errands.square, [])) == []
    assert list(pool.map(errands.square, iter(()))) == []
    assert list(pool.map(errands.add, [1, 2], [])) == []
    with pytest.raises(TypeError, match="at least one iterable"):
        pool.map(errands.square)


def test_map_with_the_resource_first() -> None:
    with Pool(1, 0, errands.Ledger) as session:
        assert list(session.map(errands.entries_and, range(3), with_resource=True)) == [
            ("Ledger", number) for number in range(3)
        ]


@pytest.mark.parametrize("chunksize", [1, 7, 100, 5000])
def test_any_chunksize_gives_the_same_results(pool: Session, chunksize: int) -> None:
    results = list(pool.map(errands.square, range(300), chunksize=chunksize))
    assert results == [n * n for n in range(300)]


@pytest.mark.parametrize("chunksize", [0, -1, 1.5, True, "2"])
def test_an_impossible_chunksize_is_refused(pool: Session, chunksize: Any) -> None:
    expected = ValueError if type(chunksize) is int else TypeError
    with pytest.raises(expected, match="chunksize"):
        pool.map(errands.square, [1], chunksize=chunksize)


def test_chunks_of_quick_calls_grow(pool: Session) -> None:
    before = pool.status().counters["granted"]
    assert sum(pool.map(errands.square, range(20_000))) == sum(n * n for n in range(20_000))
    assert pool.status().counters["granted"] - before < 2000


def test_an_endless_input_is_read_a_window_ahead(pool: Session, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    read = itertools.count()
    consumed = 0

    def endless() -> Iterator[int]:
        nonlocal consumed
        for number in read:
            consumed += 1
            yield number

    run = functools.partial(errands.trace, path)
    results = pool.map(run, endless(), chunksize=1)
    window = 2 * pool._member.capacity
    for number in range(100):
        assert next(results) == number
        until(lambda: errands.run_count(path) == consumed)  # every worker is done: room for more
        assert consumed <= number + 1 + (jobs.AHEAD + 1) * window
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("progress", [False, True])
def test_a_range_may_be_longer_than_any_list(pool: Session, progress: bool) -> None:
    begin = 10**20
    results: Any = pool.map(errands.square, range(begin, 2 * begin), progress=progress)
    assert [next(results) for _ in range(100)] == [n * n for n in range(begin, begin + 100)]
    results.close()
    pairs = pool.map(errands.add, range(begin), range(3))
    assert list(pairs) == [0, 2, 4]


def test_a_slow_call_holds_up_an_endless_input_only_a_few_windows_later(
    pool: Session, tmp_path: Path
) -> None:
    path, pipe = tmp_path / "ran", tmp_path / "pipe"
    window = 2 * pool._member.capacity
    read: list[int] = []

    def endless() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    def first_waits(number: int) -> int:
        if number == 0:
            return errands.trace_then_wait(path, number, pipe)
        return errands.trace(path, number)

    with pipe_writer(pipe) as connect:
        results = pool.map(first_waits, endless(), chunksize=1)
        got: list[int] = []
        thread = threading.Thread(target=lambda: got.append(next(results)))
        thread.start()
        until(lambda: errands.run_count(path) >= jobs.AHEAD * window)
        assert len(read) <= (jobs.AHEAD + 1) * window
        os.write(connect(), b"go")
    thread.join()
    assert got == [0]
    assert [next(results) for _ in range(50)] == list(range(1, 51))
    results.close()  # type: ignore[attr-defined]


def test_slow_input_holds_back_no_result_that_is_there(
    pool: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CHUNK_SECONDS", 0.0)  # any input is slow
    path = tmp_path / "ran"

    def slow() -> Iterator[int]:
        for number in itertools.count():
            yield number
            until(lambda number=number: errands.run_count(path) == number + 1)

    results = pool.map(functools.partial(errands.trace, path), slow())
    assert [next(results) for _ in range(20)] == list(range(20))
    assert errands.run_count(path) <= 60
    results.close()  # type: ignore[attr-defined]


def test_nothing_is_read_before_the_first_result_is_wanted(pool: Session) -> None:
    def never() -> Iterator[int]:
        pytest.fail("the input was read")
        yield 1

    pool.map(errands.square, never())


def test_an_exception_of_the_input_reaches_the_taker(pool: Session) -> None:
    def breaks() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(pool.map(errands.square, breaks()))
    assert list(pool.map(errands.square, [3])) == [9]


def test_an_exception_is_raised_at_its_place(pool: Session) -> None:
    results = pool.map(functools.partial(errands.square_unless, 50), range(200))
    assert [next(results) for _ in range(50)] == [n * n for n in range(50)]
    with pytest.raises(ValueError, match="number 50") as caught:
        next(results)
    assert "in square_unless" in str(caught.value.__cause__)
    assert list(results) == []
    assert list(pool.map(errands.square, range(3))) == [0, 1, 4]


def test_exceptions_take_the_place_of_results_on_request(pool: Session) -> None:
    run = functools.partial(errands.square_unless, 50)
    results = list(pool.map(run, range(200), return_exceptions=True))
    error = results.pop(50)
    assert isinstance(error, ValueError)
    assert results == [n * n for n in range(200) if n != 50]


def test_a_crash_in_a_chunk_costs_its_one_item_and_no_item_runs_twice(
    pool: Session, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    run = functools.partial(errands.trace_or, path, {37, 38, 120}, errands.kill_self)
    results = list(pool.map(run, range(200), chunksize=25, return_exceptions=True))
    for number, result in enumerate(results):
        if number in (37, 38, 120):
            assert isinstance(result, WorkerDied)
            assert result.signal == "SIGKILL" and result.started
        else:
            assert result == number
    assert Counter(map(int, errands.lines(path))) == Counter(range(200))


def test_a_crash_is_raised_at_its_place(pool: Session, tmp_path: Path) -> None:
    run = functools.partial(errands.trace_or, tmp_path / "ran", {5}, errands.die)
    results = pool.map(run, range(50), chunksize=10)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(WorkerDied, match="exited with code 9"):
        next(results)


def test_the_time_of_an_item_counts_for_itself(pool: Session, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    run = functools.partial(errands.trace_or, path, {12}, errands.wait_to_be_killed)
    results = list(
        pool.map(run, range(40), chunksize=10, timeout=1.0, return_exceptions=True),
    )
    late = results.pop(12)
    assert isinstance(late, CallTimeout)
    assert results == [number for number in range(40) if number != 12]
    assert Counter(map(int, errands.lines(path))) == Counter(range(40))


def test_an_item_that_cannot_be_pickled_fails_alone(pool: Session) -> None:
    items = [1, 2, threading.Lock(), 3, threading.Lock(), 4]
    for chunksize in (None, 1, 4, 10):
        results = list(pool.map(operator.not_, items, chunksize=chunksize, return_exceptions=True))
        assert [type(each) for each in results] == [
            bool,
            bool,
            SerializationError,
            bool,
            SerializationError,
            bool,
        ]
        assert "argument 0 of" in str(results[2])


def test_an_endless_input_of_what_cannot_be_pickled_is_read_a_window_ahead(pool: Session) -> None:
    read = 0

    def locks() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            assert read < 10_000
            yield threading.Lock()

    results = pool.map(operator.not_, locks(), return_exceptions=True, chunksize=8)
    assert all(isinstance(next(results), SerializationError) for _ in range(10))
    results.close()  # type: ignore[attr-defined]


def test_a_function_that_cannot_be_pickled_fails_at_once(pool: Session) -> None:
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="the function"):
        pool.map(lambda x: lock, [1])


def test_a_result_that_cannot_be_pickled_fails_alone(pool: Session) -> None:
    def some(number: int) -> Any:
        return threading.Lock() if number == 3 else number

    results = list(pool.map(some, range(6), chunksize=6, return_exceptions=True))
    assert isinstance(results.pop(3), SerializationError)
    assert results == [0, 1, 2, 4, 5]


def test_breaking_out_of_the_loop_stops_the_feeding(pool: Session, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    run = functools.partial(errands.trace, path)
    for number in pool.map(run, itertools.count(), chunksize=1):
        if number == 10:
            break
    gc.collect()
    until(lambda: pool.status().leased == 0)
    ran = errands.run_count(path)
    assert ran <= 11 + (jobs.AHEAD + 1) * 2 * pool._member.capacity
    assert pool.submit(errands.square, 3).result(SOON) == 9
    assert errands.run_count(path) == ran


def test_what_is_left_of_a_closed_map_s_chunk_does_not_run_after_a_crash(
    single: Session, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    run = functools.partial(errands.trace_or, path, {5}, errands.wait_to_be_killed)
    results = single.map(run, range(20), chunksize=20)
    assert next(results) == 0
    until(lambda: errands.run_count(path) == 6)
    results.close()  # type: ignore[attr-defined]
    kill(single.workers()[0].pid)
    whole(single)
    assert single.submit(errands.square, 3).result(SOON) == 9
    assert errands.run_count(path) == 6


def test_large_items_go_through_a_map(pool: Session) -> None:
    arrays = (np.full(500_000, number) for number in range(8))
    for number, back in enumerate(pool.map(errands.doubled, arrays)):
        np.testing.assert_array_equal(back, np.full(500_000, 2 * number))


def test_small_and_large_items_keep_their_order(pool: Session) -> None:
    sizes = [1, 100_000, 2, 3, 300_000, 4, 5, 6, 70_000, 7] * 5
    items = [np.ones(size, dtype=np.uint8) for size in sizes]
    for chunksize in (None, 4):
        results = pool.map(errands.size_and_sum, items, chunksize=chunksize)
        assert list(results) == [(size, size) for size in sizes]


def test_two_maps_at_once_share_the_pool(pool: Session) -> None:
    first = pool.map(errands.square, range(100), chunksize=1)
    second = pool.map(errands.add, range(100), range(100), chunksize=1)
    for number in range(100):
        assert next(first) == number * number
        assert next(second) == 2 * number


def test_maps_from_many_threads(pool: Session) -> None:
    results: dict[int, list[int]] = {}

    def work(start: int) -> None:
        results[start] = list(pool.map(errands.square, range(start, start + 200)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(0, 1000, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [m * m for m in range(n, n + 200)] for n in range(0, 1000, 100)}


def test_a_map_under_way_ends_when_the_pool_is_terminated(pool: Session, tmp_path: Path) -> None:
    run = functools.partial(errands.trace_or, tmp_path / "ran", {3}, errands.wait_to_be_killed)
    results = pool.map(run, range(10), chunksize=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    until(lambda: "3" in errands.lines(tmp_path / "ran"))
    terminator = threading.Timer(0, pool.terminate)
    terminator.start()
    with pytest.raises(PoolClosed):
        next(results)
    terminator.join()


# --- progress ---------------------------------------------------------------------------------


def test_progress_is_shown_by_tqdm(pool: Session, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    assert len(list(pool.map(errands.square, range(50), progress=True))) == 50
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "errands.square" in shown.err and "50/50" in shown.err


def test_progress_is_shown_without_tqdm(
    pool: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert len(list(pool.map(errands.square, range(50), progress="squares"))) == 50
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.rstrip("\n").rpartition("\r")[2]
    assert last.startswith("squares: 50/50 [")
    assert shown.err.endswith("\n")


def test_progress_of_an_input_of_unknown_length(
    pool: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert len(list(pool.map(errands.square, iter(range(7)), progress=True))) == 7
    assert "errands.square: 7 [" in capsys.readouterr().err


def test_no_progress_is_shown_unless_wanted(
    pool: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    list(pool.map(errands.square, range(50)))
    assert capsys.readouterr() == ("", "")


def test_a_session_in_another_process_submits_too(pool: Session) -> None:
    def there(session: Session) -> list[int]:
        futures = [session.submit(errands.square, number) for number in range(5)]
        return [future.result(20) for future in futures]

    assert pickle.loads(pickle.dumps(pool)).name == pool.name
    assert pool.submit(there, pool).result(SOON) == [0, 1, 4, 9, 16]


def test_an_idle_engine_uses_no_processor_time(pool: Session) -> None:
    pool.submit(errands.square, 1).result(SOON)
    before = time.process_time()
    with pytest.raises(FutureTimeout):
        Future[None]().result(0.3)
    assert time.process_time() - before < 0.1
