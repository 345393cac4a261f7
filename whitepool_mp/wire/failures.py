"""Exceptions that travel: pickled in the worker, rebuilt in the client as they were raised.

    failure = sizes | (type's name, message, traceback) | the exception itself, if it can travel

An exception is rebuilt from its parts, not by a call of its class: a class may have a constructor
with other arguments than `args`, C fields (`errno`, `start`, `name`) or slots, all of which
the inherited `__reduce__` gets wrong. The parts are `args`, every field, `__dict__` (the notes are
in there), the members of a group, and the cause and context, each rebuilt in the same way. A class
that defines its own pickling is pickled by that, if the copy says the same as the original.

Guarantees: an exception that is sent has been rebuilt once in the worker, with the same text and
fields, and unpickled there once. Otherwise a `RemoteError` with its type's name and text arrives in
its place. A cause, a context or a member of a group is replaced alone.
"""

from __future__ import annotations

import copy
import copyreg
import io
import struct
from types import (
    BuiltinFunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
)

from whitepool_mp.errors import RemoteError, RemoteTraceback
from whitepool_mp.wire import by_name, payload

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Iterator
    from typing import Any

    Link = Callable[[BaseException | None], BaseException | None]
    Fields = list[tuple[type, str, Any]]
else:
    import _pickle as pickle  # as in `wire.messages`

_SIZES = struct.Struct("<II")
_OWN_PICKLING = frozenset(
    (
        "__copy__",
        "__getnewargs__",
        "__getnewargs_ex__",
        "__getstate__",
        "__reduce__",
        "__reduce_ex__",
        "__setstate__",
    )
)
_CONSTRUCTION = ("__new__", "__init__", "__reduce__")
_IN_C = BuiltinFunctionType, WrapperDescriptorType, MethodDescriptorType
_LEFT_OUT = {(AttributeError, "obj")}
"""Fields that Python's own pickling leaves out: the object may be anything, of any size."""


def dump_failure(error: BaseException, traceback_text: str) -> bytes:
    """Pickle an exception so that the other side can tell at least its name and traceback."""
    name = _name(error)
    outer = pickle.dumps((name, payload.message_of(error), traceback_text), 5)
    inner = (
        _dump(error, lambda link: link) or _dump(error, _portable) or _dump(error, _no_link) or b""
    )
    return _SIZES.pack(len(outer), len(inner)) + outer + inner


def load_failure(data: bytes | memoryview) -> BaseException:
    """The exception that `dump_failure` pickled, with the remote traceback as its cause.

    Returns:
        The exception in its own type, or a `RemoteError` that names it if it cannot be rebuilt.
        The cause it was raised with is the cause of the remote traceback.
    """
    outer_size, inner_size = _SIZES.unpack_from(data)
    start = _SIZES.size
    name, message, text = pickle.loads(data[start : start + outer_size])
    problem = "it could not be pickled"
    if inner_size:
        try:
            error = pickle.loads(data[start + outer_size : start + outer_size + inner_size])
            if isinstance(error, BaseException):
                return _with_traceback(error, text)
            problem = f"it unpickles as a {type(error).__name__}"
        except Exception as failing:
            problem = f"unpickling it here raised {payload.worded(failing)}"
    wrapped = RemoteError(
        f"{name}: {message} (the exception itself did not travel: {problem})",
        type_name=name,
        message=message,
        remote_traceback=text,
    )
    return _with_traceback(wrapped, text)


def _with_traceback(error: BaseException, text: str) -> BaseException:
    remote = RemoteTraceback(text)
    remote.__cause__ = error.__cause__
    _set(error, BaseException, "__cause__", remote)
    return error


def _name(error: BaseException) -> str:
    """The name by which a reader knows an exception's type."""
    try:
        name, module = type(error).__qualname__, type(error).__module__
        return name if module in ("builtins", "__main__") else f"{module}.{name}"
    except Exception:  # a metaclass may say anything
        return type(error).__name__


# --- pickling ---------------------------------------------------------------------------------


def _dump(error: BaseException, link: Link) -> bytes | None:
    """A pickle that is known to load as an exception, or None.

    Args:
        error: the exception.
        link: what to send for a cause, a context or a member of a group.
    """

    def reduce(value: Any) -> Any:
        return _reduce(value, link) if issubclass(type(value), BaseException) else NotImplemented

    try:
        data = _by_name(error, reduce)
        if data is None:
            data = payload.dumps_alone(error, reduce=reduce)
        loaded = pickle.loads(data)
    except BaseException:  # the exception's own code runs here, and may raise anything
        return None
    return data if isinstance(loaded, BaseException) else None


def _by_name(error: BaseException, reduce: Callable[[Any], Any]) -> bytes | None:
    """Its plain pickle; None if there is something in it that has to travel by value."""
    try:
        with io.BytesIO() as file:
            _Pickler(file, reduce).dump(error)
            data = file.getvalue()
        return data if by_name.is_right(data) else None
    except Exception:  # a local class, ...: the second way says what is really wrong
        return None


class _Pickler(pickle.Pickler):
    """A pickler that asks `reduce` first."""

    def __init__(self, file: io.BytesIO, reduce: Callable[[Any], Any]) -> None:
        super().__init__(file, 5)
        self._reduce = reduce

    def reducer_override(self, value: Any) -> Any:
        return self._reduce(value)


def _portable(link: BaseException | None) -> BaseException | None:
    """An exception that belongs to another, or what tells of it if it cannot travel."""
    if link is None or _dump(link, _portable) is not None:
        return link
    name, message = _name(link), payload.message_of(link)
    text = f"{name}: {message}"
    return RemoteError(text, type_name=name, message=message, remote_traceback=text)


def _no_link(_link: BaseException | None) -> None:
    return None


