"""A map whose results nobody takes: what waits is bounded by bytes, and the map goes on after."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import errands
import pytest
from support import pipe_writer, until

from whitepool_mp import Pool
from whitepool_mp.jobs import UNREAD_BYTES

T = 30.0
"""Seconds that nothing here should need: a deadline against hanging."""
SIZE = 4 << 20
COUNT = 100
MOST = UNREAD_BYTES // SIZE + 8
"""How many may have been begun: those that wait, and what two workers had begun by then."""


def settled(path: Path, least: int) -> int:
    """How many calls were begun when no more are."""
    until(lambda: errands.run_count(path) >= least, T)
    seen, since = errands.run_count(path), time.monotonic()

    def still() -> bool:
        """no call begun for half a second"""
        nonlocal seen, since
        now = errands.run_count(path)
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > 0.5

    until(still, T)
    return seen


@pytest.mark.parametrize("chunksize", [None, 8])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_map_begins_no_more_calls_while_64_mib_of_results_wait(
    start_method: str, ordered: bool, chunksize: int | None, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    with Pool(2, start_method=start_method) as session:
        results = session.map(
            errands.large,
            [(ran, number, SIZE) for number in range(COUNT)],
            ordered=ordered,
            chunksize=chunksize,
        )
        took = [errands.number_of(next(results))]
        took += [errands.number_of(next(results)) for _ in range(20)]
        assert settled(ran, 21) <= 21 + MOST
        took += [errands.number_of(next(results)) for _ in range(10)]
        assert settled(ran, 31) <= 31 + MOST
        took += map(errands.number_of, results)
        assert (took if ordered else sorted(took)) == list(range(COUNT))
        assert errands.run_count(ran) == COUNT
        assert session.status().counters["killed"] == 0


@pytest.mark.parametrize("chunksize", [1, 8])
def test_the_result_that_is_due_comes_however_many_wait_behind_it(
    start_method: str, chunksize: int, tmp_path: Path
) -> None:
    """The first call takes long; those sent behind it are taken back, and are due after it."""
    ran = tmp_path / "ran"
    pipe = tmp_path / "pipe"
    with Pool(2, start_method=start_method) as session, pipe_writer(pipe) as connect:
        items = [(ran, number, SIZE, pipe if number == 0 else None) for number in range(COUNT)]
        results = session.map(errands.large, items, chunksize=chunksize)
        took: list[int] = []
        taker = threading.Thread(target=lambda: took.extend(map(errands.number_of, results)))
        taker.start()
        assert settled(ran, 2) <= MOST + chunksize
        os.write(connect(), b"!")
        taker.join(T)
        assert took == list(range(COUNT))
        assert errands.run_count(ran) == COUNT


@pytest.mark.parametrize("ordered", [True, False])
def test_a_map_in_an_event_loop_waits_for_its_taker(ordered: bool, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    async def take() -> list[int]:
        async with Pool(2) as session:
            items = [(ran, number, SIZE) for number in range(COUNT)]
            took = []
            async for result in session.map(errands.large, items, ordered=ordered):
                took.append(errands.number_of(result))
                if len(took) == 20:
                    begun = await asyncio.to_thread(settled, ran, 20)
                    assert begun <= 20 + MOST
            return took

    took = asyncio.run(asyncio.wait_for(take(), 60))
    assert (took if ordered else sorted(took)) == list(range(COUNT))


def test_results_larger_than_the_bound_keep_every_worker_busy(tmp_path: Path) -> None:
    """Two for each worker may wait."""
    ran = tmp_path / "ran"
    with Pool(2) as session:
        items = [(ran, number, UNREAD_BYTES + 1) for number in range(12)]
        results = session.map(errands.large, items)
        assert errands.number_of(next(results)) == 0
        assert 3 <= settled(ran, 3) <= 9
        assert list(map(errands.number_of, results)) == list(range(1, 12))


def test_a_map_that_is_closed_as_results_wait_leaves_the_rest_undone(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    with Pool(2) as session:
        results = session.map(errands.large, [(ran, number, SIZE) for number in range(COUNT)])
        next(results)
        begun = settled(ran, 3)
        results.close()  # type: ignore[attr-defined]
        assert session.submit(abs, -1).result(T) == 1
        assert errands.run_count(ran) <= begun + 2


def test_a_map_that_nobody_takes_from_holds_up_no_shutdown_and_no_other_job(
    start_method: str, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    with Pool(2, start_method=start_method) as session:
        results = session.map(errands.large, [(ran, number, SIZE) for number in range(COUNT)])
        next(results)
        settled(ran, 3)
        assert session.run(abs, -1, timeout=T) == 1
        assert list(session.map(abs, range(1000))) == list(range(1000))
        session.safe_shutdown(T)
