"""The command line of `scripts/chaos`."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from walk import actions, jobs, payloads
from walk.account import Account
from walk.crowd import Crowd
from walk.faults import Hand
from walk.invariants import Watch
from walk.ledger import Ledger
from walk.leftovers import MARK, Before
from walk.party import Party
from whitepool_mp import Pool, WhitepoolError

_HERE = ("run", "submit", "map", "lease", "lease", "asyncio")
"""The clients of the walker's own process."""
_PROCESSES = 2
_GUARD_SECONDS = 250.0
"""How much longer than the walk everything may take, until all stacks are shown and that was it."""
_SHUTDOWN_SECONDS = 60.0
_MANAGER_DESCRIPTORS = 40
"""How many more the manager may have after a walk: a connection for each thread that was."""


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description="Seeded faults under load, with an account of every job."
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the walk takes (30)")
    parser.add_argument("--seed", type=int, default=1, help="what its steps come from (1)")
    parser.add_argument("--rate", type=float, default=25.0, help="steps a second (25)")
    parser.add_argument("--start-method", choices=("forkserver", "loky"), default="forkserver")
    parser.add_argument(
        "--managers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="kill and stop the manager as well (yes)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="print the first N steps, and end")
    parser.add_argument("--keep", action="store_true", help="leave the books of all jobs there")
    parser.add_argument("--peers", action="store_true", help="other pools instead, in a table")
    parser.add_argument("--kills", type=float, default=4.0, help="with --peers: a second (4)")
    parser.add_argument("--only", help="with --peers: those of these names, with commas")
    parser.add_argument("--write", action="store_true", help="with --peers: docs/reliability.md")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Walk, and print the account; 0 if it balances."""
    given = options(arguments)
    if given.steps is not None:
        steps = actions.walk(given.seed, given.managers, given.rate)
        for _, step in zip(range(given.steps), steps, strict=False):
            print(step)
        return 0
    if given.peers:
        from walk.table import compare

        return compare(given.seconds, given.seed, given.kills, given.only, given.write)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    faulthandler.dump_traceback_later(given.seconds + _GUARD_SECONDS, exit=True)
    with _folder(given.keep) as folder:
        wrong = Walk(given, folder).run()
    faulthandler.cancel_dump_traceback_later()
    print("the account balances" if not wrong else "THE ACCOUNT DOES NOT BALANCE:")
    for text in wrong:
        print(f"- {text}")
    return 1 if wrong else 0


@contextlib.contextmanager
def _folder(keep: bool) -> Iterator[Path]:
    """A folder of this walk's own for temporary files, which processes that it starts inherit."""
    base = tempfile.mkdtemp(prefix="chaos-")
    folder = Path(base)
    tempfile.tempdir = os.environ["TMPDIR"] = base
    try:
        yield folder
    finally:
        if keep:
            print(f"the books are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _words(path: Path) -> Iterator[None]:
    """Write standard error, that of all processes, to a file, and show it in the end.

    The guard against hanging keeps the real one.
    """
    real = os.dup(2)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    os.close(fd)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(real, 2)
        os.close(real)
        sys.stderr.write(path.read_text(errors="replace"))
        sys.stderr.flush()


class Walk:
    """One walk of this pool.

    Args:
        given: the command line.
        folder: for everything that is written.
    """

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._given = given
        self._folder = folder
        self._begun = folder / "begun"
        self._begun.touch()
        self._mark = folder.name
        self._ledger = Ledger(folder / "ledger-0", 0)  # to the end: who is stuck may yet write
        self._wrong: list[str] = []
        arrays = given.start_method == "forkserver" and find_spec("numpy") is not None
        os.environ.update(
            {
                MARK: self._mark,
                jobs.FILE: str(self._begun),
                payloads.ARRAYS: str(int(arrays)),
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            }
        )
        self._preload = ("walk.jobs", "numpy") if arrays else ("walk.jobs",)
        warnings.simplefilter("always", ResourceWarning)

    def run(self) -> list[str]:
        """Walk; what is wrong."""
        with _words(self._folder / "stderr"):
            before = Before(self._folder, self._mark)
            killed = self._walk()
            self._wrong += [f"left behind: {what}" for what in before.left()]
            for process in before.processes():
                process.kill()
        if words := (self._folder / "stderr").read_text(errors="replace").strip():
            self._wrong.append(f"{len(words.splitlines())} lines on standard error, see above")
        ledgers = sorted(self._folder.glob("ledger-*"))
        account = Account.read(ledgers, self._begun, killed)
        for line in account.report():
            print(line)
        return self._wrong + account.wrong()

    def _walk(self) -> set[int]:
        """Make a pool and its clients, and walk; the indices of the processes that were killed."""
        given = self._given
        session = Pool(
            actions.SIZE,
            actions.OVERFLOW,
            jobs.factory,
            name="chaos",
            start_method=given.start_method,
            preload=self._preload,
            overflow_ttl=1.0,
            max_calls=50,
            max_lifetime=3.0,
        ).run_service()
        watch = Watch(session)
        self._wrong += filter(None, [watch.whole()])
        descriptors = watch.descriptors()
        party = Party(session, self._ledger, given.seed, _HERE, "walker")
        crowd = Crowd(session, self._folder, _PROCESSES, random.Random(given.seed))
        hand = Hand(session, crowd)
        steps = self._steps(hand, watch)
        hand.end()
        party.let_go()
        crowd.let_go()
        stuck = party.end()
        self._wrong += crowd.end()
        try:
            self._wrong += filter(None, [watch.whole()])
            status = session.status()
            more = watch.descriptors() - descriptors
            session.safe_shutdown(timeout=0.0 if stuck else _SHUTDOWN_SECONDS)
        except WhitepoolError as error:
            self._wrong.append(f"at the end: {type(error).__name__}: {error}")
            session.terminate()
        else:
            if more > _MANAGER_DESCRIPTORS:
                self._wrong.append(f"the manager has {more} descriptors more than at first")
            counters = status.counters
            print(f"workers started: {counters['spawned']}, recycled: {counters['recycled']}")
        done = ", ".join(f"{what}: {count}" for what, count in sorted(hand.done.items()))
        print(f"seed {given.seed}, {given.seconds:g} s, {steps} steps: {done}")
        print(f"looked {watch.looks} times")
        self._wrong += [f"{what} ({count} times)" for what, count in watch.broken.items()]
        return crowd.killed

    def _steps(self, hand: Hand, watch: Watch) -> int:
        """Take steps until the time is up; how many."""
        given = self._given
        pause = threading.Event()
        until = time.monotonic() + given.seconds
        for count, action in enumerate(actions.walk(given.seed, given.managers, given.rate)):
            if time.monotonic() > until:
                return count
            try:
                if action.verb == "look":
                    watch.look()
                elif action.verb == "resize":
                    watch.resize(action.size, action.overflow)
                    hand.done["resize"] += 1
                else:
                    hand.perform(action)
            except WhitepoolError as error:
                watch.broken[f"{action.verb} {action.target}: {type(error).__name__}: {error}"] += 1
            pause.wait(action.pause)
        raise AssertionError("a walk has no end")
