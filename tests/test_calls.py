"""What goes into a worker and what comes out: arguments, results, exceptions, time, proxies."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from typing import Any

import deeds
import numpy as np
import psutil
import pytest
from support import until, whole

from whitepool_mp import (
    CallTimeout,
    CheckoutTimeout,
    LeaseError,
    Pool,
    RemoteError,
    RemoteTraceback,
    SerializationError,
    Session,
    WhitepoolError,
    current_worker,
)

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""


def unharmed(session: Session, pid: int) -> None:
    """The pool's only worker is free and is still the same."""
    whole(session)
    assert session.run(os.getpid, timeout=T) == pid
    counters = session.status().counters
    assert (counters["crashes"], counters["killed"]) == (0, 0)


# --- functions --------------------------------------------------------------------------------


def test_any_function_can_be_called(start_method: str) -> None:
    base = 10

    def closure(x: int) -> int:
        return base + x

    class Local:
        def __call__(self, x: int) -> int:
            return base * x

        def method(self, x: int) -> int:
            return base - x

    with Pool(pool_size=1, start_method=start_method) as session, session.checkout(T) as lease:
        for call in (session_runner(lease.call), lease.call):
            assert call(deeds.add, 1, 2, z=3, timeout=T) == 6
            assert call(lambda x, y=1: x + y, 1, timeout=T) == 2
            assert call(closure, 1, timeout=T) == 11
            assert call(functools.partial(deeds.add, 1, z=5), 2, timeout=T) == 8
            assert call("a-b".split, "-", timeout=T) == ["a", "b"]
            assert call(len, "four", timeout=T) == 4
            assert call(Local(), 3, timeout=T) == 30
            assert call(Local().method, 3, timeout=T) == 7
            assert call(complex, 1, 2, timeout=T) == 1 + 2j
            assert call(deeds.named, fn=1, self=2, what=3, timeout=T) == {
                "fn": 1,
                "self": 2,
                "what": 3,
            }


def session_runner(call: Any) -> Any:
    """The same call with everything bound beforehand: a partial is as good as its function."""

    def run(fn: Any, /, *args: Any, timeout: float, **kwargs: Any) -> Any:
        return call(functools.partial(fn, *args, **kwargs), timeout=timeout)

    return run


def test_run_takes_what_call_takes() -> None:
    with Pool(pool_size=1) as session:
        assert session.run(deeds.add, 1, 2, z=3, timeout=T) == 6
        assert session.run(lambda: os.getpid(), timeout=T) != os.getpid()
        assert session.run(deeds.named, fn=1, self=2, timeout=T) == {"fn": 1, "self": 2}
        timed = functools.partial(deeds.named, timeout=1, with_resource=2)
        assert session.run(timed, timeout=T) == {"timeout": 1, "with_resource": 2}


def test_with_resource_passes_the_resource_first(start_method: str) -> None:
    with Pool(1, factory=functools.partial(deeds.Counter, 5), start_method=start_method) as session:
        assert session.run(deeds.Counter.add, 1, with_resource=True, timeout=T) == 6
        assert session.run(deeds.add, 1, timeout=T) == 1
        with session.checkout(T) as lease:
            assert lease.call(lambda counter, n: counter.add(n), 2, timeout=T) == 8
    with Pool(pool_size=1, start_method=start_method, name="bare") as session:
        with pytest.raises(ValueError, match="'bare' has no factory"):
            session.run(deeds.add, 1, with_resource=True, timeout=T)
        with pytest.raises(ValueError, match="'bare' has no factory"):
            session.submit(deeds.add, 1, with_resource=True)


SCRIPT = """
    import sys
    from dataclasses import dataclass
    from whitepool_mp import Pool, RemoteTraceback

    OFFSET = 100

    @dataclass
    class Point:
        x: int
        def moved(self, by):
            return Point(self.x + by + OFFSET)

    class Trouble(Exception):
        pass

    def move(point, by):
        return point.moved(by)

    def trouble(text):
        raise Trouble(text)

    def make():
        return Point(7)

    with Pool(1, factory=make, start_method=sys.argv[1]) as session:
        result = session.run(move, Point(1), 2, timeout=20)
        assert type(result) is Point and result == Point(103), result
        assert session.run(lambda p: p.x, with_resource=True, timeout=20) == 7
        try:
            session.run(trouble, "a word", timeout=20)
        except Trouble as error:
            assert error.args == ("a word",)
            assert isinstance(error.__cause__, RemoteTraceback)
        else:
            raise AssertionError
        assert session.submit(move, Point(2), 2).result(20) == Point(104)
        assert list(session.map(move, [Point(1), Point(2)], [1, 1])) == [Point(102), Point(103)]
        with session.checkout(20) as lease:
            assert lease.get().moved(1) == Point(108)
    print("no guard was needed")
"""


