"""Many jobs at once: what `map` reads, sends and hands out."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from whitepool_mp.client.answers import open_answer
from whitepool_mp.client.tasks import Task
from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import messages, passed, payload
from whitepool_mp.wire.messages import Message

if TYPE_CHECKING:
    from whitepool_mp.client.member import Member
    from whitepool_mp.wire.payload import Dumped

CHUNK_SECONDS = 0.005
"""How long a chunk of a map should run: enough to pay for its message, short enough to share; and
how long its input may take."""
LEAST_SECONDS = 0.0005
"""How long it should run at least, also where the workers are to finish together."""
LARGEST_CHUNK = 1024
BULK_SECONDS = 0.05
"""The same for plain values of a sequence: they are there already, and cost little to send, and to
send again to another worker."""
LARGEST_BULK = 32768
AHEAD = 8
"""How many windows of input may have been read beyond the results handed out; a slow call, or a
slow taker of results, holds the others up only then."""
ITEM_INLINE = 256 * 1024
"""An item whose pickle is larger travels alone, its buffers out of band."""
UNREAD_BYTES = 64 << 20
"""When so many bytes of results wait to be handed out, and at least two for each worker, no more
calls are begun."""


_SIZED = {str, bytes}


class MapJob:
    """The calls of one `map`: reads its input lazily, keeps the workers fed, hands results out.

    The input is read in the thread that takes the results: at most a window ahead of the workers,
    and a few windows, or `ahead` calls, ahead of the results handed out. With `whole` it is read
    and pickled at the start, and sent as results come, whether or not they are taken.

    A chunk grows or shrinks so that it runs for about `CHUNK_SECONDS`, and is sent as it is when
    its input takes longer; each of its calls is answered, fails and dies on its own. Plain values
    of a list, a tuple or a range go in bulk, for about `BULK_SECONDS` at a time.

    When many bytes of results wait to be handed out, what has not begun is taken back
    (`taken_out`), and is sent again as they are taken. What is to be handed out next is sent in any
    case.

    Args:
        member: the pool.
        fn: the function.
        iterables: of the arguments.
        total: how many there are, if that is known.
        flags: `messages.WITH_RESOURCE` or 0.
        timeout: how many seconds each call may take, or None.
        chunksize: how many calls to send together, or None to let it be measured.
        send: where tasks go.
        whole: whether to read all of the input now.
        ahead: how many calls may be sent before the first result that was not taken; None for a few
            windows.
    """

    def __init__(
        self,
        member: Member,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        total: int | None,
        flags: int,
        timeout: float | None,
        chunksize: int | None,
        send: Callable[[Task], None],
        whole: bool = False,
        ahead: int | None = None,
    ) -> None:
        self.member = member
        self.name = payload.qualified_name(fn)
        self.fn = fn
        self.total = total
        self._function: bytes | None
        try:
            self._function = payload.dump_function(fn)
        except passed.NeedsDescriptors:
            self._function = None  # it travels with each call
        self._whole = whole
        self._ahead = ahead
        self._column: Sequence[Any] | None = None
        # (A range may be longer than can be told, and is then read one by one.)
        plain = len(iterables) == 1 and type(iterables[0]) in (list, tuple, range)
        if plain and timeout is None and total is not None and self._function is not None:
            self._column = cast("Sequence[Any]", iterables[0])
            if whole and type(self._column) is not range:
                self._column = tuple(self._column)
                # Others are pickled now: later that would run their code in the engine's thread.
                if not set(map(type, self._column)) <= messages.PLAIN:
                    self._column = None
        self._inputs: Iterator[Dumped | Exception] = self._dumped(zip(*iterables, strict=False))
        if whole and self._column is None:
            dumped = deque(self._inputs)
            self.total = len(dumped)
            self._inputs = iter(dumped)
        self._flags = flags
        self._timeout = timeout
        self._chunksize = chunksize
        self._send = send
        self.site = ""
        self.ordered = True
        self.exhausted = False
        self.read = 0
        self.ended = 0  # counted by the engine, and by the thread that feeds or closes
        self._ending = threading.Lock()
        self.handed = 0
        self._mean = 0.0  # seconds for a call, as measured
        # Index, whether they returned, and their values; or count, skip and message of a bulk; and
        # of how many bytes they came.
        self._results: deque[tuple[int, bool | None, Any, int]] = deque()
        # Bytes of results. Each of the two is written by one thread.
        self._bytes_come = self._bytes_gone = 0
        self._holding = False  # whether what has not begun is to be taken back, or has been
        self._taken_out: deque[Task] = deque()
        self._withheld: list[Task] = []
        self._feeding = threading.RLock()
        self._fed = self._shut = self._closed = False
        self.notify: Callable[[], None] = lambda: None
        self.finished: Callable[[], None] = lambda: None
        self.take_out: Callable[[bool], None] = lambda running: None

    @property
    def chunk(self) -> int:
        """How many calls the next chunk should have."""
        if self._chunksize is not None:
            return self._chunksize
        if self.ended == 0:
            return 1
        largest, seconds = LARGEST_BULK, BULK_SECONDS
        if self._column is None:
            largest, seconds = LARGEST_CHUNK, CHUNK_SECONDS
        size = int(seconds / self._mean) if self._mean > 0 else largest
        if self.total is not None:
            # Towards the end in smaller ones, so that the workers finish together.
            least = int(LEAST_SECONDS / self._mean) if self._mean > 0 else 1
            share = (self.total - self.read) // (2 * self.member.capacity)
            size = min(size, max(share, least))
        return max(1, min(size, largest))

    @property
    def done(self) -> bool:
        """Whether every result was handed out."""
        return self.exhausted and self.handed == self.read

    def feed(self) -> None:
        """Read and send as much input as keeps every worker busy.

        Input that is slow to come does not hold back results that are there.
        """
        with self._feeding:
            if self._fed:  # a task that failed at once has led back here
                return
            self._fed = True
            try:
                self._feed()
            finally:
                self._fed = False
        self._look_for_end()

    def _feed(self) -> None:
        while self._taken_out:
            self._withheld.append(self._taken_out.popleft())
            self._withheld.sort(key=lambda task: task.first + task.at)
        if self._full:
            self._send_next()
            return
        self._holding = False
        while self._withheld:
            self._post(self._withheld.pop(0))
        capacity = self.member.capacity
        began = time.monotonic()
        while not (self.exhausted or self._closed or self._shut):
            chunk = self.chunk
            if self._ahead is not None:
                chunk = min(chunk, self._ahead - (self.read - self.handed))
            window = max(2 * capacity * chunk, capacity + 1)
            if self.read - self.ended >= window or chunk < 1:
                return
            if not self._whole and self.read - self.handed >= AHEAD * window:
                return
            self._send_chunk(chunk)
            if self._results and time.monotonic() - began >= CHUNK_SECONDS and not self._whole:
                return

    @property
    def _full(self) -> bool:
        """Whether enough results wait to be handed out."""
        return (
            not self._whole
            and self._bytes_come - self._bytes_gone >= UNREAD_BYTES
            and self.ended - self.handed >= 2 * self.member.capacity
        )

    def _send_next(self) -> None:
        """Although enough wait, none of them may be handed out before one that has been withheld:
        send that one."""
        if self.ordered and self._withheld and self._withheld[0].first <= self.handed:
            task = self._withheld.pop(0)
            rest = task.cut(1)
            if rest is not None:
                self._withheld.insert(0, rest)
            self._post(task)

    def _send_bulk(self, column: Sequence[Any], size: int) -> bool:
        """Send plain values; False if they are not plain, and then none will be sent in bulk."""
        first = self.read
        values = column[first : first + size]
        if type(column) is not range:
            types = set(map(type, values))
            weight = 0
            if types & _SIZED:
                weight = sum(len(value) for value in values if type(value) in _SIZED)
            if weight > ITEM_INLINE:
                values = values[: len(values) * ITEM_INLINE // weight]
            if not (types <= messages.PLAIN and values) and first < len(column):
                self._column = None
                self._inputs = self._dumped(zip(islice(column, first, None), strict=False))
                return False
        self.read += len(values)
        self.exhausted = self.read >= len(column)
        if values:  # they are the task's from here on
            self._post(self._task(values, first, messages.BULK))
        return True

    def _send_chunk(self, size: int) -> None:
        if self._column is not None and self._send_bulk(self._column, size):
            return
        first = self.read
        items: list[bytes] = []
        weight = 0
        began = time.monotonic()
        for _ in range(size):
            dumped = next(self._inputs, None)
            if dumped is None:
                self.exhausted = True
                break
            self.read += 1
            if isinstance(dumped, Exception):  # that one call fails, where its result would be
                if items:
                    self._post(self._task(items, first))
                self._put(self.read - 1, False, dumped)
                items, first = [], self.read
                continue
            data, buffers = dumped
            if buffers or len(data) > ITEM_INLINE or self._function is None:
                if items:
                    self._post(self._task(items, first))
                single, flags = data, self._flags
                if self._function is not None:
                    single = messages.pack_split(self._function, data)
                    flags |= messages.SPLIT
                index = self.read - 1
                self._post(
                    Task(
                        self.name,
                        self,
                        flags,
                        self._timeout,
                        single,
                        buffers,
                        first=index,
                        site=self.site,
                    )
                )
                items, first = [], self.read
                return
            items.append(data)
            weight += len(data)
            if weight > ITEM_INLINE:
                break
            if self._chunksize is None and time.monotonic() - began >= CHUNK_SECONDS:
                break
        if items:
            self._post(self._task(items, first))

    def _post(self, task: Task) -> None:
        """Send a task. If the pool has ended its calls fail, where nobody may be there to hear."""
        try:
            self._send(task)
        except WhitepoolError as error:
            if not self._whole:
                raise
            for index in range(task.first, task.first + task.count):
                self._put(index, False, copy.copy(error))

    def _dumped(self, inputs: Iterable[tuple[Any, ...]]) -> Iterator[Dumped | Exception]:
        """The arguments of each call, pickled, or why they cannot be."""
        for args in inputs:
            try:
                if self._function is None:
                    yield payload.dump_call(self.fn, args, {})
                else:
                    yield payload.dump_arguments(self.fn, args, {})
            except Exception as error:
                yield error

    def _task(self, items: Sequence[Any], first: int, kind: int = messages.CALL) -> Task:
        assert self._function is not None
        return Task(
            self.name,
            self,
            self._flags,
            self._timeout,
            self._function,
            items=items,
            first=first,
            kind=kind,
            site=self.site,
        )

    # Sink

    def began(self, task: Task) -> bool:
        if self._closed:
            self._count(task.left)
            self._came()
        return not self._closed

    def answered(self, task: Task, index: int, message: Message) -> None:
        self._learn(message.token / 1e9)
        size = message.size
        returned, value = open_answer(message, self.name, 0, self.member.name)
        self._put(index, returned, value, size)

    def returned(
        self, task: Task, index: int, count: int, skip: int, seconds: float, results: bytes
    ) -> None:
        self._learn(seconds, count)
        self._count(count)
        self._results.append((index, None, (count, skip, results), len(results)))
        self._came(len(results))

    def failed(self, task: Task, index: int, error: BaseException) -> None:
        self._put(index, False, error)

    def _learn(self, seconds: float, count: int = 1) -> None:
        """So many calls took so long each."""
        if not seconds:
            return  # not known
        old = 0.8**count if self._mean else 0.0
        self._mean = old * self._mean + (1 - old) * seconds

    def _put(self, index: int, returned: bool, value: Any, size: int = 0) -> None:
        self._count(1)
        self._results.append((index, returned, [value], size))
        self._came(size)

    def _count(self, count: int) -> None:
        with self._ending:
            self.ended += count

    def _came(self, size: int = 0) -> None:
        """Results came. If enough of them wait to be handed out, have back what has not begun."""
        if size:
            self._bytes_come += size
        if self._whole:
            self.feed()
        elif (
            self._bytes_come - self._bytes_gone >= UNREAD_BYTES and not self._holding and self._full
        ):
            self._holding = True
            self.take_out(False)
        self.notify()
        self._look_for_end()

    def taken_out(self, tasks: list[Task]) -> None:
        """These were sent, and are back: they had not begun, or their workers were killed."""
        self._taken_out.extend(tasks)
        if self._closed:
            self._drop()
        self.notify()

    def _drop(self) -> None:
        """What has been had back is not sent again."""
        for tasks in (self._taken_out, self._withheld):
            with contextlib.suppress(IndexError):
                while True:
                    self._count(tasks.pop().left)
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self.ended == self.read and (self.exhausted or self._closed or self._shut):
            self.finished()

    def take(self) -> tuple[int, bool, list[Any], int] | None:
        """Calls that ended one after the other, if there are some not yet taken: the first one's
        index, whether they returned, what, and of how many bytes that came."""
        if not self._results:
            return None
        index, returned, values, size = self._results.popleft()
        if returned is None:
            count, skip, results = values
            return index, True, messages.load_results(results)[skip : skip + count], size
        return index, returned, values, size

    def hand_out(self, count: int, size: int) -> None:
        """So many results, of so many bytes, go to the taker."""
        self.handed += count
        self._bytes_gone += size

    @property
    def is_shut(self) -> bool:
        """Whether every result of what was read was handed out, and no more may be read."""
        return self._shut and self.handed == self.read

    @property
    def cut_short(self) -> bool:
        """Whether it was closed, and no more results come."""
        return self._closed and self.ended == self.read and not self._results

    def shut(self) -> None:
        """Read no more input, unless all of it was read at the start."""
        self._shut = not self._whole
        self._look_for_end()

    def close(self, running: bool = False) -> None:
        """Nobody wants the rest: what no worker has begun never runs.

        Args:
            running: whether to kill the workers of calls that run, too.
        """
        self._closed = True
        if self.ended < self.read:
            self.take_out(running)
        self._drop()
        self.notify()


def known_length(iterables: tuple[Iterable[Any], ...]) -> int | None:
    """How many calls a map of these makes, if they tell."""
    lengths = []
    for iterable in iterables:
        try:
            lengths.append(len(iterable))  # type: ignore[arg-type]
        except (TypeError, OverflowError):  # there are ranges too long for it
            return None
    return min(lengths, default=0)
