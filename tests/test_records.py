"""A `Record` is what `typing.NamedTuple` would have made of it."""

from __future__ import annotations

import copy
import pickle
from typing import NamedTuple

import pytest

from whitepool_mp.records import Record


class Ours(Record):
    """Three fields."""

    first: int
    second: str = "two"
    third: float | None = None

    def double(self) -> int:
        """Twice the first."""
        return 2 * self.first


class Theirs(NamedTuple):
    first: int
    second: str = "two"
    third: float | None = None


class Nothing(Record):
    """No fields."""


ARGUMENTS: list[tuple[tuple[object, ...], dict[str, object]]] = [
    ((1,), {}),
    ((1, "x", 2.0), {}),
    ((1,), {"third": 3.0}),
    ((), {"second": "y", "first": 5}),
]


@pytest.mark.parametrize(("args", "kwargs"), ARGUMENTS)
def test_it_is_made_read_and_shown_like_a_named_tuple(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    ours, theirs = Ours(*args, **kwargs), Theirs(*args, **kwargs)  # type: ignore[arg-type]
    assert ours == theirs
    assert (ours.first, ours.second, ours.third) == tuple(theirs)
    assert ours._asdict() == theirs._asdict()
    assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
    assert ours._replace(first=7) == theirs._replace(first=7)
    assert ours.double() == 2 * theirs.first
    assert hash(ours) == hash(theirs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1, "x", 2.0, 3), {}), ((1,), {"fourth": 4}), ((1,), {"first": 2})],
)
def test_wrong_arguments_are_refused_at_the_first_call_and_later(
    args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    class New(Record):
        first: int
        second: str = "two"
        third: float | None = None

    for _ in range(2):
        with pytest.raises(TypeError):
            New(*args, **kwargs)  # type: ignore[arg-type]


def test_what_it_says_of_itself() -> None:
    assert (Ours._fields, Ours._field_defaults) == (Theirs._fields, Theirs._field_defaults)
    assert Ours.__match_args__ == Theirs.__match_args__
    assert Ours.__mro__ == (Ours, tuple, object)
    assert Ours._make((1, "x", 2.0)) == Theirs(1, "x", 2.0)
    assert Ours.__doc__ == "Three fields."
    with pytest.raises(ValueError, match="fourth"):
        Ours(1)._replace(fourth=4)  # type: ignore[call-arg]


def test_it_cannot_be_changed_and_carries_nothing_else() -> None:
    record = Ours(1)
    with pytest.raises(AttributeError):
        record.first = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        record.other = 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_can_be_pickled_and_copied(protocol: int) -> None:
    record = Ours(1, "x", 2.0)
    for twin in (pickle.loads(pickle.dumps(record, protocol)), copy.copy(record)):
        assert type(twin) is Ours
        assert twin == record


def test_one_without_fields_is_falsy_and_of_its_own_type() -> None:
    assert not Nothing()
    assert type(Nothing()) is Nothing
    assert repr(Nothing()) == "Nothing()"
