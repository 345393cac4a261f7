"""Who waits: first come, first served, and anyone may leave from the middle, all in O(1)."""

from __future__ import annotations

from collections import OrderedDict

from whitepool_mp.broker.state import Waiter

__all__ = ["Waitlist"]


class Waitlist:
    """The waiting checkouts in order of arrival. It knows no time, and of clients who spares whom.

    Attributes:
        impatient: how many do not wait for a checkin; nearly always 0.
    """

    __slots__ = ("_far", "_near", "_outside", "_sparing", "impatient")

    def __init__(self) -> None:
        # All of `_near`, then all of `_far`. Only `beyond` cares where one ends and the other
        # begins: it moves that border, step by step, to where it needs it.
        self._near: OrderedDict[Waiter, None] = OrderedDict()
        self._far: OrderedDict[Waiter, None] = OrderedDict()
        # The impatient ones of `_far`.
        self._outside: OrderedDict[Waiter, None] = OrderedDict()
        # How many of each client's spare its own leases.
        self._sparing: dict[int, int] = {}
        self.impatient = 0

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    def add(self, waiter: Waiter) -> None:
        """Let a waiter join at the end."""
        self._far[waiter] = None
        if not waiter.block:
            self._outside[waiter] = None
            self.impatient += 1
        if waiter.spare_own:
            self._sparing[waiter.client] = self._sparing.get(waiter.client, 0) + 1

    def remove(self, waiter: Waiter) -> None:
        """Let a waiter leave, wherever it stands."""
        if waiter in self._far:
            del self._far[waiter]
        else:
            del self._near[waiter]
        if not waiter.block:
            self._outside.pop(waiter, None)
            self.impatient -= 1
        if waiter.spare_own:
            left = self._sparing[waiter.client] - 1
            if left:
                self._sparing[waiter.client] = left
            else:
                del self._sparing[waiter.client]

    def first(self) -> Waiter:
        """Give the one that has waited longest."""
        return next(iter(self._near or self._far))

    def all(self) -> list[Waiter]:
        """List everyone, in order."""
        return [*self._near, *self._far]

    def spared(self) -> int | None:
        """Tell whose leases may be recalled for nobody here, though others' may.

        Returns:
            The client of all who wait, if they all spare their own leases. Otherwise None: anyone's
            may be recalled (or nobody waits).
        """
        client = next(iter(self._sparing), None)
        if client is not None and self._sparing[client] == len(self):
            return client
        return None

    def beyond(self, places: int) -> list[Waiter]:
        """List those who do not wait for a checkin, in order, but for the first so many of all."""
        near, far, outside = self._near, self._far, self._outside
        while near and len(near) > places:
            waiter, _ = near.popitem()
            far[waiter] = None
            far.move_to_end(waiter, last=False)
            if not waiter.block:
                outside[waiter] = None
                outside.move_to_end(waiter, last=False)
        while outside and len(near) < places:
            waiter, _ = far.popitem(last=False)
            near[waiter] = None
            outside.pop(waiter, None)
        return list(outside)
