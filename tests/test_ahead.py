"""Many short jobs in flight to one worker: what a crash, a cancel, a timeout or a long one costs.

An engine that knows a function to be short sends many of its calls ahead. Each of these tests has
an account: every job ran once, but for those that are said not to have run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Executor, Future, wait
from pathlib import Path
from typing import Any

import deeds
import errands
import numpy as np
import pytest
from support import pipe_writer, until, whole

from whitepool_mp import (
    AsyncSession,
    CallTimeout,
    CheckoutTimeout,
    Pool,
    Session,
    WhitepoolError,
    WorkerDied,
)
from whitepool_mp.client import dispatch, flights
from whitepool_mp.wire.pages import UNSENT, Page

SOON = 20.0
CRASHES = [errands.kill_self, errands.die, deeds.segfault]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where jobs leave their numbers."""
    return tmp_path / "ran"


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """A pipe for `errands.wait_for`; gives what lets the one who waits there go on."""
    with pipe_writer(tmp_path / "pipe") as connect:
        yield lambda: os.write(connect(), b"!")


@pytest.fixture(params=["taken back", "left behind"])
def patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether calls behind a long one are taken back soon, as they are, or not for a minute."""
    if request.param == "left behind":
        endless(monkeypatch)
    return str(request.param)


def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent to a worker stays there, whatever its first call does."""
    monkeypatch.setattr(flights, "PATIENCE_SECONDS", 60.0)


def warm(session: Session) -> None:
    """Let the engine learn that a `step` is short."""
    for _ in range(3):
        for future in [session.submit(errands.step, os.devnull, n) for n in range(40)]:
            future.result(SOON)


def engine(session: Session) -> Any:
    return session._member.threaded().engine


def heard(session: Session) -> None:
    """Wait until the engine has dealt with every cancel() so far, each of which is told to it."""
    came = threading.Event()
    engine(session).post(came.set)
    assert came.wait(SOON)


@contextlib.contextmanager
def at_once(session: Session) -> Iterator[None]:
    """What is submitted in the block comes to the engine together, at its end."""
    inside, go = threading.Event(), threading.Event()

    def stay() -> None:
        inside.set()
        assert go.wait(SOON)

    engine(session).post(stay)
    assert inside.wait(SOON)
    try:
        yield
    finally:
        go.set()


def burst(
    session: Session, path: Path, count: int, special: dict[int, Any] | None = None, **options: Any
) -> list[Future[int]]:
    """So many steps, submitted at once; the special ones with a deed."""
    special = special or {}
    with at_once(session):
        return [
            session.submit(errands.step, path, number, *special.get(number, ()), **options)
            for number in range(count)
        ]


def ran(path: Path) -> Counter[int]:
    return Counter(map(int, errands.lines(path)))


def account(
    path: Path, futures: list[Future[int]], failed: dict[int, type[BaseException]] | None = None
) -> None:
    """Each returned its number but for the failed ones, and each ran once."""
    failed = failed or {}
    for number, future in enumerate(futures):
        if number in failed:
            assert type(future.exception(SOON)) is failed[number]
        else:
            assert future.result(SOON) == number
    assert ran(path) == Counter(range(len(futures)))


def settled(session: Session) -> None:
    """Nothing is queued, in flight or awaited any more, and all workers are free."""
    idle = engine(session)
    until(lambda: idle.idle)
    whole(session)
    assert all(not lease.tasks for lease in idle.jobs._leases.values())


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine, in an event loop of its own, with a deadline."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


async def warm_up(session: AsyncSession) -> None:
    for _ in range(3):
        await asyncio.gather(*(session.run(errands.step, os.devnull, n) for n in range(40)))


async def comes_true(condition: Callable[[], Any]) -> None:
    async def look() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(look(), SOON)


async def free(session: AsyncSession) -> None:
    """Every worker lives and is free."""

    async def look() -> None:
        while True:
            now = await session.status()
            if now.available == now.pool_size and not (now.waiting or now.leased or now.retiring):
                return
            await asyncio.sleep(0.002)

    await asyncio.wait_for(look(), SOON)


