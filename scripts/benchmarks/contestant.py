"""The process of one contestant: does one measurement when told to, and says what came out.

Commands and answers are lines of JSON on a socket that the conductor passed on. It is started with
`-c`, so that pools which import their caller's main module again find nothing to import.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.adapter import Adapter, Cannot, both_workers

CONTESTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "whitepool": ("ours", "Whitepool", {}),
    "pipe": ("adapter", "Pipe", {"workers": 1}),
    "socket": ("adapter", "RawSocket", {}),
    "loop": ("adapter", "BareLoop", {}),
    "ppe-spawn": ("peers", "Standard", {"start_method": "spawn"}),
    "ppe-fork": ("peers", "Standard", {"start_method": "fork"}),
    "interpreters": ("peers", "Interpreters", {}),
    "loky": ("peers", "Loky", {}),
    "mp-pool": ("peers", "StandardPool", {}),
    "billiard": ("peers", "Billiard", {}),
    "pebble": ("peers", "Pebble", {}),
    "mpire": ("peers", "Mpire", {}),
    "ray": ("peers", "Ray", {}),
}
"""By name: where its adapter is, and what that one is made with."""

NO_PROCESSES = ("socket", "loop")


def adapter_type(name: str) -> type[Adapter]:
    """The adapter of a contestant."""
    module, kind, _ = CONTESTANTS[name]
    found: type[Adapter] = getattr(importlib.import_module(f"benchmarks.{module}"), kind)
    return found


def adapter(name: str, options: dict[str, Any]) -> Adapter:
    """A contestant's adapter, with nothing imported or started yet."""
    return adapter_type(name)(**{**CONTESTANTS[name][2], **options})


def warm(pool: Adapter, name: str) -> None:
    """Import, start, and use each worker once."""
    pool.load()
    pool.start()
    if name not in NO_PROCESSES:
        both_workers(pool)


def measurement(name: str) -> Callable[..., float]:
    """The function "module.function" of this package, or "package.module.function"."""
    module, _, function = name.rpartition(".")
    where = module if "." in module else f"benchmarks.{module}"
    found: Callable[..., float] = getattr(importlib.import_module(where), function)
    return found


def perform(pool: Adapter, name: str, command: dict[str, Any]) -> dict[str, Any]:
    """Do what a command says; what to answer."""
    try:
        if command["do"] == "warm":
            warm(pool, name)
            return {}
        if command["do"] == "stop":
            pool.stop()
            return {}
        measure = measurement(command["do"])
        start = time.perf_counter()
        value = measure(pool, **command["with"])
        return {"value": value, "seconds": time.perf_counter() - start}
    except Cannot as error:
        return {"status": str(error)}
    except BaseException as error:
        traceback.print_exc()
        return {"status": f"failed: {type(error).__name__}: {error}"[:300]}


def main(descriptor: int, name: str, options: str) -> None:
    """Serve the conductor until it hangs up."""
    os.set_inheritable(descriptor, False)
    conductor = socket.socket(fileno=descriptor)
    pool = adapter(name, json.loads(options))
    with conductor.makefile("r") as lines:
        for line in lines:
            command = json.loads(line)
            answer = perform(pool, name, command)
            sys.stdout.flush()
            conductor.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)
