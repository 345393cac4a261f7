"""Memory for large incoming buffers, used again while it is warm.

The kernel takes longer to find and clear a page of memory than a socket takes to fill it. So the
last few large buffers of a process are not given back when their users let go of them, but filled
again. Nothing has to be returned by hand: a buffer that nobody but this module refers to is free.
"""

from __future__ import annotations

import mmap
import os
import sys
from _thread import allocate_lock

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Any

IN_OWN_MAPPING = 256 * 1024
"""A buffer of at least this many bytes gets a mapping of its own."""
MOST_KEPT = 128 << 20
"""How many bytes of mappings a process keeps at most."""

_lock = allocate_lock()
_kept: list[mmap.mmap] = []


def room(size: int) -> Any:
    """Writable memory for one incoming buffer; what it contains is nobody's business.

    Raises:
        OSError, ValueError: there is none.
    """
    if size < IN_OWN_MAPPING:
        return bytearray(size)
    with _lock:
        for index in range(len(_kept)):
            mapping = _kept[index]
            # Known here by the list, this name and the question itself.
            if size <= len(mapping) < 2 * size and sys.getrefcount(mapping) == 3:
                _kept.append(_kept.pop(index))
                return memoryview(mapping)[:size]
        mapping = _map(size)
        if len(mapping) <= MOST_KEPT:
            _kept.append(mapping)
            while sum(map(len, _kept)) > MOST_KEPT:
                del _kept[0]  # whoever uses it goes on doing so
        return memoryview(mapping)[:size]


def _map(size: int) -> mmap.mmap:
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    mapping = mmap.mmap(-1, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel built without them
            return mapping
    return mapping


def kept() -> bool:
    """Whether any memory is kept."""
    return bool(_kept)


def let_go() -> None:
    """Keep nothing any longer; what is in use stays with its users."""
    with _lock:
        _kept.clear()


def _after_fork_in_child() -> None:
    global _lock
    _lock = allocate_lock()  # its holder may have stayed in the parent


os.register_at_fork(after_in_child=_after_fork_in_child)
