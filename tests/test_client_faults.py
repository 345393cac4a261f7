"""Clients that come to grief: nobody else notices, and the worker they held is replaced.

Arguments are pickled and results are unpickled in the client. A crash there is the client's own
death; `sys.exit()` and other exceptions there fail the one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deeds
import pytest
from support import sibling, until, whole
from user_script import CLIENTS, script

from whitepool_mp import Lease, Pool, Session

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""

DEATHS = {
    "segfault": -signal.SIGSEGV,
    "abort": -signal.SIGABRT,
    "kill_self": -signal.SIGKILL,
    "leave": 3,
    "libc_exit": 0,
}
STEPS = ("pickle_arguments", "unpickle_result")
HOWS = ("call", "run", "submit", "map")

# A call whose argument, or whose result, does a deed here.
CALLS = textwrap.dedent("""
    def call(how, step, deed):
        if step == "pickle_arguments":
            fn, argument = deeds.echo, deeds.OnPickling(getattr(deeds, deed))
        else:
            fn, argument = deeds.on_unpickling, getattr(deeds, deed)
        if how == "call":
            with session.checkout(20) as lease:
                lease.call(fn, argument, timeout=20)
        elif how == "run":
            session.run(fn, argument, timeout=20)
        elif how == "submit":
            session.submit(fn, argument).result(20)
        else:
            list(session.map(fn, [argument]))
""")


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_dies_while_it_pickles_or_unpickles_harms_nobody(
    start_method: str, step: str, tmp_path: Path
) -> None:
    """By each death, in each kind of call."""
    code = f"""
        for how in {HOWS!r}:
            for deed in {tuple(DEATHS)!r}:
                tell([how, deed, ended(client(call, how, {step!r}, deed))])
    """
    with (
        Pool(2, start_method=start_method) as session,
        sibling(session, tmp_path),
        script(code, start_method, CLIENTS + CALLS) as clients,
    ):
        clients.give(session)
        for how in HOWS:
            for deed, end in DEATHS.items():
                assert clients.hear() == [how, deed, end]
        _, err = clients.finish()
        assert err == ""
        assert session.run(deeds.add, 1, 2, timeout=T) == 3
        assert session.status().counters["crashes"] == 0  # the pool's own ending of the dirty ones


@pytest.mark.parametrize("step", STEPS)
def test_sys_exit_while_the_client_pickles_or_unpickles_fails_that_one_call(
    start_method: str, step: str, tmp_path: Path
) -> None:
    def asks(lease: Lease) -> dict[str, Callable[..., Any]]:
        return {
            "call": lambda *args: lease.call(*args, timeout=T),
            "run": lambda *args: session.run(*args, timeout=T),
            "submit": lambda *args: session.submit(*args).result(T),
            "map": lambda fn, *args: list(session.map(fn, *([arg] for arg in args))),
        }

    with Pool(3, start_method=start_method) as session, sibling(session, tmp_path):
        with session.checkout(T) as lease:
            pids = {session.submit(os.getpid).result(T), lease.pid}
            for ask in asks(lease).values():
                for _ in range(2):
                    with pytest.raises(SystemExit) as caught:
                        if step == "pickle_arguments":
                            ask(deeds.echo, deeds.OnPickling(deeds.ask_to_exit))
                        else:
                            ask(deeds.on_unpickling, deeds.ask_to_exit)
                    assert caught.value.code == 4
                assert ask(deeds.add, 1, 2) in (3, [3])
            assert lease.call(os.getpid, timeout=T) == lease.pid
            assert session.run(os.getpid, timeout=T) in pids
        counters = session.status().counters
        assert (counters["killed"], counters["crashes"]) == (0, 0)


HELD = """
    def queued():
        session.checkout(timeout=None)

    def idle(path):
        lease = session.checkout(timeout=20)
        lease.call(deeds.note, path, timeout=20)
        time.sleep(1000)

    def in_a_call(path):
        with session.checkout(timeout=20) as lease:
            lease.call(deeds.wait_in, path)

    def in_a_run(path):
        session.run(deeds.wait_in, path)

    def in_a_job(path):
        session.submit(deeds.wait_in, path).result()

    def in_a_map(path):
        list(session.map(deeds.wait_in, [path]))

    while line := sys.stdin.readline():
        name, *args = json.loads(line)
        tell(client(globals()[name], *args))
