"""Objects of multiprocessing and sockets as arguments, results, initargs: they work there, or are
refused by name. Nothing is ever sent as the number of a descriptor."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import shared_deeds as deeds
from support import NewPool, until

from whitepool_mp import Executor, Pool, SerializationError, Session, WorkerDied

T = 60.0
"""Seconds that nothing here should need: a deadline against hanging."""

Ask = Callable[..., Any]


@pytest.fixture(params=["run", "submit", "map", "call", "partial", "lambda", "aio"])
def ask(request: pytest.FixtureRequest, start_method: str) -> Iterator[Ask]:
    """Each way of calling a function in a worker."""
    way = request.param
    with Pool(2, start_method=start_method) as session, session.checkout(T) as lease:

        async def in_loop(fn: Any, *args: Any) -> Any:
            return await session.aio().run(fn, *args, timeout=T)

        ways: dict[str, Ask] = {
            "run": lambda fn, *args: session.run(fn, *args, timeout=T),
            "submit": lambda fn, *args: session.submit(fn, *args).result(T),
            "map": lambda fn, *args: next(session.map(fn, *([arg] for arg in args))),
            "call": lambda fn, *args: lease.call(fn, *args, timeout=T),
            "partial": lambda fn, *args: next(session.map(partial(fn, *args[:-1]), args[-1:])),
            "lambda": lambda fn, *args: session.run(lambda: fn(*args), timeout=T),
            "aio": lambda fn, *args: asyncio.run(in_loop(fn, *args)),
        }
        yield lambda fn, *args: ways[way](fn, *args)
        ways.clear()  # a lease keeps its thread's connection to the manager


@pytest.fixture(scope="module", autouse=True)
def things_of_the_process() -> None:
    """What multiprocessing starts and opens in a process once, and keeps."""
    resource_tracker.ensure_running()
    multiprocessing.RawValue("i")


@pytest.fixture
def named() -> Any:
    """A context whose locks have names."""
    return multiprocessing.get_context("spawn")


def opened() -> int:
    """This process's open descriptors."""
    return len(os.listdir("/proc/self/fd"))


# --- connections and sockets ------------------------------------------------------------------


def heard(connection: Connection) -> Any:
    """What comes next."""
    assert connection.poll(T)
    return connection.recv()


def test_a_connection_works_in_the_worker(ask: Ask) -> None:
    for number in range(3):
        here, there = multiprocessing.Pipe()
        with here, there:
            ask(deeds.say, there, f"text {number}")
            text, pid = heard(here)
            assert text == f"text {number}" and pid != os.getpid()
            there.close()
            with pytest.raises(EOFError):  # nobody has kept a copy
                heard(here)
    assert ask(max, 2, 3) == 3


def test_a_socket_works_in_the_worker(ask: Ask) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(T)
        ask(deeds.shout, there, b"here")
        assert here.recv(9) == b"here"


def test_ends_of_one_way_and_nested_ones(session: Session) -> None:
    here, there = multiprocessing.Pipe(duplex=False)
    with here, there:
        session.run(deeds.say_deep, {"there": [there]}, timeout=T)
        assert heard(here) == "deep"
        assert session.run(deeds.same, here, here, timeout=T)


def test_connections_and_sockets_as_results(ask: Ask) -> None:
    with ask(lambda text, _: deeds.new_pipe(text), "text", 0)["ends"][0] as connection:
        assert heard(connection) == "text"
    with ask(lambda data, _: deeds.new_socket(data), b"data", 0) as sock:
        sock.settimeout(T)
        assert sock.recv(9) == b"data"


def test_methods_take_and_give_connections(new_pool: NewPool) -> None:
    with new_pool(1, factory=deeds.Box) as session, session.checkout(T) as lease:
        here, there = multiprocessing.Pipe()
        with here, there:
            lease.get().say(there, "text")
            assert heard(here) == "text"
        with lease.get().pipe("other") as connection:
            assert heard(connection) == "other"
        assert lease.get().lock().acquire()  # it stays there


def test_large_buffers_travel_with_descriptors(session: Session) -> None:
    here, there = multiprocessing.Pipe()
    large = bytes(range(256)) * 4096
    with here, there:

        def call(connection: Any, first: bytes, second: bytearray) -> tuple[int, bytes, Any]:
            connection.send(sum(second))
            return len(first), bytes(second), connection

        size, back, again = session.run(call, there, large, bytearray(large), timeout=T)
        assert (size, back) == (len(large), large)
        assert heard(here) == sum(large)
        with again:
            again.send("and back")
            assert heard(here) == "and back"


