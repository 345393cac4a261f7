"""What a job's caller was told of its end, in a few words."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

from walk import jobs, payloads
from walk.payloads import Spec
from whitepool_mp import (
    CallTimeout,
    CheckoutTimeout,
    FactoryFailed,
    LeaseError,
    PoolFull,
    WorkerDied,
)

RETURNED = "returned"
RAISED = "raised"
DIED = "died"
UNBEGUN = "died before it began"
LATE = "timed out"
NO_WORKER = "no worker in time"
FULL = "no worker free"
NO_START = "no worker could start"
CANCELLED = "cancelled"
DESTROYED = "destroyed under it"
UNDONE = "left undone"
WRONG = "wrong content"

FAIR = {
    RETURNED,
    RAISED,
    DIED,
    UNBEGUN,
    LATE,
    NO_WORKER,
    FULL,
    NO_START,
    CANCELLED,
    DESTROYED,
    UNDONE,
}
"""What may become of a job in a walk; every other end is a fault of the pool."""
HAVE_BEGUN = {RETURNED, RAISED}
"""Who is told so can be sure that it has run."""
HAVE_NOT_BEGUN = {UNBEGUN, NO_WORKER, FULL, NO_START}
"""Who is told so can be sure that it has not."""

_BY_TYPE: tuple[tuple[type[BaseException], str], ...] = (
    (CallTimeout, LATE),
    (CheckoutTimeout, NO_WORKER),
    (PoolFull, FULL),
    (FactoryFailed, NO_START),
    (concurrent.futures.CancelledError, CANCELLED),
    (asyncio.CancelledError, CANCELLED),
    (jobs.WrongContent, WRONG),
)


def of_error(error: BaseException, number: int, destroyed: bool = False) -> str:
    """The end of a job whose caller got this exception.

    Args:
        error: what was raised.
        number: the job's.
        destroyed: whether its lease was destroyed meanwhile.
    """
    if isinstance(error, WorkerDied):
        return DIED if error.started else UNBEGUN
    if isinstance(error, jobs.Refusal):
        return RAISED if error.args == (number,) else WRONG
    if destroyed and isinstance(error, LeaseError):
        return DESTROYED
    for kind, end in _BY_TYPE:
        if isinstance(error, kind):
            return end
    return f"{type(error).__name__}: {error}"


def of_result(result: Any, number: int, wanted: Spec | None) -> str:
    """The end of a job whose caller got this result."""
    if isinstance(result, BaseException):
        return of_error(result, number)
    if wanted is None or not (isinstance(result, tuple) and len(result) == 2):
        return WRONG
    return RETURNED if result[0] == number and payloads.same(wanted, result[1]) else WRONG
