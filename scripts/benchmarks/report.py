"""Figures in words: how a number is written, whether a goal is met, the table on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.model import BEST_PEER, Entry, Goal, Row, Run


@dataclass
class Verdict:
    """A goal and what became of it, in words.

    Args:
        entry: the entry it is about.
        goal: what was wanted.
        outcome: what there is.
        met: whether that is enough; None if it could not be told.
    """

    entry: Entry
    goal: str
    outcome: str
    met: bool | None

    @property
    def word(self) -> str:
        """The verdict."""
        return "not measured" if self.met is None else "met" if self.met else "missed"


def number(value: float) -> str:
    """Three significant digits, thousands set off."""
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.9995 or value == 0:
        return f"{value:.2f}"
    return f"{value:.3f}"


def figure(entry: Entry) -> str:
    """The median of an entry."""
    return "–" if entry.median is None else number(entry.median)


def spread(entry: Entry) -> str:
    """The quartiles of an entry."""
    found = entry.quartiles
    return "" if found is None else f"{number(found[0])} – {number(found[1])}"


def better_by(row: Row, entry: Entry) -> str:
    """How many times as good the row's first of ours is as this entry."""
    ours = row.ours
    if ours is None or ours is entry or ours.median is None or entry.median is None:
        return ""
    if not ours.median or not entry.median:
        return ""
    return f"{number(row.advantage(ours.median, entry.median))} ×"


def goal_text(row: Row, goal: Goal) -> str:
    """What is wanted, in words."""
    if goal.kind == "bound":
        if not goal.value:
            return "none"
        least = "at most" if row.better == "lower" else "at least"
        return f"{least} {number(goal.value)} {row.unit}"
    value = f"{goal.value:g}"
    if goal.kind == "times":
        return f"at most {value} × {goal.against}"
    if goal.against == BEST_PEER:
        return "ahead of every peer" if goal.value == 1 else f"{value} × {BEST_PEER}"
    if row.better == "lower":
        return f"{value} × as fast as {goal.against}"
    return f"at least {value} × {goal.against}"


def verdict(row: Row, goal: Goal) -> Verdict | None:
    """What became of a goal; None if it is about an entry that did not take part."""
    entry = row.entry(goal.entry) if goal.entry else row.ours
    if entry is None:
        return None
    text = goal_text(row, goal)
    if entry.median is None:
        return Verdict(entry, text, entry.status, None)
    ours = entry.median
    if goal.kind == "bound":
        met = ours <= goal.value if row.better == "lower" else ours >= goal.value
        return Verdict(entry, text, f"{number(ours)} {row.unit}", met)
    other = row.best_peer() if goal.against == BEST_PEER else row.entry(goal.against)
    if other is None or other.median is None:
        return Verdict(entry, text, "nothing to compare with", None)
    name = f" ({other.label})" if goal.against == BEST_PEER else ""
    if goal.kind == "times":
        ratio = ours / other.median if other.median else float("inf")
        return Verdict(entry, text, f"{number(ratio)} ×{name}", ratio <= goal.value)
    ratio = row.advantage(ours, other.median)
    return Verdict(entry, text, f"{number(ratio)} ×{name}", ratio >= goal.value)


def verdicts(row: Row) -> list[Verdict]:
    """Those of all its goals."""
    found = [verdict(row, goal) for goal in row.goals]
    return [each for each in found if each is not None]


def heading(run: Run) -> list[str]:
    """What was measured where, in lines."""
    about = run.about
    pinned = "" if about["pinned"] is None else f", everything pinned to CPU {about['pinned']}"
    return [
        f"{about['date']}, {about['subject']}",
        f"{about['cpu']}, {about['cpus']} CPUs{pinned}, {about['memory']} GB; "
        f"Linux {about['kernel']}",
        f"Python {about['python']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"{about['rounds']} rounds{' (quick)' if about['quick'] else ''}, medians and quartiles",
    ]


def text(run: Run) -> str:
    """The whole run for a terminal."""
    lines = heading(run)
    lines += [f"left out, not installed: {', '.join(run.about['missing'])}"] * bool(
        run.about["missing"]
    )
    for row in run.rows:
        lines += ["", f"{row.number}. {row.title} [{row.key}], {row.unit}, {row.better} is better"]
        for entry in row.entries:
            parts = f"{figure(entry):>10} {spread(entry):>20} {better_by(row, entry):>9}"
            lines.append(f"  {entry.label:40}{parts}  {entry.status}".rstrip())
        for each in verdicts(row):
            about = "" if each.entry is row.ours else f"{each.entry.label}: "
            lines.append(f"  {each.word}: {about}{each.goal}; is {each.outcome}")
    return "\n".join(lines)