# --- crashes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("deed", CRASHES)
def test_a_crash_in_a_burst_costs_the_one_job_that_it_struck(
    deed: Callable[[], None], size: int, path: Path
) -> None:
    with Pool(size) as session:
        warm(session)
        futures = burst(session, path, 400, {200: (deed,)})
        account(path, futures, {200: WorkerDied})
        error = futures[200].exception()
        assert isinstance(error, WorkerDied) and error.started
        settled(session)


def test_a_crash_in_a_burst_with_either_start_method(start_method: str, path: Path) -> None:
    with Pool(2, start_method=start_method) as session:
        warm(session)
        futures = burst(session, path, 300, {150: (errands.kill_self,)})
        account(path, futures, {150: WorkerDied})
        settled(session)


def test_crashes_one_right_after_the_other(path: Path) -> None:
    bad = {50, 51, 52, 120, 199}
    with Pool(2) as session:
        warm(session)
        futures = burst(session, path, 200, dict.fromkeys(bad, (errands.kill_self,)))
        account(path, futures, dict.fromkeys(bad, WorkerDied))
        settled(session)


@pytest.mark.parametrize("gap", [2, 13])
def test_answers_that_a_dead_worker_had_not_sent_are_not_lost(path: Path, gap: int) -> None:
    """A worker holds the answers of short jobs back while it has more: here it dies with them."""
    bad = set(range(gap, 12 * gap, gap + 1))
    with Pool(1) as session:
        warm(session)
        futures = burst(session, path, 12 * gap, dict.fromkeys(bad, (errands.kill_self,)))
        account(path, futures, dict.fromkeys(bad, WorkerDied))
        settled(session)


def test_every_worker_killed_at_some_moment_of_a_burst(path: Path) -> None:
    """From outside, at any point of what a worker does. Repeated; with an account of each job."""
    chance = random.Random()
    count = 300
    with Pool(2) as session:
        warm(session)
        for round_ in range(12):
            file = path.with_name(f"ran-{round_}")
            futures = burst(session, file, count)
            for _ in range(2):
                at = chance.randrange(count)
                until(
                    lambda at=at, file=file, futures=futures: (
                        errands.run_count(file) > at or futures[-1].done()
                    )
                )
                row = chance.choice(session.workers())
                if row.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(row.pid, signal.SIGKILL)
            returned, died = 0, 0
            counts = ran(file)
            for number, future in enumerate(futures):
                error = future.exception(SOON)
                if error is None:
                    returned += 1
                    assert future.result() == number
                else:
                    died += 1
                    assert isinstance(error, WorkerDied)
            counts = ran(file)
            assert returned + died == count and died <= 2
            assert max(counts.values()) == 1
            assert all(counts[n] for n, future in enumerate(futures) if not future.exception())
        settled(session)


def test_a_worker_that_closes_its_channel_in_a_burst_runs_nothing_that_runs_elsewhere(
    path: Path,
) -> None:
    """It lives, and has more calls in hand, when its holder sees the channel end."""
    with Pool(2) as session:
        warm(session)
        for round_ in range(5):
            file = path.with_name(f"ran-{round_}")
            futures = burst(session, file, 200, {60: (deeds.close_everything,)})
            failed = 0
            for number, future in enumerate(futures):
                error = future.exception(SOON)
                assert error is None or isinstance(error, WhitepoolError)
                assert error is not None or future.result() == number
                failed += error is not None
            assert max(ran(file).values()) == 1
            assert failed <= 1
        settled(session)


# --- cancelling -------------------------------------------------------------------------------


def test_a_job_cancelled_behind_a_running_one_never_runs(
    path: Path, pipe: Callable[[], int], patience: str
) -> None:
    gone = {1, 10, 11, 39}
    with Pool(1) as session:
        warm(session)
        futures = burst(session, path, 40, {0: (errands.wait_for, path.with_name("pipe"))})
        until(lambda: errands.run_count(path) == 1)
        for number in gone:
            assert futures[number].cancel() and futures[number].cancelled()
        heard(session)
        pipe()
        for number, future in enumerate(futures):
            if number not in gone:
                assert future.result(SOON) == number
        assert errands.lines(path) == [str(n) for n in range(40) if n not in gone]
        settled(session)
        assert session.status().counters["killed"] == 0


def ahead(session: Session) -> int:
    """How many jobs were sent to workers, those that run included."""
    return sum(len(lease.tasks) for lease in list(engine(session).jobs._leases.values()))


