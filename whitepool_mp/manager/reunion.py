"""Moments in which some clients are waited for: before a drain, and after a takeover.

Before a pool drains, each engine says whether it has jobs, and has asked for what they need: what
was submitted before the shutdown began is known then, and finished.

A manager that was killed leaves waiters. They come back one by one, in any order; each says when it
first asked. What is asked meanwhile is kept, and then taken up in that order: nobody is served
until those who waited have asked again.
"""

from __future__ import annotations

from whitepool_mp.wire import frames

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from whitepool_mp.manager.clients import Client

ANSWER_SECONDS = 5.0
"""How long engines are waited for at most, before a drain. They answer at once, unless the process
is stopped or its event loop is busy or not run any more; on a loaded machine a process may get no
CPU for a good part of a second."""
RETURN_SECONDS = 0.25
"""How long waiters are waited for at most, after a takeover; who comes later loses its place."""
_FOR_LATER = (frames.CHECKOUT, frames.CANCEL, frames.DRAIN)


class Muster:
    """Who is waited for.

    Args:
        missing: the clients that have not been heard yet; below 0 for those whose numbers are
            not known.
        until: when not to wait for them any longer.
    """

    def __init__(self, missing: set[int], until: float) -> None:
        self.missing = missing
        self.until = until

    def came(self, client: Client) -> bool:
        """One has been heard, or has gone; whether all have."""
        self.missing.discard(client.id)
        return not self.missing


class Reunion(Muster):
    """Who is waited for after a takeover, and what is asked until all are back.

    Args:
        missing: the clients that waited and have not asked again yet.
        draining: whether the pool was shutting down.
        until: when not to wait for them any longer.
    """

    def __init__(self, missing: set[int], draining: bool, until: float) -> None:
        super().__init__(missing, until)
        self.draining = draining
        self._heard: list[tuple[Client, bytes]] = []

    def keep(self, client: Client, body: bytes) -> bool:
        """Keep what a client said for later; whether it is to be.

        Raises:
            ProtocolError: it is malformed.
        """
        if body[0] not in _FOR_LATER:
            return False
        (frames.read_checkout if body[0] == frames.CHECKOUT else frames.read_request)(body)
        self._heard.append((client, body))
        return True

    def taken_up(self) -> list[tuple[Client, bytes]]:
        """What was kept: the checkouts, those first that were asked first; then all else."""

        def place(kept: tuple[Client, bytes]) -> tuple[bool, float]:
            checkout = kept[1][0] == frames.CHECKOUT
            return not checkout, frames.read_checkout(kept[1]).asked if checkout else 0.0

        return sorted(self._heard, key=place)
