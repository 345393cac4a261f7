"""docs/benchmarks.md, from the data of one run."""

from __future__ import annotations

from benchmarks import report
from benchmarks.cast import PEERS
from benchmarks.model import Entry, Row, Run

CAVEATS = """\
- Every contestant's pool lives in a process of its own and has two workers (one or 200 where a row
  says so). One contestant works at a time; in each round every contestant has its turn, and the
  order rotates. A figure is the median of the rounds, the range beside it their quartiles.
- Contestants are warmed up: both workers have answered, and a sample is thrown away. Each runs with
  its default settings, with these exceptions: loky keeps its idle workers (they would leave after
  10 s), mpire keeps its workers alive between calls, ProcessPoolExecutor is shown with two start
  methods. multiprocessing, billiard, pebble and mpire start workers as the standard library does
  by default (fork, before Python 3.14).
- Jobs are importable functions (`os.getpid`, `abs`, one that takes a given time, one that gives
  back its argument), so all of them pickle them by reference.
- Where a row counts operations, each contestant does as many as take about the same time, up to a
  limit. One that is slow has fewer samples once it has used 20 s of a row, but at least three.
- Ray and mpire are stopped (SIGSTOP) while others are measured, since they use the CPU when idle.
- Ray is made for clusters; what is measured here is not its purpose.
- "hung" is no answer within a sample's time limit; "broken" is nothing but errors for a second
  (Ray: 3.5).
- Workers forked from the caller share memory with it: their unique set sizes count only what they
  have written to since.
- The script asserts no time; it reports. What differs by less than the quartiles does not differ.\
"""


def document(run: Run, plots: dict[str, str], data: str) -> str:
    """The page.

    Args:
        run: the data.
        plots: the file of each group's plot, relative to the page.
        data: the file of the raw data, relative to the page.
    """
    lines = [
        "# Benchmarks",
        "",
        "Written by `scripts/bench --write`; do not edit. The raw samples are in "
        f"[{data}]({data}): `scripts/bench --render docs/{data} --write` makes this page of them.",
        "",
        *(f"- {line}" for line in report.heading(run)),
    ]
    if run.about["missing"]:
        lines.append(f"- Left out, not installed: {', '.join(run.about['missing'])}")
    lines += ["", "## Goals", "", *goals(run), "", "## Beside the peers", ""]
    lines += [*matrix(run), "", "## How to read it", "", CAVEATS]
    for group in dict.fromkeys(row.group for row in run.rows):
        lines += ["", f"## {group}"]
        if group in plots:
            lines += ["", f"![{group}]({plots[group]})"]
        for row in run.rows:
            if row.group == group:
                lines += ["", *table(row)]
    return "\n".join(lines) + "\n"


def goals(run: Run) -> list[str]:
    """The table of what is wanted and what there is."""
    lines = ["| | what | ours | goal | is | |", "|---|---|---|---|---|---|"]
    for row in run.rows:
        for each in report.verdicts(row):
            label = "" if each.entry is row.ours else f", {each.entry.label}"
            lines.append(
                f"| {row.number} | {row.title}{label} | {report.figure(each.entry)} {row.unit} "
                f"| {each.goal} | {each.outcome} | {mark(each)} |"
            )
    return lines


def matrix(run: Run) -> list[str]:
    """How many times as good ours is as each peer, for every row that has peers."""
    rows = [
        row
        for row in run.rows
        if row.ours and row.ours.median and any(each.role == "peer" for each in row.entries)
    ]
    present = {entry.contestant for row in rows for entry in row.entries}
    peers = {label: name for label, name in PEERS.items() if name in present}
    lines = [
        "How many times as good as each peer this pool is; below 1 the peer is better. A peer that",
        "is in a row twice counts with its better figure.",
        "",
        f"| | | {' | '.join(peers)} |",
        "|---|---|" + "---:|" * len(peers),
    ]
    for row in rows:
        cells = [
            cell(row, [entry for entry in row.entries if entry.contestant == name])
            for name in peers.values()
        ]
        lines.append(f"| {row.number} | {row.title} | {' | '.join(cells)} |")
    return lines


def cell(row: Row, entries: list[Entry]) -> str:
    """A peer's place in the matrix: the ratio, or what became of it."""
    measured = [entry for entry in entries if entry.samples]
    if not measured:
        return entries[0].status.partition(" (")[0] if entries else ""
    choose = min if row.better == "lower" else max
    return report.better_by(row, choose(measured, key=lambda entry: entry.median or 0.0))


def mark(verdict: report.Verdict) -> str:
    """The verdict, with what was missed in bold."""
    return verdict.word if verdict.met else f"**{verdict.word}**"


def table(row: Row) -> list[str]:
    """One row of the benchmark, with everybody in it."""
    lines = [
        f"### {row.number}. {row.title}",
        "",
        f"| | {row.unit}, {row.better} is better | quartiles | ours is better by |",
        "|---|---:|---:|---:|",
    ]
    for entry in row.entries:
        label = f"**{entry.label}**" if entry.role == "ours" else entry.label
        value = report.figure(entry)
        if entry.status:
            value = entry.status if entry.median is None else f"{value} ({entry.status})"
        cells = (label, value, report.spread(entry), report.better_by(row, entry))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if row.note:
        lines += ["", row.note]
    return lines
