"""Which worker a process descends from, whatever it did since: told by a limit that it inherited.

A child inherits its parent's resource limits, `exec` keeps them, and a new session, an emptied
environment or the death of its parent changes nothing. So a worker is told apart by the value of
one limit that limits nothing: of RLIMIT_RTTIME (the CPU time of a process of real-time priority,
in microseconds), some ten thousand years or more. Only root could raise it again.

The two values, soft and hard, are the ends of a span. A pool divides the span of its manager among
its processes, so the spans of a pool inside a worker lie within that worker's:

    unlimited = [2**61 ............................................. 2**62]   owner, manager
                      ... [worker 2        ] [worker 1        ] [nursery]
                           [..][..] a pool made in worker 2

A zombie has its limits until it is reaped, so its origin can be asked before that. Where that limit
is in use for its own purpose, or in a pool in a pool in a pool in a pool, there are no numbers.

Source: setrlimit(2).
"""

from __future__ import annotations

import contextlib
import resource as limits

NURSERY = 0
"""The number of the process that workers are forked from, and of what it starts besides."""
_COUNT = 1 << 20
_WHOLE = 1 << 61, 1 << 62
_UNLIMITED = limits.RLIM_INFINITY, limits.RLIM_INFINITY


def of(worker: int) -> int:
    """The number by which a worker's descendants are known: its own, until those wrap."""
    return 1 + (worker - 1) % (_COUNT - 1)


def enter(number: int) -> None:
    """Have this process, and all that descends from it, known by a number of its pool.

    Does nothing where that cannot be done. (Then `number` is None of all of them.)
    """
    mark(0, number)


def mark(pid: int, number: int) -> None:
    """As `enter`, for a child that was just started."""
    step = (_HIGH - _LOW) // _COUNT
    if step:
        high = _HIGH - number * step
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            limits.prlimit(pid, limits.RLIMIT_RTTIME, (high - step + 1, high))


def number(pid: int) -> int | None:
    """The number that a process was given, or inherited.

    Args:
        pid: its pid; it may be a zombie.

    Returns:
        The number; None if it has none of a pool of this process's, as its manager or owner.
    """
    lowest, highest = _own()
    step = (highest - lowest) // _COUNT
    try:
        low, high = limits.prlimit(pid, limits.RLIMIT_RTTIME)
    except OSError:  # there is no such process, or it has become another user's
        return None
    if not step or low < lowest or not low <= high <= highest:
        return None
    found = (highest - high) // step
    return found if low > highest - (found + 1) * step else None


def _own() -> tuple[int, int]:
    low, high = limits.getrlimit(limits.RLIMIT_RTTIME)
    if (low, high) == _UNLIMITED:
        return _WHOLE
    return (low, high) if _WHOLE[0] <= low <= high <= _WHOLE[1] else (0, 0)


# The manager's, which imported this: the nursery and its children enter a part, but number by it.
_LOW, _HIGH = _own()
