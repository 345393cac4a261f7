"""What the broker has to know of a pool: plain numbers, in a module that costs nothing to import.

The manager reads this and not `config`, whose checking of options is the owner's affair.
"""

from __future__ import annotations

import math

from whitepool_mp.records import Record

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Literal

    Strategy = Literal["lifo", "fifo"]
else:
    Strategy = str

__all__ = ["MAX_WORKERS", "STRATEGIES", "Policy", "Strategy"]

STRATEGIES = ("lifo", "fifo")
"""Which idle worker is leased next: the one that worked last, or first."""

MAX_WORKERS = 10_000
"""Upper bound of ``pool_size + max_overflow``: beyond it a typing error is likelier than a wish."""


class Policy(Record):
    """What the broker has to know of a pool; times are in seconds, sizes in bytes.

    A plain value: `PoolConfig.policy` makes it from checked options, a test may write it by hand.
    Limits of 0 (`max_calls`, `max_rss`) and infinity (`max_lifetime`) are none.
    """

    pool_size: int
    max_overflow: int
    strategy: Strategy = "lifo"
    overflow_ttl: float = 5.0
    start_timeout: float = 60.0
    stop_timeout: float = 5.0
    backoff_first: float = 0.05
    backoff_max: float = 10.0
    max_calls: int = 0
    max_lifetime: float = math.inf
    max_rss: int = 0
