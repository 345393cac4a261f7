"""The records the broker keeps: a worker, and a waiter."""

from __future__ import annotations

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Final

__all__ = ["BOOTING", "IDLE", "KILLED", "LEASED", "RETIRING", "Waiter", "Worker", "WorkerState"]


class WorkerState:
    """Where a worker is in its life. The first three count against the limit (are "alive").

    There is one object for each state, as in an enum, but without importing `enum`: that takes as
    long as all of the broker.
    """

    __slots__ = ("value",)

    BOOTING: WorkerState
    IDLE: WorkerState
    LEASED: WorkerState
    RETIRING: WorkerState
    KILLED: WorkerState

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"WorkerState.{self.value.upper()}"


for _name in ("booting", "idle", "leased", "retiring", "killed"):
    setattr(WorkerState, _name.upper(), WorkerState(_name))

# Plain module globals: looking one up on its class costs more than the comparison.
BOOTING: Final = WorkerState.BOOTING
IDLE: Final = WorkerState.IDLE
LEASED: Final = WorkerState.LEASED
RETIRING: Final = WorkerState.RETIRING
KILLED: Final = WorkerState.KILLED


class Worker:
    """One worker process, from its `Spawn` until its exit. For others than the broker: read only.

    Attributes:
        id: its number.
        slot: its place among the living; after it stops being alive, the place it had.
        state: where it is in its life.
        born: when it was spawned, in seconds.
        since: when it entered its state, in seconds.
        lease: the lease it is under, or None.
        client: who holds that lease, or None.
        ticket: the checkout that the lease answered, or None.
        leases_served: how often it was granted.
        for_jobs: whether that lease was asked for to be kept: the client's part of the pool, and
            not its user, decides when it ends.
        kept: whether that lease is kept between calls.
        spare_own: whether it was asked for in that way, by a client with jobs queued behind it.
        recalled: whether that lease is kept and was recalled.
        coming: whether it was recalled and is, for all that is known, free to be released.
        wave: which round of starts it belongs to; failures of one round count as one.
        worn: whether it has served for long enough, and retires as soon as nobody has it.
    """

    __slots__ = (
        "born",
        "client",
        "coming",
        "for_jobs",
        "id",
        "kept",
        "lease",
        "leases_served",
        "recalled",
        "since",
        "slot",
        "spare_own",
        "state",
        "ticket",
        "wave",
        "worn",
    )

    def __init__(self, number: int, slot: int, now: float, wave: int) -> None:
        self.id = number
        self.slot = slot
        self.state = BOOTING
        self.born = now
        self.since = now
        self.lease: int | None = None
        self.client: int | None = None
        self.ticket: int | None = None
        self.leases_served = 0
        self.for_jobs = False
        self.kept = False
        self.spare_own = False
        self.recalled = False
        self.coming = False
        self.wave = wave
        self.worn = False

    @property
    def alive(self) -> bool:
        """Whether it counts against the limit: booting, idle or leased."""
        state = self.state
        return state is BOOTING or state is IDLE or state is LEASED

    def __repr__(self) -> str:
        lease = "" if self.lease is None else f" lease={self.lease} client={self.client}"
        return f"<Worker {self.id} slot={self.slot} {self.state.value}{lease}>"


class Waiter:
    """One checkout that waits for a worker.

    Attributes:
        client: who asked.
        ticket: the client's number for this checkout.
        block: whether it may wait for a checkin, and not for a start or a recall alone.
        deadline: when it stops waiting, in seconds; infinity for never.
        keep: whether it would keep its lease between calls.
        spare_own: whether kept leases of its own client are not to be recalled for it.
    """

    __slots__ = ("block", "client", "deadline", "keep", "spare_own", "ticket")

    def __init__(
        self,
        client: int,
        ticket: int,
        block: bool,
        deadline: float,
        keep: bool = False,
        spare_own: bool = False,
    ) -> None:
        self.client = client
        self.ticket = ticket
        self.block = block
        self.deadline = deadline
        self.keep = keep
        self.spare_own = spare_own

    def __repr__(self) -> str:
        return f"<Waiter client={self.client} ticket={self.ticket} deadline={self.deadline}>"
