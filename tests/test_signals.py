"""Signals that others send to the processes of a pool: service managers, terminals, users."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deeds
import psutil
import pytest
from anatomy import gone, kill, manager, nursery, workers
from support import NewPool, pipe_writer, until, whole
from user_script import all_gone, script

from whitepool_mp import Pool, Session, WorkerDied
from whitepool_mp.wire import signals

SOON = 10.0
SENT = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT]


def send(targets: list[psutil.Process]) -> None:
    for number in SENT:
        for target in targets:
            target.send_signal(number)


def cast(session: Session, among: str) -> list[psutil.Process]:
    """Processes of a pool: one, some or all, but not the owner."""
    both = workers(session, 2)
    found = {"manager": [manager(session)], "nursery": [nursery(session)], "workers": both}
    return found.get(among) or [*found["manager"], *found["nursery"], *both]


def numbers(session: Session) -> list[int]:
    """Who is who: the manager, the nursery, the workers."""
    return [process.pid for process in cast(session, "all")]


# --- the pool goes on ----------------------------------------------------------------------------

AMONG = pytest.mark.parametrize("among", ["manager", "nursery", "workers", "all"])


@AMONG
def test_an_idle_pool_does_not_notice(session: Session, among: str) -> None:
    before = numbers(session)
    send(cast(session, among))
    futures = [session.submit(os.getpid) for _ in range(20)]
    assert {future.result(SOON) for future in futures} <= set(before)
    assert numbers(session) == before
    assert session.status().counters["managers_lost"] == 0


@AMONG
def test_calls_and_queued_jobs_do_not_notice(session: Session, among: str, tmp_path: Path) -> None:
    before = numbers(session)
    with pipe_writer(tmp_path / "pipe") as connect:
        running = session.submit(deeds.read_pipe, tmp_path / "pipe")
        fd = connect()
        queued = [session.submit(pow, 2, n) for n in range(50)]
        send(cast(session, among))
        session.resize(3)  # the nursery is asked for another
        workers(session, 3)
        os.write(fd, b"done")
    assert running.result(SOON) == "done"
    assert [future.result(SOON) for future in queued] == [2**n for n in range(50)]
    session.resize(2)
    whole(session)
    assert numbers(session)[:2] == before[:2]
    assert session.status().counters["crashes"] == 0


def test_a_replacement_can_be_had_after_all_were_signalled(session: Session) -> None:
    send(cast(session, "all"))
    (victim, _) = workers(session, 2)
    kill(victim)
    gone(victim)
    whole(session)
    send(cast(session, "all"))
    assert session.run(pow, 2, 5) == 32


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_while_a_pool_starts_end_no_process_of_it(
    start_method: str, number: signal.Signals
) -> None:
    """From the first moment of each process: there is none at which it could be ended."""
    code = """
        number = int(sys.stdin.readline())
        signal.signal(number, lambda *_: None)
        tell("ready")
        for _ in range(3):
            with pool(2) as session:
                assert session.run(pow, 2, 3) == 8
                while session.status().booting:
                    session.run(pow, 2, 3)
                now = session.status()
                pids = [row.pid for row in session.workers()]
                lost = session._member.owner._ledger.words[0] - 1  # managers but the first
                tell([now.counters["crashes"], now.failing, len(pids), lost])
        tell("over")
    """
    with script(code, start_method) as owner:
        owner.say(str(int(number)).encode())
        assert owner.hear() == "ready"
        over = threading.Event()
        root = psutil.Process(owner.pid)

        def storm() -> None:
            while not over.is_set():
                for process in [root, *root.children(recursive=True)]:
                    try:
                        process.send_signal(number)
                    except psutil.NoSuchProcess:
                        continue

        sender = threading.Thread(target=storm)
        sender.start()
        try:
            for _ in range(3):
                assert owner.hear(60) == [0, False, 2, 0]
            assert owner.hear(60) == "over"
        finally:
            over.set()
            sender.join()
        owner.finish()


def test_the_owners_own_sigterm_ends_everything(start_method: str) -> None:
    code = """
        session = pool(2).run_service()
        futures = [session.submit(time.sleep, 1000) for _ in range(5)]
        tell(cast(pool(1).run_service()))
        sys.stdin.readline()
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        every = psutil.Process(owner.pid).children(recursive=True)
        os.kill(owner.pid, signal.SIGTERM)
        owner.process.wait(SOON)
        assert owner.process.returncode == -signal.SIGTERM
        all_gone(told)
        gone(*every)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_to_all_and_a_shutdown_by_the_owner_lose_no_job(
    start_method: str, number: signal.Signals
) -> None:
    code = """
        asked = threading.Semaphore(0)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: asked.release())
        session = pool(2).run_service()
        session.run(pow, 2, 3)
        futures = [session.submit(time.sleep, 0.05) for _ in range(20)]
        while not session.status().leased:
            pass
        tell("busy")
        while not asked.acquire(timeout=0.1):
            pass
        session.safe_shutdown(30)
        tell([future.exception() for future in futures])
    """
    with script(code, start_method) as owner:
        assert owner.hear() == "busy"
        root = psutil.Process(owner.pid)
        every = [root, *root.children(recursive=True)]
        for process in every:
            process.send_signal(number)
        assert owner.hear() == [None] * 20
        owner.finish()
        assert owner.process.returncode == 0
        gone(*every)


