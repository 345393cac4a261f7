"""Which interpreter a pool starts its processes with: an odd `sys.executable` works, or is refused
by name, and no application is started again and again."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anatomy import replace_manager, replace_worker, workers
from support import NewPool
from user_script import ROOT

from whitepool_mp import WhitepoolError
from whitepool_mp.client import interpreter

SOON = 20.0


@contextlib.contextmanager
def executable(path: str | bytes | None) -> Iterator[None]:
    """What `multiprocessing.set_executable` was given, while the block runs."""
    from multiprocessing import spawn

    before = spawn.get_executable()
    spawn.set_executable(path)
    try:
        yield
    finally:
        spawn.set_executable(before)


def program(path: Path, lines: str) -> str:
    """A program of these lines of shell."""
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("path", [None, ""])
def test_an_embedded_interpreter_without_a_path_is_refused(
    new_pool: NewPool, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", path)
    with (
        executable(None),
        pytest.raises(WhitepoolError, match=rf"sys\.executable is {path!r}.*set_executable"),
    ):
        new_pool(1).run_service()


@pytest.mark.parametrize("path", ["/nonexistent/python", "nonexistent-python", "/"])
def test_what_is_no_program_is_refused(new_pool: NewPool, path: str) -> None:
    with (
        executable(path),
        pytest.raises(WhitepoolError, match=rf"{path!r}.*is no program.*set_executable"),
    ):
        new_pool(1).run_service()


@pytest.mark.parametrize("lines", ["exit 0", "exit 1", "kill -9 $$", "exec 1>&- 2>&-"])
def test_a_program_that_ends_is_refused_and_was_started_once(
    new_pool: NewPool, tmp_path: Path, lines: str
) -> None:
    path = program(tmp_path / "app", f"echo x >> {tmp_path}/starts\n{lines}")
    with (
        executable(path),
        pytest.raises(
            WhitepoolError, match=rf"{path!r}.*started as a Python interpreter and ended"
        ),
    ):
        new_pool(1).run_service()
    assert (tmp_path / "starts").read_text() == "x\n"


def test_a_program_that_goes_on_is_refused_and_ended(
    new_pool: NewPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had started is ended with it (the check after each test would see it)."""
    path = program(tmp_path / "app", "sleep 1000")
    monkeypatch.setattr(interpreter, "_PROOF_SECONDS", 0.3)
    with (
        executable(path),
        pytest.raises(
            WhitepoolError, match=rf"{path!r}.*did not run what it was told to within 0 s"
        ),
    ):
        new_pool(1).run_service()


@pytest.mark.parametrize("mode", [0o755, 0o644])
def test_a_file_that_the_kernel_cannot_run_is_named(
    new_pool: NewPool, tmp_path: Path, mode: int
) -> None:
    path = tmp_path / "app"
    path.write_bytes(b"\0\0\0\0")
    path.chmod(mode)
    with executable(str(path)), pytest.raises(WhitepoolError, match=rf"{str(path)!r}"):
        new_pool(1).run_service()


def test_a_variable_that_keeps_the_interpreter_from_starting_is_an_error_at_once(
    new_pool: NewPool, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WhitepoolError, match=r"env= *"):
        new_pool(1, env={"PYTHONHASHSEED": "none"}).run_service()
    assert "PYTHONHASHSEED must be" in capfd.readouterr().err


def test_another_version_of_python_is_named(
    new_pool: NewPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in: whatever it is told to run, it says so as an older one."""
    path = program(
        tmp_path / "old",
        f'last=; for arg; do last="$arg"; done\n'
        f'exec {sys.executable} -c "import sys; sys.hexversion = 0x02070000\n$last"',
    )
    with executable(path), pytest.raises(WhitepoolError, match=rf"{path!r}"):
        new_pool(1).run_service()
    assert f"is no Python {sys.version.split()[0]}" in capfd.readouterr().err


def test_the_executable_of_multiprocessing_counts(
    new_pool: NewPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sys.executable
    monkeypatch.setattr(sys, "executable", None)
    with executable(os.fsencode(real)), new_pool(1) as session:
        there = session.run(lambda: sys.executable, timeout=SOON)
        assert os.path.samefile(there, real)


def test_a_relative_path_is_that_of_the_start(
    new_pool: NewPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "python", f'exec {sys.executable} "$@"')
    monkeypatch.chdir(tmp_path)
    with executable("./python"), new_pool(1) as session:
        workers(session, 1)
        os.chdir("/")
        replace_manager(session)
        replace_worker(session)
        assert session.run(pow, 2, 3, timeout=SOON) == 8


APP = """
import os, sys
sys.executable = os.environ["APP"]
if os.environ["FROZEN"]:
    sys.frozen = True
with open(os.environ["STARTS"], "a") as file:
    file.write("x")
if os.path.getsize(os.environ["STARTS"]) > 5:
    os._exit(9)
import multiprocessing
multiprocessing.freeze_support()
from whitepool_mp import Pool, WhitepoolError
if len(sys.argv) > 1 and sys.argv[1].startswith("/"):
    multiprocessing.set_executable(sys.argv[1])
try:
    with Pool(1, start_method=os.environ["METHOD"]) as session:
        print(session.run(abs, -3))
except WhitepoolError as error:
    print("error:", error)
"""


@pytest.mark.parametrize(("frozen", "starts"), [("1", 1), ("", 2)])
@pytest.mark.parametrize("arguments", ["", '"$@"'])
def test_an_application_is_not_started_again_and_again(
    start_method: str, tmp_path: Path, frozen: str, starts: int, arguments: str
) -> None:
    """Whether it says that it is frozen or not, and whether it looks at its arguments or not. The
    second start of one that does not say so is told, by its environment, what it is."""
    (tmp_path / "app.py").write_text(APP)
    app = program(tmp_path / "app", f"exec {sys.executable} {tmp_path / 'app.py'} {arguments}")
    env = {
        **os.environ,
        "APP": app,
        "FROZEN": frozen,
        "STARTS": str(tmp_path / "starts"),
        "METHOD": start_method,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([app], env=env, capture_output=True, text=True, timeout=60)
    assert len((tmp_path / "starts").read_text()) == starts
    lines = done.stdout.splitlines()
    assert len(lines) == starts
    assert all(line.startswith("error: ") and "set_executable" in line for line in lines)
    assert all(app in line for line in lines)
    # With an interpreter that it names it works.
    (tmp_path / "starts").unlink()
    program(tmp_path / "app", f"exec {sys.executable} {tmp_path / 'app.py'} {sys.executable}")
    done = subprocess.run([app], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, len((tmp_path / "starts").read_text())) == ("3\n", 1)


def test_the_options_are_checked_before_anything_is_started(
    new_pool: NewPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    began = time.monotonic()
    with pytest.raises(WhitepoolError, match=r"frozen application \(sys\.frozen is set\)"):
        new_pool(1).run_service()
    assert time.monotonic() - began < SOON
