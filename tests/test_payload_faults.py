"""What travels badly, and what is large or of an odd shape: it costs its own call, if that.

Each time another worker is in a call, which must end unharmed; the worker that is used is the same
from first to last.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deeds
import numpy as np
import pytest
from support import sibling

from whitepool_mp import Pool, RemoteError, RemoteTraceback, SerializationError

T = 60.0
"""Seconds that nothing here should need: a deadline against hanging."""

Ask = Callable[..., Any]


@pytest.fixture
def asks(start_method: str, tmp_path: Path) -> Iterator[dict[str, Ask]]:
    """Every way of calling a worker, the same one each time."""
    with Pool(3, start_method=start_method) as session, sibling(session, tmp_path):
        with session.checkout(T) as lease:
            pids = lease.pid, session.run(os.getpid, timeout=T)
            ways: dict[str, Ask] = {
                "call": lambda fn, *args: lease.call(fn, *args, timeout=T),
                "run": lambda fn, *args: session.run(fn, *args, timeout=T),
                "submit": lambda fn, *args: session.submit(fn, *args).result(T),
                "map": lambda fn, *args: next(session.map(fn, *([arg] for arg in args or [None]))),
            }
            yield ways
            ways.clear()  # pytest still has it when what is left behind is looked for
            assert lease.valid
            assert pids == (lease.call(os.getpid, timeout=T), session.run(os.getpid, timeout=T))
        counters = session.status().counters
        assert (counters["killed"], counters["crashes"]) == (0, 0)


# --- what cannot be pickled, or unpickled -----------------------------------------------------


def lock(_: object = None) -> Any:
    return threading.Lock()


def throw_unpicklable(_: object = None) -> None:
    raise deeds.Unpicklable("locked")


def throw_spiteful(_: object = None) -> None:
    raise deeds.Spiteful("bad")


for each in (lock, throw_unpicklable, throw_spiteful):
    each.__module__ = "__main__"  # by value: workers need not import this file


def test_what_cannot_be_pickled_fails_that_one_call(asks: dict[str, Ask]) -> None:
    """As argument, result, exception."""
    for ask in asks.values():
        with pytest.raises(SerializationError, match=r"deeds\.echo .*lock"):
            ask(deeds.echo, threading.Lock())
        with pytest.raises(SerializationError, match=r"result of lock.* cannot be pickled"):
            ask(lock)
        with pytest.raises(RemoteError, match="Unpicklable: locked"):
            ask(throw_unpicklable)
        assert ask(deeds.add, 1, 2) == 3


def test_what_raises_while_it_is_unpickled_fails_that_one_call(asks: dict[str, Ask]) -> None:
    """As argument, result, exception."""
    for ask in asks.values():
        with pytest.raises(SerializationError, match=r"unpickled in the worker: ValueError"):
            ask(deeds.echo, deeds.OnUnpickling(deeds.broken))
        with pytest.raises(SerializationError, match=r"unpickled here: ValueError"):
            ask(deeds.on_unpickling, deeds.broken)
        with pytest.raises(deeds.Spiteful, match="bad"):
            ask(throw_spiteful)
        assert ask(deeds.add, 1, 2) == 3


def test_an_exception_beside_Exception_fails_that_one_call(asks: dict[str, Ask]) -> None:
    for kind in (deeds.Base, SystemExit, KeyboardInterrupt, GeneratorExit, BaseException):
        for ask in asks.values():
            with pytest.raises(BaseException) as caught:
                ask(deeds.throw, kind, 5)
            assert (type(caught.value), caught.value.args) == (kind, (5,))
            assert isinstance(caught.value.__cause__, RemoteTraceback)
            assert ask(deeds.add, 1, 2) == 3


def test_an_exception_with_a_required_argument_fails_that_one_call(asks: dict[str, Ask]) -> None:
    def needy(_: object = None) -> None:
        raise deeds.NeedsArguments(7, detail="low")

    for ask in asks.values():
        with pytest.raises(deeds.NeedsArguments, match="code 7: low"):
            ask(needy)
        assert ask(deeds.add, 1, 2) == 3


def test_a_generator_function_can_be_called_and_its_generator_cannot_travel(
    asks: dict[str, Ask],
) -> None:
    def count(n: int) -> Iterator[int]:
        yield from range(n)

    def total(function: Callable[[int], Iterator[int]]) -> int:
        return sum(function(4))

    for ask in asks.values():
        with pytest.raises(SerializationError, match="generator"):
            ask(count, 3)
        with pytest.raises(SerializationError, match="generator"):
            ask(deeds.echo, count(3))
        assert ask(total, count) == 6
        assert list(ask(deeds.echo, count)(3)) == [0, 1, 2]


# --- sizes and shapes -------------------------------------------------------------------------


def test_bytes_of_none_and_of_64_mib_come_back_as_they_were(asks: dict[str, Ask]) -> None:
    for size in (0, 1, 1 << 20, 64 << 20):
        content = (b"0123456789abcdef" * (size // 16 + 1))[:size]
        ways = asks if size <= 1 << 20 else {"run": asks["run"]}
        for kind in (bytes, bytearray, memoryview):
            for ask in ways.values():
                assert bytes(ask(deeds.echo, kind(content))) == content


def test_arrays_of_odd_shapes_come_back_as_they_were(asks: dict[str, Ask]) -> None:
    big = np.arange(1 << 18, dtype=np.float64).reshape(512, 512)
    frozen = big.copy()
    frozen.flags.writeable = False
    values = [
        np.empty(0),
        np.array(1.5),
        big,
        frozen,
        big[::2, ::-3],
        big.T,
        np.broadcast_to(big[0], (40, 512)),
        np.array([{"a": 1}, None], dtype=object),
    ]
    for ask in asks.values():
        for value in values:
            back = ask(deeds.echo, value)
            assert (back.dtype, back.shape) == (value.dtype, value.shape)
            assert np.array_equal(back, value)
        view = memoryview(bytes(big.data))
        assert ask(deeds.echo, view[::2]) == bytes(view[::2])  # not contiguous
        assert ask(deeds.echo, memoryview(bytearray(big.data)).toreadonly()) == bytes(big.data)


def test_objects_that_contain_themselves_keep_their_shape(asks: dict[str, Ask]) -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    cycle: dict[str, Any] = {"list": loop}
    cycle["self"] = cycle
    for ask in asks.values():
        back = ask(deeds.echo, loop)
        assert back[1] is back and back[0] == 1
        back = ask(deeds.echo, cycle)
        assert back["self"] is back and back["list"][1] is back["list"]
        node = ask(deeds.echo, deeds.Node("a"))
        assert node.next is node and node.name == "a"
        with pytest.raises(SerializationError, match="Recursion"):
            ask(deeds.echo, deeds.nest(100_000))
        with pytest.raises(SerializationError, match="Recursion"):
            ask(deeds.nest, 100_000)
        assert ask(deeds.echo, deeds.nest(50)) == deeds.nest(50)


HUGE = (4 << 30) + 4096
"""Bytes: more than fits 32 bits."""
MARKS = (0, (4 << 30) - 1, 4 << 30, HUGE - 1)
LONG = 300.0
"""Seconds: a machine's first use of so much memory may take it a minute."""


