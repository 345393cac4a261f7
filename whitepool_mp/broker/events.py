"""What can happen to a pool, as values: the input of `Broker.step`.

Clients, tickets, leases and workers are plain integers. A client is one control connection; a
ticket numbers one checkout of one client and is chosen by it; leases and workers are numbered by
the broker, and only ever upwards. Deadlines are absolute, in seconds, on the clock of `now`.

Named tuples are the cheapest immutable record, and compare as tuples: `WorkerReady(1)` equals
`ClientGone(1)`, and an event without fields is falsy. Tell events apart by type, as the broker
does.
"""

from __future__ import annotations

from whitepool_mp.records import Record

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from whitepool_mp.broker.state import WorkerState

__all__ = [
    "Busy",
    "Cancel",
    "Checkin",
    "Checkout",
    "ClientGone",
    "Destroy",
    "Drain",
    "Event",
    "Finished",
    "Released",
    "Resize",
    "Resume",
    "Resumed",
    "Start",
    "Terminate",
    "Tick",
    "Unfinished",
    "WorkerExited",
    "WorkerFailed",
    "WorkerReady",
]


class Start(Record):
    """The first event, once: start `pool_size` workers."""


class Resumed(Record):
    """A worker that another broker had, as far as it is known; as in `state.Worker`."""

    id: int
    slot: int
    state: WorkerState
    born: float
    since: float
    leases_served: int = 0
    lease: int | None = None
    client: int | None = None
    ticket: int | None = None
    kept: bool = False
    spare_own: bool = False


class Resume(Record):
    """The first event, instead of `Start`, once: go on where another broker stopped.

    Those whose process has ended meanwhile are among the workers; their `WorkerExited` comes next.
    Whoever waited asks again.

    Args:
        workers: all whose exit was not reported to the other one.
        pool_size, max_overflow: the sizes in force.
        last_worker, last_lease: the last numbers that it gave.
    """

    workers: tuple[Resumed, ...]
    pool_size: int
    max_overflow: int
    last_worker: int
    last_lease: int


class Checkout(Record):
    """A client asks for a worker. Asked twice, it is told twice what it was granted.

    Args:
        client: who asks.
        ticket: the client's number for this checkout, unique among those it has open.
        block: wait for a checkin if need be. If false, wait for no more than a worker's start, or
            for a kept lease that is not in use.
        deadline: when the client stops waiting (seconds, absolute), or None for never.
        keep: the client would keep the lease from call to call, and agrees to have it recalled.
        spare_own: while it waits, recall none of this client's own leases for it.
    """

    client: int
    ticket: int
    block: bool
    deadline: float | None
    keep: bool = False
    spare_own: bool = False


class Cancel(Record):
    """A client gave up on a checkout; answered by exactly one `Refuse`, whatever became of it."""

    client: int
    ticket: int


class Checkin(Record):
    """A client gives a worker back, clean.

    Args:
        client, lease: who, and which.
        worn: whether it has served as many calls, or grown as large, as it may.
    """

    client: int
    lease: int
    worn: bool = False


class Destroy(Record):
    """A client gives a worker back as dirty: it is killed and replaced."""

    client: int
    lease: int
    reason: str


class WorkerReady(Record):
    """A worker's factory returned."""

    worker: int


class WorkerFailed(Record):
    """A worker's factory raised; its process still has to exit.

    For a worker that never had a process, `WorkerExited` alone says so.
    """

    worker: int
    reason: str


class Released(Record):
    """A worker refuses all further calls under a kept lease: the answer to a `Recall`.

    Args:
        worker, lease: which.
        worn: as in `Checkin`.
    """

    worker: int
    lease: int
    worn: bool = False


class ClientGone(Record):
    """A client's connection ended: it waits no more, and what it held is dirty, but for the leases
    of jobs under which nothing ran.

    Args:
        client: whose.
        released: its leases among `Broker.job_leases` under which no call runs or will begin.
    """

    client: int
    released: tuple[Released, ...] = ()


class Busy(Record):
    """A worker was in the middle of a call when its lease was recalled, and releases it after that.
    Or no call has begun under the lease: its holder gives it back after the first one."""

    worker: int
    lease: int


class WorkerExited(Record):
    """A worker's process is gone, or never was."""

    worker: int
    reason: str


class Tick(Record):
    """Time has passed `Broker.next_deadline()`. Harmless when it has not."""


class Resize(Record):
    """New bounds for the number of workers; the sum must be at least 1."""

    pool_size: int
    max_overflow: int


class Drain(Record):
    """Refuse new checkouts, serve those who wait, then stop every worker."""


class Unfinished(Record):
    """A client has jobs queued behind `spare_own` checkouts, of which a drain is to let it ask for
    more. Said before the `Drain`, or after it."""

    client: int


class Finished(Record):
    """A client with jobs queued has none left."""

    client: int


class Terminate(Record):
    """Refuse everybody and kill every worker, now."""


Event = (
    Start
    | Resume
    | Checkout
    | Cancel
    | Checkin
    | Destroy
    | ClientGone
    | WorkerReady
    | WorkerFailed
    | WorkerExited
    | Released
    | Busy
    | Tick
    | Resize
    | Drain
    | Unfinished
    | Finished
    | Terminate
)