def test_functions_and_classes_of_a_script_work_without_a_main_guard(
    start_method: str, tmp_path: Any
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(script), start_method],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "no guard was needed\n", "")


# --- exceptions -------------------------------------------------------------------------------


def test_an_exception_arrives_in_its_own_type_with_the_remote_traceback_as_cause(
    start_method: str,
) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        with pytest.raises(deeds.Plain) as caught:
            session.run(deeds.throw, deeds.Plain, "a word", 7, timeout=T)
        assert caught.value.args == ("a word", 7)
        cause = caught.value.__cause__
        assert isinstance(cause, RemoteTraceback)
        assert "in throw" in str(cause) and "deeds.py" in str(cause)
        assert "worker/calls.py" not in str(cause)
        with pytest.raises(deeds.Plain) as caught:
            session.run(deeds.throw_with_field, timeout=T)
        assert caught.value.code == 42  # type: ignore[attr-defined]
        with pytest.raises(deeds.Plain) as caught:
            session.run(deeds.throw_from, timeout=T)
        assert "KeyError: 'the first'" in str(caught.value.__cause__)
        with pytest.raises(RecursionError):
            session.run(deeds.recurse, timeout=T)
        with pytest.raises(ZeroDivisionError):
            session.submit(lambda: 1 // 0, timeout=T).result(T)
        unharmed(session, pid)


@pytest.mark.parametrize(
    "kind", [deeds.Base, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration]
)
def test_every_kind_of_exception_comes_back_and_harms_no_worker(
    start_method: str, kind: type[BaseException], capfd: Any
) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        with pytest.raises(kind) as caught:
            session.run(deeds.throw, kind, 5, timeout=T)
        assert type(caught.value) is kind
        assert caught.value.args == (5,)
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        unharmed(session, pid)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "message"),
    [
        (deeds.NeedsArguments, (7,), {"detail": "low"}, "code 7: low"),
        (deeds.Changeling, ("swapped",), {}, "swapped"),
        (deeds.Spiteful, ("bad",), {}, "bad"),
    ],
)
def test_an_exception_whose_own_pickling_fails_still_arrives_as_its_own_type(
    start_method: str, kind: Any, args: Any, kwargs: Any, message: str
) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        with pytest.raises(kind, match=message) as caught:
            session.run(deeds.throw, kind, *args, timeout=T, **kwargs)
        assert type(caught.value) is kind
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        unharmed(session, pid)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "name", "message"),
    [
        (deeds.Unpicklable, ("locked",), {}, "Unpicklable", "locked"),
    ],
)
def test_an_exception_that_cannot_travel_arrives_as_a_remote_error_that_names_it(
    start_method: str, kind: Any, args: Any, kwargs: Any, name: str, message: str
) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        with pytest.raises(RemoteError, match=f"{name}: {message}") as caught:
            session.run(deeds.throw, kind, *args, timeout=T, **kwargs)
        assert caught.value.type_name == f"deeds.{name}"
        assert caught.value.message == message
        assert "in throw" in caught.value.remote_traceback
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        unharmed(session, pid)


def test_an_exception_without_words_still_arrives(start_method: str) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        with pytest.raises(deeds.Speechless):
            session.run(deeds.throw, deeds.Speechless, timeout=T)
        unharmed(session, pid)


# --- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["run", "call", "submit"])
def test_a_call_over_its_timeout_has_its_worker_killed_and_replaced(
    start_method: str, how: str, tmp_path: Any
) -> None:
    path = str(tmp_path / "pids")
    with Pool(pool_size=1, start_method=start_method) as session:
        whole(session)
        pid = session.run(os.getpid, timeout=T)
        began = time.monotonic()
        with pytest.raises(CallTimeout, match=rf"wait_in took longer than 0\.2 s.*pid {pid}"):
            if how == "run":
                session.run(deeds.wait_in, path, timeout=0.2)
            elif how == "submit":
                session.submit(deeds.wait_in, path, timeout=0.2).result(T)
            else:
                with session.checkout(T) as lease:
                    try:
                        lease.call(deeds.wait_in, path, timeout=0.2)
                    finally:
                        assert not lease.valid
                        with pytest.raises(LeaseError, match="ended by a timeout"):
                            lease.call(abs, -1, timeout=T)
        assert 0.2 <= time.monotonic() - began < 5
        until(lambda: not psutil.pid_exists(pid))
        whole(session)
        assert session.run(os.getpid, timeout=T) != pid
        assert issubclass(CallTimeout, TimeoutError)


