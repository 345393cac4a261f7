"""Objects to bytes and back: what travels, how, and what is said of that which does not."""

from __future__ import annotations

import dataclasses
import functools
import operator
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any, NoReturn
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whitepool_mp.errors import (
    SerializationError,
)
from whitepool_mp.wire import messages, payload

KIB = 1024


def double(x: int) -> int:
    return 2 * x


@dataclasses.dataclass
class Point:
    x: int
    y: int

    def norm(self) -> int:
        return self.x**2 + self.y**2


class Sulky:
    """It cannot be pickled, and says so in a way of its own."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("leave me where I am")


class Mute(Sulky):
    def __repr__(self) -> str:
        raise ValueError("no words")


class LoadBomb:
    """It pickles, but does not unpickle."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return int, ("not a number",)


def round_trip(value: Any) -> Any:
    """As through a channel, which makes bytes of what was bytes."""
    data, buffers = payload.dumps(value)
    raws = [each.raw() for each in buffers]
    received = [bytes(raw) if type(raw.obj) is bytes else bytearray(raw) for raw in raws]
    return payload.loads(data, buffers=received)


# --- dumps and loads --------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(VALUES)
def test_plain_values_come_back_equal(value: Any) -> None:
    assert round_trip(value) == value


def test_recursive_objects_come_back_recursive() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    back = round_trip(loop)
    assert back[1] is back
    first: dict[str, Any] = {}
    second = {"first": first}
    first["second"] = second
    back = round_trip(first)
    assert back["second"]["first"] is back


def test_buffers_of_16_kib_travel_beside_the_pickle_and_smaller_ones_inside() -> None:
    for size, beside in ((payload.OUT_OF_BAND - 1, 0), (payload.OUT_OF_BAND, 1)):
        data, buffers = payload.dumps(np.zeros(size, dtype=np.uint8))
        assert len(buffers) == beside
        assert (len(data) > size) is not bool(beside)


def test_an_array_beside_the_pickle_is_not_copied() -> None:
    array = np.arange(KIB * KIB)
    _, (buffer,) = payload.dumps(array)
    assert np.shares_memory(np.frombuffer(buffer.raw(), array.dtype), array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(10_000.0),
        np.arange(10_000).reshape(100, 100).T,
        np.arange(40_000)[::2],
        np.arange(40_000).reshape(200, 200)[:, ::3],
        np.array([], dtype=np.int8),
        np.array([("a", 1)] * 3000, dtype=[("name", "U8"), ("n", "i4")]),
    ],
    ids=["plain", "transposed", "strided", "columns", "empty", "records"],
)
def test_arrays_of_every_layout_come_back_equal(array: np.ndarray[Any, Any]) -> None:
    array.flags.writeable = False
    back = round_trip(array)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_of_every_size_come_back(kind: type[Any]) -> None:
    for size in (0, 1, payload.OUT_OF_BAND, payload.LARGE_BYTES, 300 * KIB):
        assert round_trip(kind(b"x" * size)) == kind(b"x" * size)
        assert type(round_trip(kind(size))) is kind


def test_large_bytes_travel_beside_the_pickle_and_are_not_copied() -> None:
    large, small = b"x" * payload.LARGE_BYTES, b"x" * (payload.LARGE_BYTES - 1)
    for dumped in (
        payload.dumps(large),
        payload.dump_arguments(len, (large, small), {}),
        payload.dump_arguments(len, (), {"one": small, "other": large}),
        payload.dump_job(len, (1, large), {})[:2],
        payload.dump_call(lambda text: text, (large,), {}),
    ):
        (buffer,) = dumped[1]
        assert buffer.raw().obj is large
    assert payload.dumps(small)[1] == payload.dumps([large])[1] == []


def test_no_more_buffers_travel_beside_a_pickle_than_a_message_holds() -> None:
    arrays = [bytearray(payload.OUT_OF_BAND)] + [
        pickle.PickleBuffer(bytearray(payload.OUT_OF_BAND)) for _ in range(messages.MAX_BUFFERS + 5)
    ]
    _, buffers = payload.dumps(arrays)
    assert len(buffers) == messages.MAX_BUFFERS


# --- what travels by value --------------------------------------------------------------------


def by_value(value: Any) -> bool:
    return b"cloudpickle" in payload.dumps_inside(value)


def test_a_function_of_an_importable_module_travels_by_name() -> None:
    assert not by_value(operator.add)
    assert round_trip(operator.add) is operator.add


def test_lambdas_closures_and_local_classes_travel_by_value() -> None:
    n = 3

    class Local:
        def three(self) -> int:
            return n

    assert by_value(lambda: n)
    assert round_trip(lambda x: x + n)(4) == 7
    assert round_trip(Local)().three() == 3
    assert round_trip(Local()).three() == 3


def test_partials_and_bound_methods_travel() -> None:
    assert round_trip(functools.partial(pow, 2))(5) == 32
    assert round_trip(Point(3, 4).norm)() == 25


