"""The worker's loop: one call at a time, from whoever holds the lease.

    manager --ADOPT (a channel), RECALL, RETIRE--> |        | <--calls---- holder
            <--RELEASED--------------------------- | Server | --answers--> holder

One wait on the control socket and every channel. A channel belongs to a client process that once
leased this worker; only the process with the newest lease is served (`fence`), others get FENCED.
Calls may be sent before the one that runs has been answered: they wait in the channel, and until
they begin they can be taken back, by their sender or together with the lease (`wire.pages`).

Guarantees: before anything of a call's is unpickled, the page says that the call began; each call
is answered exactly once and before the next one begins, or the worker is dead; nothing of a call is
kept alive after it.
"""

from __future__ import annotations

import functools
import os
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pickle import dumps, loads
from typing import Any

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import descriptors, frames, messages, pages, payload, rooms
from whitepool_mp.wire.messages import (
    CALL,
    HEAD,
    NUMBERS,
    RESULT,
    SPLIT,
    WITH_RESOURCE,
    Message,
    MessageReader,
)
from whitepool_mp.wire.pages import (
    BEGUN,
    CALLS,
    ENDED,
    OWNER,
    RECALLED,
    RESULTS,
    SENDINGS,
    UNSENT,
    Page,
)
from whitepool_mp.worker.bulk import LARGEST_GROUP, Bulk

_SHORT_TEXT = 1000
_clock = time.perf_counter_ns
_DONTWAIT = int(socket.MSG_DONTWAIT)
_MOST_READY = 16
_GROUP = 16_000
"""Nanoseconds. Calls of a bulk are begun together if they take no longer than this together ..."""
_TINY = 1000
"""... and no longer than this each, but for ..."""
_STARTING = 3000
"""... what it takes to begin them."""
_TAIL = 1024
"""Bytes of a large answer that are sent when the page says that its call has ended."""
_WARM_SECONDS = 1.0
"""For how long an idle worker keeps memory for large arguments."""
_SHORT = 1_500_000
"""Nanoseconds. The answer of a call that took this long is sent at once."""
_HELD_BACK = 2_000_000
"""Nanoseconds. For how long short calls go on before their answers are sent."""


class Channel:
    """A client's end of a direct channel, and what has come of its next message."""

    __slots__ = ("reader", "skip", "sock")

    def __init__(self, sock: socket.socket, skip: int) -> None:
        self.sock = sock
        self.skip = skip  # where on the page it says what was taken back
        self.reader = MessageReader()


