"""Goes through the rows, round by round, one contestant at a time."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import footprint
from benchmarks.contestant import NO_PROCESSES, adapter_type
from benchmarks.model import Entry, Row
from benchmarks.seat import START_SECONDS, Seat

_IDLE_SETTLE = 1.0
_BUDGET = 20.0
_ENOUGH = 3
"""After so many seconds, and with so many samples, a slow contestant has had its share of a row."""


def installed(contestant: str) -> bool:
    """Whether a contestant can take part."""
    module = adapter_type(contestant).module
    return not module or importlib.util.find_spec(module) is not None


class Conductor:
    """Runs rows and fills in their entries' samples.

    Args:
        rounds: how many samples of each entry.
        pace: a factor on the time that a counted sample takes.
    """

    def __init__(self, rounds: int, pace: float) -> None:
        self._rounds = rounds
        self._pace = pace
        self._folder = Path(tempfile.mkdtemp(prefix="wpbench-", dir="/tmp"))
        self._standing: dict[str, Seat] = {}
        self._own: list[Seat] = []
        self._failed: dict[str, str] = {}
        self._spent: dict[int, float] = {}

    def __enter__(self) -> Conductor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for seat in [*self._standing.values(), *self._own]:
            seat.close(kindly=kind is None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, row: Row) -> None:
        """Measure a row."""
        start = time.monotonic()
        entries = row.entries
        self._spent = {id(entry): 0.0 for entry in entries}
        seats = {id(entry): self._seat(row, entry) for entry in entries}
        if row.measure == "idle":
            self._watch_idle(row, seats)
        else:
            for entry in entries:
                self._warm_up(row, entry, seats)
            for turn in range(min(self._rounds, row.rounds)):
                first = turn % len(entries)
                for entry in entries[first:] + entries[:first]:
                    if len(entry.samples) >= _ENOUGH and self._spent[id(entry)] > _BUDGET:
                        continue
                    value = self._sample(row, entry, seats)
                    if value is not None:
                        entry.samples.append(value)
        for seat in self._own:
            seat.close()
        self._own.clear()
        say(f"{row.key}: {time.monotonic() - start:.0f} s")

    # --- seats ----------------------------------------------------------------------------

    def _seat(self, row: Row, entry: Entry) -> Seat | None:
        if row.seat == "sample":
            return None
        if row.seat == "row" or entry.options:
            seat = self._new(entry)
            self._own.append(seat)
        else:
            standing = self._standing.get(entry.contestant)
            if standing is not None and standing.open:
                return standing
            if entry.contestant in self._failed:
                entry.status = self._failed[entry.contestant]
                return standing
            seat = self._standing[entry.contestant] = self._new(entry)
        answer = seat.ask("warm", {}, START_SECONDS)
        if "status" in answer:
            entry.status = f"did not start: {answer['status']}"
            self._complain(row, entry, seat)
            seat.close(kindly=False)
            if seat not in self._own:
                self._failed[entry.contestant] = entry.status
        return seat

    def _new(self, entry: Entry) -> Seat:
        parks = adapter_type(entry.contestant).parks
        return Seat(entry.contestant, entry.options, self._folder, parks)

    def _complain(self, row: Row, entry: Entry, seat: Seat) -> None:
        say(f"{row.key}: {entry.label}: {entry.status}")
        text = seat.log.read_text(errors="replace").strip() if seat.log.exists() else ""
        if text and entry.status.startswith(("did not", "failed")):
            say("    " + "\n    ".join(text.splitlines()[-12:]))

    # --- samples --------------------------------------------------------------------------

    def _warm_up(self, row: Row, entry: Entry, seats: dict[int, Seat | None]) -> None:
        """Samples that are thrown away, and from which the number of operations is found."""
        if row.count is None:
            if row.seat != "sample":
                self._sample(row, entry, seats)
            return
        least, most = row.count
        entry.count = least
        for _ in range(3):
            answer = self._ask(row, entry, seats)
            if answer is None:
                return
            rate = entry.count / max(answer["seconds"], 1e-6)
            wanted = int(min(most, max(least, rate * row.seconds * self._pace)))
            enough = wanted < 2 * entry.count
            entry.count = wanted
            if enough:
                return

    def _sample(self, row: Row, entry: Entry, seats: dict[int, Seat | None]) -> float | None:
        answer = self._ask(row, entry, seats)
        return None if answer is None else _rounded(answer["value"])

    def _ask(self, row: Row, entry: Entry, seats: dict[int, Seat | None]) -> dict[str, Any] | None:
        if entry.status:
            return None
        seat = seats[id(entry)]
        start = time.monotonic()
        fresh = seat is None
        if seat is None:
            seat = self._new(entry)
        given = {**row.params, **entry.params}
        if entry.count is not None:
            given["count"] = entry.count
        answer = seat.ask(entry.measure or row.measure, given, row.limit)
        if "status" in answer:
            entry.status = answer["status"]
            if entry.samples:
                entry.status += f", after {len(entry.samples)} samples"
            self._complain(row, entry, seat)
            seat.close(kindly=False)
            return None
        if fresh:
            seat.close()
        self._spent[id(entry)] += time.monotonic() - start
        return answer

    def _watch_idle(self, row: Row, seats: dict[int, Seat | None]) -> None:
        """All at once: who is idle disturbs nobody, and who is not is found out."""
        seconds = float(row.params["seconds"])
        for seat in seats.values():
            if seat is not None:
                seat.parks = False
                seat.resume()
        read = footprint.switches if row.params["what"] == "switches" else footprint.cpu_seconds
        scale = 1.0 if row.params["what"] == "switches" else 1e3
        for _ in range(min(self._rounds, row.rounds)):
            time.sleep(_IDLE_SETTLE)
            pids: dict[int, list[int]] = {}
            before: dict[int, float] = {}
            for entry in row.entries:
                seat = seats[id(entry)]
                if seat is not None and not entry.status:
                    pids[id(entry)] = seat.processes()
                    before[id(entry)] = read(pids[id(entry)])
            time.sleep(seconds)
            for entry in row.entries:
                if id(entry) in before:
                    spent = read(pids[id(entry)]) - before[id(entry)]
                    entry.samples.append(_rounded(spent * scale / seconds))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def available(rows: list[Row]) -> list[str]:
    """Leave out the entries of contestants that are not installed; say which."""
    names = {entry.contestant for row in rows for entry in row.entries}
    missing = {name for name in names if name not in NO_PROCESSES and not installed(name)}
    labels = sorted(
        {entry.label for row in rows for entry in row.entries if entry.contestant in missing}
    )
    for row in rows:
        row.entries = [entry for entry in row.entries if entry.contestant not in missing]
    return labels


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
