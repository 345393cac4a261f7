"""What has to hold at every moment, looked at between the steps of the walk."""

from __future__ import annotations

import collections
import time

import psutil

from walk import actions
from walk.faults import manager
from whitepool_mp import Session

_WHOLE_SECONDS = 40.0
"""The longest pause between two failing starts is 10 s."""


class Watch:
    """Looks at the pool, and resizes it, which decides what may be seen.

    Attributes:
        looks: how often.
        broken: what did not hold.
    """

    def __init__(self, session: Session) -> None:
        self.looks = 0
        self.broken = collections.Counter[str]()
        self._session = session
        self._ceiling = 0

    def look(self) -> None:
        """Check the counts and the workers."""
        self.looks += 1
        now = self._session.status()
        capacity = now.pool_size + now.max_overflow
        alive = now.available + now.leased + now.booting
        # A resize lets leased workers above the new sizes be until they are given back.
        if alive > max(capacity, self._ceiling):
            self.broken[f"{alive} workers live, of {capacity} allowed"] += 1
        self._ceiling = max(alive, capacity)
        rows = [
            row for row in self._session.workers() if row.state in ("idle", "leased", "booting")
        ]
        for name, values in (
            ("pid", [row.pid for row in rows if row.pid is not None]),
            ("slot", [row.slot for row in rows]),
            ("lease", [row.lease for row in rows if row.lease is not None]),
        ):
            if len(set(values)) != len(values):
                self.broken[f"two workers have the same {name}"] += 1

    def resize(self, size: int, overflow: int) -> None:
        """Have the pool resized."""
        self._ceiling = max(self._ceiling, size + overflow)
        self._session.resize(size, overflow)

    def whole(self) -> str:
        """Have the pool become whole again; what is missing, or ""."""
        self.resize(actions.SIZE, actions.OVERFLOW)
        until = time.monotonic() + _WHOLE_SECONDS
        while True:
            now = self._session.status()
            busy = now.leased or now.waiting or now.booting or now.overflow or now.retiring
            if now.available == now.pool_size and not busy:
                break
            if time.monotonic() > until:
                return f"not whole after {_WHOLE_SECONDS:g} s: {now}"
            time.sleep(0.01)  # a pool tells its state when it is asked, and only then
        rows = self._session.workers()
        living = {row.pid for row in rows if row.pid is not None and psutil.pid_exists(row.pid)}
        if len(living) != actions.SIZE:
            return f"{len(living)} of {actions.SIZE} workers are alive: {rows}"
        return ""

    def descriptors(self) -> int:
        """How many descriptors the manager has."""
        return psutil.Process(manager(self._session)[0]).num_fds()
