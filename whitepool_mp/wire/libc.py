"""Functions of the C library that Python has no name for, without the `ctypes` module.

`ctypes` sets up a whole world of types; with that, asking for two functions that take and return
numbers would be a good part of each process's start.
"""

from __future__ import annotations

from _ctypes import (
    FUNCFLAG_CDECL,
    FUNCFLAG_USE_ERRNO,
    CFuncPtr,
    _SimpleCData,
    byref,
    dlopen,
    dlsym,
    get_errno,
)

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    _Integer = _SimpleCData[int]
else:
    _Integer = _SimpleCData


class _Int(_Integer):
    _type_ = "i"


class _Address(_Integer):
    _type_ = "P"


class _Function(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Int


class _Allocator(CFuncPtr):
    _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO
    _restype_ = _Address


def function(name: str) -> Callable[..., Any]:
    """A function of this process's C library that takes integers, or bytes for a pointer to them,
    and returns an integer; see `get_errno`."""
    return _Function(dlsym(dlopen(None, 0), name))  # type: ignore[arg-type]


def malloc(size: int) -> int | None:
    """The address of new memory that is never freed, or None."""
    address: int | None = _Allocator(dlsym(dlopen(None, 0), "malloc"))(size)  # type: ignore[arg-type]
    return address


def integer() -> tuple[Any, Any]:
    """Room for an integer that a function writes: where its `value` is, and what to pass."""
    room = _Int()
    return room, byref(room)


__all__ = ["function", "get_errno", "integer", "malloc"]
