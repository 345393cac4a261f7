"""Named tuples for processes that have to be up soon.

    class Spawn(Record):
        worker: int
        slot: int = 0

A `Record` is what `typing.NamedTuple` would make of it, and a type checker takes it for that. But
importing `typing`, and having source text compiled for each of some thirty types, takes longer than
all else that a manager does before its first worker: here a constructor is made when it is first
called.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import NamedTuple as Record
else:
    from collections import _tuplegetter  # what `collections.namedtuple` reads fields with

    class _Maker(type):
        """Makes plain subclasses of tuple, which nothing of `Record` is left in."""

        def __new__(maker, name, bases, body):
            if not bases:
                return super().__new__(maker, name, bases, body)
            fields = tuple(body.get("__annotations__", ()))
            defaults = {field: body[field] for field in fields if field in body}
            getters = {field: _tuplegetter(at, "") for at, field in enumerate(fields)}
            return type(
                name,
                (tuple,),
                {
                    **_SHARED,
                    **body,
                    **getters,
                    "__slots__": (),
                    "__match_args__": fields,
                    "_fields": fields,
                    "_field_defaults": defaults,
                },
            )

    class Record(metaclass=_Maker):
        """The base to write; see above."""

    def _new(cls, /, *args, **kwargs):
        """The first call: put a constructor with the fields as parameters in the place of this."""
        home = next(each for each in cls.__mro__ if "_fields" in vars(each))
        names = "".join(f"{field}, " for field in home._fields)
        new = eval(f"lambda cls, {names}: new(cls, ({names}))", {"new": tuple.__new__})
        new.__defaults__ = tuple(home._field_defaults.values())
        new.__name__ = "__new__"
        new.__qualname__ = f"{home.__qualname__}.__new__"
        home.__new__ = staticmethod(new)
        return new(cls, *args, **kwargs)

    def _make(cls, values):
        return cls(*values)

    def _replace(self, /, **changes):
        values = [changes.pop(*pair) for pair in zip(self._fields, self, strict=True)]
        if changes:
            raise ValueError(f"{type(self).__name__} has no fields {list(changes)!r}")
        return type(self)(*values)

    def _asdict(self):
        return dict(zip(self._fields, self, strict=True))

    def _repr(self):
        told = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
        return f"{type(self).__name__}({told})"

    def _getnewargs(self):
        return tuple(self)

    _SHARED = {
        "__new__": _new,
        "__repr__": _repr,
        "__getnewargs__": _getnewargs,
        "_make": classmethod(_make),
        "_replace": _replace,
        "_asdict": _asdict,
    }


__all__ = ["Record"]