def test_the_timeout_of_run_includes_the_wait_for_a_worker() -> None:
    with Pool(pool_size=1) as session, session.checkout(T) as lease:
        with pytest.raises(CheckoutTimeout, match=r"within 0\.\d+ s.*leased=1"):
            session.run(abs, -1, timeout=0.1)
        assert lease.call(abs, -1, timeout=T) == 1


def test_a_call_with_no_time_at_all_is_late() -> None:
    with Pool(pool_size=1) as session:
        with session.checkout(T) as lease, pytest.raises(CallTimeout):
            lease.call(deeds.hang, timeout=0)
        whole(session)


# --- payloads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_of_every_size_come_back_as_they_were(kind: type) -> None:
    with Pool(pool_size=1) as session:
        pid = session.run(os.getpid, timeout=T)
        for size in (0, 1, 16_383, 16_384, 65_511, 65_512, 65_536, 1 << 20, 64 << 20):
            value = kind(os.urandom(min(size, 4096)) * (size // 4096 + 1))[:size]
            back = session.run(deeds.echo, value, timeout=T)
            assert type(back) is kind
            assert back == value
        unharmed(session, pid)


def test_a_memoryview_arrives_as_the_bytes_that_it_shows() -> None:
    with Pool(pool_size=1) as session:
        for size in (0, 10, 1 << 20):
            shown = memoryview(bytes(range(256)) * (size // 256 + 1))[:size]
            assert session.run(deeds.echo, shown, timeout=T) == bytes(shown)
            assert session.run(deeds.echo, shown[::2], timeout=T) == bytes(shown[::2])


def _arrays() -> dict[str, np.ndarray[Any, Any]]:
    big = np.arange(1 << 20, dtype=np.float64).reshape(1024, 1024)
    frozen = big.copy()
    frozen.flags.writeable = False
    return {
        "large": np.ones(8 << 20),
        "square": big,
        "read-only": frozen,
        "every other": big[::2, ::2],
        "reversed": big[::-1],
        "transposed": big.T,
        "fortran": np.asfortranarray(big),
        "empty": np.empty((0, 3)),
        "scalar": np.array(3.5),
        "records": np.zeros(50_000, dtype=[("a", "i4"), ("b", "f8")]),
        "objects": np.array([{"a": 1}, None, "text"], dtype=object),
        "small": np.arange(3),
    }


def test_arrays_of_every_kind_come_back_equal_and_writable() -> None:
    with Pool(pool_size=1) as session:
        for name, value in _arrays().items():
            back = session.run(deeds.echo, value, timeout=T)
            assert back.dtype == value.dtype, name
            assert back.shape == value.shape, name
            assert np.array_equal(back, value), name
            made = session.run(np.zeros, 100_000, timeout=T)
            made[0] = 1
            assert made.sum() == 1
        square = session.run(deeds.echo, _arrays()["square"], timeout=T)
        square[0, 0] = 5
        assert square[0, 0] == 5


def test_an_array_in_a_call_can_be_changed_there_and_stays_as_it_was_here() -> None:
    with Pool(pool_size=1) as session:
        value = np.zeros(100_000)

        def change(array: Any) -> float:
            array += 1
            return float(array.sum())

        assert session.run(change, value, timeout=T) == 100_000
        assert value.sum() == 0


def test_thousands_of_buffers_travel_in_one_call() -> None:
    with Pool(pool_size=1) as session:
        value = [np.full(2048, number, dtype=np.int64) for number in range(2000)]
        back = session.run(deeds.echo, value, timeout=T)
        assert [array[-1] for array in back] == list(range(2000))


def test_results_stay_valid_when_others_follow() -> None:
    """Nothing that was returned lies in memory that the next answer is read into."""
    with Pool(pool_size=1) as session, session.checkout(T) as lease:
        kept = [lease.call(np.full, 100, number, timeout=T) for number in range(50)]
        kept += [lease.call(np.full, 50_000, number, timeout=T) for number in range(50, 60)]
        assert [array[0] for array in kept] == list(range(60))


def test_large_values_stay_valid_in_whatever_form_they_are_kept(start_method: str) -> None:
    """Memory is used again for what comes later: never as long as anything refers to it."""
    forms: list[Callable[[Any], Any]] = [
        lambda array: array,
        lambda array: array[1000:1001],
        lambda array: array.base,
        lambda array: memoryview(array.base).obj,
        memoryview,
    ]
    with Pool(pool_size=1, start_method=start_method) as session:
        held: list[tuple[Any, int]] = []

        def hold(array: Any, number: int) -> None:
            held.append((forms[number % len(forms)](array), number))
            del array, held[:-7]
            for form, kept in held:
                assert np.frombuffer(form, np.uint8)[:1000].tolist() in ([kept] * 1000, [kept])

        for number in range(30):
            hold(session.run(np.full, 400_000, number, np.uint8, timeout=T), number)
        futures = [session.submit(np.full, 400_000, i, np.uint8) for i in range(30, 60)]
        for number, future in enumerate(futures, 30):
            hold(future.result(T), number)
        futures.clear()
        full = functools.partial(np.full, 400_000, dtype=np.uint8)
        for number, array in enumerate(session.map(full, range(60, 90)), 60):
            hold(array, number)
        assert session.run(deeds.remember, np.full(400_000, 0, np.uint8), timeout=T) == [0]
        for number in range(1, 30):
            array = np.full(400_000, number, np.uint8)
            seen = session.run(deeds.remember, array, timeout=T)
            assert seen == list(range(max(0, number - 4), number + 1))


def test_objects_that_refer_to_themselves_keep_their_shape() -> None:
    with Pool(pool_size=1) as session:
        loop: list[Any] = [1]
        loop.append(loop)
        back = session.run(deeds.echo, loop, timeout=T)
        assert back[1] is back
        cycle: dict[str, Any] = {"list": loop}
        cycle["self"] = cycle
        back = session.run(deeds.echo, cycle, timeout=T)
        assert back["self"] is back and back["list"][1] is back["list"]
        node = session.run(deeds.echo, deeds.Node("a"), timeout=T)
        assert node.next is node
        shared = [1]
        back = session.run(deeds.echo, [shared, shared], timeout=T)
        assert back[0] is back[1]


# --- what cannot be pickled -------------------------------------------------------------------


def test_an_argument_that_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()
    with Pool(pool_size=1) as session:
        pid = session.run(os.getpid, timeout=T)
        for ask in (session.run, session.submit):
            with pytest.raises(SerializationError, match=r"argument 1 of deeds\.add .*lock"):
                ask(deeds.add, 1, lock, timeout=T)
            with pytest.raises(SerializationError, match=r"argument 'z' of deeds\.add .*lock"):
                ask(deeds.add, 1, z=lock, timeout=T)
            with pytest.raises(SerializationError, match=r"the function .*closed cannot be"):
                ask(_holding(lock), timeout=T)
        with session.checkout(T) as lease:
            with pytest.raises(SerializationError, match=r"argument 0 of deeds\.echo"):
                lease.call(deeds.echo, lock, timeout=T)
            assert lease.valid
            assert lease.call(os.getpid, timeout=T) == pid
        assert session.status().counters["granted"] == 2
        unharmed(session, pid)


def _holding(lock: Any) -> Any:
    def closed() -> Any:
        return lock

    return closed


def test_an_argument_nested_too_deeply_is_named() -> None:
    with Pool(pool_size=1) as session:
        with pytest.raises(SerializationError, match=r"argument 0 of deeds\.echo .*Recursion"):
            session.run(deeds.echo, deeds.nest(100_000), timeout=T)
        assert session.run(abs, -1, timeout=T) == 1


def test_an_argument_that_interrupts_its_pickling_takes_no_worker() -> None:
    with Pool(pool_size=1) as session:
        with pytest.raises(KeyboardInterrupt, match="while pickling"):
            session.run(deeds.echo, deeds.OnPickling(deeds.pickle_badly), timeout=T)
        with session.checkout(T) as lease:
            with pytest.raises(KeyboardInterrupt, match="while pickling"):
                lease.call(deeds.echo, deeds.OnPickling(deeds.pickle_badly), timeout=T)
            assert lease.call(abs, -1, timeout=T) == 1


@pytest.mark.parametrize(
    ("function", "args", "says"),
    [
        (threading.Lock, (), r"result of .*lock.*cannot be pickled: TypeError"),
        (deeds.nest, (100_000,), r"result of deeds\.nest.*RecursionError"),
        (deeds.on_pickling, (deeds.broken,), r"on_pickling.*ValueError: broken"),
        (deeds.on_pickling, (deeds.pickle_badly,), r"on_pickling.*KeyboardInterrupt"),
        (deeds.on_unpickling, (deeds.broken,), r"on_unpickling could not be unpickled here.*Val"),
        (iter, ([1],), None),
    ],
)
def test_a_result_that_cannot_travel_fails_that_one_call(
    start_method: str, function: Any, args: Any, says: str | None
) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        with session.checkout(T) as lease:
            pid = lease.call(os.getpid, timeout=T)
            if says is None:
                assert list(lease.call(function, *args, timeout=T)) == [1]
            else:
                with pytest.raises(SerializationError, match=says) as caught:
                    lease.call(function, *args, timeout=T)
                assert caught.value.__cause__ is not None
            assert lease.valid
            assert lease.call(os.getpid, timeout=T) == pid
        if says is not None:
            with pytest.raises(SerializationError, match=says):
                session.submit(function, *args, timeout=T).result(T)
        unharmed(session, pid)


def test_a_generator_cannot_come_back() -> None:
    with Pool(pool_size=1) as session:
        with pytest.raises(SerializationError, match="generator"):
            session.run(lambda: (x for x in range(3)), timeout=T)
        assert session.run(lambda: list(range(3)), timeout=T) == [0, 1, 2]


@pytest.mark.parametrize("deed", [deeds.broken, deeds.ask_to_exit, deeds.pickle_badly])
def test_an_argument_that_raises_on_unpickling_fails_that_one_call(
    start_method: str, deed: Any
) -> None:
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        with pytest.raises(SerializationError, match=r"unpickled in the worker: \w+: ") as caught:
            session.run(deeds.echo, deeds.OnUnpickling(deed), timeout=T)
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert deed.__name__ in str(caught.value.__cause__)
        unharmed(session, pid)


class SpeechlessError(Exception):
    def __str__(self) -> str:
        sys.exit(3)


class Speechless:
    """It cannot be pickled, and whoever shows it exits."""

    def __reduce__(self) -> Any:
        raise SpeechlessError

    def __repr__(self) -> str:
        sys.exit(4)


def make_speechless() -> Speechless:
    return Speechless()


def raise_speechless() -> None:
    raise SpeechlessError


class SpeechlessWhenLoaded:
    def __reduce__(self) -> Any:
        return raise_speechless, ()


for each in (SpeechlessError, Speechless, make_speechless, raise_speechless, SpeechlessWhenLoaded):
    each.__module__ = "__main__"  # by value, as above


@pytest.mark.parametrize("way", ["run", "submit", "call"])
def test_what_exits_when_it_is_shown_ends_neither_worker_nor_caller(
    start_method: str, way: str
) -> None:
    mute = r"<Speechless whose repr raised SystemExit>"
    silent = r"SpeechlessError: <its str\(\) raised SystemExit>"
    deeds_and_words: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (raise_speechless, (), Exception, ""),
        (make_speechless, (), SerializationError, f"result of .*{mute}.* pickled: {silent}"),
        (len, (Speechless(),), SerializationError, f"0 of len .{mute}.* pickled: {silent}"),
        (len, (SpeechlessWhenLoaded(),), SerializationError, f"in the worker: {silent}"),
        (SpeechlessWhenLoaded, (), SerializationError, f"unpickled here: {silent}"),
    ]
    with Pool(pool_size=1, start_method=start_method) as session:
        pid = session.run(os.getpid, timeout=T)
        for function, args, kind, words in deeds_and_words:
            with pytest.raises(kind) as caught:
                if way == "run":
                    session.run(function, *args, timeout=T)
                elif way == "submit":
                    session.submit(function, *args, timeout=T).result(T)
                else:
                    with session.checkout(T) as lease:
                        lease.call(function, *args, timeout=T)
            if words:
                assert re.search(words, str(caught.value))
            else:
                assert type(caught.value).__name__ == "SpeechlessError"
        unharmed(session, pid)


# --- proxies ----------------------------------------------------------------------------------


def database() -> Any:
    import sqlite3

    return sqlite3.connect(":memory:")


database.__module__ = "__main__"  # by value: workers need not import this file


def test_a_proxy_runs_methods_in_the_worker_and_leaves_cursors_there(start_method: str) -> None:
    with Pool(1, factory=database, start_method=start_method) as session:
        with session.checkout(T) as lease:
            db = lease.get()
            db.execute("CREATE TABLE t (x)")
            db.executemany("INSERT INTO t VALUES (?)", [(x,) for x in range(5)])
            cursor = db.execute("SELECT x FROM t ORDER BY x")
            assert "Cursor" in repr(cursor)
            assert cursor.fetchone() == (0,)
            assert cursor.fetchmany(2) == [(1,), (2,)]
            assert db.execute("SELECT count(*) FROM t").fetchone() == (5,)
            assert cursor.fetchall() == [(3,), (4,)]
            assert db.commit() is None
            assert lease.call(lambda db: db.total_changes, timeout=T) == 5
            import sqlite3

            with pytest.raises(sqlite3.OperationalError, match="no such table") as caught:
                db.execute("SELECT * FROM nowhere")
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            with pytest.raises(AttributeError, match="no_such_method"):
                db.no_such_method()
        with pytest.raises(LeaseError):
            cursor.fetchone()
        with session.checkout(T) as lease:
            assert lease.get().execute("SELECT count(*) FROM t").fetchone() == (5,)


def test_what_stayed_in_the_worker_is_released_at_the_end_of_the_lease(start_method: str) -> None:
    with Pool(1, factory=deeds.Counter, start_method=start_method) as session:
        with session.checkout(T) as lease:
            things = [lease.get().make() for _ in range(3)]
            assert [thing.hello() for thing in things] == ["hello"] * 3
            assert lease.get().alive() == 3
        with session.checkout(T) as lease:
            assert lease.get().alive() == 0
            with pytest.raises(LeaseError):
                things[0].hello()


def test_a_method_that_returns_the_resource_gives_it_again() -> None:
    with Pool(1, factory=deeds.Counter) as session:
        with session.checkout(T) as lease:
            again = lease.get().myself().myself()
            assert again.add(2) == 2
            assert lease.get().add(1) == 3
            with pytest.raises(deeds.Plain, match="in a method"):
                again.fail()


def test_a_proxy_says_what_it_cannot_do() -> None:
    with Pool(1, factory=deeds.Counter) as session:
        with session.checkout(T) as lease:
            counter = lease.get()
            assert "Proxy of resource" in repr(counter)
            with pytest.raises(AttributeError, match=r"__enter__.*use lease\.call"):
                counter.__enter__  # noqa: B018
            with pytest.raises(TypeError):
                counter[0]
            with pytest.raises(SerializationError, match=r"argument 0 of .*cannot leave"):
                lease.call(deeds.echo, counter, timeout=T)
            with pytest.raises(SerializationError, match="arguments of method 'add'"):
                counter.add(threading.Lock())
            assert counter.add(1) == 1
    with Pool(pool_size=1, name="bare") as session:
        with session.checkout(T) as lease, pytest.raises(LeaseError, match="'bare' has no factory"):
            lease.get()


# --- the worker's side ------------------------------------------------------------------------


def test_current_worker_tells_slot_pid_and_pool(start_method: str) -> None:
    def who() -> tuple[int, int, str]:
        from whitepool_mp import current_worker

        me = current_worker()
        return me.slot, me.pid, me.pool

    who.__module__ = "__main__"
    with Pool(2, 1, factory=who, start_method=start_method, name="db") as session:
        leases = [session.checkout(T) for _ in range(3)]
        for lease in leases:
            assert lease.call(lambda built: built, timeout=T) == (lease.slot, lease.pid, "db")
            assert lease.call(lambda _: who(), timeout=T) == (lease.slot, lease.pid, "db")
            lease.checkin()
    with pytest.raises(WhitepoolError, match="outside a worker process"):
        current_worker()


def test_what_a_worker_prints_is_seen(start_method: str, capfd: Any) -> None:
    def factory() -> None:
        print("from the factory")

    def call() -> None:
        print("from a call")
        print("and its errors", file=sys.stderr)

    with Pool(1, factory=factory, start_method=start_method) as session:
        session.run(call, timeout=T)
        session.run(functools.partial(print, "without a newline", end=""), timeout=T)
    out, err = capfd.readouterr()
    assert out == "from the factory\nfrom a call\nwithout a newline"
    assert err == "and its errors\n"
