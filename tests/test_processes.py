"""A pool shared by other processes, forked children, many threads, and workers of other pools."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from anatomy import gone, kill, manager, workers
from support import descriptors, until
from user_script import script

from whitepool_mp import LeaseError, Pool, Session, WorkerDied, current_worker

SOON = 10.0


@pytest.fixture
def session(start_method: str) -> Iterator[Session]:
    """A pool of two workers, both ready."""
    with Pool(2, start_method=start_method) as running:
        workers(running, 2)
        yield running


@pytest.fixture
def single(start_method: str) -> Iterator[Session]:
    """A pool of one worker, ready."""
    with Pool(1, start_method=start_method) as running:
        workers(running, 1)
        yield running


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Threads to block in."""
    with ThreadPoolExecutor(50) as executor:
        yield executor


# --- other processes --------------------------------------------------------------------------


def test_a_pickled_session_works_in_another_process(session: Session, start_method: str) -> None:
    code = """
        session = given()
        with session.checkout(timeout=10) as lease:
            tell([lease.pid, lease.call(os.getpid, timeout=10)])
        tell(session.run(lambda n: n + 1, 41, timeout=10))
        tell(session.submit(pow, 2, 5).result(10))
        tell(list(session.map(pow, [2, 3], [2, 2])))
        tell([session.name, session.status().counters["granted"]])
    """
    with script(code, start_method) as client:
        client.give(session)
        pids = {process.pid for process in workers(session, 2)}
        leased, ran = client.hear()
        assert leased == ran
        assert leased in pids
        assert [client.hear() for _ in range(3)] == [42, 32, [4, 9]]
        name, granted = client.hear()
        assert name == session.name
        assert session.status().counters["granted"] == granted >= 2
        _, err = client.finish()
        assert client.process.returncode == 0
        assert err == ""
    until(lambda: session.status().available == 2)
    assert {process.pid for process in workers(session, 2)} == pids


def test_a_session_goes_through_multiprocessing(start_method: str) -> None:
    code = """
        import multiprocessing, operator
        if __name__ == "__main__":
            with pool(1) as session, multiprocessing.get_context("spawn").Pool(2) as others:
                calls = [
                    others.apply_async(operator.methodcaller("run", pow, 2, n), (session,))
                    for n in range(10)
                ]
                tell([call.get(20) for call in calls])
    """
    with script(code, start_method) as client:
        assert client.hear() == [2**n for n in range(10)]
        _, err = client.finish()
    assert "Traceback" not in err


def test_the_same_session_unpickled_twice_shares_its_connections(session: Session) -> None:
    import pickle

    session.run(pow, 1, 1, timeout=SOON)
    connections = session.status().counters["connections"]
    copies = [pickle.loads(pickle.dumps(session)) for _ in range(3)]
    assert [copy.run(pow, 2, 3, timeout=SOON) for copy in [*copies, session.clone()]] == [8] * 4
    assert session.status().counters["connections"] == connections


def test_workers_held_elsewhere_are_told_as_such(single: Session, start_method: str) -> None:
    code = """
        session = given()
        lease = session.checkout(timeout=10)
        tell("holding")
        sys.stdin.readline()
        lease.checkin()
    """
    with script(code, start_method) as client:
        client.give(single)
        assert client.hear() == "holding"
        (row,) = single.workers()
        assert (row.state, row.holder_pid) == ("leased", client.pid)
        assert row.holder_thread == "MainThread"
        assert row.site is not None and row.site.startswith("<string>:")
        client.say()
        assert single.run(os.getpid, timeout=SOON) == row.pid
        client.finish()


QUEUED = """
    session = given()
    session.checkout(timeout=None)
"""


def test_a_client_killed_while_queued_is_never_granted_and_others_are(
    single: Session, start_method: str, threads: ThreadPoolExecutor
) -> None:
    with script(QUEUED, start_method) as client:
        client.give(single)
        with single.checkout(timeout=SOON) as lease:
            until(lambda: single.status().waiting == 1)
            behind = threads.submit(single.run, os.getpid, timeout=SOON)
            until(lambda: single.status().waiting == 2)
            os.kill(client.pid, signal.SIGKILL)
            until(lambda: single.status().waiting == 1)
        assert behind.result(SOON) == lease.pid
    assert single.status().counters["granted"] == 2


HOLDING = """
    session = given()
    lease = session.checkout(timeout=10)
    tell(lease.call(os.getpid))
    sys.stdin.readline()
"""
CALLING = """
    session = given()
    lease = session.checkout(timeout=10)
    tell(lease.pid)
    lease.call(time.sleep, 1000)
"""
SUBMITTED = """
    session = given()
    with session.checkout(timeout=10) as lease:
        pid = lease.pid
    future = session.submit(time.sleep, 1000)
    tell(pid)
    future.result()
"""


