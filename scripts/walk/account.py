"""The account of a walk: what callers were told, beside what really ran."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from walk import ends
from walk.ledger import SPAN

_SHOWN = 5
"""How many numbers of jobs are shown of those with which something is wrong."""


@dataclass
class Entry:
    """One job.

    Attributes:
        kind: how it was run.
        limit: within how many seconds it had to end.
        opened: when, on the monotonic clock.
        ended: when, likewise.
        ends: what its caller was told.
    """

    kind: str
    limit: float
    opened: float
    ended: float | None = None
    ends: list[str] = field(default_factory=list)


@dataclass
class Account:
    """Every job of every client, and every job that began.

    Attributes:
        jobs: by number.
        runs: how often each number began.
        strange: what must not be, as it was written down.
        killed: the indices of the client processes that were killed.
    """

    jobs: dict[int, Entry]
    runs: collections.Counter[int]
    strange: list[str]
    killed: Collection[int]

    @classmethod
    def read(cls, ledgers: Iterable[Path], begun: Path, killed: Collection[int]) -> Account:
        """That of these files. A line that its writer did not finish does not count.

        Args:
            ledgers: the books of all processes.
            begun: the file of the jobs that began.
            killed: the indices of the client processes that were killed.
        """
        account = cls({}, collections.Counter(), [], killed)
        for path in ledgers:
            for line in _lines(path):
                account._enter(line)
        for line in _lines(begun):
            if line[0] == "B":
                account.runs[int(line.split()[1])] += 1
            else:
                account.strange.append(line[2:])
        return account

    def _enter(self, line: str) -> None:
        what, _, rest = line.partition(" ")
        if what == "O":
            words = rest.split()
            self.jobs[int(words[0])] = Entry(
                " ".join(words[1:-2]), float(words[-2]), float(words[-1])
            )
        elif what == "E":
            number, when, end = rest.split(" ", 2)
            entry = self.jobs[int(number)]
            entry.ends.append(end)
            entry.ended = float(when)
        else:
            self.strange.append(rest)

    # --- what is told of it ---------------------------------------------------------------

    def counts(self) -> dict[str, collections.Counter[str]]:
        """By kind: how many jobs ended how. One whose client was killed first ended `untold`."""
        found: dict[str, collections.Counter[str]] = {}
        for number, entry in self.jobs.items():
            kind = found.setdefault(entry.kind, collections.Counter())
            kind[self._end(number, entry)] += 1
        return found

    def _end(self, number: int, entry: Entry) -> str:
        """How it ended; of an error that no walk should see, the type alone."""
        if entry.ends:
            return entry.ends[0].partition(":")[0]
        return UNTOLD if number // SPAN in self.killed else LOST

    def faults(self) -> dict[str, list[int]]:
        """The numbers of the jobs with which something is wrong, by what it is."""
        found: dict[str, list[int]] = collections.defaultdict(list)
        for number, entry in self.jobs.items():
            end = self._end(number, entry)
            ran = number in self.runs
            if end == LOST:
                found[f"lost: {entry.kind}, no end was told"].append(number)
            elif end != UNTOLD and end not in ends.FAIR:
                found[f"unfair end: {entry.kind}, {end}"].append(number)
            if len(entry.ends) > 1:
                found["told two ends"].append(number)
            if end in ends.HAVE_BEGUN and not ran:
                found["returned without having run"].append(number)
            if end in ends.HAVE_NOT_BEGUN and ran:
                found[f"said not to have begun, and had: {entry.kind}, {end}"].append(number)
            if entry.ended is not None and entry.ended - entry.opened > entry.limit:
                found[f"hung, and then ended: {entry.kind}, {end}"].append(number)
        for number, count in self.runs.items():
            if count > 1:
                found["run twice"].append(number)
            if number not in self.jobs:
                found["run, and never opened"].append(number)
        return found

    def report(self) -> list[str]:
        """The lines of the account."""
        counts = self.counts()
        total = sum(counts.values(), collections.Counter[str]())
        lines = [
            f"jobs opened: {len(self.jobs)}; begun: {len(self.runs)}; "
            f"ends told: {sum(map(len, (entry.ends for entry in self.jobs.values())))}"
        ]
        lines += [f"  {end}: {count}" for end, count in total.most_common()]
        for kind, ended in sorted(counts.items()):
            sums = " + ".join(f"{count} {end}" for end, count in ended.most_common())
            lines.append(f"  {kind}: {sum(ended.values())} = {sums}")
        return lines

    def wrong(self) -> list[str]:
        """Every fault, in a line of its own; none if it balances."""
        lines = []
        for what, numbers in sorted(self.faults().items()):
            shown = ", ".join(map(str, numbers[:_SHOWN]))
            more = ", ..." if len(numbers) > _SHOWN else ""
            lines.append(f"{what}: {len(numbers)} ({shown}{more})")
            first = self.jobs.get(numbers[0])
            if first is not None and what.startswith("unfair"):
                lines += [f"  the first was told: {end}" for end in first.ends]
        opened = len(self.jobs)
        told = sum(bool(entry.ends) for entry in self.jobs.values())
        untold = sum(self.counts_of(UNTOLD))
        if told + untold != opened:
            lines.append(f"{opened} jobs were opened, and {told} + {untold} ended")
        strange = collections.Counter(self.strange)
        lines += [f"{what} ({count} times)" for what, count in strange.most_common(20)]
        return lines

    def counts_of(self, end: str) -> list[int]:
        """How many jobs of each kind ended so."""
        return [ended[end] for ended in self.counts().values()]


LOST = "lost"
UNTOLD = "its client was killed"


def _lines(path: Path) -> list[str]:
    text = path.read_text(errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()
