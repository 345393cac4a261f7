"""The results of many short calls of one function, on their way through shared memory.

Numbers lie there as they are, eight bytes each, behind each other. Behind the last one lies a mark,
a number drawn at random, so that each result is safe, and counted, by the one write that puts it in
the mark's place. Other plain results lie there pickled, and are counted by a write of their own.
"""

from __future__ import annotations

import functools
import os
import time

from whitepool_mp.wire import messages
from whitepool_mp.wire.messages import PLAIN
from whitepool_mp.wire.pages import (
    FIRST,
    FLOATS,
    INTEGERS,
    KIND,
    MARK,
    OUTBOX,
    OWNER,
    PICKLES,
    RESULTS,
    SENDINGS,
    Page,
)

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Callable, Sequence
    from typing import Any
else:
    import _pickle as pickle  # as in `wire.messages`

LARGEST_GROUP = 128
"""How many calls are begun together at most; these cannot be taken back from each other."""
_LONGEST = 256
"""Bytes of a plain result's pickle; a longer one is answered by itself."""
_ENOUGH = OUTBOX - LARGEST_GROUP * _LONGEST
_HELD_BACK = 4_000_000
"""Nanoseconds for which results wait for more of them."""
_MOST_TURNS = 3
"""How often results of one bulk may turn from one kind into another until all are pickled."""
_MARKS = 16
_KINDS = {int: INTEGERS, float: FLOATS}


@functools.cache
def _marks() -> bytes:
    """This process's mark, as often as it is written at once."""
    return os.urandom(8) * (2 * LARGEST_GROUP + _MARKS)


class Bulk:
    """Runs calls and keeps their plain results in shared memory until they are sent.

    Args:
        page: the worker's page.
        lease: under which they are called.
        first: the first call's number.

    Attributes:
        took: nanoseconds that the calls took whose results lie there.
        odd: the result of the call after those, if it is of another kind than they.
    """

    def __init__(self, page: Page, lease: int, first: int) -> None:
        self._page = page
        self._outbox = page.outbox[:]
        self._integers = page.outbox.cast("q")
        self._floats = page.outbox.cast("d")
        self._first = first
        self._kind = INTEGERS
        self._turns = 0
        self._count = 0
        self._end = 0  # of the bytes, if they are pickled
        self._marked = 0  # how many places have been marked
        self._since = time.perf_counter_ns()
        self.took = 0
        self.odd: Any = None
        self._page.words[OWNER] = lease
        self._page.words[FIRST] = first
        self._page.words[MARK] = int.from_bytes(_marks()[:8], "little")

    def run(
        self, function: Callable[[Any], Any], values: Sequence[Any]
    ) -> tuple[int, BaseException | None]:
        """Call a function with each of these, up to the first whose result is of another kind.

        Returns:
            How many results were kept, and what the call after those raised, if it did.
        """
        if self._kind == PICKLES:
            return self._run_pickled(function, values)
        exact: type = int
        numbers: memoryview[Any] = self._integers
        if self._kind == FLOATS:
            exact, numbers = float, self._floats
        before = count = self._count
        if count + len(values) >= self._marked:
            self._mark(len(values))
        problem = None
        try:
            for value in values:
                result = function(value)
                if type(result) is not exact:
                    self.odd = result
                    break
                try:
                    numbers[count] = result
                except ValueError:  # too large for eight bytes; or this is a copy (`forbid`)
                    self.odd = result
                    break
                count += 1
        except BaseException as error:
            problem = error
        self._count = count
        return count - before, problem

    def _mark(self, count: int) -> None:
        """See that the mark lies behind whatever number is the last of so many more."""
        begin = self._count
        end = self._marked = min(begin + 2 * count + _MARKS, OUTBOX // 8)
        self._outbox[8 * begin : 8 * end] = _marks()[: 8 * (end - begin)]
        self._page.words[KIND] = self._kind

    def _run_pickled(
        self, function: Callable[[Any], Any], values: Sequence[Any]
    ) -> tuple[int, BaseException | None]:
        before = self._count
        problem = None
        try:
            for value in values:
                result = function(value)
                if not self._keep_pickled(result):
                    self.odd = result
                    break
        except BaseException as error:
            problem = error
        return self._count - before, problem

    def _keep_pickled(self, result: Any) -> bool:
        if type(result) not in PLAIN:
            return False
        data = pickle.dumps(result, 5)
        if len(data) > _LONGEST:
            return False
        end = self._end + len(data)
        try:
            self._outbox[self._end : end] = data
        except ValueError:  # this is a copy
            return False
        self._end = end - 1  # the next one takes the place of the byte that ends a pickle
        self._count += 1
        self._page.words[RESULTS] = self._count << 32 | self._end
        return True

    def turn(self) -> bool:
        """Keep the odd result after all, now that nothing lies there: results of its kind follow.

        Returns:
            False if it has to be answered by itself.
        """
        result, self.odd = self.odd, None
        self._turns += 1
        self._marked = 0
        self._kind = _KINDS.get(type(result), PICKLES) if self._turns < _MOST_TURNS else PICKLES
        if self._kind == PICKLES:
            self._page.words[KIND] = PICKLES
            kept = self._keep_pickled(result)
        else:
            kept = self.run(lambda result: result, (result,))[0] == 1
        if not kept:
            self.odd = result
        return kept

    def due(self, now: int) -> bool:
        """Whether it is time to send what lies there; `now` by the performance counter."""
        used = self._end if self._kind == PICKLES else 8 * self._count
        return used > _ENOUGH or now - self._since > _HELD_BACK

    def message(self) -> bytes | None:
        """A message with all results that lie there, if any do."""
        if not self._count:
            return None
        end = self._end if self._kind == PICKLES else 8 * self._count
        data = self._outbox[:end]
        return messages.pack_results(self._first, self.took, self._count, self._kind, data)

    def sent(self, following: int) -> None:
        """The message was sent; the next result that is kept will be that of call `following`."""
        words = self._page.words
        words[KIND] = words[RESULTS] = 0
        words[FIRST] = self._first = following
        words[SENDINGS] += 1  # last, and before anything is written over what was sent
        if self._kind == PICKLES:
            words[KIND] = PICKLES
        self._count = self._end = self._marked = self.took = 0
        self._since = time.perf_counter_ns()

    def forbid(self) -> None:
        """In a copy of this process: nothing can be kept from now on."""
        for view in (self._outbox, self._integers, self._floats):
            view.release()
