"""What a manager begins with that follows a killed one: it takes over what that one left.

    ledger (`Books.past`): what was decided  -->  Manager --> Broker
    escrow: workers' descriptors             -->  Crew
    pages: what workers and holders noted    -->  events that the last one did not live to see

The clients come back by themselves (`Door.take_over`, `reunion`).
"""

from __future__ import annotations

import os

from whitepool_mp.broker import Checkin, Destroy, Recall, WorkerReady, WorkerState
from whitepool_mp.manager import obituary
from whitepool_mp.wire import pages

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from whitepool_mp.broker import Event
    from whitepool_mp.broker.state import Worker
    from whitepool_mp.manager.books import Books
    from whitepool_mp.manager.clients import Door
    from whitepool_mp.manager.core import Manager
    from whitepool_mp.manager.crew import Crew
    from whitepool_mp.manager.obituary import Obituary
    from whitepool_mp.wire.escrow import Escrow
    from whitepool_mp.wire.pages import Page


def take_over(books: Books, escrow: Escrow, manager: Manager, crew: Crew, door: Door) -> None:
    """Go on where the last manager was killed."""
    import json  # noqa: F401  # for the first answer: there may be no descriptor left then

    past = books.past()
    parked = escrow.take(books.generation)
    lost: dict[int, Obituary] = {}
    for process in past.processes:
        fds = parked.pop(process.worker, [])
        why = ""
        if len(fds) in (2, 4):
            try:
                crew.take_over(process, *fds)
                continue
            except OSError as error:
                why = f": {type(error).__name__}: {error}"
                fds = []  # they are closed
        crew.give_up(process)
        escrow.drop(process.worker)  # while what that may send again is open
        for fd in fds:
            os.close(fd)
        lost[process.worker] = obituary.unknown(
            process.pid or None, process.slot, f"no manager could take it over{why}"
        )
    for key, fds in parked.items():
        escrow.drop(key)
        for fd in fds:
            os.close(fd)
    clients = [each.number for each in past.clients]
    clients += [each.client for each in past.resume.workers if each.client is not None]
    door.take_over(past.clients, max(clients, default=0))
    manager.resume(crew, door, past, lost)


def missed(worker: Worker, page: Page) -> Event | Recall | None:
    """What a worker's page tells of it that the last manager had not written down, if anything.

    Args:
        worker: the broker's record.
        page: the worker's page.

    Returns:
        What the broker has not heard of, or has decided and was not carried out.
    """
    words = page.words
    if worker.state is WorkerState.BOOTING:
        # It is not told again: the last manager had heard it.
        return WorkerReady(worker.id) if words[pages.READY] else None
    if worker.lease is None:
        return None
    assert worker.client is not None
    if words[pages.DESTROYED] == worker.lease:
        return Destroy(worker.client, worker.lease, "its holder had it destroyed")
    if words[pages.RETURNED] == worker.lease:
        return Checkin(worker.client, worker.lease, page.worn)
    if worker.kept and page.is_recalled(worker.lease):
        # The last manager took it back, and did not live to write down that it is free, or to ask.
        # Its holder cannot use it any more.
        return Recall(worker.id, worker.lease, patient=False)
    return None
