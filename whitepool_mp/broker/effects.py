"""What the broker wants done, as values: the output of `Broker.step`.

Effects are performed in the order given. As with events, tell them apart by type: named tuples
compare as tuples, and `Drained()` is falsy.
"""

from __future__ import annotations

from whitepool_mp.records import Record

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Literal

    Why = Literal["full", "closed", "timeout", "factory_failed", "cancelled"]
    ReportKind = Literal["start_failed", "backing_off", "recovered", "crashed", "stop_overrun"]
else:
    Why = ReportKind = str

__all__ = [
    "Drained",
    "Effect",
    "Grant",
    "Kill",
    "Recall",
    "Refuse",
    "Report",
    "ReportKind",
    "Retire",
    "Spawn",
    "Why",
]


class Spawn(Record):
    """Start a process for this worker, and answer with ready, failed or exited.

    Args:
        worker: its number, never used before.
        slot: its place among the living, 0 <= slot < limit; a replacement inherits it.
        max_calls, max_rss: after how many calls, and from how many bytes of resident memory, it is
            worn; 0 for never.
    """

    worker: int
    slot: int
    max_calls: int = 0
    max_rss: int = 0


class Grant(Record):
    """Hand this worker to the client that holds this ticket.

    Args:
        client: who asked.
        ticket: the client's number for the checkout.
        lease: a number never used before.
        worker: the worker.
        keep: the client may keep the lease between calls, until it is recalled. Otherwise it checks
            in after its call.
    """

    client: int
    ticket: int
    lease: int
    worker: int
    keep: bool = False


class Recall(Record):
    """Have this worker release this kept lease as soon as it is not in the middle of a call.

    It is said once of a lease. `Released` answers it, after a `Busy` if a call is running. If no
    call has begun under the lease the answer is `Busy`, and its holder checks it in after the first
    one: it is not to be revoked before that.

    Args:
        worker: the worker.
        lease: the lease.
        patient: not before it has done all that it has been sent.
    """

    worker: int
    lease: int
    patient: bool = False


class Refuse(Record):
    """Tell a client that this ticket gets no worker.

    Args:
        client: who asked.
        ticket: the client's number for the checkout.
        why: "full" (would not block), "closed" (draining or terminated), "timeout" (its deadline
            had passed when its turn came), "factory_failed" (no live worker could serve it and
            starts fail) or "cancelled" (the answer to a `Cancel`).
        detail: for "factory_failed" the reason of the failed start, the remote traceback.
    """

    client: int
    ticket: int
    why: Why
    detail: str


class Retire(Record):
    """Ask this worker to stop cleanly; `Kill` follows if it takes longer than stop_timeout."""

    worker: int


class Kill(Record):
    """Kill this worker and all its descendants, now."""

    worker: int
    reason: str


class Report(Record):
    """Something for the log; nothing has to be done about it.

    Args:
        what: "start_failed", "backing_off", "recovered", "crashed" or "stop_overrun".
        worker: the worker it is about, or None if it is about the pool.
        detail: the reason in words.
    """

    what: ReportKind
    worker: int | None
    detail: str


class Drained(Record):
    """The pool is closed and no worker of any state is left; emitted exactly once."""


Effect = Spawn | Grant | Recall | Refuse | Retire | Kill | Report | Drained
