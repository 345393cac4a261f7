"""The same jobs, kills and stops for this pool and for others, in one table."""

from __future__ import annotations

import collections
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from benchmarks.about import about
from benchmarks.conductor import installed, say
from benchmarks.seat import MARK, Seat

from walk import ends, jobs
from walk.account import LOST, Account
from walk.endure import DEADLINE, RENEWED, SETTLE
from walk.executioner import Executioner
from walk.rivals import NAMES

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
WORKERS = 4
_WARM_SECONDS = 30.0
_GRACE = 20.0
"""How much longer than its jobs' deadlines a contestant may take, before it is killed."""


@dataclass
class Result:
    """What became of one contestant."""

    label: str
    account: Account
    done: collections.Counter[str]
    usable: str

    @property
    def ends(self) -> collections.Counter[str]:
        """How many jobs ended how."""
        return sum(self.account.counts().values(), collections.Counter[str]())

    @property
    def renewals(self) -> collections.Counter[str]:
        """How often a new pool was made, by the error that said so."""
        return collections.Counter(
            text.removeprefix(f"{RENEWED} ")
            for text in self.account.strange
            if text.startswith(RENEWED)
        )

    def cells(self) -> list[str]:
        """A row of the table."""
        counts = self.ends
        good = counts.pop(ends.RETURNED, 0) + counts.pop(ends.RAISED, 0)
        lost = counts.pop(LOST, 0)
        failed = [f"{count} {name}" for name, count in counts.most_common()]
        twice = sum(count > 1 for count in self.account.runs.values())
        renewed = self.renewals
        return [
            self.label,
            str(self.done["kills"]),
            str(len(self.account.jobs)),
            str(good),
            ", ".join(failed) or "0",
            str(lost),
            str(twice),
            str(sum(renewed.values())),
            self.usable,
        ]


HEAD = [
    "",
    "workers killed",
    "jobs opened",
    "ended as they should",
    "failed, by name",
    "lost (hung)",
    "run twice",
    "new pools",
    "usable at the end",
]


def compare(seconds: float, seed: int, kills: float, only: str | None, write: bool) -> int:
    """Have each contestant walk, one after the other; print the table.

    Args:
        seconds: how long each one's workers are killed.
        seed: decides the jobs, kills and stops.
        kills: how many a second.
        only: the names of those that take part, with commas; None for all.
        write: whether docs/reliability.md gets the table.

    Returns:
        The exit code.
    """
    chosen = {label: name for label, name in NAMES.items() if not only or name in only.split(",")}
    rows = []
    for label, name in chosen.items():
        if not installed(name):
            say(f"left out: {label} is not installed")
            continue
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            result = endure(label, name, Path(folder), seconds, seed, kills)
        rows.append(result.cells())
        say(" | ".join(rows[-1]))
    lines = [
        f"| {' | '.join(row)} |" for row in (HEAD, ["---"] + ["---:"] * 3 + ["---"] * 5, *rows)
    ]
    print("\n".join(lines))
    if write:
        put([*facts(seconds, seed, kills), "", *lines])
    return 0


def endure(label: str, name: str, folder: Path, seconds: float, seed: int, kills: float) -> Result:
    """Have one contestant walk, in processes that are all killed afterwards."""
    begun, ledger = folder / "begun", folder / "ledger-0"
    begun.touch()
    os.environ[jobs.FILE] = str(begun)
    seat = Seat(name, {"workers": WORKERS}, folder, parks=False)
    usable = "did not start"
    done = collections.Counter[str]()
    try:
        answer = seat.ask("warm", {}, _WARM_SECONDS)
        if "status" in answer:
            say(f"{label}: {answer['status']}")
        else:
            executioner = Executioner(begun, f"{MARK}={seat.mark}", seed, kills)
            killing = threading.Thread(target=executioner.run, args=(seconds,))
            killing.start()
            given = {"ledger": str(ledger), "seconds": seconds, "seed": seed}
            limit = seconds + SETTLE + 3 * DEADLINE + _GRACE
            answer = seat.ask("walk.endure.endure", given, limit)
            killing.join()
            done = executioner.done
            usable = answer.get("value") or f"no: {answer['status']}"
    finally:
        seat.close(kindly=False)
    ledgers = [ledger] if ledger.exists() else []
    return Result(label, Account.read(ledgers, begun, ()), done, usable)


def facts(seconds: float, seed: int, kills: float) -> list[str]:
    """What was run, on what."""
    told = about(ROOT)
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return [
        f"`scripts/chaos --peers --seconds {seconds:g} --seed {seed} --kills {kills:g}`, "
        f"{told['date']}, {told['subject']}; "
        f"{told['cpu']}, {told['cpus']} CPUs, {told['memory']} GB; "
        f"Linux {told['kernel']}; Python {told['python']}; {versions}."
    ]


def put(lines: list[str]) -> None:
    """Put these between the marks of the page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))
    say(f"wrote {PAGE.relative_to(ROOT)}")
