"""Whatever an object does on its way to a worker and back, its one future ends, and no other.

In `concurrent.futures` several of these break the executor, all its futures with it. Here a worker
that dies is replaced, and what fails without a death does not even cost a worker.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import deeds
import errands
import numpy as np
import pytest
from support import until, whole

from whitepool_mp import (
    Executor,
    RemoteTraceback,
    SerializationError,
    WorkerDied,
)
from whitepool_mp.executor import SessionExecutor

SOON = 20.0
BIG = 1 << 20
"""Bytes: more than a socket holds."""


def whole_again(executor: SessionExecutor) -> None:
    """Others were served all the while, and every worker is there."""
    assert [executor.submit(errands.square, n).result(SOON) for n in range(10)] == [
        n * n for n in range(10)
    ]
    whole(executor._session)


# --- an object on its way ---------------------------------------------------------------------


def raise_plain() -> None:
    raise deeds.Plain("on the way")


DEATHS: dict[str, Callable[[], Any]] = {
    "segfault": deeds.segfault,
    "abort": deeds.abort,
    "_exit": deeds.leave,
    "libc exit": deeds.libc_exit,
    "kill": deeds.kill_self,
}
RAISED: dict[str, Callable[[], Any]] = {"exit": deeds.ask_to_exit, "error": raise_plain}


def submits(executor: SessionExecutor) -> Iterator[Callable[..., Future[Any]]]:
    """By itself, and by a callback, in the engine's own thread."""
    yield executor.submit

    def by_callback(*call: Any) -> Future[Any]:
        made: list[Future[Any]] = []
        ended = threading.Event()

        def follow(_: object) -> None:
            made.append(executor.submit(*call))
            ended.set()

        executor.submit(int).add_done_callback(follow)
        assert ended.wait(SOON)
        return made[0]

    yield by_callback


@pytest.mark.parametrize("how", DEATHS)
@pytest.mark.parametrize("where", ["argument", "call", "result"])
def test_a_death_on_the_way_is_that_future_s_alone(
    executor: SessionExecutor, where: str, how: str
) -> None:
    deed = DEATHS[how]
    call: tuple[Any, ...] = (deed,)
    if where == "argument":
        call = (id, deeds.OnUnpickling(deed))
    elif where == "result":
        call = (deeds.on_pickling, deed)
    for submit in submits(executor):
        others = [executor.submit(errands.square, number) for number in range(5)]
        error = submit(*call).exception(SOON)
        assert isinstance(error, WorkerDied), error
        assert error.started
        assert [other.result(SOON) for other in others] == [n * n for n in range(5)]
    whole_again(executor)


@pytest.mark.parametrize("how", RAISED)
@pytest.mark.parametrize("where", ["argument", "call", "result", "result here"])
def test_what_is_raised_on_the_way_costs_no_worker(
    executor: SessionExecutor, where: str, how: str
) -> None:
    deed = RAISED[how]
    own = SystemExit if how == "exit" else deeds.Plain
    call: tuple[Any, ...] = (deed,)
    if where == "argument":
        call = (id, deeds.OnUnpickling(deed))
    elif where == "result":
        call = (deeds.on_pickling, deed)
    elif where == "result here":
        call = (deeds.on_unpickling, deed)
    expected = own if where == "call" else SerializationError
    if where == "result here" and how == "exit":
        expected = SystemExit  # it is for who asks for the result
    for submit in submits(executor):
        error = submit(*call).exception(SOON)
        assert isinstance(error, expected), error
        if expected is SerializationError and where != "result here":
            assert isinstance(error.__cause__, RemoteTraceback)
            assert own.__name__ in str(error.__cause__)
    whole_again(executor)
    counters = executor._session.status().counters
    assert (counters["crashes"], counters["killed"]) == (0, 0)


@pytest.mark.parametrize("how", RAISED)
def test_what_cannot_be_pickled_here_is_refused_here(executor: SessionExecutor, how: str) -> None:
    """At the submit, before anything is queued; not in the future."""
    expected = SystemExit if how == "exit" else SerializationError
    for _ in range(100):
        with pytest.raises(expected):
            executor.submit(id, deeds.OnPickling(RAISED[how]))
    whole_again(executor)


def test_an_item_that_cannot_be_pickled_fails_in_its_place_in_a_map(
    executor: SessionExecutor,
) -> None:
    """What came before it is done all the same."""
    results = executor.map(errands.square, [1, 2, threading.Lock(), 3])
    assert [next(results), next(results)] == [1, 4]
    with pytest.raises(SerializationError, match="argument 0"):
        next(results)
    whole_again(executor)


def test_an_exception_of_the_input_reaches_who_called_map(executor: SessionExecutor) -> None:
    def breaks() -> Iterator[int]:
        yield from range(7)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        executor.map(errands.square, breaks())
    whole_again(executor)


def test_the_reason_why_an_argument_could_not_be_loaded_is_told(executor: SessionExecutor) -> None:
    error = executor.submit(id, deeds.OnUnpickling(deeds.broken)).exception(SOON)
    assert isinstance(error, SerializationError)
    assert "ValueError: broken while unpickling" in str(error)
    assert "in broken" in str(error.__cause__)


