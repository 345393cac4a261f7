"""All rows, in the order of the report."""

from __future__ import annotations

from benchmarks.calls import payloads, rates, sleeps, trips
from benchmarks.lives import bursts, crowd, deaths, rest, starts
from benchmarks.model import Row


def rows() -> list[Row]:
    """All of them."""
    return [
        *trips(),
        *rates(),
        *sleeps(),
        *payloads(),
        *starts(),
        *deaths(),
        *crowd(),
        *bursts(),
        *rest(),
    ]
