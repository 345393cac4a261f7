"""Leases that stay with a client between its jobs: nobody who waits for a worker notices."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import signal
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import deeds
import errands
import psutil
import pytest
from support import pipe_writer, until, whole
from user_script import CLIENTS, script

from whitepool_mp import (
    CallTimeout,
    CheckoutTimeout,
    Pool,
    PoolClosed,
    PoolFull,
    Session,
    WorkerDied,
)
from whitepool_mp.client.hold import Hold
from whitepool_mp.wire import frames
from whitepool_mp.wire.pages import Page

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""


@contextlib.contextmanager
def thread(function: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
    """Run a function in a thread of its own; what it returned or raised is the future's."""
    future: Future[Any] = Future()

    def body() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    runner = threading.Thread(target=body, name="test")
    runner.start()
    try:
        yield future
    finally:
        runner.join(T)
        assert not runner.is_alive()


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A pipe for `errands.wait_for`; gives what lets the one who waits there go on."""
    with pipe_writer(tmp_path / "pipe") as connect:
        yield lambda: os.write(connect(), b"!")


@pytest.fixture
def long(tmp_path: Path) -> tuple[Any, ...]:
    """A call that lasts until `pipe` is called, and the file in which it leaves a 1."""
    return errands.step, tmp_path / "ran", 1, errands.wait_for, tmp_path / "pipe"


def begun(tmp_path: Path) -> None:
    """Wait until the long call runs."""
    until(lambda: errands.run_count(tmp_path / "ran"))


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, in an event loop of its own, with a deadline."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


def granted(session: Session) -> int:
    return session.status().counters["granted"]


def pids(session: Session) -> set[int]:
    found = {row.pid for row in session.workers() if row.pid is not None}
    assert len(found) == session.status().pool_size
    return found


def ready(session: Session) -> set[int]:
    """The workers' pids, when all of them are there."""
    whole(session)
    return pids(session)


WAYS = ["run", "submit", "map", "asyncio"]
"""The ways of running jobs that keep a lease."""


def job(session: Session, way: str) -> int:
    """Run `os.getpid` in a worker, which is kept after it."""
    if way == "run":
        return session.run(os.getpid)
    if way == "submit":
        return int(session.submit(os.getpid).result(T))
    if way == "map":
        return next(iter(session.map(lambda _: os.getpid(), [0])))
    raise AssertionError(way)


def rest(session: Session) -> None:
    """The other forms, each of which may have to get its worker back, do their work."""
    assert session.run(abs, -1, timeout=T) == 1
    assert session.submit(abs, -2).result(T) == 2
    assert list(session.map(abs, [-3])) == [3]
    with session.checkout(T) as lease:
        assert lease.call(abs, -4, timeout=T) == 4


# --- what is told of it -----------------------------------------------------------------------


def test_run_after_run_is_one_lease_of_a_worker_that_is_free(start_method: str) -> None:
    with Pool(2, start_method=start_method) as session:
        whole(session)
        found = {session.run(os.getpid) for _ in range(50)}
        assert len(found) == 1
        assert granted(session) == 1
        now = session.status()
        assert (now.available, now.leased, now.waiting, now.state) == (2, 0, 0, "ready")
        rows = session.workers()
        assert [row.state for row in rows] == ["idle", "idle"]
        assert [row.lease for row in rows] == [row.holder_pid for row in rows] == [None, None]
        assert sorted(row.calls for row in rows) == [0, 50]
        assert sorted(row.leases for row in rows) == [0, 1]


def test_job_after_job_is_one_lease_of_a_worker_that_is_free() -> None:
    with Pool(2) as session:
        whole(session)
        assert len({session.submit(os.getpid).result(T) for _ in range(50)}) == 1
        assert granted(session) == 1
        assert {row.state for row in session.workers()} == {"idle"}
        assert session.status().available == 2


def test_map_after_map_is_a_lease_of_each_worker() -> None:
    with Pool(2) as session:
        whole(session)
        for _ in range(5):
            assert list(session.map(abs, range(100))) == list(range(100))
        assert granted(session) <= 2
        whole(session)


@in_loop
async def test_await_after_await_is_one_lease_of_a_worker_that_is_free() -> None:
    async with Pool(2) as session:
        found = [await session.run(os.getpid) for _ in range(50)]
        assert len(set(found)) == 1
        now = await session.status()
        assert now.counters["granted"] == 1
        assert now.leased == 0
        assert {row.state for row in await session.workers()} <= {"idle", "booting"}


