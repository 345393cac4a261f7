"""Objects to bytes and back: plain pickle first, cloudpickle for what no module holds.

Pickle protocol 5 throughout: buffers of 16 KiB and more travel beside the pickle, from where they
lie. A pickle that names `__main__` is made again by value, since the worker's `__main__` is not
the caller's, and one that names multiprocessing in the way that knows all of its reducers
(`wire.reduction`), since plain pickle takes the number of a descriptor for the descriptor. What
cannot be pickled or unpickled raises `SerializationError`, which names it.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType

from whitepool_mp.errors import SerializationError
from whitepool_mp.wire import by_name
from whitepool_mp.wire.messages import MAX_BUFFERS, PLAIN
from whitepool_mp.wire.passed import NeedsDescriptors, let_go

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Dumped = tuple[bytes, list[Any]]
    """A pickle and what travels beside it: buffers, and an `Outgoing` before them if need be."""
    Job = tuple[bytes, list[Any], str]
else:
    import _pickle as pickle  # as in `wire.messages`

OUT_OF_BAND = 16 * 1024
"""Buffers of at least this many bytes travel beside the pickle."""

LARGE_BYTES = 256 * 1024
"""An argument, or a result, that is a `bytes` of at least this size does so, too."""


def dumps(value: Any, give: bool = False) -> Dumped:
    """Pickle a value.

    Args:
        value: what to pickle.
        give: whether the value lives on here until the call has ended, as arguments do.

    Returns:
        The pickle and the buffers that travel beside it.

    Raises:
        Exception: whatever the value's own pickling raises, when cloudpickle fails as well.
    """
    if type(value) in PLAIN:
        value = _beside(value)
        if type(value) is not pickle.PickleBuffer:
            return pickle.dumps(value, 5), []
    found = _by_name(value)
    if found is not None:
        return found
    buffers: list[Any] = []
    if not _may_be_shared():
        from whitepool_mp.wire import by_value

        return by_value.dumps(value, _sorter(buffers)), buffers
    from whitepool_mp.wire import reduction

    data, outgoing = reduction.dumps(value, _sorter(buffers), give=give)
    return data, buffers if outgoing is None else [outgoing, *buffers]


def _may_be_shared() -> bool:
    """Whether there may be something that multiprocessing knows better how to pickle."""
    return "multiprocessing.reduction" in sys.modules or "socket" in sys.modules


def _by_name(value: Any) -> Dumped | None:
    """A value's plain pickle; None if there is something in it that has to travel by value."""
    buffers: list[pickle.PickleBuffer] = []
    try:
        data = by_name.dumps(value, buffers.append)
        if data is not None:
            if not buffers or (len(buffers) <= MAX_BUFFERS and all(map(_is_large, buffers))):
                return data, buffers
            buffers.clear()
            data = by_name.dumps(value, _sorter(buffers))
            return None if data is None else (data, buffers)
    except Exception:  # a lambda, a local class, ...: the second way says what is really wrong
        pass
    return None


def _beside(value: Any) -> Any:
    """A large `bytes` as what travels beside the pickle, from where it lies."""
    if type(value) is bytes and len(value) >= LARGE_BYTES:
        return pickle.PickleBuffer(value)
    return value