"""
STATES = ("idle", "in_a_call", "in_a_run", "in_a_job", "in_a_map")


def test_a_client_killed_while_it_holds_a_worker_harms_nobody(
    start_method: str, tmp_path: Path
) -> None:
    """Its worker is replaced, whatever it was doing; who waits behind it is served."""
    with (
        Pool(2, start_method=start_method) as session,
        sibling(session, tmp_path),
        script(HELD, start_method, CLIENTS) as clients,
    ):
        clients.give(session)
        for state in STATES:
            path = str(tmp_path / state)
            client = _begin(clients, state, path)
            (held,) = until(lambda path=path: deeds.noted(path))  # type: ignore[misc]
            behind = session.submit(os.getpid)
            until(lambda: session.status().waiting == 1)
            os.kill(client, signal.SIGKILL)
            assert behind.result(T) != held
            _unfinished(session)
        _end(clients)
        counters = session.status().counters
        assert (counters["killed"], counters["crashes"]) == (len(STATES), 0)


def test_a_client_killed_while_it_queues_takes_nobody_s_turn(
    start_method: str, tmp_path: Path
) -> None:
    with (
        Pool(2, start_method=start_method) as session,
        sibling(session, tmp_path),
        script(HELD, start_method, CLIENTS) as clients,
    ):
        clients.give(session)
        with session.checkout(T) as lease:
            queued = [_begin(clients, "queued") for _ in range(3)]
            until(lambda: session.status().waiting == 3)
            behind = session.submit(os.getpid)
            until(lambda: session.status().waiting == 4)
            for client in queued:
                os.kill(client, signal.SIGKILL)
            until(lambda: session.status().waiting == 1)
        assert behind.result(T) == lease.pid
        _end(clients)
        counters = session.status().counters
        assert (counters["killed"], counters["crashes"]) == (0, 0)


def _begin(clients: Any, name: str, *args: str) -> int:
    clients.say(json.dumps([name, *args]).encode())
    return int(clients.hear())


def _unfinished(session: Session) -> None:
    """Wait until a worker is free beside the sibling's."""
    until(lambda: session.status().available == 1 and not session.status().booting)


def _end(clients: Any) -> None:
    _, err = clients.finish()
    assert err == ""


# --- tasks ------------------------------------------------------------------------------------


def test_a_task_cancelled_while_it_queues_or_calls_harms_nobody(
    start_method: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "pids")

    async def cancel(session: Session) -> None:
        aio = session.aio()
        for number, way in enumerate(("lease", "run")):

            async def call(way: str = way) -> None:
                if way == "lease":
                    async with aio.checkout(T) as lease:
                        await lease.call(deeds.wait_in, path)
                else:
                    await aio.run(deeds.wait_in, path)

            async def queue(way: str) -> None:
                if way == "lease":
                    async with aio.checkout(None):
                        raise AssertionError
                elif way == "run":
                    await aio.run(deeds.note, path)
                else:
                    async for _ in aio.map(deeds.note, [path]):
                        raise AssertionError

            calling = asyncio.create_task(call())
            while len(deeds.noted(path)) <= number:
                await asyncio.sleep(0.002)
            queued = [asyncio.create_task(queue(each)) for each in ("lease", "run", "map")]
            last = asyncio.create_task(aio.run(os.getpid))
            while not (await aio.status()).waiting:
                await asyncio.sleep(0.002)
            for task in [*queued, calling]:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert task.cancelled()
            assert await asyncio.wait_for(last, T) != deeds.noted(path)[number]

    with Pool(2, start_method=start_method) as session, sibling(session, tmp_path):
        asyncio.run(asyncio.wait_for(cancel(session), 60))
        assert len(deeds.noted(path)) == 2  # what was queued never ran
        _unfinished(session)
        counters = session.status().counters
        assert (counters["killed"], counters["crashes"]) == (2, 0)


@contextlib.contextmanager
def without_descriptors() -> Iterator[None]:
    """This process can open nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_without_descriptors_costs_no_worker() -> None:
    """A worker that it cannot talk to goes back as it is; what has a lease keeps it."""
    with Pool(2) as session:
        whole(session)
        workers = {row.pid for row in session.workers()}
        with without_descriptors():
            for _ in range(4):
                with pytest.raises(OSError, match="descriptor"):
                    session.run(abs, -1)
        whole(session)
        with session.checkout() as lease:
            with without_descriptors(), pytest.raises(OSError, match="descriptor"):
                lease.call(abs, -1)
            assert lease.valid and lease.call(abs, -2) == 2
        assert session.run(abs, -3) == 3
        assert {row.pid for row in session.workers()} == workers
        assert session.status().counters["killed"] == 0
