"""Deaths and stops of those who run a pool (owner, manager, nursery), and rude visitors."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from anatomy import elapsed, gone, kill, lives, manager, nursery, workers
from support import until
from user_script import all_gone, script

from whitepool_mp import (
    AuthenticationFailed,
    CheckoutTimeout,
    Pool,
    PoolClosed,
    Session,
    WorkerDied,
)
from whitepool_mp.client.link import Link
from whitepool_mp.wire import frames

SOON = 10.0


# --- the owner --------------------------------------------------------------------------------

IDLE_OWNER = """
    session = pool(2).run_service()
    tell(cast(session))
    sys.stdin.readline()
"""

BUSY_OWNER = """
    session = pool(2).run_service()
    told = cast(session)
    futures = [session.submit(time.sleep, 1000) for _ in range(5)]
    while session.status().waiting < 1:
        pass
    threading.Thread(target=session.checkout, args=(None,), daemon=True).start()
    while session.status().waiting < 2:
        pass
    tell(told)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("code", [IDLE_OWNER, BUSY_OWNER], ids=["idle", "busy"])
def test_the_owner_killed_takes_the_pool_with_it(start_method: str, code: str) -> None:
    with script(code, start_method) as owner:
        told = owner.hear()
        os.kill(owner.pid, signal.SIGKILL)
        all_gone(told)


def test_the_owner_killed_while_the_pool_starts_takes_it_along(start_method: str) -> None:
    code = """
        owner = pool(3).run_service()._member.owner
        tell({"pids": [owner.manager], "folder": owner.folder})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with script(code, start_method) as owner:
        all_gone(owner.hear())


def test_the_owner_that_leaves_by_os_exit_takes_the_pool_with_it(start_method: str) -> None:
    code = """
        session = pool(2).run_service()
        tell(cast(session))
        session.submit(time.sleep, 1000)
        os._exit(7)
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        owner.finish()
        assert owner.process.returncode == 7
        all_gone(told)


def test_what_a_call_left_behind_goes_with_the_owner(start_method: str) -> None:
    code = """
        import subprocess
        session = pool(1).run_service()
        told = cast(session)
        def spawn():
            return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
        told["pids"].append(session.run(spawn))
        tell(told)
        sys.stdin.readline()
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        assert lives(told["pids"][-1])
        os.kill(owner.pid, signal.SIGKILL)
        all_gone(told)


@pytest.mark.parametrize("code", [IDLE_OWNER, BUSY_OWNER], ids=["idle", "busy"])
def test_owner_and_manager_killed_together_leave_nothing(start_method: str, code: str) -> None:
    with script(code, start_method) as owner:
        told = owner.hear()
        kill(psutil.Process(told["pids"][0]), psutil.Process(owner.pid))
        all_gone(told)


def test_a_stopped_owner_changes_nothing_and_goes_on(start_method: str) -> None:
    code = """
        session = pool(2).run_service()
        tell(cast(session))
        sys.stdin.readline()
        tell(session.run(pow, 2, 6))
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        os.kill(owner.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(owner.pid).status() == psutil.STATUS_STOPPED)
        assert all(map(lives, told["pids"]))
        os.kill(owner.pid, signal.SIGCONT)
        owner.say()
        assert owner.hear() == 64


# --- the manager ------------------------------------------------------------------------------


def test_a_stopped_manager_costs_a_checkout_its_deadline_and_no_worker(session: Session) -> None:
    session.run(pow, 1, 1, timeout=SOON)
    process = manager(session)
    process.suspend()
    try:
        began = time.monotonic()
        with pytest.raises(CheckoutTimeout, match=r"within 0\.3 s"):
            session.checkout(timeout=0.3)
        assert 0.3 <= elapsed(began) < 3
    finally:
        process.resume()
    assert session.run(pow, 2, 3, timeout=SOON) == 8
    until(lambda: session.status().available == 2)
    workers(session, 2)


