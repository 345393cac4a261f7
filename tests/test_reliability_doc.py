"""docs/reliability.md names a test for every fault: each of them must exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
LINES = (TESTS.parent / "docs" / "reliability.md").read_text().splitlines()
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`")
UNBUILT = re.compile(r"not built yet")


def rows() -> list[str]:
    """The lines of the tables of faults, without their heads."""
    begin = LINES.index("## Every fault, and its test")
    ends = [number for number, line in enumerate(LINES) if line.startswith("## ")]
    end = min((number for number in ends if number > begin), default=len(LINES))
    lines = [line for line in LINES[begin:end] if line.startswith("|")]
    return [line for line in lines if not line.startswith(("| fault |", "|---"))]


def test_every_fault_has_a_test_or_says_why_not() -> None:
    assert len(rows()) > 60
    for row in rows():
        assert NAMED.search(row) or UNBUILT.search(row), row


def test_every_test_that_is_named_exists() -> None:
    named = {match.groups() for row in rows() for match in NAMED.finditer(row)}
    for file, name in sorted(named):
        text = (TESTS / file).read_text()
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file}::{name}"


def test_nothing_else_looks_like_a_test() -> None:
    """A name that is misspelt so that it is not found above."""
    for row in rows():
        rest = UNBUILT.sub("", NAMED.sub("", row))
        assert "test_" not in rest, rest
