"""Functions that travel by value, and whose pickle is the same each time.

    function --second use--> all that it refers to --kept with--> its pickle
                                  '--the same at the next use? then that is used again

A function of a script is pickled with all that it refers to, which may be different at the next
call. Finding out takes a tenth of the time that pickling takes if all of it can be compared by
identity: code, modules, classes and functions that can be imported, immutable values, and other
functions of this kind. One that refers to anything else is pickled each time, as is one that is
used only once.

Guarantees: what a call finds in the worker is what the function referred to when it was submitted;
nothing of the user's is kept alive by being known here.
"""

from __future__ import annotations

import sys
import weakref
from operator import is_
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

from whitepool_mp.wire import payload

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

MOST_BYTES = 64 * 1024
"""Longer pickles are not kept."""
MOST_CHANGES = 8
"""A function that has changed so often is pickled each time."""
_IMMUTABLE = frozenset((type(None), bool, int, float, complex, str, bytes, type(...)))
_ABSENT = object()


class _Known:
    """A function that was used before, as a weak reference, and its pickle once there is one."""

    __slots__ = ("changes", "function", "pickled")

    def __init__(self, function: FunctionType) -> None:
        number = id(function)
        self.function = weakref.ref(function, lambda _: _known.pop(number, None))
        self.pickled: _Pickled | None = None
        self.changes = 0

    def renew(self, function: FunctionType) -> None:
        """Pickle it, and note what it refers to, if it is one to do that for."""
        self.pickled = None
        watched: dict[FunctionType, tuple[str, ...]] = {}
        self.changes += 1
        if self.changes > MOST_CHANGES:
            return
        from cloudpickle import list_registry_pickle_by_value

        # With modules that travel by value the same would have to be done for all in them.
        if not list_registry_pickle_by_value() and _is_steady(function, watched):
            pickled = _Pickled(function, watched)
            if len(pickled.begin) <= MOST_BYTES and pickled.is_up_to_date():
                self.pickled = pickled
                return
        self.changes = MOST_CHANGES


class _Pickled:
    """A pickle, and what was referred to then.

    Args:
        function: what to pickle.
        watched: this function and those that it refers to, each with the names that its code uses.
    """

    __slots__ = ("begin", "name", "parts", "watched")

    def __init__(self, function: FunctionType, watched: dict[FunctionType, tuple[str, ...]]):
        self.watched = [(weakref.ref(each), names) for each, names in watched.items()]
        self.parts = self._look()
        self.name = payload.qualified_name(function)
        self.begin = payload.nested(payload.dumps_inside(function))

    def _look(self) -> list[Any]:
        parts: list[Any] = []
        for reference, names in self.watched:
            function = reference()
            if function is not None:
                parts += _parts(function, names)
        return [weakref.ref(each) if type(each) is FunctionType else each for each in parts]

    def is_up_to_date(self) -> bool:
        """Whether all of it is still the same."""
        parts = self._look()
        return len(parts) == len(self.parts) and all(map(is_, parts, self.parts))


_known: dict[int, _Known] = {}


def beginning(function: FunctionType) -> tuple[bytes, str] | None:
    """What a call's pickle begins with and the function's name; None if it is not known.

    Raises:
        Exception: whatever its pickling raises.
    """
    known = _known.get(id(function))
    if known is None:
        _known[id(function)] = _Known(function)
        return None
    if known.pickled is None or not known.pickled.is_up_to_date():
        known.renew(function)
    pickled = known.pickled
    return None if pickled is None else (pickled.begin, pickled.name)


def _parts(function: FunctionType, names: tuple[str, ...]) -> list[Any]:
    """What a function refers to now."""
    look = function.__globals__.get
    parts: list[Any] = [look(name, _ABSENT) for name in names]
    for each in parts:
        if type(each) is ModuleType and "__path__" in vars(each):
            # With a package travel those of its modules that the code names and that are loaded.
            begin = each.__name__ + "."
            parts = parts + [sys.modules.get(begin + name, _ABSENT) for name in names]
    parts += (function.__code__, function.__defaults__)
    for values in (function.__kwdefaults__, function.__dict__):
        if values:
            parts += values
            parts += values.values()
    if function.__closure__:
        parts += map(_content, function.__closure__)
    return parts


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _names(code: CodeType) -> Iterable[str]:
    """The names of the globals that code refers to, and of attributes, which look the same."""
    yield from code.co_names
    for each in code.co_consts:
        if type(each) is CodeType:
            yield from _names(each)


def _is_steady(value: Any, functions: dict[FunctionType, tuple[str, ...]]) -> bool:
    """Whether a value stays the same for as long as it is the same object.

    Args:
        value: what is referred to.
        functions: those found so far, which are to be watched; more are added.
    """
    kind = type(value)
    if kind in _IMMUTABLE or kind is CodeType or value is _ABSENT:
        return True
    if kind is tuple or kind is frozenset:
        return all(_is_steady(each, functions) for each in value)
    if kind is ModuleType:
        name = value.__name__
        return name != "__main__" and sys.modules.get(name) is value
    if kind is BuiltinFunctionType:
        return value.__self__ is None or type(value.__self__) is ModuleType
    if kind is FunctionType and value not in functions and not payload.is_importable(value):
        functions[value] = tuple(dict.fromkeys(_names(value.__code__)))
        return all(_is_steady(each, functions) for each in _parts(value, functions[value]))
    return kind is FunctionType or (isinstance(value, type) and payload.is_importable(value))
