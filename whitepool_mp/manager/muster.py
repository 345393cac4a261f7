"""Whom the pool waits for before it drains: those who may have been given jobs that it must finish.

    DRAIN --begin--> DRAINING to everybody --joined, came, gone--> Drain
                                            '--time passes---'

Only an engine knows what is queued there. Each says whether it has jobs, asks for what they need,
and says that it has asked; then the broker knows whom to serve. Nobody is refused meanwhile.
"""

from __future__ import annotations

from whitepool_mp.wire import frames

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable

    from whitepool_mp.manager.clients import Client, Door

SECONDS = 5.0
"""How long they are waited for at most. They answer at once, unless the process is stopped or its
event loop is busy or not run any more; on a loaded machine a process may get no CPU for a good part
of a second."""


class Muster:
    """Those who are waited for, once there is a drain.

    Args:
        door: where they come in.
        clock: the monotonic clock, in seconds.
        drain: what to do when they have been heard.

    Attributes:
        late: who waited for a worker of the last manager, and has not asked this one yet.
        strangers: how many connections of the last manager had not proved themselves when it was
            draining, and have not come back.
    """

    def __init__(self, door: Door, clock: Callable[[], float], drain: Callable[[], None]) -> None:
        self._door = door
        self._clock = clock
        self._drain = drain
        self._missing: set[int] = set()  # numbers of clients; below 0: of those not known
        self._until: float | None = None
        self._begun = False
        self.late: set[int] = set()
        self.strangers = 0

    def begin(self) -> None:
        """Tell everybody that the pool is shutting down, and drain when they have answered."""
        first, self._begun = not self._begun, True
        if first:
            self._missing = self._door.busy() | self.late
            self._missing |= {-number for number in range(1, self.strangers + 1)}
            self._until = self._clock() + SECONDS
        for client in list(self._door.clients.values()):
            self._door.send(client, frames.draining())
        if first:
            self._look()

    def joined(self, client: Client, number: int) -> None:
        """A connection has proved itself; `number` is what it had before."""
        if client.engine and self._begun:
            self._door.send(client, frames.draining())
        self._missing.discard(number)
        if client.id == number and self.strangers:  # one of those, perhaps
            self._missing.discard(-self.strangers)
            self.strangers -= 1
        if client.engine and self._until is not None:
            self._missing.add(client.id)
        self._look()

    def came(self, client: Client) -> None:
        """One has asked for all that it needs, or has gone."""
        self.late.discard(client.id)
        self._missing.discard(client.id)
        self._look()

    def _look(self) -> None:
        if self._until is not None and not self._missing:
            self.end()
            self._drain()

    def next_deadline(self) -> float | None:
        """When not to wait for them any longer."""
        return self._until

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._until is not None and now >= self._until:
            self._missing.clear()
            self._look()

    def end(self) -> None:
        """Nobody is waited for any more, or ever will be."""
        self._begun = True
        self._until = None
        self._missing.clear()
