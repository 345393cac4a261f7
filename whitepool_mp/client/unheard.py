"""What was said to the manager, and it may not have heard, should it be killed now.

A manager hears what comes over one connection in order, so its answer to a request shows that it
has heard all that was said before that one. Whatever is left is said again to the next manager.
"""

from __future__ import annotations

from collections import deque

from whitepool_mp.wire import frames


class Unheard:
    """The record of one connection. Who sends over it adds to both parts before it sends.

    Attributes:
        asked: the frames of the requests whose answers are waited for, by number; who waits takes
            its own out.
        said: the frames that have no answer, and after which request each was said.
    """

    __slots__ = ("asked", "said")

    def __init__(self) -> None:
        self.asked: dict[int, bytes] = {}
        self.said: deque[tuple[int, bytes]] = deque()

    def answered(self, number: int) -> None:
        """Request `number` was answered: what was said before it has been heard."""
        said = self.said
        while said and said[0][0] < number:
            said.popleft()

    def again(self) -> tuple[list[bytes], list[bytes]]:
        """What to say to the next manager.

        Returns:
            What has no answer (a checkin); and what is to come after that: what is waited for, and
            the frame that says that this was all.
        """
        asked = [*self.asked.values(), frames.request(frames.REJOINED, 0)]
        # Of a copy: a lease that is collected meanwhile may add to it.
        return [data for _, data in list(self.said)], asked
