"""A function that travels by value is what it was when it was submitted, pickled anew or not."""

from __future__ import annotations

import gc
import sys
import textwrap
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whitepool_mp import SerializationError
from whitepool_mp.wire import by_value, payload, steady


def sent(function: Callable[..., Any], *args: Any) -> Any:
    """What a call returns in a worker."""
    data, _, name = payload.dump_job(function, args, {})
    assert name == payload.qualified_name(function)
    loaded, (positional, named) = payload.loads(data)
    assert loaded is not function
    return loaded(*positional, **named)


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been pickled by value."""
    found: list[Any] = []
    dumps = by_value.dumps

    def noted(value: Any, *args: Any) -> bytes:
        found.append(value)
        return dumps(value, *args)

    monkeypatch.setattr(by_value, "dumps", noted)
    return found


SCRIPT = """
import json, math
from math import sqrt
RATE = 3
TABLE = [1, 2]
SHAPE = (2, ("a", None))

def helper(x, y=1):
    return x * RATE + y

def deeper(x):
    return helper(x) if x else deeper(1)

def make(kept):
    def inner(x, *, more=5):
        return (x, kept, more)
    return inner

def recursive(n: int) -> int:
    return n if n < 1 else recursive(n - 1) + 1

class Point:
    size = 1
"""


def outcome(call: Callable[..., Any], *args: Any) -> str:
    """What a call returns, comparable, or raises."""
    try:
        value = call(*args)
        if isinstance(value, tuple):  # functions have no equal
            value = tuple(each(1) if callable(each) else each for each in value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return repr(value)


def script() -> dict[str, Any]:
    """The names of a script, as if it ran."""
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(SCRIPT, "<a script>", "exec"), names)
    return names


def define(names: dict[str, Any], code: str) -> Any:
    # (With annotations as they are, not as text, which this module has.)
    exec(compile(textwrap.dedent(code), "<a script>", "exec", dont_inherit=True), names)
    return names["f"]


STEADY = [
    "f = lambda x: x",
    "def f(x): return x + RATE",
    "def f(x): return helper(x), deeper(x)",
    "def f(x): return sqrt(x), math.floor(x), json.dumps([x])",
    "def f(x): return json.decoder.JSONDecoder().decode(str(x))",
    "def f(x): return SHAPE, [helper(y) for y in range(x)], (lambda: RATE)()",
    "f = make(7)",
    "f = make(helper)",
    "f = recursive",
    "def f(x, *, by=2, what=(1, sqrt)): return x * by, what[1](x)",
    "def f(x: int) -> dict[str, int]:\n 'Text.'\n return {'x': not_there if x > 9 else x}",
    "from collections import OrderedDict\ndef f(x): return OrderedDict(x=x)",
    "f = helper\nf.weight = 3",
    "def f(x, by=helper): return by(x)",
    "from typing import Any, Optional\n"
    "from collections.abc import Callable\n"
    "def f(x: Optional[list[int]], y: Callable[[int], Any] = abs) -> 'str | int': return y(x)",
    "import typing\ndef f(x: typing.Annotated[int, 1], y: typing.List = ()) -> None: return x, y",
]
OTHERS = [
    "def f(x): return TABLE + [x]",
    "def f(x): return Point.size + x",
    "f = make([1])",
    "def f(x, y=[]): return y + [x]",
    "def f(x: Point): return f.__annotations__['x'].size + x",
    "import typing\n"
    "def f(x: typing.Annotated[int, [1]]): return f.__annotations__['x'].__metadata__[0] + [x]",
    "both = (helper, sqrt)\ndef f(x): return both[0](x)",
    "import random\nsource = random.Random(1)\ndef f(x): return source.random()",
]


@pytest.mark.parametrize("code", STEADY)
def test_a_function_that_stays_the_same_is_pickled_once(code: str, pickled: list[Any]) -> None:
    names = script()
    function = define(names, code)
    for number in range(5):
        assert outcome(lambda n: sent(function, n), number) == outcome(function, number)
    assert len(pickled) == 2, "with its arguments when it is first used, and then alone"


@pytest.mark.parametrize("code", OTHERS)
def test_a_function_that_refers_to_what_may_change_is_pickled_each_time(
    code: str, pickled: list[Any]
) -> None:
    function = define(script(), code)
    for number in range(5):
        assert sent(function, number) == function(number) or "random" in code
    assert len(pickled) == 5


CHANGES: dict[str, str] = {
    "a number": "RATE = {n}",
    "a number that is equal": "RATE = 3.0 if type(RATE) is int else 3",
    "no number any more": "RATE = [{n}]",
    "a helper's code": "def helper(x, y=1): return -x - {n}",
    "a helper's default": "helper.__defaults__ = ({n},)",
    "its code": "f.__code__ = f.__code__ if f.__closure__ else (lambda x: (x, {n}, RATE)).__code__",
    "a default": "f.__kwdefaults__ = {{'more': {n}}} if f.__kwdefaults__ else None",
    "what is enclosed": "if f.__closure__: f.__closure__[0].cell_contents = {n}",
    "what is enclosed, to a list": "if f.__closure__: f.__closure__[0].cell_contents = [{n}]",
    "into a list": "if f.__closure__ and kept() is list: f.__closure__[0].cell_contents += [{n}]",
    "an attribute": "f.weight = {n}",
    "an attribute's name": "if f.__dict__: f.height = f.__dict__.popitem()[1]",
    "a name that was not there": "not_there = {n}",
    "the same, to nothing": "not_there = None",
    "a name that is gone": "globals().pop('not_there', None)",
    "another module": "math = __import__('cmath')",
    "a module's place": "sqrt = math.floor if hasattr(math, 'floor') else abs",
    "a tuple": "SHAPE = ({n}, RATE)",
    "an annotation": "f.__annotations__['x'] = {n}",
    "an annotation that may change": "f.__annotations__ = {{'x': [{n}]}}",
    "a helper's annotation": "helper.__annotations__['y'] = {n}",
    "no annotation": "f.__annotations__ = {{}}",
    "an annotation to a default": "f.__kwdefaults__, f.__annotations__ = f.__annotations__, {{}}",
    "the text": "f.__doc__ = 'Text {n}.'",
    "the name": "f.__name__ = 'named_{n}'",
    "the long name": "f.__qualname__ = 'f.named_{n}'",
    "the module": "f.__module__ = (None, 'there_is_none', '__main__', 'json')[{n}]",
    "nothing": "",
}
CODES = [
    "def f(x, *, y=2):\n 'Text.'\n return (f.__annotations__, f.__doc__, f.__name__,\n"
    "  f.__qualname__, f.__module__, f.__kwdefaults__, helper.__annotations__)",
    "def f(x): return (RATE, helper(x), SHAPE, sqrt(x), math.__name__, f.__dict__)",
    "def f(x): return f.__dict__, RATE",
    "def f(x):\n try: return not_there, deeper(x)\n except NameError: return None",
    "import json\ndef f(x): return json.dumps(x), RATE, helper(1)",
    "f = make(7)",
    "f = make(helper)",
    "def f(x): return recursive(x), helper(RATE if type(RATE) is int else 0), math.__name__",
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(CODES),
    st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 3)), max_size=20),
)
def test_what_a_worker_calls_is_the_function_as_it_is_now(
    code: str, changes: list[tuple[str, int]]
) -> None:
    names = script()
    function = define(names, code)
    names["kept"] = lambda: type(function.__closure__[0].cell_contents)
    for what, number in [("nothing", 0), ("nothing", 0), *changes]:
        exec(CHANGES[what].format(n=number), names)
        for _ in range(2):
            assert outcome(lambda x: sent(function, x), 2) == outcome(function, 2), what


def test_a_module_of_a_package_that_is_loaded_later_is_there(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parcel").mkdir()
    (tmp_path / "parcel" / "__init__.py").write_text("")
    (tmp_path / "parcel" / "part.py").write_text("number = 5")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = script()
    function = define(names, "import parcel\ndef f(): return parcel.part.number")
    loaded = []
    for _ in range(3):
        with pytest.raises(AttributeError):
            sent(function)
    exec("import parcel.part", names)
    for _ in range(3):
        data, _, _ = payload.dump_job(function, (), {})
        loaded.append(b"parcel.part" in data)
    assert loaded == [True] * 3
    for name in ("parcel", "parcel.part"):
        del sys.modules[name]


PARCEL = {"__init__.py": "import parcel.box", "box/__init__.py": "", "box/part.py": "number = 5"}


@pytest.mark.parametrize(
    "code",
    [
        "import parcel\ndef f(): return parcel.box.part.number",
        "import parcel.box\ndef f(): return parcel.box.part.number",
        "import parcel.box as inner\ndef f(): return inner.part.number",
        "def enclose():\n import parcel\n return lambda: parcel.box.part.number\nf = enclose()",
    ],
)
def test_a_module_deep_in_a_package_that_is_loaded_later_is_there(
    code: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, text in PARCEL.items():
        file = tmp_path / "parcel" / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    names = script()
    function = define(names, code)
    for _ in range(3):
        with pytest.raises(AttributeError):
            sent(function)
    exec("import parcel.box.part", names)
    there = [b"parcel.box.part" in payload.dump_job(function, (), {})[0] for _ in range(3)]
    assert there == [True] * 3
    for name in ("parcel", "parcel.box", "parcel.box.part"):
        del sys.modules[name]


def test_a_function_among_the_arguments_is_the_one_that_the_called_one_knows() -> None:
    names = script()
    knows = define(names, "def f(x): return x is helper, helper is x")
    adds = define(
        names,
        """
        count = 0
        def bump():
            global count
            count += 1
        def f(also):
            also()
            return count
        """,
    )
    for _ in range(4):
        assert sent(knows, names["helper"]) == (True, True)
        assert sent(knows, len) == (False, False)
        assert sent(adds, names["bump"]) == 1, "its globals are those of the function it came with"
        assert sent(adds, print) == 0


TUPLED = """
def enclose():
    def own(x): return both[1](x)
    def other(x): return x
    both = (own, other)
    return own
