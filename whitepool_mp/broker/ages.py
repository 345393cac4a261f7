"""When workers are too old to serve on."""

from __future__ import annotations

import heapq
import math

from whitepool_mp.broker.state import IDLE, LEASED, Worker

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Mapping

__all__ = ["Ages", "spread"]

_SPREAD = 0.2
_SLACK = 64


def spread(limit: float, rng: random.Random) -> float:
    """Draw a limit that is the given one or up to a fifth less."""
    return limit * (1.0 - _SPREAD + _SPREAD * rng.random()) if limit else limit


class Ages:
    """The times at which workers have served for long enough.

    It keeps records and makes no decisions. Every method is O(log workers), amortised: what is
    known of workers that have gone is dropped when it comes up, or is more than half of it all.

    Args:
        lifetime: for how long a worker serves at most, in seconds; infinity for ever.
        known: the workers that have not exited.
        rng: the source of jitter.
    """

    __slots__ = ("_known", "_lifetime", "_limit", "_rng", "_times")

    def __init__(self, lifetime: float, known: Mapping[int, Worker], rng: random.Random) -> None:
        self._lifetime = lifetime
        self._known = known
        self._rng = rng
        self._times: list[tuple[float, int]] = []
        self._limit = _SLACK

    def begin(self, worker: Worker, since: float) -> None:
        """Note since when a worker has been ready to serve, in seconds."""
        if self._lifetime == math.inf:
            return
        heapq.heappush(self._times, (since + spread(self._lifetime, self._rng), worker.id))
        if len(self._times) > self._limit:
            self._times = [each for each in self._times if self._serves(each[1])]
            heapq.heapify(self._times)
            self._limit = 2 * len(self._times) + _SLACK

    def next(self) -> float:
        """Tell when the next worker is too old, in seconds; infinity for never."""
        times = self._times
        while times and not self._serves(times[0][1]):
            heapq.heappop(times)
        return times[0][0] if times else math.inf

    def due(self, now: float) -> Iterator[Worker]:
        """Take out those that are too old by now."""
        while self.next() <= now:
            yield self._known[heapq.heappop(self._times)[1]]

    def _serves(self, number: int) -> bool:
        worker = self._known.get(number)
        return worker is not None and (worker.state is IDLE or worker.state is LEASED)
