"""What a pool must not leave behind, counted before it starts and after it has ended."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from pathlib import Path

import psutil

MARK = "WHITEPOOL_CHAOS"
"""An environment variable that everything started in a walk is born with."""
_SECONDS = 10.0


class Before:
    """How things were before.

    Args:
        folder: where temporary files go in this walk, with nothing but ours in it at the end.
        mark: the value of `MARK` in this walk.
    """

    def __init__(self, folder: Path, mark: str) -> None:
        self._folder = folder
        self._mark = mark
        self._descriptors = _descriptors()
        self._shared = set(os.listdir("/dev/shm"))
        self._threads = set(threading.enumerate())

    def left(self) -> list[str]:
        """What is there now that was not, once it has had time to go."""
        until = time.monotonic() + _SECONDS
        while True:
            gc.collect()
            found = self._left()
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def _left(self) -> list[str]:
        found = [f"process {process}" for process in self.processes()]
        found += [
            f"descriptor {fd} ({target})"
            for fd, target in _descriptors().items()
            if self._descriptors.get(fd) != target
        ]
        found += [
            f"temporary file {path.name}"
            for path in self._folder.iterdir()
            if not path.name.startswith(("ledger-", "member-", "begun", "stderr"))
        ]
        found += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self._shared]
        found += [f"thread {each.name}" for each in set(threading.enumerate()) - self._threads]
        return found

    def processes(self) -> list[psutil.Process]:
        """Everything that carries the mark, or is our child, and is not ourselves."""
        found = {child.pid: child for child in psutil.Process().children(recursive=True)}
        for pid in psutil.pids():
            with contextlib.suppress(psutil.Error, OSError):
                if f"{MARK}={self._mark}".encode() in _environment(pid) and pid != os.getpid():
                    found[pid] = psutil.Process(pid)
        return list(found.values())


def _environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):  # the listing's own
                found[int(name)] = target
    return found
