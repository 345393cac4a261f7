"""Whether workers can be started at all: what failed, and when to try again."""

from __future__ import annotations

import math

from whitepool_mp.broker.backoff import Backoff
from whitepool_mp.broker.state import Worker

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import random

__all__ = ["Starts"]


class Starts:
    """The record of failed starts and of the pause they impose.

    Args:
        backoff: the pause to begin with.
        rng: the source of its jitter.

    Attributes:
        not_before: no start before this time, in seconds.
        wave: the number of the current round of starts. Many may run in parallel and fail for one
            reason; only the first failure of a round lengthens the pause, and begins the next one.
        last_failure: why the last failed start failed, if ever one did.
    """

    __slots__ = ("_backoff", "_rng", "_unused_deaths", "last_failure", "not_before", "wave")

    def __init__(self, backoff: Backoff, rng: random.Random) -> None:
        self._backoff = backoff
        self._rng = rng
        self._unused_deaths = 0
        self.not_before = -math.inf
        self.wave = 0
        self.last_failure: str | None = None

    @property
    def failing(self) -> bool:
        """Whether a start failed and none has succeeded since."""
        return self._backoff.attempt > 0

    @property
    def attempts(self) -> int:
        """How many rounds of starts failed since the last success."""
        return self._backoff.attempt

    def failed(self, worker: Worker, reason: str, now: float) -> float | None:
        """Note a failed start.

        Returns:
            The new pause in seconds, or None if this failure is one of a round already counted.
        """
        self.last_failure = reason
        if worker.wave != self.wave:
            return None
        self.wave += 1
        delay, self._backoff = self._backoff.next(self._rng)
        self.not_before = now + delay
        return delay

    def succeeded(self, limit: int) -> bool:
        """Note that a worker got ready, and tell whether that ends a series of failures.

        In a crash loop workers do get ready, so there it proves nothing.
        """
        if not self.failing or self._unused_deaths > limit:
            return False
        self._backoff = self._backoff.reset()
        self.not_before = -math.inf
        return True

    def died_unused(self, limit: int) -> bool:
        """Note the crash of a worker never granted, and tell whether it makes a crash loop."""
        self._unused_deaths += 1
        return self._unused_deaths > limit

    def used(self) -> None:
        """Note that a worker was granted."""
        self._unused_deaths = 0
