"""The end of a pool whose process can import and start nothing any more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from anatomy import lives
from support import until
from user_script import all_gone, script

GONE = """
class Gone:  # the files of the environment are
    def find_spec(self, name, path=None, target=None):
        raise ModuleNotFoundError(f"{name} is gone")

def lose_files():
    from importlib.machinery import BuiltinImporter, FrozenImporter
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Gone()]  # those are in the interpreter
    sys.modules["psutil"] = None
"""

REPLACED = """
    import subprocess, psutil
    session = pool(1).run_service()
    told = cast(session)
    def spawn():
        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
    told["pids"].append(session.run(spawn))
    tell(told)
    sys.stdin.readline()
    threads = [thread for thread in threading.enumerate() if thread.name == "whitepool-owner"]
    while "whitepool_mp.client.threaded" not in sys.modules:
        time.sleep(0.01)  # it is imported in an idle moment
    lose_files()
    how = sys.stdin.readline().strip()
    if how == "Popen":
        subprocess.Popen = None
    else:
        session._member.owner._boot.interpreter[0] = "/nonexistent/python"
    os.kill(told["pids"][0], signal.SIGKILL)
    threads[0].join(20)
    said = []
    works = [lambda: session.run(abs, -1, timeout=5), lambda: session.submit(abs, -1).result(5)]
    for work in works:
        try:
            work()
        except Exception as error:
            said.append([type(error).__name__, str(error)])
    tell(said)
    session.terminate()
    session.terminate()
    session.safe_shutdown(timeout=5)
    tell("ended")
"""


@pytest.mark.parametrize("how", ["Popen", "executable"])
def test_a_pool_whose_environment_is_gone_ends_and_says_why(start_method: str, how: str) -> None:
    with script(REPLACED, start_method, GONE) as owner:
        told = owner.hear()
        owner.say()
        owner.say(how.encode())
        said = owner.hear()
        assert [name for name, _ in said] == ["ManagerDied", "ManagerDied"], said
        assert ("NoneType" if how == "Popen" else "No such file") in said[0][1]
        assert owner.hear() == "ended"
        _, err = owner.finish()
        assert "Traceback" not in err, err
        all_gone(told)


@pytest.mark.parametrize("end", ["terminate", "safe_shutdown", "exit", "collected"])
def test_a_pool_ends_in_order_though_nothing_can_be_imported(start_method: str, end: str) -> None:
    code = f"""
        session = pool(2).run_service()
        told = cast(session)
        session.submit(abs, -1).result(timeout=10)
        tell(told)
        lose_files()
        end = {end!r}
        if end == "terminate":
            session.terminate()
        elif end == "safe_shutdown":
            session.safe_shutdown(timeout=10)
        elif end == "collected":
            import warnings
            warnings.simplefilter("ignore")
            del session
        tell("ended")
    """
    with script(code, start_method, GONE) as owner:
        told = owner.hear()
        assert owner.hear() == "ended"
        _, err = owner.finish()
        assert owner.process.returncode == 0
        assert "Traceback" not in err, err
        all_gone(told)


LATE = """
import atexit, json, os, sys
def late():
    global session
    session = Pool(1, start_method=sys.argv[1]).run_service()
    pids = [session.run(os.getpid), session._member.owner.manager]
    os.write(1, json.dumps(pids).encode())
atexit.register(late)  # before the package registers its own: it is called after that
from whitepool_mp import Pool
"""


def test_a_pool_that_lives_when_the_interpreter_is_taken_down_ends(start_method: str) -> None:
    """It was made in an exit handler after the pool's own; no thread gets a turn then."""
    command = [sys.executable, "-c", LATE, start_method]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    pids = json.loads(run.stdout)
    until(lambda: not any(map(lives, pids)))


def test_what_is_left_is_found_without_psutil(start_method: str) -> None:
    """The owner finds it when no other manager can be started; nobody else looks."""
    code = """
        import subprocess
        session = pool(1).run_service()
        told = cast(session)
        def spawn():
            return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid
        told["pids"].append(session.run(spawn))
        sys.modules["psutil"] = None
        session._member.owner._boot.interpreter[:] = ["/bin/false"]
        tell(told)
        sys.stdin.readline()
        for pid in told["pids"][1:-1]:
            os.kill(pid, signal.SIGKILL)
        os.kill(told["pids"][0], signal.SIGKILL)
        session._member.owner.wait(20)
        tell([os.path.exists(f"/proc/{told['pids'][-1]}"), session._member.owner.lost])
    """
    with script(code, start_method) as owner:
        told = owner.hear()
        owner.say()
        _, lost = owner.hear()
        assert lost is True
        all_gone(told)
        owner.finish()
