"""What every worker is doing now: `session.stacks()`."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deeds
import psutil
import pytest
from anatomy import manager, workers
from support import until

from whitepool_mp import Pool, PoolClosed, Session, WorkerStack
from whitepool_mp.manager.stacks import MOST_BYTES, PATIENCE, Stacks, _is_whole, shortened
from whitepool_mp.wire import frames, pages

T = 20


def stack_of(session: Session, pid: int | None) -> WorkerStack:
    """One worker's."""
    (found,) = [each for each in session.stacks() if each.pid == pid]
    return found


def promptly(session: Session) -> list[WorkerStack] | None:
    """All stacks, if they came before the time for them was up: their ends were seen."""
    began = time.monotonic()
    found = session.stacks()
    return found if time.monotonic() - began < PATIENCE else None


def prompt_stack(session: Session, pid: int) -> WorkerStack:
    """One worker's, promptly (of several attempts: the machine may be busy)."""
    found = until(lambda: promptly(session))
    assert isinstance(found, list)
    (stack,) = [each for each in found if each.pid == pid]
    assert isinstance(stack, WorkerStack)
    return stack


def busy(session: Session, tmp_path: Path, deed: Callable[..., Any]) -> tuple[Any, int, Path]:
    """Have a worker do something until the test writes into a pipe: its future, its pid, the
    pipe."""
    path = tmp_path / f"pipe-{time.monotonic_ns()}"
    noted = tmp_path / f"pid-{time.monotonic_ns()}"
    os.mkfifo(path)
    future = session.submit(deed, str(path), str(noted))
    until(lambda: deeds.noted(noted))
    return future, deeds.noted(noted)[0], path


def test_an_idle_worker_waits_for_a_call(start_method: str) -> None:
    with Pool(2, start_method=start_method, factory=int) as session:
        pids = {process.pid for process in workers(session, 2)}
        found = until(lambda: promptly(session))
    assert isinstance(found, list)
    assert {each.pid for each in found} == pids
    assert sorted(each.slot for each in found) == [0, 1]
    for each in found:
        assert (each.state, each.answered) == ("idle", True)
        assert each.stack.splitlines()[0].startswith("Current thread 0x")
        assert each.stack.splitlines()[1:] == ["  (it waits for a call)"]


@pytest.mark.parametrize(
    ("deed", "frames_seen"),
    [
        (deeds.spin_until_told, ["in spinning", "in spin_until_told"]),
        (deeds.sleep_until_told, ["in sleeping", "in sleep_until_told"]),
        (deeds.hold_gil_until_told, ["in holding_gil", "in hold_gil_until_told"]),
    ],
)
def test_a_busy_worker_tells_where_it_is_and_goes_on(
    start_method: str, deed: Any, frames_seen: list[str], tmp_path: Path
) -> None:
    """In Python, in C, in C that holds the interpreter's lock in a system call."""
    with Pool(2, start_method=start_method) as session:
        future, pid, path = busy(session, tmp_path, deed)
        for _ in range(3):
            began = time.monotonic()
            found = until(lambda: seen(stack_of(session, pid), frames_seen))
            assert time.monotonic() - began < 10
            assert isinstance(found, WorkerStack)
            assert (found.state, found.answered) == ("leased", True)
            assert "whitepool_mp" not in found.stack
        path.write_bytes(b"x")
        assert future.result(T) == "told"
        assert session.run(abs, -1, timeout=T) == 1


def seen(found: WorkerStack, names: list[str]) -> WorkerStack | None:
    """A stack, if all these are in it (the worker may just have come to where it is)."""
    return found if all(name in found.stack for name in names) else None


def test_who_is_busy_in_c_code_is_interrupted_there(start_method: str) -> None:
    """It comes to no next step of Python code for long."""
    with Pool(2, start_method=start_method) as session:
        future = session.submit(deeds.sum_for_long)
        until(lambda: any("in summing" in each.stack for each in session.stacks()), T)
        future.cancel()


def test_whoever_is_awake_does_not_see_another_errno(start_method: str, tmp_path: Path) -> None:
    """A handler that sets it makes a system call that fails there fail for no reason."""
    with Pool(1, start_method=start_method) as session:
        future, pid, path = busy(session, tmp_path, deeds.spin_until_told)
        for _ in range(300):
            found = stack_of(session, pid)
            assert found.answered, found
        path.write_bytes(b"x")
        assert future.result(T) == "told"


