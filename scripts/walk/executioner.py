"""Kills and stops of a contestant's workers: the same ones, at the same times, for all of them.

A worker is a process that has begun a job. That is all that is asked of a pool: no interface.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import time
from pathlib import Path

from walk.faults import Thaw

_STOPS = 0.25
"""The share of the steps that stop a worker for a moment instead."""


class Executioner:
    """Goes for the workers of one contestant.

    Args:
        begun: the file in which they say that they begin jobs.
        mark: what every process of the contestant has in its environment, "NAME=value".
        seed: decides what is done when; to which worker, as a share of those that live.
        rate: how many kills a second, in the mean.
    """

    def __init__(self, begun: Path, mark: str, seed: int, rate: float) -> None:
        self.done = collections.Counter[str]()
        self._begun = begun
        self._mark = mark.encode()
        self._rng = random.Random(seed)
        self._rate = rate / (1 - _STOPS)
        self._read = 0
        self._pids: dict[int, None] = {}

    def run(self, seconds: float) -> None:
        """Kill and stop for so long."""
        thaw = Thaw()
        start = due = time.monotonic()
        rng = self._rng
        while True:
            due += rng.expovariate(self._rate) if self._rate else seconds + 1
            stop, at, nap = rng.random() < _STOPS, rng.random(), rng.uniform(0.01, 0.3)
            if due > start + seconds:
                break
            time.sleep(max(0.0, due - time.monotonic()))
            living = self._living()
            if not living:
                self.done["nobody to kill"] += 1
                continue
            chosen = living.pop(int(at * len(living)))
            for pidfd in living:
                os.close(pidfd)
            with contextlib.suppress(ProcessLookupError):
                if stop:
                    thaw.stop(os.dup(chosen), nap)
                    self.done["stops"] += 1
                else:
                    signal.pidfd_send_signal(chosen, signal.SIGKILL)
                    self.done["kills"] += 1
            os.close(chosen)
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        thaw.end()

    def _living(self) -> list[int]:
        """Descriptors of the workers that live, the oldest first."""
        with self._begun.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            if line.startswith(b"B "):
                self._pids[int(line.split()[2])] = None
        found = []
        for pid in list(self._pids):
            pidfd = self._opened(pid)
            if pidfd is None:
                del self._pids[pid]
            else:
                found.append(pidfd)
        return found

    def _opened(self, pid: int) -> int | None:
        """A descriptor of a process, if it lives and is the contestant's."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            # A dead one that nobody has reaped yet has no environment any more.
            if self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pidfd
        os.close(pidfd)
        return None
