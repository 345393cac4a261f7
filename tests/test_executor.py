"""The executors against what `concurrent.futures` promises."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path
from typing import Any, ClassVar

import deeds
import errands
import pytest
from support import pipe_writer, processes, until

from whitepool_mp import Executor, Pool, Session, WorkerDied
from whitepool_mp.executor import SessionExecutor

SOON = 20.0


@pytest.fixture
def session() -> Iterator[Session]:
    with Pool(2) as running:
        yield running


# --- submit and map ---------------------------------------------------------------------------


def test_it_is_an_executor(executor: SessionExecutor) -> None:
    assert isinstance(executor, concurrent.futures.Executor)


def test_submit_gives_a_future(executor: SessionExecutor) -> None:
    future = executor.submit(pow, 2, 10)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(SOON) == 1024
    with pytest.raises(ValueError, match="number 4"):
        executor.submit(errands.bad_number, 4).result(SOON)


def test_keywords_reach_the_function_whatever_their_names(executor: SessionExecutor) -> None:
    given = {"timeout": -1, "with_resource": True, "fn": 1, "self": 2, "session": 3}
    assert executor.submit(errands.keywords, **given).result(SOON) == given


def test_map_gives_results_in_order(executor: SessionExecutor) -> None:
    assert list(executor.map(errands.square, range(100))) == [n * n for n in range(100)]
    assert list(executor.map(errands.add, [1, 2], [10, 20])) == [11, 22]
    assert list(executor.map(errands.square, range(10), chunksize=4)) == [n * n for n in range(10)]


def test_map_begins_before_anybody_takes_a_result(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    executor.map(functools.partial(errands.trace, path), range(5))
    until(lambda: errands.run_count(path) == 5)


def test_map_raises_when_its_time_is_up(executor: SessionExecutor, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    results = executor.map(errands.pid_and_wait, [path], timeout=0.2)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in errands.lines(path)))


def test_wait_and_as_completed(executor: SessionExecutor) -> None:
    futures = [executor.submit(errands.square, number) for number in range(10)]
    assert {f.result() for f in as_completed(futures, SOON)} == {n * n for n in range(10)}
    assert wait(futures, SOON).done == set(futures)
    assert wait(futures, 0, concurrent.futures.FIRST_COMPLETED).not_done == set()


def test_a_crash_costs_its_own_future_only(executor: SessionExecutor) -> None:
    """Not so in `concurrent.futures`, where it breaks the pool."""
    bad = executor.submit(errands.kill_self)
    good = [executor.submit(errands.square, number) for number in range(20)]
    assert isinstance(bad.exception(SOON), WorkerDied)
    assert [future.result(SOON) for future in good] == [n * n for n in range(20)]


def test_it_works_in_an_event_loop(executor: SessionExecutor) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(executor, errands.square, number) for number in range(20)]
        with pytest.raises(ValueError, match="number 1"):
            await loop.run_in_executor(executor, errands.bad_number, 1)
        return await asyncio.gather(*futures)

    assert asyncio.run(main()) == [n * n for n in range(20)]


def test_cancelling_in_an_event_loop_ends_the_call(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "pids"

    async def main() -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(executor, errands.pid_and_wait, path)
        await loop.run_in_executor(None, until, lambda: errands.run_count(path))
        future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(main())
    (pid,) = map(int, errands.lines(path))
    until(lambda: pid not in [process.pid for process in processes()])


# --- shutdown ---------------------------------------------------------------------------------


def test_nothing_is_accepted_after_a_shutdown(executor: SessionExecutor) -> None:
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(errands.square, 1)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(errands.square, [1])
    executor.shutdown()  # once more


def test_a_shutdown_waits_for_what_was_submitted(executor: SessionExecutor, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    futures = [executor.submit(errands.trace, path, number) for number in range(50)]
    executor.shutdown()
    assert [future.result(0) for future in futures] == list(range(50))


def test_a_shutdown_without_waiting_returns_at_once(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    with pipe_writer(pipe) as connect:
        future = executor.submit(errands.trace_then_wait, tmp_path / "ran", 3, pipe)
        write_end = connect()
        executor.shutdown(wait=False)
        assert not future.done()
        with pytest.raises(RuntimeError):
            executor.submit(errands.square, 1)
        os.write(write_end, b"go")
    assert future.result(SOON) == 3


def test_a_shutdown_that_cancels_lets_the_running_finish(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    pipes = [tmp_path / "pipe-1", tmp_path / "pipe-2"]
    with pipe_writer(pipes[0]) as first, pipe_writer(pipes[1]) as second:
        running = [executor.submit(errands.trace_then_wait, path, 1, pipe) for pipe in pipes]
        ends = [first(), second()]
        queued = [executor.submit(errands.trace, path, number) for number in range(10)]
        executor.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in queued)
        for end in ends:
            os.write(end, b"go")
    assert [future.result(SOON) for future in running] == [1, 1]
    with pytest.raises(CancelledError):
        queued[0].result(0)
    assert errands.lines(path) == ["1", "1"]


def test_a_with_block_waits_for_its_futures(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    with Executor(2) as executor:
        futures = [executor.submit(errands.trace, path, number) for number in range(20)]
    assert [future.result(0) for future in futures] == list(range(20))


def test_the_pool_of_an_executor_ends_with_it() -> None:
    executor = Executor(2)
    assert executor.submit(errands.square, 3).result(SOON) == 9
    assert processes()
    executor.shutdown()
    until(lambda: not processes())


def test_without_waiting_the_pool_ends_after_the_last_future(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with pipe_writer(pipe) as connect:
        executor = Executor(1)
        future = executor.submit(errands.trace_then_wait, tmp_path / "ran", 3, pipe)
        queued = executor.submit(errands.square, 4)
        write_end = connect()
        executor.shutdown(wait=False)
        os.write(write_end, b"go")
    assert (future.result(SOON), queued.result(SOON)) == (3, 16)
    until(lambda: not processes())


def test_without_waiting_and_without_futures_the_pool_ends_at_once() -> None:
    executor = Executor(1)
    executor.shutdown(wait=False)
    until(lambda: not processes())


def test_an_executor_of_a_session_leaves_the_pool_running(session: Session) -> None:
    with session.executor() as executor:
        assert executor.submit(errands.square, 3).result(SOON) == 9
    assert session.run(errands.square, 4) == 16
    with session.executor() as again:
        assert again.submit(errands.square, 5).result(SOON) == 25


def test_a_shutdown_waits_for_its_own_futures_only(session: Session, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    with pipe_writer(pipe) as connect:
        others = session.submit(errands.trace_then_wait, tmp_path / "ran", 3, pipe)
        write_end = connect()
        with session.executor() as executor:
            assert executor.submit(errands.square, 3).result(SOON) == 9
        assert not others.done()
        os.write(write_end, b"go")
    assert others.result(SOON) == 3


def test_shutdown_from_many_threads(executor: SessionExecutor) -> None:
    futures = [executor.submit(errands.square, number) for number in range(50)]
    threads = [threading.Thread(target=executor.shutdown) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [future.result(0) for future in futures] == [n * n for n in range(50)]


def test_shutdown_in_a_done_callback(executor: SessionExecutor) -> None:
    ended = threading.Event()

    def end(_: object) -> None:
        executor.shutdown(wait=False)
        ended.set()

    future = executor.submit(errands.square, 3)
    future.add_done_callback(end)
    assert ended.wait(SOON)
    with pytest.raises(RuntimeError):
        executor.submit(errands.square, 4)


# --- workers ----------------------------------------------------------------------------------


def test_the_initializer_runs_once_in_each_worker(tmp_path: Path) -> None:
    path = tmp_path / "started"
    with Executor(2, initializer=errands.write, initargs=(path, "up")) as executor:
        assert list(executor.map(errands.square, range(50))) == [n * n for n in range(50)]
        until(lambda: errands.run_count(path) == 2)
    assert errands.lines(path) == ["up", "up"]


def test_an_initializer_and_a_factory_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="factory or initializer"):
        Executor(1, initializer=errands.die, factory=errands.Ledger)


def test_a_failing_initializer_reaches_who_waits() -> None:
    from whitepool_mp import FactoryFailed

    with Executor(1, initializer=errands.bad_number, initargs=(8,)) as executor:
        with pytest.raises(FactoryFailed, match="number 8"):
            executor.submit(errands.square, 1).result(SOON)


def test_options_of_the_pool_are_taken(start_method: str) -> None:
    with Executor(1, name="mine", start_method=start_method, env={"A": "b"}) as executor:
        assert executor.submit(os.getenv, "A").result(SOON) == "b"
    with pytest.raises(TypeError, match="unknown option"):
        Executor(1, nonsense=1)
    with pytest.raises(ValueError, match="pool_size"):
        Executor(0)


# --- at the end of a script -------------------------------------------------------------------


@pytest.mark.parametrize(
    "end",
    [
        "executor.shutdown(wait=False)",
        "executor.shutdown(wait=False, cancel_futures=False); del executor",
        "pass",
        "executor.shutdown()",
    ],
    ids=["not waiting", "forgotten", "no shutdown", "waiting"],
)
def test_a_script_s_jobs_are_finished_before_it_ends(
    end: str, tmp_path: Path, script: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = tmp_path / "ran"
    done = script(
        f"""
        from whitepool_mp import Executor
        import errands
        executor = Executor(2)
        for number in range(20):
            executor.submit(errands.trace, {str(path)!r}, number)
        {end}
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(map(int, errands.lines(path))) == list(range(20))


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(text: str) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(text))
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, str(Path(here).parent)])
        return subprocess.run(
            [sys.executable, "-W", "error", str(file)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": path},
        )

    return run


def test_every_call_of_a_map_is_made_though_nobody_takes_a_result(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    executor.map(errands.step, [path] * 300, range(300), [deeds.nap, None, None] * 100)
    executor.map(errands.step, [path] * 300, range(300, 600), chunksize=7)
    executor.shutdown()
    assert errands.run_count(path) == 600


def test_a_map_reads_all_of_its_input_when_it_is_called(executor: SessionExecutor) -> None:
    numbers = list(range(5000))
    for items in (numbers, iter(list(numbers))):
        results = executor.map(errands.square, items)
        numbers[:] = []
        assert list(results) == [n * n for n in range(5000)]
        assert list(items) == []
        numbers[:] = range(5000)


def test_a_map_with_a_buffer_reads_no_further_than_that(executor: SessionExecutor) -> None:
    read = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = executor.map(errands.square, numbers(), buffersize=5)
    for number in range(100):
        assert next(results) == number * number
        assert number < len(read) <= number + 1 + 5
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(results)


def test_cancelling_futures_cancels_what_a_map_has_not_begun(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    results = executor.map(errands.step, [path] * 5000, range(5000), [deeds.nap] * 5000)
    assert next(results) == 0
    executor.shutdown(cancel_futures=True)
    with pytest.raises(concurrent.futures.CancelledError):
        list(results)
    assert errands.run_count(path) < 2000


def test_a_map_outlives_its_executor(executor: SessionExecutor) -> None:
    results = executor.map(errands.square, range(1000), chunksize=10)
    executor.shutdown()
    assert list(results) == [n * n for n in range(1000)]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chunksize": 0}, ValueError),
        ({"chunksize": "1"}, TypeError),
        ({"buffersize": 0}, ValueError),
        ({"buffersize": 1.5}, TypeError),
        ({"timeout": -1}, ValueError),
    ],
)
def test_an_impossible_option_of_a_map_is_refused_by_name(
    executor: SessionExecutor, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(options))):
        executor.map(errands.square, range(4), **options)


class SaysWherePickled:
    """Notes the thread in which it is pickled."""

    threads: ClassVar[list[str]] = []

    def __reduce__(self) -> Any:
        self.threads.append(threading.current_thread().name)
        return int, (7,)


def test_items_of_a_map_are_pickled_in_the_thread_that_called_it(executor: SessionExecutor) -> None:
    """Also those that come after many plain values: their code is to hold up nobody's results."""
    SaysWherePickled.threads.clear()
    results = executor.map(errands.square, [*range(20_000), SaysWherePickled()])
    here = threading.current_thread().name
    assert SaysWherePickled.threads and set(SaysWherePickled.threads) == {here}
    assert list(results)[-1] == 49
