"""docs/security.md names tests: each of them must exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "security.md").read_text()
NAMED = re.compile(r"`((?:\w+/)?test_\w+\.py)::(test_\w+)`")


def test_every_test_that_is_named_exists() -> None:
    named = set(NAMED.findall(TEXT))
    assert len(named) > 15
    for file, name in sorted(named):
        text = (TESTS / file).read_text()
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), f"{file}::{name}"


def test_nothing_else_looks_like_a_test() -> None:
    assert "test_" not in NAMED.sub("", TEXT)


def test_every_statement_of_a_table_with_tests_has_one() -> None:
    table = False
    for line in TEXT.splitlines():
        if line == "| statement | test |":
            table = True
        elif not line.startswith("|"):
            table = False
        elif table and not line.startswith("|---"):
            assert NAMED.search(line), line
