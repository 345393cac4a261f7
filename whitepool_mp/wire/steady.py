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
_TYPING = frozenset(("types", "typing", "collections.abc"))
_ABSENT = object()
# What comes next; or what moves from the one to the other would not be seen.
_DEFAULTS, _KEYWORDS, _ATTRIBUTES, _ANNOTATIONS = [object() for _ in range(4)]
_OURS = frozenset((_ABSENT, _DEFAULTS, _KEYWORDS, _ATTRIBUTES, _ANNOTATIONS))
Names = tuple[str, ...]


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
        self.changes += 1
        if self.changes > MOST_CHANGES:
            return
        found = _watch(function)
        if found is not None:
            pickled = _Pickled(function, *found)
            if len(pickled.begin) <= MOST_BYTES and pickled.is_up_to_date():
                self.pickled = pickled
                return
        self.changes = MOST_CHANGES


class _Pickled:
    """A pickle, and what was referred to then.

    Args:
        function: what to pickle.
        watched: this function and those that it refers to, each with the names that its code uses.
        parts: what all of these refer to.
    """

    __slots__ = ("begin", "modules", "name", "parts", "watched")

    def __init__(
        self, function: FunctionType, watched: dict[FunctionType, Names], parts: list[Any]
    ) -> None:
        from cloudpickle import list_registry_pickle_by_value

        # With modules that travel by value the same would have to be done for all in them.
        self.modules = list_registry_pickle_by_value
        self.watched = [(weakref.ref(each), names) for each, names in watched.items()]
        self.parts = _weak(parts)
        self.name = payload.qualified_name(function)
        self.begin = payload.nested(payload.dumps_inside(function, give=True))

    def is_up_to_date(self) -> bool:
        """Whether all of it is still the same."""
        if self.modules():
            return False
        parts: list[Any] = []
        for reference, names in self.watched:
            function = reference()
            if function is not None:
                parts += _parts(function, names)
        return len(parts) == len(self.parts) and all(map(is_, _weak(parts), self.parts))


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


def _parts(function: FunctionType, names: Names) -> list[Any]:
    """What a function refers to now, its code first."""
    look = function.__globals__.get
    parts: list[Any] = [
        function.__code__,
        function.__doc__,
        function.__name__,
        function.__qualname__,
        function.__module__,
        *[look(name, _ABSENT) for name in names],
    ]
    if function.__closure__:
        parts += map(_content, function.__closure__)
    if ModuleType in map(type, parts):
        packages: set[ModuleType] = set()
        for each in parts:  # those that are added are looked at as well
            if type(each) is ModuleType and "__path__" in vars(each) and each not in packages:
                packages.add(each)
                # With a package travel those of its modules that are loaded and that the code
                # names.
                begin = each.__name__ + "."
                parts += [sys.modules.get(begin + name, _ABSENT) for name in names]
    if function.__defaults__:
        parts.append(_DEFAULTS)
        parts += function.__defaults__
    if function.__kwdefaults__:
        _add(parts, _KEYWORDS, function.__kwdefaults__)
    if function.__dict__:
        _add(parts, _ATTRIBUTES, function.__dict__)
    if function.__annotations__:  # made only now, perhaps, which may raise anything
        _add(parts, _ANNOTATIONS, function.__annotations__)
    return parts


def _add(parts: list[Any], mark: object, values: dict[str, Any]) -> None:
    parts.append(mark)
    parts += values
    parts += values.values()


def _weak(parts: list[Any]) -> list[Any]:
    """Parts as they are kept and compared: functions are not to be kept alive."""
    return [weakref.ref(each) if type(each) is FunctionType else each for each in parts]


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


def _watch(function: FunctionType) -> tuple[dict[FunctionType, Names], list[Any]] | None:
    """What there is to watch for a function's sake: functions that travel by value, with the names
    that their code uses, and all that they refer to; None if some of it may change unnoticed."""
    functions: dict[FunctionType, Names] = {}
    all_parts: list[Any] = []
    found = [function]
    for each in found:  # those that are added are looked at as well
        code = each.__code__
        functions[each] = names = tuple(dict.fromkeys(_names(code)))
        parts = _parts(each, names)
        if parts[0] is not code:
            return None
        for part in parts:
            if _travels(part):
                if part not in found:
                    found.append(part)
            elif not _is_steady(part):
                return None
        all_parts += parts
    return functions, all_parts


def _travels(value: Any) -> bool:
    """Whether it is a function that travels by value."""
    return type(value) is FunctionType and not payload.is_importable(value)


def _is_steady(value: Any) -> bool:
    """Whether a value stays the same for as long as it is the same object."""
    kind = type(value)
    if kind in _IMMUTABLE or kind is CodeType or (kind is object and value in _OURS):
        return True
    if kind is tuple or kind is frozenset:  # a function that travels would be kept alive with it
        return all(map(_is_steady, value))
    if kind is ModuleType:
        name = value.__name__
        return name != "__main__" and sys.modules.get(name) is value
    if kind is BuiltinFunctionType:
        return value.__self__ is None or type(value.__self__) is ModuleType
    if kind is FunctionType or issubclass(kind, type):
        # Such as None's type is in no module, and known to pickle.
        return (kind is type and value in _IMMUTABLE) or payload.is_importable(value)
    return kind.__module__ in _TYPING and _is_steady_annotation(value)


def _is_steady_annotation(value: Any) -> bool:
    """The same for what `typing` knows by name, and for types with arguments: `list[int]`."""
    if hasattr(value, "__args__"):
        origin = getattr(value, "__origin__", None)  # a union may have none
        return all(map(_is_steady, (origin, value.__args__, getattr(value, "__metadata__", ()))))
    name = getattr(value, "_name", None)
    return isinstance(name, str) and getattr(sys.modules.get("typing"), name, None) is value
