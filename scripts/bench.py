"""Round trips side by side with the floor and the standard library, interleaved in one run.

Run it by `scripts/bench`. Each round measures every row once; a row's figure is the median of its
rounds, with the quartiles as its spread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection

from whitepool_mp import Pool

noop = os.getpid  # the job: importable, so that every pool pickles it by reference


def by_value() -> None:
    """The same, as a function of a script: it has to travel by value."""


def echo(connection: Connection) -> None:
    """The floor: unpickle (fn, args), call, pickle the result, over a bare pipe."""
    while True:
        fn, args = pickle.loads(connection.recv_bytes())
        connection.send_bytes(pickle.dumps(fn(*args)))


def timed(action: Callable[[], object], count: int) -> float:
    """Microseconds for each of `count` repetitions."""
    start = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - start) / count * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--count", type=int, default=400, help="round trips in each round")
    options = parser.parse_args()
    count = options.count

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(target=echo, args=(theirs,), daemon=True)
    child.start()

    def floor() -> None:
        ours.send_bytes(pickle.dumps((noop, ())))
        pickle.loads(ours.recv_bytes())

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor, Pool(pool_size=2) as session:

        def many(submit: Callable[..., object]) -> Callable[[], None]:
            def action() -> None:
                for future in [submit(noop) for _ in range(count)]:
                    future.result()  # type: ignore[attr-defined]

            return action

        with session.checkout() as lease:
            rows: dict[str, Callable[[], float]] = {
                "bare Pipe echo (the floor)": lambda: timed(floor, count),
                "whitepool_mp lease.call": lambda: timed(lambda: lease.call(noop), count),
                "whitepool_mp run": lambda: timed(lambda: session.run(noop), count),
                "whitepool_mp run, a script's function": lambda: timed(
                    lambda: session.run(by_value), count
                ),
                "ProcessPoolExecutor submit + result": lambda: timed(
                    lambda: executor.submit(noop).result(), count
                ),
                "whitepool_mp submit many, then results": lambda: (
                    timed(many(session.submit), 1) / count
                ),
                "ProcessPoolExecutor submit many, then results": lambda: (
                    timed(many(executor.submit), 1) / count
                ),
            }
            for measure in rows.values():  # warm up
                measure()
            results: dict[str, list[float]] = {name: [] for name in rows}
            for _ in range(options.rounds):
                for name, measure in rows.items():
                    results[name].append(measure())
    child.terminate()
    child.join()

    base = statistics.median(results["bare Pipe echo (the floor)"])
    version = sys.version.split()[0]
    print(f"Python {version}, {os.cpu_count()} CPUs, {options.rounds} rounds of {count}")
    print(f"{'no-op, microseconds each':48} {'median':>8} {'quartiles':>16} {'x floor':>8}")
    for name, values in results.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:48} {middle:8.1f} {low:7.1f} - {high:6.1f} {middle / base:8.2f}")


if __name__ == "__main__":
    main()
