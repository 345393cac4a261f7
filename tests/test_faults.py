"""Workers and factories that go wrong: one call fails, by name; nobody else notices.

After each fault a call that was running elsewhere must end with its result and the pool must have
all of `pool_size` again (`sibling`); nothing may be left behind (the fixture of all tests).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import deeds
import psutil
import pytest
from support import pipe_writer, processes, sibling, until, whole

from whitepool_mp import (
    CallTimeout,
    CheckoutTimeout,
    FactoryFailed,
    Lease,
    LeaseError,
    Pool,
    RemoteTraceback,
    SerializationError,
    Session,
    WorkerDied,
)

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""

DEATHS: dict[str, tuple[Callable[[], object], int]] = {
    "SIGSEGV": (deeds.segfault, -signal.SIGSEGV),
    "SIGABRT": (deeds.abort, -signal.SIGABRT),
    "SIGKILL": (deeds.kill_self, -signal.SIGKILL),
    "_exit": (deeds.leave, 3),
    "libc_exit": (deeds.libc_exit, 0),
}

STEPS = ("unpickle_arguments", "run", "pickle_result")


def do(step: str, deed: Callable[[], object]) -> tuple[Any, ...]:
    """A call in which a deed is done at one of its steps."""
    if step == "unpickle_arguments":
        return deeds.echo, deeds.OnUnpickling(deed)
    if step == "run":
        return (deed,)
    return deeds.on_pickling, deed


def gone(*pids: int) -> None:
    """Wait until processes are reaped."""
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


# --- deaths in a call -------------------------------------------------------------------------


@pytest.mark.parametrize("death", DEATHS)
def test_a_worker_that_dies_in_a_call_costs_that_call_alone(
    start_method: str, death: str, tmp_path: Any
) -> None:
    """At each step: while arguments are unpickled, while it runs, while its result is pickled."""
    deed, exitcode = DEATHS[death]
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        for step in STEPS:
            with session.checkout(T) as lease:
                with pytest.raises(WorkerDied) as caught:
                    lease.call(*do(step, deed), timeout=T)
                assert not lease.valid
                with pytest.raises(LeaseError, match="its worker died"):
                    lease.call(abs, -1, timeout=T)
            error = caught.value
            found = (error.pid, error.slot, error.exitcode, error.started, error.reason)
            assert found == (lease.pid, lease.slot, exitcode, True, None), step
            gone(lease.pid)
        with pytest.raises(WorkerDied):
            session.run(deed, timeout=T)
        with pytest.raises(WorkerDied):
            session.submit(deed, timeout=T).result(T)


def test_sys_exit_in_a_call_is_an_exception_like_others(start_method: str, tmp_path: Any) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with session.checkout(T) as lease:
            for step in STEPS:
                expected = SystemExit if step == "run" else SerializationError
                with pytest.raises(expected) as caught:
                    lease.call(*do(step, deeds.ask_to_exit), timeout=T)
                assert isinstance(caught.value.__cause__, RemoteTraceback)
                if step == "run":
                    assert caught.value.code == 4  # type: ignore[attr-defined]
                assert lease.call(os.getpid, timeout=T) == lease.pid


@pytest.mark.parametrize("death", DEATHS)
def test_a_crash_in_the_destructor_of_an_argument_harms_no_later_call(
    start_method: str, death: str, tmp_path: Any
) -> None:
    deed, _ = DEATHS[death]
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        for _ in range(3):
            # It goes when the call is over: its result may be on its way already.
            with contextlib.suppress(WorkerDied):
                assert session.run(isinstance, deeds.OnDeletion(deed), int, timeout=T) is False
            assert session.run(deeds.add, 1, 2, timeout=T) == 3


def test_worker_died_tells_all_that_is_known(start_method: str) -> None:
    began = time.monotonic()
    with Pool(pool_size=2, start_method=start_method, name="db") as session:
        with session.checkout(T), session.checkout(T) as lease:
            lease.call(time.sleep, 0.1, timeout=T)
            with pytest.raises(WorkerDied) as caught:
                lease.call(deeds.segfault, timeout=T)
        error = caught.value
        assert (error.pool, error.pid, error.slot) == ("db", lease.pid, lease.slot)
        assert (error.exitcode, error.signal) == (-signal.SIGSEGV, "SIGSEGV")
        assert error.age is not None and 0.1 < error.age < time.monotonic() - began
        assert error.peak_rss is not None and (4 << 20) < error.peak_rss < (1 << 30)
        assert error.running == "deeds.segfault"
        assert error.started is True
        assert error.stack is not None
        assert "deeds.py" in error.stack and "in segfault" in error.stack
        assert "serve.py" not in error.stack
        for part in ("'db'", str(lease.pid), f"worker {lease.slot}", "SIGSEGV", "deeds.segfault"):
            assert part in str(error)


def test_worker_died_says_that_a_kill_was_not_the_pools(start_method: str, tmp_path: Any) -> None:
    path = str(tmp_path / "pids")
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        future = session.submit(deeds.wait_in, path)
        (pid,) = until(lambda: deeds.noted(path))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="not killed by this pool") as caught:
            future.result(T)
        assert (caught.value.pid, caught.value.signal) == (pid, "SIGKILL")
        assert caught.value.started
        assert caught.value.stack is None


def test_a_full_stack_ends_in_an_error(start_method: str, tmp_path: Any) -> None:
    """The interpreter notices, or the process dies of it."""
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with pytest.raises((WorkerDied, RecursionError)) as caught:
            session.run(deeds.overflow_stack, timeout=T)
        if isinstance(caught.value, WorkerDied):
            assert caught.value.signal == "SIGSEGV"
            assert caught.value.stack is not None and "in deeper" in caught.value.stack


def test_running_out_of_memory_is_an_exception_like_others(
    start_method: str, tmp_path: Any
) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with session.checkout(T) as lease:
            with pytest.raises(MemoryError):
                lease.call(deeds.take_memory, timeout=T)
            assert lease.call(os.getpid, timeout=T) == lease.pid


def test_a_worker_that_closes_every_descriptor_is_replaced(
    start_method: str, tmp_path: Any, capfd: Any
) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with pytest.raises(WorkerDied) as caught:
            session.run(deeds.close_everything, timeout=T)
        assert caught.value.started
        gone(caught.value.pid)
    capfd.readouterr()


@pytest.mark.parametrize("command", [("/bin/true",), ("/bin/sleep", "600")])
def test_a_worker_that_becomes_another_program_is_replaced(
    start_method: str, command: tuple[str, ...], tmp_path: Any
) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with pytest.raises(WorkerDied) as caught:
            session.run(deeds.become, *command, timeout=T)
        gone(caught.value.pid)


# --- deaths between calls ---------------------------------------------------------------------


def test_an_idle_worker_that_is_killed_is_replaced(start_method: str, tmp_path: Any) -> None:
    with Pool(pool_size=3, start_method=start_method) as session:
        whole(session)
        with sibling(session, tmp_path):
            idle = [row for row in session.workers() if row.state == "idle"]
            assert idle[0].pid is not None
            os.kill(idle[0].pid, signal.SIGKILL)
            for number in range(20):
                assert session.run(deeds.add, number, 1, timeout=T) == number + 1
            gone(idle[0].pid)
        assert idle[0].slot in {row.slot for row in session.workers()}
        assert idle[0].pid not in {row.pid for row in session.workers()}


def test_a_replacement_inherits_the_slot(start_method: str) -> None:
    with Pool(pool_size=3, start_method=start_method) as session:
        whole(session)
        for slot in (1, 0, 2, 1):
            before = {row.slot: row.pid for row in session.workers()}
            os.kill(before[slot], signal.SIGKILL)
            gone(before[slot])
            whole(session)
            after = {row.slot: row.pid for row in session.workers()}
            assert set(after) == {0, 1, 2}
            assert {k for k in after if after[k] != before[k]} == {slot}


def test_all_workers_killed_at_once_cost_no_waiter_its_turn(start_method: str) -> None:
    with Pool(pool_size=3, start_method=start_method) as session:
        leases = [session.checkout(T) for _ in range(3)]
        results: list[int] = []

        def wait(number: int) -> None:
            results.append(session.run(deeds.add, number, timeout=T))

        threads = [threading.Thread(target=wait, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: session.status().waiting == 6)
        for lease in leases:
            os.kill(lease.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(T)
        assert sorted(results) == list(range(6))
        for lease in leases:
            with pytest.raises(WorkerDied) as caught:
                lease.call(abs, -1, timeout=T)
            assert not caught.value.started
            assert (caught.value.pid, caught.value.signal) == (lease.pid, "SIGKILL")
        whole(session)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_workers_that_kill_each_other_are_all_replaced(start_method: str, size: int) -> None:
    with Pool(pool_size=size, start_method=start_method) as session:
        leases = [session.checkout(T) for _ in range(size)]
        ended: list[Future[Any]] = [Future() for _ in leases]

        def attack(number: int) -> None:
            victim = leases[(number + 1) % size]
            try:
                ended[number].set_result(leases[number].call(deeds.kill, victim.pid, timeout=T))
            except BaseException as error:
                ended[number].set_exception(error)

        threads = [threading.Thread(target=attack, args=(number,)) for number in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(T)
        for future in ended:
            error = future.exception(0)
            # A victim that was reaped first is nobody any more.
            assert error is None or isinstance(error, (WorkerDied, ProcessLookupError))
        for lease in leases:
            if lease.valid:
                lease.checkin()
        whole(session)
        assert session.run(deeds.add, 1, 2, timeout=T) == 3


def test_a_worker_that_is_killed_while_starting_is_started_again(
    start_method: str, tmp_path: Any
) -> None:
    path = str(tmp_path / "pids")
    factory = deeds.FailsFirst(path, 1, deeds.hang)
    with Pool(pool_size=1, factory=factory, start_method=start_method) as session:
        (pid,) = until(lambda: deeds.noted(path))
        (row,) = session.workers()
        assert (row.pid, row.state) == (pid, "booting")
        os.kill(pid, signal.SIGKILL)
        whole(session)
        status = session.status()
        assert status.counters["start_failures"] == 1
        assert status.last_failure is not None and "SIGKILL" in status.last_failure
        assert not status.failing
        assert session.run(lambda number: number, with_resource=True, timeout=T) == 2


# --- workers that do not listen ---------------------------------------------------------------


@pytest.mark.parametrize("who", ["itself", "another"])
def test_a_stopped_worker_is_killed_at_the_deadline(
    start_method: str, who: str, tmp_path: Any
) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with session.checkout(T) as lease:
            with pytest.raises(CallTimeout):
                if who == "itself":
                    lease.call(deeds.stop_self, timeout=0.2)
                else:
                    os.kill(lease.pid, signal.SIGSTOP)
                    lease.call(abs, -1, timeout=0.2)
        gone(lease.pid)


def test_a_deadline_holds_while_arguments_are_sent(start_method: str, tmp_path: Any) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with session.checkout(T) as lease:
            os.kill(lease.pid, signal.SIGSTOP)
            with pytest.raises(CallTimeout):
                lease.call(len, bytes(8 << 20), timeout=0.2)
        gone(lease.pid)


def test_a_call_that_holds_the_gil_in_c_is_killed_at_the_deadline(
    start_method: str, tmp_path: Any
) -> None:
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with pytest.raises(CallTimeout):
            session.run(deeds.hold_gil, timeout=0.2)
        with pytest.raises(CallTimeout):
            session.submit(deeds.hold_gil, timeout=0.2).result(T)


def test_a_worker_that_ignores_sigterm_and_hangs_in_its_teardown_is_killed(
    start_method: str,
) -> None:
    options: dict[str, Any] = {"teardown": deeds.hang, "stop_timeout": 0.3}
    with Pool(
        2, 1, deeds.deaf_counter, start_method=start_method, overflow_ttl=0, **options
    ) as session:
        leases = [session.checkout(T) for _ in range(3)]
        for lease in leases:
            lease.checkin()
        until(lambda: session.status().retiring == 1)
        assert session.run(deeds.add, 1, 2, timeout=T) == 3
        whole(session)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    gone(*(lease.pid for lease in leases))


def test_a_thread_that_never_ends_delays_a_shutdown_by_the_stop_timeout(start_method: str) -> None:
    """An interpreter would wait for it for ever."""
    pool = Pool(pool_size=1, start_method=start_method, stop_timeout=0.2)
    session = pool.run_service()
    assert session.run(deeds.leave_thread, timeout=T) == "left"
    pid = session.run(os.getpid, timeout=T)
    session.safe_shutdown()
    gone(pid)


# --- what workers leave behind ----------------------------------------------------------------


@pytest.mark.parametrize("deed", ["stay", "raw", "detach"])
def test_what_a_worker_started_ends_with_it(start_method: str, deed: str, tmp_path: Any) -> None:
    """A child that keeps every descriptor; one that knows nothing of Python; a daemon."""

    def left_by(lease: Lease) -> int:
        path = str(tmp_path / str(lease.id))
        lease.call(deeds.linger, path, deed, timeout=T)
        (left,) = until(lambda: deeds.noted(path))  # type: ignore[misc]
        assert psutil.pid_exists(left)
        assert lease.call(os.getpid, timeout=T) == lease.pid
        return int(left)

    with Pool(pool_size=2, start_method=start_method) as session:
        with sibling(session, tmp_path):
            with session.checkout(T) as lease:
                left = left_by(lease)
                with pytest.raises(WorkerDied) as caught:
                    lease.call(deeds.leave, timeout=T)
                assert caught.value.exitcode == 3
            gone(left)
            lease = session.checkout(T)
            left = left_by(lease)
            lease.destroy()
            gone(left)
            with session.checkout(T) as lease:
                left = left_by(lease)
        assert psutil.pid_exists(left)
    gone(left)


@pytest.mark.parametrize("deed", ["stay", "raw"])
def test_a_child_that_keeps_the_channel_hides_no_death(
    start_method: str, deed: str, tmp_path: Any
) -> None:
    """The worker's end of the channel stays open in its child; the caller hears of the death."""
    path = str(tmp_path / "pids")

    def linger_and_die(path: str, deed: str) -> None:
        deeds.linger(path, deed)
        while not deeds.noted(path):
            time.sleep(0.001)
        deeds.kill_self()

    linger_and_die.__module__ = "__main__"
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        with pytest.raises(WorkerDied) as caught:
            session.run(linger_and_die, path, deed, timeout=T)
        assert caught.value.signal == "SIGKILL"
        gone(*deeds.noted(path))