def test_a_worker_that_does_something_else_at_the_signal_is_not_asked(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        (worker,) = workers(session, 1)
        session.run(deeds.ignore, pages.STACKS_NOW, timeout=T)
        (found,) = session.stacks()
        assert (found.pid, found.answered) == (worker.pid, False)
        assert found.stack.startswith("(it cannot tell:")
        session.run(deeds.default, pages.STACKS_NOW, timeout=T)
        (found,) = session.stacks()
        assert (found.pid, found.answered) == (worker.pid, False)
        assert session.run(os.getpid, timeout=T) == worker.pid


def test_a_function_of_c_code_is_told_as_such(start_method: str, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with Pool(1, start_method=start_method) as session:
        future = session.submit(os.open, str(path), os.O_RDONLY)
        until(lambda: "(in a function of C code)" in session.stacks()[0].stack)
        path.write_bytes(b"")
        assert future.result(T) > 2


def test_every_thread_is_told(start_method: str, tmp_path: Path) -> None:
    with Pool(1, start_method=start_method) as session:
        future, pid, path = busy(session, tmp_path, deeds.sleep_with_threads_until_told)
        found = until(lambda: seen(stack_of(session, pid), ["in sleeping"]))
        assert isinstance(found, WorkerStack)
        assert found.stack.count("hread 0x") == 4
        until(lambda: stack_of(session, pid).stack.count("in wait_in_thread") == 3)
        assert found.stack.count("Current thread 0x") == 1
        path.write_bytes(b"x")
        assert future.result(T) == "told"


@pytest.mark.parametrize("depth", [50, 99, 100, 101, 500])
def test_a_deep_stack_ends_where_the_interpreter_ends_it(depth: int, tmp_path: Path) -> None:
    with Pool(1) as session:
        future, pid, path = busy(session, tmp_path, deeds.deep[depth])
        found = prompt_stack(session, pid)
        assert found.answered
        assert min(depth, 90) <= found.stack.count("in deeper") <= depth
        path.write_bytes(b"x")
        assert future.result(T) == "told"


def test_more_threads_than_are_told(tmp_path: Path) -> None:
    with Pool(1) as session:
        future, pid, path = busy(session, tmp_path, deeds.sleep_with_many_threads_until_told)
        found = prompt_stack(session, pid)
        assert found.answered
        assert found.stack.count("hread 0x") == 100
        path.write_bytes(b"x")
        assert future.result(T) == "told"


def test_a_stopped_worker_is_told_as_such_and_nobody_waits(start_method: str) -> None:
    with Pool(2, start_method=start_method) as session:
        first, _ = workers(session, 2)
        os.kill(first.pid, signal.SIGSTOP)
        until(lambda: first.status() == psutil.STATUS_STOPPED)
        for _ in range(2):
            found = {each.pid: each for each in session.stacks()}
            stopped = found.pop(first.pid)
            assert (stopped.state, stopped.answered) == ("stopped", False)
            assert stopped.stack == "(it is stopped, by SIGSTOP or a debugger)"
            assert all(each.answered for each in found.values())
        os.kill(first.pid, signal.SIGCONT)
        until(lambda: stack_of(session, first.pid).answered)
        assert [session.run(abs, -1, timeout=T) for _ in range(4)] == [1] * 4


def test_a_worker_that_blocks_the_signal_is_waited_for_a_second(
    start_method: str, tmp_path: Path
) -> None:
    with Pool(2, start_method=start_method) as session:
        workers(session, 2)
        future, pid, path = busy(session, tmp_path, deeds.block_signals_until_told)
        for _ in range(2):
            began = time.monotonic()
            found = session.stacks()
            assert PATIENCE <= time.monotonic() - began < PATIENCE + 5
            by_pid = {each.pid: each for each in found}
            deaf = by_pid.pop(pid)
            assert (deaf.state, deaf.answered) == ("leased", False)
            assert deaf.stack == f"(it did not answer within {PATIENCE:g} s)"
            assert all(each.answered for each in by_pid.values())
        path.write_bytes(b"x")
        assert future.result(T) == "told"
        # It has got the signal by now, once. What it wrote then was for nobody.
        assert stack_of(session, pid).stack.endswith("(it waits for a call)")


def test_a_worker_that_is_starting_is_told_as_such(start_method: str, tmp_path: Path) -> None:
    """In its factory it tells already; before that it is not asked, and not harmed."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    states = set()
    with Pool(1, factory=deeds.Slow(str(path)), start_method=start_method) as session:

        def starting() -> bool:
            """a worker in its factory"""
            (each,) = session.stacks()
            states.add((each.state, each.answered))
            if not each.answered:
                assert each.stack == "(it is being started and cannot tell yet)"
            return "in __call__" in each.stack

        until(starting)
        assert ("booting", True) in states
        path.write_bytes(b"go")
        session.checkout(T).checkin()
        counters = session.status().counters
    assert (counters["crashes"], counters["start_failures"]) == (0, 0)


def test_hundreds_of_questions_to_workers_that_start_harm_none(start_method: str) -> None:
    with Pool(4, start_method=start_method) as session:
        until(lambda: session.stacks() and session.status().available == 4)
        counters = session.status().counters
    assert (counters["spawned"], counters["crashes"], counters["start_failures"]) == (4, 0, 0)


def test_a_worker_that_dies_meanwhile_is_told_as_dead(start_method: str, tmp_path: Path) -> None:
    with Pool(2, start_method=start_method) as session:
        workers(session, 2)
        future, pid, _ = busy(session, tmp_path, deeds.block_signals_until_told)
        told: list[list[WorkerStack]] = []
        asker = threading.Thread(target=lambda: told.append(session.stacks()))
        asker.start()
        until(lambda: psutil.Process(pid).status() and pending(pid))
        os.kill(pid, signal.SIGKILL)
        asker.join(T)
        assert future.exception(T) is not None
    (dead,) = [each for each in told[0] if each.pid == pid]
    assert (dead.answered, dead.stack) == (False, "(it has just died)")


def pending(pid: int) -> bool:
    """Whether the signal waits for a process."""
    with open(f"/proc/{pid}/status") as file:
        lines = [line.split() for line in file if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(bits, 16) >> (pages.STACKS_NOW - 1) & 3 for _, bits in lines)


def test_children_of_a_worker_are_left_alone(start_method: str, tmp_path: Path) -> None:
    with Pool(1, start_method=start_method) as session:
        forked = session.run(deeds.linger, str(tmp_path / "forked"), timeout=T)
        until(lambda: deeds.noted(tmp_path / "forked"))
        executed = session.run(deeds.start_sleep, timeout=T)
        for _ in range(5):
            assert session.stacks()[0].answered
        for pid in (forked, executed):
            assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_sleep_lasts_as_long_as_it_should(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        session.run(abs, -1, timeout=T)
        future = session.submit(deeds.timed_sleep, 0.3)
        asked = 0
        while not future.done():
            session.stacks()
            asked += 1
        assert asked > 3
        assert future.result(T) >= 0.3


def test_many_ask_at_once(start_method: str) -> None:
    with Pool(3, start_method=start_method) as session:
        workers(session, 3)
        told: list[list[WorkerStack]] = []
        askers = [
            threading.Thread(target=lambda: told.extend(session.stacks() for _ in range(10)))
            for _ in range(8)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(T)
    assert len(told) == 80
    for found in told:
        assert [each.answered for each in found] == [True] * 3
        assert all(each.stack.count("hread 0x") == 1 for each in found)


def test_a_client_that_asks_and_leaves_harms_nobody(start_method: str, tmp_path: Path) -> None:
    with Pool(2, start_method=start_method) as session:
        workers(session, 2)
        future, _, path = busy(session, tmp_path, deeds.block_signals_until_told)
        with session._member.link() as link:
            link._sock.sendall(frames.request(frames.STACKS, link.next_number()))
            link.hang_up()
        assert len(session.stacks()) == 2
        path.write_bytes(b"x")
        assert future.result(T) == "told"


def test_a_stranger_may_send_the_signal(start_method: str) -> None:
    """It is answered into the pipe; nobody asked."""
    with Pool(1, start_method=start_method) as session:
        (worker,) = workers(session, 1)
        for _ in range(3):
            os.kill(worker.pid, pages.STACKS_NOW)
            assert session.run(abs, -1, timeout=T) == 1
        assert stack_of(session, worker.pid).answered
        assert session.status().counters["crashes"] == 0


def test_with_a_stopped_manager_workers_are_not_held_up(start_method: str) -> None:
    with Pool(1, start_method=start_method) as session:
        (worker,) = workers(session, 1)
        session.run(abs, -1, timeout=T)
        boss = manager(session)
        os.kill(boss.pid, signal.SIGSTOP)
        try:
            for _ in range(3000):  # more than the pipe holds
                os.kill(worker.pid, pages.STACKS_NOW)
            assert session.run(abs, -1, timeout=T) == 1
        finally:
            os.kill(boss.pid, signal.SIGCONT)
        until(lambda: stack_of(session, worker.pid).answered)


def test_the_asyncio_form(start_method: str) -> None:
    async def main() -> None:
        async with Pool(2, start_method=start_method) as session:
            task = asyncio.create_task(session.run(time.sleep, 0.5))
            await asyncio.sleep(0.1)
            found = await session.stacks()
            assert all(isinstance(each, WorkerStack) for each in found)
            assert all(each.answered or each.state == "booting" for each in found)
            await task

    asyncio.run(main())


def test_a_record_is_frozen_and_travels() -> None:
    record = WorkerStack(1, 0, "idle", True, "text")
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises(AttributeError):
        record.state = "leased"  # type: ignore[misc]


def test_a_pool_that_has_ended_has_no_stacks(start_method: str) -> None:
    session = Pool(1, start_method=start_method).run_service()
    session.terminate()
    with pytest.raises(PoolClosed):
        session.stacks()


# --- the collecting, without processes ------------------------------------------------------------

HEAD = "Current thread 0x%016x (most recent call first):\n"
OURS = (
    '  File "/x/whitepool_mp/worker/serve.py", line 66 in run\n'
    '  File "/x/whitepool_mp/worker/main.py", line 1 in run\n'
    '  File "/x/whitepool_mp/manager/main.py", line 44 in main\n'
    '  File "<string>", line 5 in <module>\n'
)


def hand(number: int, thread: int = 7) -> Any:
    """As much of a worker as is looked at; its pid is a stranger's that no signal reaches."""
    words = {pages.THREAD: thread}
    page = SimpleNamespace(words=words, busy=lambda: False)
    return SimpleNamespace(worker=number, pid=None, dump=None, page=page)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", False),
        (HEAD % 7, False),
        (HEAD % 7 + OURS, True),
        (HEAD % 7 + OURS[:-1], False),
        (HEAD % 7 + OURS.rpartition("  File")[0], False),
        (HEAD % 8 + '  File "a.py", line 1 in f\n', False),
        (HEAD % 8 + '  File "a.py", line 1 in f\n\n' + HEAD % 7, False),
        (HEAD % 7 + '  File "a.py", line 1 in f\n' * 99, False),
        (HEAD % 7 + '  File "a.py", line 1 in f\n' * 100, True),
        (HEAD % 8 + '  File "a.py", line 1 in f\n' * 100, False),
        (HEAD % 7 + '  File "a.py", line 1 in f\n' * 3 + "  ...\n", True),
        (HEAD % 8 + '  File "a.py", line 1 in f\n' * 3 + "  ...\n", False),
        (HEAD % 8 + '  File "a.py", line 1 in f\n\n...\n', True),
        (HEAD % 7 + '  File "<string>", line 1 in <module>\n', False),
        (HEAD % 7 + "  Garbage-collecting\n" + OURS, True),
    ],
)
def test_where_a_stack_ends(text: str, whole: bool) -> None:
    assert _is_whole(bytearray(text.encode()), 7) is whole


