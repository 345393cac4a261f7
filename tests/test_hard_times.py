"""Bad surroundings: no descriptors, blocked signals, no memory for a message, a forking factory."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import threading

import deeds
import pytest
from support import until
from user_script import script

from whitepool_mp import FactoryFailed, Pool, WorkerDied, testing
from whitepool_mp.worker import calls

SOON = 20


def manager_of(session):
    return session._member.owner.manager


def limit_manager(session, descriptors):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.prlimit(manager_of(session), resource.RLIMIT_NOFILE, (descriptors, hard))


def forking_factory():
    os.fork()
    return "resource"


def cramped_factory():
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 40_000_000,) * 2)
    return "resource"


def wordy_factory():
    raise ValueError("x" * 60_000)


def test_a_manager_out_of_descriptors_survives_the_death_of_a_worker(start_method):
    with Pool(pool_size=1, start_method=start_method) as session:
        testing.wait_until_whole(session)
        pid = session.run(os.getpid, timeout=SOON)
        session.workers()  # everything that is imported late has been
        limit_manager(session, 3)
        os.kill(pid, signal.SIGKILL)
        until(lambda: session.status().failing)
        limit_manager(session, 4096)
        testing.wait_until_whole(session)
        assert session.run(abs, -1, timeout=SOON) == 1


def test_a_manager_out_of_descriptors_takes_connections_again_later():
    with Pool(pool_size=1) as session:
        testing.wait_until_whole(session)
        session.status()
        used = max(int(name) for name in os.listdir(f"/proc/{manager_of(session)}/fd"))
        limit_manager(session, used + 1)
        refused = []

        def ask():
            try:
                session.status()
            except Exception as error:
                refused.append(error)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert len(refused) == 5
        assert session.status().available == 1  # a connection that was there serves on
        limit_manager(session, 4096)
        refused.clear()
        again = threading.Thread(target=ask)
        again.start()
        again.join(SOON)
        assert not refused


def test_a_job_is_not_lost_when_the_manager_has_no_descriptor_for_a_channel():
    with Pool(pool_size=1) as session:
        testing.wait_until_whole(session)
        session._member.threaded()
        until(lambda: session.status().counters["connections"] == 2)  # the engine's is there
        limit_manager(session, 3)
        future = session.submit(abs, -1)
        until(lambda: session.status().counters["killed"])
        limit_manager(session, 4096)
        try:
            assert future.result(SOON) == 1
        except (FactoryFailed, WorkerDied):
            pass  # named; what matters is that it ended, and that nobody holds the worker
        testing.wait_until_whole(session)
        until(lambda: session.status().leased == 0)


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGTERM])
def test_signals_that_the_owner_has_blocked_are_not_blocked_in_the_pool(start_method, number):
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        with Pool(pool_size=1, start_method=start_method) as session:
            os.kill(session.run(os.getpid, timeout=SOON), signal.SIGKILL)
            assert session.run(signal.pthread_sigmask, signal.SIG_BLOCK, (), timeout=SOON) == set()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def test_a_message_that_no_worker_has_memory_for_ends_the_call_after_three_workers(start_method):
    with Pool(pool_size=1, start_method=start_method, factory=cramped_factory) as session:
        with pytest.raises(WorkerDied) as caught:
            session.run(len, b"x" * 80_000_000, timeout=SOON)
        assert not caught.value.started
        assert session.run(len, b"x", timeout=SOON) == 1
        assert session.status().counters["granted"] == 4


def test_a_factory_that_forks_makes_one_worker(start_method):
    with Pool(pool_size=1, start_method=start_method, factory=forking_factory) as session:
        assert session.run(abs, -1, timeout=SOON) == 1
        testing.wait_until_whole(session)
        assert session.status().counters["spawned"] == 1


def test_hundreds_refused_at_once_with_a_long_traceback_each_learn_the_reason():
    with Pool(pool_size=1, factory=wordy_factory) as session:
        futures = [session.submit(abs, -1) for _ in range(300)]
        for future in futures:
            with pytest.raises(FactoryFailed, match="ValueError: xxx"):
                future.result(SOON)
        assert session.status().counters["clients_not_reading"] == 0


def test_an_owner_that_ignores_sigchld_can_end_a_pool_whose_manager_died(start_method):
    code = """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        session = pool(1).run_service()
        session.run(abs, -1)
        owner = session._member.owner
        os.kill(owner.manager, signal.SIGKILL)
        session.terminate()
        session.terminate()
        tell(os.path.exists(owner.folder))
    """
    with script(code, start_method) as client:
        assert client.hear() is False
        _, err = client.finish()
    assert "Traceback" not in err


def test_a_call_that_used_up_all_descriptors_says_so(start_method):
    with Pool(1, start_method=start_method) as session:
        for _ in range(2):
            with session.checkout(SOON) as lease:
                with pytest.raises(OSError, match="Too many open files") as caught:
                    lease.call(deeds.hoard, timeout=SOON)
                assert "Too many open files" in str(caught.value.__cause__)


def test_an_exception_is_told_without_the_module_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "traceback", None)
    assert calls.told(OSError(24, "Too many"), None) == "OSError(24, 'Too many')\n"


KILLS_ITS_FIRST_MIDDLEMAN = """
import os
from whitepool_mp.worker import nursery

class Cut:
    def __init__(self, sock):
        self.close = sock.close

    def send(self, data):
        os.kill(os.getpid(), 9)

def middleman(self, worker, slot, *fds):
    if worker == 1:
        self._sock = Cut(self._sock)
    real(self, worker, slot, *fds)

real = nursery._Nursery._middleman
nursery._Nursery._middleman = middleman
"""


def meeting_factory(pipe):
    """The first worker is ready when there is a second, that is, when it has been given up."""
    from whitepool_mp import current_worker

    mode = os.O_WRONLY if os.path.exists(f"{pipe}.second") else os.O_RDONLY
    with open(f"{pipe}.second", "w"):
        pass
    os.close(os.open(pipe, mode))
    return current_worker().slot


def test_a_worker_whose_birth_nobody_could_tell_of_is_replaced_at_once(
    tmp_path, monkeypatch, capfd
):
    """The process between it and the nursery is killed: nobody waits for it, and it is quiet."""
    (tmp_path / "killing_preload.py").write_text(KILLS_ITS_FIRST_MIDDLEMAN)
    monkeypatch.syspath_prepend(tmp_path)
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    factory = functools.partial(meeting_factory, pipe)
    with Pool(1, factory=factory, preload=["killing_preload"]) as session:
        testing.wait_until_whole(session, SOON)
        assert session.run(abs, -1, timeout=SOON) == 1
        assert session.status().counters["spawned"] == 2
    assert capfd.readouterr().err == ""
