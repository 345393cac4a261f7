"""What workers have from their owner: the first ones, those that replace others, and those of a
manager that took over."""

from __future__ import annotations

import contextlib
import enum
import logging
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import pytest
from anatomy import replace_manager, replace_worker, workers
from support import NewPool, processes
from user_script import ROOT, script

from whitepool_mp import Executor, Pool, Session
from whitepool_mp.cpus import usable_cpus

SOON = 20.0

Of = Callable[..., AbstractContextManager[Session]]


@pytest.fixture(params=["first", "replacement", "successor's"])
def of(request: pytest.FixtureRequest, new_pool: NewPool) -> Of:
    """Pools of one worker, which is the first, or another's replacement, or that under another
    manager. `change()` is called when the pool has started."""

    @contextlib.contextmanager
    def of(change: Callable[[], object] = lambda: None, **options: Any) -> Iterator[Session]:
        with new_pool(1, **options) as session:
            workers(session, 1)
            change()
            if request.param == "successor's":
                replace_manager(session)
            if request.param != "first":
                replace_worker(session)
            yield session

    return of


# --- multiprocessing ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared() -> Iterator[SyncManager]:
    """A server of multiprocessing's. It starts with the module's first test that wants it."""
    with multiprocessing.get_context("spawn").Manager() as running:
        yield running


def put(queue: Any, value: object) -> Any:
    queue.put(value)
    return queue


def test_a_proxy_of_a_manager_goes_there_and_comes_back(shared: SyncManager, of: Of) -> None:
    queue, table = shared.Queue(), shared.dict(a=1)
    with of() as session:
        session.run(put, queue, "job", timeout=SOON).put("back")
        assert session.run(lambda given: given["a"], table, timeout=SOON) == 1
        assert [queue.get(timeout=SOON) for _ in range(2)] == ["job", "back"]


def test_a_proxy_in_a_factory_and_in_an_initializer(shared: SyncManager, new_pool: NewPool) -> None:
    queue = shared.Queue()
    with new_pool(1, factory=lambda: put(queue, "factory")) as session:
        assert queue.get(timeout=SOON) == "factory"
        session.run(put, queue, "call", timeout=SOON)
    assert queue.get(timeout=SOON) == "call"
    with Executor(1, initializer=put, initargs=(queue, "initializer")) as executor:
        executor.submit(put, queue, "job").result(SOON)
    assert [queue.get(timeout=SOON) for _ in range(2)] == ["initializer", "job"]


