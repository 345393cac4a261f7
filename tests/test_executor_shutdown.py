"""How executors end: with work queued, running, crashing; in a callback, at the script's end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import deeds
import errands
import pytest
from support import gated, processes, until
from user_script import script

from whitepool_mp import Executor, Pool, Session, WorkerDied
from whitepool_mp.executor import SessionExecutor

SOON = 20.0


# --- what is queued ---------------------------------------------------------------------------


def test_many_more_jobs_than_workers_are_all_done(executor: SessionExecutor) -> None:
    futures = [executor.submit(time.sleep, 0.01) for _ in range(100)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert {future.exception(0) for future in futures} == {None}


def test_a_map_whose_results_nobody_took_is_done(executor: SessionExecutor, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    results = executor.map(errands.trace, [path] * 30, range(30))
    executor.shutdown()
    assert errands.run_count(path) == 30
    assert list(results) == list(range(30))


def test_what_is_cancelled_at_the_end_never_runs(executor: SessionExecutor, tmp_path: Path) -> None:
    """And nothing else is lost: each one ran to its end, or is cancelled and never began."""
    path = tmp_path / "ran"
    futures = [executor.submit(errands.step, path, n, time.sleep, 0.05) for n in range(40)]
    until(lambda: errands.run_count(path))
    executor.shutdown(cancel_futures=True)
    assert all(future.done() for future in futures)
    ran = [n for n, future in enumerate(futures) if not future.cancelled()]
    assert [futures[n].result(0) for n in ran] == ran
    assert sorted(map(int, errands.lines(path))) == ran
    assert 0 < len(ran) < 20


def test_cancelling_at_the_end_never_kills_what_has_begun(tmp_path: Path) -> None:
    """Whenever it comes: jobs are begun all the while."""
    for number in range(20):
        path = tmp_path / str(number)
        executor = Executor(1)
        futures = [executor.submit(errands.trace, path, n) for n in range(50)]
        until(lambda path=path, number=number: errands.run_count(path) >= min(number, 5))
        executor.shutdown(cancel_futures=True)
        done = [n for n, future in enumerate(futures) if not future.cancelled()]
        assert [futures[n].result(0) for n in done] == done
        assert list(map(int, errands.lines(path))) == done


def test_one_cancelled_right_before_the_end_holds_nothing_up(executor: SessionExecutor) -> None:
    assert executor.submit(int).result(SOON) == 0
    future = executor.submit(int)
    future.cancel()
    executor.shutdown()
    assert future.done()


def test_a_running_job_cancelled_while_the_end_is_waited_for_ends_it(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    future, fd = gated(executor, tmp_path)
    queued = executor.submit(errands.square, 3)
    waiter = threading.Thread(target=executor.shutdown)
    waiter.start()
    future.cancel()
    waiter.join(SOON)
    assert not waiter.is_alive()
    assert queued.result(0) == 9
    with pytest.raises(CancelledError):
        future.result(0)
    os.close(fd)


def test_one_that_was_not_waited_for_can_be_waited_for_later(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    future, fd = gated(executor, tmp_path)
    executor.shutdown(wait=False)
    executor.shutdown(wait=False, cancel_futures=True)
    assert not future.done()
    os.close(fd)
    executor.shutdown(wait=True)
    if isinstance(executor, Executor):
        assert future.result(0) == 42
    assert future.result(SOON) == 42


def test_a_with_block_that_raises_still_finishes_what_was_submitted(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    futures = []
    with pytest.raises(KeyError), Executor(2) as executor:
        futures += [executor.submit(errands.trace, path, number) for number in range(20)]
        raise KeyError
    assert [future.result(0) for future in futures] == list(range(20))


def test_a_shutdown_inside_the_with_block_is_enough(executor: SessionExecutor) -> None:
    with executor as same:
        assert same is executor
        same.shutdown()
    with pytest.raises(RuntimeError):
        executor.submit(int)


# --- crashes ----------------------------------------------------------------------------------


def test_a_worker_that_dies_while_the_end_is_waited_for(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    future = executor.submit(errands.pid_and_wait, path)
    queued = [executor.submit(errands.square, number) for number in range(20)]
    until(lambda: errands.run_count(path))
    waiter = threading.Thread(target=executor.shutdown)
    waiter.start()
    until(lambda: executor._closed)
    os.kill(int(errands.lines(path)[0]), signal.SIGKILL)
    waiter.join(SOON)
    assert not waiter.is_alive()
    assert isinstance(future.exception(0), WorkerDied)
    assert [each.result(0) for each in queued] == [n * n for n in range(20)]


def test_after_crashes_an_executor_ends_as_any_other(executor: SessionExecutor) -> None:
    futures = [executor.submit(deed) for deed in (errands.die, errands.kill_self, deeds.abort) * 2]
    executor.shutdown()
    assert all(isinstance(future.exception(0), WorkerDied) for future in futures)


def test_an_argument_that_cannot_be_pickled_holds_no_shutdown_up(executor: SessionExecutor) -> None:
    for _ in range(5):
        with pytest.raises(Exception, match="cannot be pickled"):
            executor.submit(id, threading.Lock())
    executor.shutdown(wait=False)
    executor.shutdown()


def test_a_pool_that_ends_under_its_executor() -> None:
    """What it takes no more is refused as `concurrent.futures` refuses it."""
    session = Pool(1).run_service()
    executor = session.executor()
    running = executor.submit(deeds.hang)
    until(running.running)
    session.terminate()
    assert running.exception(SOON) is not None
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)
    executor.shutdown()


# --- where from -------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [True, False])
def test_the_end_in_a_callback_waits_for_nothing_that_only_ends_after_it(
    executor: SessionExecutor, tmp_path: Path, waits: bool
) -> None:
    slow, fd = gated(executor, tmp_path)
    first, end = gated(executor, tmp_path)
    queued = [executor.submit(errands.square, number) for number in range(20)]
    ended = threading.Event()

    def shut(_: object) -> None:
        executor.shutdown(wait=waits)
        ended.set()

    first.add_done_callback(shut)
    os.close(end)
    assert ended.wait(SOON)
    assert not slow.done()
    os.close(fd)
    assert [future.result(SOON) for future in queued] == [n * n for n in range(20)]
    assert slow.result(SOON) == 42


def test_a_submit_in_a_callback_after_the_shutdown_is_refused(
    executor: SessionExecutor, tmp_path: Path
) -> None:
    future, end = gated(executor, tmp_path)
    refused: list[BaseException] = []
    called = threading.Event()

    def again(_: object) -> None:
        try:
            executor.submit(int)
        except BaseException as error:
            refused.append(error)
        called.set()

    future.add_done_callback(again)
    executor.shutdown(wait=False)
    os.close(end)
    assert called.wait(SOON)
    assert [type(error) for error in refused] == [RuntimeError]


def test_chains_of_jobs_that_callbacks_submit(executor: SessionExecutor) -> None:
    seen: dict[str, list[int]] = {name: [] for name in "abc"}
    over = threading.Semaphore(0)

    def follow(name: str, left: int) -> None:
        def ended(done: Any) -> None:
            seen[name].append(done.result())
            if left:
                follow(name, left - 1)
            else:
                over.release()

        executor.submit(errands.add, left, 0).add_done_callback(ended)

    for name in seen:
        follow(name, 60)
    for _ in seen:
        assert over.acquire(timeout=SOON)
    assert seen == {name: list(range(60, -1, -1)) for name in "abc"}


def test_submits_that_race_a_shutdown_are_refused_or_done(executor: SessionExecutor) -> None:
    futures: list[Any] = []
    refused: list[Exception] = []

    def submit() -> None:
        try:
            while True:
                futures.append(executor.submit(errands.square, 3))
        except Exception as error:
            refused.append(error)

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(futures) > 100)
    executor.shutdown()
    for thread in threads:
        thread.join(SOON)
    assert [type(error) for error in refused] == [RuntimeError] * 4
    done, not_done = wait(futures, SOON)
    assert not not_done
    assert {future.result(0) for future in done} == {9}


class PicksItself:
    """Submits, while it is pickled, and waits for what comes of it."""

    def __init__(self, executor: SessionExecutor) -> None:
        self.executor = executor

    def __reduce__(self) -> Any:
        return int, (self.executor.submit(errands.square, 3).result(SOON),)


def test_an_argument_whose_pickling_takes_long_holds_up_no_other_job(
    executor: SessionExecutor,
) -> None:
    """It may even wait for one."""
    assert executor.submit(errands.square, PicksItself(executor)).result(SOON) == 81


def test_an_end_while_an_argument_is_pickled(executor: SessionExecutor) -> None:
    class Ends:
        def __reduce__(self) -> Any:
            executor.shutdown()
            return int, ()

    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(errands.square, Ends())


# --- many -------------------------------------------------------------------------------------


def test_many_executors_at_once() -> None:
    executors = [Executor(1) for _ in range(6)]
    futures = [each.submit(errands.square, n) for n, each in enumerate(executors)]
    assert [future.result(SOON) for future in futures] == [n * n for n in range(6)]
    for each in executors:
        each.shutdown(wait=False)
    until(lambda: not processes())


def test_executors_made_and_ended_in_threads() -> None:
    results: list[list[int]] = []

    def work() -> None:
        for _ in range(2):
            with Executor(1) as executor:
                results.append(list(executor.map(errands.square, range(5))))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[0, 1, 4, 9, 16]] * 8


def test_an_executor_may_be_ended_in_another_thread_than_it_was_made_in() -> None:
    made: list[Executor] = []
    maker = threading.Thread(target=lambda: made.append(Executor(1)))
    maker.start()
    maker.join(SOON)
    future = made[0].submit(errands.square, 3)
    ender = threading.Thread(target=made[0].shutdown)
    ender.start()
    ender.join(SOON)
    assert future.result(0) == 9


def nested(depth: int) -> int:
    if depth == 0:
        return os.getpid()
    with Executor(1) as executor:
        return executor.submit(nested, depth - 1).result(SOON) + 0


def test_executors_in_workers_of_executors(start_method: str) -> None:
    with Executor(1, start_method=start_method) as executor:
        pid = executor.submit(nested, 3).result(60)
    assert pid not in [process.pid for process in processes()]


def test_an_executor_in_a_worker_ends_with_its_worker(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "pids"

    def inner(path: Path) -> None:
        with Executor(2) as executor:
            futures = [executor.submit(errands.pid_and_wait, path) for _ in range(2)]
            wait(futures)

    executor = Executor(1, start_method=start_method)
    future = executor.submit(inner, path)
    until(lambda: errands.run_count(path) == 2)
    future.cancel()
    executor.shutdown()
    until(lambda: not processes())


# --- forgotten --------------------------------------------------------------------------------


def test_one_that_is_forgotten_finishes_its_jobs_warns_and_goes(tmp_path: Path) -> None:
    executor = Executor(2)
    held = [gated(executor, tmp_path)]
    queued = [executor.submit(errands.square, number) for number in range(10)]
    del executor
    gc.collect()
    assert [each.result(SOON) for each in queued] == [n * n for n in range(10)]
    with pytest.warns(ResourceWarning, match="never shut down"):
        let_go(held, queued)


def let_go(held: list[tuple[Any, int]], queued: list[Any]) -> None:
    """Let the last job end, and wait until the pool that nobody refers to any more has, too."""
    future, fd = held.pop()
    os.close(fd)
    assert future.result(SOON) == 42
    del future
    queued.clear()

    def over() -> bool:
        """no process left of a forgotten executor"""
        gc.collect()
        return not processes()

    until(over)


# --- an event loop ----------------------------------------------------------------------------


def test_as_the_default_executor_of_an_event_loop_it_ends_with_the_loop() -> None:
    """asyncio shuts it down in a thread, and waits."""

    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        executor = Executor(2)
        calls = [loop.run_in_executor(executor, errands.square, n) for n in range(10)]
        with pytest.raises(WorkerDied):
            await loop.run_in_executor(executor, errands.die)
        try:
            return await asyncio.gather(*calls)
        finally:
            await asyncio.to_thread(executor.shutdown)

    assert asyncio.run(main()) == [n * n for n in range(10)]
    until(lambda: not processes())


# --- a script's end ---------------------------------------------------------------------------

LAST = {
    "running and queued": """
        executor = Executor(2, start_method=sys.argv[1])
        for number in range(8):
            executor.submit(slow, number)
        """,
    "a map that nobody looked at": """
        executor = Executor(2, start_method=sys.argv[1])
        executor.map(slow, range(8))
        """,
    "after a shutdown that did not wait": """
        executor = Executor(2, start_method=sys.argv[1])
        executor.map(slow, range(8))
        executor.shutdown(wait=False)
        """,
    "of a session's executor": """
        session = pool(2)
        session = session.run_service()
        session.executor().map(slow, range(8))
        """,
    "after a crash": """
        executor = Executor(2, start_method=sys.argv[1])
        executor.submit(os._exit, 3)
        executor.map(slow, range(8))
        """,
}


@pytest.mark.parametrize("what", LAST)
def test_a_script_ends_when_its_jobs_have(start_method: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    before = f"""
        from whitepool_mp import Executor
        def slow(number):
            time.sleep(0.1)
            with open({str(path)!r}, "a") as file:
                file.write(f"{{number}}\\n")
        """
    with script(LAST[what], start_method, before) as client:
        out, err = client.finish()
    assert (client.process.returncode, out, err) == (0, "", "")
    assert sorted(map(int, errands.lines(path))) == list(range(8))


def test_cancelling_at_a_script_s_end_drops_what_has_not_begun(
    start_method: str, tmp_path: Path
) -> None:
    path = tmp_path / "ran"
    code = f"""
        from whitepool_mp import Executor
        def slow(number):
            with open({str(path)!r}, "a") as file:
                file.write(f"{{number}}\\n")
            time.sleep(0.2)
        executor = Executor(1, start_method=sys.argv[1])
        futures = [executor.submit(slow, number) for number in range(50)]
        while not os.path.exists({str(path)!r}):
            pass
        executor.shutdown(wait=False, cancel_futures=True)
        tell([future.cancelled() for future in futures].index(True))
    """
    with script(code, start_method) as client:
        begun = client.hear()
        _, err = client.finish()
    assert (client.process.returncode, err) == (0, "")
    assert errands.lines(path) == [str(number) for number in range(begun)]


def test_a_submit_after_the_script_s_end_is_refused(start_method: str) -> None:
    """In an exit handler that comes after the pool's own."""
    code = """
        executor = Executor(1, start_method=sys.argv[1])
        executor.submit(int).result()
    """
    before = """
        import atexit
        def late():
            try:
                executor.submit(int)
            except RuntimeError as error:
                print("refused:", error)
        atexit.register(late)
        for name in [name for name in sys.modules if name.startswith("whitepool_mp")]:
            del sys.modules[name]
        from whitepool_mp import Executor
    """
    with script(code, start_method, before) as client:
        out, err = client.finish()
    assert out.startswith("refused: cannot schedule new futures after shutdown")
    assert (client.process.returncode, err) == (0, "")


def test_a_session_that_a_script_left_open_is_not_its_executor_s_to_end() -> None:
    with Pool(1) as session:
        for _ in range(3):
            with session.executor() as executor:
                assert executor.submit(errands.square, 3).result(SOON) == 9
        assert isinstance(session, Session)
        assert session.run(errands.square, 4) == 16
