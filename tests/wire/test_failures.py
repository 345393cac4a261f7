"""Exceptions travel as they were raised, or are told by name and text."""

from __future__ import annotations

import builtins
import copyreg
import dataclasses
import subprocess
import sys
import threading
import traceback
from typing import Any, NoReturn

import pytest

from whitepool_mp.errors import FactoryFailed, RemoteError, RemoteTraceback, WorkerDied
from whitepool_mp.wire.failures import dump_failure, load_failure


class Sulky:
    """It cannot be pickled, and says so in a way of its own."""

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("leave me where I am")


class Plain(Exception):
    pass


class NeedsTwo(Exception):
    """Its constructor takes more than `args` tells, so that it pickles but does not unpickle."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class KeepsState(Exception):
    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class BadStr(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Refuses(Exception):
    def __reduce__(self) -> NoReturn:
        raise TypeError("not me")


class TurnsIntoText(Exception):
    def __reduce__(self) -> Any:
        return str, ("I was an exception",)


class ExitsWhenLoaded(Exception):
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


class Interrupt(BaseException):
    pass


def travel(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        text = traceback.format_exc()
        back = load_failure(dump_failure(raised, text))
    assert isinstance(back.__cause__, RemoteTraceback)
    assert back.__cause__.text == text
    assert "in travel" in str(back.__cause__)
    return back


@pytest.mark.parametrize(
    "error",
    [
        Plain("x", 1),
        KeyError("k"),
        OSError(2, "No such file", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        StopIteration(3),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        Interrupt("b"),
        TimeoutError("t"),
        MemoryError(),
        RecursionError("deep"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_arrives_as_its_own_type_with_the_remote_traceback(
    error: BaseException,
) -> None:
    back = travel(error)
    assert type(back) is type(error)
    assert back.args == error.args


def test_our_own_errors_travel_too() -> None:
    assert travel(FactoryFailed("no", "remote")).remote_traceback == "remote"  # type: ignore[attr-defined]
    died = travel(WorkerDied(pool="p", pid=3, exitcode=-11))
    assert isinstance(died, WorkerDied) and died.signal == "SIGSEGV"


def test_an_exception_keeps_its_attributes_and_notes() -> None:
    error = KeepsState("x", code=7)
    error.__notes__ = ["a note"]  # type: ignore[attr-defined]
    back = travel(error)
    assert isinstance(back, KeepsState)
    assert back.code == 7
    assert back.__notes__ == ["a note"]  # type: ignore[attr-defined]


def test_an_exception_of_a_local_class_arrives_as_that_class() -> None:
    class Local(ValueError):
        pass

    back = travel(Local("here"))
    assert isinstance(back, ValueError)
    assert type(back).__name__ == "Local"


def test_exception_groups_arrive_whole() -> None:
    group = pytest.importorskip("builtins").__dict__.get("ExceptionGroup")
    if group is None:
        pytest.skip("ExceptionGroup is new in Python 3.11")
    back = travel(group("several", [ValueError(1), KeyError(2)]))
    assert [type(each) for each in back.exceptions] == [ValueError, KeyError]  # type: ignore[attr-defined]


def remote(error: BaseException) -> RemoteError:
    back = travel(error)
    assert isinstance(back, RemoteError)
    return back


def test_an_exception_that_cannot_be_pickled_is_told_by_name() -> None:
    back = remote(Unpicklable("secret"))
    assert back.type_name == f"{__name__}.Unpicklable"
    assert back.message == "secret"
    assert "could not be pickled" in str(back)
    assert "travel" in back.remote_traceback


def test_an_exception_with_a_required_argument_arrives_as_its_own_type() -> None:
    back = travel(NeedsTwo(1, "text"))
    assert type(back) is NeedsTwo
    assert (back.args, back.code) == (("text",), 1)


@pytest.mark.parametrize("kind", [Refuses, TurnsIntoText, ExitsWhenLoaded])
def test_an_exception_whose_own_pickling_fails_arrives_as_its_own_type(
    kind: type[Exception],
) -> None:
    back = travel(kind("x"))
    assert type(back) is kind
    assert back.args == ("x",)


def test_an_exception_whose_str_raises_is_told_by_name() -> None:
    back = travel(BadStr())
    assert type(back) is BadStr
    local = dump_failure(BadStr(Sulky()), "text")
    wrapped = load_failure(local)
    assert isinstance(wrapped, RemoteError)
    assert wrapped.message == "<its str() raised ValueError>"


def test_an_exception_that_carries_what_cannot_travel_is_told_by_name() -> None:
    back = remote(ValueError("text", Sulky()))
    assert back.type_name == "ValueError"


# --- fidelity ---------------------------------------------------------------------------------


class Gone(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such thing", path)


class Adopted(OSError):
    """It leaves what OSError makes of its arguments alone."""

    def __init__(self, left: int, right: str) -> None:
        self.left = left


class Unset(OSError):
    def __init__(self) -> None:
        pass


class Slotted(Exception):
    __slots__ = ("code", "unset")

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Needs(ImportError):
    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"pip install {package}[{extra}]", name=package, path="/p")


class BadText(UnicodeDecodeError):
    def __init__(self, where: str, error: UnicodeDecodeError) -> None:
        super().__init__(error.encoding, error.object, error.start, error.end, error.reason)
        self.where = where


class Made(ValueError):
    def __new__(cls, code: int, text: str) -> Made:
        return super().__new__(cls, text)

    def __init__(self, code: int, text: str) -> None:
        self.code = code


class Worded(Exception):
    def __init__(self, *, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"about {self.name}"


class Both(KeyError, AttributeError):
    """It prints as a KeyError and is laid out as an AttributeError."""


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class OwnPickling(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return OwnPickling, (self.code,)


class WrongPickling(Exception):
    """What it pickles says something else."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = 5

    def __reduce__(self) -> Any:
        return WrongPickling, (f"again: {self.args[0]}",)


