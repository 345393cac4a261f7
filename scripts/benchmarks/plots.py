"""One SVG file for each group of rows: a horizontal bar chart for each row, one below the other."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.model import Row, Run

_COLOURS = {"ours": "#1f6f8b", "peer": "#c4c8cc", "floor": "#7d8790"}
_BAR_INCHES = 0.24


def draw(run: Run, folder: Path) -> dict[str, str]:
    """Write the files; their names by group."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "whitepool", "svg.fonttype": "none", "font.size": 9}
    )
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for group in dict.fromkeys(row.group for row in run.rows):
        rows = [row for row in run.rows if row.group == group]
        heights = [len(row.entries) * _BAR_INCHES + 0.85 for row in rows]
        figure, axes = pyplot.subplots(
            len(rows),
            1,
            figsize=(8, sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for row, axis in zip(rows, axes[:, 0], strict=True):
            bars(row, axis)
        name = group.lower().replace(" ", "-") + ".svg"
        figure.savefig(folder / name, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
        names[group] = name
    return names


def bars(row: Row, axis: Any) -> None:
    """One row's chart: a bar for each median, a line for its quartiles."""
    positions = range(len(row.entries))
    values = [each.median or 0.0 for each in row.entries]
    axis.barh(positions, values, color=[_COLOURS[each.role] for each in row.entries], height=0.7)
    for position, entry in zip(positions, row.entries, strict=True):
        text = entry.status.partition(" (")[0] if entry.median is None else report.figure(entry)
        end = entry.median or 0.0
        if entry.quartiles is not None:
            low, high = entry.quartiles
            axis.plot([low, high], [position, position], color="#333333", linewidth=1)
            end = max(end, high)
        axis.annotate(
            text,
            (end, position) if end else (0, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            xycoords="data" if end else ("axes fraction", "data"),
        )
    if row.log and any(values):
        axis.set_xscale("log")
    axis.set_yticks(list(positions), [each.label for each in row.entries])
    axis.set_ylim(len(row.entries) - 0.5, -0.5)
    axis.margins(x=0.16)
    scale = ", logarithmic" if row.log else ""
    axis.set_title(
        f"{row.title.replace('`', '')}\n{row.unit}, {row.better} is better{scale}",
        loc="left",
        fontsize=9,
    )
    axis.spines[["top", "right"]].set_visible(False)
