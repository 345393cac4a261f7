"""The client processes of a walk: always as many, since each killed one is followed by another."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from walk.ledger import PATIENCE
from walk.member import LENGTH
from whitepool_mp import Session

_KINDS = ("run,submit,lease", "asyncio,map,lease")
_END_SECONDS = PATIENCE + 20.0  # those that are stuck say so themselves, before
_DUMP_SECONDS = 2.0
_MAIN = "import sys; from walk.member import main; main(*sys.argv[1:])"


class Member:
    """One client process."""

    def __init__(self, session: Session, folder: Path, index: int, seed: int) -> None:
        self.index = index
        self.log = folder / f"member-{index}.log"
        kinds = _KINDS[index % len(_KINDS)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(folder), str(index), str(seed), kinds],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,  # which `-c` imports from
                start_new_session=True,  # Ctrl-C is for the walker, whose end is theirs
            )
        self.pidfd = os.pidfd_open(self._process.pid)
        data = pickle.dumps(session)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(LENGTH.pack(len(data)) + data)
            self._process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL, and see that it is gone."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self._process.wait()
        self._close()

    def let_go(self) -> None:
        """Tell it that the walk is over."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def end(self, until: float) -> str:
        """Wait for its end until then, and no longer; what is wrong with it, or ""."""
        wrong = ""
        try:
            code = self._process.wait(max(0.1, until - time.monotonic()))
            if code:
                wrong = f"client process {self.index} ended with {code}"
        except subprocess.TimeoutExpired:
            wrong = f"client process {self.index} is stuck"
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_DUMP_SECONDS)
            self._process.kill()
            self._process.wait()
        self._close()
        return wrong

    def _close(self) -> None:
        self.let_go()
        os.close(self.pidfd)


class Crowd:
    """All of them.

    Args:
        session: what they are given.
        folder: where their books go.
        size: how many there are at any time.
        rng: what their seeds come from.
    """

    def __init__(self, session: Session, folder: Path, size: int, rng: random.Random) -> None:
        self._session = session
        self._folder = folder
        self._rng = rng
        self._next = 1
        self.killed: set[int] = set()
        self.members: list[Member] = []
        for _ in range(size):
            self._add()

    def _add(self) -> None:
        member = Member(self._session, self._folder, self._next, self._rng.randrange(2**31))
        self._next += 1
        self.members.append(member)

    def kill(self, at: float) -> None:
        """Kill one, and start another."""
        member = self.members.pop(int(at * len(self.members)))
        self.killed.add(member.index)
        member.kill()
        self._add()

    def let_go(self) -> None:
        """Tell all of them that the walk is over."""
        for member in self.members:
            member.let_go()

    def end(self) -> list[str]:
        """See all of them end; what was wrong with any."""
        self.let_go()
        until = time.monotonic() + _END_SECONDS
        wrong = [text for member in self.members if (text := member.end(until))]
        for log in sorted(self._folder.glob("member-*.log")):
            if words := log.read_text(errors="replace").strip():
                wrong.append(f"{log.stem} said:\n{words}")
        return wrong
