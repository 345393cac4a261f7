"""Ctrl-C in every call that blocks: it raises `KeyboardInterrupt` there and then.

What was asked for is given up, a worker that was in the call is replaced, and a call of another
thread ends unharmed. (Where the moment is random: `test_leases`, `test_keeping`.)
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
from support import pipe_writer
from test_owners import all_gone
from user_script import script

BEGIN = f"""
sys.path.insert(0, {os.path.dirname(__file__)!r})
""" + textwrap.dedent("""
import deeds
main = threading.main_thread()

def blocked(entry):
    # Whether the main thread has come to a stop below a function.
    frame = sys._current_frames()[main.ident]
    where = id(frame), frame.f_lasti
    while frame is not None and frame.f_code is not entry.__code__:
        frame = frame.f_back
    return frame is not None and where

def interrupt(entry):
    seen, times = None, 0
    while times < 20:
        where = blocked(entry)
        times = times + 1 if where and where == seen else 0
        seen = where
        time.sleep(0.002)
    signal.pthread_kill(main.ident, signal.SIGINT)

def interrupted(call):
    thread = threading.Thread(target=interrupt, args=(call,))
    thread.start()
    try:
        call()
        return "nothing"
    except BaseException as error:
        return type(error).__name__
    finally:
        thread.join()

class Resource:
    def wait(self):
        time.sleep(1000)

def settled():
    # A worker's end that was just asked for may not have begun.
    while True:
        now = session.status()
        if (now.leased, now.available, now.waiting, now.retiring) == (1, 2, 0, 0):
            return

session = pool(3, factory=Resource).run_service()
told = cast(session)
manager = session._member.owner.manager
""")

CASES = textwrap.dedent("""
def leased_call():
    with session.checkout(20) as lease:
        lease.call(lambda resource: time.sleep(1000))

def leased_call_with_deadline():
    with session.checkout(20) as lease:
        lease.call(lambda resource: time.sleep(1000), timeout=100)

def method():
    with session.checkout(20) as lease:
        lease.get().wait()

def sending():
    with session.checkout(20) as lease:
        os.kill(lease.pid, signal.SIGSTOP)
        lease.call(lambda resource, data: None, bytes(16 << 20))

def sending_with_deadline():
    with session.checkout(20) as lease:
        os.kill(lease.pid, signal.SIGSTOP)
        lease.call(lambda resource, data: None, bytes(16 << 20), timeout=100)

ends = []  # jobs of which only the waiting is interrupted: to be ended

def result():
    ends.append(session.submit(time.sleep, 1000))
    ends[-1].result()

def result_with_deadline():
    ends.append(session.submit(time.sleep, 1000))
    ends[-1].result(100)

def executor_shutdown():
    executor = session.executor()
    ends.append(executor.submit(time.sleep, 1000))
    executor.shutdown(wait=True)

BUSY = {
    "run": lambda: session.run(time.sleep, 1000),
    "run, with a deadline": lambda: session.run(time.sleep, 1000, timeout=100),
    "transaction": lambda: session.transaction(lambda l: l.call(lambda r: time.sleep(1000))),
    "lease.call": leased_call,
    "lease.call, with a deadline": leased_call_with_deadline,
    "lease.get().method": method,
    "lease.call, sending": sending,
    "lease.call, sending, with a deadline": sending_with_deadline,
    "future.result": result,
    "future.result, with a deadline": result_with_deadline,
    "executor.shutdown": executor_shutdown,
}
QUEUED = {
    "checkout": lambda: session.checkout(None),
    "checkout, with a deadline": lambda: session.checkout(100),
    "block_checkout": lambda: session.block_checkout(100),
    "transaction": lambda: session.transaction(print, None),
    "run": lambda: session.run(abs, -1),
    "run, with a deadline": lambda: session.run(abs, -1, timeout=100),
    "future.result": lambda: session.submit(abs, -1).result(),
    "map": lambda: list(session.map(abs, [-1, -2])),
    "unordered map": lambda: list(session.map(abs, [-1, -2], ordered=False)),
    "executor.map": lambda: list(session.executor().map(abs, [-1])),
}
STOPPED = {
    "status": lambda: session.status(),
    "workers": lambda: session.workers(),
    "print_statistics": lambda: session.print_statistics(),
    "resize": lambda: session.resize(3, 0),
    "nonblock_checkout": lambda: session.nonblock_checkout(),
    "checkout": lambda: session.checkout(100),
}
""")

LOOP = textwrap.dedent("""
def sibling():
    tell(["sibling", session.run(deeds.read_pipe, sys.stdin.readline().strip(), timeout=100)])

other = threading.Thread(target=sibling)
other.start()
while session.status().leased != 1:
    pass
session.submit(abs, -1).result(20)

for name, call in BUSY.items():
    tell(["busy", name, interrupted(call)])
    while ends:
        ends.pop().cancel()
    settled()
for name, call in QUEUED.items():
    leases = [session.checkout(20) for _ in range(2)]
    tell(["queued", name, interrupted(call)])
    for lease in leases:
        lease.checkin()
    settled()
for name, call in STOPPED.items():
    os.kill(manager, signal.SIGSTOP)
    tell(["stopped", name, interrupted(call)])
    os.kill(manager, signal.SIGCONT)
    settled()
tell("over")
other.join()
""")


def test_ctrl_c_ends_every_call_that_blocks(start_method: str, tmp_path: Path) -> None:
    path = str(tmp_path / "pipe")
    with script(LOOP, start_method, BEGIN + CASES) as client, pipe_writer(path) as connect:
        client.say(path.encode())
        fd = connect()
        cases = []
        while (told := client.hear()) != "over":
            *case, outcome = told
            assert outcome == "KeyboardInterrupt", told
            cases.append(case)
        os.write(fd, b"unharmed")
        os.dup2(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), fd)
        assert client.hear() == ["sibling", "unharmed"]
        _, err = client.finish()
        assert err == ""
    assert len(cases) == 27


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("how", ["safe_shutdown()", "safe_shutdown(100)", "terminate()"])
def test_ctrl_c_ends_the_wait_for_the_end_which_can_be_asked_for_again(
    start_method: str, how: str, again: bool
) -> None:
    """The manager is stopped: it is the next try, or the end of the process, that kills it."""
    code = f"""
        def end():
            session.{how}
        os.kill(manager, signal.SIGSTOP)
        tell(told)
        tell(interrupted(end))
        import whitepool_mp.client.owner
        whitepool_mp.client.owner._PATIENCE = 0.2
        if {again}:
            session.terminate()
    """
    with script(code, start_method, BEGIN + CASES) as client:
        told = client.hear(40)
        assert client.hear() == "KeyboardInterrupt"
        _, err = client.finish()
        assert err == ""
        all_gone(told)
