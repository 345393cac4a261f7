"""What `lease.get()` gives: an object in a worker, as far as its methods go."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whitepool_mp.aio_lease import AsyncLease
    from whitepool_mp.lease import Lease


class Proxy:
    """An object in a worker; calling its methods runs them there (an `AsyncLease`'s are awaited).

    Only method calls go through: for anything else, `lease.call(lambda resource: ...)`. Arguments
    and results are pickled; a result that cannot be stays there behind another proxy.
    """

    __slots__ = ("_lease", "_target", "_title")

    def __init__(self, lease: Lease | AsyncLease, target: int, title: str) -> None:
        self._lease = lease
        self._target = target
        self._title = title

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(
                f"{name} of an object in a worker cannot be used through a proxy: "
                "use lease.call(lambda resource: ...)"
            )
        lease, target = self._lease, self._target

        def method(*args: Any, **kwargs: Any) -> Any:
            return lease._method(target, name, args, kwargs)

        method.__name__ = name
        return method

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a proxy of an object in worker {self._lease.slot} cannot leave this process: its "
            "lease is exclusive"
        )

    def __repr__(self) -> str:
        return f"<Proxy of {self._title} in {self._lease!r}>"