def stuck_behind_a_pipe(
    executor: Executor, session: Session, path: Path, count: int
) -> tuple[Future[int], list[Future[int]], list[Future[int]]]:
    """A job that lasts until the pipe is written to, `count` behind it, and of the latter those
    whose callback was called."""
    called: list[Future[int]] = []
    with at_once(session):
        deed = (errands.wait_for, path.with_name("pipe"))
        first = executor.submit(errands.step, path, 0, *deed)
        others = [executor.submit(errands.step, path, number) for number in range(1, count + 1)]
    for future in others:
        future.add_done_callback(called.append)
    until(lambda: errands.run_count(path) == 1)
    return first, others, called


@pytest.mark.parametrize("waited", [False, True])
def test_an_executor_s_end_that_cancels_takes_back_what_was_sent_and_has_not_begun(
    path: Path, pipe: Callable[[], int], patience: str, waited: bool
) -> None:
    with Pool(1) as session:
        warm(session)
        executor = session.executor()
        first, others, called = stuck_behind_a_pipe(executor, session, path, 39)
        if patience == "left behind":
            assert ahead(session) > 1
        if waited:
            ending = threading.Thread(target=executor.shutdown, kwargs={"cancel_futures": True})
            ending.start()
        else:
            executor.shutdown(wait=False, cancel_futures=True)
        assert not wait(others, SOON).not_done
        assert [future.cancelled() for future in [first, *others]] == [False] + [True] * 39
        with pytest.raises(CancelledError):
            others[0].result(0)
        pipe()
        assert first.result(SOON) == 0
        if waited:
            ending.join(SOON)
            assert not ending.is_alive()
        assert errands.lines(path) == ["0"]
        settled(session)
        assert sorted(map(id, called)) == sorted(map(id, others)), "each calls back once"
        assert session.status().counters["killed"] == 0


@pytest.mark.parametrize("deed", [None, errands.kill_self])
def test_an_executor_s_end_that_cancels_at_any_moment_leaves_one_outcome(
    path: Path, deed: Callable[[], None] | None
) -> None:
    """Each job runs once and returns, or crashes, or never runs and is cancelled."""
    chosen = random.Random(7)
    with Pool(2) as session:
        warm(session)
        for number in range(20):
            called: list[Future[int]] = []
            own = path.with_name(f"ran-{number}")
            executor = session.executor()
            strikes = {10: (deed,)} if deed is not None else {}
            with at_once(session):
                futures = [
                    executor.submit(errands.step, own, n, *strikes.get(n, ())) for n in range(60)
                ]
            for future in futures:
                future.add_done_callback(called.append)
            begun = chosen.randrange(40)
            until(lambda own=own, begun=begun: errands.run_count(own) >= begun)
            executor.shutdown(wait=False, cancel_futures=True)
            executor.shutdown(cancel_futures=True)
            assert all(future.done() for future in futures)
            counts = ran(own)
            assert set(counts.values()) <= {1}
            assert set(counts) == {n for n in range(60) if not futures[n].cancelled()}
            for n in counts:
                if n in strikes:
                    assert isinstance(futures[n].exception(0), WorkerDied)
                else:
                    assert futures[n].result(0) == n
            heard(session)  # a callback comes after the end
            assert sorted(map(id, called)) == sorted(map(id, futures))
        settled(session)
        assert session.status().counters["killed"] == 0