def test_a_remote_traceback_shows_the_line_that_raised(executor: SessionExecutor) -> None:
    import traceback

    error = executor.submit(errands.bad_number, 123).exception(SOON)
    assert type(error) is ValueError and error.args == ("number 123",)
    assert isinstance(error.__cause__, RemoteTraceback)
    text = "".join(traceback.format_exception(error))
    assert 'raise ValueError(f"number {number}")' in text


# --- large ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, str, np.ones], ids=["bytes", "text", "array"])
def test_a_worker_that_dies_of_large_arguments(executor: SessionExecutor, kind: Any) -> None:
    data = "a" * BIG if kind is str else kind(BIG)
    results = executor.map(deeds.leave_with, [data] * 10)
    with pytest.raises(WorkerDied):
        list(results)
    futures = [executor.submit(deeds.leave_with, data) for _ in range(5)]
    assert all(isinstance(future.exception(SOON), WorkerDied) for future in futures)
    whole_again(executor)


def test_a_worker_that_is_killed_while_it_is_sent_large_arguments(
    executor: SessionExecutor,
) -> None:
    pid = executor.submit(os.getpid).result(SOON)
    os.kill(pid, signal.SIGSTOP)
    futures = [executor.submit(errands.size_and_sum, np.ones(BIG, np.uint8)) for _ in range(4)]
    os.kill(pid, signal.SIGKILL)
    assert [future.result(SOON) for future in futures] == [(BIG, BIG)] * 4  # it had begun nothing
    whole_again(executor)


def test_a_worker_that_is_killed_while_it_sends_a_large_result(executor: SessionExecutor) -> None:
    """All of it arrives, or the death does."""
    for _ in range(10):
        future = executor.submit(deeds.die_behind, bytes(4 * BIG))
        try:
            assert len(future.result(SOON)) == 4 * BIG
        except WorkerDied:
            continue
    whole_again(executor)


def test_large_results_that_nobody_asks_for_hold_nobody_up(executor: SessionExecutor) -> None:
    futures = [executor.submit(bytes, BIG) for _ in range(20)]
    assert executor.submit(errands.square, 3).result(SOON) == 9
    executor.shutdown()
    assert {len(future.result(0)) for future in futures} == {BIG}


# --- a full queue -----------------------------------------------------------------------------


