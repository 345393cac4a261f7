"""Jobs for any pool, from a few threads, while its workers are killed from outside.

It runs in the contestant's process, where nothing is certain to end: every job has a deadline, and
what is known is written down at once.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.adapter import Adapter

from walk import ends, jobs, payloads, rivals
from walk.ledger import Ledger

DEADLINE = 10.0
"""Seconds within which every job has to end; none takes longer than a tenth of a second."""
SETTLE = 1.0
"""Seconds that the clients go on after the last kill."""
LOST = "lost"
RENEWED = "renewed after"
"""How the book says that the pool declared itself broken, and was followed by a new one."""
_BREATH = 0.01
"""How long a client waits after an error that came at once, as its user would."""
_SINGLES, _BATCH, _MAP = 3, 12, 40
_LARGEST = 4 * 2**20


class Field:
    """A pool and its clients.

    Args:
        pool: the pool, started.
        ledger: where everything is written.
        until: when the clients stop, on the monotonic clock.
    """

    def __init__(self, pool: Adapter, ledger: Ledger, until: float) -> None:
        self._pool = pool
        self._ledger = ledger
        self._until = until
        self._generation = 0
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether it is time to stop."""
        return time.monotonic() > self._until

    def _renew(self, generation: int, error: BaseException) -> None:
        """The pool has said that it is broken: make a new one, as its user would."""
        with self._lock:
            if generation == self._generation and not self.over:
                old, self._pool = self._pool, copy.copy(self._pool)
                threading.Thread(target=old.stop, daemon=True).start()
                self._generation += 1
                self._ledger.strange(f"{RENEWED} {_name(error)}")
                self._pool.start()

    def _submit(self, rng: random.Random) -> tuple[int, Any, Any, int]:
        """Open and submit a job: its number, what it should return, its handle, whose it is."""
        number = self._ledger.open("submit")
        wanted, args = self._draw(rng, number)
        with self._lock:
            pool, generation = self._pool, self._generation
        try:
            return number, wanted, rivals.submit(pool, jobs.job, args), generation
        except Exception as error:  # it takes no more
            self._ledger.close(number, _name(error))
            self._renew(generation, error)
            time.sleep(_BREATH)
            return number, wanted, None, generation

    @staticmethod
    def _draw(rng: random.Random, number: int) -> tuple[Any, tuple[Any, ...]]:
        given, wanted = (payloads.draw(rng, _LARGEST) for _ in range(2))
        refuses = rng.random() < 0.02
        seconds = rng.choice((0.0, 0.0, 0.001, 0.01, 0.05))
        content = payloads.make(given)
        return wanted, (number, seconds, given, content, None if refuses else wanted, "")

    def _settle(self, submitted: list[tuple[int, Any, Any, int]]) -> None:
        """Wait for the end of jobs, and write it down."""
        until = time.monotonic() + DEADLINE
        for number, wanted, handle, generation in submitted:
            if handle is None:
                continue
            if not rivals.ended(handle, max(0.0, until - time.monotonic())):
                self._ledger.close(number, LOST)
                continue
            result = rivals.outcome(handle)
            self._ledger.close(number, _end(result, number, wanted))
            if rivals.declares_broken(result):
                self._renew(generation, result)

    def one_by_one(self, rng: random.Random) -> None:
        """A job, a short pause, and the next."""
        while not self.over:
            self._settle([self._submit(rng)])
            time.sleep(rng.choice((0.0, 0.0, 0.005, 0.02)))

    def in_batches(self, rng: random.Random) -> None:
        """A dozen jobs at once, and the next dozen when they have ended."""
        while not self.over:
            self._settle([self._submit(rng) for _ in range(_BATCH)])

    def in_maps(self, rng: random.Random) -> None:
        """Maps, which most pools let fail as a whole."""
        while not self.over:
            numbers = list(self._ledger.open_many("map", _MAP))
            with self._lock:
                pool, generation = self._pool, self._generation
            got: list[Any] = []
            mapping = threading.Thread(target=_map, args=(pool, numbers, got), daemon=True)
            mapping.start()
            mapping.join(DEADLINE)
            result: Any = got[0] if got else None
            for index, number in enumerate(numbers):
                if not got:
                    end = LOST
                elif isinstance(result, BaseException):
                    end = _name(result)
                else:
                    end = ends.RETURNED if result[index] == number else ends.WRONG
                self._ledger.close(number, end)
            if rivals.declares_broken(result):
                self._renew(generation, result)
            if isinstance(result, BaseException):
                time.sleep(_BREATH)


def _map(pool: Adapter, numbers: list[int], got: list[Any]) -> None:
    try:
        got.append(pool.map(jobs.number_of, numbers, None))
    except BaseException as error:
        got.append(error)


def _name(error: BaseException) -> str:
    return type(error).__name__


def _end(result: Any, number: int, wanted: Any) -> str:
    if isinstance(result, jobs.Refusal):
        return ends.RAISED if result.args == (number,) else ends.WRONG
    if isinstance(result, BaseException):
        return _name(result)
    return ends.of_result(result, number, wanted)


def endure(pool: Adapter, ledger: str, seconds: float, seed: int) -> str:
    """Run jobs for so long; whether the pool is usable afterwards, and if not, why.

    Args:
        pool: the contestant's, started.
        ledger: the file of its book.
        seconds: how long its workers are killed.
        seed: what the clients' choices come from.
    """
    book = Ledger(Path(ledger), 0)
    field = Field(pool, book, time.monotonic() + seconds + SETTLE)
    clients = [field.one_by_one] * _SINGLES + [field.in_batches, field.in_maps]
    threads = [
        threading.Thread(target=client, args=(random.Random(f"{seed} {index}"),), daemon=True)
        for index, client in enumerate(clients)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + seconds + SETTLE + 1.5 * DEADLINE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        return "no: submitting hangs"
    return _usable(field)


def _usable(field: Field) -> str:
    pool = field._pool
    try:
        handles = [rivals.submit(pool, pow, (2, number)) for number in range(8)]
    except Exception as error:
        return f"no: {_name(error)}"
    until = time.monotonic() + DEADLINE
    for number, handle in enumerate(handles):
        if not rivals.ended(handle, max(0.0, until - time.monotonic())):
            return "no: it hangs"
        result = rivals.outcome(handle)
        if result != 2**number:
            return f"no: {_name(result) if isinstance(result, BaseException) else ends.WRONG}"
    return "yes"
