"""The rows about the pool itself: starting, after a kill, in a crowd, in a burst, at rest."""

from __future__ import annotations

from typing import Any, Literal

from benchmarks.cast import (
    BURSTS,
    CROWD,
    DEATHS,
    FORK,
    IDLE,
    RUN,
    SPAWN,
    START,
    SUBMIT,
    floor,
    ours,
    peers,
)
from benchmarks.model import Goal, Row


def starts() -> list[Row]:
    """From nothing to a first result."""
    loky = {"start_method": "loky"}
    fresh: Literal["sample"] = "sample"
    return [
        Row(
            "first",
            8,
            "constructor to first result",
            "ms",
            "lower",
            START,
            "measures.first_result",
            [ours(), ours("whitepool_mp (loky)", options=loky), *peers()],
            [Goal("times", 0.7, SPAWN), Goal("times", 0.7, SPAWN, "whitepool_mp (loky)")],
            note="Each in a fresh interpreter, after the import. ProcessPoolExecutor starts its "
            "workers on demand, so its first result waits for one worker, not for two.",
            rounds=9,
            seat=fresh,
            limit=60,
        ),
        Row(
            "import",
            8,
            "importing it",
            "ms",
            "lower",
            START,
            "measures.import_time",
            [ours(), *peers("ppe-fork")],
            note="In a fresh interpreter that has imported no more than `json` and `socket`.",
            rounds=7,
            seat=fresh,
            limit=60,
            quick=False,
        ),
    ]


def deaths() -> list[Row]:
    """What a worker killed with SIGKILL costs."""
    one: dict[str, Any] = {"workers": 1}
    heavy: dict[str, Any] = {"workers": 1, "imports": "numpy"}
    both: Literal["row"] = "row"
    return [
        Row(
            "replacement",
            9,
            "the only worker killed, until a replacement has answered",
            "ms",
            "lower",
            DEATHS,
            "recovery.replacement",
            [ours(options=one), *peers("interpreters", **one)],
            [Goal("bound", 10)],
            limit=4,
            log=True,
        ),
        Row(
            "replacement-numpy",
            9,
            "the same, with workers that import numpy",
            "ms",
            "lower",
            DEATHS,
            "recovery.replacement",
            [
                ours("whitepool_mp (preload)", options={**heavy, "preload": True}),
                ours("whitepool_mp (no preload)", options=heavy),
                *peers("interpreters", **heavy),
            ],
            [Goal("bound", 10)],
            limit=4,
            quick=False,
            note="Imported by the factory or the initializer; preloaded as well where it says so.",
            log=True,
        ),
        Row(
            "sibling",
            10,
            "one of two idle workers killed, until the next good result",
            "µs",
            "lower",
            DEATHS,
            "recovery.next_good",
            [
                ours(),
                floor("whitepool_mp, nobody killed", "whitepool", measure="recovery.ordinary"),
                *peers("interpreters"),
            ],
            [Goal("times", 2, "whitepool_mp, nobody killed")],
            note="A call at once after the kill of the worker that was used last, both having been "
            "used by two threads. A Ray actor is an address: nobody else answers for it.",
            seat=both,
            limit=4,
            log=True,
        ),
    ]


def crowd() -> list[Row]:
    """Checkouts under load: ours alone."""
    small, large = "2 workers, 1 client", "200 workers, 500 threads, 10,000 waiters"
    many = {"threads": 500, "waiters": 10_000, "each": 20}
    big = {"workers": 200}
    real = [
        Row(
            f"crowd-{what}",
            11,
            f"checkout and checkin, {title}",
            "µs",
            "lower",
            CROWD,
            "crowd.crowded",
            [
                ours(large, options=big, params=many),
                floor(small, "whitepool", measure="crowd.alone", params={"count": 2000}),
            ],
            [Goal("times", 1.5, small)],
            params={"what": what},
            rounds=3,
            note="In the running pool, no call made. In the crowd the clients are one process, "
            "whose threads share one interpreter.",
            seat="row",
            limit=120,
            quick=False,
        )
        for what, title in (("manager", "the manager's CPU time"), ("wall", "elapsed time"))
    ]
    return [
        *real,
        Row(
            "crowd-core",
            11,
            "checkout and checkin in the broker alone",
            "µs",
            "lower",
            CROWD,
            "crowd.core",
            [
                ours(large, params={"workers": 200, "clients": 500, "waiters": 10_000}),
                floor(small, "whitepool", params={"workers": 2, "clients": 1, "waiters": 0}),
            ],
            [Goal("times", 1.5, small)],
            params={"count": 20_000},
            quick=False,
            note="The pure state machine with workers that are numbers.",
        ),
    ]


def bursts() -> list[Row]:
    """Many who want one call each at the same moment."""
    others = ("loky", "mp-pool", "billiard", "pebble", "mpire", "ray")
    ahead = [Goal("ahead", 1, SPAWN), Goal("ahead", 1, FORK)]
    return [
        *(
            Row(
                f"burst-{count}",
                15,
                f"{count:,} threads that each `run` a no-op at once",
                "ms",
                "lower",
                BURSTS,
                "bursts.threads",
                [ours(RUN), ours(SUBMIT, params={"way": "submit"}), *peers(*others)],
                [*ahead, Goal("times", 1.5, SUBMIT)],
                params={"count": count},
                limit=60,
                quick=count <= 400,
                note="The threads wait at a gate; from its opening to the last answer. `submit` "
                "and the executors: each thread submits its call and waits for the future.",
                log=True,
            )
            for count in (40, 400, 2000)
        ),
        Row(
            "burst-asyncio",
            15,
            "2,000 tasks that each await `run` of a no-op at once",
            "ms",
            "lower",
            BURSTS,
            "bursts.tasks",
            [ours(), *peers(*others)],
            ahead,
            params={"count": 2000},
            limit=60,
            note="Executors by `loop.run_in_executor`.",
            log=True,
        ),
    ]


def rest() -> list[Row]:
    """What a pool costs that does nothing."""
    own: Literal["row"] = "row"
    return [
        Row(
            "memory-manager",
            13,
            "memory of the manager process (unique set size)",
            "MB",
            "lower",
            IDLE,
            "footprint.memory",
            [ours(params={"whose": "manager"})],
            [Goal("bound", 15)],
            rounds=3,
            note="No peer has such a process; theirs are threads of the caller (Ray has daemons).",
            seat=own,
        ),
        Row(
            "memory-worker",
            13,
            "memory of a worker (unique set size)",
            "MB",
            "lower",
            IDLE,
            "footprint.memory",
            [
                ours(),
                ours("whitepool_mp (loky)", options={"start_method": "loky"}),
                *peers("interpreters"),
            ],
            [Goal("bound", 4)],
            params={"whose": "worker"},
            rounds=3,
            note="The larger one, after a few no-ops whose module imports nothing. Workers forked "
            "from the caller share its memory until they write to it; ours share that of the "
            "process they are forked from, the first one less of it (docs/design.md).",
            seat=own,
        ),
        *(
            Row(
                f"idle-{what}",
                14,
                title,
                unit,
                "lower",
                IDLE,
                "idle",
                [ours(), *peers()],
                [Goal("bound", 0)],
                params={"what": what, "seconds": 3},
                rounds=3,
                note="All processes of the contestant, the caller's among them.",
                seat=own,
                quick=what == "switches",
            )
            for what, title, unit in (
                ("switches", "context switches of an idle pool", "per second"),
                ("cpu", "CPU time of an idle pool", "ms per second"),
            )
        ),
    ]