def test_all_stacks_together_fit_a_frame() -> None:
    stacks = Stacks(lambda: 0.0)
    told: list[Any] = []
    hands = [hand(number) for number in range(4096)]
    rows: list[tuple[dict[str, Any], Any]] = [
        ({"pid": 1, "slot": n, "state": "idle"}, h) for n, h in enumerate(hands)
    ]
    stacks.ask(rows, told.append)
    assert len(told[0]) == 4096
    limit = MOST_BYTES // 4096
    long = '  File "\\u20ac.py", line 1 in f\n' * 10_000
    for row, _ in rows:
        row["stack"] = shortened(long, limit)
    assert len(frames.reply(1, told[0])) < frames.MAX_FRAME


@pytest.mark.parametrize("limit", [0, 10, 41, 100, 1000])
def test_a_long_text_loses_its_middle(limit: int) -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    short = shortened(text, limit)
    assert "... (shortened) ..." in short
    assert len(short) <= max(limit, 41)
    kept = [line for line in short.splitlines() if line and "..." not in line]
    assert all(line in text.splitlines() for line in kept)
    assert shortened(text, len(text)) == text


def test_a_reply_is_json() -> None:
    assert frames.read_reply(frames.reply(5, [{"stack": "a\nb"}])[4:]) == [{"stack": "a\nb"}]
