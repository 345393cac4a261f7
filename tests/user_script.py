"""A user's script in a process of its own, for what cannot be tested from within pytest's.

The script begins with what every test needs imported, a `pool()` with the start method under test
and `tell(value)`, which prints a JSON line for `Script.hear()`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import select
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from anatomy import lives
from support import until

from whitepool_mp import Session

ROOT = Path(__file__).parents[1]

BEGIN = """
import contextlib, json, os, signal, sys, threading, time
from whitepool_mp import *

def tell(value):
    os.write(1, json.dumps(value).encode() + b"\\n")

def pool(size=2, **options):
    return Pool(size, start_method=sys.argv[1], name="script", **options)

def given():
    # The session that the test gives by `Script.give`.
    import base64, pickle
    return pickle.loads(base64.b64decode(sys.stdin.readline()))

def cast(session):
    # Every process of the pool, the manager first, and its folder.
    owner = session._member.owner
    session.run(pow, 1, 1)
    while len(session.workers()) < session.status().pool_size or session.status().booting:
        session.run(pow, 1, 1)
    import psutil
    manager = psutil.Process(owner.manager)
    pids = [manager.pid] + [child.pid for child in manager.children()]
    return {"owner": os.getpid(), "pids": pids, "folder": owner.folder}
"""


CLIENTS = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads
sys.path.insert(0, {os.path.dirname(__file__)!r})
import deeds
session = given()

def client(work, *args):
    # Run work(*args) in a process of its own, a client like others; its pid.
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*args)
        os._exit(70)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(71)

def ended(pid):
    # Wait for its end: the exit code, or the signal.
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
"""What a script begins with that is given a session, and has many clients that come to grief."""


class Script:
    """A running script.

    Args:
        code: its lines after `BEGIN`; they may be indented.
        start_method: for its `pool()`.
        before: lines that come before those.
        through: a command that runs the command which follows it.
    """

    def __init__(
        self, code: str, start_method: str, before: str = "", through: Sequence[str] = ()
    ) -> None:
        lines = BEGIN + textwrap.dedent(before) + textwrap.dedent(code)
        self.process = subprocess.Popen(
            [*through, sys.executable, "-c", lines, start_method],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._heard = b""

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group's."""
        return self.process.pid

    def hear(self, seconds: float = 20.0) -> Any:
        """The next thing that the script tells; fails the test when it does not come in time."""
        out = self.process.stdout
        assert out is not None
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(out, select.POLLIN)
        while b"\n" not in self._heard:
            ready = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
            data = os.read(out.fileno(), 65536) if ready else b""
            if not data:
                _, err = self.end()
                pytest.fail(f"the script told nothing: {self._heard!r}\n{err}")
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def say(self, line: bytes = b"") -> None:
        """Let a script go on that waits in `sys.stdin.readline()`."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def give(self, session: Session) -> None:
        """Give a session to a script that waits in `given()`."""
        self.say(base64.b64encode(pickle.dumps(session)))

    def finish(self, seconds: float = 20.0) -> tuple[str, str]:
        """Wait for its end; what it printed on standard output and standard error."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _, text = self.end()
            pytest.fail(f"the script did not end within {seconds} s:\n{text}")
        return (self._heard + out).decode(), err.decode()

    def end(self) -> tuple[str, str]:
        """Kill it, if it still runs; its pool is to end by itself."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            out, err = self.process.communicate(timeout=5)
            return out.decode(), err.decode()
        return "", ""


@contextlib.contextmanager
def script(
    code: str, start_method: str, before: str = "", through: Sequence[str] = ()
) -> Iterator[Script]:
    """Run a script while the block runs; whatever is left of it then is killed."""
    running = Script(code, start_method, before, through)
    try:
        yield running
    finally:
        if running.process.returncode is None:
            running.end()
        for pipe in (running.process.stdin, running.process.stdout, running.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def all_gone(told: dict[str, Any]) -> None:
    """Check that nothing is left of the pool of a script that told its `cast`."""

    def over() -> bool:
        """no process and no folder of the pool left"""
        return not any(map(lives, told["pids"])) and not os.path.exists(told["folder"])

    until(over)
