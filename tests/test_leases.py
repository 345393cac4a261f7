"""Checking workers out and in: who gets which, when, and what becomes of a lease in the end."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import deeds
import psutil
import pytest
from support import fork, pipe_writer, sibling, until, whole

from whitepool_mp import (
    CheckoutTimeout,
    Lease,
    LeaseError,
    Pool,
    PoolClosed,
    PoolFull,
    Session,
    WorkerDied,
)

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


def gone(pid: int) -> None:
    """Wait until a process is reaped."""
    until(lambda: not psutil.pid_exists(pid))


def in_fork(function: Callable[[], object]) -> str:
    """What a function says in a forked child of this process."""
    reader, writer = os.pipe()
    pid = fork()
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


# --- the plain way ----------------------------------------------------------------------------


def test_a_lease_tells_id_pid_slot_name_and_whether_it_is_valid(start_method: str) -> None:
    with Pool(pool_size=2, start_method=start_method, name="db") as session:
        with session.checkout(T) as one, session.checkout(T) as two:
            assert two.id > one.id
            assert {one.slot, two.slot} == {0, 1}
            assert one.pid == one.call(os.getpid, timeout=T) != os.getpid()
            assert two.pid == two.call(os.getpid, timeout=T) != one.pid
            assert one.name == two.name == session.name == "db"
            assert one.valid and two.valid
            assert f"Lease {one.id} of 'db' slot={one.slot} pid={one.pid} valid" in repr(one)
        assert not one.valid and not two.valid
        assert "checked in" in repr(one)
        with session.checkout(T) as three:
            assert three.id > two.id


@pytest.mark.parametrize("how", ["session", "lease", "with"])
def test_a_checked_in_worker_serves_the_next_one(start_method: str, how: str) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        lease = session.checkout(T)
        if how == "session":
            session.checkin(lease)
        elif how == "lease":
            lease.checkin()
        else:
            with lease:
                lease.call(abs, -1, timeout=T)
        with session.checkout(T) as after:
            assert after.pid == lease.pid
            assert after.call(os.getpid, timeout=T) == lease.pid


@pytest.mark.parametrize("how", ["destroyed", "recycle", "destroy"])
def test_a_destroyed_worker_is_killed_and_its_slot_inherited(start_method: str, how: str) -> None:
    with Pool(pool_size=2, start_method=start_method) as session:
        lease = session.checkout(T)
        with session.checkout(T) as other:
            if how == "destroy":
                lease.destroy()
            else:
                getattr(session, how)(lease)
            assert not lease.valid
            gone(lease.pid)
            assert other.call(deeds.add, 1, 2, timeout=T) == 3
        whole(session)
        slots = {row.slot: row.pid for row in session.workers()}
        assert set(slots) == {0, 1}
        assert slots[other.slot] == other.pid
        assert slots[lease.slot] != lease.pid


def test_block_checkout_waits_and_nonblock_checkout_does_not() -> None:
    with Pool(pool_size=1) as session:
        lease = session.block_checkout()
        with pytest.raises(PoolFull, match=r"is full: size=1\+0 idle=0 leased=1"):
            session.nonblock_checkout()
        with pytest.raises(PoolFull):
            session.checkout(block=False)
        with thread(session.block_checkout, T) as waiting:
            until(lambda: session.status().waiting == 1)
            with pytest.raises(PoolFull, match="waiting=1"):
                session.nonblock_checkout()
            lease.checkin()
            waiting.result(T).checkin()
        whole(session)
        session.nonblock_checkout().checkin()


def test_a_nonblocking_checkout_waits_for_a_worker_that_is_being_started(
    start_method: str,
) -> None:
    with Pool(pool_size=1, max_overflow=1, start_method=start_method) as session:
        with session.nonblock_checkout(), session.nonblock_checkout():
            with pytest.raises(PoolFull, match=r"size=1\+1"):
                session.nonblock_checkout()


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_a_checkout_timeout_names_the_pool_and_the_numbers(timeout: float) -> None:
    with Pool(pool_size=1, max_overflow=1, name="db") as session:
        with session.checkout(T), session.checkout(T):
            began = time.monotonic()
            with pytest.raises(CheckoutTimeout) as caught:
                session.checkout(timeout)
            assert timeout <= time.monotonic() - began < timeout + 2
            assert isinstance(caught.value, TimeoutError)
            for part in ("'db'", f"within {timeout:g} s", "size=1+1", "leased=2", "idle=0"):
                assert part in str(caught.value)
            assert session.status().waiting == 0
        until(lambda: session.status().leased == 0)


@pytest.mark.parametrize("bad", [-1, float("nan"), "5", True])
def test_an_impossible_timeout_is_refused_before_anything_happens(bad: Any) -> None:
    with Pool(pool_size=1) as session:
        for ask in (session.checkout, session.block_checkout):
            with pytest.raises((TypeError, ValueError), match="timeout"):
                ask(bad)
        with pytest.raises((TypeError, ValueError), match="timeout"):
            session.transaction(lambda lease: None, bad)
        with session.checkout(T) as lease:
            with pytest.raises((TypeError, ValueError), match="timeout"):
                lease.call(abs, -1, timeout=bad)
            assert lease.call(abs, -1, timeout=T) == 1
        assert session.status().counters["granted"] == 1


@pytest.mark.parametrize(("strategy", "next_one"), [("lifo", 1), ("fifo", 0)])
def test_lifo_takes_the_warmest_worker_and_fifo_the_longest_idle(
    strategy: str, next_one: int
) -> None:
    with Pool(pool_size=2, strategy=strategy) as session:
        leases = [session.checkout(T), session.checkout(T)]
        for lease in leases:
            lease.checkin()
        with session.checkout(T) as lease:
            assert lease.pid == leases[next_one].pid


def test_waiters_are_served_first_come_first_served() -> None:
    with Pool(pool_size=1) as session:
        order: list[int] = []

        def wait(number: int) -> None:
            with session.checkout(T):
                order.append(number)

        held = session.checkout(T)
        with contextlib.ExitStack() as stack:
            futures = []
            for number in range(10):
                futures.append(stack.enter_context(thread(wait, number)))
                until(lambda number=number: session.status().waiting == number + 1)
            held.checkin()
            for future in futures:
                future.result(T)
        assert order == list(range(10))


def test_transaction_gives_the_lease_and_takes_it_back() -> None:
    with Pool(pool_size=1) as session:
        kept = []

        def double(lease: Lease) -> Any:
            kept.append(lease)
            return lease.call(deeds.add, 4, 4, timeout=T)

        assert session.transaction(double, T) == 8
        assert not kept[0].valid
        with pytest.raises(ZeroDivisionError):
            session.transaction(lambda lease: 1 // 0, T)
        whole(session)
        with session.checkout(T) as held:
            assert held.pid == kept[0].pid
            with pytest.raises(CheckoutTimeout):
                session.transaction(double, 0.02)


def test_a_clone_is_the_same_pool() -> None:
    with Pool(pool_size=1) as session:
        clone = session.clone()
        assert clone is not session
        assert clone.name == session.name
        lease = clone.checkout(T)
        with pytest.raises(PoolFull):
            session.nonblock_checkout()
        session.checkin(lease)
        with session.checkout(T) as after:
            assert after.pid == lease.pid
    with pytest.raises(PoolClosed):
        clone.checkout(T)


# --- overflow ---------------------------------------------------------------------------------


def test_overflow_starts_beyond_pool_size_and_stops_at_once_with_ttl_0(
    start_method: str,
) -> None:
    with Pool(1, 2, start_method=start_method, overflow_ttl=0) as session:
        assert session.status().state == "ready"
        leases = [session.checkout(T) for _ in range(3)]
        assert len({lease.pid for lease in leases}) == 3
        assert {lease.slot for lease in leases} == {0, 1, 2}
        status = session.status()
        assert (status.overflow, status.leased, status.state) == (2, 3, "full")
        for lease in leases:
            lease.checkin()
        whole(session)
        assert sum(psutil.pid_exists(lease.pid) for lease in leases) == 1
        assert session.status().counters["retired"] == 2
        assert session.status().counters["killed"] == 0


def test_overflow_stays_warm_for_its_ttl(start_method: str) -> None:
    ttl = 0.4
    with Pool(1, 1, start_method=start_method, overflow_ttl=ttl) as session:
        leases = [session.checkout(T), session.checkout(T)]
        for lease in leases:
            lease.checkin()
        again = [session.checkout(T), session.checkout(T)]
        assert {lease.pid for lease in again} == {lease.pid for lease in leases}
        began = time.monotonic()
        for lease in again:
            lease.checkin()
        until(lambda: session.status().overflow == 0)
        assert time.monotonic() - began >= ttl
        whole(session)


def test_an_overflow_worker_never_idles_while_somebody_waits() -> None:
    with Pool(1, 1, overflow_ttl=0) as session:
        leases = [session.checkout(T), session.checkout(T)]
        with thread(session.checkout, T) as waiting:
            until(lambda: session.status().waiting == 1)
            leases[1].checkin()
            taken = waiting.result(T)
        assert taken.pid == leases[1].pid
        taken.checkin()
        leases[0].checkin()
        whole(session)


# --- a lease after its end --------------------------------------------------------------------


def test_a_lease_is_of_no_use_after_its_checkin() -> None:
    with Pool(1, factory=deeds.Counter, name="db") as session:
        lease = session.checkout(T)
        proxy = lease.get()
        lease.checkin()
        uses: list[Callable[[], object]] = [
            lambda: lease.call(deeds.echo, timeout=T),
            lambda: lease.get(),
            lambda: proxy.add(1),
            lambda: lease.checkin(),
            lambda: lease.destroy(),
            lambda: session.checkin(lease),
            lambda: session.destroyed(lease),
        ]
        for use in uses:
            with pytest.raises(LeaseError, match=f"lease {lease.id} of pool 'db' was used after"):
                use()
        whole(session)


@pytest.mark.parametrize("how", ["checkin", "destroyed"])
def test_a_second_checkin_frees_nobody_elses_worker(how: str) -> None:
    with Pool(pool_size=1) as session:
        first = session.checkout(T)
        session.checkin(first)
        with session.checkout(T) as second:
            assert second.pid == first.pid
            with pytest.raises(LeaseError):
                getattr(session, how)(first)
            assert session.status().leased == 1
            assert second.call(os.getpid, timeout=T) == second.pid
            with pytest.raises(PoolFull):
                session.nonblock_checkout()


def test_a_lease_is_refused_by_another_pool_and_stays_valid() -> None:
    with (
        Pool(pool_size=1, name="one") as one,
        Pool(pool_size=1, name="two") as two,
    ):
        with one.checkout(T) as lease:
            for give_back in (two.checkin, two.destroyed):
                with pytest.raises(LeaseError, match=r"of pool 'one'.* given to pool 'two'"):
                    give_back(lease)
            assert lease.valid
            assert lease.call(abs, -1, timeout=T) == 1
        with pytest.raises(TypeError, match="a Lease is needed, not 'lease'"):
            one.checkin("lease")  # type: ignore[arg-type]


def test_a_lease_cannot_be_pickled() -> None:
    with Pool(pool_size=1) as session:
        with session.checkout(T) as lease:
            with pytest.raises(TypeError, match="cannot pickle"):
                pickle.dumps(lease)
            assert lease.call(abs, -1, timeout=T) == 1


def test_the_death_of_an_idle_leased_worker_shows_at_the_next_call(start_method: str) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        with session.checkout(T) as lease:
            os.kill(lease.pid, signal.SIGKILL)
            with pytest.raises(WorkerDied) as caught:
                lease.call(abs, -1, timeout=T)
            assert not caught.value.started
            assert caught.value.signal == "SIGKILL"
            assert not lease.valid
            with pytest.raises(LeaseError, match="its worker died"):
                lease.call(abs, -1, timeout=T)
        whole(session)


def test_the_death_of_an_idle_leased_worker_may_stay_unnoticed(start_method: str) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        with session.checkout(T) as lease:
            os.kill(lease.pid, signal.SIGKILL)
            gone(lease.pid)
            whole(session)
        whole(session)
        assert session.run(abs, -1, timeout=T) == 1


# --- several threads --------------------------------------------------------------------------


def test_two_threads_cannot_call_on_one_lease_at_once(tmp_path: Any) -> None:
    path = str(tmp_path / "pipe")
    with Pool(pool_size=1) as session, pipe_writer(path) as connect:
        with session.checkout(T) as lease:
            with thread(lambda: lease.call(deeds.read_pipe, path, timeout=T)) as first:
                fd = connect()
                with pytest.raises(LeaseError, match="in use by a call of another thread"):
                    lease.call(abs, -1, timeout=T)
                os.write(fd, b"unharmed")
                os.close(os.dup(fd))
                _end(fd)
                assert first.result(T) == "unharmed"
            assert lease.call(abs, -1, timeout=T) == 1


def _end(fd: int) -> None:
    """Close a pipe's write end but keep its number taken, for `pipe_writer` to close."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, fd)
    os.close(null)


