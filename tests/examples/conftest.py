"""Runs the examples as a user would, and starts the PostgreSQL server that two of the tests need.

`run_example` gives an example a process of its own with a deadline, and checks what it leaves
behind: no process that carries its mark, and nothing in its temporary folder.

`postgres_dsn` is a real server on loopback, from Debian's binaries, in a temporary folder, for the
length of the test session.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

import whitepool_mp

EXAMPLES = Path(__file__).parents[2] / "examples"
MARK = "WHITEPOOL_TEST_MARK"


class Finished(NamedTuple):
    """What a user has in front of them when an example has ended."""

    code: int
    out: str
    err: str

    def line(self, pattern: str) -> "re.Match[str]":
        """The first line of output that the pattern matches, from its beginning."""
        found = re.search(rf"^{pattern}", self.out, re.MULTILINE)
        assert found, f"no line of the output matches {pattern!r}:\n{self.out}\n{self.err}"
        return found


RunExample = Callable[..., Finished]


def marked(mark: str) -> list[psutil.Process]:
    """Every live process that was started with this mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile, or is not ours to look at
    return found


def survivors(mark: str, seconds: float) -> list[str]:
    """Marked processes that are still there after that long; they are killed then."""
    psutil.wait_procs(marked(mark), timeout=seconds)
    told = []
    for process in marked(mark):
        try:
            told.append(f"pid {process.pid}, {process.status()}: {' '.join(process.cmdline())}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return told


@pytest.fixture
def run_example() -> Iterator[RunExample]:
    """Run an example by name; arguments follow. It fails the test if anything is left behind."""
    # Not pytest's tmp_path: its length may exceed what the address of a socket allows.
    folder = Path(tempfile.mkdtemp(prefix="wp-"))
    scratch = folder / "tmp"
    scratch.mkdir()

    def run(
        name: str,
        *args: str,
        stdin: str | None = None,
        hide: str | None = None,
        deadline: float = 90,
        **env: str,
    ) -> Finished:
        mark = uuid.uuid4().hex
        paths = [str(Path(whitepool_mp.__file__).parents[1])]
        if "PYTHONPATH" in os.environ:
            paths.append(os.environ["PYTHONPATH"])
        if hide:  # a module that cannot be imported, as if it were not installed
            absent = folder / "absent"
            absent.mkdir(exist_ok=True)
            (absent / f"{hide}.py").write_text(f"raise ImportError('no module {hide} here')\n")
            paths.insert(0, str(absent))
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "default::ResourceWarning",
            "TMPDIR": str(scratch),
            MARK: mark,
            **env,
        }
        process = subprocess.Popen(
            [sys.executable, name, *args],
            cwd=EXAMPLES,
            env=environ,
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(stdin, timeout=deadline)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            survivors(mark, 0)  # those hold its pipes, too
            out, err = process.communicate()
            pytest.fail(f"{name} did not end within {deadline} s:\n{out}\n{err}")
        left = survivors(mark, 10)
        assert not left, f"{name} left processes: {left}\n{out}\n{err}"
        forgotten = sorted(str(path.relative_to(scratch)) for path in scratch.rglob("*"))
        assert not forgotten, f"{name} left files: {forgotten}"
        assert "ResourceWarning" not in err, err
        return Finished(process.returncode, out, err)

    try:
        yield run
    finally:
        shutil.rmtree(folder)


def postgres_binaries() -> Path:
    """The folder of the newest PostgreSQL server here; the test fails where there is none."""

    def version(folder: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", folder.parent.name)]

    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=version, reverse=True)
    on_path = shutil.which("postgres")
    if on_path:
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        if all((folder / program).exists() for program in ("initdb", "pg_ctl", "postgres")):
            return folder
    pytest.fail(
        "no PostgreSQL server binaries in /usr/lib/postgresql/*/bin or on PATH; "
        "install Debian's: apt-get install postgresql",
        pytrace=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def unprivileged() -> pwd.struct_passwd | None:
    """Whom to run the server as: it refuses root."""
    if os.geteuid() != 0:
        return None
    users = {entry.pw_name: entry for entry in pwd.getpwall()}
    return users.get("postgres") or users["nobody"]


@pytest.fixture(scope="module")
def postgres_dsn() -> Iterator[str]:
    """The DSN of a real PostgreSQL server that lives as long as its module's tests."""
    binaries = postgres_binaries()
    folder = Path(tempfile.mkdtemp(prefix="wp-pg-"))
    data, log = folder / "data", folder / "log"
    user = unprivileged()
    if user:
        os.chown(folder, user.pw_uid, user.pw_gid)

    def run(program: str, *args: str) -> None:
        result = subprocess.run(
            [str(binaries / program), *args],
            cwd=folder,
            user=user.pw_uid if user else None,
            group=user.pw_gid if user else None,
            extra_groups=[] if user else None,
            # The server inherits these and outlives the call: a pipe would never end.
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=120,
        )
        if result.returncode:
            pytest.fail(
                f"{program} {' '.join(args)} failed ({result.returncode}):\n"
                f"{(folder / 'output').read_text()}\n{log.read_text() if log.exists() else ''}",
                pytrace=False,
            )

    try:
        with open(folder / "output", "w") as output:
            new = ("-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-locale", "--no-sync")
            run("initdb", "-D", str(data), *new)
            port = free_port()
            settings = (
                f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} "
                "-c fsync=off -c max_connections=50"
            )
            run("pg_ctl", "start", "-w", "-D", str(data), "-l", str(log), "-o", settings)
            try:
                yield f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
            finally:
                run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(data))
    finally:
        shutil.rmtree(folder)