def test_workers_that_die_under_a_full_queue(executor: SessionExecutor, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    deadly = set(range(0, 600, 50))
    futures = [
        executor.submit(errands.trace_or, path, deadly, errands.kill_self, n) for n in range(600)
    ]
    for number, future in enumerate(futures):
        if number in deadly:
            assert isinstance(future.exception(SOON), WorkerDied)
        else:
            assert future.result(SOON) == number
    assert sorted(map(int, errands.lines(path))) == list(range(600))
    whole_again(executor)


def test_a_worker_that_is_killed_among_cancelled_futures(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    running = [executor.submit(errands.pid_and_wait, path) for _ in range(2)]
    queued = [executor.submit(errands.square, number) for number in range(100)]
    until(lambda: errands.run_count(path) == 2)
    assert all(future.cancel() for future in queued[::2])
    for pid in errands.lines(path):
        os.kill(int(pid), signal.SIGKILL)
    assert all(isinstance(future.exception(SOON), WorkerDied) for future in running)
    for number, future in enumerate(queued):
        if number % 2:
            assert future.result(SOON) == number * number
        else:
            with pytest.raises(CancelledError):
                future.result(0)
    whole_again(executor)


def test_a_cancelled_future_whose_worker_dies_at_the_same_moment(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    for number in range(10):
        path = tmp_path / str(number)
        future = executor.submit(errands.pid_and_wait, path)
        until(lambda path=path: errands.run_count(path))
        pid = int(errands.lines(path)[0])
        killer = threading.Thread(target=os.kill, args=(pid, signal.SIGKILL))
        killer.start()
        cancelled = future.cancel()
        killer.join()
        if cancelled:
            with pytest.raises(CancelledError):
                future.result(SOON)
        else:
            assert isinstance(future.exception(SOON), WorkerDied)
    whole_again(executor)


def test_every_worker_dying_again_and_again_under_waiting_threads(
    executor: SessionExecutor,
) -> None:
    """Each one waits for its own, in its own way."""

    def work(number: int) -> int:
        futures = [executor.submit(errands.square, n) for n in range(30)]
        deadly = [executor.submit(errands.die) for _ in range(3)]
        if number % 2:
            assert not wait(futures + deadly, 60).not_done
        else:
            assert len(list(as_completed(futures + deadly, 60))) == 33
        assert [future.result(0) for future in futures] == [n * n for n in range(30)]
        assert all(isinstance(future.exception(0), WorkerDied) for future in deadly)
        results.append(number)
        return number

    results: list[int] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sorted(results) == list(range(6))
    whole_again(executor)


# --- a callback -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, deeds.Base])
def test_whatever_a_callback_raises_ends_no_executor(
    executor: SessionExecutor,
    kind: type[BaseException],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It runs in the thread on which every other future depends."""
    other = executor.submit(errands.pid_and_wait, tmp_path / "pids")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    future = executor.submit(errands.trace_then_wait, tmp_path / "ran", 3, pipe)
    called = threading.Event()

    def interrupts(_: object) -> None:
        called.set()
        raise kind

    future.add_done_callback(interrupts)
    os.close(os.open(pipe, os.O_WRONLY))
    assert called.wait(SOON)
    assert future.result(SOON) == 3
    assert executor.submit(errands.square, 3).result(SOON) == 9
    assert not other.done()
    assert kind.__name__ in caplog.text
    assert other.cancel()
    whole_again(executor)


# --- map --------------------------------------------------------------------------------------


def test_a_map_s_exception_comes_in_its_place(executor: SessionExecutor) -> None:
    results = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert (next(results), next(results)) == ((0, 1), (0, 1))
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_map_s_time_is_for_all_of_it(executor: SessionExecutor, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    jobs = [functools.partial(errands.square, 2), functools.partial(errands.pid_and_wait, path)]
    whole(executor._session)
    results = executor.map(errands.call, jobs, timeout=1)
    assert next(results) == 4
    with pytest.raises(FutureTimeout):
        next(results)

    def gone() -> bool:
        """what the map gave up is ended, also where it ran"""
        return [row.state for row in executor._session.workers()].count("idle") == 2

    until(gone)


def test_a_map_that_is_left_early_drops_what_has_not_begun(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    results = executor.map(errands.step, [path] * 200, range(200), [deeds.nap] * 200)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    executor.shutdown()
    assert errands.run_count(path) < 100


def test_a_map_of_nothing(executor: SessionExecutor) -> None:
    assert list(executor.map(errands.square, [])) == []
    assert list(executor.map(errands.add, [1], [])) == []


@pytest.mark.parametrize("chunksize", [1, 6, 40, 50])
def test_a_map_s_chunksize_changes_no_result(executor: SessionExecutor, chunksize: int) -> None:
    expected = list(map(pow, range(40), range(40)))
    assert list(executor.map(pow, range(40), range(40), chunksize=chunksize)) == expected


@pytest.mark.parametrize("chunksize", [0, -1])
def test_an_impossible_chunksize_is_refused(executor: SessionExecutor, chunksize: int) -> None:
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(pow, range(4), range(4), chunksize=chunksize)


@pytest.mark.parametrize("workers", [0, -1])
def test_an_impossible_number_of_workers_is_refused(workers: int) -> None:
    with pytest.raises(ValueError, match="pool_size"):
        Executor(workers)


def test_fn_and_self_are_names_like_others(executor: SessionExecutor) -> None:
    future = executor.submit(deeds.named, self=2, fn=3, chunksize=4)
    assert future.result(SOON) == {"self": 2, "fn": 3, "chunksize": 4}
    with pytest.raises(TypeError):
        executor.submit(fn=deeds.named)  # type: ignore[call-arg]


# --- memory -----------------------------------------------------------------------------------


class Thing:
    def touch(self) -> None:
        pass


def collected(gone: weakref.ref[Any]) -> None:
    """Without the garbage collector's help."""
    gc.disable()
    try:
        until(lambda: gone() is None)
    finally:
        gc.enable()


def test_an_object_whose_method_ran_is_not_kept(executor: SessionExecutor) -> None:
    thing = Thing()
    gone = weakref.ref(thing)
    executor.submit(thing.touch)
    del thing
    collected(gone)


def test_what_a_lambda_refers_to_is_not_kept(executor: SessionExecutor) -> None:
    def closure(thing: Thing) -> Callable[[], None]:
        return lambda: thing.touch()

    thing = Thing()
    gone = weakref.ref(thing)
    assert executor.submit(closure(thing)).result(SOON) is None
    del thing
    collected(gone)


def test_a_result_is_its_taker_s_alone(executor: SessionExecutor) -> None:
    for results in (
        executor.map(deeds.Node, range(10)),
        executor._session.map(deeds.Node, range(10)),
    ):
        for thing in results:
            gone = weakref.ref(thing)
            thing.next = None
            del thing
            assert gone() is None


def test_an_exception_that_was_raised_is_its_taker_s_alone(executor: SessionExecutor) -> None:
    """No cycle of the future, what it raises and where it was raised."""
    gc.collect()
    gc.disable()
    try:
        future = executor.submit(deeds.throw, deeds.Plain, 3)
        for _ in range(3):
            try:
                future.result(SOON)
            except deeds.Plain as error:
                gone = weakref.ref(error)
        del future
        until(lambda: gone() is None)
    finally:
        gc.enable()


def test_what_arrived_in_a_worker_goes_when_its_call_has_ended(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "gone"
    executor.submit(id, deeds.OnDeletion(functools.partial(deeds.note, str(path)))).result(SOON)
    until(lambda: deeds.noted(path))


def test_thousands_of_futures_leave_nothing_behind(executor: SessionExecutor) -> None:
    done = [executor.submit(errands.square, number) for number in range(3000)]
    wait(done, SOON)
    gone = [weakref.ref(future) for future in done]
    del done
    until(lambda: not any(ref() is not None for ref in gone))
    assert not executor._open