def test_a_kept_worker_is_leased_while_it_runs_a_call(
    tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    with Pool(2) as session:
        whole(session)
        session.run(abs, -1)
        with thread(lambda: session.run(*long)) as future:
            begun(tmp_path)
            now = session.status()
            assert (now.available, now.leased) == (1, 1)
            (row,) = [row for row in session.workers() if row.state == "leased"]
            assert row.holder_pid == os.getpid()
            assert row.site is not None and Path(__file__).name in row.site
            pipe()
            assert future.result(T) == 1
        assert session.status().leased == 0
        assert granted(session) == 1


# --- others get it ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["run", "submit", "map"])
def test_a_kept_worker_is_had_by_every_other_way(way: str, start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        (pid,) = ready(session)
        for _ in range(3):
            assert job(session, way) == pid
            rest(session)
        for _ in range(3):
            assert job(session, way) == pid
            with session.checkout(block=False) as lease:
                assert lease.pid == pid
        whole(session)
        assert session.status().counters["recalled"] >= 6


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_kept_worker_is_had_by_another_thread(way: str) -> None:
    with Pool(1) as session:
        for other in (session.run, lambda fn: session.submit(fn).result(T), session.transaction):
            pid = job(session, way)
            with thread(other, os.getpid if other != session.transaction else take_pid) as future:
                assert future.result(T) == pid
        whole(session)


def take_pid(lease: Any) -> Any:
    return lease.pid


OTHER_PROCESS = """
    session = given()
    tell(session.run(os.getpid))
    for line in sys.stdin:
        if line == "checkout\\n":
            with session.checkout(20) as lease:
                tell(lease.pid)
        elif line == "full?\\n":
            try:
                session.checkout(block=False).checkin()
                tell("no")
            except PoolFull:
                tell("yes")
        elif line == "submit\\n":
            tell(session.submit(os.getpid).result(20))
        elif line == "asyncio\\n":
            import asyncio
            async def work():
                async with session.aio().checkout() as lease:
                    return lease.pid
            tell(asyncio.run(work()))
        else:
            tell(session.run(os.getpid))
"""


def test_a_kept_worker_is_had_by_another_process(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        (pid,) = ready(session)
        assert session.run(os.getpid) == pid
        with script(OTHER_PROCESS, start_method) as other:
            other.give(session)
            assert other.hear() == pid
            for line in (b"run", b"checkout", b"submit", b"asyncio"):
                for way in ("run", "submit"):
                    assert job(session, way) == pid
                    other.say(line)
                    assert other.hear() == pid
                assert session.run(os.getpid, timeout=T) == pid
                with session.checkout(block=False) as lease:
                    assert lease.pid == pid
                    other.say(b"full?")
                    assert other.hear() == "yes"

                def not_full() -> bool:
                    """The checkin, on another connection, may not have been heard yet."""
                    other.say(b"full?")
                    return bool(other.hear() == "no")

                until(not_full)
        whole(session)


@in_loop
async def test_a_kept_worker_is_had_by_an_event_loop_and_back() -> None:
    async with Pool(1) as session:
        blocking = session.session()
        pid = await session.run(os.getpid)
        for _ in range(5):
            assert await asyncio.to_thread(blocking.run, os.getpid) == pid
            async with session.checkout(block=False) as lease:
                assert await lease.call(os.getpid) == pid
            assert await asyncio.to_thread(job, blocking, "submit") == pid
            assert await session.run(os.getpid) == pid
        other = session.clone()
        for _ in range(5):
            assert await other.run(os.getpid) == pid
            assert await session.run(os.getpid) == pid
        await asyncio.to_thread(whole, blocking)


def test_a_nonblocking_checkout_right_after_a_run_finds_the_worker_free() -> None:
    with Pool(1) as session:
        for size in [10, 100_000, 1_000_000] * 40:
            assert len(session.run(bytes, size)) == size
            session.checkout(block=False).checkin()
        for size in [10, 100_000, 1_000_000] * 20:
            assert len(session.submit(bytes, size).result(T)) == size
            session.checkout(block=False).checkin()


def test_a_worker_whose_run_has_returned_is_free_at_once() -> None:
    with Pool(1) as session:
        for size in [10, 100_000, 1_000_000] * 40:
            session.run(bytes, size)
            assert session.status().leased == 0


# --- turns ------------------------------------------------------------------------------------


def test_waiters_are_served_in_their_order(
    tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    order = tmp_path / "order"
    with Pool(1) as session, contextlib.ExitStack() as stack:
        session.run(abs, -1)
        futures = [stack.enter_context(thread(lambda: session.run(*long)))]
        begun(tmp_path)
        for number in range(6):
            ways: list[Callable[[], Any]] = [
                functools.partial(session.run, errands.trace, order, number),
                functools.partial(
                    session.transaction,
                    lambda lease, n=number: lease.call(errands.trace, order, n),
                ),
            ]
            futures.append(stack.enter_context(thread(ways[number % 2])))
            until(lambda number=number: session.status().waiting == number + 1)
        pipe()
        assert [future.result(T) for future in futures] == [1, *range(6)]
        assert errands.lines(order) == [str(number) for number in range(6)]
        whole(session)


def test_a_loop_of_runs_does_not_starve_a_waiter(tmp_path: Path) -> None:
    """Whoever waits gets the worker after at most the call that was running."""
    path = tmp_path / "ran"
    with Pool(1) as session:
        stop = threading.Event()

        def loop() -> int:
            count = 0
            while not stop.is_set():
                session.run(errands.trace, path, count)
                count += 1
            return count

        with thread(loop) as future:
            try:
                until(lambda: errands.run_count(path) > 10)
                for _ in range(30):
                    with session.checkout(T) as lease:
                        before = errands.run_count(path)
                        assert lease.call(errands.run_count, path, timeout=T) == before
                    assert session.run(abs, -1, timeout=T) == 1
            finally:
                stop.set()
            assert future.result(T) == errands.run_count(path)
        whole(session)


def test_the_call_that_was_running_is_the_last_before_a_waiter(
    tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    path = tmp_path / "ran"
    with Pool(1) as session:
        session.run(abs, -1)

        def loop() -> None:
            session.run(*long)
            for number in range(2, 50):
                session.run(errands.trace, path, number)

        with thread(loop) as future:
            begun(tmp_path)

            def take() -> list[str]:
                with session.checkout(T):
                    return errands.lines(path)

            with thread(take) as waiter:
                until(lambda: session.status().waiting == 1)
                pipe()
                assert waiter.result(T) == ["1"]
            future.result(T)
        assert errands.run_count(path) == 49
        whole(session)


# --- while it runs a long call ----------------------------------------------------------------


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_long_call_under_a_kept_lease_makes_the_pool_full(
    way: str, tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    with Pool(1) as session:
        job(session, way)
        with thread(lambda: getattr(session, way)(*long)) as future:
            begun(tmp_path)
            for _ in range(2):
                with pytest.raises(PoolFull, match="leased=1"):
                    session.checkout(block=False)
            with pytest.raises(CheckoutTimeout):
                session.checkout(0.05)
            with thread(session.checkout, T) as waiter:
                until(lambda: session.status().waiting == 1)
                pipe()
                waiter.result(T).checkin()
            result = future.result(T)
            assert (result if way == "run" else result.result(T)) == 1
        rest(session)
        whole(session)


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_long_call_under_a_kept_lease_lets_overflow_start(
    way: str, tmp_path: Path, pipe: Callable[[], int], long: Any, start_method: str
) -> None:
    with Pool(1, 1, overflow_ttl=0, start_method=start_method) as session:
        pid = job(session, way)
        with thread(lambda: getattr(session, way)(*long)) as future:
            begun(tmp_path)
            with session.checkout(block=False) as lease:
                assert lease.pid != pid
                assert lease.call(os.getpid, timeout=T) == lease.pid
                with pytest.raises(PoolFull):
                    session.checkout(block=False)
            pipe()
            result = future.result(T)
            assert (result if way == "run" else result.result(T)) == 1
        whole(session)
        rest(session)


def test_a_worker_that_was_recalled_and_runs_anothers_call_holds_nobody_up(
    tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    """Its former holder, who does not know yet, takes the worker that is free."""
    with Pool(2) as session:
        whole(session)
        pid = job(session, "submit")
        one, two = session.checkout(T), session.checkout(T)
        mine, other = (one, two) if one.pid == pid else (two, one)
        other.checkin()
        with thread(mine.call, *long) as future:
            begun(tmp_path)
            try:
                assert session.submit(os.getpid).result(5) == other.pid
            except FutureTimeout:
                pytest.fail("it waits for the call of somebody else")
            finally:
                pipe()
            assert future.result(T) == 1
        mine.checkin()
        whole(session)


def test_a_run_is_not_held_up_by_the_call_of_a_process_that_has_its_former_worker(
    tmp_path: Path, pipe: Callable[[], int], start_method: str
) -> None:
    code = f"""
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import errands
        session = given()
        one, two = session.checkout(20), session.checkout(20)
        pid = int(sys.stdin.readline())
        mine, other = (one, two) if one.pid == pid else (two, one)
        other.checkin()
        mine.call(errands.step, {str(tmp_path / "ran")!r}, 1, errands.wait_for,
                  {str(tmp_path / "pipe")!r})
        mine.checkin()
        tell("done")
    """
    with Pool(2, start_method=start_method) as session:
        whole(session)
        pid = session.run(os.getpid)
        with script(code, start_method) as other:
            other.give(session)
            other.say(str(pid).encode())
            begun(tmp_path)
            try:
                with thread(session.run, os.getpid) as future:
                    try:
                        assert future.result(5) != pid
                    except FutureTimeout:
                        pytest.fail("it waits for the call of somebody else")
                    finally:
                        pipe()
            finally:
                assert other.hear() == "done"
        whole(session)


# --- deaths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["run", "submit", "map"])
def test_a_kept_worker_that_dies_is_not_noticed(way: str, start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        for _ in range(3):
            pid = job(session, way)
            os.kill(pid, signal.SIGKILL)
            assert job(session, way) != pid
        whole(session)
        rest(session)


def test_all_kept_workers_killed_at_once_are_not_noticed() -> None:
    with Pool(3) as session:
        keep_all(session, 3)
        for pid in ready(session):
            os.kill(pid, signal.SIGKILL)
        for _ in range(6):
            assert session.run(abs, -1, timeout=T) == 1
        whole(session)


def keep_all(session: Session, count: int) -> None:
    """Have each of the workers kept by `run`."""
    barrier = threading.Barrier(count)
    leases = [session.checkout(T) for _ in range(count)]
    for lease in leases:
        lease.checkin()
    running = threading.Semaphore(0)

    def work() -> None:
        barrier.wait(T)
        session.run(errands.spin, 0.05)
        running.release()

    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(thread(work))
    assert len(session._member.kept) >= 1


def test_the_death_of_a_worker_kept_by_one_process_is_nothing_to_another(
    start_method: str,
) -> None:
    with Pool(1, start_method=start_method) as session:
        with script(OTHER_PROCESS, start_method) as other:
            other.give(session)
            pid = other.hear()
            os.kill(pid, signal.SIGKILL)
            assert session.run(os.getpid, timeout=T) != pid
            other.say(b"run")
            assert other.hear() != pid
        whole(session)


@pytest.mark.parametrize("way", ["run", "submit", "map", "executor", "asyncio"])
def test_a_client_that_exits_gives_back_the_workers_that_it_keeps(
    way: str, start_method: str
) -> None:
    code = f"""
        session = given()
        way = {way!r}
        if way == "run":
            session.run(abs, -1)
        elif way == "submit":
            session.submit(abs, -1).result(20)
        elif way == "map":
            list(session.map(abs, range(100)))
        elif way == "executor":
            list(session.executor().map(abs, range(100)))
        else:
            import asyncio
            async def work():
                inside = session.aio()
                await asyncio.gather(*(inside.run(abs, -n) for n in range(3)))
            asyncio.run(work())
        tell("done")
    """
    with Pool(2, start_method=start_method) as session:
        before = ready(session)
        for _ in range(2):
            with script(code, start_method) as client:
                client.give(session)
                assert client.hear() == "done"
                _, error = client.finish()
            whole(session)
            assert pids(session) == before
            assert error == ""
        assert session.status().counters["killed"] == 0


def test_a_client_that_is_killed_costs_no_worker_that_it_keeps(start_method: str) -> None:
    """Nothing ran: the worker is as clean as it was for the client's own next job."""
    code = """
        session = given()
        session.run(abs, -1)
        session.submit(abs, -1).result(20)
        tell(session.status().counters["granted"])
        sys.stdin.readline()
    """
    with Pool(2, start_method=start_method) as session:
        before = ready(session)
        with script(code, start_method) as client:
            client.give(session)
            assert client.hear() == 2
            os.kill(client.pid, signal.SIGKILL)
            client.process.wait()
            until(lambda: session.status().counters["recalled"] == 2)
        rest(session)
        whole(session)
        assert pids(session) == before
        assert session.status().counters["killed"] == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_of_multiprocessing_that_ends_costs_no_worker(
    method: str, start_method: str
) -> None:
    """Such a process ends without `atexit`, whatever it keeps."""
    code = """
        import multiprocessing, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
        sys.path.insert(0, TESTS)
        import errands
        session = given()
        context = multiprocessing.get_context(METHOD)
        for work in errands.by_run, errands.by_submit, errands.by_map, errands.by_loop:
            for _ in range(3):
                child = context.Process(target=work, args=(session,))
                child.start()
                child.join(20)
                tell([work.__name__, child.exitcode])
    """
    code = code.replace("TESTS", repr(os.path.dirname(__file__))).replace("METHOD", repr(method))
    with Pool(2, start_method=start_method) as session:
        before = ready(session)
        with script(code, start_method) as client:
            client.give(session)
            for name in ("by_run", "by_submit", "by_map", "by_loop"):
                assert [client.hear() for _ in range(3)] == [[name, 0]] * 3
            client.finish()
        whole(session)
        assert pids(session) == before
        assert session.status().counters["killed"] == 0


def test_a_fork_that_ends_at_once_costs_no_worker(start_method: str) -> None:
    code = """
        for work in errands.by_run, errands.by_submit, errands.by_map, errands.by_loop:
            def and_end():
                work(session)
                os._exit(0)
            tell([work.__name__, ended(client(and_end))])
    """
    with Pool(2, start_method=start_method) as session:
        before = ready(session)
        with script(code, start_method, CLIENTS + "import errands\n") as clients:
            clients.give(session)
            for name in ("by_run", "by_submit", "by_map", "by_loop"):
                assert clients.hear() == [name, 0]
            clients.finish()
        whole(session)
        assert pids(session) == before
        assert session.status().counters["killed"] == 0


def test_a_client_killed_as_its_job_runs_costs_that_worker_and_no_other_it_keeps(
    start_method: str, tmp_path: Path
) -> None:
    code = f"""
        import deeds
        session = given()
        session.submit(abs, -1).result(20)
        session.run(deeds.wait_in, {str(tmp_path / "ran")!r})
    """
    with Pool(2, start_method=start_method) as session:
        before = ready(session)
        path = f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        with script(code, start_method, path) as client:
            client.give(session)
            (busy,) = until(lambda: deeds.noted(str(tmp_path / "ran")))  # type: ignore[misc]
            os.kill(client.pid, signal.SIGKILL)
            client.process.wait()
            until(lambda: session.status().counters["killed"])
        whole(session)
        assert before & pids(session) == before - {busy}
        assert session.status().counters["killed"] == 1


def test_a_job_that_a_killed_client_had_sent_ahead_never_begins(
    start_method: str, tmp_path: Path
) -> None:
    """Its worker is stopped, so that it lies there when the client ends, and is clean."""
    code = f"""
        import errands
        session = given()
        tell(session.run(os.getpid))
        sys.stdin.readline()
        (hold,) = session._member.kept
        threading.Thread(
            target=session.run, args=(errands.step, {str(tmp_path / "ran")!r}, 1), daemon=True
        ).start()
        import array, fcntl, termios
        unread = array.array("i", [0])
        while not unread[0]:  # how much lies in the worker's socket
            fcntl.ioctl(hold.channel.sock, termios.TIOCOUTQ, unread)
        tell("sent")
        sys.stdin.readline()
    """
    with Pool(1, start_method=start_method) as session:
        path = f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        with script(code, start_method, path) as client:
            client.give(session)
            worker = client.hear()
            stop(worker)
            client.say()
            assert client.hear() == "sent"
            os.kill(client.pid, signal.SIGKILL)
            client.process.wait()
            until(lambda: session.status().counters["recalled"] == 1)
            os.kill(worker, signal.SIGCONT)
        assert session.run(os.getpid, timeout=T) == worker
        whole(session)
        assert errands.run_count(tmp_path / "ran") == 0
        assert session.status().counters["killed"] == 0


def test_a_client_that_is_stopped_keeps_nobody_from_the_workers_that_it_keeps(
    start_method: str,
) -> None:
    with Pool(1, start_method=start_method) as session:
        with script(OTHER_PROCESS, start_method) as other:
            other.give(session)
            pid = other.hear()
            other.say(b"submit")
            assert other.hear() == pid
            os.kill(other.pid, signal.SIGSTOP)
            assert session.run(os.getpid, timeout=T) == pid
            assert job(session, "submit") == pid
            os.kill(other.pid, signal.SIGCONT)
            other.say(b"run")
            assert other.hear() == pid
        whole(session)


# --- a worker that is stopped -----------------------------------------------------------------


def stop(pid: int) -> None:
    """Stop a worker that has nothing to do, when it has come to waiting for something."""
    worker = psutil.Process(pid)
    until(lambda: worker.status() == psutil.STATUS_SLEEPING)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: worker.status() == psutil.STATUS_STOPPED)


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_kept_worker_that_is_stopped_keeps_nobody_waiting(start_method: str, way: str) -> None:
    """The pool takes it back without its word; then it is like any worker that is stopped."""
    with Pool(1, 1, start_method=start_method, overflow_ttl=0) as session:
        whole(session)
        for _ in range(3):
            stopped = job(session, way)
            stop(stopped)
            with session.checkout(T) as first, session.checkout(T) as second:
                assert stopped == first.pid != second.pid
                assert second.call(abs, -1, timeout=T) == 1
                with pytest.raises(CallTimeout):
                    first.call(abs, -1, timeout=0.05)
            until(lambda pid=stopped: not psutil.pid_exists(pid))
            until(lambda: session.status().overflow == 0)
        whole(session)


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_worker_that_was_stopped_serves_another_process_when_it_goes_on(
    start_method: str, way: str
) -> None:
    with Pool(1, start_method=start_method) as session:
        with script(OTHER_PROCESS, start_method) as other:
            other.give(session)
            pid = other.hear()
            for line in (b"run", b"checkout", b"submit", b"asyncio"):
                assert job(session, way) == pid
                granted_before = granted(session)
                stop(pid)
                other.say(line)
                until(lambda before=granted_before: granted(session) > before)
                os.kill(pid, signal.SIGCONT)
                assert other.hear() == pid
            assert job(session, way) == pid
        whole(session)
        assert session.status().counters["killed"] == 0


@pytest.mark.parametrize("way", ["run", "submit"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_job_sent_to_a_kept_worker_that_is_stopped_is_run_once_elsewhere_or_later(
    start_method: str, way: str, goes_on: bool, tmp_path: Path
) -> None:
    """It has not begun there: not with whoever has the worker meanwhile, who may have it killed."""
    work = errands.step, tmp_path / "ran", 7
    with Pool(1, start_method=start_method) as session:
        whole(session)
        pid = job(session, way)
        stop(pid)
        future = session.submit(*work) if way == "submit" else None
        with thread(session.run, *work) if future is None else contextlib.nullcontext(future) as it:
            if way == "run":
                until(lambda: not session._member.kept)
            with session.checkout(T) as lease:
                assert lease.pid == pid
                if goes_on:
                    os.kill(pid, signal.SIGCONT)
                    assert lease.call(errands.run_count, tmp_path / "ran", timeout=T) == 0
                else:
                    with pytest.raises(CallTimeout):
                        lease.call(abs, -1, timeout=0.05)
                assert errands.run_count(tmp_path / "ran") == 0
            assert it.result(T) == 7
        assert errands.run_count(tmp_path / "ran") == 1
        whole(session)


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_large_job_that_is_being_sent_to_a_worker_that_is_taken_back_goes_elsewhere(
    start_method: str, way: str, tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    """It does not wait until whoever has the worker then is done."""
    large = bytes(16 << 20)
    with Pool(2, start_method=start_method) as session:

        def send(timeout: float | None) -> int:
            if way == "run":
                return session.run(len, large, timeout=timeout)
            return session.submit(len, large, timeout=timeout).result(T)

        whole(session)
        for timeout in (None, T):
            first = session.checkout(T)
            pid = job(session, way)
            stop(pid)
            with thread(send, timeout) as it:
                if way == "run":
                    until(lambda: not session._member.kept)
                with session.checkout(T) as lease:
                    assert lease.pid == pid
                    with thread(lease.call, *long) as longer:
                        os.kill(pid, signal.SIGCONT)
                        begun(tmp_path)
                        first.checkin()
                        assert it.result(T) == len(large)
                        assert not longer.done()
                        pipe()
                        assert longer.result(T) == 1
            (tmp_path / "ran").unlink()
        whole(session)
        assert session.status().counters["killed"] == 0


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_job_sent_just_after_its_worker_was_taken_back_does_not_wait_for_who_has_it(
    start_method: str,
    way: str,
    tmp_path: Path,
    pipe: Callable[[], int],
    long: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its sender had looked, and then another thread of it ran for a moment."""
    looks = Hold if way == "run" else Page
    look: Callable[..., bool] = looks.is_recalled
    sure, refused = Page.refuses, []

    def refuses(page: Page, *call: int) -> bool:
        if call in refused:  # the worker comes to it, and says for a moment that it begins
            return False
        if sure(page, *call):
            refused.append(call)
        return call in refused

    with Pool(2, start_method=start_method) as session:
        whole(session)
        first = session.checkout(T)
        pid = job(session, way)
        in_hand, session._member.kept[:] = list(session._member.kept), []
        with session.checkout(T) as lease:
            assert lease.pid == pid
            with thread(lease.call, *long) as longer:
                begun(tmp_path)
                first.checkin()
                session._member.kept += in_hand
                before = [False]
                monkeypatch.setattr(
                    looks, "is_recalled", lambda *args: before.pop() if before else look(*args)
                )
                monkeypatch.setattr(Page, "refuses", refuses)
                assert job(session, way) == first.pid
                assert not before
                assert refused
                assert not longer.done()
                pipe()
                assert longer.result(T) == 1
        whole(session)


def test_a_pool_with_a_kept_worker_that_is_stopped_ends(start_method: str) -> None:
    with Pool(1, start_method=start_method, stop_timeout=0.2) as session:
        stop(job(session, "run"))
        session.safe_shutdown(T)


# --- fork -------------------------------------------------------------------------------------


def in_fork(function: Callable[[], object]) -> str:
    """What a function says in a forked child of this process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, str(function()).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    said = b""
    try:
        while select.select([reader], [], [], T)[0] and (data := os.read(reader, 65536)):
            said += data
    finally:
        os.kill(pid, signal.SIGKILL)  # if it has not ended by now
        os.close(reader)
        os.waitpid(pid, 0)
    return said.decode()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("size", [1, 2])
def test_a_forked_child_runs_jobs_of_its_own_and_the_parent_goes_on(size: int) -> None:
    with Pool(size) as session:
        whole(session)
        session.run(os.getpid)
        job(session, "submit")

        def child() -> object:
            found = [session.run(os.getpid, timeout=T) for _ in range(3)]
            found.append(job(session, "submit"))
            with session.checkout(T) as lease:
                found.append(lease.call(os.getpid, timeout=T))
            return sorted(set(found) - known)

        known = pids(session)
        assert in_fork(child) == "[]"
        rest(session)
        whole(session)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_give_back_what_the_parent_keeps() -> None:
    with Pool(1) as session:
        pid = session.run(os.getpid)
        assert in_fork(lambda: os.getpid() != pid) == "True"
        assert session.run(os.getpid) == pid
        assert granted(session) == 1


# --- the end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["with", "safe_shutdown", "terminate", "exception"])
def test_a_pool_with_kept_leases_ends(end: str, start_method: str) -> None:
    session = Pool(3, start_method=start_method).run_service()
    whole(session)
    keep_all(session, 2)
    job(session, "submit")
    found = [psutil.Process(pid) for pid in pids(session)]
    if end == "with":
        with session:
            pass
    elif end == "exception":
        with pytest.raises(KeyError), session:
            raise KeyError
    elif end == "safe_shutdown":
        session.safe_shutdown(T)
    else:
        session.terminate()
    until(lambda: not any(process.is_running() for process in found))
    for way in ("run", "submit"):
        with pytest.raises(PoolClosed):
            job(session, way)
    assert not session._member.kept


@in_loop
async def test_a_pool_with_leases_kept_by_an_event_loop_ends() -> None:
    for _ in range(3):
        async with Pool(2) as session:
            assert await asyncio.gather(*(session.run(abs, -n) for n in range(20))) == [*range(20)]
            session.session().run(abs, -1)


def test_a_teardown_is_run_in_kept_workers_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ended"
    with Pool(2, 0, errands.Ledger, teardown=lambda ledger: errands.write(path, 1)) as session:
        whole(session)
        session.run(abs, -1)
        job(session, "submit")
    assert errands.lines(path) == ["1", "1"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_shutdown_lets_another_process_finish_its_jobs(
    tmp_path: Path, pipe: Callable[[], int], start_method: str, size: int
) -> None:
    """Those that the pool has heard of are served, those that come after are refused."""
    path = tmp_path / "ran"
    code = f"""
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import errands
        session = given()
        for number in range(50):
            session.submit(errands.step, os.devnull, number).result(20)
        session.run(abs, -1)
        first = session.submit(errands.step, {str(path)!r}, 0, errands.wait_for,
                               {str(tmp_path / "pipe")!r})
        futures = [session.submit(errands.step, {str(path)!r}, n) for n in range(1, 2000)]
        tell("submitted")
        assert [future.result(20) for future in (first, *futures)] == list(range(2000))
        for attempt in (lambda: session.submit(abs, -1).result(20), lambda: session.run(abs, -1),
                        lambda: session.checkout().checkin()):
            while True:  # the news of the shutdown may be on its way
                try:
                    attempt()
                except PoolClosed:
                    break
            tell("closed")
    """
    session = Pool(size, start_method=start_method).run_service()
    try:
        session.run(abs, -1)
        with script(code, start_method) as client:
            client.give(session)
            assert client.hear() == "submitted"
            # The pool has heard that some wait, or none do any more.
            until(lambda: session.status().waiting or errands.run_count(path) == 2000)
            with thread(session.safe_shutdown, T) as ended:
                until(lambda: session._member.draining)
                pipe()
                assert [client.hear() for _ in range(3)] == ["closed"] * 3
                ended.result(T)
            _, error = client.finish()
            assert error == ""
        assert Counter(map(int, errands.lines(path))) == Counter(range(2000))
    finally:
        session.terminate()


@pytest.mark.parametrize("how", ["threads", "asyncio"])
def test_a_shutdown_finishes_what_another_process_has_just_submitted(how: str) -> None:
    """Also what its engine has not looked at yet: nobody but that process knows of it."""
    code = f"""
        import asyncio
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import errands
        session = given()
        wanted = [number * number for number in range(200)]

        def by_threads():
            futures = [session.submit(errands.square, number) for number in range(200)]
            tell("submitted")
            assert [future.result(20) for future in futures] == wanted

        async def by_a_loop():
            aio = session.aio()
            await aio.run(errands.square, 1)
            tasks = [asyncio.ensure_future(aio.run(errands.square, n)) for n in range(200)]
            await asyncio.sleep(0)  # each has begun
            tell("submitted")
            assert await asyncio.gather(*tasks) == wanted

        for number in range(100):
            session.submit(errands.square, number).result(20)
        by_threads() if {how!r} == "threads" else asyncio.run(by_a_loop())
        tell("over")
    """
    for _ in range(6):
        session = Pool(2).run_service()
        try:
            with script(code, "forkserver") as client:
                client.give(session)
                assert client.hear() == "submitted"
                session.safe_shutdown(T)
                assert client.hear() == "over"
                _, error = client.finish()
                assert error == ""
        finally:
            session.terminate()


def is_finished(code: str) -> None:
    """What another process has submitted is, by a shutdown that begins when it says so."""
    session = Pool(1).run_service()
    try:
        whole(session)
        with script(code, "forkserver") as client:
            client.give(session)
            assert client.hear() == "submitted"
            session.safe_shutdown(T)
            _, error = client.finish()
            assert error == ""
    finally:
        session.terminate()


@pytest.mark.parametrize("connected", [False, True])
def test_a_shutdown_finishes_the_first_job_of_another_process(connected: bool) -> None:
    """Its engine may not even have joined."""
    code = f"""
        session = given()
        if {connected}:
            session.submit(abs, -1).result(20)
        future = session.submit(abs, -2)
        tell("submitted")
        assert future.result(20) == 2
    """
    for _ in range(6):
        is_finished(code)


@pytest.mark.parametrize("connected", [False, True])
def test_a_shutdown_finishes_the_job_of_a_process_that_gets_no_cpu_for_a_second(
    connected: bool,
) -> None:
    """It cannot be asked then. (Functions of a `PyDLL` keep other threads from running.)"""
    code = f"""
        import ctypes
        libc = ctypes.PyDLL(None)
        session = given()
        if {connected}:
            session.submit(abs, -1).result(20)
        future = session.submit(abs, -2)
        libc.write(1, b'"submitted"\\n', 12)
        libc.usleep(999_999)
        assert future.result(20) == 2
    """
    is_finished(code)


@pytest.mark.parametrize("how", ["run", "submit", "checkout"])
def test_who_waited_and_was_granted_a_worker_just_before_a_shutdown_has_it(how: str) -> None:
    code = f"""
        session = given()
        tell("waiting")
        if {how!r} == "run":
            assert session.run(abs, -2) == 2
        elif {how!r} == "submit":
            assert session.submit(abs, -2).result(20) == 2
        else:
            with session.checkout(20) as lease:
                assert lease.call(abs, -2) == 2
    """
    for _ in range(6):
        session = Pool(1).run_service()
        try:
            whole(session)
            with script(code, "forkserver") as client:
                lease = session.checkout(T)
                client.give(session)
                assert client.hear() == "waiting"
                until(lambda session=session: session.status().waiting == 1)
                lease.checkin()
                session.safe_shutdown(T)
                _, error = client.finish()
                assert error == ""
        finally:
            session.terminate()


def test_a_shutdown_starts_another_worker_for_what_waits_behind_a_job_that_is_only_sent(
    tmp_path: Path,
) -> None:
    """Its worker gets no CPU just then. The job needs the one whose worker dies meanwhile."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    session = Pool(2).run_service()
    try:
        whole(session)
        for _ in range(3):  # so that both are kept
            for future in [session.submit(errands.spin, 0.05) for _ in range(2)]:
                future.result(T)
        pids = [row.pid for row in session.workers()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        needs = session.submit(errands.wait_for, pipe)
        makes = session.submit(Path.write_bytes, pipe, b"x")
        until(lambda: needs._task.runner and makes._task.runner)

        # As another process would begin it, with nobody waiting for the jobs of this one first.
        def drain() -> Any:
            with session._member.link() as link:
                return link.question(frames.DRAIN)

        with thread(drain) as ended:
            until(lambda: session._member.running_engine().engine.jobs.draining)
            until(lambda: session.status().draining)
            os.kill(makes._task.runner.pid, signal.SIGKILL)
            os.kill(needs._task.runner.pid, signal.SIGCONT)
            assert makes.result(T) == 1
            assert needs.result(T) is None
            assert ended.result(T)
    finally:
        session.terminate()


def test_a_shutdown_finishes_the_first_job_of_a_loop_that_is_busy_for_a_moment() -> None:
    """It had dialled, and says more only when the pool drains already; somebody's lease is left."""
    code = """
        import asyncio, time
        session = given()
        async def work():
            task = asyncio.create_task(session.aio().run(abs, -2))
            await asyncio.sleep(0)
            tell("submitted")
            time.sleep(0.6)
            assert await task == 2
        asyncio.run(work())
    """
    session = Pool(2).run_service()
    try:
        whole(session)
        with script(code, "forkserver") as client, session.checkout(T) as lease:
            client.give(session)
            assert client.hear() == "submitted"
            with thread(session.safe_shutdown, T) as ended:
                _, error = client.finish()
                assert error == ""
                lease.checkin()
                ended.result(T)
    finally:
        session.terminate()


def test_an_event_loop_that_is_not_run_any_more_holds_up_no_shutdown() -> None:
    """A job of its is running: it has said that it is not finished, and will not say that it is."""
    loop = asyncio.new_event_loop()
    session = Pool(1).run_service()
    try:
        inside = session.aio()

        async def begin() -> asyncio.Task[Any]:
            await inside.run(abs, -1)
            task = loop.create_task(inside.run(errands.spin, 0.5))
            await asyncio.sleep(0.1)
            return task

        task = loop.run_until_complete(begin())
        with thread(session.safe_shutdown, T) as ended:
            until(lambda: session._member.draining)
            loop.run_until_complete(asyncio.sleep(0.05))  # it says what is left, and no more
            ended.result(T)
        assert loop.run_until_complete(task) is None
    finally:
        session.terminate()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@in_loop
async def test_a_shutdown_does_not_lose_what_a_loop_that_is_busy_has_sent(
    tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    """All of its jobs are with a worker, and its engine hears of nothing for a while."""
    path = tmp_path / "ran"
    async with Pool(1) as session:
        blocking = session.session()
        for _ in range(3):
            await asyncio.gather(*(session.run(errands.step, os.devnull, n) for n in range(40)))
        tasks = [asyncio.create_task(session.run(*long))]
        tasks += [asyncio.create_task(session.run(errands.step, path, n)) for n in range(2, 20)]
        await asyncio.sleep(0)  # all are sent
        begun(tmp_path)
        with thread(blocking.safe_shutdown, T) as ended:
            until(lambda: session._member.draining)
            pipe()
            until(lambda: errands.run_count(path) >= 1)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert results == list(range(1, 20))
            await asyncio.to_thread(ended.result, T)
        assert Counter(map(int, errands.lines(path))) == Counter(range(1, 20))


# --- sizes ------------------------------------------------------------------------------------


def test_overflow_workers_are_not_kept(tmp_path: Path, pipe: Callable[[], int], long: Any) -> None:
    with Pool(1, 2, overflow_ttl=0) as session:
        whole(session)
        with session.checkout(T) as lease:
            for way in ("run", "submit", "run"):
                assert job(session, way) != lease.pid
                assert not session._member.kept
                until(lambda: session.status().overflow == 0)
                until(lambda: len(session.workers()) == 1)
        assert session.status().counters["recalled"] == 0
        whole(session)


def test_overflow_workers_retire_after_a_burst() -> None:
    with Pool(1, 3, overflow_ttl=0) as session:
        futures = [session.submit(errands.spin, 0.01) for _ in range(20)]
        for future in futures:
            future.result(T)
        whole(session)
        assert len(session.workers()) == 1


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_pool_with_kept_leases_shrinks(way: str) -> None:
    with Pool(4) as session:
        whole(session)
        if way == "run":
            keep_all(session, 4)
        else:
            for future in [session.submit(errands.spin, 0.02) for _ in range(12)]:
                future.result(T)
        session.resize(pool_size=1)
        until(lambda: len(session.workers()) == 1)
        whole(session)
        rest(session)
        assert len(session.workers()) == 1
        session.resize(pool_size=3)
        whole(session)
        rest(session)


def test_a_pool_shrinks_when_a_long_call_under_a_kept_lease_ends(
    tmp_path: Path, pipe: Callable[[], int], long: Any
) -> None:
    with Pool(2) as session:
        whole(session)
        session.run(abs, -1)
        with thread(lambda: session.run(*long)) as future:
            begun(tmp_path)
            with session.checkout(T) as lease:
                session.resize(pool_size=1)
                assert session.status().leased == 2
                assert lease.call(abs, -2, timeout=T) == 2
                pipe()
                assert future.result(T) == 1
                until(lambda: len(session.workers()) == 1)
                assert lease.call(abs, -2, timeout=T) == 2
        whole(session)
        rest(session)


# --- interrupts and timeouts ------------------------------------------------------------------


@pytest.mark.parametrize("lone", [True, False])
def test_an_interrupt_in_a_run_under_a_kept_lease_costs_its_worker(
    start_method: str, lone: bool, tmp_path: Path
) -> None:
    code = f"""
        session = pool({1 if lone else 2}).run_service()
        first = session.run(os.getpid)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        def work():
            open({str(tmp_path / "began")!r}, "w").close()
            while True:
                signal.pause()
        for _ in range(2):
            try:
                tell("running")
                session.run(work)
            except KeyboardInterrupt:
                tell("interrupted")
        while True:
            now = session.status()
            if now.available == now.pool_size and not now.leased:
                break
        tell(session.status().counters["killed"])
        tell(session.run(os.getpid, timeout=20) != first)
        with session.checkout(20) as lease:
            tell(lease.call(abs, -1))
        session.safe_shutdown(20)
    """
    with script(code, start_method) as owner:
        for _ in range(2):
            assert owner.hear() == "running"
            until((tmp_path / "began").exists)
            (tmp_path / "began").unlink()
            os.kill(owner.pid, signal.SIGINT)
            assert owner.hear() == "interrupted"
        assert owner.hear() == 2
        assert owner.hear() in ((True,) if lone else (True, False))
        assert owner.hear() == 1
        _, error = owner.finish()
        assert error == ""


def test_interrupts_at_any_moment_of_a_loop_of_runs_leave_the_pool_whole(start_method: str) -> None:
    code = """
        import random
        session = pool(2).run_service()
        main = threading.main_thread().ident
        again, stop = threading.Event(), threading.Event()

        def interrupt():
            while not stop.is_set():
                again.wait()
                again.clear()
                for _ in range(random.randrange(3000)):
                    pass
                if not stop.is_set():
                    signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        interrupts = 0
        while interrupts < 40:
            try:
                again.set()
                while True:
                    assert session.run(abs, -7) == 7
            except KeyboardInterrupt:
                interrupts += 1
        stop.set()
        try:
            again.set()
            thread.join()
        except KeyboardInterrupt:
            thread.join()
        while True:
            now = session.status()
            if now.available == now.pool_size and not (now.leased or now.waiting):
                break
        assert [session.run(abs, -n, timeout=20) for n in range(20)] == list(range(20))
        session.safe_shutdown(20)
        tell("whole")
    """
    with script(code, start_method) as owner:
        assert owner.hear() == "whole"
        owner.finish()


def test_a_run_under_a_kept_lease_is_late(start_method: str) -> None:
    with Pool(2, start_method=start_method) as session:
        whole(session)
        for _ in range(3):
            pid = session.run(os.getpid, timeout=T)
            with pytest.raises(CallTimeout, match=r"longer than 0.1 s"):
                session.run(errands.wait_to_be_killed, timeout=0.1)
            until(lambda pid=pid: not psutil.pid_exists(pid))
            assert session.run(os.getpid, timeout=T) != pid
        whole(session)
        assert session.status().counters["killed"] == 3


def test_a_run_whose_kept_worker_was_taken_waits_for_another_in_its_time() -> None:
    with Pool(1) as session:
        session.run(abs, -1)
        with session.checkout(T) as lease:
            with pytest.raises(CheckoutTimeout):
                session.run(abs, -1, timeout=0.1)
            with pytest.raises(CheckoutTimeout):
                session.run(abs, -1, timeout=0)
            assert lease.call(abs, -2, timeout=T) == 2
        assert session.run(abs, -3, timeout=T) == 3
        whole(session)


def test_a_crash_under_a_kept_lease_is_one_error(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        for _ in range(3):
            session.run(abs, -1)
            with pytest.raises(WorkerDied, match="SIGKILL"):
                session.run(deeds.kill_self)
        whole(session)
        assert session.status().counters["crashes"] == 3


# --- many -------------------------------------------------------------------------------------


def test_many_threads_on_few_workers() -> None:
    with Pool(2) as session:
        whole(session)
        results: dict[int, list[int]] = {}

        def work(number: int) -> None:
            results[number] = [session.run(errands.add, number, n) for n in range(60)]

        with contextlib.ExitStack() as stack:
            futures = [stack.enter_context(thread(work, 1000 * n)) for n in range(8)]
        for future in futures:
            future.result(T)
        assert results == {1000 * n: [1000 * n + m for m in range(60)] for n in range(8)}
        whole(session)
        assert session.status().counters["killed"] == session.status().counters["crashes"] == 0


def test_every_way_at_once_on_few_workers() -> None:
    with Pool(2, 1, overflow_ttl=0) as session:
        whole(session)

        def run() -> None:
            assert [session.run(errands.square, n) for n in range(60)] == [n * n for n in range(60)]

        def submit() -> None:
            futures = [session.submit(errands.square, n) for n in range(300)]
            assert [future.result(T) for future in futures] == [n * n for n in range(300)]

        def map_() -> None:
            assert list(session.map(errands.square, range(300))) == [n * n for n in range(300)]

        def lease() -> None:
            for n in range(30):
                with session.checkout(T) as lease:
                    assert lease.call(errands.square, n, timeout=T) == n * n
                with contextlib.suppress(PoolFull):
                    session.checkout(block=False).checkin()

        async def gather() -> None:
            other = session.aio()
            for _ in range(5):
                results = await asyncio.gather(*(other.run(errands.square, n) for n in range(40)))
                assert results == [n * n for n in range(40)]

        with contextlib.ExitStack() as stack:
            ways = [run, submit, map_, lease, lambda: asyncio.run(gather())]
            futures = [stack.enter_context(thread(way)) for way in ways * 2]
        for future in futures:
            future.result(T)
        whole(session)
        counters = session.status().counters
        assert counters["killed"] == counters["crashes"] == 0


@in_loop
async def test_many_clients_that_meet_the_workers_for_the_first_time() -> None:
    """A lease may be recalled before its channel is open: that is no death of a worker."""
    async with Pool(2) as session:
        for _ in range(5):
            others = [session.clone() for _ in range(12)]
            results = await asyncio.gather(
                *(other.run(errands.square, n) for other in others for n in range(3))
            )
            assert results == [0, 1, 4] * 12
        counters = (await session.status()).counters
        assert counters["killed"] == counters["crashes"] == 0


def test_a_lease_that_was_checked_out_is_never_recalled() -> None:
    with Pool(1) as session:
        session.run(abs, -1)
        with session.checkout(T) as lease:
            with thread(session.checkout, T) as waiter, thread(session.run, abs, -5) as runner:
                until(lambda: session.status().waiting == 2)
                future = session.submit(abs, -6)
                until(lambda: session.status().waiting == 3)
                for number in range(200):
                    assert lease.call(abs, -number, timeout=T) == number
                assert session.status().waiting == 3
                lease.checkin()
                waiter.result(T).checkin()
                assert runner.result(T) == 5
                assert future.result(T) == 6
        whole(session)
