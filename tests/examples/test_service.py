"""The service of docs/deployment.md, stopped as service managers and terminals stop one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import whitepool_mp

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE = 60


class Service:
    """The running example, in a session and process group of its own."""

    def __init__(self, start_method: str, terminal: int | None = None) -> None:
        command = [sys.executable, "service.py", "--start-method", start_method]
        if terminal is not None:  # standard input is to be the terminal of the whole session
            take = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            command = [sys.executable, "-c", take + f"os.execv({sys.executable!r}, {command!r})"]
        self.process = subprocess.Popen(
            command,
            cwd=EXAMPLES,
            env={**os.environ, "PYTHONPATH": str(Path(whitepool_mp.__file__).parents[1])},
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("serving"):
            pytest.fail(f"{line}{self.process.communicate(timeout=DEADLINE)}")

    def all(self) -> list[psutil.Process]:
        """Every process of it, as in its control group."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def finished(self, *numbers: signal.Signals) -> None:
        """Check that it was told, and finished all that it had taken."""
        out, err = self.process.communicate(timeout=DEADLINE)
        assert err == ""
        told = re.match(r"(\w+): (\d+) jobs taken, (\d+) to be finished\n", out)
        assert told, out
        assert told[1] in {number.name for number in numbers}
        assert int(told[3]) > 2  # some were running, and some were queued
        assert f"finished {told[2]} of {told[2]}\n" in out
        assert self.process.returncode == 0


@pytest.fixture(params=["forkserver", "loky"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    """A service in the middle of its work. Nothing may be left of it."""
    running = Service(request.param)
    every = running.all()
    try:
        yield running
        _, alive = psutil.wait_procs(every, timeout=10)
        assert alive == []
    finally:
        end(running, every)


def end(running: Service, every: list[psutil.Process]) -> None:
    for process in every:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    running.process.communicate(timeout=DEADLINE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
def test_a_signal_to_every_process_loses_no_job(service: Service, number: signal.Signals) -> None:
    """systemd with KillMode=control-group."""
    for process in service.all():
        process.send_signal(number)
    service.finished(number)


def test_sigterm_and_sighup_to_every_process_lose_no_job(service: Service) -> None:
    """systemd with SendSIGHUP=yes: one right after the other."""
    every = service.all()
    for number in (signal.SIGTERM, signal.SIGHUP):
        for process in every:
            process.send_signal(number)
    service.finished(signal.SIGTERM, signal.SIGHUP)


def test_sigterm_to_the_process_group_loses_no_job(service: Service) -> None:
    """A supervisor that signals the group."""
    os.killpg(service.process.pid, signal.SIGTERM)
    service.finished(signal.SIGTERM)


def test_sigterm_to_the_owner_alone_loses_no_job(service: Service) -> None:
    """`docker stop`, Kubernetes, KillMode=mixed."""
    service.process.send_signal(signal.SIGTERM)
    service.finished(signal.SIGTERM)


def test_a_kill_of_the_owner_ends_everything(service: Service) -> None:
    """What follows when the time is over."""
    service.process.kill()
    service.process.communicate(timeout=DEADLINE)
    assert service.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("start_method", ["forkserver", "loky"])
def test_a_terminal_that_closes_loses_no_job(start_method: str) -> None:
    """The kernel sends SIGHUP to those whose terminal it was."""
    leader, follower = os.openpty()
    try:
        running = Service(start_method, follower)
    finally:
        os.close(follower)
    every = running.all()
    try:
        os.close(leader)
        running.finished(signal.SIGHUP)
        _, alive = psutil.wait_procs(every, timeout=10)
        assert alive == []
    finally:
        end(running, every)
