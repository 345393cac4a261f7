"""What the engine runs: a call, or a batch of calls of one function, and who hears of each."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Protocol

from whitepool_mp.wire import messages, passed
from whitepool_mp.wire.messages import Message

MAX_DEATHS = 3
"""How many workers may die before they began a call, until the call is given up."""
LARGEST_AHEAD = 32 * 1024
"""A call whose pickle is larger is not sent before the worker is free for it."""


class Sink(Protocol):
    """Who hears how the calls of a task end; each index is heard of once, unless nobody wants it.

    Called by the engine, which waits: be quick, and do not raise.
    """

    def began(self, task: Task) -> bool:
        """The task, or what is left of it, is about to be sent; False: nobody wants it any more."""

    def answered(self, task: Task, index: int, message: Message) -> None:
        """A RESULT or ERROR came; the message is valid until this returns."""

    def returned(
        self, task: Task, index: int, count: int, skip: int, seconds: float, results: bytes
    ) -> None:
        """Calls of a BULK returned: `load_results(results)[skip : skip + count]`, in `seconds`."""

    def failed(self, task: Task, index: int, error: BaseException) -> None:
        """The call did not get an answer, because ..."""


class Task:
    """One or more calls that are sent to one worker together and answered one by one.

    Args:
        name: the function's qualified name, for errors and for what is known of its duration.
        sink: who hears of each call.
        flags: `messages.WITH_RESOURCE` or 0.
        timeout: how many seconds each call may take, or None.
        payload: the pickled call (one call), or the pickled function (a batch).
        buffers: what travels beside a single call's pickle.
        items: a batch's arguments, pickled one by one, or plain values with kind BULK; None for a
            single call.
        first: the sink's index of the first call.
        kind: of the message, unless it is a batch.
        site: the line of code that it comes from.

    Attributes:
        count: how many calls it has.
        known_as: under which name its duration is known.
        at: how many of them have ended.
        number: the first call's number on its channel.
        small: whether it may be sent while another one runs: the channel has room for it.
        cost: how many seconds each call will take, by what is known.
        deaths: how many workers died before they began its next call.
        cancelled: whether nobody wants it any more.
        runner: the lease under which it was sent.
    """

    __slots__ = (
        "at",
        "buffers",
        "cancelled",
        "cost",
        "count",
        "deaths",
        "first",
        "flags",
        "items",
        "kind",
        "known_as",
        "name",
        "number",
        "payload",
        "runner",
        "sink",
        "site",
        "small",
        "timeout",
    )

    def __init__(
        self,
        name: str,
        sink: Sink,
        flags: int,
        timeout: float | None,
        payload: bytes,
        buffers: Sequence[Any] = (),
        items: Sequence[Any] | None = None,
        first: int = 0,
        kind: int = messages.CALL,
        site: str = "",
    ) -> None:
        self.name = name
        self.sink = sink
        self.flags = flags
        self.timeout = timeout
        self.payload = payload
        self.buffers = buffers
        self.items = items
        self.first = first
        self.kind = messages.BATCH if items is not None and kind == messages.CALL else kind
        self.known_as = name if kind != messages.BULK else f"{name} in bulk"
        self.count = 1 if items is None else len(items)
        self.site = site
        self.small = not buffers and len(payload) <= LARGEST_AHEAD
        self.at = 0
        self.number = 0
        self.cost = 0.0
        self.deaths = 0
        self.cancelled = False
        self.runner: Any = None

    @property
    def left(self) -> int:
        """How many calls have not ended."""
        return self.count - self.at

    @property
    def next_number(self) -> int:
        """The number of the next call that has not ended."""
        return self.number + self.at

    def pieces(self, number: int, lease: int) -> list[bytes | memoryview]:
        """The message that asks for all calls, numbered from `number`."""
        payload = self.payload
        if self.kind == messages.BULK:
            payload = messages.pack_split(payload, pickle.dumps(self.items, 5))
        elif self.items is not None:
            payload = messages.pack_batch(payload, self.items)
        return messages.pack(self.kind, self.flags, number, lease, payload, self.buffers)

    def cut(self, at: int) -> Task | None:
        """Take the calls from the `at`-th on away: a task of those, or None."""
        if at >= self.count:
            return None
        if at <= 0:
            rest = self
        else:
            assert self.items is not None
            rest = Task(
                self.name,
                self.sink,
                self.flags,
                self.timeout,
                self.payload,
                items=self.items[at:],
                first=self.first + at,
                kind=self.kind if self.kind == messages.BULK else messages.CALL,
                site=self.site,
            )
            rest.cancelled = self.cancelled
            rest.cost = self.cost
            self.items = self.items[:at]
            self.count = at
        rest.runner = None
        return rest

    def let_go(self) -> None:
        """It will not be sent again: let what travels beside it go."""
        passed.let_go(self.buffers)
        self.buffers = ()

    def rest(self) -> Task | None:
        """A task of the calls that have not ended, or None."""
        return self.cut(self.at)