def test_a_lease_may_be_called_and_checked_in_from_other_threads() -> None:
    with Pool(pool_size=1) as session:
        lease = session.checkout(T)
        assert lease.call(abs, -1, timeout=T) == 1
        with thread(lambda: lease.call(abs, -2, timeout=T)) as called:
            assert called.result(T) == 2
        with thread(lambda: session.checkin(lease)) as checked_in:
            checked_in.result(T)
        with session.checkout(T) as after:
            assert after.pid == lease.pid


@pytest.mark.parametrize("how", ["checkin", "destroy", "destroyed"])
def test_a_lease_that_ends_under_a_call_ends_the_call_and_its_worker(
    start_method: str, how: str, tmp_path: Any
) -> None:
    path = str(tmp_path / "pids")
    with Pool(pool_size=2, start_method=start_method) as session, sibling(session, tmp_path):
        lease = session.checkout(T)
        with thread(lambda: lease.call(deeds.wait_in, path, timeout=T)) as call:
            until(lambda: deeds.noted(path))
            if how == "destroyed":
                session.destroyed(lease)
            else:
                getattr(lease, how)()
            with pytest.raises(LeaseError, match=r"under the call of .*wait_in"):
                call.result(T)
        assert not lease.valid
        gone(lease.pid)


def test_a_lease_outlives_the_thread_that_checked_it_out() -> None:
    with Pool(pool_size=2) as session:
        with thread(session.checkout, T) as checked_out:
            lease = checked_out.result(T)
        assert lease.call(os.getpid, timeout=T) == lease.pid
        with thread(lambda: session.run(abs, -1, timeout=T)) as other:
            assert other.result(T) == 1
        assert lease.call(os.getpid, timeout=T) == lease.pid
        lease.checkin()
        whole(session)
        assert session.status().counters["killed"] == 0


