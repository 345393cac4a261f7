"""Who waits: first come, first served, and anyone may leave from the middle, all in O(1)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from whitepool_mp.broker.state import Waiter

__all__ = ["Waitlist"]


class Waitlist:
    """The waiting checkouts in order of arrival. It knows no time and no client."""

    __slots__ = ("_all", "_impatient")

    def __init__(self) -> None:
        self._all: OrderedDict[Waiter, None] = OrderedDict()
        # Those who wait for a start only; nearly always empty.
        self._impatient: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, waiter: Waiter) -> None:
        """Let a waiter join at the end."""
        self._all[waiter] = None
        if not waiter.block:
            self._impatient[waiter] = None

    def remove(self, waiter: Waiter) -> None:
        """Let a waiter leave, wherever it stands."""
        del self._all[waiter]
        if not waiter.block:
            del self._impatient[waiter]

    def first(self) -> Waiter:
        """Give the one that has waited longest."""
        return next(iter(self._all))

    def all(self) -> list[Waiter]:
        """List everyone, in order."""
        return list(self._all)

    def impatient(self, behind: int = 0) -> list[Waiter]:
        """List those who do not wait for a checkin, in order.

        Args:
            behind: leave out the first so many of the whole list.
        """
        if not self._impatient:
            return []
        near = set(islice(self._all, behind))
        return [waiter for waiter in self._impatient if waiter not in near]
