"""Kill workers at random under load, and account for every job.

Each job writes a line to a file when it begins, in one atomic append, so that what really ran can
be compared with what the callers were told. Run it by `scripts/chaos --seconds 30 --seed 1`. The
exit code is 0 only if the account balances: every job ended in one way, none ran twice, none that
is said not to have begun had, and no process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import random
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import Future

import psutil

from whitepool_mp import CheckoutTimeout, Pool, Session, WorkerDied


def job(path: str, number: int, seconds: float) -> int:
    """Say that it began, take a while, return its number."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"%d\n" % number)
    os.close(fd)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return number


class Account:
    """What became of each job, by its number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self.ends: dict[int, list[str]] = {}
        self.unbegun: set[int] = set()

    def open(self) -> int:
        """A new job."""
        with self._lock:
            self._next += 1
            self.ends[self._next] = []
            return self._next

    def close(self, number: int, outcome: object) -> None:
        """A job ended: with its result, or an exception."""
        if isinstance(outcome, WorkerDied):
            end = "died"
            if not outcome.started:
                self.unbegun.add(number)
        elif isinstance(outcome, CheckoutTimeout):
            end = "no worker in time"
        elif isinstance(outcome, BaseException):
            end = type(outcome).__name__
        else:
            end = "returned" if outcome == number else f"returned {outcome!r}"
        with self._lock:
            self.ends[number].append(end)


def by_run(session: Session, path: str, account: Account, stop: threading.Event, seed: int) -> None:
    """A client thread that runs one job after the other."""
    rng = random.Random(seed)
    while not stop.is_set():
        number = account.open()
        try:
            outcome: object = session.run(job, path, number, rng.choice((0, 0.001, 0.01)))
        except Exception as error:
            outcome = error
        account.close(number, outcome)


def by_submit(
    session: Session, path: str, account: Account, stop: threading.Event, seed: int
) -> None:
    """A client thread that keeps a few dozen jobs in the background."""
    rng = random.Random(seed)
    room = threading.Semaphore(30)

    def ended(number: int, future: Future[int]) -> None:
        account.close(number, future.exception() or future.result())
        room.release()

    while not stop.is_set():
        room.acquire()
        number = account.open()
        future = session.submit(job, path, number, rng.choice((0, 0.001, 0.01)))
        future.add_done_callback(lambda done, number=number: ended(number, done))
    for _ in range(30):
        room.acquire()


def by_map(session: Session, path: str, account: Account, stop: threading.Event, seed: int) -> None:
    """A client thread that maps over what it numbers as it goes."""
    rng = random.Random(seed)
    while not stop.is_set():
        numbers = [account.open() for _ in range(rng.randrange(1, 300))]
        times = [rng.choice((0, 0.0001, 0.002)) for _ in numbers]
        results = session.map(job, [path] * len(numbers), numbers, times, return_exceptions=True)
        for number, outcome in zip(numbers, results, strict=True):
            account.close(number, outcome)


def by_asyncio(
    session: Session, path: str, account: Account, stop: threading.Event, seed: int
) -> None:
    """An event loop with a few tasks that run jobs."""
    rng = random.Random(seed)

    async def client(form: object) -> None:
        while not stop.is_set():
            number = account.open()
            try:
                outcome: object = await form.run(  # type: ignore[attr-defined]
                    job, path, number, rng.choice((0, 0.001, 0.01))
                )
            except Exception as error:
                outcome = error
            account.close(number, outcome)

    async def clients() -> None:
        form = session.aio()
        await asyncio.gather(*(client(form) for _ in range(5)))

    asyncio.run(clients())


def kill_at_random(
    session: Session, seconds: float, rng: random.Random, states: tuple[str, ...]
) -> dict[str, int]:
    """Send SIGKILL to workers in these states, one or several, a few dozen times a second."""
    kills = collections.Counter[str]()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        rows = [row for row in session.workers() if row.pid is not None and row.state in states]
        for row in rng.sample(rows, k=min(len(rows), rng.choice((1, 1, 1, 2, len(rows))))):
            try:
                if psutil.Process(row.pid).create_time() == row.created:
                    os.kill(row.pid, signal.SIGKILL)
                    kills[row.state] += 1
            except (psutil.Error, ProcessLookupError):
                kills["gone before"] += 1
        time.sleep(rng.uniform(0, 0.05))
    return kills


def main() -> int:
    """Run the walk and print its account."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--booting",
        action="store_true",
        help="kill starting workers too; FactoryFailed is fair then",
    )
    options = parser.parse_args()
    rng = random.Random(options.seed)
    account, stop = Account(), threading.Event()
    with tempfile.NamedTemporaryFile() as began:
        session = Pool(options.workers, max_overflow=2, name="chaos").run_service()
        clients = [
            threading.Thread(target=kind, args=(session, began.name, account, stop, rng.random()))
            for kind in (by_run, by_run, by_run, by_submit, by_map, by_asyncio)
        ]
        for client in clients:
            client.start()
        states = ("idle", "leased", "booting") if options.booting else ("idle", "leased")
        kills = kill_at_random(session, options.seconds, rng, states)
        stop.set()
        for client in clients:
            client.join(60)
        stuck = sum(client.is_alive() for client in clients)
        status = session.status()
        session.safe_shutdown(timeout=60)
        runs = collections.Counter(int(line) for line in began.read().split())
    left = len(psutil.Process().children(recursive=True))

    ends = collections.Counter(end for ends in account.ends.values() for end in ends)
    lost = [number for number, ends in account.ends.items() if not ends]
    twice_told = [number for number, ends in account.ends.items() if len(ends) > 1]
    twice_run = [number for number, count in runs.items() if count > 1]
    not_run = [
        number
        for number, ends in account.ends.items()
        if ends == ["returned"] and number not in runs
    ]
    died_unbegun = account.unbegun & set(runs)
    size = f"{status.pool_size}+{status.max_overflow}"
    print(f"seed {options.seed}, {options.seconds:g} s, {size} workers")
    print(f"workers killed: {sum(kills.values())} ({dict(kills)})")
    print(f"workers started: {status.counters['spawned']}")
    print(f"jobs: {len(account.ends)}")
    for end, count in ends.most_common():
        print(f"  {end}: {count}")
    print(f"  lost (no end was told): {len(lost)}")
    print(f"  told two ends: {len(twice_told)}")
    print(f"run twice: {len(twice_run)}")
    print(f"returned without having run: {len(not_run)}")
    print(f"said not to have begun, and had: {len(died_unbegun)}")
    print(f"client threads stuck: {stuck}; processes left: {left}")
    bad = lost or twice_told or twice_run or not_run or died_unbegun or stuck or left
    strange = set(ends) - {"returned", "died"} - ({"FactoryFailed"} if options.booting else set())
    print("the account balances" if not bad and not strange else "THE ACCOUNT DOES NOT BALANCE")
    return 1 if bad or strange else 0


if __name__ == "__main__":
    sys.exit(main())