def test_a_lease_that_its_thread_never_used_outlives_it() -> None:
    with Pool(pool_size=1) as session:
        with thread(session.checkout, T) as checked_out:
            lease = checked_out.result(T)
        gc.collect()
        with pytest.raises(PoolFull):
            session.nonblock_checkout()
        assert lease.call(os.getpid, timeout=T) == lease.pid
        lease.destroy()
        gone(lease.pid)
        whole(session)


# --- holders that go astray -------------------------------------------------------------------


def test_an_exception_inside_with_checks_in() -> None:
    with Pool(pool_size=1) as session:
        with pytest.raises(ZeroDivisionError), session.checkout(T) as lease:
            lease.call(abs, -1, timeout=T)
            raise ZeroDivisionError
        assert not lease.valid
        with session.checkout(T) as after:
            assert after.pid == lease.pid


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_forgotten_lease_warns_and_is_checked_in(cyclic: bool) -> None:
    with Pool(pool_size=1, name="db") as session:
        lease = session.checkout(T)
        pid = lease.call(os.getpid, timeout=T)
        holder: dict[str, Any] = {"lease": lease}
        if cyclic:
            holder["holder"] = holder
        says = f"lease {lease.id} of pool 'db' was never checked in; it is now"
        with pytest.warns(ResourceWarning, match=says):  # noqa: PT031
            del lease, holder
            gc.collect()
        whole(session)
        with session.checkout(T) as after:
            assert after.pid == pid


