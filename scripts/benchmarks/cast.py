"""Who takes part, by the names in the report, and the groups that the report is in."""

from __future__ import annotations

from typing import Any

from benchmarks.model import Entry

OURS = "whitepool_mp"
PIPE = "bare Pipe echo"
SPAWN = "ProcessPoolExecutor (spawn)"
FORK = "ProcessPoolExecutor (fork)"
INTERPRETERS = "InterpreterPoolExecutor"
RUN = "whitepool_mp run"
SUBMIT = "whitepool_mp submit"
LEASE = "whitepool_mp lease.call"

PEERS = {
    SPAWN: "ppe-spawn",
    FORK: "ppe-fork",
    INTERPRETERS: "interpreters",
    "loky": "loky",
    "multiprocessing.Pool": "mp-pool",
    "billiard.Pool": "billiard",
    "pebble.ProcessPool": "pebble",
    "mpire.WorkerPool": "mpire",
    "Ray actors": "ray",
}

TRIPS = "Round trips"
RATES = "Throughput"
SLEEPS = "Jobs that take time"
BYTES = "Payloads"
START = "Starting"
DEATHS = "After a kill"
CROWD = "In a crowd"
BURSTS = "Bursts"
IDLE = "At rest"


def peers(*without: str, **options: Any) -> list[Entry]:
    """An entry for each peer."""
    return [
        Entry(label, name, options=dict(options))
        for label, name in PEERS.items()
        if name not in without
    ]


def ours(label: str = OURS, **values: Any) -> Entry:
    """An entry of this pool."""
    return Entry(label, "whitepool", "ours", **values)


def floor(label: str, contestant: str, **values: Any) -> Entry:
    """An entry of something that is no pool."""
    return Entry(label, contestant, "floor", **values)