class _Unfaithful(Exception):
    """An exception cannot be put together again from its parts."""


def _reduce(error: BaseException, link: Link) -> tuple[Any, ...]:
    """How to pickle one exception, in the form of `__reduce__` with a state setter."""
    links = link(error.__cause__), link(error.__context__), error.__suppress_context__
    kind = type(error)
    if _pickles_itself(kind) and _copies(error):
        register = copyreg.dispatch_table.get(kind)
        reduced = error.__reduce_ex__(5) if register is None else register(error)
        if isinstance(reduced, tuple):
            make, args, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
            return make, args, (setter, state, links), items, pairs, set_own_state
    base = _builtin_base(kind)
    arguments: Any = base.__reduce__(error)[1]
    for initialize in True, False:
        rebuilt = new(kind, base, arguments, initialize)
        fields = _differing(error, rebuilt)
        set_parts(rebuilt, (error.args, fields, error.__dict__, (None, None, False)))
        if _same(error, rebuilt) and not _differing(error, rebuilt):
            break
    else:
        raise _Unfaithful(f"a {_name(error)} cannot be rebuilt from its parts")
    if _is_group(error):
        arguments = (arguments[0], [link(member) or member for member in arguments[1]])
        args = None
    else:
        args = error.args
    state = args, fields, error.__dict__, links
    return new, (kind, base, arguments, initialize), state, None, None, set_parts


def _is_group(error: BaseException) -> bool:
    return any(each.__name__ == "BaseExceptionGroup" for each in type(error).__mro__)


def _pickles_itself(kind: type) -> bool:
    """Whether a class, or a registered function, says how its exceptions are pickled."""
    builtin = _builtin_base(kind).__mro__
    return kind in copyreg.dispatch_table or any(
        not _OWN_PICKLING.isdisjoint(vars(each)) for each in kind.__mro__ if each not in builtin
    )


def _builtin_base(kind: type[BaseException]) -> type[BaseException]:
    """The class, written in C, that determines how instances are laid out."""
    while not any(isinstance(vars(kind).get(name), _IN_C) for name in _CONSTRUCTION):
        assert kind.__base__ is not None
        kind = kind.__base__
    return kind


def _copies(error: BaseException) -> bool:
    """Whether its own pickling gives an exception that says the same."""
    try:
        return _same(error, copy.copy(error))
    except BaseException:  # the exception's own code, as in `_dump`
        return False


def _same(error: BaseException, other: Any) -> bool:
    return type(other) is type(error) and payload.message_of(other) == payload.message_of(error)


def _differing(error: BaseException, rebuilt: BaseException) -> Fields:
    """The fields of an exception that have another value in what was rebuilt of it so far."""
    found: Fields = []
    for owner, name in _fields(type(error)):
        descriptor = vars(owner)[name]
        try:
            value = descriptor.__get__(error)
        except AttributeError:  # it was never set
            continue
        try:
            other = descriptor.__get__(rebuilt)
            # The members of a group are the same ones, in another tuple.
            if other is value or (type(other) is type(value) is tuple and other == value):
                continue
        except AttributeError:
            pass
        found.append((owner, name, value))
    return found


def _fields(kind: type[BaseException]) -> Iterator[tuple[type, str]]:
    """The C fields and slots of a class, each with the class that has it."""
    for owner in kind.__mro__:
        if owner is BaseException:
            return
        for name, descriptor in vars(owner).items():
            if (
                isinstance(descriptor, (MemberDescriptorType, GetSetDescriptorType))
                and name not in ("__dict__", "__weakref__")
                and (owner, name) not in _LEFT_OUT
            ):
                yield owner, name


# --- what the pickles call --------------------------------------------------------------------


def new(
    kind: type[BaseException],
    base: type[BaseException],
    arguments: tuple[Any, ...],
    initialize: bool,
) -> BaseException:
    """An exception whose class's own constructor has not been called.

    Args:
        kind: its class.
        base: the class written in C under it.
        arguments: for the constructor of `base`.
        initialize: whether to call that one's `__init__` too.
    """
    error = base.__new__(kind, *arguments)
    if initialize:
        base.__init__(error, *arguments)
    return error


def set_parts(error: BaseException, state: tuple[Any, ...]) -> None:
    """Set what `new` has not: `args` (None: they are right), fields, `__dict__` and links."""
    args, fields, attributes, links = state
    if args is not None:
        _set(error, BaseException, "args", args)
    for owner, name, value in fields:
        try:
            _set(error, owner, name, value)
        except (AttributeError, TypeError):  # read-only: found to differ, if it does
            continue
    for name, value in attributes.items():
        # A class that travelled by value has lost its slots, and has attributes in their place.
        slot = getattr(type(error), name, None)
        if isinstance(slot, MemberDescriptorType):
            slot.__set__(error, value)
        else:
            error.__dict__[name] = value
    _set_links(error, links)


def set_own_state(error: BaseException, state: tuple[Any, ...]) -> None:
    """Set what an exception's own pickling tells, and the links."""
    setter, own, links = state
    if setter is not None:
        setter(error, own)
    elif own is not None:
        error.__setstate__(own)
    _set_links(error, links)


def _set_links(error: BaseException, links: tuple[Any, Any, bool]) -> None:
    cause, context, suppressed = links
    if cause is not None:
        _set(error, BaseException, "__cause__", cause)
    if context is not None:
        _set(error, BaseException, "__context__", context)
    _set(error, BaseException, "__suppress_context__", suppressed)


def _set(error: BaseException, owner: type, name: str, value: Any) -> None:
    """Set a field, whatever the class's own `__setattr__` says (a frozen dataclass's refuses)."""
    vars(owner)[name].__set__(error, value)


__all__ = ["dump_failure", "load_failure"]
