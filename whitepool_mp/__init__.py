"""whitepool_mp: a pool of operating-system processes that you check workers out of.

    from whitepool_mp import Pool

    with Pool(pool_size=4) as session:
        print(session.run(pow, 2, 100))

A crash costs one worker and the one call that was running; the worker is replaced at once. Names
are imported when they are first used, so `import whitepool_mp` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing `typing` takes longer than all the rest of this

if TYPE_CHECKING:
    from typing import Any

    from whitepool_mp.aio import AsyncSession
    from whitepool_mp.aio_lease import AsyncLease
    from whitepool_mp.errors import (
        AuthenticationFailed,
        CallTimeout,
        CheckoutTimeout,
        FactoryFailed,
        LeaseError,
        ManagerDied,
        PoolClosed,
        PoolFull,
        ProtocolError,
        RemoteError,
        RemoteTraceback,
        SerializationError,
        ShutdownIncomplete,
        ShutdownTimeout,
        WhitepoolError,
        WorkerDied,
    )
    from whitepool_mp.executor import Executor
    from whitepool_mp.lease import Lease
    from whitepool_mp.pool import Pool
    from whitepool_mp.session import Session
    from whitepool_mp.status import Status, WorkerInfo, WorkerStack
    from whitepool_mp.worker.context import WorkerContext, current_worker

__version__ = "0.1.0"

_HOMES = {
    "AsyncLease": "aio_lease",
    "AsyncSession": "aio",
    "AuthenticationFailed": "errors",
    "CallTimeout": "errors",
    "CheckoutTimeout": "errors",
    "Executor": "executor",
    "FactoryFailed": "errors",
    "Lease": "lease",
    "LeaseError": "errors",
    "ManagerDied": "errors",
    "Pool": "pool",
    "PoolClosed": "errors",
    "PoolFull": "errors",
    "ProtocolError": "errors",
    "RemoteError": "errors",
    "RemoteTraceback": "errors",
    "SerializationError": "errors",
    "Session": "session",
    "ShutdownIncomplete": "errors",
    "ShutdownTimeout": "errors",
    "Status": "status",
    "WhitepoolError": "errors",
    "WorkerContext": "worker.context",
    "WorkerDied": "errors",
    "WorkerInfo": "status",
    "WorkerStack": "status",
    "current_worker": "worker.context",
}

__all__ = [
    "AsyncLease",
    "AsyncSession",
    "AuthenticationFailed",
    "CallTimeout",
    "CheckoutTimeout",
    "Executor",
    "FactoryFailed",
    "Lease",
    "LeaseError",
    "ManagerDied",
    "Pool",
    "PoolClosed",
    "PoolFull",
    "ProtocolError",
    "RemoteError",
    "RemoteTraceback",
    "SerializationError",
    "Session",
    "ShutdownIncomplete",
    "ShutdownTimeout",
    "Status",
    "WhitepoolError",
    "WorkerContext",
    "WorkerDied",
    "WorkerInfo",
    "WorkerStack",
    "current_worker",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
