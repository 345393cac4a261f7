"""Pickling by value: cloudpickle, but code keeps the name of the file that it is from.

Since 3.1 cloudpickle writes "<dynamic-code>" in its place, for pickles that are the same wherever a
function was defined. Here the name is wanted: tracebacks, and the stack of a worker that crashed,
show it. A module of its own, since cloudpickle is imported only where something needs it.
"""

from __future__ import annotations

import io
from collections import ChainMap
from types import CodeType

import cloudpickle

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Mapping
    from typing import Any, ClassVar


def dumps(
    value: Any,
    sort: Callable[[pickle.PickleBuffer], bool] | None = None,
    reduce: Callable[[Any], Any] | None = None,
) -> bytes:
    """Pickle a value, with what no module holds by value.

    Args:
        value: what to pickle.
        sort: told of each buffer; those for which it returns False are left out of the pickle.
        reduce: asked first how an object is reduced; it may say `NotImplemented`.
    """
    with io.BytesIO() as file:
        if reduce is None:
            pickler = _Pickler(file, protocol=5, buffer_callback=sort)
        else:
            pickler = _Reducing(file, protocol=5, buffer_callback=sort)
            pickler.reduce = reduce
        pickler.dump(value)
        return file.getvalue()


def _reduce_code(code: CodeType) -> tuple[Any, ...]:
    make, args = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return from_file, (code.co_filename, make, args)


def from_file(name: str, make: Callable[..., CodeType], args: tuple[Any, ...]) -> CodeType:
    """Code as cloudpickle makes it again, from the file of this name."""
    return make(*args).replace(co_filename=name)


_own, *_others = cloudpickle.Pickler.dispatch_table.maps


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    # Flat, as cloudpickle's own: each object of a type that is not in there is looked up in all.
    dispatch_table: ClassVar[Mapping[Any, Any]] = ChainMap(
        {**_own, CodeType: _reduce_code}, *_others
    )


class _Reducing(_Pickler):
    """One that is told how to reduce some objects; asking costs a call for each."""

    reduce: Callable[[Any], Any]

    def reducer_override(self, value: Any) -> Any:
        reduced = self.reduce(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced
