"""After a takeover: who waited is waited for, so that all are served in their old order.

A manager that was killed leaves waiters. They come back one by one, in any order; each says when it
first asked. What is asked meanwhile is kept, and then taken up in that order: nobody is served
until those who waited have asked again.
"""

from __future__ import annotations

from whitepool_mp.wire import frames

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from whitepool_mp.manager.clients import Client

SECONDS = 0.25
"""How long they are waited for at most; who comes later loses its place."""
_FOR_LATER = (frames.CHECKOUT, frames.CANCEL, frames.DRAIN)


class Reunion:
    """Who is waited for after a takeover, and what is asked until all are back.

    Args:
        missing: the clients that waited and have not asked again yet.
        draining: whether the pool was shutting down.
        until: when not to wait for them any longer.

    Attributes:
        back: who has asked again, or has gone. What was written down of them holds until what they
            asked is taken up: should this manager be killed too, they are waited for again.
    """

    def __init__(self, missing: set[int], draining: bool, until: float) -> None:
        self.missing = missing
        self.until = until
        self.draining = draining
        self.back: list[Client] = []
        self._heard: list[tuple[Client, bytes]] = []

    def came(self, client: Client) -> bool:
        """One has asked again, or has gone; whether all have."""
        self.missing.discard(client.id)
        self.back.append(client)
        return not self.missing

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
