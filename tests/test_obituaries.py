"""What is told of a worker's death: its calls, memory and last words, and who killed it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deeds
import pytest
from anatomy import workers
from support import until

import whitepool_mp
from whitepool_mp import FactoryFailed, Pool, Session, WorkerDied
from whitepool_mp.manager.obituary import Obituary, OomKills, signal_name
from whitepool_mp.manager.relay import KEPT, last_lines
from whitepool_mp.wire import kit as kits

T = 20
MIB = 1 << 20
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        (os.path.dirname(os.path.dirname(whitepool_mp.__file__)), os.path.dirname(__file__))
    ),
}
"""With which a script finds this package, and the tests' modules."""


@pytest.fixture
def one(start_method: str) -> Iterator[Session]:
    """A pool of one worker."""
    with Pool(1, start_method=start_method, name="one") as session:
        yield session


def die(session: Session, fn: Any, *args: Any) -> WorkerDied:
    """Run what kills its worker."""
    with pytest.raises(WorkerDied) as caught:
        session.run(fn, *args, timeout=T)
    return caught.value


# --- calls and memory -----------------------------------------------------------------------------


def test_an_obituary_tells_calls_age_and_memory(one: Session) -> None:
    for _ in range(4):
        assert one.run(abs, -1, timeout=T) == 1
    error = die(one, deeds.leave)
    assert (error.exitcode, error.signal, error.calls, error.started) == (3, None, 5, True)
    assert error.running is not None and "leave" in error.running
    assert error.age is not None and 0 < error.age < T
    assert error.rss is not None and error.peak_rss is not None
    assert MIB < error.rss <= error.peak_rss + MIB < 1000 * MIB
    assert (error.oom_killed, error.stderr, error.stack, error.reason) == (None, None, None, None)
    assert re.match(
        r"worker 0 of pool 'one' \(pid \d+\) exited with code 3 after \S+ m?s and 5 calls while "
        r"running \S*leave; memory \d+ MiB, peak \d+ MiB$",
        str(error),
    )


def test_a_lease_tells_the_same(one: Session) -> None:
    with one.checkout(T) as lease:
        lease.call(abs, -1, timeout=T)
        with pytest.raises(WorkerDied) as caught:
            lease.call(deeds.complain, "of a lease", 9, timeout=T)
    assert (caught.value.calls, caught.value.exitcode) == (2, 9)
    assert caught.value.stderr == "of a lease"
    assert caught.value.rss is not None


def test_a_submitted_call_tells_the_same(one: Session) -> None:
    error = one.submit(deeds.complain, "of a future", 9).exception(T)
    assert isinstance(error, WorkerDied)
    assert (error.calls, error.exitcode, error.stderr) == (1, 9, "of a future")
    assert error.rss is not None


@pytest.mark.parametrize("how", ["run", "map", "get", "raises", "large"])
def test_memory_is_that_after_the_last_long_call(start_method: str, how: str) -> None:
    with Pool(1, factory=deeds.Hoard, start_method=start_method) as session:
        with session.checkout(T) as lease:
            if how == "get":
                lease.get().take(100 * MIB)
            elif how == "run":
                lease.call(deeds.Hoard.take, 100 * MIB, timeout=T)
            elif how == "raises":
                with pytest.raises(deeds.Plain):
                    lease.call(deeds.Hoard.take_and_raise, 100 * MIB, timeout=T)
            elif how == "large":
                lease.call(deeds.Hoard.take_and_return, 100 * MIB, timeout=T)
        if how == "map":
            taken = session.map(deeds.Hoard.take, [100 * MIB], with_resource=True, timeout=T)
            assert list(taken) == [100 * MIB]
        error = die(session, deeds.leave)
    assert error.rss is not None and error.peak_rss is not None
    assert 100 * MIB < error.rss <= error.peak_rss + MIB < 1000 * MIB


