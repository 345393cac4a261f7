"""What jobs are given and give back: of any size, and the same again from its description alone.

The bytes are a pattern whose length is a prime number, so that no part of them is what stands a
whole number of pages, or of powers of two, further on: what was mixed up does not go unseen.
"""

from __future__ import annotations

import functools
import os
import random
from typing import Any, NamedTuple

_PRIME = 4093
_EDGES = (16 * 1024, 32 * 1024, 64 * 1024, 256 * 1024)
"""Sizes at which something else is done with a payload; tried from both sides."""


class Spec(NamedTuple):
    """A payload's description: its kind, about how many bytes, and which."""

    kind: str
    size: int
    seed: int


ARRAYS = "WHITEPOOL_CHAOS_ARRAYS"
"""The environment variable that says whether there are to be NumPy's arrays among them."""


@functools.lru_cache(maxsize=1)
def _kinds() -> tuple[str, ...]:
    arrays = ("array",) if os.environ.get(ARRAYS) == "1" else ()
    return "bytes", "bytearray", "nested", *arrays


def prepare() -> None:
    """Import what payloads need: to be done before threads do it all at once."""
    if "array" in _kinds():
        import numpy  # noqa: F401


def draw(rng: random.Random, largest: int = 48 * 2**20) -> Spec:
    """A payload: mostly a small one, now and then tens of MiB.

    Args:
        rng: decides.
        largest: the most bytes.
    """
    kind, seed, luck, at = rng.choice(_kinds()), rng.randrange(64), rng.random(), rng.random()
    if luck < 0.05:
        size = 0
    elif luck < 0.80:
        size = int(300 * at)
    elif luck < 0.85:
        size = _EDGES[int(at * len(_EDGES))] + rng.choice((-1, 0, 1))
    elif luck < 0.97:
        size = int(64 * 1024 * at)
    elif luck < 0.998:
        size = int(2**20 * at)
    elif luck < 0.9997:
        size = int(8 * 2**20 * at)
    else:
        size = int(48 * 2**20 * at)
    return Spec(kind, min(size, largest), seed)


@functools.lru_cache(maxsize=64)
def _pattern(seed: int) -> bytes:
    return random.Random(seed).randbytes(_PRIME)


def _fill(size: int, seed: int) -> bytes:
    pattern = _pattern(seed)
    return pattern[:size] if size <= _PRIME else (pattern * (size // _PRIME + 1))[:size]


def make(spec: Spec) -> Any:
    """The payload of a description."""
    kind, size, seed = spec
    if kind == "array":
        import numpy

        items = numpy.frombuffer(bytearray(_fill(size - size % 16, seed)), numpy.uint64)
        return items.reshape(2, -1) if size >= 16 else numpy.empty((2, 0), numpy.uint64)
    data = _fill(size, seed)
    if kind == "bytearray":
        return bytearray(data)
    if kind == "nested":
        third = size // 3
        shared = [data[:third], bytearray(data[third : 2 * third])]
        text = data[2 * third :].hex() if size < 2**16 else data[2 * third :]
        return {"seed": seed, "once": shared, "again": shared, ("text", None): (text, 1.5, -1)}
    return data


def same(spec: Spec, value: Any) -> bool:
    """Whether this is the payload of that description, in its type and its content."""
    wanted = make(spec)
    if type(value) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return bool(value == wanted) and value["once"] is value["again"]
    if spec.kind == "array":
        alike = value.dtype == wanted.dtype and value.shape == wanted.shape
        return bool(alike and (value == wanted).all())
    return bool(value == wanted)