def test_a_lease_forgotten_by_a_thread_that_ended_is_checked_in() -> None:
    with Pool(pool_size=1) as session:

        def forget() -> int:
            return session.checkout(T).pid

        with pytest.warns(ResourceWarning, match="never checked in"):  # noqa: PT031
            with thread(forget) as forgot:
                pid = forgot.result(T)
            gc.collect()
        with session.checkout(T) as after:
            assert after.pid == pid


def test_a_lease_still_out_at_the_end_of_the_pool_warns_and_is_checked_in() -> None:
    with pytest.warns(ResourceWarning, match="still checked out at the end"):  # noqa: PT031
        with Pool(pool_size=1) as session:
            lease = session.checkout(T)
            lease.call(abs, -1, timeout=T)
    assert not lease.valid


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_cannot_use_its_copy_of_a_lease(start_method: str) -> None:
    with Pool(1, factory=deeds.Counter, start_method=start_method) as session:
        with session.checkout(T) as lease:
            proxy = lease.get()
            assert proxy.add(1) == 1
            refused = f"LeaseError: lease {lease.id} of pool {session.name!r} belongs to process"
            assert in_fork(lambda: lease.valid) == "False"
            assert in_fork(lambda: lease.call(deeds.echo, timeout=T)).startswith(refused)
            assert in_fork(lease.get).startswith(refused)
            assert in_fork(lambda: proxy.add(1)).startswith(refused)
            assert in_fork(lease.checkin).startswith(refused)
            assert in_fork(lease.destroy).startswith(refused)
            assert proxy.add(1) == 2
            assert session.status().leased == 1
        with session.checkout(T) as after:
            assert after.pid == lease.pid


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_drops_its_copy_takes_nothing_from_the_parent(
    start_method: str,
) -> None:
    with Pool(pool_size=2, start_method=start_method) as session:
        leases = [session.checkout(T)]

        def drop_and_use_its_own() -> int:
            leases.clear()
            gc.collect()
            with session.checkout(T) as own:
                return int(own.call(os.getpid, timeout=T))

        pid = leases[0].pid
        said = in_fork(drop_and_use_its_own)
        assert said.isdigit(), said
        assert int(said) != pid
        assert leases[0].call(os.getpid, timeout=T) == pid
        leases[0].checkin()
        whole(session)