@pytest.mark.parametrize(
    "code", [HOLDING, CALLING, SUBMITTED], ids=["idle", "in a call", "in a job"]
)
def test_the_worker_of_a_client_that_was_killed_is_replaced(
    single: Session, start_method: str, code: str
) -> None:
    with script(code, start_method) as client:
        client.give(single)
        pid = client.hear()
        held = psutil.Process(pid)
        until(lambda: single.status().leased and single.workers()[0].calls)
        os.kill(client.pid, signal.SIGKILL)
        gone(held)
        assert single.run(os.getpid, timeout=SOON) != pid
    counters = single.status().counters
    assert (counters["crashes"], counters["start_failures"]) == (0, 0)


def test_a_client_that_ends_in_order_leaves_the_pool_running(
    single: Session, start_method: str
) -> None:
    code = """
        session = given()
        for n in range(3):
            session.submit(pow, 2, n).add_done_callback(lambda f: tell(f.result()))
    """
    with script(code, start_method) as client:
        client.give(single)
        out, err = client.finish()
    assert sorted(out.split()) == ["1", "2", "4"]
    assert err == ""
    assert single.run(pow, 2, 5, timeout=SOON) == 32


# --- fork -------------------------------------------------------------------------------------

FORKED = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
    session = pool(2).run_service()
    told = cast(session)
    session.submit(pow, 1, 1).result(10)

    def in_child(work):
        # Run work() in a forked child, which ends as scripts do; its pid.
        pid = os.fork()
        if pid:
            return pid
        try:
            work()
        finally:
            sys.exit(0)
