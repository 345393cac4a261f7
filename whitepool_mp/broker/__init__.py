"""The pure core of a pool: a state machine from events to effects, without any I/O.

    broker = Broker(policy)
    effects = broker.step(Checkout(client=1, ticket=1, block=True, deadline=None), now)

It imports nothing but its own modules, the policy and records; a test says so. `core` holds the
rules.
"""

from __future__ import annotations

from whitepool_mp.broker.backoff import Backoff
from whitepool_mp.broker.core import Broker
from whitepool_mp.broker.effects import (
    Drained,
    Effect,
    Grant,
    Kill,
    Recall,
    Refuse,
    Report,
    ReportKind,
    Retire,
    Spawn,
    Why,
)
from whitepool_mp.broker.errors import BrokerError
from whitepool_mp.broker.events import (
    Busy,
    Cancel,
    Checkin,
    Checkout,
    ClientGone,
    Destroy,
    Drain,
    Event,
    Finished,
    Released,
    Resize,
    Resume,
    Resumed,
    Start,
    Terminate,
    Tick,
    Unfinished,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
)
from whitepool_mp.broker.state import Waiter, Worker, WorkerState
from whitepool_mp.broker.status import BrokerStatus

__all__ = [
    "Backoff",
    "Broker",
    "BrokerError",
    "BrokerStatus",
    "Busy",
    "Cancel",
    "Checkin",
    "Checkout",
    "ClientGone",
    "Destroy",
    "Drain",
    "Drained",
    "Effect",
    "Event",
    "Finished",
    "Grant",
    "Kill",
    "Recall",
    "Refuse",
    "Released",
    "Report",
    "ReportKind",
    "Resize",
    "Resume",
    "Resumed",
    "Retire",
    "Spawn",
    "Start",
    "Terminate",
    "Tick",
    "Unfinished",
    "Waiter",
    "Why",
    "Worker",
    "WorkerExited",
    "WorkerFailed",
    "WorkerReady",
    "WorkerState",
]
