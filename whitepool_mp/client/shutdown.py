"""How a process that holds a session ends the pool: in order, or now.

    drain      this process's jobs, then DRAIN: the manager answers when every lease is over
      too late   `terminate`, and the error names who held what
    terminate  the owner's manager by its eventfd (`owner`), another's by TERMINATE

Both are harmless when the pool has ended already, or somebody else is ending it; but a drain says
so if something was lost by that. (`aio` awaits the same steps of an event loop's engine.)
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.joining import LinkBroken, TimedOut
from whitepool_mp.errors import ManagerDied, PoolClosed, ShutdownIncomplete, ShutdownTimeout
from whitepool_mp.wire import frames

if TYPE_CHECKING:
    from whitepool_mp.client.member import Member

_TELL_SECONDS = 1.0
"""How long the manager has to tell who holds what, before it is ended under them."""
_TERMINATE_SECONDS = 30.0
"""How long a session that is not the owner's waits for the pool to end."""


def drain(member: Member, seconds: float | None, tell: bool = True) -> None:
    """Finish what was submitted here, serve who waits, wait for all leases, end.

    In the thread of the engine, which has to finish what was submitted, it returns at once.

    Args:
        member: the membership; it takes no new checkouts from now on.
        seconds: at most how long; None for as long as it takes. What is left then is killed.
        tell: whether to raise `ShutdownIncomplete`.

    Raises:
        ShutdownTimeout: not everything was given back in time.
        ShutdownIncomplete: something was lost that was to be finished.
        ManagerDied: the manager process died meanwhile.
    """
    engine = member.running_engine()
    if engine is not None and engine.inside():
        member.ending = threading.Thread(
            target=_drain, args=(member, seconds, tell), name="whitepool-shutdown"
        )
        member.ending.start()
        return
    try:
        _drain(member, seconds, tell)
    finally:
        _see_off(member)


def _see_off(member: Member) -> None:
    """The pool has ended: wait for the threads that saw to it, if others began that. (In an
    engine's thread nothing is waited for: the others may wait for it.)"""
    engines = member.running_engines()
    if not member.closed or any(engine.inside() for engine in engines):
        return
    for engine in engines:
        engine.join()  # first: it may be about to begin the other one
    ending = member.ending
    if ending is threading.current_thread():
        return
    if ending is not None:
        ending.join()
    if member.owner is not None:
        member.owner.end()


def _drain(member: Member, seconds: float | None, tell: bool) -> None:
    if member.closed:
        return
    member.draining = True
    deadline = None if seconds is None else time.monotonic() + seconds
    engine, answer = member.running_engine(), None
    try:
        if engine is not None and not engine.wait_idle(deadline):
            raise TimedOut
        with member.link(deadline) as link:
            answer = link.question(frames.DRAIN, deadline)
    except TimedOut:
        held = _held(member)
        terminate(member)
        raise ShutdownTimeout(
            f"pool {member.name!r} did not drain within {seconds:g} s and was ended; killed: {held}"
        ) from None
    except (LinkBroken, PoolClosed, ManagerDied):
        pass
    _after_the_end(member)
    if tell and not member.terminated:
        complain(member.name, 0 if engine is None else engine.engine.jobs.unserved, answer)


def complain(name: str, jobs: int, answer: Any) -> None:
    """Say what a shutdown has lost, if anything.

    Args:
        name: the pool's.
        jobs: how many jobs of this process failed because the pool had ended, or their workers
            were killed during the shutdown.
        answer: the manager's to DRAIN, or None.

    Raises:
        ShutdownIncomplete: something was.
    """
    leases, named = (answer["lost"], answer["named"]) if isinstance(answer, dict) else (0, [])
    parts = []
    if jobs:
        parts.append(
            f"{jobs} submitted job(s) of this process failed, since their workers were killed or "
            "the pool had ended"
        )
    if leases:
        text = "; ".join(named) or "under an earlier manager"
        parts.append(f"{leases} lease(s) or waiting checkout(s) were lost: {text}")
    if parts:
        raise ShutdownIncomplete(
            f"pool {name!r} ended before everything was finished: {'; '.join(parts)}", jobs, leases
        )


def _held(member: Member) -> str:
    """Who holds which worker, for an error message."""
    until = time.monotonic() + _TELL_SECONDS
    try:
        with member.link(until) as link:
            rows = link.question(frames.WORKERS, until)
    except (TimedOut, LinkBroken, PoolClosed, ManagerDied):
        rows = []
    held = [
        f"worker {row['slot']} (pid {row['pid']}), leased for {row['since']:.1f} s by process "
        f"{row['holder_pid']} at {row['site']}"
        for row in rows
        if row["state"] == "leased"
    ]
    return "; ".join(held) if held else "nothing that the manager could name"


def _after_the_end(member: Member) -> None:
    """The manager has ended, or is about to; raise only if that was not in order."""
    if member.closed:
        return
    error = member.gone()
    member.close()
    if isinstance(error, ManagerDied):
        raise error


def terminate(member: Member) -> None:
    """End the pool now: every worker is killed, every waiter refused, running calls fail."""
    member.terminated = True
    if member.owner is None and not member.closed:
        member.draining = True
        try:
            deadline = time.monotonic() + _TERMINATE_SECONDS
            with member.link(deadline) as link:
                link.question(frames.TERMINATE, deadline)
        except (LinkBroken, TimedOut, PoolClosed, ManagerDied):
            pass  # it is gone, or stuck, which its owner will see
    member.close()
    _see_off(member)
