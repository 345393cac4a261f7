"""The pool's folder: removed by others, left by those who were killed, odd umasks."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import shutil
import signal
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from anatomy import gone, kill, manager, nursery, workers
from support import NewPool, until
from user_script import all_gone, script

from whitepool_mp import Session
from whitepool_mp.wire.folder import sweep

JOINER = """
    session = given()
    tell(session.run(abs, -5))
    session.submit(abs, -6).result(timeout=10)
    tell("done")
"""


def remove(folder: str, what: str) -> None:
    """What a cleaner may do to a folder."""
    if what == "folder":
        shutil.rmtree(folder)
    elif what == "socket":
        os.unlink(os.path.join(folder, "manager"))
    else:
        os.rename(folder, f"{folder}-moved")


def in_a_new_thread(session: Session) -> int:
    """A call by a thread that has to join first."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: session.run(abs, -4, timeout=10)).result(timeout=20)


@pytest.mark.parametrize("what", ["folder", "socket", "moved"])
def test_a_folder_that_was_removed_changes_nothing(
    session: Session, start_method: str, what: str
) -> None:
    owner = session._member.owner
    assert owner is not None
    remove(owner.folder, what)
    try:
        assert in_a_new_thread(session) == 4
        assert session.submit(abs, -3).result(timeout=10) == 3
        with script(JOINER, start_method) as joiner:  # another process joins
            joiner.give(session)
            assert (joiner.hear(), joiner.hear()) == (5, "done")
            joiner.finish()
        before = manager(session)
        kill(before)
        gone(before)
        assert in_a_new_thread(session) == 4
        family = [manager(session), *workers(session, 2), nursery(session)]
        session.safe_shutdown(timeout=10)
        gone(*family)
    finally:
        if what == "moved":
            shutil.rmtree(f"{owner.folder}-moved")


def test_with_the_folder_removed_owner_and_manager_killed_leave_nothing(start_method: str) -> None:
    code = """
        import shutil, subprocess
        session = pool(2).run_service()
        told = cast(session)
        def spawn():
            return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
        told["pids"].append(session.run(spawn))
        shutil.rmtree(told["folder"])
        tell(told)
        sys.stdin.readline()
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        os.kill(owner.pid, signal.SIGKILL)
        os.kill(told["pids"][0], signal.SIGKILL)
        all_gone(told)


def test_a_session_of_an_ended_pool_names_the_folder_that_is_gone(
    new_pool: NewPool, start_method: str
) -> None:
    code = """
        session = given()
        try:
            session.run(abs, -5)
        except PoolClosed as error:
            tell(str(error))
    """
    with script(code, start_method) as joiner:
        with new_pool(1) as session:
            folder = os.path.dirname(session._member.path)
            pickled = base64.b64encode(pickle.dumps(session))
        joiner.say(pickled)
        said = joiner.hear()
        joiner.finish()
    assert "was shut down" in said and folder in said


def test_a_socket_that_cannot_be_reached_is_no_pool_that_was_shut_down(session: Session) -> None:
    owner = session._member.owner
    assert owner is not None
    shutil.rmtree(owner.folder)
    member = session._member
    held = member._address
    member._address = held._replace(held="/proc/self/fd/1000000")
    said = []

    try:
        session.submit(abs, -1)  # the first one in this process: it takes a connection of its own
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    finally:
        member._address = held
    assert len(said) == 1 and "shut down" not in said[0] and owner.folder in said[0], said
    assert "lives" in said[0] and "No such file" in said[0]


def pool_folders() -> set[str]:
    """The folders of all pools of this test run."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("whitepool-")}


STARTING = """
    tell(1)
    session = pool(2).run_service()
    session.run(abs, -1)
    time.sleep(1000)
"""


def test_an_owner_killed_at_any_moment_of_the_start_leaves_nothing(start_method: str) -> None:
    before = pool_folders()
    for moment in range(16):
        with script(STARTING, start_method) as owner:
            owner.hear()
            threading.Event().wait(moment * 0.002)  # where in the start it is killed
            os.kill(owner.pid, signal.SIGTERM if moment % 2 else signal.SIGKILL)
            owner.process.wait(10)

    def clean() -> bool:
        """no folder left"""
        return pool_folders() <= before

    until(clean)


def test_a_folder_whose_pool_was_killed_at_one_stroke_is_swept(
    start_method: str, new_pool: NewPool
) -> None:
    code = """
        session = pool(1).run_service()
        tell(cast(session))
        sys.stdin.readline()
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, none sees another's death
            for pid in (owner.pid, *told["pids"]):
                with contextlib.suppress(ProcessLookupError):  # it was there for a moment only
                    os.kill(pid, number)
        owner.process.wait(10)
    assert os.path.isdir(told["folder"])
    with new_pool(1) as session:
        session.run(abs, -1)
        all_gone(told)
        assert os.path.exists(session._member.path)


def test_nobody_sweeps_what_lives_or_is_no_pool_s(session: Session) -> None:
    base = tempfile.gettempdir()
    strange = os.path.join(base, "whitepool-notes")
    os.mkdir(strange)
    link = os.path.join(base, "whitepool-link")
    os.symlink(os.path.dirname(session._member.path), link)
    try:
        sweep(base)
        assert os.path.isdir(strange) and os.path.islink(link)
    finally:
        os.rmdir(strange)
        os.unlink(link)
    assert os.path.exists(session._member.path)
    assert in_a_new_thread(session) == 4


@pytest.mark.parametrize("umask", [0o777, 0o000, 0o277])
def test_only_this_user_may_enter_whatever_the_umask(start_method: str, umask: int) -> None:
    code = f"""
        os.umask({umask})
        os.environ.pop("TMPDIR", None)
        with pool(1) as session:
            folder = session._member.owner.folder
            modes = [os.stat(path).st_mode & 0o7777 for path in (folder, session._member.path)]
            tell([*modes, session.run(abs, -1)])
            names = []
            thread = threading.Thread(target=lambda: names.append(session.run(abs, -2)))
            thread.start()
            thread.join(20)
            tell(names)
        tell(os.path.exists(folder))
    """
    with script(code, start_method) as owner:
        assert owner.hear() == [0o700, 0o600, 1]
        assert owner.hear() == [2]
        assert owner.hear() is False
        owner.finish()
