"""A factory that goes wrong in one worker while another serves: nobody who has a worker notices."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import deeds
import psutil
import pytest
from support import sibling, until

from whitepool_mp import CheckoutTimeout, FactoryFailed, Pool, Session

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""

FAILURES = {
    "failing_factory": "LookupError: no database here",
    "ask_to_exit": "SystemExit: 4",
    "leave": "exit code 3",
    "segfault": "SIGSEGV",
    "abort": "SIGABRT",
    "libc_exit": "exit code 0",
    "kill_self": "SIGKILL",
}


class Told:
    """A factory that does what it is told for the next starts, and how it fares."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "told"
        self.pids = f"{self._path}.pids"
        self.factory = deeds.AsTold(str(self._path))
        self.tell("")

    def tell(self, deed: str) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(deed)
        new.replace(self._path)


def failing(session: Session) -> str:
    """Wait until a start has failed; what the pool says of it."""
    until(lambda: session.status().failing)
    return str(session.status().last_failure)


def _two(pids: list[int]) -> list[int]:
    return pids if len(pids) == 2 else []


def settled(session: Session) -> None:
    """Wait until the overflow worker has gone again, and the sibling's is alone."""

    def alone() -> bool:
        now = session.status()
        return (now.leased, now.booting, now.retiring, now.failing) == (1, 0, 0, False)

    until(alone)


def test_a_start_that_fails_beside_a_busy_worker_harms_nobody(
    start_method: str, tmp_path: Path
) -> None:
    """Raises, exits, crashes, is killed; in the end it works, and who waited is served."""
    told = Told(tmp_path)
    with Pool(1, 1, told.factory, start_method=start_method, overflow_ttl=0) as session:
        with sibling(session, tmp_path):
            (busy,) = (row.pid for row in session.workers())
            for deed, says in FAILURES.items():
                told.tell(deed)
                waiting = session.submit(os.getpid)
                assert says in failing(session), deed
                with pytest.raises((CheckoutTimeout, FactoryFailed)):
                    session.checkout(0.02)
                assert not waiting.done()
                told.tell("")
                assert waiting.result(T) not in (busy, os.getpid())
                settled(session)
            assert session.status().counters["crashes"] == 0


def test_a_worker_killed_in_its_factory_beside_a_busy_one_harms_nobody(
    start_method: str, tmp_path: Path
) -> None:
    told = Told(tmp_path)
    with Pool(1, 1, told.factory, start_method=start_method, overflow_ttl=0) as session:
        with sibling(session, tmp_path):
            told.tell("hang")
            waiting = session.submit(os.getpid)
            (_, pid) = until(lambda: _two(deeds.noted(told.pids)))  # type: ignore[misc]
            told.tell("")
            os.kill(pid, signal.SIGKILL)
            assert waiting.result(T) != pid
            until(lambda: not psutil.pid_exists(pid))
            settled(session)


def test_a_factory_that_hangs_beside_a_busy_worker_is_ended_by_start_timeout(
    start_method: str, tmp_path: Path
) -> None:
    told = Told(tmp_path)
    options: dict[str, Any] = {"overflow_ttl": 0, "start_timeout": 1.5}
    with Pool(1, 1, told.factory, start_method=start_method, **options) as session:
        with sibling(session, tmp_path):
            told.tell("hang")
            waiting = session.submit(os.getpid)
            (_, pid) = until(lambda: _two(deeds.noted(told.pids)))  # type: ignore[misc]
            told.tell("")
            assert waiting.result(T) != pid
            assert "did not start within 1.5 s" in str(session.status().last_failure)
            until(lambda: not psutil.pid_exists(pid))
            settled(session)
