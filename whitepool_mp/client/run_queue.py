"""The queue of a process's `run`s: where a thread waits when others of its process wait already.

    run --a worker is kept here--> its call               no queue, one round trip with the worker
        --nobody waits-----------> checkout, to keep it   over the thread's own connection
        --others wait------------> Threaded --> Engine    one connection and one turn for all

Threads that each ask the manager cost a connection and two messages each, and take the workers
from each other. In the queue they are one client, and while nobody else waits their calls go to a
worker one behind the other; otherwise each has its turn among all who wait (`dispatch`).
The queue has an engine of its own: a `run` does not wait for what was submitted before it, and the
interpreter's exit waits for no `run` of a daemon thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.member import refusal
from whitepool_mp.client.tasks import Task
from whitepool_mp.errors import CallTimeout, CheckoutTimeout, WhitepoolError
from whitepool_mp.wire import frames

if TYPE_CHECKING:
    from whitepool_mp.client.member import Member
    from whitepool_mp.client.threaded import Threaded
    from whitepool_mp.wire.payload import Job

_WHY_SECONDS = 1.0
"""How long the manager has to tell why no worker became free."""


def to_join(member: Member) -> Threaded | None:
    """The queue, if threads of this process wait already; None if this one is to ask.

    Raises:
        PoolClosed, ManagerDied: the pool is gone, or is being shut down here.
        OSError: no descriptor is left for the queue's connection.
    """
    queue = member.running_engine("runs")
    if queue is not None and queue.inside():
        return None  # code of a result that is unpickled there: it cannot wait for itself
    asking = member.asking
    others = len(asking) > (threading.get_ident() in asking)
    if others or (queue is not None and queue.engine.jobs.waiting):
        return member.threaded("runs")
    return None


@contextlib.contextmanager
def asking(member: Member) -> Iterator[None]:
    """This thread asks for a worker to keep, and others that find none queue meanwhile."""
    # By thread: an entry that an interrupt left here goes when that thread asks again. Until then
    # the others queue, which is all that it does.
    thread = threading.get_ident()
    member.asking.add(thread)
    try:
        yield
    finally:
        member.asking.discard(thread)


def run_queued(
    queue: Threaded,
    member: Member,
    job: Job,
    flags: int,
    seconds: float | None,
    deadline: float | None,
    site: str,
) -> Any:
    """Queue a call and wait until it has ended; what it returned.

    Args:
        queue: from `to_join`.
        member: this process's part in the pool.
        job: the call, pickled.
        flags: `messages.WITH_RESOURCE` or 0.
        seconds, deadline: how long all of it may take, and until when on the monotonic clock.
        site: the line of code that it comes from.

    Raises:
        CallTimeout: its time was up when it ran; its worker is killed.
        CheckoutTimeout, FactoryFailed: its time was up before it began.
        Exception: what the call raised, and as for `submit`.
    """
    from whitepool_mp.client.future import JobFuture  # most runs do not queue

    data, buffers, name = job
    future = JobFuture(member, name, queue)
    future._task = task = Task(name, future, flags, None, data, buffers, site=site)
    late = False
    try:
        queue.submit(task)
        future.exception(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except FutureTimeout:
        late = future.cancel()
    except BaseException:
        future.cancel()
        raise
    if late:
        assert seconds is not None
        raise _expired(queue, member, task, seconds)
    try:
        return future.result()
    finally:
        del future  # or it and what it raises keep each other


def _expired(queue: Threaded, member: Member, task: Task, seconds: float) -> WhitepoolError:
    """The error of a call that was given up when its time was up.

    Why no worker became free is what the manager answers to a checkout that is cancelled at once.
    """
    told: Future[WhitepoolError] = Future()
    engine = queue.engine

    def answer(refused: Any) -> None:
        told.set_result(
            refusal(refused, member.name, seconds, None)
            if isinstance(refused, frames.Refused)
            else refused
        )

    def look() -> None:
        if task.runner is None:
            ticket = engine.checkout(True, None, task.site, _nothing)
            if engine.broken is not None:
                answer(engine.broken)
            else:
                engine.cancel_checkout(ticket, answer)
        else:
            told.set_result(too_long(task, member.name, seconds))

    engine.post(look)  # after the `cancel`, which finds out whether it had begun
    try:
        return told.result(_WHY_SECONDS)
    except FutureTimeout:
        return CheckoutTimeout(
            f"no worker of pool {member.name!r} became free for {task.name} within {seconds:g} s, "
            "and its manager does not answer (stopped, or the machine is overloaded)"
        )


def too_long(task: Task, pool: str, seconds: float) -> CallTimeout:
    """The error of a task whose call had begun when its time was up."""
    runner = task.runner
    return CallTimeout(
        f"{task.name} took longer than {seconds:g} s in worker {runner.slot} of pool {pool!r} "
        f"(pid {runner.pid}); the worker was killed and is being replaced"
    )


def _nothing(_: object) -> None:
    """The checkout's own answer never comes: the refusal of its cancel does."""