def test_too_many_descriptors_are_refused_by_name(session: Session) -> None:
    pairs = [multiprocessing.Pipe() for _ in range(127)]
    ends = [end for pair in pairs for end in pair]
    before = opened()
    with pytest.raises(SerializationError, match="more than 253 descriptors"):
        session.run(len, ends)
    assert opened() == before
    assert session.run(len, ends[:253], timeout=T) == 253
    for end in ends:
        end.close()


def test_no_descriptor_is_left_in_either_process(new_pool: NewPool) -> None:
    with new_pool(1) as session:
        here, there = multiprocessing.Pipe()
        with here, there:

            def all_ways() -> None:
                session.run(deeds.same, there, here, timeout=T)
                session.submit(deeds.same, there, here).result(T)
                list(session.map(deeds.same, [there] * 3, [here] * 3))
                session.run(deeds.new_pipe, "text", timeout=T)["ends"][0].close()
                with pytest.raises(SerializationError):
                    session.run(deeds.same, there, (each for each in ()), timeout=T)
                with pytest.raises(Exception, match="Connection"):
                    session.run(deeds.fail_with, there, timeout=T)

            all_ways()
            before = opened(), session.run(deeds.fds)
            for _ in range(5):
                all_ways()
            assert (opened(), session.run(deeds.fds)) == before


def test_the_end_of_a_worker_is_the_end_of_its_copies(new_pool: NewPool) -> None:
    """Also while the error is being handled."""
    with new_pool(1) as session:
        here, there = multiprocessing.Pipe()
        with here:
            try:
                session.run(deeds.say_and_die, there, timeout=T)
            except WorkerDied:
                there.close()
                assert heard(here) == "begun"
                with pytest.raises((EOFError, ConnectionResetError)):
                    heard(here)
            else:
                pytest.fail("it died")


@pytest.mark.parametrize("way", ["run", "submit"])
def test_a_call_that_had_not_begun_goes_to_another_worker_with_all_it_has(
    new_pool: NewPool, way: str
) -> None:
    with new_pool(1) as session:
        pid = session.run(os.getpid)
        here, there = multiprocessing.Pipe()
        with here, there:
            os.kill(pid, signal.SIGKILL)
            if way == "run":
                session.run(deeds.say, there, "text", timeout=T)
            else:
                session.submit(deeds.say, there, "text").result(T)
            text, other = heard(here)
            assert text == "text" and other != pid


# --- locks, queues, values --------------------------------------------------------------------


def test_queues(ask: Ask, named: Any) -> None:
    queue = named.Queue()
    ask(deeds.put, queue, "item")
    assert queue.get(timeout=T) == "item"
    queue.close()
    queue.join_thread()
    simple = named.SimpleQueue()
    ask(deeds.put, simple, "item")
    assert simple.get() == "item"
    simple.close()


def test_a_joinable_queue(session: Session, named: Any) -> None:
    queue = named.JoinableQueue()
    queue.put("item")
    assert session.run(deeds.serve, queue, timeout=T) == "item"
    queue.join()
    queue.close()
    queue.join_thread()


def test_what_is_synchronized(session: Session, named: Any) -> None:
    for lock in named.Lock(), named.RLock(), named.Semaphore(), named.BoundedSemaphore():
        assert session.run(deeds.use, lock, timeout=T)
        with lock:
            assert session.run(deeds.is_taken, lock, timeout=T)
    event = named.Event()
    session.run(deeds.set_event, event, timeout=T)
    assert event.wait(T)
    condition = named.Condition()
    with condition:
        done = session.submit(deeds.notify, condition)
        assert condition.wait(T)
    done.result(T)
    barrier = named.Barrier(2)
    waiting = session.submit(deeds.wait_at, barrier, T)
    assert {barrier.wait(T), waiting.result(T)} == {0, 1}


def test_values_and_arrays(session: Session, named: Any) -> None:
    value, array = named.Value("i", 1), named.Array("d", 4)
    raw, raw_array = named.RawValue("i", 1), named.RawArray("d", 4)
    session.run(deeds.add_one, value, timeout=T)
    session.submit(deeds.set_first, array, 2.5).result(T)
    session.run(deeds.set_raw, raw, 7, timeout=T)
    next(session.map(deeds.set_first, [raw_array], [3.5]))
    assert (value.value, array[0], raw.value, raw_array[0]) == (2, 2.5, 7, 3.5)
    # The same type outside shared memory is a value as any other.
    assert session.run(deeds.same, ctypes.c_int(5), 5, timeout=T) is False


