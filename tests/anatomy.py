"""Which processes a running pool is made of: for tests that kill, stop and count them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import psutil
from support import until

from whitepool_mp import Session


def manager(session: Session) -> psutil.Process:
    """The manager of a pool that this process owns."""
    owner = session._member.owner
    assert owner is not None
    return psutil.Process(owner.manager)


def no_successor(session: Any) -> None:
    """From now on no other manager can be started in the place of one that dies."""
    session._member.owner._boot.interpreter[:] = ["/bin/false"]


def workers(session: Session, count: int) -> list[psutil.Process]:
    """The workers, once there are exactly that many and all of them are idle or leased."""

    def settled() -> list[psutil.Process]:
        rows = session.workers()
        if len(rows) != count or any(row.state not in ("idle", "leased") for row in rows):
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [psutil.Process(row.pid) for row in sorted(rows, key=lambda row: row.slot)]
            # The manager may be about to learn that one of them has just died.
            if all(process.status() != psutil.STATUS_ZOMBIE for process in found):
                return found
        return []

    found = until(settled)
    assert isinstance(found, list)
    return found


def replace_manager(session: Session) -> None:
    """Kill the manager, and wait until there is another."""
    owner = session._member.owner
    assert owner is not None
    old = owner.manager
    os.kill(old, signal.SIGKILL)
    until(lambda: owner.manager != old)
    session.status()


def replace_worker(session: Session) -> None:
    """Kill the only worker, and wait until another is ready."""
    (old,) = workers(session, 1)
    kill(old)
    until(lambda: workers(session, 1) != [old])


def nursery(session: Session) -> psutil.Process:
    """The nursery: the manager's child that is not a worker. Call it when no worker is starting."""
    pids = {row.pid for row in session.workers()}
    (found,) = [child for child in manager(session).children() if child.pid not in pids]
    return found


def kill(*victims: psutil.Process) -> None:
    """SIGKILL to all, one right after the other."""
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)


def gone(*expected: psutil.Process, seconds: float = 10.0) -> None:
    """Wait until processes have ended (a zombie has: its parent may be slow to reap it)."""

    def ended(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    until(lambda: all(ended(process) for process in expected), seconds)


def lives(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def elapsed(since: float) -> float:
    """Seconds since a time of the monotonic clock."""
    return time.monotonic() - since
