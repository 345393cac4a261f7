"""The manager may be killed: the owner starts another, which takes over, and nobody loses anything.

Also with it the nursery, workers, clients; and the owner, which ends everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import select
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deeds
import psutil
import pytest
from anatomy import elapsed, gone, kill, lives, manager, no_successor, nursery, workers
from support import pipe_writer, until, whole
from user_script import all_gone, script

from whitepool_mp import (
    CallTimeout,
    CheckoutTimeout,
    LeaseError,
    ManagerDied,
    Pool,
    PoolClosed,
    Session,
    WorkerDied,
)
from whitepool_mp.client.link import Link
from whitepool_mp.wire import frames, pages
from whitepool_mp.wire import ledger as ledgers

SOON = 20.0


def noted(path: Path) -> Counter[int]:
    """Which numbers `deeds.count` wrote, and how often."""
    return Counter(deeds.noted(path))


def pids(session: Session) -> list[int]:
    return sorted(process.pid for process in workers(session, 2))


def succeeded(session: Session, dead: psutil.Process) -> psutil.Process:
    """Wait until another manager is there; it."""

    def another() -> psutil.Process | None:
        """another manager"""
        with contextlib.suppress(psutil.NoSuchProcess):  # it is about to be replaced
            process = manager(session)
            return process if process != dead else None
        return None

    found = until(another)
    assert isinstance(found, psutil.Process)
    return found


# --- what goes on -----------------------------------------------------------------------------


def test_an_idle_pool_goes_on_with_its_workers_under_another_manager(session: Session) -> None:
    before, dead = pids(session), manager(session)
    for _ in range(3):
        kill(manager(session))
        assert session.run(pow, 2, 5, timeout=SOON) == 32
        assert session.submit(pow, 2, 6).result(SOON) == 64
        assert pids(session) == before
        whole(session)
    assert succeeded(session, dead).pid == manager(session).pid
    assert session.status().counters["managers_lost"] == 3


def test_calls_and_leases_do_not_notice(
    session: Session, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    before = pids(session)
    with session.checkout(SOON) as lease:
        running = session.submit(deeds.count, tmp_path / "ran", 1, 0.5)
        until(lambda: noted(tmp_path / "ran"))
        lease.call(abs, 1, timeout=SOON)
        kill(manager(session))
        assert lease.call(os.getpid, timeout=SOON) == lease.pid  # with no manager, perhaps
        assert running.result(SOON) == 1
        row = {row.pid: row for row in session.workers()}[lease.pid]
        assert (row.state, row.holder_pid) == ("leased", os.getpid())
        assert lease.call(os.getpid, timeout=SOON) == lease.pid
    with pytest.raises(LeaseError):
        lease.call(abs, 1)
    assert noted(tmp_path / "ran") == {1: 1}
    assert pids(session) == before
    whole(session)


def test_a_lease_that_was_given_back_unheard_is_given_back(session: Session) -> None:
    before = pids(session)
    process = manager(session)
    for end in ("checkin", "destroy"):
        first, second = session.checkout(SOON), session.checkout(SOON)
        process = manager(session)
        process.suspend()
        getattr(first, end)()
        second.checkin()
        kill(process)
        with session.checkout(SOON), session.checkout(SOON):
            assert session.status().leased == 2
        whole(session)
        assert (pids(session) == before) is (end == "checkin")


def test_a_worker_that_is_stopped_goes_on_under_another_manager(
    session: Session, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """The kernel hangs up on stopped processes that nobody of their session is left to continue."""
    with session.checkout(SOON) as lease, pipe_writer(tmp_path / "pipe") as connect:
        running = threads.submit(lease.call, deeds.read_pipe, tmp_path / "pipe")
        fd = connect()
        worker, helper = psutil.Process(lease.pid), nursery(session)
        worker.suspend()
        helper.suspend()
        dead = manager(session)
        kill(dead)
        succeeded(session, dead)
        assert session.status().leased == 1
        assert worker.status() == psutil.STATUS_STOPPED
        worker.resume()
        os.write(fd, b"went on")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, fd)  # the end of what it reads
        os.close(null)
        assert running.result(SOON) == "went on"
    whole(session)


def test_no_worker_has_the_owners_terminal(start_method: str) -> None:
    """Not even one that opens it; and a call's own group is none of the shell's."""
    code = """
        import termios, fcntl
        def terminal(path):
            own = os.open(path, os.O_RDWR)  # it is the owner's, whoever opens it
            try:
                os.close(os.open("/dev/tty", os.O_RDWR))
            except OSError as error:
                return os.strerror(error.errno)
        path = sys.stdin.readline().strip()
        fd = os.open(path, os.O_RDWR)
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
        with pool(1) as session:
            tell(session.run(terminal, path))
            tell(os.path.exists("/dev/tty") and os.close(os.open("/dev/tty", os.O_RDWR)))
    """
    leader, follower = os.openpty()
    try:
        with script(code, start_method) as owner:
            owner.say(os.ttyname(follower).encode())
            assert owner.hear() == os.strerror(errno.ENXIO)
            assert owner.hear() is None
            owner.finish()
    finally:
        os.close(leader)
        os.close(follower)


@pytest.mark.parametrize("end", ["checkin", "destroy"])
def test_a_lease_without_a_call_that_ended_unheard_is_over(
    session: Session, threads: ThreadPoolExecutor, end: str
) -> None:
    """There is no page to note it on, and its thread does not come to talk to the next manager."""
    before, go, leases = pids(session), threading.Event(), []

    def hold() -> None:
        leases.append(session.checkout(SOON))
        go.wait(SOON)
        getattr(leases[0], end)()

    ending = threads.submit(hold)
    until(lambda: leases)
    process = manager(session)
    process.suspend()
    go.set()
    until(lambda: not leases[0].valid)
    kill(process)
    ending.result(SOON)
    whole(session)
    assert (pids(session) == before) is (end == "checkin")


def test_a_grant_that_crosses_the_end_of_a_checkout_is_given_back_by_way_of_the_next_manager(
    session: Session, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the thread that would not wait any longer does not come to talk to the pool again."""
    checkout, send = frames.checkout, Link._send

    def patient(number: int, block: bool, deadline: float | None, *args: Any, **more: Any) -> bytes:
        return checkout(number, block, None, *args, **more)  # the manager grants just in time

    def cross(link: Link, data: bytes, deadline: float | None) -> None:
        if data == frames.request(frames.CANCEL, link._number):
            monkeypatch.undo()
            held.checkin()
            assert select.select([link._sock], [], [], SOON)[0]  # the grant is there
            process.suspend()
            send(link, data, deadline)
            kill(process)
        else:
            send(link, data, deadline)

    process = manager(session)
    with session.checkout(SOON):
        held = session.checkout(SOON)
        held.call(abs, 1)
        monkeypatch.setattr(frames, "checkout", patient)
        monkeypatch.setattr(Link, "_send", cross)
        with pytest.raises(CheckoutTimeout):
            threads.submit(session.checkout, 0.2).result(SOON)
    whole(session)


