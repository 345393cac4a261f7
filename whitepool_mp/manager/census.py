"""The pool as it is now, for whoever asks: in numbers, and worker by worker.

The facts are the broker's, the crew's and the clients'; nothing is written down here. To all who
look, a worker under a kept lease is idle while nothing runs there: it is anyone's for the asking.
"""

from __future__ import annotations

import contextlib

from whitepool_mp.broker import WorkerState
from whitepool_mp.errors import headline
from whitepool_mp.wire import frames

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from whitepool_mp.broker import Broker
    from whitepool_mp.broker.state import Worker
    from whitepool_mp.broker.status import BrokerStatus
    from whitepool_mp.manager.books import Books
    from whitepool_mp.manager.clients import Door
    from whitepool_mp.manager.core import Workers


class Census:
    """What can be told of a pool.

    Args:
        broker, crew, door, books: who know.
        sites: the line that checked each leased worker out.
        clock: the monotonic clock, in seconds.
    """

    def __init__(
        self,
        broker: Broker,
        crew: Workers,
        door: Door,
        books: Books,
        sites: dict[int, str],
        clock: Callable[[], float],
    ) -> None:
        self._broker = broker
        self._crew = crew
        self._door = door
        self._books = books
        self._sites = sites
        self._clock = clock

    def status(self) -> dict[str, Any]:
        """The counts, as plain data."""
        status = self._counts()
        return {
            "pool_size": status.pool_size,
            "max_overflow": status.max_overflow,
            "booting": status.booting,
            "idle": status.idle,
            "leased": status.leased,
            "retiring": status.retiring,
            "waiting": status.waiting,
            "overflow": status.overflow,
            "state": status.state,
            "draining": status.draining,
            "failing": status.failing,
            "last_failure": status.last_failure,
            "counters": {
                **status.counters,
                **self._door.counters,
                **self._crew.counters,
                "managers_lost": self._books.generation - 1,
            },
        }

    def summary(self) -> str:
        """The counts, for an error message."""
        status = self._counts()
        text = (
            f"size={status.pool_size}+{status.max_overflow} idle={status.idle} "
            f"leased={status.leased} booting={status.booting} waiting={status.waiting}"
        )
        if status.failing and status.last_failure:
            text += f"; the last start failed: {headline(status.last_failure)}"
        return text

    def _counts(self) -> BrokerStatus:
        status = self._broker.status()
        hands = (self._crew.hand(worker.id) for worker in self._broker.kept_workers())
        free = sum(hand is not None and not hand.page.busy() for hand in hands)
        return status._replace(idle=status.idle + free, leased=status.leased - free)

    def workers(self) -> list[dict[str, Any]]:
        """A record of each worker, as plain data; times in seconds, memory in bytes."""
        now = self._clock()
        return [self._describe(worker, hand, now) for worker, hand in self._at_hand()]

    def states(self) -> dict[int, dict[str, Any]]:
        """By worker: its process, its slot and its state."""
        return {
            worker.id: {"pid": hand.pid, "slot": worker.slot, "state": _state(worker, hand)}
            for worker, hand in self._at_hand()
        }

    def busy(self) -> list[tuple[Worker, int | None]]:
        """The leased workers under whose leases something may run, and their pids."""
        return [
            (worker, hand.pid)
            for worker, hand in self._at_hand()
            if worker.state is WorkerState.LEASED and _state(worker, hand) != "idle"
        ]

    def _at_hand(self) -> list[tuple[Worker, Any]]:
        """The workers that have a process, or are about to: the broker's and the crew's record."""
        both = ((worker, self._crew.hand(worker.id)) for worker in self._broker.workers())
        return [(worker, hand) for worker, hand in both if hand is not None]

    def _describe(self, worker: Worker, hand: Any, now: float) -> dict[str, Any]:
        state = _state(worker, hand)
        client = worker.client if state != "idle" else None
        holder = self._door.clients.get(client) if client else None
        site, thread = frames.site_and_thread(self._sites.get(worker.id, ""))
        return {
            "pid": hand.pid,
            "slot": worker.slot,
            "state": state,
            "age": now - hand.born,
            "since": now - worker.since,
            "calls": hand.page.calls,
            "leases": worker.leases_served,
            "lease": worker.lease if state != "idle" else None,
            "holder_pid": holder.pid if holder else None,
            "holder_thread": (thread or holder.thread) if holder else None,
            "site": site if holder else None,
            **_measure(hand),
        }


def _state(worker: Worker, hand: Any) -> str:
    return "idle" if worker.kept and not hand.page.busy() else worker.state.value


def _measure(hand: Any) -> dict[str, Any]:
    """What psutil measures of a process now; None for what cannot be measured."""
    row: dict[str, Any] = {"rss": None, "cpu_time": None, "created": None}
    if hand.pid is not None:
        import psutil

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
