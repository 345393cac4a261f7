"""The conductor's end of a contestant: its process, what it is told, and its end.

Whatever a contestant starts is born with a mark in its environment, and is found by it: pools make
daemons, sessions and orphans.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "WHITEPOOL_BENCH_SEAT"
START_SECONDS = 60.0
_STOP_SECONDS = 5.0
_TRACKER_SECONDS = 2.0
_MAIN = """\
import sys
from benchmarks.contestant import main
main(int(sys.argv[1]), *sys.argv[2:])
"""
_numbers = itertools.count(1)


class Seat:
    """A process that holds one contestant's pool.

    Args:
        contestant: its name in `contestant.CONTESTANTS`.
        options: what its adapter is made with.
        folder: where temporary files and its output go.
        parks: whether to stop its processes while it is not asked anything.
    """

    def __init__(self, contestant: str, options: dict[str, Any], folder: Path, parks: bool) -> None:
        self.contestant = contestant
        self.parks = parks
        self.mark = f"{os.getpid()}-{next(_numbers)}"
        self.log = folder / f"{self.mark}-{contestant}.log"
        here, there = socket.socketpair()
        self._socket = here
        self._unread = b""
        self._parked: list[int] = []
        environment = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
            "TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with there, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(there.fileno()), contestant, json.dumps(options)],
                pass_fds=[there.fileno()],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the conductor, which ends the others
            )
        self._watch = os.pidfd_open(self._process.pid)

    def ask(self, what: str, given: dict[str, Any], limit: float) -> dict[str, Any]:
        """Have it do something; its answer.

        One that does not answer within `limit` seconds, or whose process ends, is closed, and the
        answer is a status that says so.
        """
        self.resume()
        try:
            command = json.dumps({"do": what, "with": given}).encode()
            self._socket.sendall(command + b"\n")
            answer = self._answer(time.monotonic() + limit)
        except OSError:
            answer = None
        if answer is None:
            alive = self._process.poll() is None
            self.close(kindly=False)
            if alive:
                return {"status": f"hung (no answer in {limit:g} s)"}
            return {"status": "its own process ended"}
        self.park()
        return answer

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            here = self._socket.fileno()
            ready = select.select([here, self._watch], [], [], max(0.0, left))[0]
            if here not in ready:
                return None
            data = self._socket.recv(65536)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def open(self) -> bool:
        """Whether it can be asked."""
        return self._socket.fileno() >= 0

    def processes(self) -> list[int]:
        """The pids of everything that it is and has started, found by its mark."""
        needle = f"{MARK}={self.mark}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if needle in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue  # somebody else's, or just gone
        return found

    def park(self) -> None:
        """Stop its processes, if it is one that needs this."""
        if self.parks and not self._parked:
            self._parked = self.processes()
            self._signal(self._parked, signal.SIGSTOP)

    def resume(self) -> None:
        """The opposite of `park`."""
        self._signal(self._parked, signal.SIGCONT)
        self._parked = []

    @staticmethod
    def _signal(pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self, kindly: bool = True) -> None:
        """End everything that it has started."""
        if not self.open:
            return
        self.resume()
        if kindly:
            with contextlib.suppress(OSError):
                self._socket.sendall(json.dumps({"do": "stop"}).encode() + b"\n")
                self._answer(time.monotonic() + _STOP_SECONDS)
        self._socket.close()
        if kindly:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        trackers_until = time.monotonic() + _TRACKER_SECONDS
        while pids := self.processes():
            if time.monotonic() < trackers_until:
                pids = [pid for pid in pids if not self._is_tracker(pid)]
            self._signal(pids, signal.SIGKILL)
            self._reap()
            time.sleep(0.02)
        self._reap()
        os.close(self._watch)

    @staticmethod
    def _is_tracker(pid: int) -> bool:
        """Whether it is one that removes what the others leave in /dev/shm, and then ends."""
        try:
            return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def _reap(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2)