def _arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What is pickled for these arguments."""
    for each in args:
        if type(each) is bytes and len(each) >= LARGE_BYTES:
            args = tuple(map(_beside, args))
            break
    if kwargs:
        kwargs = {name: _beside(each) for name, each in kwargs.items()}
    return args, kwargs


def _is_large(buffer: pickle.PickleBuffer) -> bool:
    return buffer.raw().nbytes >= OUT_OF_BAND


def _sorter(buffers: list[pickle.PickleBuffer]) -> Callable[[pickle.PickleBuffer], bool]:
    """Collect large buffers, as many as a message may have; the others stay in the pickle."""

    def keep_inside(buffer: pickle.PickleBuffer) -> bool:
        if len(buffers) >= MAX_BUFFERS or not _is_large(buffer):
            return True
        buffers.append(buffer)
        return False

    return keep_inside


def dumps_inside(value: Any, give: bool = False) -> bytes:
    """Pickle a value with all its buffers inside (for values that are kept or are small).

    Args:
        value: what to pickle.
        give: whether it lives on here for as long as the pickle is used.

    Raises:
        NeedsDescriptors: it cannot be pickled without them.
        Exception: whatever the value's own pickling raises.
    """
    try:
        data = by_name.dumps(value)
        if data is not None:
            return data
    except Exception:  # as above
        pass
    return dumps_alone(value, give)


def dumps_alone(
    value: Any, give: bool = False, reduce: Callable[[Any], Any] | None = None
) -> bytes:
    """Pickle a value by value, with what multiprocessing knows, and nothing beside the pickle.

    Args:
        value, give: as for `dumps_inside`.
        reduce: as for `by_value.dumps`.
    """
    if not _may_be_shared():
        from whitepool_mp.wire import by_value

        return by_value.dumps(value, reduce=reduce)
    from whitepool_mp.wire import reduction

    return reduction.dumps(value, give=give, alone=True, reduce=reduce)[0]


loads = pickle.loads


def qualified_name(function: Any) -> str:
    """The name by which a reader knows a function: `module.qualname`, or its repr."""
    # A functools.partial. (By its class: an object may have any attribute that it is asked for.)
    while hasattr(type(function), "func") and hasattr(type(function), "keywords"):
        function = function.func
    name = getattr(function, "__qualname__", None)
    if not isinstance(name, str):
        return shorten(function)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module not in (None, "builtins", "__main__") else name


def named(what: Any) -> str:
    """The name of a function, or the name itself."""
    return what if isinstance(what, str) else qualified_name(what)


def shorten(value: Any, limit: int = 80) -> str:
    """A repr fit for an error message; never raises (but for a KeyboardInterrupt, as below)."""
    try:
        text = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an exit, too, of whatever is just shown
        text = f"<{type(value).__name__} whose repr raised {type(error).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def message_of(error: BaseException) -> str:
    """What an exception says; never raises."""
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as failing:  # as above
        return f"<its str() raised {type(failing).__name__}>"


def worded(error: BaseException) -> str:
    """An exception's type and what it says; never raises."""
    return f"{type(error).__name__}: {message_of(error)}"


