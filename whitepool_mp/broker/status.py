"""The broker's counts at one moment."""

from __future__ import annotations

from whitepool_mp.records import Record

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Literal

__all__ = ["BrokerStatus"]


class BrokerStatus(Record):
    """Counts, no identities. What can be derived from them is derived from them.

    Attributes:
        pool_size: workers kept alive even when idle.
        max_overflow: how many more demand may add.
        booting: workers that build their resource.
        idle: workers ready to be granted.
        leased: workers that are granted.
        kept: those of them whose lease is kept between calls, whether a call runs or not.
        retiring: workers asked to stop or killed, whose exit was not seen yet.
        waiting: checkouts that wait.
        failing: whether starts fail, so that they are tried one at a time with a backoff.
        draining: whether new checkouts are refused for good.
        last_failure: why the last failed start failed, if ever one did.
        counters: totals since the start, by name.
    """

    pool_size: int
    max_overflow: int
    booting: int
    idle: int
    leased: int
    kept: int
    retiring: int
    waiting: int
    failing: bool
    draining: bool
    last_failure: str | None
    counters: dict[str, int]

    @property
    def limit(self) -> int:
        """The most workers that may be alive."""
        return self.pool_size + self.max_overflow

    @property
    def alive(self) -> int:
        """Workers that count against the limit."""
        return self.booting + self.idle + self.leased

    @property
    def overflow(self) -> int:
        """Workers alive above pool_size."""
        return max(0, self.alive - self.pool_size)

    @property
    def state(self) -> Literal["ready", "overflow", "full"]:
        """Poolboy's word: "full" refuses a non-blocking checkout, "overflow" starts a worker.

        Kept leases are taken for busy here; before either of that happens they are recalled.
        """
        if self.leased + self.waiting >= self.limit:
            return "full"
        return "overflow" if self.leased >= self.pool_size else "ready"