def test_a_stopped_manager_costs_a_new_threads_checkout_its_deadline_too(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    process = manager(session)
    process.suspend()
    try:
        began = time.monotonic()
        late = threads.submit(session.checkout, 0.3)
        with pytest.raises(CheckoutTimeout):
            late.result(SOON)
        assert 0.3 <= elapsed(began) < 3
        with pytest.raises(CheckoutTimeout):
            threads.submit(session.run, pow, 1, 1, timeout=0.3).result(SOON)
    finally:
        process.resume()
    assert threads.submit(session.run, pow, 2, 3, timeout=SOON).result(SOON) == 8
    until(lambda: session.status().available == 2)


def test_a_stopped_manager_leaves_running_calls_alone(session: Session) -> None:
    with session.checkout(timeout=SOON) as lease:
        lease.call(pow, 1, 1, timeout=SOON)
        process = manager(session)
        process.suspend()
        try:
            assert lease.call(pow, 2, 5, timeout=SOON) == 32
        finally:
            process.resume()


def test_a_submitted_job_waits_out_a_stopped_manager(session: Session) -> None:
    process = manager(session)
    process.suspend()
    try:
        future = session.submit(pow, 2, 3)
    finally:
        process.resume()
    assert future.result(SOON) == 8


def test_terminate_ends_a_pool_whose_manager_is_stopped(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whitepool_mp.client.owner._PATIENCE", 0.5)
    everyone = [manager(session), nursery(session), *workers(session, 2)]
    everyone[0].suspend()
    began = time.monotonic()
    session.terminate()
    assert elapsed(began) < 5
    gone(*everyone)


def test_safe_shutdown_ends_a_pool_whose_manager_is_stopped_at_its_timeout(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whitepool_mp.client.owner._PATIENCE", 0.5)
    everyone = [manager(session), nursery(session), *workers(session, 2)]
    everyone[0].suspend()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.3 s"):
        session.safe_shutdown(timeout=0.3)
    assert elapsed(began) < 5
    gone(*everyone)


# --- the nursery ------------------------------------------------------------------------------


def test_the_nursery_killed_harms_no_worker_and_the_next_start_has_a_new_one(
    session: Session,
) -> None:
    victim = nursery(session)
    before = workers(session, 2)
    with session.checkout(timeout=SOON) as lease:
        lease.call(pow, 1, 1, timeout=SOON)
        running = session.submit(lambda: (time.sleep(0.2), os.getpid())[1])
        until(lambda: sum(row.calls for row in session.workers()) == 2)
        kill(victim)
        gone(victim)
        assert lease.call(os.getpid, timeout=SOON) == lease.pid
        assert running.result(SOON) in {process.pid for process in before}
    assert workers(session, 2) == before
    kill(before[0])
    gone(before[0])
    after = workers(session, 2)
    assert before[0] not in after
    assert before[1] in after
    assert nursery(session) != victim
    assert session.status().counters["start_failures"] == 0


def test_the_nursery_killed_while_workers_start_costs_a_moment(start_method: str) -> None:
    with Pool(4, start_method=start_method) as session:
        process = manager(session)
        first = until(lambda: process.children())
        kill(first[0])  # it is the first child that a manager has
        assert session.run(pow, 2, 3, timeout=SOON) == 8
        workers(session, 4)


def test_nursery_and_workers_killed_together_are_replaced(session: Session) -> None:
    before = [nursery(session), *workers(session, 2)]
    kill(*before)
    gone(*before)
    assert session.run(pow, 2, 3, timeout=SOON) == 8
    assert not set(workers(session, 2)) & set(before)


# --- visitors ---------------------------------------------------------------------------------


def visit(session: Session) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SOON)
    sock.connect(session._member.path)
    return sock


def closed_on(sock: socket.socket) -> bool:
    """Read to the end of what the manager says."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return True


def serves_on(session: Session) -> None:
    assert session.run(pow, 2, 3, timeout=SOON) == 8
    (fresh,) = ThreadPoolExecutor(1).map(lambda n: session.run(pow, 2, n, timeout=SOON), [4])
    assert fresh == 16


def test_a_session_with_a_wrong_key_is_refused(session: Session) -> None:
    member = session._member
    with pytest.raises(AuthenticationFailed, match="refused"):
        Link(member.joining()[0], bytes(frames.KEY_BYTES), os.urandom(frames.MEMBER_BYTES))
    serves_on(session)
    assert session.status().counters["connections_without_proof"] == 1


RUDE = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n" * 100,
    "random bytes": bytes(range(255, -1, -1)) * 40,
    "a negative length": struct.pack("!i", -1),
    "a length of zero": struct.pack("!i", 0),
    "an oversized frame": struct.pack("!i", 1 << 30) + b"x",
    "a frame too long before proof": struct.pack("!i", 1025) + bytes(1025),
    "a request before proof": frames.checkout(1, True, None, "x"),
    "termination before proof": frames.request(frames.TERMINATE, 1),
    "a proof cut short": frames.frame(bytes((frames.AUTH,)) + bytes(40)),
    "a wrong proof": frames.auth(bytes(32), bytes(32), bytes(16), 1, "x"),
}


@pytest.mark.parametrize("what", RUDE)
def test_a_visitor_who_sends_nonsense_is_shown_out(what: str) -> None:
    with Pool(1) as session, visit(session) as sock:
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(RUDE[what])
        assert closed_on(sock)
        serves_on(session)
        counters = session.status().counters
        assert counters["protocol_errors"] + counters["connections_without_proof"] == 1


PROVEN = {
    "an unknown kind": frames.frame(bytes((200, 1, 2, 3))),
    "a truncated request": frames.frame(bytes((frames.CHECKOUT, 0))),
    "an oversized frame": struct.pack("!i", 1 << 30),
    "a deadline that is no number": frames.checkout(1, True, float("nan"), "x"),
    "a resize to nothing": frames.resize(1, 0, 0),
}


@pytest.mark.parametrize("what", PROVEN)
def test_nonsense_from_a_client_closes_its_connection_alone(start_method: str, what: str) -> None:
    with Pool(1, start_method=start_method) as session:
        member = session._member
        link = Link(*member.joining()[:2], os.urandom(frames.MEMBER_BYTES))
        link._sock.settimeout(SOON)
        link._sock.sendall(PROVEN[what])
        assert closed_on(link._sock)
        link.close()
        serves_on(session)
        assert session.status().counters["protocol_errors"] == 1


def test_half_a_frame_and_then_silence_holds_nobody_up(session: Session) -> None:
    with visit(session) as sock:
        sock.sendall(struct.pack("!i", 100) + b"only this")
        serves_on(session)
        sock.shutdown(socket.SHUT_WR)
        assert closed_on(sock)
    serves_on(session)


def test_a_client_that_reads_no_answers_holds_nobody_up() -> None:
    with Pool(1) as session:
        link = Link(*session._member.joining()[:2], os.urandom(frames.MEMBER_BYTES))
        link._sock.settimeout(SOON)
        flood = frames.request(frames.STATUS, 1) * 1000
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while not session.status().counters["clients_not_reading"]:
                link._sock.sendall(flood)
        link.close()
        serves_on(session)


# --- out of descriptors -----------------------------------------------------------------------


def test_a_client_out_of_descriptors_is_told_so_and_recovers(start_method: str) -> None:
    code = """
        import resource
        import whitepool_mp.client.threaded, whitepool_mp.client.future
        session = pool(2).run_service()
        session.run(pow, 1, 1)
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, used + 20))
        taken = []
        while True:
            try:
                taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        def attempt(what):
            try:
                return what()
            except BaseException as error:
                return [type(error).__name__, str(error)]
        errors = []
        shared = []
        def new_thread():  # there is a connection that no other uses
            shared.append(attempt(lambda: session.checkout(timeout=10).checkin()))
        thread = threading.Thread(target=new_thread)
        thread.start()
        thread.join()
        errors.append(attempt(lambda: session.submit(pow, 1, 1)))
        errors.append(attempt(lambda: Pool(1).run_service()))
        def second_worker():
            with session.checkout(timeout=10) as first, session.checkout(timeout=10) as second:
                return [first.call(pow, 2, 2), second.call(pow, 2, 3)]
        errors.append(attempt(second_worker))
        for fd in taken:
            os.close(fd)
        after = [attempt(lambda: session.run(pow, 2, 3, timeout=10)), attempt(second_worker)]
        after.append(attempt(lambda: session.submit(pow, 2, 4).result(10)))
        tell({"errors": errors, "after": after, "shared": shared})
        session.safe_shutdown(timeout=10)
    """
    with script(code, start_method) as client:
        told = client.hear(40)
        _, err = client.finish()
    assert told["shared"] == [None]
    for error in told["errors"]:
        assert "Too many open files" in error[1] or "no file descriptor is left" in error[1], told
    assert told["after"] == [8, [4, 8], 16]
    assert "Traceback" not in err


def test_starting_a_pool_with_too_few_descriptors_left_leaves_nothing(start_method: str) -> None:
    code = """
        import loky.backend.fork_exec, resource, whitepool_mp.client.member
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, before + 20))
        told = []
        for free in range(16):
            taken = []
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            for _ in range(free):
                os.close(taken.pop())
            try:
                session = pool(1).run_service()
                told.append("started")
                session.terminate()
            except (OSError, WhitepoolError) as error:
                told.append(str(error))
            for fd in taken:
                os.close(fd)
            assert len(os.listdir("/proc/self/fd")) == before, told
        tell(told)
    """
    with script(code, start_method) as client:
        told = client.hear()
        _, err = client.finish()
    assert told[-1] == "started"
    assert all("Too many open files" in said for said in told if said != "started"), told
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["run", "submit"])
def test_calls_with_too_few_descriptors_left_fail_alone_and_leak_none(
    start_method: str, how: str
) -> None:
    code = f"""
        import resource
        session = pool(1).run_service()
        def work(n):
            if {how!r} == "run":
                return session.run(pow, 2, n, timeout=10)
            return session.submit(pow, 2, n).result(10)
        work(1)
        session.run(pow, 1, 1)
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, before + 20))
        told = []
        for free in range(6):
            session.run(pow, 1, 1)
            pid = session.workers()[0].pid
            os.kill(pid, signal.SIGKILL)
            while not any(row.pid != pid and row.state == "idle" for row in session.workers()):
                pass
            taken = []
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            for _ in range(free):
                os.close(taken.pop())
            try:
                told.append(work(free))
            except OSError as error:
                told.append(error.errno)
            for fd in taken:
                os.close(fd)
            assert work(5) == 32
        assert len(os.listdir("/proc/self/fd")) <= before
        tell(told)
        session.safe_shutdown(timeout=10)
    """
    with script(code, start_method) as client:
        told = client.hear()
        _, err = client.finish()
    assert err == ""
    assert told[-1] == 32
    assert all(said in (errno.EMFILE, 2**n) for n, said in enumerate(told))


# --- Ctrl-C -----------------------------------------------------------------------------------

BLOCKED = {
    "in a call": "session.run(time.sleep, 1000)",
    "in a busy call": "session.run(spin)",
    "waiting for a worker": "session.checkout(timeout=None)",
    "waiting for a future": "session.submit(time.sleep, 1000).result()",
    "in a map": "list(session.map(time.sleep, [1000, 1000, 1000]))",
    "in a shutdown": "session.safe_shutdown()",
}


@pytest.mark.parametrize("where", BLOCKED)
def test_ctrl_c_interrupts_the_client_and_nobody_else(start_method: str, where: str) -> None:
    code = f"""
        def spin():
            while True:
                pass
        blocked = {where!r}
        with pool(2) as session:
            told = cast(session)
            stack = contextlib.ExitStack()
            if blocked in ("waiting for a worker", "in a shutdown"):
                leases = [stack.enter_context(session.checkout(timeout=10)) for _ in range(2)]
            def report():
                other = session.clone()
                while True:
                    status = other.status()
                    calls = sum(row.calls for row in other.workers() if row.state == "leased")
                    if blocked == "in a shutdown":
                        begun = status.draining
                    elif blocked == "waiting for a worker":
                        begun = status.waiting
                    else:
                        begun = calls
                    if begun:
                        break
                tell(told)
            threading.Thread(target=report).start()
            with stack:
                {BLOCKED[where]}
    """
    with script(code, start_method) as client:
        told = client.hear()
        began = time.monotonic()
        os.killpg(client.pid, signal.SIGINT)
        _, err = client.finish()
        assert elapsed(began) < 5
    assert err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    assert client.process.returncode == -signal.SIGINT
    all_gone(told)


def test_after_ctrl_c_the_pool_serves_on_and_the_worker_was_replaced(start_method: str) -> None:
    code = """
        session = pool(1).run_service()
        told = cast(session)
        before = session.run(os.getpid)
        def report():
            while not any(row.calls and row.state == "leased" for row in session.workers()):
                pass
            tell("blocked")
        threading.Thread(target=report).start()
        try:
            session.run(time.sleep, 1000)
        except KeyboardInterrupt:
            after = session.run(os.getpid, timeout=10)
            tell(after != before)
            session.safe_shutdown(timeout=10)
    """
    with script(code, start_method) as client:
        assert client.hear() == "blocked"
        os.killpg(client.pid, signal.SIGINT)
        assert client.hear() is True
        _, err = client.finish()
    assert err == ""


def test_terminating_in_a_thread_ends_a_blocked_checkout_there_and_then(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    leases = [session.checkout(timeout=SOON) for _ in range(2)]
    blocked = threads.submit(session.checkout, None)
    until(lambda: session.status().waiting == 1)
    ended = threading.Event()
    blocked.add_done_callback(lambda _: ended.set())
    session.terminate()
    assert ended.wait(SOON)
    assert isinstance(blocked.exception(), PoolClosed)
    for lease in leases:
        with pytest.raises((PoolClosed, WorkerDied)):
            lease.call(pow, 1, 1, timeout=SOON)
