"""The records: a row of the benchmark, who takes part in it, its goals, what came out."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

BEST_PEER = "the best peer"


@dataclass
class Goal:
    """What a row should show.

    Args:
        kind: "times" (at most `value` times the figure of `against`), "ahead" (at least `value`
            times as good as `against`) or "bound" (no worse than `value`, in the row's unit).
        value: the number.
        against: an entry's label, or `BEST_PEER`.
        entry: the label of the entry that it is about; the row's first of ours if empty.
    """

    kind: Literal["times", "ahead", "bound"]
    value: float
    against: str = ""
    entry: str = ""


@dataclass
class Entry:
    """One contestant in one row, and what came out.

    Args:
        label: its name in the report.
        contestant: its name in `contestant.CONTESTANTS`.
        role: "ours", "peer", or "floor" (something to compare with that is no pool).
        measure: "module.function" if it is not the row's.
        options: what the contestant's adapter is made with.
        params: arguments of the measurement, besides the row's.
        samples: one figure for each round.
        status: why it has no more of them, or "".
        count: how many operations went into each sample, if the row counts.
    """

    label: str
    contestant: str
    role: Literal["ours", "peer", "floor"] = "peer"
    measure: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    status: str = ""
    count: int | None = None

    @property
    def median(self) -> float | None:
        """The figure, or None if there is none."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """The spread, or None if there is none."""
        if len(self.samples) < 2:
            return None
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass
class Row:
    """One thing that is measured of several contestants.

    Args:
        key: its name on the command line.
        number: the number of the list it belongs to; several rows may share one.
        title: what is measured.
        unit: of the figures.
        better: "lower" or "higher".
        group: the part of the report, and the plot, that it is in.
        measure: "module.function".
        entries: who takes part.
        goals: what ours should show.
        note: what to know when reading it.
        params: arguments of the measurement, for all.
        count: (least, most) operations in a sample, as many as take about `seconds`; None if the
            measurement does not count.
        seconds: what a counted sample should take.
        rounds: at most so many.
        seat: "standing" (the contestant's pool lives through all rows), "row" (a pool for this row
            alone) or "sample" (a fresh interpreter for each sample).
        limit: seconds after which a sample counts as hung.
        quick: whether it is part of a quick run.
        log: whether its plot has a logarithmic axis.
    """

    key: str
    number: int
    title: str
    unit: str
    better: Literal["lower", "higher"]
    group: str
    measure: str
    entries: list[Entry]
    goals: list[Goal] = field(default_factory=list)
    note: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    count: tuple[int, int] | None = None
    seconds: float = 0.25
    rounds: int = 99
    seat: Literal["standing", "row", "sample"] = "standing"
    limit: float = 30.0
    quick: bool = True
    log: bool = False

    def entry(self, label: str) -> Entry | None:
        """The entry of this name."""
        return next((each for each in self.entries if each.label == label), None)

    @property
    def ours(self) -> Entry | None:
        """The first of ours."""
        return next((each for each in self.entries if each.role == "ours"), None)

    def advantage(self, ours: float, other: float) -> float:
        """How many times as good ours is."""
        over, under = (other, ours) if self.better == "lower" else (ours, other)
        return over / under if under else (1.0 if over == under else float("inf"))

    def best_peer(self) -> Entry | None:
        """The peer with the best median."""
        found = [each for each in self.entries if each.role == "peer" and each.samples]
        if not found:
            return None
        choose = min if self.better == "lower" else max
        return choose(found, key=lambda each: each.median or 0.0)


@dataclass
class Run:
    """Everything of one run: what `--render` needs."""

    about: dict[str, Any]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Run:
        """The inverse of `as_json`."""
        rows = []
        for values in data["rows"]:
            values["entries"] = [Entry(**each) for each in values["entries"]]
            values["goals"] = [Goal(**each) for each in values["goals"]]
            rows.append(Row(**values))
        return Run(data["about"], rows)
