"""Each example, run as a user would, and judged by what a user would notice."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_how_to_run_it_and_has_no_main_guard(path: Path) -> None:
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring
    assert f"python {path.name}" in docstring
    branches = [ast.unparse(node.test) for node in ast.walk(tree) if isinstance(node, ast.If)]
    assert not [test for test in branches if "__name__" in test]


@pytest.mark.parametrize("hide", [None, "tqdm"], ids=["as installed", "without tqdm"])
def test_offload(run_example: Callable[..., Any], hide: str | None) -> None:
    ended = run_example("offload.py", "--files", "120", "--workers", "2", hide=hide)
    assert ended.code == 0, ended
    ended.line(r"standard library of Python 3\.\d+\.\d+\S*: 120 files, [\d.]+ MB; 2 workers")
    for label in ("pool", "one process"):
        ended.line(rf"{label} +[\d.]+ s +[\d.]+ files/s +[\d.]+ MB/s$")
    assert float(ended.line(r"speed-up +([\d.]+) x$")[1]) > 0
    lost = r"job 61 of 121 \(a job that reads address 0\) did not come back:"
    ended.line(rf"{lost}\n  WorkerDied: .*SIGSEGV")
    ended.line("exactly that one job died: yes$")
    ended.line("others that came back: 120 of 120$")
    ended.line("their hashes agree with the sequential run's: yes$")
    assert ended.err, "the progress bar goes to stderr"


def test_sqlite_pool(run_example: Callable[..., Any]) -> None:
    ended = run_example("sqlite_pool.py")
    assert ended.code == 0, ended
    ended.line(r"inserted through the connection in slot \d: \{'ada': 100, 'bob': 20\}$")
    ended.line(r"ada gives bob 30:   \{'ada': 70, 'bob': 50\}$")
    ended.line("ada gives bob 500:  ValueError: ada does not have 500$")
    ended.line(r"so nothing changed: \{'ada': 70, 'bob': 50\}$")
    assert 1 <= int(ended.line(r"32 reads by (\d) connections")[1]) <= 4
    ended.line("the same, one after another, agrees: True$")
    closed = re.findall(r"^slot (\d) closed its connection$", ended.out, re.MULTILINE)
    assert sorted(closed) == ["0", "1", "2", "3"]
    ended.line("temporary folder removed: True$")
    assert ended.err == ""


def test_crash_isolation(run_example: Callable[..., Any]) -> None:
    ended = run_example("crash_isolation.py")
    assert ended.code == 0, ended
    cases = ended.out.split("session.run(")[1:]
    errors = [re.search(r"after [\d.]+ s: (\w+)", case) for case in cases]
    assert [error and error[1] for error in errors] == [
        "WorkerDied",
        "WorkerDied",
        "MemoryError",
        "WorkerDied",
        "CallTimeout",
    ]
    assert "signal SIGSEGV" in cases[0]
    assert "exit code 3, signal None" in cases[1]
    assert "signal SIGKILL" in cases[3]
    steps = []
    for case in cases:
        assert "the pool serves on: 100 jobs" in case
        told = re.search(r"the sibling is at step (\d+), running", case)
        assert told, case
        steps.append(int(told[1]))
    assert steps == sorted(steps)
    last = int(ended.line(r"the sibling's call ended by itself after (\d+) steps")[1])
    assert last >= steps[-1]
    ended.line("every job ended as it should: yes$")


def test_stateful_model(run_example: Callable[..., Any]) -> None:
    ended = run_example("stateful_model.py", "--workers", "3")
    assert ended.code == 0, ended
    pids = dict(re.findall(r"^slot (\d): pid (\d+) on .*loaded", ended.out, re.MULTILINE))
    assert sorted(pids) == ["0", "1", "2"]
    assert len(set(pids.values())) == 3
    served = re.findall(r"^  slot (\d) \(pid (\d+)\) served (\d+)$", ended.out, re.MULTILINE)
    assert sum(int(count) for _, _, count in served) == 60
    assert all(pids[slot] == pid for slot, pid, _ in served)
    replaced = ended.line(r"slot (\d): pid (\d+) destroyed, replaced by pid (\d+) on ")
    assert pids[replaced[1]] == replaced[2]
    assert replaced[3] not in pids.values()
    ended.line("the other slots kept their workers: True$")
    loads = re.findall(r"^loads: (\d+), workers: 3$", ended.out, re.MULTILINE)
    assert loads == ["3", "4"]
    ended.line("same prompt, same answer: True$")
    assert ended.err == ""


@pytest.mark.parametrize("source", ["a file", "standard input"])
def test_plain_script(run_example: Callable[..., Any], source: str) -> None:
    if source == "a file":
        ended = run_example("plain_script.py")
    else:
        ended = run_example("-", stdin=(EXAMPLES / "plain_script.py").read_text())
    assert ended.code == 0, ended
    assert len(re.findall("^the body of __main__ runs once", ended.out, re.MULTILINE)) == 1
    assert ended.out.splitlines()[1:] == [
        "a lambda: 42",
        "a function of this script: 120",
        "a closure: 343",
        "a built-in: 2432902008176640000",
        "an instance there and back: Point(2, 3) - isinstance: True",
        "a method: Point(12, 23)",
        "map over a generator: [10000, 40000, 90000, 160000, 250000, 360000, 490000]",
        "as they finish: [1000, 2000, 3000, 4000, 5000, 6000, 7000]",
        "in another process: True",
        "an exception: TooHot: 45 degrees in the attic (45, 'the attic')",
    ]
    assert ended.err == ""


def test_asyncio_pool(run_example: Callable[..., Any]) -> None:
    ended = run_example("asyncio_pool.py")
    assert ended.code == 0, ended
    ended.line("one call: 9592$")
    ended.line("a gather of 100: all right$")
    ended.line(r"async for over map: \[0, 1, 4, 9, 16, 25, 36, 49, 64, 81\]$")
    ended.line(r"one lease, two calls: worker \d+ remembers 'hello'$")
    spun = ended.line(r"1 s of spinning in 2 processes; meanwhile the loop ran (\d+) times")
    assert int(spun[1]) > 10
    ended.line("too slow: CallTimeout: ")
    ended.line("cancelled, and the pool serves on: 1024$")
    assert int(ended.line(r"the pool stopped in (\d+) ms$")[1]) < 5000
    assert ended.err == ""
