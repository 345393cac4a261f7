"""What a shutdown in order had promised to finish, and could not.

    Manager --died, terminated--> Losses --told--> the answer to each DRAIN

A worker that its own call ended (a crash, an exit) is no loss of the shutdown: that is how this
call ended, as at any other time, and its holder is told. A worker that somebody killed is one, and
so is whatever still runs or waits when somebody terminates a pool that is draining.
"""

from __future__ import annotations

from whitepool_mp.broker import WorkerState
from whitepool_mp.manager.obituary import signal_name
from whitepool_mp.wire import signals

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from whitepool_mp.broker import Worker
    from whitepool_mp.manager.books import Books
    from whitepool_mp.manager.obituary import Obituary

_MOST_NAMED = 20


class Losses:
    """Counts what was lost since the pool began to drain.

    Args:
        books: where the count is kept for the next manager.
        begun: whether the last manager was draining.
    """

    def __init__(self, books: Books, begun: bool = False) -> None:
        self._books = books
        self._begun = begun
        self._named: list[str] = []

    def begin(self) -> None:
        """The pool drains from now on."""
        self._begun = True

    def died(self, worker: Worker, obituary: Obituary) -> None:
        """A worker has ended: what was under its lease is lost if it was killed.

        Args:
            worker: the broker's record, from before it heard of this.
            obituary: how it ended.
        """
        promised = worker.state is WorkerState.LEASED and (obituary.running or not worker.kept)
        if self._begun and promised and signals.was_killed(obituary.exitcode):
            how = obituary.exitcode
            ended = "ended in an unknown way" if how is None else f"died of {signal_name(-how)}"
            self._lose(f"worker {worker.slot} (pid {obituary.pid}) {ended}")

    def terminated(self, busy: Iterable[tuple[Worker, int | None]], waiting: int) -> None:
        """The pool is about to be ended at once.

        Args:
            busy: the leased workers under whose leases something may run, and their pids.
            waiting: how many checkouts wait.
        """
        if not self._begun:
            return
        for worker, pid in busy:
            self._lose(f"worker {worker.slot} (pid {pid}) was leased when the pool was terminated")
        for _ in range(waiting):
            self._lose("a checkout still waited when the pool was terminated")

    def _lose(self, what: str) -> None:
        self._books.lost += 1
        if len(self._named) < _MOST_NAMED:
            self._named.append(what)

    def told(self) -> Any:
        """The answer to a DRAIN: True, or how many were lost, and some of them by name."""
        lost = self._books.lost
        return {"lost": lost, "named": self._named} if lost else True