def test_an_argument_that_only_the_job_keeps(session: Session, named: Any) -> None:
    """A lock's name goes with it, and a value's memory is given to the next one."""
    jobs = [session.submit(deeds.use, named.Lock()) for _ in range(20)]
    assert all(job.result(T) for job in jobs)


def test_a_lock_without_a_name_is_refused(ask: Ask) -> None:
    forked = multiprocessing.get_context("fork")
    for thing in forked.Lock(), forked.Queue(), forked.Event(), forked.Value("i"):
        with pytest.raises(SerializationError, match=r'get_context\("spawn"\)'):
            ask(deeds.same, thing, 1)
    assert ask(max, 2, 3) == 3


def test_what_lives_in_the_worker_is_refused_as_a_result(session: Session) -> None:
    for make in deeds.new_lock, deeds.new_value:
        with pytest.raises(SerializationError, match="lives in the process that made it"):
            session.run(make, timeout=T)


def test_initargs_and_factories(new_pool: NewPool, named: Any, start_method: str) -> None:
    """Also those of the workers that replace others."""
    # Not a Queue: its thread may hold the lock between processes when its worker dies.
    queue = named.SimpleQueue()
    initargs = (queue,)
    with Executor(1, initializer=deeds.hold, initargs=initargs, start_method=start_method) as own:
        for number in range(3):
            own.submit(deeds.put_held, number).result(T)
            assert queue.get() == number
            with pytest.raises(WorkerDied):
                own.submit(os._exit, 1).result(T)
    with new_pool(1, factory=partial(deeds.Box, named.Lock())) as session:
        with session.checkout(T) as lease:
            assert lease.call(lambda box: deeds.use(box.queue), timeout=T)
    queue.close()


def test_initargs_without_a_name_are_refused(start_method: str) -> None:
    lock = multiprocessing.get_context("fork").Lock()
    with pytest.raises(SerializationError, match=r'get_context\("spawn"\)'):
        Executor(1, initializer=deeds.hold, initargs=(lock,), start_method=start_method)


# --- shared memory ----------------------------------------------------------------------------

SHARED = """
import sys
from multiprocessing import shared_memory
import shared_deeds as deeds
from whitepool_mp import Pool

memory = shared_memory.SharedMemory(create=True, size=64)
items = shared_memory.ShareableList([1, 2])
for _ in range(2):
    with Pool(1, start_method=sys.argv[1]) as session:
        session.run(deeds.write_shared, memory, b"text")
        session.run(deeds.write_list, items, 7)
        session.submit(deeds.write_list, items, 8).result()
assert bytes(memory.buf[:4]) == b"text" and list(items) == [8, 2]
again = shared_memory.SharedMemory(memory.name)
again.close()
memory.close()
memory.unlink()
items.shm.close()
items.shm.unlink()
"""


def test_shared_memory_outlives_the_workers_that_used_it(start_method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARED, start_method],
        env={**os.environ, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        timeout=T,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- registered reducers ----------------------------------------------------------------------


def test_a_registered_reducer_is_used(ask: Ask) -> None:
    reducers = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    ForkingPickler.register(deeds.Marked, lambda marked: (deeds.unmark, (marked.text,)))
    try:
        assert ask(lambda marked, _: deeds.was_reduced(marked), deeds.Marked("a"), 0) == ("a", True)
    finally:
        del reducers[deeds.Marked]
    assert ask(lambda marked, _: deeds.was_reduced(marked), deeds.Marked("a"), 0) == ("a", False)


def test_a_proxy_of_a_manager(session: Session) -> None:
    with multiprocessing.get_context("spawn").Manager() as manager:
        queue = manager.Queue()
        session.run(deeds.put, queue, "item", timeout=T)
        assert queue.get(timeout=T) == "item"


def test_a_pool_of_another_process_is_sent_connections() -> None:
    """The session that a worker unpickles is a client like any other."""
    with Pool(1) as outer, Pool(1) as inner:
        here, there = multiprocessing.Pipe()
        with here, there:

            def pass_on(session: Session, connection: Any) -> None:
                session.run(deeds.say, connection, "text")

            outer.run(pass_on, inner, there, timeout=T)
            assert heard(here)[0] == "text"
            until(lambda: outer.run(max, 2, 3) == 3)