class OwnState(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = 3

    def __setstate__(self, state: Any) -> None:
        self.code = state["code"]


class Registered(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.lock = threading.Lock()


def attribute_error() -> BaseException:
    try:
        threading.Lock().missing  # type: ignore[attr-defined]  # noqa: B018
    except AttributeError as error:
        return error
    raise AssertionError


def syntax_error() -> BaseException:
    try:
        compile("x = = 1", "script.py", "exec")
    except SyntaxError as error:
        return error
    raise AssertionError


def blocking() -> BaseException:
    error = BlockingIOError(11, "again")
    error.characters_written = 7
    return error


def name_error() -> BaseException:
    try:
        eval("no_such_name")
    except NameError as error:
        return error
    raise AssertionError


FIELDS = (
    "args",
    "characters_written",
    "code",
    "encoding",
    "end",
    "end_offset",
    "errno",
    "filename",
    "filename2",
    "left",
    "lineno",
    "msg",
    "name",
    "object",
    "offset",
    "path",
    "reason",
    "start",
    "strerror",
    "text",
    "value",
    "where",
)


@pytest.mark.parametrize(
    "error",
    [
        Gone("/x"),
        Adopted(1, "b"),
        Unset(),
        Slotted("s", 7),
        Needs("np", "all"),
        BadText("file", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")),
        Made(3, "text"),
        Worded(name="rows"),
        Both("k"),
        Frozen(4),
        OwnPickling(9),
        WrongPickling("text"),
        OwnState("text"),
        OSError(2, "No such file", "/x", None, "/y"),
        OSError("only text"),
        OSError(),
        PermissionError(13, "no"),
        StopIteration(3),
        SystemExit(4),
        SystemExit(),
        UnicodeEncodeError("ascii", "\xff", 0, 1, "bad"),
        ImportError("no", name="n", path="p"),
        KeyError(("a", 1)),
        ValueError(object()),
        attribute_error(),
        syntax_error(),
        blocking(),
        name_error(),
        subprocess.CalledProcessError(3, ["false"], b"out", b"err"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_says_and_has_there_what_it_does_here(error: BaseException) -> None:
    back = travel(error)
    assert type(back) is type(error)
    if type(error) is not ValueError:  # an object's address is its own
        assert str(back) == str(error)
        for name in FIELDS:
            assert getattr(back, name, None) == getattr(error, name, None), name
    assert len(back.args) == len(error.args)


def test_a_registered_way_of_pickling_is_used() -> None:
    copyreg.pickle(Registered, lambda error: (Registered, (5,)))  # type: ignore[arg-type]
    try:
        back = travel(Registered(5))
    finally:
        del copyreg.dispatch_table[Registered]
    assert (type(back), str(back)) == (Registered, "code 5")


def test_a_local_class_with_slots_keeps_what_they_hold() -> None:
    class Local(Exception):
        __slots__ = ("code",)

    error = Local("text")
    error.code = 7
    assert travel(error).code == 7  # type: ignore[attr-defined]


def caught(raise_it: Any) -> BaseException:
    try:
        raise_it()
    except BaseException as error:
        return error
    raise AssertionError


def from_another() -> NoReturn:
    try:
        raise Gone("/inner")
    except Gone as error:
        error.__dict__["__notes__"] = ["a note"]
        raise Slotted("outer", 1) from error


def while_handling_another() -> NoReturn:
    try:
        raise Needs("np", "all")
    except Needs:
        raise Slotted("outer", 1)  # noqa: B904


def from_none() -> NoReturn:
    try:
        raise Needs("np", "all")
    except Needs:
        raise Slotted("outer", 1) from None


def from_what_cannot_travel() -> NoReturn:
    raise Slotted("outer", 1) from Unpicklable("inner")


def test_the_cause_is_the_cause_of_the_remote_traceback() -> None:
    error = travel(caught(from_another)).__cause__
    assert error is not None
    cause = error.__cause__
    assert isinstance(cause, Gone)
    assert (cause.errno, cause.filename) == (2, "/inner")
    assert cause.__notes__ == ["a note"]  # type: ignore[attr-defined]


def test_the_context_arrives_too() -> None:
    back = travel(caught(while_handling_another))
    assert isinstance(back.__context__, Needs)
    assert (str(back.__context__), back.__context__.name) == ("pip install np[all]", "np")
    assert isinstance(travel(caught(from_none)).__context__, Needs)


def test_a_cause_that_cannot_travel_is_told_by_name_and_costs_no_other_its_type() -> None:
    back = travel(caught(from_what_cannot_travel))
    assert isinstance(back, Slotted)
    assert back.code == 1
    assert back.__cause__ is not None
    cause = back.__cause__.__cause__
    assert isinstance(cause, RemoteError)
    assert (cause.type_name, cause.message) == (f"{__name__}.Unpicklable", "inner")


def test_exceptions_that_refer_to_each_other_arrive() -> None:
    first, second = Slotted("first", 1), Slotted("second", 2)
    first.__context__, second.__context__ = second, first
    back = travel(first)
    assert str(back.__context__) == "second"
    assert back.__context__ is not None and back.__context__.__context__ is back


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_the_members_of_a_group_arrive_as_they_were_raised() -> None:
    kind: Any = vars(builtins)["ExceptionGroup"]
    members = [Gone("/x"), kind("inner", [Needs("np", "all")]), Unpicklable("told")]
    members[0].__cause__ = Slotted("why", 8)
    group = kind("several", members)
    back: Any = travel(group)
    assert (type(back), str(back)) == (kind, str(group))
    gone, inner, told = back.exceptions
    assert (type(gone), gone.filename, gone.__cause__.code) == (Gone, "/x", 8)
    assert (type(inner.exceptions[0]), inner.exceptions[0].name) == (Needs, "np")
    assert (type(told), told.message) == (RemoteError, "told")


def test_an_exception_among_the_arguments_of_another_arrives() -> None:
    back = travel(Plain("outer", Gone("/x")))
    assert (type(back.args[1]), back.args[1].filename) == (Gone, "/x")
