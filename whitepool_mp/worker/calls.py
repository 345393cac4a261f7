"""What a worker does with the calls of its holder: begins, runs and answers them.

    Server --message--> Calls --function(...)--> user code
                          |
                          '--> Answers

Guarantees: before anything of a call's is unpickled, the page says that the call began; each call
is answered exactly once and before the next one begins, or the worker is dead; nothing of a call is
kept alive after it.
"""

from __future__ import annotations

import functools
import os
import time

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import messages, pages, payload
from whitepool_mp.wire.failures import dump_failure
from whitepool_mp.wire.messages import HEAD, NUMBERS, RESULT, SPLIT, WITH_RESOURCE, Message
from whitepool_mp.wire.pages import BEGUN, CALLS, RECALLED, WORN, Page
from whitepool_mp.wire.passed import let_go
from whitepool_mp.wire.unpickling import load
from whitepool_mp.worker.answers import SHORT, Answers, Channel
from whitepool_mp.worker.bulk import LARGEST_GROUP, Bulk

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pickle import dumps, loads
    from types import TracebackType
    from typing import Any
else:
    from _pickle import dumps, loads  # as in `wire.messages`

_clock = time.perf_counter_ns
_SHORT_TEXT = 1000
_GROUP = 16_000
"""Nanoseconds. Calls of a bulk are begun together if they take no longer than this together ..."""
_TINY = 1000
"""... and no longer than this each, but for ..."""
_STARTING = 3000
"""... what it takes to begin them."""