def test_a_short_call_does_not_look_at_memory() -> None:
    """It would cost a system call each time; the obituary says so."""
    with Pool(1) as session:
        with session.checkout(T) as lease:
            pid = lease.pid
            lease.call(deeds.short, timeout=T)  # what it imports is not counted
            before = deeds.reads(pid)
            for _ in range(100):
                lease.call(deeds.short, timeout=T)
            reads = deeds.reads(pid) - before
    # One receive and one answer for each call, and no look at the memory.
    assert reads < 50, reads


def test_the_memory_of_a_worker_that_closed_all_files_is_the_last_known(one: Session) -> None:
    error = die(one, deeds.close_everything)
    assert error.rss is not None and error.rss > MIB


# --- exit codes and signals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "exitcode", "text"),
    [
        (deeds.leave, 3, "exited with code 3"),
        (deeds.abort, -signal.SIGABRT, "died from SIGABRT"),
        (deeds.segfault, -signal.SIGSEGV, "died from SIGSEGV"),
        (deeds.kill_self, -signal.SIGKILL, "died from SIGKILL"),
        (deeds.libc_exit, 0, "exited with code 0"),
    ],
)
def test_how_it_ended_is_told_by_name(one: Session, deed: Any, exitcode: int, text: str) -> None:
    error = die(one, deed)
    assert error.exitcode == exitcode
    assert text in str(error).splitlines()[0]


@pytest.mark.parametrize(
    ("number", "name"),
    [(9, "SIGKILL"), (11, "SIGSEGV"), (40, "signal 40"), (34, "signal 34"), (6, "SIGABRT")],
)
def test_a_signal_is_named_without_the_enum(number: int, name: str) -> None:
    assert signal_name(number) in (name, "SIGIOT" if number == 6 else name)


def test_a_start_that_fails_tells_what_the_worker_said(start_method: str, capfd: Any) -> None:
    factory = deeds.Complains("no licence", 7)
    with Pool(1, factory=factory, start_method=start_method) as session:
        with pytest.raises(FactoryFailed) as caught:
            session.checkout(T)
    assert "exit code 7 before its factory returned" in caught.value.remote_traceback
    assert "no licence" in caught.value.remote_traceback
    assert "no licence\n" in capfd.readouterr().err


def test_a_start_that_is_killed_tells_the_signal_by_name() -> None:
    told = Obituary(1, 0, -11, 1.0, None, 0, None, None)
    assert "ended with SIGSEGV before" in told.describe()
    killed = Obituary(1, 0, -9, 1.0, None, 0, None, None, oom_killed=True)
    assert "SIGKILL (the kernel's out-of-memory killer" in killed.describe()


# --- last words -----------------------------------------------------------------------------------


def test_what_the_c_library_says_is_told_and_shown(start_method: str, capfd: Any) -> None:
    with Pool(1, start_method=start_method) as session:
        error = die(session, deeds.free_what_is_not_allocated)
    assert error.signal == "SIGABRT"
    assert error.stderr == "free(): invalid pointer"
    assert "free_what_is_not_allocated" in (error.stack or "")
    assert str(error).endswith("\nits last line on standard error: free(): invalid pointer")
    assert capfd.readouterr().err == "free(): invalid pointer\n"


def test_only_the_last_lines_are_told_and_all_are_shown(start_method: str, capfd: Any) -> None:
    said = [f"line {number}" for number in range(1000)]
    with Pool(1, start_method=start_method) as session:
        error = die(session, deeds.complain, "\n".join(said), 1)
    assert error.stderr == "\n".join(said[-20:])
    assert capfd.readouterr().err.splitlines() == said


def test_long_lines_are_cut_to_four_kibibytes(start_method: str, capfd: Any) -> None:
    said = "\n".join([*("x" * 1000 for _ in range(10)), "y" * 1000])
    with Pool(1, start_method=start_method) as session:
        error = die(session, deeds.complain, said, 1)
        endless = die(session, deeds.complain, "z" * 100_000, 1)
    assert error.stderr is not None
    assert len(error.stderr) <= 4096
    assert error.stderr.splitlines() == ["x" * 1000] * 3 + ["y" * 1000]
    assert endless.stderr == "z" * (KEPT - 1)
    assert len(capfd.readouterr().err) == len(said) + 1 + 100_001