def test_a_job_that_an_executor_s_end_took_back_may_be_cancelled_by_hand_too(
    path: Path, pipe: Callable[[], int]
) -> None:
    with Pool(1) as session:
        warm(session)
        executor = session.executor()
        first, others, called = stuck_behind_a_pipe(executor, session, path, 19)
        with at_once(session):
            executor.shutdown(wait=False, cancel_futures=True)
            for future in others[::2]:
                assert future.cancel()
        assert not wait(others, SOON).not_done
        assert all(future.cancelled() and future.cancel() for future in others)
        pipe()
        assert first.result(SOON) == 0
        settled(session)
        assert sorted(map(id, called)) == sorted(map(id, others))
        assert errands.lines(path) == ["0"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_running_job_cancelled_costs_those_behind_it_nothing(
    path: Path, patience: str, size: int
) -> None:
    with Pool(size) as session:
        warm(session)
        futures = burst(session, path, 60, {20: (errands.wait_to_be_killed,)})
        until(lambda: ran(path)[20])
        assert futures[20].cancel()
        for number, future in enumerate(futures):
            if number != 20:
                assert future.result(SOON) == number
        assert ran(path) == Counter(range(60))
        settled(session)
        assert session.status().counters["killed"] == 1


def test_cancelling_all_over_a_burst_runs_nothing_twice(path: Path) -> None:
    """Whatever runs, or has just ended, when it is cancelled. Repeated; the moments are random."""
    chance = random.Random()
    count = 150
    rounds: list[tuple[Path, set[int]]] = []
    with Pool(2) as session:
        warm(session)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            # Each has a file of its own: a cancelled job goes on until its worker is killed.
            traces = path.with_name(f"ran-{len(rounds)}")
            futures = burst(session, traces, count)
            at = chance.randrange(count)
            until(lambda at=at, traces=traces: errands.run_count(traces) > at)
            first = max(0, at - 10)
            cancelled = {n for n in range(first, min(at + 30, count)) if futures[n].cancel()}
            for number, future in enumerate(futures):
                if number not in cancelled:
                    assert future.result(SOON) == number
            until(lambda: engine(session).idle)
            rounds.append((traces, cancelled))
        settled(session)
    for traces, cancelled in rounds:
        counts = ran(traces)
        assert max(counts.values()) == 1
        assert set(range(count)) - cancelled <= set(counts)


def has_heard(session: Session) -> bool:
    """Whether the engine has taken in all that was sent to it by workers."""
    channels = engine(session)._channels.values()
    return engine(session)._asleep and not any(channel._poll.poll(0) for channel in channels)


def test_what_has_run_is_not_run_again_when_the_job_before_it_is_cancelled(
    path: Path, pipe: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are sent between the canceller's look at the channel and its look at the page."""
    endless(monkeypatch)
    unsent = Page.unsent
    waits = {5: (errands.wait_for, path.with_name("pipe"))}
    cancelled: list[int] = []

    with Pool(1) as session:
        warm(session)

        def later(page: Page, *lease: int) -> bytes:
            if page.words[UNSENT]:
                pipe()
                until(lambda: not page.words[UNSENT])
            return unsent(page, *lease)

        while not cancelled:
            path.unlink(missing_ok=True)
            futures = burst(session, path, 8, waits)
            until(lambda: ran(path)[5])
            (page,) = (channel.page for channel in engine(session)._channels.values())
            if not page.words[UNSENT]:
                pipe()  # all answers were sent at once, this time
                account(path, futures)
                continue
            # 5 runs, and some before it have been answered on the page only; the others are done.
            until(lambda: has_heard(session))
            monkeypatch.setattr(Page, "unsent", later)
            cancelled = [next(n for n, future in enumerate(futures) if not future.done())]
            futures[cancelled[0]].cancel()
        until(lambda: futures[5].done() or max(ran(path).values()) > 1)
        assert max(ran(path).values()) == 1
        for number, future in enumerate(futures):
            if number not in cancelled:
                assert future.result(SOON) == number
        settled(session)
    assert ran(path) == Counter(range(8))


@in_loop
async def test_who_learns_late_of_a_recall_does_not_undo_what_others_took_back(
    path: Path, pipe: Callable[[], int], tmp_path: Path
) -> None:
    """The second holder's calls, taken back, begin if the first holder writes onto the page."""
    other = tmp_path / "other"
    with pipe_writer(other) as connect:
        async with Pool(1) as first:
            second = first.session()
            await warm_up(first)
            warm(second)
            await warm_up(first)
            wait = (errands.wait_for, path.with_name("pipe"))
            task = asyncio.create_task(first.run(errands.step, path, 0, *wait))
            await comes_true(lambda: errands.run_count(path) == 1)
            # From here on this loop does nothing, so its engine hears of nothing.
            driven = engine(second)
            with at_once(second):
                wait = (errands.wait_for, other)
                futures = [
                    second.submit(errands.step, path, n, *(wait if n == 1 else ()))
                    for n in (1, 2, 3)
                ]
            until(lambda: second.status().waiting)
            pipe()
            until(lambda: ran(path)[1])
            until(lambda: len(driven.jobs._pending) == 2)  # 2 and 3 are taken back
            task.cancel()
            await asyncio.sleep(0)
            os.write(connect(), b"!")
            for number, future in zip((1, 2, 3), futures, strict=True):
                assert await asyncio.wait_for(asyncio.wrap_future(future), SOON) == number
            await asyncio.gather(task, return_exceptions=True)
            await free(first)
    assert ran(path) == Counter(range(4))


# --- timeouts ---------------------------------------------------------------------------------


def test_a_late_job_costs_those_behind_it_nothing(path: Path, patience: str) -> None:
    with Pool(1) as session:
        warm(session)
        special = {0: (errands.wait_to_be_killed,), 30: (errands.wait_to_be_killed,)}
        futures = burst(session, path, 60, special, timeout=0.4)
        account(path, futures, {0: CallTimeout, 30: CallTimeout})
        settled(session)
        assert session.status().counters["killed"] == 2


def test_the_time_behind_others_does_not_count(
    path: Path, pipe: Callable[[], int], patience: str
) -> None:
    with Pool(1) as session:
        warm(session)
        with at_once(session):
            first = session.submit(errands.step, path, 0, errands.wait_for, path.with_name("pipe"))
            futures = [
                session.submit(errands.step, path, number, timeout=0.1) for number in range(1, 30)
            ]
        until(lambda: errands.run_count(path) == 1)
        end = time.monotonic() + 0.2
        until(lambda: time.monotonic() > end)
        pipe()
        account(path, [first, *futures])
        settled(session)


# --- long ones among short ones ---------------------------------------------------------------


def test_those_behind_a_long_job_are_run_by_the_other_worker(
    path: Path, pipe: Callable[[], int]
) -> None:
    with Pool(2) as session:
        warm(session)
        futures = burst(session, path, 200, {3: (errands.wait_for, path.with_name("pipe"))})
        for number, future in enumerate(futures):
            if number != 3:
                assert future.result(SOON) == number
        assert not futures[3].done()
        pipe()
        account(path, futures)
        settled(session)


def test_those_behind_a_long_job_wait_for_it_where_there_is_one_worker(
    path: Path, pipe: Callable[[], int], patience: str
) -> None:
    with Pool(1) as session:
        warm(session)
        futures = burst(session, path, 50, {3: (errands.wait_for, path.with_name("pipe"))})
        until(lambda: errands.run_count(path) == 4)
        pipe()
        account(path, futures)
        assert errands.lines(path) == [str(n) for n in range(50)]
        settled(session)


def test_long_jobs_in_every_worker_do_not_hold_up_an_overflow_worker(
    path: Path, tmp_path: Path
) -> None:
    with Pool(2, 1, overflow_ttl=0) as session, contextlib.ExitStack() as stack:
        pipes = [tmp_path / "pipe-1", tmp_path / "pipe-2"]
        connects = [stack.enter_context(pipe_writer(each)) for each in pipes]
        warm(session)
        special = {n: (errands.wait_for, each) for n, each in zip((3, 40), pipes, strict=True)}
        futures = burst(session, path, 100, special)
        for number, future in enumerate(futures):
            if number not in special:
                assert future.result(SOON) == number
        for connect in connects:
            os.write(connect(), b"!")
        account(path, futures)
        settled(session)


def test_those_in_a_stopped_worker_are_run_by_the_other_one(path: Path) -> None:
    with Pool(2) as session:
        warm(session)
        futures = burst(session, path, 200, {5: (deeds.stop_self,)})
        for number, future in enumerate(futures):
            if number != 5:
                assert future.result(SOON) == number
        assert not futures[5].done()
        for row in session.workers():
            assert row.pid is not None
            os.kill(row.pid, signal.SIGCONT)
        account(path, futures)
        settled(session)


def test_a_worker_stopped_at_some_moment_keeps_one_job(path: Path) -> None:
    chance = random.Random()
    count = 200
    with Pool(2) as session:
        warm(session)
        for round_ in range(5):
            file = path.with_name(f"ran-{round_}")
            futures = burst(session, file, count)
            at = chance.randrange(count)
            until(lambda at=at, file=file: errands.run_count(file) > at)
            pid = chance.choice([row.pid for row in session.workers() if row.pid is not None])
            os.kill(pid, signal.SIGSTOP)
            try:
                until(lambda futures=futures: sum(not future.done() for future in futures) <= 1)
            finally:
                os.kill(pid, signal.SIGCONT)
            account(file, futures)
        settled(session)


# --- others want a worker ---------------------------------------------------------------------


def test_a_checkout_comes_after_the_running_job_of_a_burst(
    path: Path, pipe: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    endless(monkeypatch)
    with Pool(1) as session:
        warm(session)
        before: list[int] = []

        def take() -> None:
            with session.checkout(SOON) as lease:
                before.append(errands.run_count(path))
                assert lease.call(abs, -2) == 2
                before.append(errands.run_count(path))

        futures = burst(session, path, 2000, {30: (errands.wait_for, path.with_name("pipe"))})
        until(lambda: errands.run_count(path) == 31)
        others = session.status().waiting
        thread = threading.Thread(target=take)
        thread.start()
        until(lambda: session.status().waiting == others + 1)
        pipe()
        thread.join(SOON)
        # If the engine waited before the checkout did, it has one turn more.
        assert 31 <= before[0] == before[1] <= 31 + others * dispatch.MOST_TASKS
        account(path, futures)
        assert errands.lines(path) == [str(n) for n in range(2000)]
        settled(session)


def test_jobs_behind_a_long_one_are_known_to_the_pool(path: Path, pipe: Callable[[], int]) -> None:
    """Also when the engine took that for a short one: by that they have a place in the queue."""
    with Pool(1) as session:
        warm(session)
        futures = [session.submit(errands.step, path, 0, errands.wait_for, path.with_name("pipe"))]
        until(lambda: errands.run_count(path) == 1)
        futures += [session.submit(errands.step, path, number) for number in range(1, 10)]
        try:
            until(lambda: session.status().waiting == 1, 3)
        finally:
            pipe()
        account(path, futures)
        settled(session)


@pytest.mark.parametrize("size", [1, 2])
def test_checkouts_are_served_while_thousands_of_jobs_are_queued(path: Path, size: int) -> None:
    with Pool(size) as session:
        warm(session)
        futures = burst(session, path, 3000)
        served = 0
        while not futures[-1].done():
            with session.checkout(SOON) as lease:
                served += lease.call(abs, -1, timeout=SOON)
        assert served > 1
        account(path, futures)
        settled(session)


def test_runs_of_other_threads_are_served_while_thousands_of_jobs_are_queued(path: Path) -> None:
    with Pool(2) as session:
        warm(session)
        futures = burst(session, path, 3000)
        served: list[int] = []

        def work() -> None:
            while not futures[-1].done():
                served.append(session.run(abs, -1))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(served) >= 3
        account(path, futures)
        settled(session)


# --- sizes ------------------------------------------------------------------------------------


def test_large_and_small_jobs_in_one_burst(path: Path) -> None:
    sizes = [1, 300_000, 10, 20_000, 1_200_000, 100, 60_000, 5, 33_000, 7] * 8
    with Pool(2) as session:
        warm(session)
        values = [np.full(size, number, dtype=np.uint8) for number, size in enumerate(sizes)]
        blobs = [bytes([number]) * size for number, size in enumerate(sizes)]
        with at_once(session):
            arrays = [session.submit(deeds.echo, value) for value in values]
            bytes_ = [session.submit(deeds.echo, blob) for blob in blobs]
            steps = [session.submit(errands.step, path, number) for number in range(100)]
        for value, future in zip(values, arrays, strict=True):
            np.testing.assert_array_equal(future.result(SOON), value)
        assert [future.result(SOON) for future in bytes_] == blobs
        account(path, steps)
        settled(session)


def test_a_crash_among_large_and_small_jobs(path: Path) -> None:
    sizes = [1, 300_000, 10, 40_000, 100, 70_000] * 10
    with Pool(1) as session:
        warm(session)
        blobs = [bytes([number]) * size for number, size in enumerate(sizes)]
        with at_once(session):
            futures = []
            for number, blob in enumerate(blobs):
                futures.append(session.submit(deeds.echo, blob))
                if number in (7, 30):
                    session.submit(errands.kill_self)
        assert [future.result(SOON) for future in futures] == blobs
        settled(session)


# --- asyncio ----------------------------------------------------------------------------------


@pytest.mark.parametrize("deed", CRASHES)
@in_loop
async def test_a_crash_among_many_tasks_costs_one(deed: Callable[[], None], path: Path) -> None:
    async with Pool(2) as session:
        await warm_up(session)
        results = await asyncio.gather(
            *(
                session.run(errands.step, path, n, *((deed,) if n == 200 else ()))
                for n in range(400)
            ),
            return_exceptions=True,
        )
        assert isinstance(results.pop(200), WorkerDied)
        assert results == [n for n in range(400) if n != 200]
        assert ran(path) == Counter(range(400))
        await free(session)
        assert session._driver().engine.idle


@in_loop
async def test_a_cancelled_task_costs_no_other(path: Path) -> None:
    async with Pool(1) as session:
        await warm_up(session)
        tasks = [
            asyncio.create_task(
                session.run(
                    errands.step, path, n, *((errands.wait_to_be_killed,) if n == 20 else ())
                )
            )
            for n in range(60)
        ]
        await comes_true(lambda: ran(path)[20])
        for number in (20, 21, 40):
            tasks[number].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for number, result in enumerate(results):
            if number in (20, 21, 40):
                assert isinstance(result, asyncio.CancelledError)
            else:
                assert result == number
        assert ran(path) == Counter(set(range(60)) - {21, 40})
        await free(session)
        assert (await session.status()).counters["killed"] == 1


@in_loop
async def test_tasks_cancelled_at_any_moment_run_nothing_twice(path: Path) -> None:
    chance = random.Random()
    async with Pool(2) as session:
        await warm_up(session)
        for round_ in range(15):
            file = path.with_name(f"ran-{round_}")
            tasks = [
                asyncio.create_task(session.run(errands.step, file, number))
                for number in range(120)
            ]
            at = chance.randrange(100)
            await comes_true(lambda at=at, file=file: errands.run_count(file) > at)
            for task in tasks[max(0, at - 5) : at + 20]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await comes_true(lambda: session._driver().engine.idle)
            counts = ran(file)
            assert max(counts.values()) == 1
            for number, result in enumerate(results):
                if not isinstance(result, asyncio.CancelledError):
                    assert result == number and counts[number] == 1
        await free(session)


@in_loop
async def test_a_late_task_costs_no_other(path: Path) -> None:
    async with Pool(1) as session:
        await warm_up(session)
        first = asyncio.create_task(
            session.run(errands.step, path, 0, errands.wait_to_be_killed, timeout=0.4)
        )
        rest = [asyncio.create_task(session.run(errands.step, path, n)) for n in range(1, 40)]
        with pytest.raises(CallTimeout):
            await first
        assert await asyncio.gather(*rest) == list(range(1, 40))
        assert ran(path) == Counter(range(40))
        await free(session)


@in_loop
async def test_a_task_behind_a_running_one_whose_time_is_up_says_that_no_worker_was_free(
    path: Path, pipe: Callable[[], int], patience: str
) -> None:
    async with Pool(1) as session:
        await warm_up(session)
        first = asyncio.create_task(
            session.run(errands.step, path, 0, errands.wait_for, path.with_name("pipe"))
        )
        rest = [
            asyncio.create_task(session.run(errands.step, path, n, timeout=0.05))
            for n in range(1, 20)
        ]
        for error in await asyncio.gather(*rest, return_exceptions=True):
            assert isinstance(error, CheckoutTimeout), error
        await comes_true(lambda: errands.run_count(path) == 1)
        pipe()
        assert await first == 0
        assert errands.lines(path) == ["0"]
        await free(session)
        assert (await session.status()).counters["killed"] == 0


# --- map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
def test_a_map_closed_early_takes_back_what_was_sent_and_has_not_begun(
    path: Path, pipe: Callable[[], int], patience: str, plain: bool
) -> None:
    deed = functools.partial(errands.wait_for, path.with_name("pipe"))
    run = functools.partial(errands.trace_or, path, {5}, deed)
    with Pool(1) as session:
        items = range(20) if plain else iter(range(20))
        results: Any = session.map(run, items, chunksize=20)
        assert next(results) == 0
        until(lambda: errands.run_count(path) == 6)
        behind = session.submit(errands.step, path, 20)
        results.close()
        heard(session)
        pipe()
        assert behind.result(SOON) == 20
        settled(session)
        assert ran(path) == Counter([*range(6), 20])
        assert session.status().counters["killed"] == 0


@in_loop
async def test_a_map_closed_early_in_an_event_loop_takes_back_what_was_sent(
    path: Path, pipe: Callable[[], int], patience: str
) -> None:
    deed = functools.partial(errands.wait_for, path.with_name("pipe"))
    run = functools.partial(errands.trace_or, path, {5}, deed)
    async with Pool(1) as session:
        results: Any = session.map(run, range(20), chunksize=20)
        assert await anext(results) == 0
        await comes_true(lambda: errands.run_count(path) == 6)
        await results.aclose()
        await session.status()  # the engine has been told by then
        pipe()
        assert await session.run(errands.step, path, 20) == 20
        await free(session)
        assert ran(path) == Counter([*range(6), 20])


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("deed", CRASHES)
def test_a_crash_in_a_map_costs_one_item(
    deed: Callable[[], None], ordered: bool, path: Path
) -> None:
    run = functools.partial(errands.trace_or, path, {2000}, deed)
    with Pool(2) as session:
        warm(session)
        results = list(session.map(run, range(4000), ordered=ordered, return_exceptions=True))
        if not ordered:
            results.sort(key=lambda result: result if isinstance(result, int) else 2000)
        assert isinstance(results.pop(2000), WorkerDied)
        assert results == [n for n in range(4000) if n != 2000]
        assert ran(path) == Counter(range(4000))
        settled(session)


def test_workers_killed_under_a_map(path: Path) -> None:
    """From outside, at random moments; with an account of each item."""
    chance = random.Random()
    count = 3000
    with Pool(2) as session:
        warm(session)
        for round_ in range(4):
            file = path.with_name(f"ran-{round_}")
            run = functools.partial(errands.trace, file)
            killed = 0
            at = chance.randrange(count // 2)
            died, numbers = 0, []
            for result in session.map(run, range(count), return_exceptions=True):
                if isinstance(result, WorkerDied):
                    died += 1
                else:
                    numbers.append(result)
                if killed < 2 and len(numbers) > at:
                    pids = [row.pid for row in session.workers() if row.pid is not None]
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), signal.SIGKILL)
                    killed += 1
                    at = chance.randrange(at, count)
            counts = ran(file)
            assert len(numbers) + died == count and died <= 2
            assert numbers == sorted(set(numbers))
            assert max(counts.values()) == 1
            assert not [number for number in numbers if not counts[number]]
        settled(session)


@pytest.mark.parametrize("plain", [True, False])
def test_a_long_item_of_a_map_holds_up_no_other(path: Path, tmp_path: Path, plain: bool) -> None:
    pipe = tmp_path / "pipe"

    def one_waits(number: int) -> int:
        errands.trace(path, number)
        if number == 700:
            errands.wait_for(pipe)
        return number

    with Pool(2) as session, pipe_writer(pipe) as connect:
        warm(session)
        found: list[int] = []
        inputs = range(1000) if plain else iter(range(1000))
        taker = threading.Thread(
            target=lambda: found.extend(session.map(one_waits, inputs, ordered=False))
        )
        taker.start()
        until(lambda: 700 in ran(path))
        try:
            until(lambda: len(found) == 999)
        finally:
            os.write(connect(), b"!")
            taker.join(SOON)
        assert sorted(found) == list(range(1000))
        assert found[-1] == 700
        assert ran(path) == Counter(range(1000))
        settled(session)


@pytest.mark.parametrize("odd", ["a list", "a long string", "an error"])
def test_a_map_whose_results_are_now_plain_and_now_not_costs_no_worker(odd: str) -> None:
    def mixed(number: int) -> Any:
        if number % 97:
            return number
        if odd == "an error":
            raise LookupError(number)
        return [number] if odd == "a list" else "x" * 300

    with Pool(1) as session:
        warm(session)
        for chunksize in (None, 50):
            results = session.map(mixed, range(8000), chunksize=chunksize, return_exceptions=True)
            for number, result in enumerate(results):
                if number % 97:
                    assert result == number
                elif odd == "an error":
                    assert isinstance(result, LookupError) and result.args == (number,)
                else:
                    assert result == mixed(number)
        settled(session)
        assert session.status().counters["killed"] == 0
