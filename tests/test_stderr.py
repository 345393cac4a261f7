"""Workers' standard error comes out on the owner's, whatever that is, and stops nobody."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deeds
import pytest
from support import processes, until

import whitepool_mp
from whitepool_mp import Pool

T = 30
ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        (os.path.dirname(os.path.dirname(whitepool_mp.__file__)), os.path.dirname(__file__))
    ),
}
"""With which a script finds this package, and the tests' modules."""


@contextlib.contextmanager
def owner(folder: Path, text: str, stderr: int) -> Iterator[subprocess.Popen[bytes]]:
    """A script that has a pool, with this standard error."""
    script = folder / "owner.py"
    script.write_text("import deeds\nfrom whitepool_mp import Pool\n" + textwrap.dedent(text))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=stderr, env=ENV
    ) as process:
        try:
            yield process
        finally:
            process.kill()
    until(lambda: not processes())


def output(process: subprocess.Popen[bytes]) -> list[str]:
    """What the script printed, once it has ended well."""
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.decode().splitlines()


@pytest.mark.parametrize("end", ["safe_shutdown", "terminate", "with"])
def test_everything_is_out_when_the_pool_has_ended(start_method: str, end: str, capfd: Any) -> None:
    """A million bytes of each of two workers, some of it of the last moment."""
    with Pool(2, start_method=start_method) as session:
        futures = [session.submit(deeds.talk, number, 20_000) for number in range(4)]
        for future in futures:
            future.result(T)
        if end != "with":
            getattr(session, end)()
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == sorted(
        deeds.line(number, index) for number in range(4) for index in range(20_000)
    )


def test_last_words_of_a_teardown_and_of_atexit_are_out(start_method: str, capfd: Any) -> None:
    with Pool(
        1, factory=deeds.says_at_exit, teardown=deeds.says, start_method=start_method
    ) as session:
        session.checkout(T).checkin()
    assert capfd.readouterr().err == "the teardown\natexit\n"


def test_lines_of_many_workers_are_not_torn(start_method: str, capfd: Any) -> None:
    with Pool(4, start_method=start_method) as session:
        for future in [session.submit(deeds.talk, number, 2000) for number in range(16)]:
            future.result(T)
    assert set(capfd.readouterr().err.splitlines()) == {
        deeds.line(number, index) for number in range(16) for index in range(2000)
    }


def test_a_slow_reader_gets_everything(start_method: str, tmp_path: Path) -> None:
    """More than any buffer on the way holds; it waits in the end, as for a process of its own."""
    text = f"""
        with Pool(2, start_method={start_method!r}) as session:
            for future in [session.submit(deeds.talk, number, 20_000) for number in range(2)]:
                future.result()
            print(session.status().counters["stderr_bytes_dropped"])
    """
    read, write = os.pipe()
    with owner(tmp_path, text, write) as process:
        os.close(write)
        got = bytearray()

        def drain() -> None:
            while piece := os.read(read, 20_000):
                got.extend(piece)

        reader = threading.Thread(target=drain)
        reader.start()
        assert output(process) == ["0"]
        reader.join(T)
    os.close(read)
    lines = got.decode().splitlines()
    assert sorted(lines) == sorted(
        deeds.line(number, index) for number in range(2) for index in range(20_000)
    )


def test_a_pipe_that_nobody_reads_stops_nobody(start_method: str, tmp_path: Path) -> None:
    """Workers go on, and the manager answers all the time; what got lost is counted."""
    text = f"""
        import time
        with Pool(2, start_method={start_method!r}) as session:
            futures = [session.submit(deeds.talk, number, 20_000) for number in range(4)]
            slowest = 0
            while not all(future.done() for future in futures):
                began = time.monotonic()
                session.status()
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 0.9, slowest
            print([future.result() for future in futures])
            print(session.run(pow, 2, 10))
            print(session.status().counters["stderr_bytes_dropped"] > 1_000_000)
    """
    read, write = os.pipe()
    try:
        with owner(tmp_path, text, write) as process:
            os.close(write)
            assert output(process) == [str([20_000] * 4), "1024", "True"]
    finally:
        os.close(read)


def test_a_hundred_workers_talk_at_once(tmp_path: Path) -> None:
    text = """
        import time
        with Pool(100) as session:
            while session.status().available < 100:
                time.sleep(0.05)
            futures = [session.submit(deeds.talk, number, 500) for number in range(200)]
            slowest = 0
            while not all(future.done() for future in futures):
                began = time.monotonic()
                session.status()
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 3, slowest
            assert [future.result() for future in futures] == [500] * 200
            print(session.status().counters["stderr_bytes_dropped"])
            print(session.run(pow, 2, 10))
            assert len([each for each in session.stacks() if each.answered]) == 100
    """
    with (tmp_path / "err").open("w+b") as file:
        with owner(tmp_path, text, file.fileno()) as process:
            assert output(process) == ["0", "1024"]
        file.seek(0)
        lines = file.read().decode().splitlines()
    assert sorted(lines) == sorted(
        deeds.line(number, index) for number in range(200) for index in range(500)
    )


def test_a_reader_that_goes_away_harms_nobody(start_method: str, tmp_path: Path) -> None:
    text = f"""
        import sys
        with Pool(2, start_method={start_method!r}) as session:
            session.run(deeds.talk, 0, 10)
            print("talked", flush=True)
            sys.stdin.readline()
            assert session.run(deeds.talk, 1, 50_000) == 50_000
            print(session.run(pow, 2, 10))
    """
    read, write = os.pipe()
    script = tmp_path / "owner.py"
    script.write_text("import deeds\nfrom whitepool_mp import Pool\n" + textwrap.dedent(text))
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=write,
        env=ENV,
    ) as process:
        os.close(write)
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"talked\n"
        os.close(read)
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stdout.read() == b"1024\n"
        assert process.wait(T) == 0


def test_a_terminal_shows_it_and_stays_the_owners(start_method: str, tmp_path: Path) -> None:
    """The manager, which leads a session without a terminal, must not take it for its own."""
    text = f"""
        with Pool(1, start_method={start_method!r}) as session:
            session.run(deeds.talk, 0, 2)
            manager = session._member.owner.manager
            with open(f"/proc/{{manager}}/stat") as file:
                print(file.read().rpartition(")")[2].split()[4])  # its terminal
    """
    master, slave = pty.openpty()
    with owner(tmp_path, text, slave) as process:
        os.close(slave)
        assert output(process) == ["0"]
        got = b""
        with contextlib.suppress(OSError):  # EIO: everybody has closed it
            while piece := os.read(master, 1000):
                got += piece
    os.close(master)
    assert got.decode().split("\r\n") == [deeds.line(0, 0), deeds.line(0, 1), ""]


def test_a_worker_writes_while_its_manager_is_stopped(start_method: str, capfd: Any) -> None:
    """Up to what its pipe holds it does not even notice."""
    with Pool(1, start_method=start_method) as session:
        session.run(abs, -1, timeout=T)
        owning = session._member.owner
        assert owning is not None
        os.kill(owning.manager, signal.SIGSTOP)
        try:
            assert session.run(deeds.talk, 0, 100, timeout=T) == 100
        finally:
            os.kill(owning.manager, signal.SIGCONT)
    assert len(capfd.readouterr().err.splitlines()) == 100