"""


def test_a_forked_child_has_a_connection_of_its_own(start_method: str) -> None:
    code = """
        lease = session.checkout(timeout=10)
        def work():
            before = session.status().counters["connections"]
            tell([session.run(pow, 2, n, timeout=10) for n in range(5)])
            tell(session.submit(pow, 2, 5).result(10))
            try:
                lease.call(pow, 1, 1)
            except LeaseError as error:
                tell(str(error))
            with session.checkout(timeout=10) as mine:
                holders = [row.holder_pid for row in session.workers()]
                tell([mine.pid != lease.pid, os.getpid() in holders])
        connections = session.status().counters["connections"]
        child = in_child(work)
        while session.status().counters["connections"] == connections:
            pass
        for _ in range(100):
            assert lease.call(pow, 2, 6, timeout=10) == 64
        os.waitpid(child, 0)
        assert lease.call(pow, 2, 6, timeout=10) == 64
        lease.checkin()
        tell(session.run(pow, 2, 7, timeout=10))
        session.safe_shutdown(timeout=10)
        tell("parent done")
    """
    with script(code, start_method, FORKED) as parent:
        assert parent.hear() == [1, 2, 4, 8, 16]
        assert parent.hear() == 32
        assert "forked" in parent.hear()
        assert parent.hear() == [True, True]
        assert parent.hear() == 128
        assert parent.hear() == "parent done"
        _, err = parent.finish()
    assert err == ""


@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_a_forked_childs_end_does_not_end_the_pool(start_method: str, end: str) -> None:
    code = f"""
        def work():
            session.run(pow, 1, 1, timeout=10)
            {end}
        os.waitpid(in_child(work), 0)
        os.waitpid(in_child(lambda: {end}), 0)  # and one that never used it
        tell(session.run(pow, 2, 3, timeout=10))
        session.safe_shutdown(timeout=10)
    """
    with script(code, start_method, FORKED) as parent:
        assert parent.hear() == 8
        _, err = parent.finish()
    assert err == ""


def test_a_forked_child_does_not_keep_the_pool_of_a_killed_parent(start_method: str) -> None:
    code = """
        def work():
            session.run(pow, 1, 1, timeout=10)
            tell({"child": os.getpid(), **told})
            sys.stdin.readline()  # lives on, and holds whatever it inherited
        in_child(work)
        time.sleep(1000)
    """
    with script(code, start_method, FORKED) as parent:
        told = parent.hear()
        os.kill(parent.pid, signal.SIGKILL)
        try:
            everyone = [psutil.Process(pid) for pid in told["pids"] if psutil.pid_exists(pid)]
            gone(*everyone)
            until(lambda: not os.path.exists(told["folder"]))
            assert psutil.pid_exists(told["child"])
        finally:
            parent.say()


def test_a_forked_child_that_only_inherited_does_not_hold_a_shutdown_up(start_method: str) -> None:
    code = """
        inherited = in_child(lambda: sys.stdin.readline())
        with session.checkout(timeout=10) as lease:
            lease.call(pow, 1, 1, timeout=10)
        session.safe_shutdown(timeout=10)
        tell("done")
        os.waitpid(inherited, 0)
    """
    with script(code, start_method, FORKED) as parent:
        assert parent.hear() == "done"
        parent.say()
        _, err = parent.finish()
    assert err == ""


def test_a_childs_terminate_ends_the_pool_for_the_parent_too(start_method: str) -> None:
    code = """
        os.waitpid(in_child(session.terminate), 0)
        try:
            session.run(pow, 1, 1, timeout=10)
        except PoolClosed as error:
            tell(str(error))
    """
    with script(code, start_method, FORKED) as parent:
        assert "make a new pool" in parent.hear()
        _, err = parent.finish()
    assert err == ""


# --- threads ----------------------------------------------------------------------------------


def test_50_threads_hammering_one_session_get_their_own_results(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    def hammer(thread: int) -> list[int]:
        return [session.run(pow, thread, n, timeout=30) for n in range(20)]

    results = list(threads.map(hammer, range(50), timeout=60))
    assert results == [[thread**n for n in range(20)] for thread in range(50)]
    status = session.status()
    assert (status.available, status.leased, status.waiting) == (2, 0, 0)
    assert status.counters["killed"] == 0


def test_threads_that_hold_leases_never_share_a_worker(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    holders: dict[int, int] = {}

    def hold(thread: int) -> None:
        for _ in range(10):
            with session.checkout(timeout=30) as lease:
                assert holders.setdefault(lease.pid, thread) == thread
                assert lease.call(os.getpid, timeout=30) == lease.pid
                del holders[lease.pid]

    list(threads.map(hold, range(30), timeout=60))


def test_200_short_threads_reuse_one_connection(session: Session) -> None:
    def work() -> None:
        assert session.run(pow, 2, 3, timeout=SOON) == 8

    def one_after_the_other(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join(SOON)

    one_after_the_other(5)
    before = len(descriptors()), session.status().counters["connections"]
    one_after_the_other(200)
    assert (len(descriptors()), session.status().counters["connections"]) == before


def test_a_lease_outlives_the_thread_that_checked_it_out(single: Session) -> None:
    (lease,) = ThreadPoolExecutor(1).map(lambda _: single.checkout(timeout=SOON), [0])
    assert lease.call(pow, 2, 3, timeout=SOON) == 8
    lease.checkin()
    with pytest.raises(LeaseError):
        lease.checkin()
    assert single.run(pow, 2, 4, timeout=SOON) == 16


# --- pools in pools ---------------------------------------------------------------------------


def test_a_worker_can_use_another_pools_session(session: Session, start_method: str) -> None:
    with Pool(2, start_method=start_method) as inner:
        assert session.run(lambda s: s.run(pow, 2, 3, timeout=10), inner, timeout=SOON) == 8
        assert list(session.map(lambda n: inner.run(pow, 2, n, timeout=10), range(8))) == [
            2**n for n in range(8)
        ]
        until(lambda: inner.status().available == 2)


def test_a_call_can_use_its_own_pool(session: Session) -> None:
    def inside() -> tuple[int, int]:
        return current_worker().slot, session.run(lambda: current_worker().slot, timeout=10)

    first, second = session.run(inside, timeout=SOON)
    assert {first, second} == {0, 1}


def test_a_worker_killed_in_a_call_to_another_pool_gives_that_worker_up(
    single: Session, start_method: str
) -> None:
    with Pool(1, start_method=start_method) as inner:
        held = workers(inner, 1)
        running = single.submit(lambda: inner.run(time.sleep, 1000))
        until(lambda: inner.status().leased and inner.workers()[0].calls)
        kill(*workers(single, 1))
        assert isinstance(running.exception(SOON), WorkerDied)
        gone(*held)
        assert inner.run(pow, 2, 3, timeout=SOON) == 8


def nest(session: Session, how: str) -> tuple[list[int], str]:
    """Start a pool in a worker, and use it; its processes and its folder."""

    def start(how: str, start_method: str) -> tuple[list[int], str]:
        import psutil

        import whitepool_mp

        inner = whitepool_mp.Pool(1, start_method=start_method).run_service()
        assert inner.run(pow, 2, 3, timeout=10) == 8
        boss = psutil.Process(inner._member.owner.manager)
        pids = [boss.pid, *(child.pid for child in boss.children())]
        if how == "shut down":
            inner.safe_shutdown(timeout=10)
        else:
            sys.modules["kept"] = inner  # type: ignore[assignment]
        return pids, inner._member.owner.folder

    method = "loky" if "loky" in session.name else "forkserver"
    return session.run(start, how, method, timeout=SOON)


@pytest.mark.parametrize("how", ["shut down", "left to a clean stop", "left to a kill"])
def test_a_pool_started_in_a_worker_ends_with_it_at_the_latest(start_method: str, how: str) -> None:
    with Pool(1, start_method=start_method, name=f"outer {start_method}") as session:
        inner, folder = nest(session, how)
        if how == "left to a kill":
            kill(*workers(session, 1))
            until(lambda: not any(map(psutil.pid_exists, inner)))
        process = manager(session)
    until(lambda: not any(map(psutil.pid_exists, inner)))
    gone(process)
    until(lambda: not os.path.exists(folder))