def available() -> int:
    """Bytes of memory that could be had now."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":") for line in file)
    return int(fields["MemAvailable"].split()[0]) << 10


def huge() -> bytearray:
    """Zeros, and a mark at each end and on both sides of 4 GiB."""
    value = bytearray(HUGE)
    for place in MARKS:
        value[place] = place % 251 + 1
    return value


def marks(value: Any) -> tuple[int, list[int]]:
    """Its length, and what is at the marks."""
    return len(value), [value[place] for place in MARKS]


for each in (huge, marks):
    each.__module__ = "__main__"


def outcome(attempt: Callable[[], Any]) -> Any:
    """What it returns, or what it raises in words: pytest would print every argument on the way."""
    try:
        return attempt()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
@pytest.mark.hang(4 * LONG)
def test_more_than_4_gib_go_both_ways(start_method: str, tmp_path: Path) -> None:
    """Beside the pickle (bytes), and in it (a bytearray)."""
    needed = 3 * HUGE
    if available() < needed:
        pytest.skip(f"needs {needed >> 30} GiB of memory, and there are {available() >> 30}")
    expected = HUGE, [place % 251 + 1 for place in MARKS]
    with Pool(2, start_method=start_method) as session, sibling(session, tmp_path):
        pid = session.run(os.getpid, timeout=T)
        run = functools.partial(session.run, timeout=LONG)
        assert outcome(lambda: run(len, bytes(HUGE))) == HUGE
        assert outcome(lambda: len(run(bytes, HUGE))) == HUGE
        assert outcome(lambda: run(marks, huge())) == expected
        assert outcome(lambda: marks(run(huge))) == expected
        assert session.run(os.getpid, timeout=T) == pid
