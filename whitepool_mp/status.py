"""What a pool tells of itself: its counts, and a record of each worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from whitepool_mp.config import MAX_WORKERS
from whitepool_mp.wire import payload


@dataclass(frozen=True, slots=True)
class Status:
    """A pool's counts at one moment.

    Attributes:
        name: the pool's name.
        pool_size: how many workers it keeps.
        max_overflow: how many more it starts when they are all leased.
        state: "ready" (a worker is free or pool_size is not reached), "overflow" (all of pool_size
            leased, more may start) or "full" (a non-blocking checkout would be refused).
        available: workers with nothing to do, anyone's for the asking.
        overflow: living workers above pool_size.
        leased: workers somebody holds, or that run somebody's job.
        waiting: checkouts in the queue. Jobs that one client has queued ask together, for no more
            workers than there are.
        booting: workers that are being started.
        retiring: workers on their way out.
        draining: whether the pool is shutting down.
        failing: whether workers fail to start, so that starts are tried one at a time, ever later.
        last_failure: the last failed start's reason, or None.
        counters: what happened so far, by name.
    """

    name: str
    pool_size: int
    max_overflow: int
    state: str
    available: int
    overflow: int
    leased: int
    waiting: int
    booting: int
    retiring: int
    draining: bool
    failing: bool
    last_failure: str | None
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One worker at one moment; times in seconds, memory in bytes.

    Attributes:
        pid: process id, None before it has one.
        slot: its slot.
        state: "booting", "idle", "leased", "retiring" or "killed".
        age: since its start was ordered.
        since: how long it has been in this state.
        calls: calls it has begun.
        leases: how often it was leased; a client that runs job after job leases it once.
        rss: resident memory, None if it cannot be measured.
        cpu_time: user and system time it has used.
        created: its creation time as psutil gives it; with pid, its identity.
        lease: the current lease's id.
        holder_pid: the process that holds it.
        holder_thread: the name of the thread that checked it out there.
        site: the line that checked it out, "file.py:12"; of a client that runs job after job, the
            one that came first.
    """

    pid: int | None
    slot: int
    state: str
    age: float
    since: float
    calls: int
    leases: int
    rss: int | None
    cpu_time: float | None
    created: float | None
    lease: int | None
    holder_pid: int | None
    holder_thread: str | None
    site: str | None


@dataclass(frozen=True, slots=True)
class WorkerStack:
    """What one worker was doing at one moment.

    Attributes:
        pid: process id, None before it has one.
        slot: its slot.
        state: "booting", "idle", "leased", "retiring" or "killed"; "stopped" if the process is
            (SIGSTOP, a debugger), whatever else it is.
        answered: whether it told its stack.
        stack: the Python stack of each of its threads, most recent call first, as faulthandler
            writes it, without the frames that every worker has; if it did not answer, why, in
            parentheses.
    """

    pid: int | None
    slot: int
    state: str
    answered: bool
    stack: str


def make_status(name: str, answer: dict[str, Any]) -> Status:
    """A `Status` from the manager's answer."""
    answer["available"] = answer.pop("idle")
    return Status(name=name, **answer)


def statistics(status: Status, workers: list[WorkerInfo]) -> str:
    """The text of `print_statistics`."""
    lines = [
        f"<Pool {status.name!r} size={status.pool_size}+{status.max_overflow} "
        f"idle={status.available} leased={status.leased} waiting={status.waiting} "
        f"booting={status.booting} retiring={status.retiring} {status.state}>"
    ]
    for row in sorted(workers, key=lambda row: (row.slot, row.age)):
        memory = "?" if row.rss is None else f"{row.rss / 2**20:.1f}"
        cpu = "?" if row.cpu_time is None else f"{row.cpu_time:.2f}"
        held = f" held by {row.holder_pid} at {row.site}" if row.holder_pid else ""
        lines.append(
            f"  slot {row.slot}: pid {row.pid} {row.state} for {row.since:.1f} s, "
            f"{row.calls} calls, {memory} MiB, cpu {cpu} s{held}"
        )
    return "\n".join(lines)


def check_sizes(pool_size: int | None, max_overflow: int | None, now: Status) -> tuple[int, int]:
    """The sizes a resize asks for.

    Raises:
        TypeError, ValueError: they are impossible.
    """
    result = []
    for name, value, present, least in (
        ("pool_size", pool_size, now.pool_size, 1),
        ("max_overflow", max_overflow, now.max_overflow, 0),
    ):
        given = present if value is None else value
        if isinstance(given, bool) or not isinstance(given, int):
            raise TypeError(f"{name}: got {payload.shorten(given)}; allowed: an int >= {least}")
        if given < least or given > MAX_WORKERS:
            raise ValueError(f"{name}: got {given}; allowed: {least} to {MAX_WORKERS}")
        result.append(given)
    if sum(result) > MAX_WORKERS:
        raise ValueError(
            f"pool_size + max_overflow: got {result[0]} + {result[1]}; "
            f"allowed: at most {MAX_WORKERS} together"
        )
    return result[0], result[1]