def test_a_worker_that_said_nothing_has_no_last_words(one: Session) -> None:
    error = die(one, deeds.leave)
    assert error.stderr is None
    assert "standard error" not in str(error)


def test_the_words_of_a_child_are_told(one: Session) -> None:
    error = die(one, deeds.child_complains)
    assert error.stderr == "a child speaks"


def test_what_python_says_at_a_fatal_error_is_told(one: Session) -> None:
    error = die(one, deeds.ask_to_exit_badly)
    assert error.stderr is not None and "in a teardown of sorts" in error.stderr


@pytest.mark.parametrize("how", ["crash", "exception", "stacks"])
def test_the_code_of_a_script_is_told_by_its_own_file_and_line(
    start_method: str, how: str, tmp_path: Path
) -> None:
    """It travels by value, and keeps the name of its file."""
    script = tmp_path / "of_a_user.py"
    script.write_text(
        textwrap.dedent(
            f"""\
            import sys, time
            import deeds
            from whitepool_mp import Pool
            def crash():
                deeds.segfault()
            def exception():
                [1 / number for number in (1, 0)]
            def stacks():
                time.sleep(1000)
            class Mine:
                def method(self):
                    return (lambda: {how}())()
            if __name__ == "__main__":
                with Pool(1, start_method={start_method!r}) as session:
                    future = session.submit(Mine().method)
                    if {how!r} == "stacks":
                        while "in stacks" not in (text := session.stacks()[0].stack):
                            pass
                    elif {how!r} == "crash":
                        text = future.exception({T}).stack
                    else:
                        text = str(future.exception({T}).__cause__)
                    sys.stdout.write(text)
                    session.terminate()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=ENV
    )
    assert done.returncode == 0, done
    own = re.findall(rf'File "{re.escape(str(script))}", line (\d+),? in (\S+)', done.stdout)
    line = {"crash": "5", "exception": "7", "stacks": "9"}[how]
    # The interpreter may show a comprehension as a frame of its own.
    assert {(line, how), ("12", "<lambda>"), ("12", "method")} <= set(own), done.stdout
    assert "dynamic" not in done.stdout
    if how == "exception":
        assert "    [1 / number for number in (1, 0)]\n" in done.stdout


def test_whoever_keeps_the_pipe_open_holds_nothing_up(one: Session, tmp_path: Path) -> None:
    """A process that left its worker, and keeps every descriptor of it."""
    path = str(tmp_path / "stray")
    assert one.run(deeds.linger, path, "detach", timeout=T)
    until(lambda: deeds.noted(path))
    error = die(one, deeds.complain, "a word", 1)
    assert error.stderr == "a word"
    assert one.run(abs, -1, timeout=T) == 1


def test_a_worker_may_close_its_standard_error(one: Session) -> None:
    assert one.run(deeds.close_stderr, timeout=T) == "closed"
    assert one.run(abs, -1, timeout=T) == 1
    error = die(one, deeds.leave)
    assert error.stderr is None


def test_words_that_are_no_text_are_told_as_far_as_they_are(one: Session) -> None:
    error = die(one, deeds.complain_in_bytes, b"caf\xe9 \xff\n")
    assert error.stderr == "caf\ufffd \ufffd"
    assert json.dumps(error.stderr)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"", None),
        (b"\n", ""),
        (b"a", "a"),
        (b"a\nb\n", "a\nb"),
        (b"\n".join(b"%d" % n for n in range(30)), "\n".join(map(str, range(10, 30)))),
        (b"x" * 10 + b"\n" + b"y" * (KEPT - 11), "y" * (KEPT - 11)),
    ],
)
def test_last_lines(said: bytes, told: str | None) -> None:
    assert last_lines(said) == told


def test_a_worker_is_started_without_pipes_when_no_descriptor_is_left_for_them() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for free in range(8):
            kit = None
            try:
                kit = kits.Kit()
            except OSError:
                assert free < 3  # the page, and the socket pair
            else:
                assert (kit.stderr is not None) == (kit.stacks is not None) == (free >= 7)
                assert len(kits.unpack(kit.order())) == 4
            finally:
                if kit is not None:
                    kit.close()
            os.close(taken.pop())
        assert len(os.listdir("/proc/self/fd")) < 256
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-", "0<&-"])
def test_an_owner_without_standard_streams_has_a_pool_that_works(
    start_method: str, closed: str, tmp_path: Path
) -> None:
    """What workers print goes nowhere then, and not to what has got these numbers."""
    script, told = tmp_path / "closed.py", tmp_path / "told"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            import deeds
            from whitepool_mp import Pool, WorkerDied
            file = open({str(told)!r}, "w")
            with file, Pool(2, start_method={start_method!r}) as session:
                file.write(f"{{session.run(pow, 2, 10)}}\\n")
                for fd in range(3):
                    file.write(f"{{session.run(deeds.named_file, fd)}}\\n")
                session.run(os.write, 1, b"x" * 1000)
                try:
                    session.run(deeds.complain_in_bytes, b"a word\\n")
                except WorkerDied as error:
                    file.write(f"{{error.exitcode}} {{error.stderr}}\\n")
                file.write(f"{{session.run(pow, 2, 11)}}\\n")
            """
        )
    )
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} {script} {closed}"],
        capture_output=True,
        timeout=60,
        check=False,
        env=ENV,
    )
    assert done.returncode == 0, done
    first, stdin, stdout, stderr, death, last = told.read_text().splitlines()
    assert (first, death, last) == ("1024", "1 a word", "2048")
    assert stdin == "/dev/null"
    assert stdout == "/dev/null" if "1>" in closed else stdout.startswith("pipe:")
    assert stderr.startswith("pipe:")
    assert done.stdout == (b"" if "1>" in closed else b"x" * 1000)
    assert done.stderr == (b"" if "2>" in closed else b"a word\n")


