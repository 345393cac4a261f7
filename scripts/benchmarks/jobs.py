"""What runs in the workers: importable functions, so that every pool pickles them by reference."""

from __future__ import annotations

import importlib
import os
import time
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


def load(module: str) -> None:
    """Import a module: what a worker with heavy imports does before its first job."""
    importlib.import_module(module)
