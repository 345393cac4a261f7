"""The results of many short calls of one function, on their way through shared memory."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

from whitepool_mp.wire import messages
from whitepool_mp.wire.messages import PLAIN
from whitepool_mp.wire.pages import FIRST, OUTBOX, OWNER, RESULTS, SENDINGS, Page

LARGEST_GROUP = 32
"""How many calls are begun together at most; these cannot be taken back from each other."""
_LONGEST = 256
"""Bytes of a plain result's pickle; a longer one is answered by itself."""
_ENOUGH = OUTBOX - LARGEST_GROUP * _LONGEST
_HELD_BACK = 500_000
"""Nanoseconds for which results wait for more of them."""


class Bulk:
    """Runs calls and keeps their plain results in shared memory until they are sent.

    Args:
        page: the worker's page.
        lease: under which they are called.
        first: the first call's number.

    Attributes:
        took: nanoseconds that the calls took whose results lie there.
        odd: the result of the call after those, if it is not plain or too long.
    """

    def __init__(self, page: Page, lease: int, first: int) -> None:
        self._page = page
        self._first = first
        self._count = 0
        self._end = 0
        self._since = time.perf_counter_ns()
        self.took = 0
        self.odd: Any = None
        page.words[OWNER] = lease
        page.words[FIRST] = first

    def run(
        self, function: Callable[[Any], Any], values: Sequence[Any], forked: Callable[[], bool]
    ) -> tuple[int, BaseException | None]:
        """Call a function with each of these, up to the first that has no plain result.

        Returns:
            How many plain results there are, and what the call after those raised, if it did.
        """
        words, outbox, dumps = self._page.words, self._page.outbox, pickle.dumps
        before = count = self._count
        end = self._end
        problem = None
        try:
            for value in values:
                result = function(value)
                if type(result) not in PLAIN or forked():
                    self.odd = result
                    break
                data = dumps(result, 5)
                size = len(data)
                if size > _LONGEST:
                    self.odd = result
                    break
                outbox[end : end + size] = data
                end += size - 1  # the next one takes the place of the byte that ends a pickle
                count += 1
                words[RESULTS] = count << 32 | end
        except BaseException as error:
            problem = error
        self._count, self._end = count, end
        return count - before, problem

    @property
    def due(self) -> bool:
        """Whether it is time to send what lies there."""
        return self._end > _ENOUGH or time.perf_counter_ns() - self._since > _HELD_BACK

    def message(self) -> bytes | None:
        """A message with all results that lie there, if any do."""
        if not self._count:
            return None
        pickles = self._page.outbox[: self._end]
        return messages.pack_results(self._first, self.took, self._count, pickles)

    def sent(self, following: int) -> None:
        """The message was sent; the next result that is kept will be that of call `following`."""
        words = self._page.words
        words[RESULTS] = 0
        words[FIRST] = self._first = following
        words[SENDINGS] += 1  # last, and before anything is written over what was sent
        self._count = self._end = self.took = 0
        self._since = time.perf_counter_ns()
