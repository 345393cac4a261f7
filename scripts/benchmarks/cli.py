"""The command line of `scripts/bench`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from benchmarks import document, plan, report
from benchmarks.about import about
from benchmarks.conductor import Conductor, available, say
from benchmarks.model import Row, Run

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
DATA = "benchmarks.json"
_ROUNDS = 11
_QUICK_ROUNDS = 3
_QUICK_PACE = 0.3


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="This pool beside its peers, interleaved, in one run."
    )
    parser.add_argument("--rounds", type=int, help=f"samples of each figure ({_ROUNDS})")
    parser.add_argument("--rows", help="numbers or names, with commas; see --list")
    parser.add_argument("--budget", action="store_true", help="where the time of a run goes")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--quick", action="store_true", help="few and short rounds")
    parser.add_argument("--heavy", action="store_true", help="with --quick: the long rows as well")
    parser.add_argument("--ray", action="store_true", help="install Ray as well, which is huge")
    parser.add_argument("--pin", action="store_true", help="everything on one CPU")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md and plots")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the raw data there")
    parser.add_argument("--render", type=Path, metavar="FILE", help="measure nothing; show FILE")
    return parser.parse_args(arguments)


def chosen(rows: list[Row], given: argparse.Namespace) -> list[Row]:
    """The rows that the command line asks for."""
    if given.rows:
        wanted = [word.strip() for word in given.rows.split(",")]
        known = {str(row.number) for row in rows} | {row.key for row in rows}
        if unknown := [word for word in wanted if word not in known]:
            raise SystemExit(f"no such row: {', '.join(unknown)}; see scripts/bench --list")
        return [row for row in rows if row.key in wanted or str(row.number) in wanted]
    if given.quick and not given.heavy:
        return [row for row in rows if row.quick]
    return rows


def measured(rows: list[Row], given: argparse.Namespace) -> Run:
    """Run them."""
    cpu = None
    if given.pin:
        cpu = min(os.sched_getaffinity(0))
    missing = available(rows)
    for label in missing:
        say(f"left out: {label} is not installed")
    rounds = given.rounds or (_QUICK_ROUNDS if given.quick else _ROUNDS)
    facts = about(ROOT, pinned=cpu, rounds=rounds, quick=given.quick, missing=missing)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    with Conductor(rounds, _QUICK_PACE if given.quick else 1.0) as conductor:
        for row in rows:
            conductor.run(row)
    return Run(facts, rows)


def write(run: Run) -> None:
    """The page, its plots and its data."""
    from benchmarks import plots

    names = plots.draw(run, PLOTS)
    (PLOTS / DATA).write_text(json.dumps(run.as_json(), indent=1) + "\n")
    files = {group: f"plots/{name}" for group, name in names.items()}
    PAGE.write_text(document.document(run, files, f"plots/{DATA}"))
    say(f"wrote {PAGE.relative_to(ROOT)} and {PLOTS.relative_to(ROOT)}/")


def main(arguments: list[str] | None = None) -> None:
    """Measure or render, print, and write if told to."""
    given = options(arguments)
    if given.budget:
        from benchmarks.budget import print_budget

        print_budget()
        return
    rows = plan.rows()
    if given.list:
        for row in rows:
            print(f"{row.number:3} {row.key:18} {row.title}")
        return
    if given.render:
        run = Run.from_json(json.loads(given.render.read_text()))
    else:
        run = measured(chosen(rows, given), given)
    if given.save:
        given.save.write_text(json.dumps(run.as_json(), indent=1) + "\n")
    print(report.text(run))
    sys.stdout.flush()
    if given.write:
        write(run)