# --- the kernel's killer --------------------------------------------------------------------------


def test_a_worker_that_somebody_killed_was_not_killed_for_memory(one: Session) -> None:
    error = die(one, deeds.kill_self)
    assert error.signal == "SIGKILL"
    known = OomKills(lambda: 0.0)
    counts = known.look() is not None
    known.close()
    assert error.oom_killed is (False if counts else None)
    if counts:
        assert "not killed by this pool, nor by the kernel's out-of-memory killer" in str(error)


def test_whom_the_pool_killed_the_kernel_did_not(one: Session) -> None:
    lease = one.checkout(T)
    future_pid = lease.pid
    lease.call(abs, -1, timeout=T)
    (worker,) = workers(one, 1)
    assert worker.pid == future_pid
    lease.destroy()
    with one.checkout(T) as other:
        assert other.pid != future_pid


class Group:
    """A control group's files, as the kernel writes them."""

    def __init__(self, folder: Path, version: int) -> None:
        self.root, self.listed = folder / "cgroup", folder / "self"
        if version == 2:
            self.listed.write_text("0::/a.slice/b\n")
            self.file = self.root / "a.slice/b/memory.events"
        else:
            self.listed.write_text("5:cpu,memory:/a/b\n1:name=systemd:/x\n0::/\n")
            self.file = self.root / "memory/a/b/memory.oom_control"
        self.file.parent.mkdir(parents=True)
        self.version = version
        self.write(3)

    def write(self, kills: int) -> None:
        if self.version == 2:
            self.file.write_text(
                f"low 0\nhigh 2\nmax 7\noom 5\noom_kill {kills}\noom_group_kill 1\n"
            )
        else:
            self.file.write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")

    def watch(self, clock: Any) -> OomKills:
        return OomKills(clock, str(self.listed), str(self.root))


