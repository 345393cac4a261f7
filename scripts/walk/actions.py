"""What the walk does, step by step: from the seed alone, whatever the pool looks like."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

SIZE, OVERFLOW = 4, 2
"""The pool's sizes at the beginning and at the end."""


class Action(NamedTuple):
    """One step.

    Attributes:
        verb: "kill", "stop", "resize" or "look".
        target: of a kill or stop: "idle", "leased" or "booting" for workers in that state,
            "manager", "nursery" or "client".
        at: which of them, as a share of the list of them.
        many: how many of them.
        seconds: how long it is stopped.
        size, overflow: of a resize.
        pause: seconds until the next step.
    """

    verb: str
    target: str
    at: float
    many: int
    seconds: float
    size: int
    overflow: int
    pause: float


_WEIGHTS = {
    ("kill", "idle"): 14.0,
    ("kill", "leased"): 22.0,
    ("kill", "booting"): 8.0,
    ("kill", "nursery"): 1.5,
    ("kill", "client"): 0.8,
    ("stop", "idle"): 4.0,
    ("stop", "leased"): 4.0,
    ("stop", "booting"): 2.0,
    ("stop", "nursery"): 1.0,
    ("stop", "client"): 2.0,
    ("resize", ""): 2.0,
    ("look", ""): 30.0,
}
_MANAGERS = {("kill", "manager"): 0.5, ("stop", "manager"): 1.0}
_ALL = 100


def walk(seed: int, managers: bool, rate: float = 25.0) -> Iterator[Action]:
    """The steps, without end.

    Args:
        seed: decides all of them.
        managers: whether the manager is killed and stopped too.
        rate: how many steps a second.
    """
    rng = random.Random(seed)
    weights = {**_WEIGHTS, **(_MANAGERS if managers else {})}
    while True:
        ((verb, target),) = rng.choices(list(weights), list(weights.values()))
        yield Action(
            verb,
            target,
            at=rng.random(),
            many=rng.choice((1, 1, 1, 1, 2, _ALL)),
            seconds=rng.choice((0.005, 0.05, 0.2, 1.0)) * rng.uniform(0.5, 1.0),
            size=rng.randrange(1, SIZE + 3),
            overflow=rng.randrange(OVERFLOW + 2),
            pause=rng.uniform(0.0, 2.0 / rate),
        )