def dump_call(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Dumped:
    """Pickle a call as one object.

    Raises:
        SerializationError: the function or an argument cannot be pickled; says which.
    """
    try:
        return dumps((function, _arguments(args, kwargs)), give=True)
    except Exception as error:
        raise _culprit(function, args, kwargs, error) from error


_FUNCTIONS = (FunctionType, BuiltinFunctionType)
_MOST_FUNCTIONS = 4096
# Opcodes; `pickle` has names for them.
_PROTOCOL = b"\x80\x05"
_GLOBAL, _STOP = b"c", b"."
_PAIR = b"\x86" + _STOP
_LOADS = _GLOBAL + b"_pickle\nloads\n"
_BYTES, _CALL = b"B", b"\x85R"
_by_reference: dict[Any, tuple[bytes, str]] = {}


def _reference(function: Any) -> tuple[bytes, str] | None:
    """What a call's pickle begins with for a function that a module holds, and its name.

    None if it has to travel by value: what it refers to may be different each time.
    """
    begin = _global(function)
    if begin is None:  # these are not kept: what they refer to would be, too
        return None
    if len(_by_reference) >= _MOST_FUNCTIONS:
        _by_reference.clear()
    _by_reference[function] = found = begin, qualified_name(function)
    return found


def _global(value: Any) -> bytes | None:
    """How a pickle begins that names a function or a class, if that is how it is found again."""
    try:
        name, module = value.__qualname__, value.__module__
        if module == "__main__" or "<" in name:
            return None
        # GLOBAL takes no place in the memo, which is the arguments'.
        begin = b"".join((_PROTOCOL, _GLOBAL, module.encode(), b"\n", name.encode(), b"\n"))
        return begin if loads(begin + _STOP) is value else None
    except Exception:  # it has to travel by value, or not at all
        return None


def is_importable(value: Any) -> bool:
    """Whether a function or a class is found by its name, in a module that is not the script."""
    return _global(value) is not None


def nested(data: bytes) -> bytes:
    """How a pickle begins whose first object has been pickled already."""
    # As with GLOBAL, nothing of this takes a place in the memo.
    return b"".join((_PROTOCOL, _LOADS, _BYTES, len(data).to_bytes(4, "little"), data, _CALL))


def dump_job(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Job:
    """Pickle a call as one object; a function that a module holds is pickled once for all calls.

    Returns:
        The pickle, the buffers beside it, and the function's name.

    Raises:
        SerializationError: the function or an argument cannot be pickled; says which.
    """
    if type(function) in _FUNCTIONS:
        known = _by_reference.get(function) or _reference(function)
        dumped: Dumped | None = None
        if known is not None:
            dumped = dump_arguments(function, args, kwargs)
        elif (known := _steady(function)) is not None:
            # Two that travel by value may refer to the same thing, or to each other: one pickle.
            dumped = _by_name(_arguments(args, kwargs))
        if known is not None and dumped is not None:
            data, buffers = dumped
            # The one pickle's end and the other's beginning fall away.
            return b"".join((known[0], memoryview(data)[2:-1], _PAIR)), buffers, known[1]
    data, buffers = dump_call(function, args, kwargs)
    return data, buffers, qualified_name(function)


def _steady(function: Any) -> tuple[bytes, str] | None:
    """The same for a function that travels by value, if its pickle is as it was last time."""
    from whitepool_mp.wire import steady

    try:
        return steady.beginning(function)
    except Exception:  # it cannot be pickled: with its arguments it is found out what cannot
        return None


def dump_arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Dumped:
    """Pickle the arguments of a call alone, for a function that is pickled once for many calls.

    Raises:
        SerializationError: as for `dump_call`.
    """
    try:
        return dumps(_arguments(args, kwargs), give=True)
    except Exception as error:
        raise _culprit(function, args, kwargs, error) from error


def dump_method(target: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Dumped:
    """Pickle a method call on an object that is in the worker.

    Raises:
        SerializationError: an argument cannot be pickled.
    """
    try:
        return dumps((target, name, args, kwargs), give=True)
    except Exception as error:
        raise SerializationError(
            f"the arguments of method {name!r}, {shorten(args)} {shorten(kwargs)}, cannot be "
            f"pickled: {worded(error)}"
        ) from error


def dump_function(function: Callable[..., Any], what: str = "function") -> bytes:
    """Pickle a function (or a factory, a teardown: `what` is the word for the error).

    Raises:
        SerializationError: it cannot be pickled.
    """
    try:
        return dumps_inside(function, give=True)
    except Exception as error:
        kind = NeedsDescriptors if isinstance(error, NeedsDescriptors) else SerializationError
        raise kind(
            f"the {what} {qualified_name(function)} cannot be pickled: "
            f"{worded(error)}. What it refers to (a closure's variables, globals "
            "of a script) travels with it: build such things inside the worker instead"
        ) from error


def dump_factory(factory: Callable[..., Any]) -> Dumped:
    """Pickle a factory, which every worker is given.

    Returns:
        The pickle, and what travels with it, if anything does.

    Raises:
        SerializationError: it cannot be pickled.
    """
    try:
        return dump_function(factory, "factory"), []
    except NeedsDescriptors:
        from whitepool_mp.wire import reduction

        data, outgoing = reduction.dumps(factory, give=True)
        return data, [outgoing]


def _culprit(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: Exception,
) -> SerializationError:
    name = qualified_name(function)
    parts: list[tuple[str, Any]] = [(f"the function {name}", function)]
    parts += [(f"argument {i} of {name}", value) for i, value in enumerate(args)]
    parts += [(f"argument {key!r} of {name}", value) for key, value in kwargs.items()]
    for what, value in parts:
        try:
            let_go(dumps(value, give=True)[1])
        except Exception as reason:
            shown = "" if value is function else f" ({shorten(value)})"
            return SerializationError(f"{what}{shown} cannot be pickled: {worded(reason)}")
    return SerializationError(f"the call of {name} cannot be pickled: {worded(error)}")


__all__ = [
    "dump_arguments",
    "dump_call",
    "dump_function",
    "dump_job",
    "dump_method",
    "dumps",
    "loads",
    "message_of",
    "named",
    "qualified_name",
    "shorten",
    "worded",
]
