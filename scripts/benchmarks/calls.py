"""The rows about calls: round trips, throughput, jobs that take time, payloads."""

from __future__ import annotations

from benchmarks.cast import (
    BYTES,
    FORK,
    INTERPRETERS,
    LEASE,
    OURS,
    PEERS,
    PIPE,
    RATES,
    RUN,
    SLEEPS,
    SPAWN,
    TRIPS,
    floor,
    ours,
    peers,
)
from benchmarks.model import BEST_PEER, Entry, Goal, Row


def trips() -> list[Row]:
    """One call at a time."""
    return [
        Row(
            "run",
            1,
            "`run` of a no-op, there and back",
            "µs",
            "lower",
            TRIPS,
            "measures.round_trip",
            [ours(RUN), floor(PIPE, "pipe"), *peers()],
            [Goal("times", 1.6, PIPE), Goal("ahead", 5, SPAWN)],
            count=(20, 4000),
            seconds=0.15,
        ),
        Row(
            "lease",
            2,
            "`lease.call` of a no-op, there and back",
            "µs",
            "lower",
            TRIPS,
            "measures.round_trip",
            [ours(LEASE, measure="measures.lease_call"), floor(PIPE, "pipe"), ours(RUN)],
            [Goal("times", 1.2, PIPE)],
            count=(20, 4000),
            seconds=0.15,
        ),
    ]


def rates() -> list[Row]:
    """Many calls at once."""
    whole = {"parts": None}
    chunks = {"parts": 8}
    return [
        Row(
            "submit",
            3,
            "`submit` many no-ops, then take all results",
            "thousand/s",
            "higher",
            RATES,
            "measures.many",
            [ours(), *peers()],
            [Goal("ahead", 3, BEST_PEER), Goal("ahead", 7, SPAWN)],
            count=(200, 20_000),
            seconds=0.3,
        ),
        Row(
            "submit-script",
            3,
            "`submit` many no-ops that no module holds",
            "thousand/s",
            "higher",
            RATES,
            "measures.many_by_value",
            [
                ours(),
                ours(f"{OURS}, a module's", measure="measures.many"),
                *peers(
                    "ppe-spawn",
                    "ppe-fork",
                    "interpreters",
                    "mp-pool",
                    "billiard",
                    "pebble",
                    "mpire",
                ),
            ],
            [Goal("ahead", 1, BEST_PEER)],
            count=(200, 20_000),
            seconds=0.3,
            note="A function of the script, a lambda, a local one: it is pickled by value. Of the "
            "peers those that can, and the row before for comparison.",
        ),
        Row(
            "map",
            4,
            "ordered `map` of no-ops",
            "thousand/s",
            "higher",
            RATES,
            "measures.map_noops",
            [
                ours(),
                *peers("mp-pool", "billiard", "mpire", "ray"),
                *(
                    Entry(f"{label}, 8 chunks", PEERS[label], params=chunks)
                    for label in (SPAWN, FORK, INTERPRETERS, "loky", "pebble.ProcessPool")
                ),
                *peers("ppe-spawn", "ppe-fork", "interpreters", "loky", "pebble"),
            ],
            [Goal("ahead", 1, BEST_PEER)],
            params=whole,
            count=(400, 100_000),
            seconds=0.3,
            note="`abs` of a range. Each peer with its own default chunks (one item for the "
            "executors and pebble), and those also with what their documentation advises for many "
            "small items: length / (4 x workers). Ray's map is `ActorPool.map`.",
            log=True,
        ),
        Row(
            "asyncio",
            12,
            "1,000 no-ops awaited at once in asyncio",
            "thousand/s",
            "higher",
            RATES,
            "measures.gather",
            [ours(), *peers("mp-pool", "billiard", "mpire")],
            [Goal("ahead", 3, SPAWN)],
            params={"count": 1000},
            note="Executors by `loop.run_in_executor`, pebble by `asyncio.wrap_future`, Ray's "
            "references awaited; the others have no asyncio interface.",
        ),
    ]


def sleeps() -> list[Row]:
    """Jobs that take time: how well a map keeps two workers busy."""
    loop = "no pool: one worker's share in a loop"
    equal = [Goal("bound", 0.97), Goal("ahead", 0.97, loop)]
    share = "of the ideal"
    return [
        *(
            Row(
                f"sleep-{milliseconds}ms",
                5,
                f"`map` of {count} jobs of {milliseconds} ms",
                share,
                "higher",
                SLEEPS,
                "measures.map_sleeps",
                [ours(), floor(loop, "loop"), *peers()],
                equal,
                params={"seconds": milliseconds / 1e3, "count": count},
                rounds=7,
                quick=False,
                note="Jobs that take exactly as long as they are told: asleep, but for the last "
                "0.4 ms, in which they watch the clock. The loop without a pool shows what is left "
                "of the ideal on this machine.",
            )
            for milliseconds, count in ((1, 600), (10, 80))
        ),
        Row(
            "sleep-tail",
            5,
            "`map` of 500 jobs with a heavy tail",
            share,
            "higher",
            SLEEPS,
            "measures.map_tail",
            [ours(), *peers()],
            [Goal("ahead", 1, BEST_PEER)],
            params={"count": 500},
            rounds=7,
            note="Such jobs, their lengths drawn from a Pareto distribution (mean about 2 ms, at "
            "most 200 ms, fixed seed), the same list for everybody in the order drawn, "
            "default chunks.",
        ),
    ]


def payloads() -> list[Row]:
    """Bytes there and back."""
    socket = "raw socket pair"
    return [
        Row(
            "array",
            6,
            "a 64 MiB numpy array there and back",
            "MB/s",
            "higher",
            BYTES,
            "measures.array",
            [ours(), floor(socket, "socket"), *peers("interpreters")],
            [Goal("ahead", 8, SPAWN), Goal("ahead", 0.9, socket)],
            params={"mebibytes": 64},
            count=(1, 5),
            seconds=0.4,
            rounds=7,
            note="Both directions counted. The socket pair receives into memory that is there "
            "already; what comes back from Ray is read-only, in shared memory.",
        ),
        *(
            Row(
                f"bytes-{name}",
                7,
                f"{title} of bytes there and back",
                "µs",
                "lower",
                BYTES,
                "measures.payload",
                [ours(), floor(PIPE, "pipe"), *peers()],
                [Goal("ahead", 1, BEST_PEER)],
                params={"size": size},
                count=(10, 2000),
                seconds=0.12,
                quick=name == "1k",
            )
            for name, title, size in (
                ("1k", "1 KiB", 2**10),
                ("64k", "64 KiB", 2**16),
                ("1m", "1 MiB", 2**20),
            )
        ),
    ]