def test_those_who_wait_are_served_in_their_order(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    served: list[int] = []

    def wait(number: int) -> None:
        with session.checkout(SOON):
            served.append(number)

    held = [session.checkout(SOON), session.checkout(SOON)]
    waiting = []
    for number in range(8):
        waiting.append(threads.submit(wait, number))
        until(lambda: session.status().waiting == len(waiting))
    kill(manager(session))
    until(lambda: session.status().waiting == 8)
    held[0].checkin()
    for future in waiting:
        future.result(SOON)
    assert served == list(range(8))
    held[1].checkin()
    whole(session)


def test_a_checkout_keeps_its_own_deadline(session: Session, threads: ThreadPoolExecutor) -> None:
    with session.checkout(SOON), session.checkout(SOON):
        began = time.monotonic()
        waiting = threads.submit(session.checkout, 1.0)
        until(lambda: session.status().waiting == 1)
        kill(manager(session))
        with pytest.raises(CheckoutTimeout, match="within 1 s"):
            waiting.result(SOON)
        assert 1.0 <= elapsed(began) < 5
    whole(session)


def test_queued_jobs_are_done_each_once(session: Session, tmp_path: Path) -> None:
    path, before = tmp_path / "ran", pids(session)
    futures = [session.submit(deeds.count, path, number, 0.002) for number in range(600)]
    mapped = session.map(deeds.count, [path] * 600, range(600, 1200), chunksize=3)
    for _ in range(3):
        kill(manager(session))
        time.sleep(0.2)
    assert [future.result(SOON) for future in futures] == list(range(600))
    assert list(mapped) == list(range(600, 1200))
    assert noted(path) == dict.fromkeys(range(1200), 1)
    assert pids(session) == before
    whole(session)


def test_another_process_goes_on(session: Session, start_method: str, tmp_path: Path) -> None:
    code = """
        session = given()
        lease = session.checkout()
        lease.call(pow, 1, 1)
        tell(session.submit(pow, 2, 7).result())
        sys.stdin.readline()
        tell(lease.call(pow, 2, 8))
        tell(session.run(pow, 2, 9))
        lease.checkin()
        tell(session.status().pool_size)
        sys.stdin.readline()
    """
    before = pids(session)
    with script(code, start_method) as client:
        client.give(session)
        assert client.hear() == 128
        kill(manager(session))
        client.say()
        assert [client.hear() for _ in range(3)] == [256, 512, 2]
        client.say()
        client.finish()
    assert pids(session) == before
    whole(session)


def test_an_event_loop_goes_on(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "ran"

    async def main() -> None:
        async with Pool(2, start_method=start_method) as session:
            owner = session._member.owner
            assert owner is not None
            async with session.checkout(SOON) as lease:
                await lease.call(abs, 1)
                jobs = [asyncio.create_task(session.run(deeds.count, path, n)) for n in range(50)]
                for _ in range(3):
                    os.kill(owner.manager, signal.SIGKILL)
                    assert await lease.call(os.getpid) == lease.pid
                    assert (await session.status()).pool_size == 2
                assert await asyncio.gather(*jobs) == list(range(50))
            with pytest.raises(CheckoutTimeout):
                async with session.checkout(SOON), session.checkout(SOON):
                    os.kill(owner.manager, signal.SIGKILL)
                    await session._checkout(0.5, True, "here")
            assert await session.run(deeds.count, path, 50) == 50

    asyncio.run(main())
    assert noted(path) == dict.fromkeys(range(51), 1)


@pytest.mark.parametrize("when", ["before", "unheard", "unheard, no call", "busy"])
def test_an_event_loop_that_ends_around_a_takeover_leaves_no_lease(
    session: Session, when: str
) -> None:
    """It does not come to join the next manager, and its process lives on."""
    before = pids(session)

    async def main() -> None:
        aio = session.aio()
        lease = await aio.checkout(SOON)
        if when != "unheard, no call":
            await lease.call(abs, 1)
        process = manager(session)
        if when.startswith("unheard"):
            process.suspend()
            await aio.checkin(lease)
            threading.Timer(0.2, kill, (process,)).start()  # the loop has ended by then
            return
        if when == "busy":
            task = asyncio.ensure_future(lease.call(time.sleep, 1000))
            await asyncio.sleep(0)
            assert not task.done()
        kill(process)
        succeeded(session, process)
        assert session.status().leased == 1  # the next one serves: it has looked at the marks
        if when == "before":
            await aio.checkin(lease)

    process = manager(session)
    asyncio.run(main())
    succeeded(session, process)
    whole(session)
    if when in ("before", "unheard"):
        assert pids(session) == before


def test_an_event_loop_that_is_left_behind_around_a_takeover_leaves_no_lease(
    session: Session,
) -> None:
    """Nobody tells it that it ends: its engine is collected."""

    def leave_one() -> None:
        loop = asyncio.new_event_loop()
        aio = session.aio()
        running = loop.create_task(aio.run(time.sleep, 1000))
        until(lambda: loop.run_until_complete(aio.status()).leased)
        process = manager(session)
        kill(process)
        succeeded(session, process)
        assert session.status().leased == 1
        loop.close()
        running._log_destroy_pending = False  # type: ignore[attr-defined]

    leave_one()
    gc.collect()
    whole(session)


def test_a_kept_worker_is_had_back_by_the_next_manager(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        session.run(abs, 1)  # it is kept
        kill(manager(session))
        with ThreadPoolExecutor(1) as threads:
            with threads.submit(session.checkout, SOON).result() as lease:
                assert lease.call(abs, -3, timeout=SOON) == 3
        assert session.run(abs, -2, timeout=SOON) == 2


@pytest.mark.parametrize("asked", [False, True])
def test_a_kept_worker_that_a_dying_manager_took_back_is_free(
    start_method: str, asked: bool
) -> None:
    """It wrote so on the page, and no more. Who kept it would not have it recalled for itself."""
    with Pool(1, start_method=start_method) as session:
        assert session.submit(abs, -1).result(SOON) == 1
        engine = session._member.running_engine()
        assert engine is not None
        (lease,) = engine.engine.jobs._leases.values()
        assert lease.channel is not None
        words = lease.channel.page.words
        words[pages.RECALLED] = lease.id
        if asked:  # and it does not look as if the worker waited: it is asked
            words[pages.ENDED] += 1
        kill(manager(session))
        assert session.submit(abs, -2).result(SOON) == 2
        assert session.run(abs, -3, timeout=SOON) == 3
        whole(session)


def test_the_pools_sizes_stay(session: Session) -> None:
    session.resize(3, 1)
    workers(session, 3)
    kill(manager(session))
    status = session.status()
    assert (status.pool_size, status.max_overflow) == (3, 1)
    workers(session, 3)


def test_a_shutdown_that_was_begun_goes_on(
    session: Session, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    lease = session.checkout(SOON)
    with session.checkout(SOON):
        waiting = threads.submit(lambda: session.checkout(SOON).checkin())
        until(lambda: session.status().waiting == 1)
        ending = threads.submit(session.safe_shutdown)
        until(lambda: session._member.draining)
        kill(manager(session))
        with pytest.raises(PoolClosed):
            session.checkout(SOON)
    waiting.result(SOON)
    assert not ending.done()
    lease.checkin()
    ending.result(SOON)


def test_who_waits_and_gets_no_cpu_when_a_draining_manager_is_killed_is_served(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    code = """
        session = given()
        tell("here")
        with session.checkout(20):
            tell("served")
    """
    leases = [session.checkout(SOON) for _ in range(session.status().pool_size)]
    with script(code, "forkserver") as client:
        client.give(session)
        assert client.hear() == "here"
        until(lambda: session.status().waiting == 1)
        ending = threads.submit(session.safe_shutdown)
        until(lambda: session._member.owner._ledger.words[ledgers.DRAINING])
        os.kill(client.pid, signal.SIGSTOP)
        kill(manager(session))
        until(lambda: session.status().counters["managers_lost"])
        threading.Timer(1.0, os.kill, (client.pid, signal.SIGCONT)).start()
        for lease in leases:
            lease.checkin()
        assert client.finish() == ('"served"\n', "")
    ending.result(SOON)


@pytest.mark.parametrize("connected", [False, True])
def test_a_job_that_was_just_submitted_when_a_draining_manager_is_killed_is_done(
    session: Session, threads: ThreadPoolExecutor, connected: bool
) -> None:
    """Its event loop is busy, so its engine may have dialled and said no more."""
    code = f"""
        import asyncio, time
        session = given()
        async def main():
            aio = session.aio()
            if {connected}:
                await aio.run(abs, -1)
            task = asyncio.ensure_future(aio.run(abs, -2))
            await asyncio.sleep(0)
            tell("submitted")
            time.sleep(1)
            assert await task == 2
        asyncio.run(main())
    """
    with script(code, "forkserver") as client:
        client.give(session)
        assert client.hear() == "submitted"
        ending = threads.submit(session.safe_shutdown)
        until(lambda: session._member.owner._ledger.words[ledgers.DRAINING])
        kill(manager(session))
        assert client.finish()[1] == ""
    ending.result(SOON)


def test_workers_that_are_starting_are_started_once(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "starts"

    def slow() -> str:
        deeds.count(path, os.getpid(), 0.6)
        return "resource"

    with Pool(3, factory=slow, start_method=start_method) as session:
        until(lambda: len(noted(path)) == 3)
        kill(manager(session))
        with session.checkout(SOON) as lease:
            assert lease.call(str, timeout=SOON) == "resource"
        whole(session)
        assert len(noted(path)) == 3


def opened_later(path: Path, gate: Path) -> Callable[[], str]:
    """A factory that notes its process; all but the first wait until the test has opened `gate`."""

    def factory() -> str:
        if deeds.count(path, os.getpid()) and len(deeds.noted(path)) > 1:
            os.close(os.open(gate, os.O_RDONLY))
        return "resource"

    return factory


@pytest.mark.parametrize("moment", ["ordered", "begun"])
def test_workers_that_the_nursery_has_not_come_to_are_started_once(
    start_method: str, tmp_path: Path, moment: str
) -> None:
    path, gate, count = tmp_path / "starts", tmp_path / "gate", 16
    os.mkfifo(gate)

    with Pool(1, factory=opened_later(path, gate), start_method=start_method) as session:
        whole(session)
        forker, first = nursery(session), manager(session)
        forker.suspend()
        session.resize(count)
        if moment == "begun":  # and nobody has heard of it
            first.suspend()
            forker.resume()
            until(lambda: len(noted(path)) > 1)
            forker.suspend()
        kill(first)
        until(lambda: session.status().counters["managers_lost"] == 1)
        # Have it look for what may be left of dead workers.
        succeeded(session, first).send_signal(signal.SIGALRM)
        for _ in range(2):
            assert session.status().booting == count - 1
        forker.resume()
        until(lambda: len(noted(path)) == count, SOON)
        with open(gate, "wb"):
            whole(session, SOON)
        counters = session.status().counters
        assert (counters["start_failures"], counters["killed"]) == (0, 0)
        assert sorted(row.pid or 0 for row in session.workers()) == sorted(noted(path))


def test_what_was_left_behind_is_swept_once_all_births_are_known(
    start_method: str, tmp_path: Path
) -> None:
    path, gate, daemons = tmp_path / "starts", tmp_path / "gate", tmp_path / "daemon"
    os.mkfifo(gate)

    with Pool(1, factory=opened_later(path, gate), start_method=start_method) as session:
        whole(session)
        forker, first = nursery(session), manager(session)
        forker.suspend()
        session.resize(2)
        kill(first)
        with pytest.raises(WorkerDied):
            session.run(deeds.leave_daemon, str(daemons), timeout=SOON)
        (daemon,) = deeds.noted(daemons)
        succeeded(session, first).send_signal(signal.SIGALRM)
        session.status()
        assert lives(daemon)  # it might be a worker, for all that can be seen of it
        forker.resume()
        with open(gate, "wb"):
            until(lambda: not lives(daemon))
            whole(session, SOON)


def test_the_manager_killed_before_it_serves_is_replaced(start_method: str) -> None:
    with Pool(2, start_method=start_method) as session:
        kill(manager(session))
        assert session.run(pow, 2, 3, timeout=SOON) == 8
        whole(session)


# --- with others ------------------------------------------------------------------------------


def test_the_nursery_killed_too_is_replaced(session: Session) -> None:
    before = pids(session)
    kill(nursery(session), manager(session))
    assert session.run(pow, 2, 3, timeout=SOON) == 8
    assert pids(session) == before
    victim = workers(session, 2)[0]
    kill(victim)
    gone(victim)
    workers(session, 2)
    nursery(session)


def test_a_worker_killed_with_the_manager_costs_its_call_alone(
    session: Session, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    lost = session.submit(deeds.wait_in, str(path))
    (pid,) = until(lambda: deeds.noted(str(path)))  # type: ignore[misc]
    with session.checkout(SOON) as lease:
        lease.call(abs, 1, timeout=SOON)
        kill(psutil.Process(pid), manager(session))
        with pytest.raises(WorkerDied) as caught:
            lost.result(SOON)
        assert caught.value.pid == pid
        assert caught.value.started
        assert lease.call(os.getpid, timeout=SOON) == lease.pid
    whole(session)


def test_all_workers_killed_with_the_manager_are_replaced(session: Session) -> None:
    before = workers(session, 2)
    kill(*before, manager(session))
    assert session.run(pow, 2, 3, timeout=SOON) == 8
    assert not set(workers(session, 2)) & set(before)


def test_workers_that_were_taken_over_are_looked_after(session: Session, tmp_path: Path) -> None:
    before = workers(session, 2)
    kill(manager(session))
    with session.checkout(SOON) as lease:
        with pytest.raises(CallTimeout):
            lease.call(time.sleep, 1000, timeout=0.2)
        gone(psutil.Process(lease.pid))
    with session.checkout(SOON) as lease, session.checkout(SOON) as other:
        (old,) = [each for each in (lease, other) if each.pid in {one.pid for one in before}]
        path = str(tmp_path / "daemon")
        with pytest.raises(WorkerDied) as caught:
            old.call(deeds.leave_daemon, path, timeout=SOON)
        assert caught.value.exitcode in (-signal.SIGKILL, None)  # it is not this manager's child
        (daemon,) = deeds.noted(path)
        until(lambda: not psutil.pid_exists(daemon) or not lives(daemon))
    whole(session)


def test_a_client_killed_with_the_manager_is_not_waited_for(
    session: Session, start_method: str
) -> None:
    code = """
        session = given()
        held = [session.checkout(), session.checkout()]
        threading.Thread(target=session.checkout, args=(None,), daemon=True).start()
        tell(sorted(lease.pid for lease in held))
        sys.stdin.readline()
    """
    with script(code, start_method) as client:
        client.give(session)
        held = client.hear()
        until(lambda: session.status().waiting == 1)
        os.kill(client.pid, signal.SIGKILL)
        kill(manager(session))
        with session.checkout(SOON) as lease:
            assert lease.pid not in held
        client.process.wait()
    whole(session)
    assert not set(pids(session)) & set(held)


def test_a_client_that_dies_while_it_is_absent_gives_up_what_it_held(
    session: Session, start_method: str
) -> None:
    code = """
        session = given()
        held = [session.checkout(), session.checkout()]
        tell("held")
        sys.stdin.readline()
    """
    with script(code, start_method) as client:
        client.give(session)
        client.hear()
        kill(manager(session))
        assert session.status().leased == 2  # another serves, and that client does not know of it
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(session.checkout, SOON)
            until(lambda: session.status().waiting == 1)
            os.kill(client.pid, signal.SIGKILL)
            waiting.result(SOON).checkin()
        client.process.wait()
    whole(session)


# --- the end ----------------------------------------------------------------------------------

TAKEN_OVER = """
    session = pool(2).run_service()
    session.run(pow, 1, 1)
    dead = session._member.owner.manager
    told = cast(session)
    future = session.submit(time.sleep, 1000)
    while not session.status().leased:
        pass
    os.kill(dead, signal.SIGKILL)
    while session._member.owner.manager == dead:
        pass
"""


@pytest.mark.parametrize("with_it", [False, True], ids=["alone", "with its manager"])
def test_the_owner_killed_after_a_takeover_leaves_nothing(start_method: str, with_it: bool) -> None:
    code = (
        TAKEN_OVER
        + """
    session.status()
    tell([told, session._member.owner.manager])
    sys.stdin.readline()
    """
    )
    with script(code, start_method) as owner:
        told, boss = owner.hear()
        victims = [psutil.Process(owner.pid)] + [psutil.Process(boss)] * with_it
        kill(*victims)
        owner.process.wait()
        all_gone(told | {"pids": [*told["pids"], boss]})


def test_the_owner_killed_during_a_takeover_leaves_nothing(start_method: str) -> None:
    with script(
        TAKEN_OVER + "    tell([told, session._member.owner.manager])\n", start_method
    ) as owner:
        told, boss = owner.hear()
        os.kill(owner.pid, signal.SIGKILL)
        owner.process.wait()
        all_gone(told | {"pids": [*told["pids"], boss]})


def test_a_pool_ended_during_a_takeover_leaves_nothing(start_method: str) -> None:
    for end in ("terminate", "safe_shutdown", "terminate"):
        session = Pool(2, start_method=start_method).run_service()
        everyone = [*workers(session, 2), manager(session), nursery(session)]
        folder = Path(session._member.path).parent
        kill(manager(session))
        getattr(session, end)()
        gone(*everyone)
        assert not folder.exists()


def test_a_pool_whose_managers_cannot_start_is_lost_and_everybody_is_told(
    session: Session, threads: ThreadPoolExecutor
) -> None:
    everyone = [*workers(session, 2), manager(session), nursery(session)]
    folder = Path(session._member.path).parent
    no_successor(session)
    idle = session.checkout(timeout=SOON)
    running = threads.submit(session.run, time.sleep, 1000)
    until(lambda: any(row.calls for row in session.workers()))
    waiting = [threads.submit(session.checkout, None), threads.submit(session.run, pow, 1, 1)]
    queued = session.submit(pow, 1, 1)
    until(lambda: session.status().waiting == 3)
    kill(manager(session))
    for future in (running, *waiting, queued):
        error = future.exception(SOON)
        assert isinstance(error, ManagerDied), repr(error)
        assert "exit code 1" in str(error)
    with pytest.raises(ManagerDied):
        idle.call(pow, 1, 1, timeout=SOON)
    for use in (session.checkout, session.status, session.workers, session.submit):
        with pytest.raises(ManagerDied, match="make a new one"):
            use(pow) if use == session.submit else use()  # type: ignore[operator]
    gone(*everyone)
    until(lambda: not folder.exists())


def test_managers_that_die_again_and_again_are_given_up(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whitepool_mp.client.owner._QUICK_DEATHS", 3)
    everyone = [*workers(session, 2), nursery(session)]
    over = threading.Event()

    def kill_managers() -> None:
        while not over.is_set():
            try:
                kill(manager(session))
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue

    killer = threading.Thread(target=kill_managers)
    killer.start()
    try:
        owner = session._member.owner
        assert owner is not None
        until(lambda: owner.lost, SOON)
        with pytest.raises(ManagerDied, match="signal 9"):
            session.checkout(SOON)
    finally:
        over.set()
        killer.join()
    gone(*everyone)
