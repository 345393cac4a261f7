"""Bursts: many threads, tasks or processes that each `run` something at the same moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deeds
import errands
import pytest
from anatomy import manager
from support import pipe_writer, until, whole
from user_script import script

from whitepool_mp import (
    CallTimeout,
    CheckoutTimeout,
    FactoryFailed,
    LeaseError,
    Pool,
    PoolClosed,
    Session,
)

T = 60.0
"""Seconds that nothing here should need: a deadline against hanging."""


def burst(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Let `count` threads that are new each do `work(number)`; what each returned or raised."""
    ended: list[Any] = [None] * count

    def body(number: int) -> None:
        try:
            ended[number] = work(number)
        except BaseException as error:
            ended[number] = error

    threads = [threading.Thread(target=body, args=(n,), name="test") for n in range(count)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(T)
    assert not any(each.is_alive() for each in threads)
    return ended


def granted(session: Session) -> int:
    return session.status().counters["granted"]


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A pipe for `errands.wait_for`; gives what lets the one who waits there go on."""
    with pipe_writer(tmp_path / "pipe") as connect:
        yield lambda: os.write(connect(), b"!")


@pytest.fixture
def long(tmp_path: Path) -> tuple[Any, ...]:
    """A call that lasts until `pipe` is called, and the file in which it leaves a 1."""
    return errands.step, tmp_path / "ran", 1, errands.wait_for, tmp_path / "pipe"


@contextlib.contextmanager
def running(session: Session, long: tuple[Any, ...], folder: Path) -> Iterator[Future[Any]]:
    """One thread's `run` has the only worker, until `pipe` is called."""
    with ThreadPoolExecutor(1) as runner:
        future = runner.submit(session.run, *long)
        until(lambda: errands.run_count(folder / "ran"))
        yield future
        assert future.result(T) == 1


# --- one process ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 400])
def test_a_burst_of_threads_is_granted_about_a_worker_each(start_method: str, count: int) -> None:
    with Pool(2, start_method=start_method) as session:
        session.run(abs, -1)
        for _ in range(3):
            before = granted(session)
            assert burst(count, lambda n: session.run(abs, -n)) == list(range(count))
            assert granted(session) - before <= 2 * count
        whole(session)
        counters = session.status().counters
        assert counters["killed"] == counters["crashes"] == 0


def test_a_burst_of_threads_that_stay_is_granted_about_a_worker_each(start_method: str) -> None:
    count = 40
    with Pool(2, start_method=start_method) as session, ThreadPoolExecutor(count) as threads:
        for _ in range(10):
            before = granted(session)
            futures = [threads.submit(session.run, abs, -n) for n in range(count)]
            assert [future.result(T) for future in futures] == list(range(count))
            assert granted(session) - before <= 2 * count
        whole(session)


def test_2000_threads_get_each_their_own_result(start_method: str) -> None:
    """They need no connection each."""
    with Pool(2, start_method=start_method) as session:
        whole(session)
        assert burst(2000, lambda n: session.run(abs, -n)) == list(range(2000))
        counters = session.status().counters
        assert counters["granted"] <= 4000
        assert counters["connections"] < 1000
        whole(session)


def test_2000_tasks_get_each_their_own_result(start_method: str) -> None:
    async def main(session: Session) -> None:
        aio = session.aio()
        results = await asyncio.gather(*(aio.run(abs, -n) for n in range(2000)))
        assert results == list(range(2000))

    with Pool(2, start_method=start_method) as session:
        asyncio.run(asyncio.wait_for(main(session), T))
        assert granted(session) <= 4000
        whole(session)


def test_a_burst_of_threads_with_a_timeout_each(start_method: str) -> None:
    with Pool(2, 2, start_method=start_method, overflow_ttl=0) as session:
        before = granted(session)
        assert burst(200, lambda n: session.run(abs, -n, timeout=T)) == list(range(200))
        assert granted(session) - before <= 400
        until(lambda: session.status().overflow == 0)
        whole(session)


def test_every_way_in_one_burst(start_method: str) -> None:
    """No way keeps another from its turn."""

    def lease(number: int) -> int:
        with session.checkout(T) as lease:
            return int(lease.call(abs, -number, timeout=T))

    with Pool(2, 1, start_method=start_method, overflow_ttl=0) as session:
        ways: list[Callable[[int], Any]] = [
            lambda n: session.run(abs, -n),
            lambda n: session.run(abs, -n, timeout=T),
            lambda n: session.submit(abs, -n).result(T),
            lambda n: next(iter(session.map(abs, [-n]))),
            lease,
        ]
        for _ in range(3):
            before = granted(session)
            assert burst(100, lambda n: ways[n % 5](n)) == list(range(100))
            assert granted(session) - before <= 200
        until(lambda: session.status().overflow == 0)
        whole(session)


def test_a_run_beside_a_burst_of_jobs_does_not_wait_for_all_of_them(
    tmp_path: Path, pipe: Callable[[], int], long: tuple[Any, ...]
) -> None:
    with Pool(1) as session:
        first = session.submit(*long)
        until(lambda: errands.run_count(tmp_path / "ran"))
        jobs = [session.submit(errands.pid_after, 0.02) for _ in range(150)]
        with ThreadPoolExecutor(3) as threads:
            runs = [threads.submit(session.run, abs, -n) for n in range(3)]
            until(lambda: session.status().waiting >= 3)
            pipe()
            assert [run.result(T) for run in runs] == [0, 1, 2]
        assert not jobs[-1].done()
        for job in [first, *jobs]:
            job.result(T)
        whole(session)


# --- several processes ------------------------------------------------------------------------

BURST = """
session = given()
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(30) as threads:
    tell("ready")
    for line in sys.stdin:
        futures = [threads.submit(session.run, abs, -n) for n in range(30)]
        tell([future.result(50) for future in futures] == list(range(30)))
"""


def test_bursts_of_several_processes_are_granted_about_a_worker_each(start_method: str) -> None:
    """Who asks just after another was granted a worker leaves that one its call."""
    with Pool(2, start_method=start_method) as session, contextlib.ExitStack() as stack:
        whole(session)
        others = [stack.enter_context(script(BURST, start_method)) for _ in range(3)]
        for other in others:
            other.give(session)
            assert other.hear() == "ready"
        for _ in range(5):
            before = granted(session)
            for other in others:
                other.say(b"go")
            assert [other.hear() for other in others] == [True] * 3
            assert granted(session) - before <= 2 * 90
        whole(session)


def test_a_process_that_is_killed_before_its_first_call_keeps_nobody_waiting(
    start_method: str,
) -> None:
    code = """
        session = given()
        hold = session._checkout(None, keep=True)
        tell(hold.keep)
        sys.stdin.readline()
    """
    with Pool(1, start_method=start_method) as session:
        whole(session)
        with script(code, start_method) as other, ThreadPoolExecutor(5) as threads:
            other.give(session)
            assert other.hear() is True
            runs = [threads.submit(session.run, abs, -n) for n in range(5)]
            until(lambda: session.status().waiting == 5)
            assert not any(run.done() for run in runs), "it is granted, and has not called"
            os.kill(other.pid, signal.SIGKILL)
            other.process.wait()
            assert [run.result(T) for run in runs] == list(range(5))
        whole(session)


def test_who_forgets_a_worker_before_its_first_call_keeps_nobody_waiting() -> None:
    with Pool(1) as session:
        whole(session)
        hold: Any = session._checkout(T, keep=True)
        with ThreadPoolExecutor(2) as threads:
            run = threads.submit(session.run, abs, -5)
            until(lambda: session.status().waiting == 1)
            del hold
            assert run.result(T) == 5
        whole(session)


# --- ends -------------------------------------------------------------------------------------


def test_a_burst_when_the_manager_is_killed(start_method: str) -> None:
    with Pool(2, start_method=start_method) as session, ThreadPoolExecutor(40) as threads:
        for _ in range(3):
            futures = [threads.submit(session.run, errands.add, n, 1) for n in range(400)]
            manager(session).kill()
            assert [future.result(T) for future in futures] == [n + 1 for n in range(400)]
        whole(session)


def test_a_shutdown_serves_the_runs_that_wait(
    tmp_path: Path, pipe: Callable[[], int], long: tuple[Any, ...], start_method: str
) -> None:
    session = Pool(1, start_method=start_method).run_service()
    try:
        with running(session, long, tmp_path), ThreadPoolExecutor(11) as threads:
            runs = [threads.submit(session.run, abs, -n) for n in range(10)]
            until(lambda: session.status().waiting == 10)
            ending = threads.submit(session.safe_shutdown, T)
            until(lambda: session._member.draining)
            with pytest.raises(PoolClosed):
                session.run(abs, -1)
            pipe()
            assert [run.result(T) for run in runs] == list(range(10))
            ending.result(T)
    finally:
        session.terminate()


def test_the_end_of_a_pool_ends_the_runs_that_wait(start_method: str) -> None:
    session = Pool(1, start_method=start_method).run_service()
    with ThreadPoolExecutor(10) as threads, contextlib.ExitStack() as stack:
        held = session.checkout(T)
        runs = [threads.submit(session.run, abs, -n) for n in range(10)]
        until(lambda: session.status().waiting == 10)
        session.terminate()
        assert {type(run.exception(T)) for run in runs} == {PoolClosed}
        stack.enter_context(contextlib.suppress(LeaseError))
        held.checkin()


def test_a_burst_that_no_worker_can_serve_says_why(start_method: str) -> None:
    with Pool(1, factory=deeds.failing_factory, start_method=start_method) as session:
        ended = burst(10, lambda n: session.run(abs, -n))
        ended += burst(10, lambda n: session.run(abs, -n, timeout=0.5))
        assert {type(error) for error in ended} == {FactoryFailed}


def test_runs_that_wait_are_late_in_their_time(
    tmp_path: Path, pipe: Callable[[], int], long: tuple[Any, ...], start_method: str
) -> None:
    with Pool(1, start_method=start_method) as session:
        with running(session, long, tmp_path):
            ended = burst(10, lambda n: session.run(abs, -n, timeout=0.2))
            assert {type(error) for error in ended} == {CheckoutTimeout}
            assert "within 0.2 s" in str(ended[-1]) and "leased" in str(ended[-1])
            until(lambda: session.status().waiting == 0)
            pipe()
        assert session.run(abs, -3) == 3
        whole(session)
        counters = session.status().counters
        assert counters["killed"] == counters["crashes"] == 0


def test_a_queued_run_that_takes_too_long_costs_its_worker(
    tmp_path: Path, pipe: Callable[[], int], long: tuple[Any, ...]
) -> None:
    with Pool(1) as session:
        with running(session, long, tmp_path), ThreadPoolExecutor(4) as threads:
            runs = [threads.submit(session.run, abs, -n) for n in range(2)]
            until(lambda: session.status().waiting == 2)
            late = threads.submit(session.run, errands.spin, 600, timeout=1.0)
            until(lambda: session.status().waiting == 3)
            pipe()
            assert [run.result(T) for run in runs] == [0, 1]
            with pytest.raises(CallTimeout, match="longer than 1 s in worker 0 of pool"):
                late.result(T)
        assert session.run(abs, -3) == 3
        whole(session)
        assert session.status().counters["killed"] == 1


def test_an_interrupt_of_a_run_that_waits_gives_its_turn_up(start_method: str) -> None:
    code = """
        def wait_for(count):
            while session.status().waiting != count:
                time.sleep(0.01)

        def interrupt():
            wait_for(5)
            os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pool(1) as session:
            session.run(abs, -1)
            lease = session.checkout()
            others = [threading.Thread(target=session.run, args=(abs, -n)) for n in range(4)]
            for each in others:
                each.start()
            wait_for(4)
            others.append(threading.Thread(target=interrupt))
            try:
                others[-1].start()
                session.run(abs, -5)
            except KeyboardInterrupt:
                tell("interrupted")
            wait_for(4)
            lease.checkin()
            for each in others:
                each.join(50)
            tell(session.run(abs, -6))
            tell(session.status().counters["killed"])
    """
    with script(code, start_method) as process:
        assert process.hear() == "interrupted"
        assert process.hear() == 6
        assert process.hear() == 0
        _, error = process.finish()
        assert error == ""


def test_a_run_that_waits_in_a_daemon_thread_does_not_hold_up_the_exit(start_method: str) -> None:
    code = """
        session = pool(1).run_service()
        session.run(abs, -1)
        for number in range(5):
            threading.Thread(target=session.run, args=(time.sleep, 600), daemon=True).start()
        while session.status().waiting < 4:
            time.sleep(0.01)
        tell("waiting")
        threading.excepthook = lambda _: None
    """
    with script(code, start_method) as process:
        assert process.hear() == "waiting"
        process.finish()


def test_a_burst_of_more_threads_than_the_process_may_have_descriptors(start_method: str) -> None:
    code = """
        import resource
        with pool() as session:
            session.run(abs, -1)
            resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
            right = []
            def work(number):
                right.append(session.run(abs, -number) == number)
            for _ in range(2):
                threads = [threading.Thread(target=work, args=(n,)) for n in range(500)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(50)
            tell([len(right), all(right)])
    """
    with script(code, start_method) as process:
        assert process.hear() == [1000, True]
        _, error = process.finish()
        assert error == ""