# --- races ------------------------------------------------------------------------------------


def test_a_deadline_that_races_the_grant_leaks_no_worker(start_method: str) -> None:
    with Pool(pool_size=2, start_method=start_method) as session:
        whole(session)

        def race(seed: int) -> tuple[int, int]:
            rng = random.Random(seed)
            granted = late = 0
            for _ in range(1000):
                try:
                    with session.checkout(rng.choice((0, rng.random() * 0.001))) as lease:
                        granted += 1
                        if rng.random() < 0.3:
                            assert lease.call(deeds.add, granted, 1, timeout=T) == granted + 1
                except CheckoutTimeout:
                    late += 1
            return granted, late

        with contextlib.ExitStack() as stack:
            futures = [stack.enter_context(thread(race, seed)) for seed in range(4)]
            results = [future.result(60) for future in futures]
        assert sum(granted for granted, _ in results) > 0
        assert sum(late for _, late in results) > 0
        whole(session)
        assert session.status().counters["killed"] == 0
        assert session.status().counters["crashes"] == 0


def _interrupt_when(condition: Callable[[], object]) -> Callable[[], None]:
    main = threading.main_thread().ident
    assert main is not None

    def wait_and_interrupt() -> None:
        until(condition)
        signal.pthread_kill(main, signal.SIGINT)

    return wait_and_interrupt