def test_what_a_script_defines_travels_by_value() -> None:
    """The worker's `__main__` is another than the script's."""
    script = """
        import pickle, sys
        from whitepool_mp.wire import payload
        class Mine:
            def __init__(self, x): self.x = x
        def mine(x): return Mine(x + 1)
        sys.stdout.buffer.write(payload.dumps((mine, Mine(5), [mine]))[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    function, instance, (same,) = payload.loads(data)
    assert instance.x == 5
    assert function(1).x == 2
    assert same is function


def test_code_that_travels_by_value_keeps_its_file_and_lines() -> None:
    def outer() -> tuple[Any, ...]:
        return (lambda: 1).__code__, sys._getframe().f_code

    here = outer.__code__
    for data in (payload.dumps(outer)[0], payload.dumps_inside(outer)):
        inner, code = payload.loads(data)()
        assert (code.co_filename, code.co_firstlineno) == (__file__, here.co_firstlineno)
        assert (inner.co_filename, inner.co_firstlineno) == (__file__, here.co_firstlineno + 1)
        assert code == here and list(code.co_lines()) == list(here.co_lines())


def test_text_that_merely_mentions_main_comes_back_too() -> None:
    assert round_trip("if __name__ == '__main__'") == "if __name__ == '__main__'"


# --- failures name the culprit ----------------------------------------------------------------


def why(call: Callable[[], Any]) -> str:
    with pytest.raises(SerializationError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_argument_that_cannot_be_pickled_is_named() -> None:
    said = why(lambda: payload.dump_call(double, (1, Sulky()), {}))
    assert "argument 1 of " in said and "double" in said
    assert "Sulky object" in said and "RuntimeError: leave me where I am" in said


def test_a_keyword_argument_that_cannot_be_pickled_is_named() -> None:
    said = why(lambda: payload.dump_call(double, (1,), {"good": 1, "bad": Sulky()}))
    assert "argument 'bad' of " in said
    assert "leave me where I am" in said


def test_a_function_that_cannot_be_pickled_is_named() -> None:
    sulky = Sulky()
    said = why(lambda: payload.dump_call(lambda: sulky, (), {}))
    assert "the function " in said and "<lambda>" in said and "leave me" in said


def test_a_call_that_fails_only_as_a_whole_is_named_by_its_function() -> None:
    class Once:
        calls = 0

        def __reduce__(self) -> Any:
            Once.calls += 1
            if Once.calls <= 2:  # by pickle, by cloudpickle; the search for the culprit finds none
                raise RuntimeError("only then")
            return Point, (1, 2)

    assert "the call of " in why(lambda: payload.dump_call(double, (Once(),), {}))


def test_an_argument_that_cannot_even_be_shown_is_named() -> None:
    said = why(lambda: payload.dump_arguments(double, (Mute(),), {}))
    assert "argument 0 of " in said and "<Mute whose repr raised ValueError>" in said


def test_a_factory_that_cannot_be_pickled_is_named_as_such() -> None:
    sulky = Sulky()

    def connect() -> Sulky:
        return sulky

    said = why(lambda: payload.dump_function(connect, "factory"))
    assert said.startswith("the factory ") and "connect cannot be pickled" in said
    assert "build such things inside the worker" in said


def test_the_original_error_is_the_cause() -> None:
    with pytest.raises(SerializationError) as caught:
        payload.dump_call(double, (Sulky(),), {})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_generators_locks_and_files_are_refused() -> None:
    import threading

    for value in ((x for x in "ab"), threading.Lock(), sys.stdout):
        assert "argument 0 of " in why(lambda value=value: payload.dump_call(double, (value,), {}))


def test_names_are_those_a_reader_knows() -> None:
    assert payload.qualified_name(double) == f"{__name__}.double"
    assert payload.qualified_name(functools.partial(functools.partial(double, 1))).endswith(
        ".double"
    )
    assert payload.qualified_name(len) == "len"
    assert payload.qualified_name(Point(1, 2).norm).endswith("Point.norm")
    assert payload.qualified_name(functools.lru_cache(double)).endswith(".double")


def test_what_has_any_attribute_has_a_name_too() -> None:
    class Permissive:
        def __getattr__(self, name: str) -> Any:
            return self

        def __repr__(self) -> str:
            return "<anything>"

    assert payload.qualified_name(Permissive()) == "<anything>"
    assert payload.qualified_name(Mock(name="stand-in")).startswith("<Mock name='stand-in'")
    assert payload.qualified_name(functools.partial(len, ())) == "len"
    with pytest.raises(SerializationError, match="the function <Mock name='stand-in'"):
        payload.dump_job(Mock(name="stand-in", lock=threading.Lock()), (), {})


def test_a_repr_is_shortened_and_never_raises() -> None:
    assert payload.shorten("x" * 500) == "'" + "x" * 76 + "..."
    assert payload.shorten(Mute()) == "<Mute whose repr raised ValueError>"


def test_an_interrupt_while_something_is_shown_is_the_user_s() -> None:
    class Interrupted(Exception):
        def __repr__(self) -> str:
            raise KeyboardInterrupt

        __str__ = __repr__

    for show in (payload.shorten, payload.worded):
        with pytest.raises(KeyboardInterrupt):
            show(Interrupted())
