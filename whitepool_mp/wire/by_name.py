"""Pickling by name: plain pickle, as far as it is right.

It is not where a pickle names `__main__`, which is another module in the worker, or
multiprocessing, whose objects plain pickle takes apart wrongly (a connection becomes the number of
a descriptor), or where a reducer is registered with multiprocessing that plain pickle would pass
over. The standard library's own reducers are for types that plain pickle refuses, or that a pickle
names by a module of multiprocessing. Those of others, and those for shared ctypes, may be for any
type.

That is asked for each call, so it looks at the table of reducers itself. The table has no public
name: without it, each call looks at a copy.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Mapping
    from typing import Any
else:
    import _pickle as pickle  # as in `wire.messages`

_modules = sys.modules
_table: Mapping[type, Any] | None = None
_seen = 0
_foreign: tuple[type, ...] = ()


def dumps(value: Any, beside: Callable[[pickle.PickleBuffer], Any] | None = None) -> bytes | None:
    """A value's plain pickle; None if there is something in it that has to travel otherwise.

    Args:
        value: what to pickle.
        beside: told of each buffer, as `pickle`'s `buffer_callback`.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    kinds = _foreign_kinds()
    if kinds:
        import copyreg
        import io

        file = io.BytesIO()
        pickler = pickle.Pickler(file, 5, buffer_callback=beside)
        pickler.dispatch_table = {**copyreg.dispatch_table, **dict.fromkeys(kinds, _refuse)}
        pickler.dump(value)
        data = file.getvalue()
    else:
        data = pickle.dumps(value, 5, buffer_callback=beside)
    return data if is_right(data) else None


def is_right(data: bytes) -> bool:
    """Whether a plain pickle names nothing that has to travel otherwise."""
    return b"__main__" not in data and b"multiprocessing" not in data


def _refuse(value: Any) -> Any:
    """The reducer of types that multiprocessing has a reducer for."""
    raise TypeError(f"a {type(value).__qualname__} is pickled in another way")


def _foreign_kinds() -> tuple[type, ...]:
    """The types, other than the standard library's own, for which there are reducers."""
    global _table, _seen, _foreign
    table = _table
    if table is None:
        if "multiprocessing.reduction" not in _modules:
            return ()
        from multiprocessing.reduction import ForkingPickler

        table = getattr(ForkingPickler, "_extra_reducers", None)
        if table is None:
            return tuple(filter(_is_foreign, reducers()))
        _table = table
    if len(table) != _seen:
        _seen = len(table)
        _foreign = tuple(filter(_is_foreign, reducers()))
    return _foreign


def _is_foreign(kind: type) -> bool:
    module = kind.__module__
    return module not in ("array", "builtins", "functools", "socket") and not module.startswith(
        "multiprocessing."
    )


def reducers() -> dict[type, Any]:
    """All reducers that are registered with multiprocessing, but for those of bound methods and
    partials, which pickle in the same way without."""
    import copyreg
    import io
    from multiprocessing.reduction import ForkingPickler

    usual = copyreg.dispatch_table
    return {
        kind: reduce
        for kind, reduce in ForkingPickler(io.BytesIO()).dispatch_table.items()
        if usual.get(kind) is not reduce
        and not (
            kind.__module__ in ("builtins", "functools")
            and getattr(reduce, "__module__", None) == "multiprocessing.reduction"
        )
    }
