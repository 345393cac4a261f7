"""Bad surroundings: no descriptors, no processes, no disk, no memory, blocked signals, ..."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading

import deeds
import pytest
from support import pipe_writer, until
from user_script import script

from whitepool_mp import FactoryFailed, Pool, WorkerDied, testing
from whitepool_mp.client.joining import Handshake
from whitepool_mp.wire import frames
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


def test_a_takeover_that_is_short_of_descriptors_saves_what_it_can(start_method):
    """The next manager needs one more for each worker that is not its child."""
    code = """
        import resource
        def attempt(spare):
            session = pool(4).run_service()
            manager = cast(session)["pids"][0]
            used = len(os.listdir(f"/proc/{manager}/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + spare))
            os.kill(manager, signal.SIGKILL)
            tell(session.status().counters["managers_lost"])
            session.terminate()
        for spare in range(6):
            pid = os.fork()
            if not pid:
                attempt(spare)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
    """
    with script(code, start_method) as owner:
        assert [owner.hear() for _ in range(6)] == [1] * 6
        owner.finish()


def test_a_manager_out_of_descriptors_takes_connections_again_later(start_method):
    with Pool(pool_size=1, start_method=start_method) as session:
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
        with session._member.link():  # so that each of the others needs one of its own
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


def test_a_manager_out_of_descriptors_lets_in_who_has_a_connection_already(start_method):
    with Pool(pool_size=1, start_method=start_method) as session:
        testing.wait_until_whole(session)
        address, key, token = session._member.joining()
        with socket.socket(socket.AF_UNIX) as sock:
            address.connect(sock)
            decoder, handshake = frames.FrameDecoder(), Handshake(key, token)
            (challenge,) = decoder.feed(sock.recv(4096))
            limit_manager(session, 3)
            sock.sendall(handshake.hear(challenge))
            (welcome,) = decoder.feed(sock.recv(4096))
            handshake.hear(welcome)
            assert handshake.done
            limit_manager(session, 4096)
        assert session.run(abs, -1, timeout=SOON) == 1
        assert session.status().counters["managers_lost"] == 0


def test_a_job_is_not_lost_when_the_manager_has_no_descriptor_for_a_channel():
    with Pool(pool_size=1) as session:
        testing.wait_until_whole(session)
        engine = session._member.threaded().engine
        until(lambda: engine._handshake is None)
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


# --- no processes -----------------------------------------------------------------------------

LIMITED = """
    import resource
    os.environ["TMPDIR"] = sys.stdin.readline().strip()

    def tasks():
        # What the kernel counts: every thread of every process of this user.
        count = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{pid}/task"))
        return count

    _, HARD = resource.getrlimit(resource.RLIMIT_NPROC)

    def limit(most, *pids):
        for pid in pids or (0,):
            resource.prlimit(pid, resource.RLIMIT_NPROC, (most, HARD))

    def said(attempt):
        try:
            return attempt()
        except (WhitepoolError, OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def other_user():
    """A command that runs one as a user without other processes, and a folder of that user's."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("takes root and setpriv, to become a user who has no other processes")
    uid = 50_000 + os.getpid() % 10_000  # nor has another one that runs these tests
    folder = tempfile.mkdtemp()
    os.chown(folder, uid, uid)
    capabilities = "+dac_override,+dac_read_search"  # the interpreter may lie in a folder of root's
    user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    yield [*user, f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"], folder
    os.rmdir(folder)  # the pool's own folder in it is gone


def test_no_process_for_a_replacement_is_named_and_made_up_for_later(
    start_method, other_user, tmp_path
):
    code = """
        session = pool(2).run_service()
        told = cast(session)
        def read(path):
            with open(path) as pipe:
                return pipe.read()
        def sibling():
            tell(session.run(read, sys.stdin.readline().strip()))
        thread = threading.Thread(target=sibling)
        thread.start()
        while session.status().leased != 1:
            pass
        for free in range(3):  # a start takes two for a moment
            idle = [row.pid for row in session.workers() if row.state == "idle"][0]
            limit(tasks() - 1 + free, *told["pids"])
            os.kill(idle, signal.SIGKILL)
            if free < 2:
                while not session.status().failing:
                    pass
                failed = session.status().last_failure
                refused = said(lambda: session.checkout(0.05))
                tell([failed, refused])
            limit(HARD, *[pid for pid in told["pids"] if os.path.exists(f"/proc/{pid}")])
            assert session.run(pow, 2, 3, timeout=20) == 8
            while session.status().available != 1:
                pass
            told = cast_again()
        tell("over")
        thread.join()
        session.safe_shutdown(timeout=10)
    """
    again = """
    def cast_again():
        import psutil
        manager = psutil.Process(session._member.owner.manager)
        return {"pids": [manager.pid] + [child.pid for child in manager.children()]}
    """
    through, folder = other_user
    path = str(tmp_path / "pipe")
    with (
        script(code, start_method, LIMITED + again, through) as owner,
        pipe_writer(path) as connect,
    ):
        owner.say(folder.encode())
        owner.say(path.encode())
        fd = connect()
        for _ in range(2):
            failed, refused = owner.hear()
            assert "Resource temporarily unavailable" in failed
            assert refused.startswith(("CheckoutTimeout", "FactoryFailed")), refused
        assert owner.hear() == "over"
        os.write(fd, b"unharmed")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, fd)
        os.close(null)
        assert owner.hear() == "unharmed"
        _, err = owner.finish()
        assert err == ""


def test_a_pool_for_which_there_are_too_few_processes_says_so_and_leaves_nothing(
    start_method, other_user
):
    code = """
        def attempt():
            session = pool(1).run_service()
            try:
                return session.run(pow, 2, 3, timeout=20)
            finally:
                session.terminate()
        before = tasks(), len(os.listdir("/proc/self/fd"))
        for free in range(7):
            limit(tasks() + free)
            tell(said(attempt))
            while tasks() != before[0]:
                pass
            assert len(os.listdir("/proc/self/fd")) == before[1]
        limit(HARD)
        session = pool(1).run_service()
        assert session.run(pow, 2, 3) == 8
        limit(tasks())
        tell(said(lambda: session.submit(pow, 2, 3)))  # that takes a thread
        limit(HARD)
        tell(session.submit(pow, 2, 3).result(10))
        session.safe_shutdown(timeout=10)
        tell("over")
    """
    through, folder = other_user
    with script(code, start_method, LIMITED, through) as owner:
        owner.say(folder.encode())
        told = []
        while not told or told[-1] != "over":
            told.append(owner.hear())
        owner.finish()
    assert told[6:] == [8, "RuntimeError: can't start new thread", 8, "over"]
    assert "Resource temporarily unavailable" in told[0]
    for said in told[:6]:
        assert said == 8 or said.startswith(("WhitepoolError", "ManagerDied", "FactoryFailed")), (
            told
        )


# --- no disk ----------------------------------------------------------------------------------

FULL = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    folder = sys.stdin.readline().strip().encode()

    def full(path, most):
        # A disk of our own at a path, with room for so many files.
        PRIVATE, RECURSIVE, NEW_MOUNTS = 1 << 18, 1 << 14, 0x20000
        return (
            libc.unshare(NEW_MOUNTS) == 0
            and libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None) == 0
            and libc.mount(b"full", path, b"tmpfs", 0, b"size=64k,nr_inodes=%d" % (most + 1)) == 0
        )

    def fill(path):
        with contextlib.suppress(OSError), open(path + b"/data", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def files(path):
        count = 0
        with contextlib.suppress(OSError):
            while True:
                open(path + b"/%d" % count, "wb").close()
                count += 1

    def work(session):
        try:
            session.run(os.kill, 0, 9)
        except WorkerDied:
            pass
        return len(session.run(bytes, 1 << 20, timeout=20))
"""


@pytest.fixture
def disk():
    """A folder to mount a small disk at."""
    folder = tempfile.mkdtemp()
    yield folder
    os.rmdir(folder)


def test_a_full_disk_is_nothing_to_a_pool_that_runs(start_method, disk):
    code = """
        if not full(folder, 3):
            tell("no mounts")
            sys.exit()
        os.environ["TMPDIR"] = folder.decode()
        fill(folder)
        session = pool(2).run_service()
        files(folder)
        tell([session._member.owner.folder, work(session)])
        session.safe_shutdown(timeout=10)
        tell(os.path.exists(session._member.owner.folder))
    """
    with script(code, start_method, FULL) as owner:
        owner.say(disk.encode())
        told = owner.hear()
        if told == "no mounts":
            pytest.skip("takes the right to mount")
        assert told[0].startswith(disk)
        assert told[1] == 1 << 20
        assert owner.hear() is False
        _, err = owner.finish()
        assert err == ""


def test_a_pool_that_starts_on_a_full_disk_goes_elsewhere_or_says_so(start_method, disk):
    code = """
        if not full(folder, 1):
            tell("no mounts")
            sys.exit()
        os.environ["TMPDIR"] = folder.decode()
        before = len(os.listdir("/proc/self/fd"))
        try:
            pool(1).run_service()  # there is room for the folder, and not for the socket
        except WhitepoolError as error:
            tell(str(error))
        assert os.listdir(folder) == []
        files(folder)
        with pool(1) as session:
            tell([session._member.owner.folder, work(session)])
        for path in (b"/tmp", b"/var/tmp"):
            assert full(path, 0)
        os.environ["TMPDIR"] = "/tmp"
        try:
            pool(1).run_service()
        except WhitepoolError as error:
            tell(str(error))
        assert len(os.listdir("/proc/self/fd")) == before
    """
    with script(code, start_method, FULL) as owner:
        owner.say(disk.encode())
        told = owner.hear()
        if told == "no mounts":
            pytest.skip("takes the right to mount")
        assert f"could not be made in {disk}" in told and "No space left on device" in told
        elsewhere, size = owner.hear()
        assert (os.path.dirname(elsewhere), size) == ("/tmp", 1 << 20)
        told = owner.hear()
        assert "no temporary folder" in told and "No space left on device" in told
        _, err = owner.finish()
        assert err == ""
