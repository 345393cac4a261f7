"""Processes that gevent or eventlet has patched: greenlets take turns while one waits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GEVENT = """
from gevent import monkey
monkey.patch_all()
import faulthandler
faulthandler.dump_traceback_later(60, exit=True)
import time
import gevent
from whitepool_mp import CallTimeout, Executor, Pool, WorkerDied, WhitepoolError
turns = 0
def count():
    global turns
    while True:
        gevent.sleep(0.01)
        turns += 1
def others_ran(job):
    before = turns
    result = job()
    assert turns > before, "nobody else had a turn"
    return result
def slow(x):
    time.sleep(0.2)
    return x
def checked_out():
    with s.checkout(timeout=20) as lease:
        return lease.call(slow, 3)
gevent.spawn(count)
with Pool(2, start_method=START) as s:
    assert s.run(abs, -1) == 1
    runs = [gevent.spawn(s.run, slow, i) for i in range(5)]
    assert others_ran(lambda: [each.get() for each in runs]) == [0, 1, 2, 3, 4]
    assert others_ran(lambda: s.submit(slow, 4).result()) == 4
    assert others_ran(lambda: list(s.map(slow, range(4)))) == [0, 1, 2, 3]
    assert list(s.map(abs, range(5000))) == list(range(5000))
    assert others_ran(checked_out) == 3
    future = s.submit(time.sleep, 60, timeout=0.2)
    assert isinstance(others_ran(future.exception), CallTimeout)
    for job in (lambda: s.run(time.sleep, 60, timeout=0.2),):
        try:
            others_ran(job)
        except CallTimeout:
            pass
        else:
            raise AssertionError
    import os
    assert isinstance(s.submit(os._exit, 3).exception(), WorkerDied)
    assert s.run(abs, -2) == 2
    with s.executor() as executor:
        assert list(executor.map(abs, [-1, -2])) == [1, 2]
    try:
        import asyncio
        async def main():
            await s.aio().run(abs, -1)
        asyncio.run(main())
    except WhitepoolError as error:
        assert "gevent" in str(error), error
    else:
        raise AssertionError("an event loop cannot wait in a patched process")
print("all went well")
"""

EVENTLET = """
import select
del select.poll, select.epoll        # as eventlet.monkey_patch() does
from whitepool_mp import Pool, WhitepoolError
try:
    Pool(1).run_service()
except WhitepoolError as error:
    print(error)
"""


def script(text: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", text],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("method", ["forkserver", "loky"])
def test_greenlets_take_turns_while_one_waits_for_a_worker(method: str) -> None:
    assert "all went well" in script(f"START = {method!r}\n{GEVENT}")


def test_a_process_that_is_left_nothing_to_wait_with_is_told_so() -> None:
    told = script(EVENTLET)
    assert "eventlet" in told and "select.poll" in told
