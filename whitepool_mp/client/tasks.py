"""What the engine runs: a call, or a batch of calls of one function, and who hears of each."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, Protocol

from whitepool_mp.wire import messages
from whitepool_mp.wire.messages import Message

MAX_DEATHS = 3
"""How many workers may die before they began a call, until the call is given up."""


class Sink(Protocol):
    """Who hears how the calls of a task end; each index is heard of exactly once.

    Called by the engine, which waits: be quick, and do not raise.
    """

    def began(self, task: Task) -> bool:
        """The task, or what is left of it, is about to be sent; False: nobody wants it any more."""

    def answered(self, task: Task, index: int, message: Message) -> None:
        """A RESULT or ERROR came; the message is valid until this returns."""

    def failed(self, task: Task, index: int, error: BaseException) -> None:
        """The call did not get an answer, because ..."""


class Task:
    """One or more calls that are sent to one worker together and answered one by one.

    Args:
        name: the function's qualified name, for errors.
        sink: who hears of each call.
        flags: `messages.WITH_RESOURCE` or 0.
        timeout: how many seconds each call may take, or None.
        payload: the pickled call (one call), or the pickled function (a batch).
        buffers: a single call's buffers.
        items: a batch's arguments, pickled one by one; None for a single call.
        first: the sink's index of the first call.
    """

    __slots__ = (
        "at",
        "buffers",
        "cancelled",
        "deaths",
        "first",
        "flags",
        "items",
        "kind",
        "name",
        "payload",
        "runner",
        "sink",
        "timeout",
    )

    def __init__(
        self,
        name: str,
        sink: Sink,
        flags: int,
        timeout: float | None,
        payload: bytes,
        buffers: Sequence[pickle.PickleBuffer] = (),
        items: list[bytes] | None = None,
        first: int = 0,
        kind: int = messages.CALL,
    ) -> None:
        self.name = name
        self.sink = sink
        self.flags = flags
        self.timeout = timeout
        self.payload = payload
        self.buffers = buffers
        self.items = items
        self.first = first
        self.kind = messages.BATCH if items is not None else kind
        self.at = 0  # how many calls have ended
        self.deaths = 0  # how many workers died before they began its first call
        self.cancelled = False
        self.runner: Any = None  # the lease it runs on

    def __len__(self) -> int:
        return 1 if self.items is None else len(self.items)

    @property
    def left(self) -> int:
        """How many calls have not ended."""
        return len(self) - self.at

    def pieces(self, number: int, lease: int) -> list[bytes | memoryview]:
        """The message that asks for all calls, numbered from `number`."""
        payload = self.payload
        if self.items is not None:
            payload = messages.pack_batch(payload, self.items)
        return messages.pack(self.kind, self.flags, number, lease, payload, self.buffers)

    def rest(self) -> Task | None:
        """A task of the calls that have not ended, or None."""
        if not self.left:
            return None
        if self.at:
            assert self.items is not None
            self.items = self.items[self.at :]
            self.first += self.at
            self.at = 0
        self.runner = None
        return self
