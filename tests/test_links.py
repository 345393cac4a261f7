"""Connections and channels over time: a process keeps few of them, whatever its threads did."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import errands
import pytest
from support import descriptors, until, whole
from user_script import script

from whitepool_mp import CheckoutTimeout, Lease, Pool, Session
from whitepool_mp.client.links import IDLE_LINKS

T = 30.0
"""Seconds that nothing here should need: a deadline against hanging."""
SPARE = 2 * IDLE_LINKS
"""More descriptors than the connections that are left, a channel to each worker and its page."""


@contextlib.contextmanager
def all_waiting(session: Session, count: int) -> Iterator[list[threading.Thread]]:
    """Threads that all wait for the only worker when the block begins, and end after it."""

    def use() -> None:
        with session.checkout(T) as lease:
            assert lease.call(abs, -1) == 1

    with session.checkout(T):
        threads = [threading.Thread(target=use) for _ in range(count)]
        for thread in threads:
            thread.start()
        until(lambda: session.status().waiting == count, T)
        yield threads
    for thread in threads:
        thread.join(T)
        assert not thread.is_alive()


def test_connections_of_threads_that_have_ended_are_let_go(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        whole(session)
        session.run(abs, -1)
        before = len(descriptors())
        gc.disable()  # nothing here is left to the collector
        try:
            for _ in range(2):
                with all_waiting(session, 100) as threads:
                    assert len(descriptors()) >= before + 100
                assert len(descriptors()) <= before + SPARE
                assert len(threads) == 100  # nor to the end of the last reference to a thread
        finally:
            gc.enable()
        whole(session)
        assert session.status().counters["killed"] == 0


def test_threads_that_live_on_keep_no_connection_each(start_method: str) -> None:
    end = threading.Event()

    def use_and_wait(session: Session) -> None:
        with session.checkout(T) as lease:
            assert lease.call(abs, -1) == 1
        assert session.run(abs, -1) == 1
        used.release()
        end.wait(T)

    used = threading.Semaphore(0)
    with Pool(2, start_method=start_method) as session, ThreadPoolExecutor(100) as threads:
        session.run(abs, -1)
        before = len(descriptors())
        try:
            futures = [threads.submit(use_and_wait, session) for _ in range(100)]
            for _ in range(100):
                assert used.acquire(timeout=T)
            assert len(descriptors()) <= before + SPARE
        finally:
            end.set()
        for future in futures:
            future.result(T)


def test_a_burst_of_threads_in_a_process_with_few_descriptors_costs_no_worker(
    start_method: str,
) -> None:
    """Who finds none is told so; all is as before afterwards."""
    code = """
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
        ends = []
        def use():
            try:
                with session.checkout(20) as lease:
                    ends.append(lease.call(abs, -1))
            except OSError as error:
                ends.append(str(error))
        with pool(1) as session:
            pid = session.run(os.getpid)
            with session.checkout(20):
                threads = [threading.Thread(target=use) for _ in range(200)]
                for thread in threads:
                    thread.start()
                while not ends:  # the others wait, or are told the same
                    time.sleep(0.01)
            for thread in threads:
                thread.join(20)
            tell(sorted(set(map(str, ends))))
            tell(len(os.listdir("/proc/self/fd")))
            tell(session.run(os.getpid) == pid)
    """
    with script(code, start_method) as running:
        served, refused = running.hear(60)
        assert served == "1"
        assert "no file descriptor is left in this process for a connection" in refused
        assert running.hear() < 100
        assert running.hear() is True
        running.finish()


def test_leases_outlive_the_threads_and_the_connections_of_others(start_method: str) -> None:
    """Each is under another connection than the last; none is closed while a lease is under it."""
    count = 4
    with Pool(count, start_method=start_method) as session:
        whole(session)
        leases: list[Lease] = []
        ready = threading.Barrier(count)

        def take() -> None:
            ready.wait(T)
            leases.append(session.checkout(T))

        threads = [threading.Thread(target=take) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(T)

        def wait() -> None:
            with pytest.raises(CheckoutTimeout):
                session.checkout(0.5)

        threads = [threading.Thread(target=wait) for _ in range(3 * IDLE_LINKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(T)
        assert sorted(lease.call(os.getpid, timeout=T) for lease in leases) == sorted(
            lease.pid for lease in leases
        )
        for lease in leases:
            lease.checkin()
        whole(session)
        assert session.status().counters["killed"] == 0


def test_a_lease_that_another_thread_checked_out_is_not_forgotten_here(start_method: str) -> None:
    """The end of the pool's block checks in, with a warning, what this thread holds."""
    with Pool(2, start_method=start_method) as session:
        mine = session.checkout(T)
        with ThreadPoolExecutor(1) as thread:
            theirs = thread.submit(session.checkout, T).result(T)
        with pytest.warns(ResourceWarning, match="still checked out") as caught:
            session._member.return_forgotten()
        assert len(caught) == 1
        assert not mine.valid and theirs.valid
        theirs.checkin()


def test_channels_to_workers_that_are_gone_are_let_go(start_method: str) -> None:
    """Also when the pool has shrunk, so that no other is opened."""
    with Pool(1, 6, start_method=start_method, overflow_ttl=0) as session:
        session.run(abs, -1)
        with session.checkout(T) as lease:
            lease.call(abs, -1)
        before = len(descriptors())
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                stack.enter_context(session.checkout(T)).call(abs, -1)
        whole(session)
        for _ in range(10):
            with session.checkout(T) as lease:
                lease.call(abs, -1)
        assert len(descriptors()) <= before + IDLE_LINKS


def test_a_thread_interrupted_as_it_waits_leaves_others_their_connections(
    start_method: str, tmp_path: Path
) -> None:
    code = f"""
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import errands
        with pool(1) as session:
            with session.checkout(20) as lease:
                for _ in range(20):
                    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
                    try:
                        session.checkout(20)
                    except KeyboardInterrupt:
                        pass
                tell(len(os.listdir("/proc/self/fd")))
                tell(lease.call(errands.trace, {str(tmp_path / "ran")!r}, 5))
            tell(session.status().counters["killed"])
    """
    with script(code, start_method) as running:
        assert running.hear() < 40
        assert running.hear() == 5
        assert running.hear() == 0
        running.finish()
    assert errands.run_count(tmp_path / "ran") == 1
