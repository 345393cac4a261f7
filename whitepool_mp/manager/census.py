"""A record for each worker: the broker's facts, the holder's, and what psutil measures now."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil

from whitepool_mp.broker.state import Worker
from whitepool_mp.manager.clients import Client


def describe(
    worker: Worker, hand: Any, holder: Client | None, site: str, now: float
) -> dict[str, Any]:
    """One worker as plain data; times in seconds, memory in bytes.

    Args:
        worker: the broker's record.
        hand: the crew's record.
        holder: who leases it, if anybody does.
        site: the line of the holder's code that asked for it.
        now: the monotonic clock.
    """
    state = worker.state.value
    if worker.kept and not hand.page.busy():
        state, holder = "idle", None  # it is anyone's for the asking
    row: dict[str, Any] = {
        "pid": hand.pid,
        "slot": worker.slot,
        "state": state,
        "age": now - hand.born,
        "since": now - worker.since,
        "calls": hand.page.calls,
        "leases": worker.leases_served,
        "rss": None,
        "cpu_time": None,
        "created": None,
        "lease": worker.lease if state != "idle" else None,
        "holder_pid": holder.pid if holder else None,
        "holder_thread": holder.thread if holder else None,
        "site": site if holder else None,
    }
    if hand.pid is not None:
        with contextlib.suppress(psutil.Error, OSError):
            if hand.process is None:
                hand.process = psutil.Process(hand.pid)
            process = hand.process
            with process.oneshot():
                cpu = process.cpu_times()
                row["rss"] = process.memory_info().rss
                row["cpu_time"] = cpu.user + cpu.system
                row["created"] = process.create_time()
    return row
