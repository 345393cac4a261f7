"""From run_service() to the last process: shutdowns of every kind, and every option at work."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from anatomy import elapsed, gone, manager, no_successor, workers
from support import NewPool, processes, until
from user_script import ROOT, script

from whitepool_mp import (
    FactoryFailed,
    ManagerDied,
    Pool,
    PoolClosed,
    Session,
    ShutdownTimeout,
    WhitepoolError,
    WorkerDied,
    current_worker,
)
from whitepool_mp.config import THREAD_VARIABLES, usable_cpus

SOON = 10.0
"""Seconds: far more than anything here takes, far less than what never ends."""


def folder(session: Session) -> Path:
    return Path(session._member.path).parent


def is_over(session: Session, *of_pool: psutil.Process) -> None:
    """Check that nothing of a pool is there any more."""
    gone(*of_pool)
    assert not folder(session).exists()
    with pytest.raises(PoolClosed, match="make a new pool"):
        session.checkout(timeout=SOON)


# --- safe_shutdown ----------------------------------------------------------------------------


def test_safe_shutdown_of_an_idle_pool_ends_it_at_once(new_pool: NewPool) -> None:
    session = new_pool().run_service()
    everyone = [manager(session), *workers(session, 2)]
    began = time.monotonic()
    session.safe_shutdown(timeout=SOON)
    assert elapsed(began) < 3
    is_over(session, *everyone)


def test_safe_shutdown_of_a_pool_that_is_still_starting_ends_it(new_pool: NewPool) -> None:
    session = new_pool(4).run_service()
    process = manager(session)
    session.safe_shutdown(timeout=SOON)
    is_over(session, process)


def test_safe_shutdown_during_a_slow_factory_does_not_wait_for_it(new_pool: NewPool) -> None:
    session = new_pool(1, factory=lambda: time.sleep(1000)).run_service()
    until(lambda: session.workers()[0].pid)
    began = time.monotonic()
    session.safe_shutdown(timeout=SOON)
    assert elapsed(began) < 3


def test_safe_shutdown_waits_for_a_lease(new_pool: NewPool, threads: ThreadPoolExecutor) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    ending = threads.submit(session.safe_shutdown, SOON)
    until(lambda: session.status().draining)
    assert lease.call(pow, 2, 5, timeout=SOON) == 32
    assert not ending.done()
    lease.checkin()
    ending.result(SOON)
    is_over(session)


def test_safe_shutdown_refuses_new_work_and_serves_who_waits(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    waiting = [threads.submit(session.run, pow, 2, n, timeout=SOON) for n in range(3)]
    until(lambda: session.status().waiting == 3)
    ending = threads.submit(session.safe_shutdown, SOON)
    until(lambda: session.status().draining)
    for refused in (session.checkout, session.nonblock_checkout, lambda: session.run(pow, 1, 1)):
        with pytest.raises(PoolClosed, match="shutting down"):
            refused()
    lease.checkin()
    assert [future.result(SOON) for future in waiting] == [1, 2, 4]
    ending.result(SOON)
    is_over(session)


def test_safe_shutdown_serves_the_waiters_of_other_processes(
    new_pool: NewPool, start_method: str, threads: ThreadPoolExecutor
) -> None:
    code = """
        session = given()
        tell(session.run(pow, 2, 7, timeout=20))
    """
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    with script(code, start_method) as client:
        client.give(session)
        until(lambda: session.status().waiting == 1)
        ending = threads.submit(session.safe_shutdown, SOON)
        until(lambda: session.status().draining)
        lease.checkin()
        assert client.hear() == 128
        ending.result(SOON)
    is_over(session)


def test_safe_shutdown_finishes_what_was_submitted(new_pool: NewPool) -> None:
    session = new_pool().run_service()
    futures = [session.submit(lambda n: (time.sleep(0.02), n)[1], n) for n in range(10)]
    session.safe_shutdown(timeout=SOON)
    assert [future.result(0) for future in futures] == list(range(10))


def test_a_submit_while_the_pool_shuts_down_is_refused(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    queued = session.submit(pow, 2, 3)
    until(lambda: session.status().waiting == 1)
    ending = threads.submit(session.safe_shutdown, SOON)
    until(lambda: session._member.draining)
    with pytest.raises(PoolClosed, match="shutting down"):
        session.submit(pow, 1, 1)
    with pytest.raises(PoolClosed, match="shutting down"):
        list(session.map(pow, [1], [1]))
    lease.checkin()
    assert queued.result(SOON) == 8
    ending.result(SOON)


def test_safe_shutdown_kills_after_its_timeout_and_names_what_it_killed(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool().run_service()
    everyone = [manager(session), *workers(session, 2)]
    stuck = threads.submit(session.run, time.sleep, 1000)
    (row,) = until(lambda: [row for row in session.workers() if row.calls])
    began = time.monotonic()
    with pytest.raises(ShutdownTimeout) as caught:
        session.safe_shutdown(timeout=0.3)
    assert 0.3 <= elapsed(began) < 5
    assert isinstance(caught.value, TimeoutError)
    for evidence in (f"pid {row.pid}", f"process {os.getpid()}", row.site, "0.3 s"):
        assert evidence in str(caught.value)
    with pytest.raises((PoolClosed, WorkerDied)):
        stuck.result(SOON)
    is_over(session, *everyone)


def test_safe_shutdown_kills_a_submitted_job_that_never_ends(new_pool: NewPool) -> None:
    session = new_pool(1).run_service()
    running, queued = (session.submit(time.sleep, 1000) for _ in range(2))
    until(lambda: session.workers()[0].calls)
    pid = session.workers()[0].pid
    with pytest.raises(ShutdownTimeout, match=rf"pid {pid}\b"):
        session.safe_shutdown(timeout=0.3)
    assert isinstance(running.exception(SOON), (PoolClosed, WorkerDied))
    assert isinstance(queued.exception(SOON), PoolClosed)
    is_over(session)


def test_shutting_down_twice_is_harmless(new_pool: NewPool) -> None:
    session = new_pool(1).run_service()
    other = session.clone()
    session.safe_shutdown(timeout=SOON)
    session.safe_shutdown(timeout=SOON)
    other.safe_shutdown(timeout=SOON)
    session.terminate()
    other.terminate()


def test_shutting_down_from_many_threads_ends_all_of_them(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool().run_service()
    session.run(pow, 1, 1, timeout=SOON)
    barrier = threading.Barrier(6)

    def end(how: Callable[[], None]) -> None:
        barrier.wait(SOON)
        how()

    ways = [session.safe_shutdown] * 6
    for ending in [threads.submit(end, way) for way in ways]:
        ending.result(SOON)
    is_over(session)


def test_terminate_during_a_safe_shutdown_ends_both(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    ending = threads.submit(session.safe_shutdown)
    until(lambda: session.status().draining)
    session.terminate()
    ending.result(SOON)
    with contextlib.suppress(WhitepoolError):
        lease.checkin()
    is_over(session)


@pytest.mark.parametrize("how", ["safe_shutdown", "terminate"])
def test_a_pool_can_be_ended_in_a_futures_callback(new_pool: NewPool, how: str) -> None:
    session = new_pool(1).run_service()
    process = manager(session)
    called = threading.Event()

    def end(_: Future[int]) -> None:
        getattr(session, how)()
        called.set()

    future = session.submit(pow, 2, 4)
    future.add_done_callback(end)
    assert future.result(SOON) == 16
    assert called.wait(SOON)
    gone(process)
    until(lambda: session._member.closed)
    is_over(session)


def test_a_client_in_another_process_can_shut_the_pool_down(
    new_pool: NewPool, start_method: str
) -> None:
    code = """
        session = given()
        session.safe_shutdown(timeout=10)
        tell("done")
    """
    session = new_pool(1).run_service()
    process = manager(session)
    with script(code, start_method) as client:
        client.give(session)
        assert client.hear() == "done"
        gone(process)
        with pytest.raises(PoolClosed, match="make a new pool"):
            session.run(pow, 1, 1, timeout=SOON)
    session.safe_shutdown(timeout=SOON)
    is_over(session)


# --- terminate --------------------------------------------------------------------------------


def test_terminate_ends_running_calls_and_waiters_with_named_errors(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    session = new_pool(2).run_service()
    everyone = [manager(session), *workers(session, 2)]
    running = [threads.submit(session.run, time.sleep, 1000)]
    submitted = [session.submit(time.sleep, 1000)]
    until(lambda: sum(row.calls for row in session.workers()) == 2)
    waiting = [threads.submit(session.checkout, 60.0), threads.submit(session.run, pow, 1, 1)]
    submitted += [session.submit(pow, 1, 1)]
    until(lambda: session.status().waiting == 3)
    began = time.monotonic()
    session.terminate()
    assert elapsed(began) < 5
    for future in running + submitted[:1]:
        assert isinstance(future.exception(SOON), (PoolClosed, WorkerDied))
    for future in waiting + submitted[1:]:
        assert type(future.exception(SOON)) is PoolClosed
    is_over(session, *everyone)


def test_terminate_ends_a_running_map(new_pool: NewPool, threads: ThreadPoolExecutor) -> None:
    session = new_pool(1).run_service()
    results = threads.submit(list, session.map(time.sleep, [0, 1000, 0]))
    until(lambda: session.workers()[0].calls == 2)
    session.terminate()
    assert isinstance(results.exception(SOON), (PoolClosed, WorkerDied))


def test_terminate_of_a_pool_that_is_still_starting_ends_it(new_pool: NewPool) -> None:
    session = new_pool(4).run_service()
    process = manager(session)
    session.terminate()
    is_over(session, process)


def test_a_lease_held_over_terminate_says_that_it_is_over(new_pool: NewPool) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    assert lease.call(pow, 2, 2, timeout=SOON) == 4
    session.terminate()
    with pytest.raises((PoolClosed, WorkerDied)):
        lease.call(pow, 2, 2, timeout=SOON)
    assert not lease.valid


# --- after the end ----------------------------------------------------------------------------

USES = {
    "checkout": lambda s: s.checkout(timeout=SOON),
    "block_checkout": lambda s: s.block_checkout(timeout=SOON),
    "nonblock_checkout": lambda s: s.nonblock_checkout(),
    "transaction": lambda s: s.transaction(lambda lease: None, timeout=SOON),
    "run": lambda s: s.run(pow, 1, 1, timeout=SOON),
    "submit": lambda s: s.submit(pow, 1, 1).result(SOON),
    "map": lambda s: list(s.map(pow, [1], [1])),
    "status": lambda s: s.status(),
    "workers": lambda s: s.workers(),
    "print_statistics": lambda s: s.print_statistics(io.StringIO()),
    "resize": lambda s: s.resize(3),
    "executor": lambda s: s.executor().submit(pow, 1, 1).result(SOON),
}


@pytest.mark.parametrize("how", ["safe_shutdown", "terminate"])
def test_every_use_of_an_ended_pool_raises_PoolClosed_that_says_what_to_do(
    new_pool: NewPool, how: str
) -> None:
    used, unused = new_pool(1).run_service(), new_pool(1).run_service()
    used.run(pow, 1, 1, timeout=SOON)
    used.submit(pow, 1, 1).result(SOON)
    for session in (used, unused):
        getattr(session, how)()
        for use in USES.values():
            # An executor's word for it is RuntimeError, which says the same.
            with pytest.raises((PoolClosed, RuntimeError), match="make a new pool"):
                use(session)
        assert "closed" in repr(session)
        assert session.clone().name == session.name


def test_a_lease_can_be_given_back_after_the_end(new_pool: NewPool) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    session.terminate()
    session.checkin(lease)
    assert not lease.valid


# --- the ends that nobody asked for -----------------------------------------------------------


def test_a_script_that_never_shuts_down_finishes_what_it_submitted(start_method: str) -> None:
    code = """
        session = pool(2).run_service()
        tell(cast(session))
        def job(n):
            time.sleep(0.05)
            return n
        for n in range(8):
            session.submit(job, n).add_done_callback(lambda f: tell(f.result()))
    """
    with script(code, start_method) as running:
        told = running.hear()
        out, err = running.finish()
    assert sorted(map(int, out.split())) == list(range(8))
    assert running.process.returncode == 0
    assert "Traceback" not in err
    assert not any(psutil.pid_exists(pid) for pid in told["pids"])
    assert not os.path.exists(told["folder"])


def test_a_script_that_ends_with_a_lease_in_hand_ends_the_pool(start_method: str) -> None:
    code = """
        session = pool(2).run_service()
        tell(cast(session))
        lease = session.checkout(timeout=10)
        lease.call(pow, 1, 1)
    """
    with script(code, start_method) as running:
        told = running.hear()
        _, err = running.finish()
    assert running.process.returncode == 0
    assert "Traceback" not in err
    assert not any(psutil.pid_exists(pid) for pid in told["pids"])
    assert not os.path.exists(told["folder"])


def test_a_script_that_ends_with_an_uncaught_exception_ends_the_pool(start_method: str) -> None:
    code = """
        session = pool(2).run_service()
        tell(cast(session))
        called = sum(row.calls for row in session.workers())
        def block():
            try:
                session.run(time.sleep, 1000)
            except WhitepoolError:
                pass
        threading.Thread(target=block, daemon=True).start()
        while sum(row.calls for row in session.workers()) == called:
            pass
        raise LookupError("mine")
    """
    with script(code, start_method) as running:
        told = running.hear()
        _, err = running.finish()
    assert running.process.returncode == 1
    assert err.count("Traceback") == 1
    assert "LookupError: mine" in err
    assert not any(psutil.pid_exists(pid) for pid in told["pids"])
    assert not os.path.exists(told["folder"])


def test_a_pool_that_is_collected_warns_and_ends(new_pool: NewPool) -> None:
    sessions = [new_pool(2, name="forgotten").run_service()]
    sessions[0].run(pow, 1, 1, timeout=SOON)
    everyone = [manager(sessions[0]), *workers(sessions[0], 2)]
    path = folder(sessions[0])
    with pytest.warns(ResourceWarning, match="'forgotten' was never shut down"):
        sessions.clear()
    gone(*everyone)
    assert not path.exists()


def test_a_pool_with_an_engine_that_is_collected_warns_and_ends(new_pool: NewPool) -> None:
    sessions = [new_pool(2).run_service()]
    assert sessions[0].submit(pow, 2, 2).result(SOON) == 4
    everyone = [manager(sessions[0]), *workers(sessions[0], 2)]
    with pytest.warns(ResourceWarning, match="never shut down"):
        sessions.clear()
    gone(*everyone)


def test_a_running_job_keeps_its_forgotten_pool_alive_until_it_ends(new_pool: NewPool) -> None:
    def submit_and_forget() -> tuple[Future[str], psutil.Process]:
        session = new_pool(1).run_service()
        return session.submit(lambda: (time.sleep(0.3), "done")[1]), manager(session)

    def watch() -> None:
        future, process = submit_and_forget()
        assert future.result(SOON) == "done"
        gone(process)

    with pytest.warns(ResourceWarning, match="never shut down"):
        watch()
    until(lambda: not any(t.name.startswith("whitepool") for t in threading.enumerate()))


def test_a_with_block_that_raises_terminates(new_pool: NewPool) -> None:
    with pytest.raises(LookupError, match="mine"):
        with new_pool() as session:
            everyone = [manager(session), *workers(session, 2)]
            running = session.submit(time.sleep, 1000)
            until(lambda: session.status().leased == 1)
            began = time.monotonic()
            raise LookupError("mine")
    assert elapsed(began) < 5
    assert isinstance(running.exception(SOON), (PoolClosed, WorkerDied))
    is_over(session, *everyone)


def test_a_session_is_a_context_manager_too(new_pool: NewPool) -> None:
    with new_pool(1).run_service() as session:
        assert session.run(pow, 2, 3, timeout=SOON) == 8
    is_over(session)


def test_a_lease_still_held_at_the_end_of_with_warns_and_hangs_nothing(new_pool: NewPool) -> None:
    session = new_pool(1).run_service()
    lease = session.checkout(timeout=SOON)
    lease.call(pow, 1, 1, timeout=SOON)
    began = time.monotonic()
    with pytest.warns(ResourceWarning, match=r"lease \d+ .* still checked out"):
        session.__exit__(None, None, None)
    assert elapsed(began) < 5
    assert not lease.valid
    is_over(session)


def test_a_pool_object_starts_a_pool_of_its_own_each_time(new_pool: NewPool) -> None:
    made = new_pool(1)
    with made as first, made as second:
        assert first.run(os.getpid, timeout=SOON) != second.run(os.getpid, timeout=SOON)


# --- options ----------------------------------------------------------------------------------


def test_name_is_known_to_everybody(new_pool: NewPool) -> None:
    with new_pool(1, name="the pool") as session:
        assert session.name == session.status().name == "the pool"
        assert "the pool" in repr(session)
        context = session.run(lambda: current_worker(), timeout=SOON)
        assert (context.pool, context.slot) == ("the pool", 0)
        with session.checkout(timeout=SOON) as lease:
            assert lease.name == "the pool"
            assert (lease.pid, lease.slot) == (context.pid, context.slot)


def test_start_method_says_where_workers_come_from(new_pool: NewPool, start_method: str) -> None:
    with new_pool(1) as session:
        command = psutil.Process(session.run(os.getpid, timeout=SOON)).cmdline()
        assert any("worker.main" in word for word in command) is (start_method == "loky")


def test_preload_is_imported_once_where_workers_are_forked_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    (tmp_path / "preloaded.py").write_text(
        f"import os\npid = os.getpid()\nprint(pid, file=open({str(log)!r}, 'a'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Pool(2, preload=["preloaded"]) as session:
        pids = {process.pid for process in workers(session, 2)}
        at_import = session.run(lambda: sys.modules["preloaded"].pid, timeout=SOON)
        assert at_import not in pids | {os.getpid(), manager(session).pid}
        assert psutil.Process(at_import).ppid() == manager(session).pid
        assert log.read_text().split() == [str(at_import)]


def test_a_preload_that_fails_is_FactoryFailed_with_its_traceback_and_no_storm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import os\n\n1 / 0  # here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    began = time.monotonic()
    with Pool(2, preload=["broken_module"]) as session:
        with pytest.raises(FactoryFailed, match="ZeroDivisionError") as caught:
            session.checkout(timeout=SOON)
        assert 'broken_module.py", line 3' in caught.value.remote_traceback
        assert "preload of 'broken_module'" in caught.value.remote_traceback
        assert session.status().failing

        def spawned() -> int:
            return session.status().counters["spawned"]

        until(lambda: spawned() >= 2 + 3)  # a wave of two, then one at a time, ever later
        assert elapsed(began) >= (0.05 + 0.1 + 0.2) / 2
        session.terminate()


def test_a_preload_that_hangs_ends_with_start_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging_module.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Pool(2, preload=["hanging_module"], start_timeout=0.3) as session:
        with pytest.raises(FactoryFailed, match=r"did not start within 0\.3 s"):
            session.checkout(timeout=SOON)
        session.terminate()


@pytest.mark.parametrize("how", ["safe_shutdown", "terminate"])
def test_a_preload_that_hangs_does_not_hold_up_a_shutdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    mark = tmp_path / "begun"
    (tmp_path / "stuck_module.py").write_text(
        f"import time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(1000)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    session = Pool(2, preload=["stuck_module"]).run_service()
    until(mark.exists)
    began = time.monotonic()
    getattr(session, how)()
    assert elapsed(began) < 5
    is_over(session)


def test_env_is_the_workers_alone(new_pool: NewPool) -> None:
    with new_pool(1, env={"WP_TEST_VALUE": "a=b c", "HOME": "/nowhere"}) as session:
        found = session.run(lambda: dict(os.environ), timeout=SOON)
        assert (found["WP_TEST_VALUE"], found["HOME"]) == ("a=b c", "/nowhere")
        assert found["PATH"] == os.environ["PATH"]
    assert "WP_TEST_VALUE" not in os.environ


def test_overflow_ttl_zero_stops_overflow_at_its_checkin(new_pool: NewPool) -> None:
    with new_pool(1, 1, overflow_ttl=0) as session:
        first, second = session.checkout(timeout=SOON), session.checkout(timeout=SOON)
        assert session.status().overflow == 1
        first.checkin()
        second.checkin()
        status = session.status()
        assert (status.available, status.overflow) == (1, 0)


def test_overflow_stays_warm_for_overflow_ttl(new_pool: NewPool) -> None:
    with new_pool(1, 1, overflow_ttl=0.4) as session:
        first, second = session.checkout(timeout=SOON), session.checkout(timeout=SOON)
        began = time.monotonic()
        first.checkin()
        second.checkin()
        status = session.status()
        assert (status.available, status.overflow, status.state) == (2, 1, "ready")
        until(lambda: session.status().overflow == 0)
        assert elapsed(began) >= 0.4
        until(lambda: session.status().retiring == 0)
        assert session.status().available == 1


def test_start_timeout_ends_a_factory_that_hangs(new_pool: NewPool) -> None:
    with new_pool(1, factory=lambda: time.sleep(1000), start_timeout=0.4) as session:
        with pytest.raises(FactoryFailed, match=r"did not start within 0\.4 s"):
            session.checkout(timeout=SOON)
        session.terminate()


def test_teardown_runs_once_in_each_worker_at_a_clean_stop(
    new_pool: NewPool, tmp_path: Path
) -> None:
    def teardown(resource: list[int]) -> None:
        with open(tmp_path / str(os.getpid()), "a") as file:
            print(resource, file=file)

    with new_pool(2, factory=lambda: [7], teardown=teardown) as session:
        pids = {str(process.pid) for process in workers(session, 2)}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        pids, "[7]\n"
    )


def test_teardown_runs_when_a_pool_shrinks(new_pool: NewPool, tmp_path: Path) -> None:
    def teardown(resource: int) -> None:
        (tmp_path / str(os.getpid())).touch()

    with new_pool(2, factory=int, teardown=teardown) as session:
        before = {str(process.pid) for process in workers(session, 2)}
        session.resize(1)
        after = {str(process.pid) for process in workers(session, 1)}
        assert {path.name for path in tmp_path.iterdir()} == before - after


def test_teardown_does_not_run_at_terminate(new_pool: NewPool, tmp_path: Path) -> None:
    def teardown(resource: int) -> None:
        (tmp_path / str(os.getpid())).touch()

    session = new_pool(2, factory=int, teardown=teardown).run_service()
    workers(session, 2)
    session.terminate()
    assert not list(tmp_path.iterdir())


def test_a_teardown_that_raises_is_printed_and_holds_nothing_up(
    new_pool: NewPool, capfd: pytest.CaptureFixture[str]
) -> None:
    def teardown(resource: int) -> None:
        raise LookupError("in the teardown")

    with new_pool(1, factory=int, teardown=teardown) as session:
        workers(session, 1)
    until(lambda: not processes())
    assert capfd.readouterr().err.count("LookupError: in the teardown") == 1


def test_a_teardown_that_hangs_is_killed_after_stop_timeout(new_pool: NewPool) -> None:
    def teardown(resource: int) -> None:
        time.sleep(1000)

    session = new_pool(2, factory=int, teardown=teardown, stop_timeout=0.4).run_service()
    everyone = workers(session, 2)
    began = time.monotonic()
    session.safe_shutdown(timeout=SOON)
    assert 0.4 <= elapsed(began) < 5
    is_over(session, *everyone)


def test_native_thread_pools_get_a_fair_share_of_the_cores(
    new_pool: NewPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "5")
    with new_pool(1, env={"OPENBLAS_NUM_THREADS": "6"}) as session:
        found = session.run(lambda: dict(os.environ), timeout=SOON)
    assert found["OMP_NUM_THREADS"] == found["NUMBA_NUM_THREADS"] == str(usable_cpus())
    assert (found["MKL_NUM_THREADS"], found["OPENBLAS_NUM_THREADS"]) == ("5", "6")
    with new_pool(usable_cpus() + 1) as session:
        assert session.run(os.getenv, "OMP_NUM_THREADS", timeout=SOON) == "1"
    assert "OMP_NUM_THREADS" not in os.environ


# --- resize and looking -----------------------------------------------------------------------


def test_resize_up_and_down_under_load_loses_no_job(new_pool: NewPool) -> None:
    with new_pool(1) as session:
        futures = [session.submit(lambda n: (time.sleep(0.02), n)[1], n) for n in range(100)]
        session.resize(4, 1)
        until(lambda: session.status().leased == 5)
        session.resize(2, 0)
        until(lambda: session.status().leased <= 2)
        status = session.status()
        assert (status.pool_size, status.max_overflow) == (2, 0)
        session.resize(3)
        until(lambda: session.status().leased == 3)
        assert [future.result(SOON) for future in futures] == list(range(100))
        assert len(workers(session, 3)) == 3
        session.resize(1)
        assert len(workers(session, 1)) == 1


@pytest.mark.parametrize(
    ("sizes", "error"),
    [((0, None), ValueError), ((1, -1), ValueError), (("2", None), TypeError)],
)
def test_resize_to_what_cannot_be_names_it(sizes: tuple[int, int], error: type[Exception]) -> None:
    with Pool(1) as session:
        with pytest.raises(error, match=r"allowed: "):
            session.resize(*sizes)
        assert session.run(pow, 2, 2, timeout=SOON) == 4


def test_status_counts_what_happens(new_pool: NewPool, threads: ThreadPoolExecutor) -> None:
    with new_pool(1, 1) as session:
        workers(session, 1)
        assert session.status().state == "ready"
        first = session.checkout(timeout=SOON)
        status = session.status()
        assert (status.pool_size, status.max_overflow, status.leased) == (1, 1, 1)
        assert (status.state, status.available, status.overflow) == ("overflow", 0, 0)
        second = session.checkout(timeout=SOON)
        waiting = threads.submit(session.run, pow, 2, 2, timeout=SOON)
        until(lambda: session.status().waiting == 1)
        status = session.status()
        assert (status.leased, status.overflow, status.state) == (2, 1, "full")
        assert not status.draining
        assert not status.failing
        assert status.last_failure is None
        first.checkin()
        second.checkin()
        assert waiting.result(SOON) == 4
        assert session.status().counters["granted"] == 3


def test_workers_tell_who_holds_them_and_from_which_line(
    new_pool: NewPool, threads: ThreadPoolExecutor
) -> None:
    with new_pool(2) as session:
        workers(session, 2)
        released = threading.Event()

        def hold() -> int:
            threading.current_thread().name = "holder"
            with session.checkout(timeout=SOON) as lease:  # the line
                lease.call(pow, 1, 1, timeout=SOON)
                assert released.wait(SOON)
                return lease.id

        line = hold.__code__.co_firstlineno + 2
        holding = threads.submit(hold)
        try:
            until(lambda: [row for row in session.workers() if row.calls == 1])
            idle, leased = sorted(session.workers(), key=lambda row: row.lease or 0)
            text = io.StringIO()
            session.print_statistics(text)
        finally:
            released.set()
        assert leased.lease == holding.result(SOON)
        assert (leased.state, idle.state) == ("leased", "idle")
        assert leased.holder_pid == os.getpid()
        assert leased.holder_thread == "holder"
        assert leased.site == f"{__file__}:{line}"
        assert (leased.leases, leased.calls, idle.leases, idle.calls) == (1, 1, 0, 0)
        assert {idle.slot, leased.slot} == {0, 1}
        for row in (idle, leased):
            assert row.pid is not None
            assert row.rss is not None and row.rss > 2**20
            assert row.cpu_time is not None
            assert row.created == psutil.Process(row.pid).create_time()
            assert 0 <= row.since <= row.age < 60
        assert (idle.holder_pid, idle.holder_thread, idle.site) == (None, None, None)
        first, *rest = text.getvalue().splitlines()
        assert first.startswith(f"<Pool {session.name!r} size=2+0 idle=1 leased=1 waiting=0")
        assert len(rest) == 2
        assert f"held by {os.getpid()} at {__file__}:{line}" in text.getvalue()
        assert f"slot {idle.slot}: pid {idle.pid} idle" in text.getvalue()


def test_print_statistics_goes_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with Pool(1, name="printed") as session:
        session.print_statistics()
    assert capsys.readouterr().out.startswith("<Pool 'printed' size=1+0 ")


def test_a_submitted_jobs_line_is_told_too(new_pool: NewPool) -> None:
    with new_pool(1) as session:
        line = sys._getframe().f_lineno + 1
        future = session.submit(time.sleep, 1000)
        (row,) = until(lambda: [row for row in session.workers() if row.calls])
        assert row.site == f"{__file__}:{line}"
        assert future.cancel()


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("multiprocessing", "loky", "psutil", "cloudpickle", "asyncio", "ctypes")
    code = f"import sys, whitepool_mp; print([n for n in {heavy!r} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def test_a_dead_manager_is_told_from_a_pool_that_was_shut_down(new_pool: NewPool) -> None:
    session = new_pool(1).run_service()
    workers(session, 1)
    no_successor(session)
    manager(session).kill()
    with pytest.raises(ManagerDied, match="exit code 1"):
        session.safe_shutdown(timeout=SOON)
    session.safe_shutdown(timeout=SOON)
    session.terminate()


def test_workers_are_started_as_python_starts_anything(tmp_path: Path, start_method: str) -> None:
    """`.pth` files of the environment, `sitecustomize` and the interpreter's flags are theirs too,
    and a package that only an import hook of those finds."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "hooked.py").write_text("answer = 42\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'hooked':\n"
        f"            file = {str(tmp_path / 'hidden' / 'hooked.py')!r}\n"
        "            return importlib.util.spec_from_file_location(name, file)\n"
        "sys.meta_path.append(Finder)\n"
    )
    (tmp_path / "user.py").write_text(
        "import sys\n"
        "from whitepool_mp import Pool\n"
        "import hooked\n"
        "with Pool(1, start_method=sys.argv[1]) as session:\n"
        "    say = lambda: (__import__('hooked').answer, tuple(sys.flags), list(sys.path))\n"
        "    print(session.run(say) == say())\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", str(tmp_path / "user.py"), start_method],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout.strip(), done.stderr) == ("True", "")
