"""How long to wait before the next start, as a value.

The idea of a backoff that gives a delay and its successor is db_connection's.
"""

from __future__ import annotations

from whitepool_mp.records import Record

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import random

__all__ = ["Backoff"]


class Backoff(Record):
    """Exponential backoff with jitter.

    Args:
        first: the first full delay, in seconds.
        maximum: the longest full delay, in seconds.
        attempt: how many delays were given since the last success.
    """

    first: float
    maximum: float
    attempt: int = 0

    def next(self, rng: random.Random) -> tuple[float, Backoff]:
        """Give the delay before the next attempt, and the backoff that follows this one.

        Args:
            rng: the source of jitter, so that the pools of one machine do not start in step.

        Returns:
            A delay in seconds, between half and all of min(maximum, first * 2**attempt), and the
            next backoff.
        """
        full = min(self.maximum, self.first * 2.0 ** min(self.attempt, 1000))
        return full * (0.5 + 0.5 * rng.random()), self._replace(attempt=self.attempt + 1)

    def reset(self) -> Backoff:
        """Give the backoff as it was before any failure."""
        return self._replace(attempt=0)
