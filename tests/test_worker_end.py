"""How workers end, what they leave behind, and what is preloaded into them."""

from __future__ import annotations

import contextlib
import os
import textwrap
from pathlib import Path

import deeds
import psutil
import pytest
from anatomy import kill, lives, manager, nursery, workers
from support import until
from user_script import script

from whitepool_mp import FactoryFailed, Pool, Session

T = 20.0
"""Seconds after which something hangs."""


# --- orphans ----------------------------------------------------------------------------------


def zombies(*roots: psutil.Process) -> list[psutil.Process]:
    """The dead descendants of processes that nobody has reaped."""
    found = []
    for root in roots:
        for child in root.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


def test_orphans_are_reaped(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        pid = session.run(deeds.leave_background, 100, timeout=T)
        until(lambda: not zombies(manager(session)))
        assert psutil.Process(pid).children() == []
        assert session.run(os.getpid, timeout=T) == pid


def test_children_of_a_job_keep_their_exit_status(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        for _ in range(3):
            assert session.run(deeds.exit_codes, timeout=T) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("deed", [deeds.leave_exec_daemon, deeds.leave_forked_daemon])
def test_a_daemon_ends_with_its_worker_and_no_other(
    start_method: str, deed: object, tmp_path: Path
) -> None:
    """It has its own session, and another parent; the first one no variable of the pool's."""
    paths = [str(tmp_path / str(number)) for number in range(2)]
    with Pool(2, start_method=start_method) as session:
        with session.checkout(T) as lease, session.checkout(T) as other:
            for each, path in ((lease, paths[0]), (other, paths[1])):
                each.call(deed, path, timeout=T)
            (left,), (others,) = map(deeds.noted, paths)
            lease.destroy()
            until(lambda: not psutil.pid_exists(left))
            assert other.call(os.getpid, timeout=T) == other.pid
            assert lives(others)
        assert lives(others)
    until(lambda: not psutil.pid_exists(others))


def test_a_daemon_outlives_a_sibling_of_its_worker_also_when_the_manager_was_killed(
    start_method: str, tmp_path: Path
) -> None:
    paths = [str(tmp_path / str(number)) for number in range(3)]
    with Pool(2, start_method=start_method) as session:
        with session.checkout(T) as lease, session.checkout(T) as other:
            lease.call(deeds.leave_forked_daemon, paths[0], timeout=T)
            other.call(deeds.leave_forked_daemon, paths[1], timeout=T)
            kill(manager(session))
            other.call(deeds.leave_forked_daemon, paths[2], timeout=T)
            (left,), *others = map(deeds.noted, paths)
            lease.destroy()
            until(lambda: not lives(left))
            assert all(lives(pid) for (pid,) in others)
            other.destroy()
            until(lambda: not any(lives(pid) for (pid,) in others))


def test_a_pool_in_a_worker_outlives_the_death_of_its_manager_and_a_sibling(
    start_method: str,
) -> None:
    """Its workers become the outer manager's children; they descend from a living worker."""
    with Pool(2, start_method=start_method) as session:
        with session.checkout(T) as lease, session.checkout(T) as other:
            before = lease.call(deeds.begin_pool, start_method, timeout=T)
            other.destroy()
            workers(session, 2)
            assert lease.call(deeds.pids_of_pool, timeout=T) == before
            assert (
                lease.call(deeds.end_pool, timeout=T) == 3
            )  # its own child's, which nobody reaped


def test_an_owner_that_adopts_reaps_what_a_killed_manager_left(start_method: str) -> None:
    """As process 1 of a container does; and it reaps nothing that is the user's."""
    code = """
        import ctypes, subprocess, psutil, deeds
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        own = subprocess.Popen(["sh", "-c", "exit 3"])
        os.waitid(os.P_PID, own.pid, os.WEXITED | os.WNOWAIT)
        with pool(2) as session:
            cast(session)
            before = {row.pid for row in session.workers()}
            with session.checkout() as lease:
                os.kill(session._member.owner.manager, signal.SIGKILL)
                lease.call(deeds.leave_background, 20)
            def settled():
                # The workers that were taken over are replaced, and nothing dead is left.
                for _ in range(4):
                    with session.checkout(), session.checkout():
                        pass
                left = [each.pid for each in psutil.Process().children(recursive=True)
                        if each.status() == psutil.STATUS_ZOMBIE]
                return left == [own.pid] and not before & {row.pid for row in session.workers()}
            while True:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if settled():
                        break
        left = [each.pid for each in psutil.Process().children()]
        tell([left == [own.pid], own.wait()])
    """
    with script(code, start_method, f"sys.path.insert(0, {os.path.dirname(__file__)!r})") as owner:
        assert owner.hear(60.0) == [True, 3]
        assert owner.process.wait(T) == 0


# --- an orderly end ---------------------------------------------------------------------------


def read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("end", ["shutdown", "retire"])
@pytest.mark.parametrize(
    "deed",
    [
        deeds.finish_in_thread,
        deeds.finish_in_executor,
        deeds.finish_in_processes,
        deeds.finish_at_exit,
    ],
)
def test_what_a_job_left_running_comes_to_its_end(
    start_method: str, deed: object, end: str, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    expected = ["text"] * (2 if deed is deeds.finish_in_executor else 1)
    with Pool(1, 1, overflow_ttl=0, start_method=start_method) as session:
        if end == "shutdown":
            session.run(deed, path, "text", timeout=T)
        else:
            with session.checkout(T):
                with session.checkout(T) as lease:
                    lease.call(deed, path, "text", timeout=T)
                until(lambda: read(path) == expected)
    assert read(path) == expected


def test_an_end_has_the_order_of_an_interpreters(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "out"

    def factory() -> Path:
        deeds.finish_at_exit(path, "atexit")
        return path

    with Pool(
        1, factory=factory, teardown=deeds.teardown_with_thread, start_method=start_method
    ) as session:
        session.run(abs, 1, timeout=T)
    assert read(path) == ["teardown", "its thread", "atexit"]


def test_what_is_printed_at_the_end_is_seen(
    start_method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Pool(1, start_method=start_method) as session:
        session.run(deeds.print_at_exit, "no end of line", timeout=T)
    assert capfd.readouterr().out == "no end of line"


def test_an_end_that_hangs_is_cut_short_and_counted(start_method: str, tmp_path: Path) -> None:
    with Pool(1, 1, overflow_ttl=0, start_method=start_method, stop_timeout=0.2) as session:
        with session.checkout(T), session.checkout(T) as lease:
            pid = lease.call(deeds.hang_at_exit, None, timeout=T)
        until(lambda: session.status().counters["stop_overruns"] == 1)
        until(lambda: not psutil.pid_exists(pid))


def test_what_a_fresh_interpreter_registers_for_its_end_is_run(tmp_path: Path) -> None:
    """As tools do that measure or trace: in sitecustomize or a .pth file."""
    out = tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\n"
        f"atexit.register(lambda: open({str(out)!r}, 'a').write(f'{{os.getpid()}}\\n'))\n"
    )
    code = """
        with pool(1) as session:
            tell(session.run(os.getpid))
    """
    before = f"os.environ['PYTHONPATH'] = {str(tmp_path)!r} + ':' + os.environ['PYTHONPATH']"
    with script(code, "loky", before) as owner:
        pid = owner.hear()
        assert owner.process.wait(T) == 0
    assert read(out).count(str(pid)) == 1


# --- what is preloaded ------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module `preloaded`, which is to be written."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "preloaded.py"


def write(module: Path, code: str) -> None:
    module.write_text(
        "import atexit, os, signal, threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n" + textwrap.dedent(code)
    )


THREADS = {
    "daemon": "threading.Thread(target=signal.pause, name='Pump', daemon=True).start()",
    "no daemon": "threading.Thread(target=signal.pause, name='Pump').start()",
    "executor": """
        executor = ThreadPoolExecutor(1, thread_name_prefix='Pump')
        executor.submit(abs, 1).result()
    """,
    "not Python's": """
        import ctypes
        thread, pause = ctypes.c_ulong(), ctypes.CDLL(None).pause
        create = ctypes.CDLL(None).pthread_create
        assert not create(ctypes.byref(thread), None, pause, None)
    """,
}


@pytest.mark.parametrize("code", THREADS.values(), ids=THREADS)
def test_a_preloaded_module_that_leaves_threads_is_refused_by_name(module: Path, code: str) -> None:
    write(module, code)
    native = "ctypes" in code
    with Pool(1, preload=("json", "preloaded"), stop_timeout=T) as session:
        with pytest.raises(FactoryFailed, match="preload of 'preloaded' left threads") as caught:
            session.run(abs, 1, timeout=T)
        assert ("1 that Python did not start" if native else "'Pump") in str(caught.value)
        assert "start_method='loky'" in str(caught.value)


def test_a_preloaded_module_whose_threads_have_ended_is_fine(module: Path) -> None:
    write(
        module,
        """
        for _ in range(20):
            thread = threading.Thread(target=abs, args=(1,))
            thread.start()
            thread.join()
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(abs, range(20)))
        """,
    )
    with Pool(1, preload=("preloaded",)) as session:
        assert session.run(abs, -1, timeout=T) == 1


def test_a_preloaded_library_that_ends_its_threads_for_a_fork_is_fine(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's does."""
    write(module, "import numpy\nsquare = numpy.ones((400, 400))\nsquare @ square\n")
    env = {"OPENBLAS_NUM_THREADS": "4"}
    with Pool(2, preload=("preloaded", "json"), env=env) as session:
        for _ in range(4):
            assert session.run(deeds.multiply, 400, timeout=T) == 400**3


def test_a_preloaded_module_may_have_child_processes(module: Path) -> None:
    """That of `multiprocessing` which looks after what is shared, and one of its own."""
    write(
        module,
        """
        import multiprocessing, subprocess
        from multiprocessing import resource_tracker
        resource_tracker.ensure_running()
        LOCK = multiprocessing.get_context("fork").Lock()
        child = subprocess.Popen(["sleep", "1000"])
        """,
    )
    with Pool(2, preload=("preloaded",)) as session:
        workers(session, 2)
        children = nursery_children(session)
        assert len(children) == 2
        assert session.run(deeds.hold, "preloaded", "LOCK", timeout=T) is True
        kill(workers(session, 2)[0])
        workers(session, 2)
        assert all(child.is_running() for child in children)
    until(lambda: not any(child.is_running() for child in children))


def nursery_children(session: Session) -> list[psutil.Process]:
    return nursery(session).children()


def test_what_a_preloaded_module_shares_outlives_a_workers_end(
    module: Path, tmp_path: Path
) -> None:
    """A worker's end sees to its own children, and to no other worker's folder or helper."""
    write(
        module,
        """
        import logging, multiprocessing, tempfile
        from multiprocessing import resource_tracker
        FOLDER = tempfile.TemporaryDirectory()
        HELPER = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
        HELPER.start()
        atexit.register(os.rmdir, FOLDER.name)
        def shared(): return FOLDER.name, HELPER.pid
        """,
    )
    path = tmp_path / "out"
    with Pool(1, 1, overflow_ttl=0, preload=("preloaded",)) as session:
        with session.checkout(T) as lease, session.checkout(T) as other:
            folder, helper = lease.call(deeds.call_by_name, "preloaded", "shared", timeout=T)
            other.call(deeds.finish_in_processes, path, "text", timeout=T)
            ended = other.pid
            other.checkin()
            until(lambda: not psutil.pid_exists(ended))
            assert read(path) == ["text"]
            assert lives(helper)
            assert Path(folder).is_dir()
    until(lambda: not psutil.pid_exists(helper))
    Path(folder).rmdir()
