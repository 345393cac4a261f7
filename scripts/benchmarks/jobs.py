"""What runs in the workers: importable functions, so that every pool pickles them by reference.

It imports nothing that an interpreter does not have anyway: what is measured is the pools.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

noop = os.getpid


def echo(value: T) -> T:
    """Give back what came."""
    return value


def sleepy_pid(seconds: float) -> int:
    """The worker's pid, after a sleep that keeps it busy so that its siblings get the others."""
    time.sleep(seconds)
    return os.getpid()


def sleepy_interpreter(seconds: float) -> int:
    """The same for workers that are interpreters of one process: the interpreter's number."""
    from importlib import import_module  # CPython 3.14 has it

    time.sleep(seconds)
    return int(import_module("concurrent.interpreters").get_current().id)


_WATCHED = 0.0004


def last(seconds: float) -> None:
    """Take exactly so long: asleep for most of it, and then with an eye on the clock, since a sleep
    takes about a tenth of a millisecond longer than it is told."""
    end = time.perf_counter() + seconds
    if seconds > _WATCHED:
        time.sleep(seconds - _WATCHED)
    while time.perf_counter() < end:
        pass


def load(module: str) -> None:
    """Import a module: what a worker with heavy imports does before its first job."""
    __import__(module)
