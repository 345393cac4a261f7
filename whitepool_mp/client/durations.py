"""What an engine knows of how long the calls of each function take.

    an answer, and how long it took --learn--> Durations.seconds --> how much to send ahead

`endings` learns here from what the workers measured, and `dispatch` decides by it.
"""

from __future__ import annotations

CALL_SECONDS = 10e-6
"""What a call costs besides its function's own time."""
BULK_SECONDS = 1e-6
"""The same for a call of a BULK."""
_MOST_NAMES = 4096


class Durations:
    """How long calls have taken lately.

    Attributes:
        seconds: what a call takes, by what its task is `known_as`. A plain dictionary, since it is
            looked into for every task that is sent.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def learn(self, name: str, seconds: float) -> None:
        """A call of this function took so long."""
        known = self.seconds.get(name)
        if known is None and len(self.seconds) >= _MOST_NAMES:
            self.seconds.clear()
        self.seconds[name] = seconds if known is None else known + (seconds - known) * 0.2