@pytest.mark.parametrize("timeout", [T, None])
def test_ctrl_c_ends_a_waiting_checkout(timeout: float | None) -> None:
    with Pool(pool_size=1) as session:
        lease = session.checkout(T)
        with thread(_interrupt_when(lambda: session.status().waiting == 1)) as interrupter:
            with pytest.raises(KeyboardInterrupt):
                session.checkout(timeout)
            interrupter.result(T)
        until(lambda: session.status().waiting == 0)
        assert lease.call(abs, -1, timeout=T) == 1
        lease.checkin()
        whole(session)
        assert session.run(os.getpid, timeout=T) == lease.pid


@pytest.mark.parametrize("how", ["lease", "run", "proxy"])
@pytest.mark.parametrize("timeout", [T, None])
def test_ctrl_c_ends_a_call_and_its_worker_is_replaced(
    start_method: str, how: str, timeout: float | None, tmp_path: Any, capfd: Any
) -> None:
    path = str(tmp_path / "pids")
    with Pool(2, factory=Waiter, start_method=start_method) as session, sibling(session, tmp_path):
        with thread(_interrupt_when(lambda: deeds.noted(path))) as interrupter:
            with pytest.raises(KeyboardInterrupt):
                if how == "run":
                    session.run(deeds.wait_in, path, timeout=timeout)
                else:
                    with session.checkout(T) as lease:
                        if how == "lease":
                            lease.call(Waiter.wait_in, path, timeout=timeout)
                        else:
                            lease.get().wait_in(path)
            interrupter.result(T)
        gone(deeds.noted(path)[0])
    assert capfd.readouterr() == ("", "")


class Waiter:
    """A resource with a method that waits; made by value, so that workers import no test."""

    def wait_in(self, path: str) -> None:
        deeds.wait_in(path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_ctrl_c_at_any_moment_leaks_no_worker(start_method: str) -> None:
    """Interrupts come at random moments of checkout, call and checkin, again and again.

    In a process of its own: one that comes between two steps of making a connection may cost this
    process a descriptor.
    """

    def stress() -> str:
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None
        with Pool(pool_size=2, start_method=start_method) as session:
            whole(session)
            interrupted = _interrupt_at_random(session, random.Random(1))
            gc.collect()
            whole(session)
            assert interrupted > 0
            return str([session.run(deeds.add, 1, 2, timeout=T) for _ in range(4)])

    assert in_fork(stress) == "[3, 3, 3, 3]"


def _interrupt_at_random(session: Session, rng: random.Random) -> int:
    interrupted = 0
    came: list[bool] = []

    def interrupt(*_: object) -> None:
        came.append(True)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    for number in range(150):
        came.clear()
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 0.0015))
                while not came:  # one that comes in a destructor does not get out of it
                    with session.checkout(T) as lease:
                        assert lease.call(deeds.add, number, 1, timeout=T) == number + 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
    return interrupted


def test_warnings_are_errors_here() -> None:
    """The tests above rely on it: a leak that only warns must not pass."""
    with pytest.raises(ResourceWarning):
        warnings.warn("a leak", ResourceWarning, stacklevel=1)