# --- what workers start --------------------------------------------------------------------------


def dispositions() -> list[str]:
    """What a program that is started here has blocked and ignored."""
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, check=True).stdout
    return [line for line in status.decode().splitlines() if line.startswith(("SigBlk", "SigIgn"))]


def test_programs_that_a_worker_starts_have_what_those_of_the_owner_have(session: Session) -> None:
    assert session.run(dispositions) == dispositions()


def test_programs_that_a_preload_starts_have_what_those_of_the_owner_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starts_a_program.py").write_text(
        "import subprocess\n"
        "text = subprocess.run(['cat', '/proc/self/status'], capture_output=True).stdout.decode()\n"
        "had = [each for each in text.splitlines() if each.startswith(('SigBlk', 'SigIgn'))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def had() -> list[str]:
        return sys.modules["starts_a_program"].had  # type: ignore[no-any-return]

    with Pool(1, preload=["starts_a_program"]) as session:
        assert session.run(had) == dispositions()


def end_child(start: str) -> list[int | None]:
    """End processes of `multiprocessing` the moment they were started; how they ended."""
    context = multiprocessing.get_context(start)
    ends = []
    for _ in range(10):
        child = context.Process(target=time.sleep, args=(1000,))
        child.start()
        child.terminate()
        child.join(SOON)
        ends.append(child.exitcode)
        child.kill()
    return ends


def test_a_process_that_a_worker_forks_can_be_terminated_at_once(session: Session) -> None:
    assert session.run(end_child, "fork") == [-signal.SIGTERM] * 10


def test_what_the_owner_ignores_is_ignored_by_workers_and_their_programs(start_method: str) -> None:
    code = """
        import subprocess
        def ignored():
            text = subprocess.run(["cat", "/proc/self/status"], capture_output=True).stdout
            (mask,) = [line for line in text.decode().splitlines() if line.startswith("SigIgn")]
            both = int(mask.split()[1], 16) >> (signal.SIGHUP - 1) & 1
            return [bool(both), signal.getsignal(signal.SIGHUP) == signal.SIG_IGN]
        with pool(1) as session:
            tell(session.run(ignored))
    """
    with script(code, start_method, through=["nohup"]) as owner:
        assert owner.hear() == [True, True]
        owner.finish()


# --- user code has its own idea ------------------------------------------------------------------


class Notes:
    """A resource that notes signals."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: self.heard.append(number))


def test_a_factorys_own_handler_stands(new_pool: NewPool) -> None:
    with new_pool(1, factory=Notes) as session, session.checkout(SOON) as lease:
        os.kill(lease.pid, signal.SIGTERM)
        until(lambda: lease.call(lambda notes: notes.heard) == [signal.SIGTERM])


def test_the_default_action_can_be_had_back(session: Session) -> None:
    with session.checkout(SOON) as lease:
        lease.call(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        os.kill(lease.pid, signal.SIGTERM)
        with pytest.raises(WorkerDied, match="SIGTERM"):
            lease.call(time.sleep, SOON)


def test_a_preloaded_modules_handler_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "handles.py").write_text(
        "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\nheard = []\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Pool(1, preload=["handles"]) as session, session.checkout(SOON) as lease:
        os.kill(lease.pid, signal.SIGUSR1)
        until(lambda: lease.call(lambda: sys.modules["handles"].heard) == [1])


def read_in_c(path: str) -> bytes:
    """Read in C code that knows nothing of signals."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY)
    room = ctypes.create_string_buffer(8)
    count = libc.read(fd, room, 8)
    if count < 0:
        return os.strerror(ctypes.get_errno()).encode()
    return room.raw[:count]


