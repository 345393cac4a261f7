"""What every client of the walk has, and the jobs that it draws."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from typing import Any

from walk import payloads
from walk.ledger import Ledger
from walk.payloads import Spec
from whitepool_mp import Session

_LONG = 0.15
"""Seconds that a job takes which is to be late, or to be cancelled while it runs."""
_CYCLE, _LULL = 4.0, 1.0
"""Every so many seconds, clients pause for so many."""


@dataclass(frozen=True)
class Client:
    """One client: what it uses, and where it writes.

    Attributes:
        session: the pool.
        ledger: the book of this process.
        rng: decides what this client does.
        stop: set when it is to end.
        name: who it is, among all clients of the walk.
    """

    session: Session
    ledger: Ledger
    rng: random.Random
    stop: threading.Event
    name: str

    def luck(self, chance: float) -> bool:
        """True as often as that."""
        return self.rng.random() < chance

    def lull(self) -> float:
        """Seconds until clients go on: all of them pause together now and then, so that workers are
        killed that are idle, or kept by a client that has nothing to do for them."""
        return max(0.0, _LULL - time.monotonic() % _CYCLE)

    def goes_on(self) -> bool:
        """Wait for the end of a lull; whether the walk goes on."""
        return not self.stop.wait(self.lull())

    def seconds(self) -> float:
        """How long a job takes."""
        return self.rng.choice((0.0, 0.0, 0.0, 0.0, 0.001, 0.002, 0.01, 0.02))

    def timeout(self, chance: float = 0.01) -> tuple[float | None, bool]:
        """A timeout in seconds, or None; and whether it is one that is likely to pass."""
        if self.luck(chance):
            return self.rng.choice((0.0, 0.005, 0.02, 0.05)), True
        return self.rng.choice((None, 20.0)), False

    def draw(
        self, kind: str, timeout: float | None = None, long: bool = False, holder: str = ""
    ) -> Job:
        """Open a job.

        Args:
            kind: how it is run.
            timeout: when it should end by, in seconds.
            long: whether it is to take long.
            holder: who has checked its worker out.
        """
        number = self.ledger.open(kind, timeout)
        return self.describe(number, long, holder)

    def describe(self, number: int, long: bool = False, holder: str = "") -> Job:
        """What a job of this number does."""
        rng = self.rng
        given = payloads.draw(rng)
        wanted = None if self.luck(0.02) else payloads.draw(rng)
        return Job(number, _LONG if long else self.seconds(), given, wanted, holder)


@dataclass(frozen=True)
class Job:
    """One job: its number, how long it takes, what goes there and what should come back."""

    number: int
    seconds: float
    given: Spec
    wanted: Spec | None
    holder: str

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Those of `jobs.job`."""
        content = payloads.make(self.given)
        return self.number, self.seconds, self.given, content, self.wanted, self.holder