class Clock:
    """Time that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("version", [1, 2])
def test_a_rise_of_the_counter_is_seen_and_forgotten(tmp_path: Path, version: int) -> None:
    clock, group = Clock(), Group(tmp_path, version)
    kills = group.watch(clock)
    assert kills.look() is False  # what was before is not ours
    group.write(4)
    assert kills.look() is True
    clock.now += 1
    assert kills.look() is True  # another that was killed with it, and took longer to end
    clock.now += 60
    assert kills.look() is False
    group.write(6)
    assert kills.look() is True
    kills.close()


@pytest.mark.parametrize("version", [1, 2])
def test_in_a_container_the_mount_begins_at_the_group(tmp_path: Path, version: int) -> None:
    group = Group(tmp_path, version)
    top = (group.root if version == 2 else group.root / "memory") / group.file.name
    group.file.rename(top)
    group.file = top
    kills = group.watch(Clock())
    group.write(4)
    assert kills.look() is True
    kills.close()


@pytest.mark.parametrize("how", ["no list", "no file", "old kernel", "empty", "nonsense"])
def test_where_the_kernel_does_not_tell_nothing_is_known(tmp_path: Path, how: str) -> None:
    group = Group(tmp_path, 2)
    if how == "no list":
        group.listed.unlink()
    elif how == "no file":
        group.file.unlink()
    elif how == "old kernel":
        group.file.write_text("low 0\nhigh 0\nmax 0\noom 0\n")
    elif how == "empty":
        group.file.write_text("")
    else:
        group.listed.write_text("nonsense\n\n7:memory\n")
    kills = group.watch(Clock())
    assert kills.look() is None
    kills.close()


def test_a_worker_in_a_group_of_its_own_is_not_judged_by_ours(tmp_path: Path) -> None:
    """Only its own group's counter could tell. One below ours is counted in ours."""
    group = Group(tmp_path, 2)
    kills = group.watch(Clock())
    listed = Path(f"/proc/{os.getpid()}/cgroup").read_text().splitlines()
    own = next(line for line in listed if line.startswith("0::"))[3:]
    kills._group = own.rstrip("/")
    assert kills.covers(os.getpid())
    kills._group = "/elsewhere"
    assert not kills.covers(os.getpid())
    assert kills.covers(100_000_000)  # nothing is known
    kills.close()


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group in which there are 300 MiB of memory."""
    name = f"whitepool-test-{uuid.uuid4().hex[:8]}"
    listed = Path("/proc/self/cgroup").read_text().splitlines()
    first = any("memory" in line.split(":")[1].split(",") for line in listed)
    base = Path("/sys/fs/cgroup/memory" if first else "/sys/fs/cgroup")
    group = base / name
    try:
        if not first:
            (base / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            limit = group / ("memory.limit_in_bytes" if first else "memory.max")
            limit.write_text(str(300 * MIB))
            swap = group / ("memory.memsw.limit_in_bytes" if first else "memory.swap.max")
            if swap.exists():
                swap.write_text(str(300 * MIB) if first else "0")
        except OSError as error:
            pytest.skip(f"memory cannot be limited here: {error}")
        yield group
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), 20)
        group.rmdir()


def test_a_worker_that_takes_all_memory_is_told_as_killed_for_it(
    start_method: str, small_group: Path, tmp_path: Path
) -> None:
    script = tmp_path / "glutton.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            with open({str(small_group / "cgroup.procs")!r}, "w") as file:
                file.write(str(os.getpid()))
            import deeds
            from whitepool_mp import Pool, WorkerDied
            with Pool(2, start_method={start_method!r}) as session:
                session.run(abs, -1)
                try:
                    session.run(deeds.take_all_memory, timeout=60)
                except WorkerDied as error:
                    print(error.signal, error.oom_killed, error.peak_rss > 100 << 20)
                    print("most likely by the kernel, for want of memory" in str(error))
                print(session.run(pow, 2, 10))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        timeout=100,
        check=False,
        env=ENV,
    )
    assert done.stdout.decode().splitlines() == ["SIGKILL True True", "True", "1024"]
    assert done.returncode == 0