f = enclose()
"""
TUPLED_TWICE = TUPLED.replace("(own, other)", "((own,), other)")


def test_nothing_is_kept_alive() -> None:
    names = script()
    gc.collect()
    before = len(steady._known)
    watched = []
    for code in [*STEADY, TUPLED, TUPLED_TWICE]:
        function = define(names, code)
        for number in range(3):
            outcome(lambda n, call=function: sent(call, n), number)
        watched.append(weakref.ref(function))
    assert len(steady._known) > before
    del function
    names.clear()
    gc.collect()
    assert [reference() for reference in watched] == [None] * len(watched)
    assert len(steady._known) == before


def test_a_function_that_comes_in_the_place_of_another_is_not_taken_for_it() -> None:
    for number in range(200):
        function = define({"__name__": "__main__", "K": number}, "def f(): return K")
        assert [sent(function) for _ in range(3)] == [number] * 3
        del function


def test_what_cannot_be_pickled_is_named_each_time() -> None:
    names = script()
    names["lock"] = threading.Lock()
    function = define(names, "def f(): return lock")
    other = define(script(), "def f(x): return x")
    for _ in range(3):
        with pytest.raises(SerializationError, match=r"the function f cannot be pickled: .*lock"):
            payload.dump_job(function, (), {})
        with pytest.raises(
            SerializationError, match=r"argument 0 of f .*cannot be pickled: .*lock"
        ):
            payload.dump_job(other, (names["lock"],), {})


def test_a_long_pickle_is_not_kept(pickled: list[Any]) -> None:
    function = define(script() | {"text": "x" * steady.MOST_BYTES}, "def f(): return len(text)")
    for _ in range(5):
        assert sent(function) == steady.MOST_BYTES
    assert len(pickled) == 6


def test_a_function_that_is_changed_before_each_call_is_soon_pickled_each_time(
    pickled: list[Any],
) -> None:
    names = script()
    function = define(names, "def f(): return RATE")
    for number in range(1000, 1100):
        names["RATE"] = number
        assert sent(function) == number
    assert len(pickled) < 100 + 2 * steady.MOST_CHANGES


def test_a_change_while_it_is_pickled_is_not_taken_for_what_was_there_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = script()
    function = define(names, "def f(): return RATE")
    dumps = by_value.dumps

    def changing(value: Any, *args: Any) -> bytes:
        names["RATE"] = 9  # by another thread
        return dumps(value, *args)

    assert sent(function) == 3
    monkeypatch.setattr(by_value, "dumps", changing)
    assert sent(function) == 9
    monkeypatch.setattr(by_value, "dumps", dumps)
    for number in (3, 9, 3):
        names["RATE"] = number
        assert [sent(function) for _ in range(3)] == [number] * 3


def test_a_change_between_looking_and_pickling_is_not_overlooked_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = script()
    function = define(names, "def f(): return RATE")
    create = steady._Pickled.__init__

    def late(self: Any, *args: Any) -> None:
        names["RATE"] = [1]  # by another thread
        create(self, *args)

    assert sent(function) == 3
    monkeypatch.setattr(steady._Pickled, "__init__", late)
    assert sent(function) == [1]
    monkeypatch.undo()
    names["RATE"].append(2)
    assert [sent(function) for _ in range(3)] == [[1, 2]] * 3


def test_annotations_that_cannot_be_made_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = steady._parts

    def undefined(*args: Any) -> Any:
        parts(*args)
        raise NameError("name 'Undefined' is not defined")  # as Python 3.14, which makes them late

    late, later = define(script(), "def f(x): return x"), define(script(), "def f(x): return -x")
    assert [sent(late, number) for number in range(3)] == [0, 1, 2]
    monkeypatch.setattr(steady, "_parts", undefined)
    assert [sent(late, number) for number in range(20)] == list(range(20))
    assert [sent(later, number) for number in range(20)] == list(range(0, -20, -1))


def test_modules_that_travel_by_value_are_left_to_cloudpickle(pickled: list[Any]) -> None:
    import cloudpickle

    module = types.ModuleType("a_module_of_this_test")
    exec("level = 1\ndef read(): return level", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        cloudpickle.register_pickle_by_value(module)
        names = script() | {"read": module.read}
        function = define(names, "def f(): return read()")
        for level in range(4):
            module.level = level  # type: ignore[attr-defined]
            data, _, _ = payload.dump_job(function, (), {})
            sys.modules.pop(module.__name__)
            loaded, _ = payload.loads(data)
            sys.modules[module.__name__] = module
            assert loaded() == level
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        del sys.modules[module.__name__]


def test_a_module_that_is_to_travel_by_value_does_so_from_then_on() -> None:
    import cloudpickle

    module = types.ModuleType("another_module_of_this_test")
    exec("level = 1\ndef read(): return level", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        function = define(script() | {"read": module.read}, "def f(): return read()")
        assert [sent(function) for _ in range(3)] == [1] * 3
        cloudpickle.register_pickle_by_value(module)
        for level in range(4):
            module.level = level  # type: ignore[attr-defined]
            data, _, _ = payload.dump_job(function, (), {})
            del sys.modules[module.__name__]  # a worker has no such module
            loaded, _ = payload.loads(data)
            sys.modules[module.__name__] = module
            assert loaded() == level
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        sys.modules.pop(module.__name__, None)


def test_arguments_are_as_they_would_be_in_one_pickle() -> None:
    function = define(script(), "def f(*args, **named): return args, named")
    shared = [1, "text", b"bytes"]
    for _ in range(3):
        data, buffers, _ = payload.dump_job(function, (shared, shared, "text"), {"more": shared})
        assert buffers == []
        _, ((first, second, text), named) = payload.loads(data)
        assert first is second is named["more"]
        assert (first, text) == (shared, "text")