# --- factories --------------------------------------------------------------------------------


def asked(session: Session, how: str) -> Any:
    """Want a worker, in one of three ways."""
    if how == "checkout":
        return session.checkout(T)
    if how == "run":
        return session.run(abs, -1, timeout=T)
    return session.submit(abs, -1).result(T)


@pytest.mark.parametrize("how", ["checkout", "run", "submit"])
def test_a_factory_that_raises_is_reported_with_its_traceback(start_method: str, how: str) -> None:
    with Pool(2, factory=deeds.failing_factory, start_method=start_method, name="db") as session:
        with pytest.raises(FactoryFailed, match=r"'db'.*LookupError: no database here") as caught:
            asked(session, how)
        assert "in failing_factory" in caught.value.remote_traceback
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        status = session.status()
        assert status.failing
        assert "no database here" in str(status.last_failure)


FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "sys_exit": (deeds.ask_to_exit, "SystemExit: 4"),
    "_exit": (deeds.leave, "exit code 3"),
    "SIGSEGV": (deeds.segfault, "SIGSEGV"),
    "SIGKILL": (deeds.kill_self, "SIGKILL"),
    "libc_exit": (deeds.libc_exit, "exit code 0"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_factory_that_ends_its_process_is_reported(start_method: str, failure: str) -> None:
    factory, says = FAILURES[failure]
    with Pool(pool_size=1, factory=factory, start_method=start_method) as session:
        with pytest.raises(FactoryFailed) as caught:
            session.checkout(T)
        assert says in caught.value.remote_traceback
        if failure == "SIGSEGV":
            assert "in segfault" in caught.value.remote_traceback


@pytest.mark.parametrize("failure", ["raise", "_exit"])
def test_a_factory_that_fails_at_first_is_tried_until_it_works(
    start_method: str, failure: str, tmp_path: Any
) -> None:
    path = str(tmp_path / "pids")
    deed = deeds.failing_factory if failure == "raise" else deeds.leave
    factory = deeds.FailsFirst(path, 3, deed)
    with Pool(pool_size=1, factory=factory, start_method=start_method) as session:
        whole(session)
        status = session.status()
        assert not status.failing
        assert status.counters["start_failures"] == 3
        assert session.run(lambda number: number, with_resource=True, timeout=T) == 4
        assert len(deeds.noted(path)) == 4


def test_a_factory_that_hangs_is_ended_by_start_timeout(start_method: str, tmp_path: Any) -> None:
    path = str(tmp_path / "pids")
    factory = deeds.FailsFirst(path, 1, deeds.hang)
    with Pool(1, factory=factory, start_method=start_method, start_timeout=1.5) as session:
        with pytest.raises(FactoryFailed, match=r"did not start within 1\.5 s"):
            session.checkout(T)
        gone(deeds.noted(path)[0])
        whole(session)
        assert session.run(lambda number: number, with_resource=True, timeout=T) == 2


def test_a_checkout_shorter_than_a_slow_start_times_out_with_the_numbers() -> None:
    with Pool(pool_size=1, factory=deeds.hang) as session:
        until(lambda: session.status().booting == 1)
        with pytest.raises(CheckoutTimeout, match="booting=1"):
            session.checkout(0.1)
        session.terminate()


def test_a_slow_factory_blocks_nobody_else(start_method: str, tmp_path: Any) -> None:
    """The overflow worker takes its time; the one that is there serves, also who waits."""
    path, pipe = str(tmp_path / "pids"), str(tmp_path / "pipe")
    factory = deeds.HangsLater(path, 1, pipe)
    with (
        Pool(1, 1, factory, start_method=start_method) as session,
        pipe_writer(pipe) as connect,
    ):
        with session.checkout(T) as lease:
            future = session.submit(deeds.add, 1, 2)
            connect()  # the second worker is in its factory
            assert session.status().booting == 1
            began = time.monotonic()
            for number in range(50):
                assert lease.call(lambda resource, x: x, number, timeout=T) == number
            assert time.monotonic() - began < 5
            assert not future.done()
        assert future.result(T) == 3
        for number in range(50):
            assert session.run(deeds.add, number, 1, timeout=T) == number + 1
        assert session.status().booting == 1
        assert len(deeds.noted(path)) == 2
        session.terminate()


def test_a_failing_overflow_leaves_the_others_serving(tmp_path: Any) -> None:
    path = str(tmp_path / "pids")

    class WorksOnce:
        def __call__(self) -> int:
            number = deeds.note(path)
            if number > 1:
                raise LookupError("only one")
            return number

    WorksOnce.__module__ = "__main__"
    with Pool(1, 1, WorksOnce()) as session:
        whole(session)
        with session.checkout(T) as lease:
            with pytest.raises((CheckoutTimeout, FactoryFailed), match="only one"):
                session.checkout(0.5)
            assert lease.call(lambda resource: resource, timeout=T) == 1
        assert session.run(abs, -1, timeout=T) == 1


def test_a_factory_may_return_what_cannot_be_pickled(start_method: str) -> None:
    with Pool(pool_size=1, factory=threading.Lock, start_method=start_method) as session:
        with session.checkout(T) as lease:
            assert lease.get().acquire() is True
            assert lease.call(lambda lock: lock.locked(), timeout=T) is True


def test_a_factory_that_cannot_be_pickled_is_refused_before_anything_starts(
    start_method: str,
) -> None:
    lock = threading.Lock()
    before = processes()
    pool = Pool(pool_size=1, factory=lambda: lock, start_method=start_method)
    with pytest.raises(SerializationError, match=r"the factory .*<lambda> cannot be pickled.*lock"):
        pool.run_service()
    pool = Pool(1, 0, deeds.Counter, teardown=lambda _: lock, start_method=start_method)
    with pytest.raises(SerializationError, match=r"the teardown .*<lambda> cannot be pickled"):
        pool.run_service()
    assert processes() == before


def test_a_factory_that_cannot_be_unpickled_is_reported(start_method: str) -> None:
    factory = deeds.FailsFirst("", 0, deeds.OnUnpickling(deeds.broken))
    with Pool(pool_size=1, factory=factory, start_method=start_method) as session:
        with pytest.raises(FactoryFailed, match="ValueError: broken while unpickling"):
            session.checkout(T)


def test_a_factory_may_print_a_lot(start_method: str, capfd: Any) -> None:
    with Pool(pool_size=2, factory=deeds.chatty_factory, start_method=start_method) as session:
        whole(session)
        assert session.run(lambda made: made, with_resource=True, timeout=T) == "done"
    out, err = capfd.readouterr()
    assert out.count("\n") >= 40_000
    assert err == ""


def test_faults_leave_no_trace_in_this_process(start_method: str) -> None:
    """Descriptors and channels of dead workers do not pile up while the pool lives."""
    with Pool(pool_size=1, start_method=start_method) as session:
        counts = []
        for _ in range(6):
            with pytest.raises(WorkerDied):
                session.run(deeds.leave, timeout=T)
            with pytest.raises(WorkerDied):
                session.submit(deeds.leave).result(T)
            assert session.run(abs, -1, timeout=T) == 1
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[-1] <= counts[1], counts
