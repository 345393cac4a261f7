"""The number by which a pool's processes, and what descends from them, are known."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support import until

from whitepool_mp.wire import lineage

LAST = (1 << 20) - 1

WAITS = "import sys; sys.stdin.read()"
NESTED = """
import subprocess, sys
from whitepool_mp.wire import lineage
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
lineage.mark(child.pid, {number})
own = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
print(child.pid, lineage.number(child.pid), lineage.number(own.pid) is None, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdin=subprocess.PIPE) as process:
        yield process


def test_who_descends_from_no_worker_has_no_number(child: subprocess.Popen[bytes]) -> None:
    assert lineage.number(os.getpid()) is None
    assert lineage.number(child.pid) is None


@pytest.mark.parametrize("number", [lineage.NURSERY, 1, 2, 1000, LAST])
def test_a_child_has_the_number_that_it_was_given(
    child: subprocess.Popen[bytes], number: int
) -> None:
    lineage.mark(child.pid, number)
    assert lineage.number(child.pid) == number


def test_a_number_is_inherited_by_whatever_cuts_all_ties() -> None:
    """By a grandchild without environment, in its own session; also by a zombie."""
    line = f"echo started; exec {sys.executable} -I -c 'input()'"
    command = ["setsid", "-w", "env", "-i", "sh", "-c", line]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: lineage.enter(7),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        assert lineage.number(process.pid) == 7
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert lineage.number(process.pid) == 7
    assert lineage.number(process.pid) is None


@pytest.mark.parametrize("inner", [1, LAST])
def test_a_pool_in_a_worker_numbers_its_own_within_that_workers(inner: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NESTED.format(number=inner)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: lineage.enter(5),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        pid, seen, unmarked = process.stdout.readline().split()
        assert (int(seen), unmarked) == (inner, b"True")
        assert lineage.number(int(pid)) == 5
    until(lambda: lineage.number(int(pid)) is None)


def test_the_limit_in_use_for_its_own_purpose_is_left_alone(
    child: subprocess.Popen[bytes],
) -> None:
    limits = 200_000, 1 << 61
    resource.prlimit(child.pid, resource.RLIMIT_RTTIME, limits)
    assert lineage.number(child.pid) is None
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, 200_000))\n"
        "from whitepool_mp.wire import lineage; lineage.enter(3)\n"
        "assert resource.getrlimit(resource.RLIMIT_RTTIME) == (200_000, 200_000)\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0


def test_the_numbers_of_workers_wrap_and_are_never_the_nurserys() -> None:
    assert [lineage.of(worker) for worker in (1, 2, LAST, LAST + 1, LAST + 2)] == [1, 2, LAST, 1, 2]
