"""What a pool costs that does nothing: memory, wake-ups and CPU time."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import jobs
from benchmarks.adapter import Adapter, both_workers


def memory(pool: Adapter, whose: str) -> float:
    """Megabytes that would be free again if this process ended (unique set size).

    Args:
        pool: the contestant.
        whose: "worker" (the largest), or "manager" (our workers' parent).
    """
    import psutil

    for _ in range(10):
        pool.call(jobs.noop)
    pids = both_workers(pool)
    if whose == "manager":
        pids = {psutil.Process(pid).ppid() for pid in pids} - {os.getpid()}
    return max(psutil.Process(pid).memory_full_info().uss for pid in pids) / 1e6


def switches(pids: list[int]) -> int:
    """How often threads of these processes have been switched away from, so far."""
    return sum(
        int(line.split()[1])
        for text in _task_files(pids, "status")
        for line in text.splitlines()
        if "ctxt_switches" in line
    )


def cpu_seconds(pids: list[int]) -> float:
    """The CPU time of these processes so far, to the nanosecond."""
    return sum(int(text.split()[0]) for text in _task_files(pids, "schedstat")) / 1e9


def _task_files(pids: list[int], name: str) -> list[str]:
    found = []
    for pid in pids:
        for path in Path(f"/proc/{pid}/task").glob(f"*/{name}"):
            try:
                found.append(path.read_text())
            except OSError:
                continue  # that thread has just ended
    return found
