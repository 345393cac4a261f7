"""Pickling with all that multiprocessing knows how to send: connections, queues, locks, values.

multiprocessing sends such things to a child that it starts. For as long as one value is pickled,
this stands in for that child, and so is asked for each descriptor that the value needs: that
becomes an `Outgoing`'s. On the other side the reducers ask for them again (`Arrived`).

Guarantees: no descriptor is named by its number. What would not be there any more when it is
unpickled is refused: a lock without a name, memory of a process that does not know who uses it. A
module of its own, since it is imported only where something needs it.
"""

from __future__ import annotations

import sys
from multiprocessing import context

from whitepool_mp.wire import by_name, by_value
from whitepool_mp.wire.passed import Arrived, NeedsDescriptors, Outgoing

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable
    from typing import Any


def dumps(
    value: Any,
    sort: Callable[[pickle.PickleBuffer], bool] | None = None,
    *,
    give: bool,
    alone: bool = False,
    reduce: Callable[[Any], Any] | None = None,
) -> tuple[bytes, Outgoing | None]:
    """Pickle a value.

    Args:
        value: what to pickle.
        sort: as for `by_value.dumps`.
        give: whether it lives on here until the call has ended. A result does not.
        alone: whether nothing can travel beside the pickle.
        reduce: as for `by_value.dumps`.

    Returns:
        The pickle, and what travels with it, if anything does.

    Raises:
        NeedsDescriptors: it needs descriptors, and is to travel alone; or too many.
        Exception: whatever the value's own pickling raises.
    """
    outgoing = Outgoing(value)
    before = context.get_spawning_popen()
    child: Any = _Child(outgoing, alone)
    context.set_spawning_popen(child)  # this thread's
    try:
        data = by_value.dumps(value, sort, _Reducers(outgoing, give, reduce))
    except BaseException:
        outgoing.close()
        raise
    finally:
        context.set_spawning_popen(before)
    return data, outgoing if (outgoing.fds or outgoing.lends) and not alone else None


class _Child:
    """As much of a process that is being started as the reducers ask for."""

    def __init__(self, outgoing: Outgoing, alone: bool) -> None:
        self._outgoing = outgoing
        self._alone = alone

    def duplicate_for_child(self, fd: int) -> int:
        """Have a descriptor travel; its place."""
        if self._alone:
            raise NeedsDescriptors("a descriptor travels only with a call, its result or a factory")
        return self._outgoing.add(fd)

    def DupFd(self, place: int) -> _Sent:
        """What is pickled for it."""
        return _Sent(place)


class _Sent:
    """A descriptor in a pickle."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __reduce__(self) -> Any:
        return Arrived, (self._place,)


def _part(module: str, name: str) -> Any:
    """A class of multiprocessing; if its module is not in use, nothing is an instance of it."""
    return getattr(sys.modules.get(f"multiprocessing.{module}"), name, ())


class _Reducers:
    """Knows the registered reducers, and how to reduce what has none or a wrong one.

    Args:
        outgoing: told whether something is pickled that is of use only as long as the value lives.
        give: as for `dumps`.
        first: asked first; it may say `NotImplemented`.
    """

    def __init__(
        self, outgoing: Outgoing, give: bool, first: Callable[[Any], Any] | None = None
    ) -> None:
        self._outgoing = outgoing
        self._give = give
        self._first = first
        self._reducers = by_name.reducers()
        self._locks = _part("synchronize", "SemLock")
        self._blocks = _part("heap", "BufferWrapper")
        self._memory = _part("shared_memory", "SharedMemory")
        self._lists = _part("shared_memory", "ShareableList")

    def __call__(self, obj: Any) -> Any:
        if self._first is not None:
            reduced = self._first(obj)
            if reduced is not NotImplemented:
                return reduced
        kind = type(obj)
        reduce = self._reducers.get(kind)
        if reduce is not None:
            if getattr(reduce, "__module__", None) != "multiprocessing.sharedctypes":
                return reduce(obj)
            try:
                return reduce(obj)
            except AttributeError:  # a ctypes object of this type that is not in shared memory
                return NotImplemented
        if isinstance(obj, self._locks):
            self._lend(obj)
            _check_name(obj)
        elif isinstance(obj, self._blocks):
            self._lend(obj)
        elif self._give and (kind is self._memory or kind is self._lists):
            self._outgoing.lends = True
            return attach, (kind is self._lists, *_name(obj))
        return NotImplemented

    def _lend(self, obj: Any) -> None:
        if not self._give:
            raise TypeError(
                f"a {type(obj).__qualname__} of multiprocessing lives in the process that made it: "
                "make it in the process that calls, and hand it over as an argument"
            )
        self._outgoing.lends = True


def _check_name(lock: Any) -> None:
    """See that a lock has a name by which another process finds it."""
    try:
        nameless = lock.__getstate__()[-1] is None  # in older Pythons
        reason = None
    except RuntimeError as error:
        nameless, reason = True, error
    if nameless:
        raise TypeError(
            f"a {type(lock).__qualname__} that multiprocessing made for processes that are forked "
            'has no name by which others find it: make it with multiprocessing.get_context("spawn")'
        ) from reason


def _name(shared: Any) -> tuple[str, int]:
    """The name and size of shared memory, or of that which a list is in."""
    memory = getattr(shared, "shm", shared)
    return memory.name, memory.size


def attach(is_list: bool, name: str, size: int) -> Any:
    """Shared memory, or a list in it, of another process, whose it stays.

    The standard library has each process that attaches itself remove the memory at its end.
    """
    from multiprocessing import resource_tracker
    from multiprocessing.shared_memory import ShareableList, SharedMemory

    if sys.version_info >= (3, 13) and not is_list:
        return SharedMemory(name, create=False, size=size, track=False)
    found: Any = ShareableList(name=name) if is_list else SharedMemory(name, False, size)
    resource_tracker.unregister(f"/{name}", "shared_memory")
    if sys.version_info >= (3, 13):  # else `unlink` would have it told off the list once more
        found.shm.close()
        found.shm = SharedMemory(name, track=False)
    return found
