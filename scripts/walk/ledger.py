"""A client process's book: which jobs it opened, and what it was told of their ends.

It is a file, one append for each line, so that it can be read when its process was killed:

    O number kind limit time    a job was opened, and has to end within `limit` seconds
    E number time end           it ended; so does a line for each further end, which is one too many
    S text                      something that must not be
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

SPAN = 10**8
"""How many numbers each process has: its first is its index times this."""
PATIENCE = 40.0
"""Seconds after which a job that has no deadline, or is past it, hangs. On a machine that has other
things to do some take ten: dozens queue up for workers of which several are killed a second."""


class Ledger:
    """The book of one process.

    Args:
        path: the file; made anew.
        index: the process's index.
    """

    def __init__(self, path: Path, index: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        self._next = index * SPAN
        self._lock = threading.Lock()

    def open(self, kind: str, seconds: float | None = None) -> int:
        """A new job's number.

        Args:
            kind: how it is run.
            seconds: by when it should end, or None.
        """
        return self.open_many(kind, 1, seconds)[0]

    def open_many(self, kind: str, count: int, seconds: float | None = None) -> range:
        """The numbers of so many new jobs."""
        limit = PATIENCE + (seconds or 0.0)
        now = time.monotonic()
        with self._lock:
            numbers = range(self._next, self._next + count)
            self._next += count
        self._write("".join(f"O {number} {kind} {limit:g} {now:.3f}\n" for number in numbers))
        return numbers

    def close(self, number: int, end: str) -> None:
        """A job ended."""
        self._write(f"E {number} {time.monotonic():.3f} {end}\n")

    def strange(self, text: str) -> None:
        """Something that must not be."""
        self._write(f"S {' '.join(text.split())}\n")

    def _write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def shut(self) -> None:
        """No more is written."""
        os.close(self._fd)