class Calls(Answers):
    """The calling part of a worker.

    Args:
        page: where the call begun last is noted, and what was taken back.
        resource: what the factory built.
    """

    def __init__(self, page: Page, resource: Any) -> None:
        super().__init__(page)
        self._resource = resource
        self._kept: dict[int, Any] = {}  # what proxies stand for, under the newest lease
        self._bulk_running: Bulk | None = None

    def _claim(self, channel: Channel, lease: int, last: int, count: int) -> int:
        """Say on the page that calls up to number `last` begin; why they may not, or 0.

        It says first that they begin and looks then whether they were taken back: who takes them
        back does both the other way round.
        """
        if lease < self._fence:
            return messages.FENCED
        words, skip = self._words, channel.skip
        before = words[BEGUN]
        token = lease << pages.NUMBER_BITS | last & pages.NUMBER_MASK
        words[CALLS] = calls = self._calls + count
        words[BEGUN] = token
        if words[RECALLED] < lease:
            if not words[skip] < token <= words[skip + 1]:
                self._calls = calls
                if calls >= self._max_calls:
                    words[WORN] = 1
                return 0
            why = messages.SKIPPED
        else:
            self._fence = lease + 1
            why = messages.FENCED
        words[BEGUN] = before
        words[CALLS] = self._calls
        return why

    def _refuse(self, channel: Channel, number: int, why: int) -> None:
        self._answer(channel, messages.pack(messages.ERROR, why, number, 0, b"")[0], SHORT)

    def _call(self, channel: Channel, message: Message) -> None:
        _, flags, number, lease, data, buffers = message
        if why := self._claim(channel, lease, number, 1):
            self._refuse(channel, number, why)
            return
        started = _clock()
        try:
            if flags & SPLIT:
                function_pickle, data = messages.read_split(data)
                function = loads(function_pickle)
                args, kwargs = load(data, buffers) if buffers else loads(data)
            else:
                function, (args, kwargs) = load(data, buffers) if buffers else loads(data)
        except BaseException as error:
            self._fail(channel, number, messages.LOADING, error, started)
            return
        del message, data, buffers
        self._run(channel, number, flags, function, args, kwargs, started)

    def _run(
        self,
        channel: Channel,
        number: int,
        flags: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        started: int,
    ) -> None:
        try:
            if flags & WITH_RESOURCE:
                value = function(self._resource, *args, **kwargs)
            else:
                value = function(*args, **kwargs)
        except BaseException as error:
            self._fail(channel, number, messages.RAISED, error, started)
            return
        took = _clock() - started
        kind = type(value)
        if kind in NUMBERS or (kind is str and len(value) < _SHORT_TEXT):
            data = dumps(value, 5)
            head = HEAD.pack(RESULT, 0, 0, number, took, len(data))
            self._answer(channel, head + data, took)
        else:
            self._reply(channel, number, function, value, took)

    def _reply(self, channel: Channel, number: int, function: Any, value: Any, took: int) -> None:
        """Answer with a result."""
        try:
            data, buffers = payload.dumps(value)
        except BaseException as error:
            started = _clock() - took
            self._fail(channel, number, messages.DUMPING, error, started, function, value)
            return
        self._answer_in_pieces(channel, messages.pack(RESULT, 0, number, took, data, buffers), took)
        let_go(buffers)

    def _method(self, channel: Channel, message: Message) -> None:
        number = message.number
        if why := self._claim(channel, message.token, number, 1):
            self._refuse(channel, number, why)
            return
        started = _clock()
        try:
            target_id, name, args, kwargs = message.load()
            target = self._kept[target_id] if target_id else self._resource
        except BaseException as error:
            self._fail(channel, number, messages.LOADING, error, started)
            return
        del message
        try:
            value = getattr(target, name)(*args, **kwargs)
        except BaseException as error:
            self._fail(channel, number, messages.RAISED, error, started)
            return
        del args, kwargs
        took = _clock() - started
        try:
            data, buffers = payload.dumps(value)
            flags = 0
        except Exception:
            # A cursor, a generator, a lock: it stays here and the caller gets a proxy to it.
            key = 0 if value is self._resource else id(value)
            if key:
                self._kept[key] = value
            data, _ = payload.dumps((key, type(value).__qualname__))
            flags, buffers = messages.REFERENCE, []
        answer = messages.pack(RESULT, flags, number, took, data, buffers)
        self._answer_in_pieces(channel, answer, max(took, SHORT))
        let_go(buffers)

    def _batch(self, channel: Channel, message: Message) -> None:
        function_pickle, items = messages.read_batch(message.payload)
        lease, number, flags = message.token, message.number, message.flags
        del message
        function: Callable[..., Any] | None = None
        last = len(items) - 1
        for offset, item in enumerate(items):
            self._more = offset < last
            if why := self._claim(channel, lease, number + offset, 1):
                self._refuse(channel, number + offset, why)
                continue
            started = _clock()
            try:
                if function is None:
                    function = loads(function_pickle)
                args, kwargs = loads(item)
            except BaseException as error:
                self._fail(channel, number + offset, messages.LOADING, error, started)
                continue
            self._run(channel, number + offset, flags, function, args, kwargs, started)
            del args, kwargs
        self._more = False

    def _bulk(self, channel: Channel, message: Message) -> None:
        """Many calls that are likely to be short: as little as possible is done for each of them.

        They are begun a few at a time. Their results lie in shared memory until they are sent; that
        a result lies there says that its call has ended and that the next one runs.
        """
        _, flags, number, lease, data, _ = message
        if lease < self._fence:  # whoever sent this has no say here any more
            self._refuse(channel, number, messages.FENCED)
            return
        function_pickle, rest = messages.read_split(data)
        values = _plain(rest)
        self._send_unsent(channel)
        self._bulk_running = bulk = Bulk(self._page, lease, number)
        function: Callable[..., Any] | None = None
        at, count, group = 0, len(values), 1
        while at < count:
            claimed = min(group, count - at)
            why = self._claim(channel, lease, number + at + claimed - 1, claimed)
            if why == messages.SKIPPED and claimed > 1:
                group = 1  # the first of them may not have been taken back
                continue
            if why:
                self._flush(channel, bulk, number + at)
                self._refuse(channel, number + at, why)
                if why == messages.SKIPPED and at < count - 1:
                    self._refuse(channel, number + count - 1, why)
                break  # nothing behind it may begin either
            started = _clock()
            done, step, problem = 0, messages.LOADING, None
            try:
                if function is None:
                    function = loads(function_pickle)
                    if flags & WITH_RESOURCE:
                        function = functools.partial(function, self._resource)
            except BaseException as error:
                problem = error
            else:
                step = messages.RAISED
                done, problem = bulk.run(function, values[at : at + claimed])
            if self._copied:
                os._exit(1)  # its parent goes on
            now = _clock()
            took = now - started
            bulk.took += took
            at += done
            if done < claimed:
                self._calls -= claimed - done - 1
                self._words[CALLS] = self._calls
                self._flush(channel, bulk, number + at)
                if problem is not None or not bulk.turn():
                    if problem is not None:
                        self._fail(channel, number + at, step, problem, started)
                    else:
                        self._reply(channel, number + at, function, bulk.odd, took)
                        bulk.odd = None
                    self._send_unsent(channel)  # the next results lie where that one may lie
                    bulk.sent(number + at + 1)
                else:
                    bulk.took = took
                at += 1
            elif at < count and bulk.due(now):
                self._flush(channel, bulk, number + at)
            if took > claimed * _TINY + _STARTING:
                group = 1
                if took > SHORT:
                    self.measure()
            elif took < _GROUP // 2:
                group = min(group * 2, LARGEST_GROUP)
        self._flush(channel, bulk, number + at, ended=True)
        self._bulk_running = None

    def _flush(self, channel: Channel, bulk: Bulk, following: int, ended: bool = False) -> None:
        """Send the results that lie in shared memory; with `ended` no call follows."""
        data = bulk.message()
        if data is not None and self._max_rss:
            self.measure()
        if data is not None and ended:
            self._transmit(channel, data)
        elif data is not None:
            channel.sock.sendall(data)
        bulk.sent(following)

    def _fail(
        self,
        channel: Channel,
        number: int,
        step: int,
        error: BaseException,
        started: int,
        function: Any = None,
        value: Any = None,
    ) -> None:
        trace = error.__traceback__
        if step == messages.RAISED and trace is not None and trace.tb_next is not None:
            trace = trace.tb_next  # this module's own frame tells the reader nothing
        text = told(error, trace)
        if step == messages.DUMPING:
            from whitepool_mp.errors import SerializationError

            error = SerializationError(
                f"the result of {payload.qualified_name(function)}, "
                f"{payload.shorten(value)} (a {type(value).__qualname__}), cannot be pickled: "
                f"{payload.worded(error)}"
            )
        data = dump_failure(error, text)
        took = _clock() - started
        error.__traceback__ = None
        answer = messages.pack(messages.ERROR, step, number, took, data)
        self._answer_in_pieces(channel, answer, max(took, SHORT))


def _plain(pickled: memoryview) -> Sequence[Any]:
    """The values of a bulk.

    Raises:
        ProtocolError: it is no such pickle.
    """
    try:
        values = loads(pickled)
    except Exception as error:
        raise ProtocolError(f"values that cannot be unpickled: {error!r}") from error
    if type(values) not in (list, tuple, range):
        raise ProtocolError(f"values in a {type(values).__name__}")
    return values  # type: ignore[no-any-return]


def told(error: BaseException, trace: TracebackType | None) -> str:
    """An exception's traceback, as `traceback` words it.

    That module is imported when it is first wanted. Then there may be no descriptor to import it
    with, which may be just what the exception says: its words come without the rest then.
    """
    try:
        import traceback

        return "".join(traceback.format_exception(type(error), error, trace))
    except KeyboardInterrupt:
        raise
    except BaseException:  # what the exception says may be code that exits
        return f"{payload.shorten(error, 1000)}\n"
