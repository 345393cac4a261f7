"""The one error of the broker."""

from __future__ import annotations

__all__ = ["BrokerError"]


class BrokerError(Exception):
    """An event that cannot happen; the broker did not change.

    It is a bug of whoever feeds the broker, never of a client: everything that a client or a race
    can cause is counted and ignored instead.
    """
