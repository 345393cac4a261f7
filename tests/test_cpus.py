"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path

import loky
import pytest

from whitepool_mp.cpus import usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)


def count(folder: Path, listed: str, files: dict[str, str]) -> int:
    """What it is with these control groups."""
    (folder / "listed").write_text(listed)
    for name, text in files.items():
        path = folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return usable_cpus(str(folder / "listed"), str(folder / "root"))


SECOND = "0::/a.slice/b.service\n"
FIRST = "4:memory:/x\n2:cpu,cpuacct:/a/b\n0::/\n"


@pytest.mark.parametrize(
    ("listed", "files", "expected"),
    [
        (SECOND, {}, 8),
        (SECOND, {"cpu.max": "max 100000\n"}, 8),
        (SECOND, {"a.slice/b.service/cpu.max": "250000 100000\n"}, 3),
        (SECOND, {"a.slice/b.service/cpu.max": "max 100000\n", "a.slice/cpu.max": "2000 1000"}, 2),
        (SECOND, {"cpu.max": "1000 100000\n"}, 1),
        (SECOND, {"cpu.max": "9900000 100000\n"}, 8),
        (SECOND, {"cpu.max": "\n", "a.slice/cpu.max": "x y"}, 8),
        ("0::/../../elsewhere\n", {"cpu.max": "400000 100000\n"}, 4),
        (FIRST, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, 8),
        (FIRST, {"cpu/a/b/cpu.cfs_quota_us": "150000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 2),
        (FIRST, {"cpu/cpu.cfs_quota_us": "500", "cpu/cpu.cfs_period_us": "100"}, 5),
        (FIRST, {"cpu/cpu.cfs_quota_us": "500", "cpu/cpu.cfs_period_us": "0"}, 8),
        ("", {"cpu.max": "1000 1000"}, 8),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, listed: str, files: dict[str, str], expected: int
) -> None:
    assert count(tmp_path, listed, files) == expected


def test_without_control_groups() -> None:
    assert usable_cpus("/nonexistent", "/nonexistent") == 8


@pytest.mark.parametrize(("most", "expected"), [("3", 3), ("100", 8), ("0", 1), ("-2", 1)])
def test_a_limit_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, most: str, expected: int
) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", most)
    assert usable_cpus("/nonexistent") == expected


def test_a_limit_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "many")
    with pytest.raises(ValueError, match=r"LOKY_MAX_CPU_COUNT: got 'many'.*; allowed: "):
        usable_cpus()


def test_it_is_what_loky_counts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert usable_cpus() == loky.cpu_count()