def test_the_key_is_the_owners_when_the_pool_starts(
    of: Of, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = multiprocessing.current_process()
    before, key = bytes(me.authkey), b"a key of the user's own"
    me.authkey = key

    def change() -> None:
        me.authkey = b"another one, later"

    try:
        with of(change) as session:
            found = session.run(
                lambda: bytes(multiprocessing.current_process().authkey), timeout=SOON
            )
            shown = [
                text
                for process in processes()
                for text in (*process.cmdline(), *process.environ().values())
            ]
    finally:
        me.authkey = before
    assert found == key
    assert shown
    assert not [text for text in shown if key.decode() in text or key.hex() in text]


def test_a_manager_that_is_started_after_the_pool(start_method: str) -> None:
    """Nothing had imported multiprocessing then."""
    code = """
        with pool(1) as session:
            session.run(pow, 1, 1)
            import multiprocessing
            with multiprocessing.get_context("fork").Manager() as shared:
                queue = shared.Queue()
                session.run(lambda queue: queue.put("job"), queue)
                tell(queue.get(timeout=20))
    """
    quiet = "import warnings\nwarnings.simplefilter('ignore', DeprecationWarning)  # of fork()\n"
    with script(code, start_method, quiet) as running:
        assert running.hear() == "job"
        running.finish()


def who() -> tuple[str, str, int, bool, bool]:
    me, parent = multiprocessing.current_process(), multiprocessing.parent_process()
    assert parent is not None
    return me.name, parent.name, parent.pid or 0, parent.is_alive(), me.daemon


def test_a_worker_has_a_name_and_a_parent(of: Of) -> None:
    with of(name="käse") as session:
        found = session.run(who, timeout=SOON)
    owner = multiprocessing.current_process().name
    assert found == ("whitepool worker käse-0", owner, os.getpid(), True, False)


def test_multiprocessing_is_not_imported_for_that(new_pool: NewPool) -> None:
    def loader() -> tuple[bool, str, str]:
        before = "multiprocessing" in sys.modules
        import multiprocessing as late

        name = late.current_process().name
        assert late.__spec__ is not None
        return before, name.partition("-")[0], type(late.__spec__.loader).__module__

    with new_pool(1, name="light") as session:
        before, name, of_loader = session.run(loader, timeout=SOON)
    assert (before, name) == (False, "whitepool worker light")
    assert of_loader == type(multiprocessing.__spec__.loader).__module__


def nested() -> tuple[int, int, str]:
    """What the child of a worker says: its parent's pid, its own pid, its parent's name."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        name, parent_name, parent, _, _ = executor.submit(who).result(SOON)
        assert name != parent_name
        return parent, os.getpid(), parent_name


def test_a_worker_may_have_children_of_multiprocessing(new_pool: NewPool) -> None:
    with new_pool(1, name="nest") as session:
        parent, worker, name = session.run(nested, timeout=60)
    assert (parent, name) == (worker, "whitepool worker nest-0")


def test_a_preloaded_module_sees_that_it_is_not_the_main_process(tmp_path: Path) -> None:
    (tmp_path / "preloaded_family.py").write_text(
        "import multiprocessing\nparent = multiprocessing.parent_process()\n"
    )
    code = f"""
        sys.path.insert(0, {str(tmp_path)!r})
        with pool(1, preload=["preloaded_family"]) as session:
            def look():
                import multiprocessing, preloaded_family
                return preloaded_family.parent.pid, multiprocessing.current_process().name
            tell([os.getpid(), *session.run(look)])
    """
    with script(code, "forkserver") as running:
        owner, parent, name = running.hear()
        running.finish()
    assert (parent, name) == (owner, "whitepool worker script-0")


def test_the_start_method_and_the_log_of_multiprocessing(start_method: str) -> None:
    code = """
        import logging, multiprocessing
        multiprocessing.set_start_method("spawn")
        multiprocessing.log_to_stderr(logging.INFO)
        def look():
            import multiprocessing
            multiprocessing.get_logger().info("a word of a worker")
            return multiprocessing.get_start_method(), multiprocessing.get_logger().level
        with pool(1) as session:
            tell(session.run(look))
    """
    with script(code, start_method) as running:
        assert running.hear() == ["spawn", logging.INFO]
        _, err = running.finish()
    assert "a word of a worker" in err


# --- limits ---------------------------------------------------------------------------------------


def files_opened(count: int) -> tuple[int, int]:
    held: list[int] = []
    try:
        for _ in range(count):
            held.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for fd in held:
            os.close(fd)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(held)


@pytest.mark.parametrize("limit", [1500, 333])
def test_the_soft_limit_of_open_files_is_the_owners(of: Of, limit: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def change() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with of(change) as session:
            found = session.run(files_opened, limit - 100, timeout=SOON)
    finally:
        change()
    assert found == (limit, limit - 100)


def test_a_limit_that_the_owner_lowered_for_good_meanwhile(start_method: str) -> None:
    """The soft limit of the start is no longer allowed when another manager is started."""
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, 800))
        with pool(1) as session:
            session.run(pow, 1, 1)
            resource.setrlimit(resource.RLIMIT_NOFILE, (600, 600))
            owner = session._member.owner
            old = owner.manager
            os.kill(old, signal.SIGKILL)
            while owner.manager == old:
                time.sleep(0.01)
            pid = session.run(os.getpid)
            os.kill(pid, signal.SIGKILL)
            while [row.pid for row in session.workers()] in ([pid], [], [None]):
                time.sleep(0.01)
            tell(session.run(resource.getrlimit, resource.RLIMIT_NOFILE))
    """
    with script(code, start_method) as running:
        assert running.hear() == [600, 600]
        running.finish()


def test_what_the_kernel_hands_down(start_method: str) -> None:
    code = """
        def look():
            mask = os.umask(0)
            os.umask(mask)
            return mask, os.nice(0), os.getcwd(), sorted(os.sched_getaffinity(0))
        os.umask(0o057), os.nice(3), os.chdir("/usr")
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        with pool(1) as session:
            tell([session.run(look), look()])
    """
    with script(code, start_method) as running:
        there, here = running.hear()
        running.finish()
    assert there == here


# --- paths and texts ------------------------------------------------------------------------------


class Text(str):
    """A text that says something else when it is asked."""

    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class Setting(str, enum.Enum):
    """As before there was `StrEnum`: `str()` gives the member's name."""

    HOME = "x"


def texts() -> tuple[list[str], list[str], dict[str, str]]:
    assert all(type(entry) is str for entry in (*sys.path, *sys.argv))
    return sys.path, sys.argv, dict(os.environ)


def test_texts_of_any_kind(of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    odd: list[Any] = [pathlib.Path("/p"), Text("/t"), b"/b\xff", "/s\udcfe", Setting.HOME]
    monkeypatch.setattr(sys, "path", [*sys.path, "", *odd, None])
    monkeypatch.setattr(sys, "argv", [*odd, 7, "", "\ud800"])
    env: Any = {Text("A"): Setting.HOME, "B": pathlib.Path("/p"), "C": Text("t"), "D": "\udcfe"}
    with of(name=Setting.HOME, preload=[Text("json")], strategy=Text("fifo"), env=env) as session:
        path, argv, found = session.run(texts, timeout=SOON)
    exact = ["/p", "/t", "/b\udcff", "/s\udcfe", "x"]
    assert path[-6:] == [os.getcwd(), *exact]
    assert argv == [*exact, "7", "", "\ud800"]
    assert [found[name] for name in "ABCD"] == ["x", "/p", "t", "\udcfe"]


def test_very_long_lists(new_pool: NewPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x" * 1000] * 5000)
    monkeypatch.setattr(sys, "path", [*sys.path, *(f"/nowhere/{n}" for n in range(2000))])
    with new_pool(1) as session:
        path, argv, _ = session.run(texts, timeout=SOON)
    assert (path, argv) == (sys.path, sys.argv)


def test_an_owner_without_arguments(new_pool: NewPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys, "argv")
    with new_pool(1) as session:
        assert session.run(texts, timeout=SOON)[1] == [""]


# --- what is read at the start of an interpreter --------------------------------------------------


def test_variables_that_are_read_at_the_start_have_effect(of: Of, tmp_path: Path) -> None:
    (tmp_path / "only_by_pythonpath.py").write_text("answer = 42\n")

    def look() -> list[Any]:
        import importlib

        module = importlib.import_module("only_by_pythonpath")
        return [
            module.answer,
            os.environ["PYTHONPATH"],
            hash("a text"),
            sys.flags.optimize,
            "error::ImportWarning" in sys.warnoptions,
            time.tzname[0],
            sys.getfilesystemencoding(),
            sys.dont_write_bytecode,
        ]

    env = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONHASHSEED": "7",
        "PYTHONOPTIMIZE": "2",
        "PYTHONWARNINGS": "error::ImportWarning",
        "TZ": "XYZ-3",
        "PYTHONUTF8": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    seed = subprocess.run(
        [sys.executable, "-c", "print(hash('a text'))"],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
    )
    expected = [42, str(tmp_path), int(seed.stdout), 2, True, "XYZ", "utf-8", True]
    with of(env=env) as session:
        assert session.run(look, timeout=SOON) == expected


def test_a_library_for_the_loader(new_pool: NewPool) -> None:
    def loaded() -> bool:
        with open("/proc/self/maps") as file:
            return "libBrokenLocale" in file.read()

    assert not loaded()
    with new_pool(1, env={"LD_PRELOAD": "libBrokenLocale.so.1"}) as session:
        assert session.run(loaded, timeout=SOON)


def test_the_environment_is_that_of_the_start(of: Of, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WP_TEST_VALUE", "at the start")
    with of(lambda: monkeypatch.setenv("WP_TEST_VALUE", "later")) as session:
        assert session.run(os.getenv, "WP_TEST_VALUE", timeout=SOON) == "at the start"


def test_the_pools_own_variables_are_the_pools(of: Of) -> None:
    """A nested pool would be refused, or taken for another's."""
    own = "WHITEPOOL_POOL", "WHITEPOOL_STARTING"
    with of(env={own[0]: "x", own[1]: "x"}) as session:
        pool, starting = session.run(lambda: [os.getenv(name) for name in own], timeout=SOON)
        assert (pool, starting) == (session._member.pool_id, None)


def test_the_options_of_the_interpreter(start_method: str, tmp_path: Path) -> None:
    say = "(sys._xoptions, sys.warnoptions, tuple(sys.flags))"
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            from whitepool_mp import Pool
            with Pool(1, start_method=sys.argv[1]) as session:
                print(session.run(lambda: {say}) == {say})
            """
        )
    )
    options = ["-X", "dev", "-X", "no_debug_ranges", "-X", "mine=1", "-W", "ignore::ImportWarning"]
    done = subprocess.run(
        [sys.executable, "-B", *options, str(tmp_path / "user.py"), start_method],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.stdout.strip(), done.stderr) == ("True", "")


# --- native threads -------------------------------------------------------------------------------


def test_native_threads_share_what_the_default_of_pool_size_counts(start_method: str) -> None:
    code = """
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        os.environ.pop("OMP_NUM_THREADS", None)
        with Pool(start_method=sys.argv[1]) as session:
            tell([session.status().pool_size, session.run(os.getenv, "OMP_NUM_THREADS")])
    """
    with script(code, start_method) as running:
        assert running.hear() == [1, "1"]
        running.finish()


def test_a_limit_by_the_environment_counts_for_both(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with Pool(start_method=start_method) as session:
        assert session.status().pool_size == 1 == usable_cpus()
        assert session.run(os.getenv, "OMP_NUM_THREADS", timeout=SOON) == "1"
