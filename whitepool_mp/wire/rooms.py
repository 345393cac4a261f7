"""Memory for large incoming buffers, used again while it is warm.

The kernel takes longer to find and clear a page of memory than a socket takes to fill it. So the
last few large buffers of a process are not given back when their users let go of them, but filled
again. Nothing has to be returned by hand.

Whether memory is free, the memory itself says. It is an anonymous mapping that stays in this
module. Each time it is lent, a new ctypes array is laid over it, and users get a view of that
array. The array exports the mapping's buffer for as long as anything refers to the array, be it a
view, an object made of a view, or the view's `obj`; and a mapping refuses to be resized while its
buffer is exported. No reference is counted, so this holds on any Python and in any thread.

There is no lock, because a signal handler or a finalizer may ask for memory in the middle of any
of this. A thread takes a mapping off the list before it asks whether it is free, and is then the
only one that can lend it.
"""

from __future__ import annotations

import mmap
import os

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import ctypes
    from typing import Any

IN_OWN_MAPPING = 256 * 1024
"""A buffer of at least this many bytes gets a mapping of its own."""
MOST_KEPT = 128 << 20
"""How many bytes of mappings a process keeps at most."""


class Room:
    """A mapping that is lent to one user after the other.

    Attributes:
        size: of how many bytes.
    """

    __slots__ = ("_array", "_mapping", "size")

    def __init__(self, least: int, byte: type[ctypes.c_ubyte]) -> None:
        """A mapping of at least `least` bytes, seen as an array of `byte`.

        Raises:
            OSError, MemoryError, ValueError: there is no such memory.
        """
        self.size = -(-least // mmap.PAGESIZE) * mmap.PAGESIZE
        self._mapping = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel built without them
                pass
        self._array = byte * self.size

    def is_free(self) -> bool:
        """Whether nothing refers any more to what was lent last."""
        try:
            self._mapping.resize(self.size)  # as it is; what counts is whether that is refused
        except (BufferError, OSError):
            return False
        return True

    def lend(self, size: int) -> memoryview:
        """The first `size` bytes, writable."""
        return memoryview(self._array.from_buffer(self._mapping)).cast("B")[:size]


_kept: list[Room] = []
"""The one that was asked for last stands last."""


def room(size: int) -> Any:
    """Writable memory for one incoming buffer; what it contains is nobody's business.

    Raises:
        OSError, MemoryError, ValueError: there is none.
    """
    if size < IN_OWN_MAPPING:
        return bytearray(size)
    try:
        # Late: the manager and a worker's start load this file, but receive nothing large.
        from ctypes import c_ubyte
    except (ImportError, OSError):  # this Python has none, or no descriptor to load it with
        return bytearray(size)
    found = _take(size) or Room(size, c_ubyte)
    lent = found.lend(size)
    _keep(found)
    return lent


def _take(size: int) -> Room | None:
    """A free room of about this size, off the list."""
    for each in tuple(_kept):
        if size <= each.size < 2 * size:
            try:
                _kept.remove(each)
            except ValueError:  # another thread has it
                continue
            if each.is_free():
                return each
            _keep(each)
    return None


def _keep(found: Room) -> None:
    """Put a room on the list; what is dropped for it stays with its users."""
    if found.size > MOST_KEPT:
        return
    _kept.append(found)
    while sum([each.size for each in tuple(_kept)]) > MOST_KEPT:
        try:
            del _kept[0]
        except IndexError:  # other threads took them
            return


def kept() -> bool:
    """Whether any memory is kept."""
    return bool(_kept)


def let_go() -> None:
    """Keep nothing any longer; what is in use stays with its users."""
    _kept.clear()


# A child that filled a page of its parent's would have it copied first, and for what is in the
# hands of threads that the child does not have, there is no end.
os.register_at_fork(after_in_child=let_go)