class Server:
    """Serves calls until the manager says RETIRE or is gone.

    Args:
        control: the socket to the manager.
        page: where the call begun last is noted, and what was taken back.
        resource: what the factory built.
        has_resource: whether there was a factory.
    """

    def __init__(
        self, control: socket.socket, page: Page, resource: Any, has_resource: bool
    ) -> None:
        self._control = control
        self._decoder = frames.FrameDecoder()
        self._page = page
        self._words = page.words
        self._outbox = page.outbox
        self._unsent = 0  # bytes in there
        self._unsent_since = 0
        self._copied = False
        self._more = False  # whether another call follows at once
        self._resource = resource
        self._has_resource = has_resource
        self._channels: dict[int, Channel] = {}
        self._adopted = 0
        self._fence = 0
        self._calls = 0
        self._kept: dict[int, Any] = {}
        self._bulk_running: Bulk | None = None
        self._poll = select.epoll()
        self._poll.register(control.fileno(), select.EPOLLIN)
        self._retired = False

    def run(self) -> bool:
        """Serve.

        Returns:
            True if the manager asked for a clean stop, False if it is gone.
        """
        control = self._control.fileno()
        channels, poll = self._channels, self._poll.poll
        while True:
            ready = poll(_WARM_SECONDS if rooms.kept() else None, _MOST_READY)
            if not ready:
                rooms.let_go()
            for fd, _ in ready:
                channel = channels.get(fd)
                if channel is not None:
                    self._hear_client(channel)
                elif fd == control and not self._hear_manager():
                    return self._retired

    def close_inherited(self) -> None:
        """In a child that user code forked: close its copies, so that our end-of-file comes."""
        self._copied = True
        if self._bulk_running is not None:
            self._bulk_running.forbid()
        for channel in self._channels.values():
            channel.sock.close()
        self._control.close()
        self._poll.close()

    def _hear_manager(self) -> bool:
        data, fds = descriptors.receive(self._control, 4096, 64)
        if not data:
            return False
        for body in self._decoder.feed(data):
            if body[0] == frames.ADOPT:
                sock = socket.socket(fileno=fds.pop(0))
                sock.setblocking(True)
                self._adopted += 1
                skip = pages.slot_words(pages.slot(self._adopted))
                self._channels[sock.fileno()] = Channel(sock, skip)
                self._poll.register(sock.fileno(), select.EPOLLIN)
            elif body[0] == frames.RECALL:
                lease, patient = frames.read_recall(body)
                if patient:
                    self._serve_sent()
                if lease >= self._fence:
                    self._fence = lease + 1
                    self._kept.clear()
                    self._words[RECALLED] = lease
                self._control.sendall(frames.released(lease))
            elif body[0] == frames.RETIRE:
                self._retired = True
                return False
            else:
                raise ProtocolError(f"the manager sent a frame of kind {body[0]}")
        return True

    def _serve_sent(self) -> None:
        """Serve what has been sent so far."""
        control = self._control.fileno()
        while channels := [fd for fd, _ in self._poll.poll(0) if fd != control]:
            for fd in channels:
                if fd in self._channels:
                    self._hear_client(self._channels[fd])

    def _drop(self, channel: Channel) -> None:
        fd = channel.sock.fileno()
        if fd >= 0:
            self._poll.unregister(fd)
            del self._channels[fd]
            channel.sock.close()
            self._more = False
            self._bulk_running = None
            # Answers for it that lie here are nobody's.
            self._words[UNSENT] = self._words[RESULTS] = self._unsent = 0
            self._words[SENDINGS] += 1

    def _hear_client(self, channel: Channel) -> None:
        reader = channel.reader
        try:
            try:
                count = channel.sock.recv_into(reader.room, 0, _DONTWAIT)
            except BlockingIOError:
                return  # it was served when the manager wanted that done first
            if not count:
                self._drop(channel)
                return
            message = reader.take(count)
            while message is not None:
                if message.token > self._fence:
                    self._fence = message.token
                    self._kept.clear()
                if message.kind == CALL:
                    self._call(channel, message)
                else:
                    self._serve(channel, message)
                message = reader.pop() if reader.more else None
            if self._unsent:
                self._send_unsent(channel)
        except (ConnectionError, ProtocolError):
            # The client is gone, or speaks nonsense: its channel ends, others go on. A lease that
            # it held is the manager's to take back.
            self._drop(channel)

    def _serve(self, channel: Channel, message: Message) -> None:
        if message.kind == messages.METHOD:
            self._method(channel, message)
        elif message.kind == messages.BATCH:
            self._batch(channel, message)
        elif message.kind == messages.BULK:
            self._bulk(channel, message)
        elif message.kind == messages.RELEASE:
            if message.token == self._fence:
                self._kept.clear()
        else:
            raise ProtocolError(f"a client sent a message of kind {message.kind}")

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
                return 0
            why = messages.SKIPPED
        else:
            self._fence = lease + 1
            why = messages.FENCED
        words[BEGUN] = before
        words[CALLS] = self._calls
        return why

    def _refuse(self, channel: Channel, number: int, why: int) -> None:
        self._answer(channel, messages.pack(messages.ERROR, why, number, 0, b"")[0], _SHORT)

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
                args, kwargs = loads(data, buffers=buffers)
            else:
                function, (args, kwargs) = loads(data, buffers=buffers)
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

    def _answer_in_pieces(
        self, channel: Channel, pieces: list[bytes | memoryview], took: int = _SHORT
    ) -> None:
        """`_answer` for one that may be large."""
        if len(pieces) == 1:
            self._answer(channel, pieces[0], took)
            return
        if self._copied:
            os._exit(1)
        self._send_unsent(channel)
        last = memoryview(pieces[-1]).cast("B")
        messages.send_all(channel.sock, [*pieces[:-1], last[:-_TAIL]])
        self._transmit(channel, last[-_TAIL:])

    def _answer(self, channel: Channel, data: bytes | memoryview, took: int) -> None:
        """Send an answer, or put it with others that are sent together soon.

        The page says that its call has ended before its reader can look there, and not while this
        waits for the reader to make room.
        """
        if self._copied:
            os._exit(1)  # its parent answers
        if took < _SHORT and (self._more or channel.reader.more) and self._put(data):
            self._words[ENDED] = self._calls
            return
        if self._unsent:
            self._send_unsent(channel)
        self._transmit(channel, data)

    def _transmit(self, channel: Channel, data: bytes | memoryview) -> None:
        """Write an answer, with which all calls so far have ended."""
        words = self._words
        words[ENDED] = self._calls
        try:
            sent = channel.sock.send(data, _DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            words[ENDED] = self._calls - 1
            channel.sock.sendall(memoryview(data)[sent:])
            words[ENDED] = self._calls

    def _put(self, data: bytes | memoryview) -> bool:
        """Keep a short job's answer until the next ones are there; whether there is room.

        It lies in shared memory: if this process dies now, it is found there.
        """
        now = _clock()
        start = self._unsent
        if not start:
            self._unsent_since = now
            self._words[OWNER] = self._fence
        elif now - self._unsent_since > _HELD_BACK:
            return False
        end = start + len(data)
        if end > pages.OUTBOX:
            return False
        self._outbox[start:end] = data
        self._words[UNSENT] = self._unsent = end
        return True

    def _send_unsent(self, channel: Channel) -> None:
        if self._unsent:
            self._transmit(channel, bytes(self._outbox[: self._unsent]))
            self._words[UNSENT] = self._unsent = 0
            self._words[SENDINGS] += 1  # last, and before anything is written over what was sent

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
        self._answer_in_pieces(channel, messages.pack(RESULT, flags, number, took, data, buffers))

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
        function_pickle, rest = messages.read_split(data)
        values = loads(rest)
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
            elif took < _GROUP // 2:
                group = min(group * 2, LARGEST_GROUP)
        self._flush(channel, bulk, number + at, ended=True)
        self._bulk_running = None

    def _flush(self, channel: Channel, bulk: Bulk, following: int, ended: bool = False) -> None:
        """Send the results that lie in shared memory; with `ended` no call follows."""
        data = bulk.message()
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
        text = "".join(traceback.format_exception(type(error), error, trace))
        if step == messages.DUMPING:
            from whitepool_mp.errors import SerializationError

            error = SerializationError(
                f"the result of {payload.qualified_name(function)}, "
                f"{payload.shorten(value)} (a {type(value).__qualname__}), cannot be pickled: "
                f"{type(error).__name__}: {error}"
            )
        data = payload.dump_failure(error, text)
        took = _clock() - started
        error.__traceback__ = None
        self._answer_in_pieces(channel, messages.pack(messages.ERROR, step, number, took, data))


def flush_output() -> None:
    """Write out what user code printed; a closed or broken output is its own business."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
