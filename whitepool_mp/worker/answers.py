"""What a worker answers, at once or together with what it answers next.

calls --answer--> Answers --now, or after a few more--> channel
                     '--meanwhile--> page (`wire.pages`): not lost if the worker dies
"""

from __future__ import annotations

import os
import time

from whitepool_mp.wire import messages, pages
from whitepool_mp.wire.descriptors import DONTWAIT, Socket
from whitepool_mp.wire.messages import MessageReader
from whitepool_mp.wire.pages import ENDED, OWNER, RSS, SENDINGS, UNSENT, Page
from whitepool_mp.worker import linux

SHORT = 1_500_000
"""Nanoseconds. The answer of a call that took this long is sent at once; of one that took longer it
is known, and the process's memory is measured before."""
_HELD_BACK = 2_000_000
"""Nanoseconds. For how long short calls go on before their answers are sent."""
_TAIL = 1024
"""Bytes of a large answer that are sent when the page says that its call has ended."""


class Channel:
    """A client's end of a direct channel, and what has come of its next message."""

    __slots__ = ("reader", "skip", "sock")

    def __init__(self, sock: Socket, skip: int) -> None:
        self.sock = sock
        self.skip = skip  # where on the page it says what was taken back
        self.reader = MessageReader()


class Answers:
    """The answering part of a worker.

    Args:
        page: where answers lie until they are sent, and how many calls have ended.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self._words = page.words
        self._outbox = page.outbox
        self._unsent = 0  # bytes in there
        self._unsent_since = 0
        self._copied = False  # in a child that user code forked
        self._more = False  # whether another call follows at once
        self._fence = 0  # the newest lease
        self._calls = 0  # how many have begun
        self._max_calls = pages.UNLIMITED
        self._max_rss = 0
        self._unmeasured = SHORT  # nanoseconds; memory is measured after calls that took longer

    def set_limits(self) -> None:
        """Take up what the manager has written about when this worker has served for long enough:
        it has done so before it hands it a channel."""
        self._max_calls = self._words[pages.MAX_CALLS] or pages.UNLIMITED
        self._max_rss = self._words[pages.MAX_RSS]
        self._unmeasured = -1 if self._max_rss else SHORT

    def measure(self) -> None:
        """Note how much memory this process has now, for whoever will ask after its death, and
        whether that is too much."""
        if size := linux.resident():
            self._words[RSS] = size
            if self._max_rss and size >= self._max_rss:
                self._words[pages.WORN] = 1

    def _answer_in_pieces(
        self, channel: Channel, pieces: list[bytes | memoryview], took: int = SHORT
    ) -> None:
        """`_answer` for one that may be large."""
        if len(pieces) == 1:
            self._answer(channel, pieces[0], took)
            return
        if self._copied:
            os._exit(1)
        self._send_unsent(channel)
        if took > self._unmeasured:
            self.measure()
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
        if took > self._unmeasured:
            self.measure()
        if took < SHORT and (self._more or channel.reader.more) and self._put(data):
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
            sent = channel.sock.send(data, DONTWAIT)
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
        now = time.perf_counter_ns()
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
