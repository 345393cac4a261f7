"""A worker that an engine holds, and the channel to one, written as far as the worker reads."""

from __future__ import annotations

from collections import deque

from whitepool_mp.client.channel import Channel
from whitepool_mp.client.tasks import Task
from whitepool_mp.wire import frames, messages, pages
from whitepool_mp.wire.messages import HEAD

RETURNED = "checked in"
"""How a lease ended that was given back."""
LOST = "lost (its worker died)"
"""How a lease ended under which the worker died."""


class EngineLease:
    """A worker leased by an engine, and the tasks that were sent to it, in order.

    Attributes:
        manual: whether its holder checks it in; otherwise it is for jobs.
        keep: whether it may be kept when it has nothing to do, and may be recalled.
        tasks: what is in flight; the first call of the first one runs, or is about to.
        since: when that call became the first one, on the monotonic clock.
        load: how many seconds all of it will take, by what is known.
        left: how many more calls may be sent to it.
        stuck: whether its first call takes long, so that nothing is sent behind it.
        watched: whether a look at how long its first call takes is due.
        ended: how it ended, None while it is good.
    """

    __slots__ = (
        "channel",
        "ended",
        "id",
        "keep",
        "left",
        "load",
        "manual",
        "pid",
        "since",
        "slot",
        "stuck",
        "tasks",
        "watched",
        "worker",
    )

    def __init__(self, grant: frames.Grant, manual: bool) -> None:
        _, self.id, self.worker, self.pid, self.slot, self.keep = grant
        self.manual = manual
        self.channel: EngineChannel | None = None
        self.tasks: deque[Task] = deque()
        self.since = 0.0
        self.load = 0.0
        self.left = pages.UNLIMITED
        self.stuck = False
        self.watched = False
        self.ended: str | None = None

    def note_returned(self) -> None:
        """It is about to be given back: write it where a manager after this one reads it."""
        if self.channel is not None:
            self.channel.note(pages.RETURNED, self.id)

    @property
    def task(self) -> Task | None:
        """What runs on it."""
        return self.tasks[0] if self.tasks else None


class EngineChannel(Channel):
    """A direct channel that is written to as far as the worker reads.

    Calls are numbered by channel, not by lease: an answer that comes late is known by its number,
    whatever lease has the worker by then.

    Attributes:
        number: the last call's number.
        unsent: what is to be written.
        lease: the lease whose calls go through it, if any.
        taken: calls that were taken back and that the worker has not passed yet: the number before
            the first one, and that of the last one.
    """

    def __init__(self, sock_fd: int, page_fd: int, slot: int) -> None:
        super().__init__(sock_fd, page_fd, slot)
        self.sock.setblocking(False)
        self.number = 0
        self.unsent: list[memoryview] = []
        self.lease: EngineLease | None = None
        self.taken: tuple[int, int] | None = None
        self._small: list[bytes | memoryview] = []

    def queue(self, pieces: list[bytes | memoryview]) -> None:
        """Have a message written by the next `push`; small ones are written together."""
        if len(pieces) == 1:
            self._small.append(pieces[0])
            return
        self._gather()
        self.unsent.extend(memoryview(piece).cast("B") for piece in pieces if len(piece))

    def queue_call(self, kind: int, flags: int, lease: int, payload: bytes) -> None:
        """`queue` for a small call that has just been numbered."""
        self._small.append(HEAD.pack(kind, flags, 0, self.number, lease, len(payload)) + payload)

    def renumber(self) -> None:
        """Begin with the first number again, while nothing is in flight and nothing taken back."""
        self.number = 0
        self.page.forget_taken()

    def _gather(self) -> None:
        if self._small:
            data = self._small[0] if len(self._small) == 1 else b"".join(self._small)
            self.unsent.append(memoryview(data))
            self._small.clear()

    @property
    def blocked(self) -> bool:
        """Whether the worker has not read all that was sent."""
        return bool(self.unsent)

    def push(self) -> bool:
        """Write what goes; whether all is written."""
        self._gather()
        unsent = self.unsent
        while unsent:
            try:
                messages.send_some(self.sock, unsent)
            except BlockingIOError:
                return False
            except OSError:
                unsent.clear()  # it is dead: reading finds out
                self.hang_up()  # also if it is not, but descriptors cannot be passed to it
        return True