def test_a_read_in_c_code_is_not_interrupted(session: Session, tmp_path: Path) -> None:
    with pipe_writer(tmp_path / "pipe") as connect:
        future = session.submit(read_in_c, str(tmp_path / "pipe"))
        fd = connect()
        reads = [row for row in session.workers() if row.state == "leased"]
        process = psutil.Process(reads[0].pid)
        until(lambda: process.status() == psutil.STATUS_SLEEPING)
        send([process])
        os.write(fd, b"all of it"[:8])
        assert future.result(SOON) == b"all of i"


# --- an owner that becomes another program -------------------------------------------------------


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_an_owner_that_execs_leaves_nothing(start_method: str, busy: bool) -> None:
    code = f"""
        session = pool(2).run_service()
        told = cast(session)
        if {busy}:
            futures = [session.submit(time.sleep, 1000) for _ in range(5)]
            held = [session.clone() for _ in range(2)]
        tell(told)
        sys.stdin.readline()
        new = "import sys; print(1, flush=True); sys.stdin.readline(); print(2, flush=True)"
        os.execv(sys.executable, [sys.executable, "-c", new])
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        owner.say()
        assert owner.hear() == 1
        all_gone(told)
        owner.say()
        assert owner.hear() == 2  # the same process lived on
        owner.finish()


def test_an_owner_that_execs_can_have_a_pool_again_at_once(start_method: str) -> None:
    code = """
        again = os.environ.get("AGAIN")
        if again is None:
            session = pool(2).run_service()
            told = cast(session)
            futures = [session.submit(time.sleep, 1000) for _ in range(5)]
            tell(told)
            os.environ["AGAIN"] = "1"
            os.execv(sys.executable, [sys.executable, "-c", CODE, *sys.argv[1:]])
        with pool(2) as session:
            tell([session.run(pow, 2, n) for n in range(20)])
            sys.stdin.readline()
            tell([session.run(os.getpid) in {row.pid for row in session.workers()}])
    """
    before = "CODE = open('/proc/self/cmdline').read().split(chr(0))[2]\n"
    with script(code, start_method, before=before) as owner:
        told = owner.hear()
        assert owner.hear() == [2**n for n in range(20)]
        all_gone(told)
        owner.say()
        assert owner.hear() == [True]
        owner.finish()


def test_an_owner_that_becomes_a_daemon_leaves_its_pool_behind(start_method: str) -> None:
    """The pool is the first process's: it ends with that, and the daemon is told."""
    code = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
        session = pool(2).run_service()
        told = cast(session)
        if os.fork():
            os._exit(0)
        os.setsid()
        if os.fork():
            os._exit(0)
        tell(told)
        sys.stdin.readline()
        try:
            tell(session.run(pow, 1, 1, timeout=5))
        except WhitepoolError as error:
            tell(type(error).__name__)
        with pool(1) as own:
            tell(own.run(pow, 2, 3))
    """
    with script(code, start_method) as owner:
        all_gone(owner.hear())
        owner.say()
        assert owner.hear() in ("PoolClosed", "ManagerDied")
        assert owner.hear() == 8


# --- what is blocked -----------------------------------------------------------------------------


def blocked(process: psutil.Process) -> set[int]:
    with open(f"/proc/{process.pid}/status") as file:
        (line,) = [line for line in file if line.startswith("SigBlk")]
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_the_manager_and_the_nursery_hear_what_they_need_and_workers_all(session: Session) -> None:
    until(lambda: blocked(manager(session)) == signals.OTHERS - {signal.SIGCHLD, signal.SIGALRM})
    assert blocked(nursery(session)) == signals.OTHERS
    for worker in workers(session, 2):
        assert blocked(worker) == set()


def test_the_thread_that_makes_a_pool_keeps_its_own_mask(
    start_method: str, threads: ThreadPoolExecutor
) -> None:
    def make() -> tuple[set[int], set[int]]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        try:
            mine = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            with Pool(1, start_method=start_method) as session:
                assert session.run(pow, 2, 2) == 4
            return mine, signal.pthread_sigmask(signal.SIG_BLOCK, [])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    mine, after = threads.submit(make).result(SOON)
    assert signal.SIGUSR2 in after
    assert mine == after


def take_many_at_once() -> int:
    """Have a dozen signals handled on top of each other."""
    numbers = [*signals.SPARED, *range(signal.SIGRTMIN, signal.SIGRTMIN + 7)]
    taken = []
    for number in numbers[len(signals.SPARED) :]:
        signal.signal(number, lambda number, _: taken.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    return len(taken)


def test_many_signals_at_once_are_taken(start_method: str) -> None:
    """They nest on the stack that faulthandler has set up, which is short."""
    with Pool(2, start_method=start_method) as session:
        assert [session.run(take_many_at_once, timeout=20) for _ in range(3)] == [7] * 3
        assert session.status().counters["crashes"] == 0
