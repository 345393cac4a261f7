"""A worker that an engine holds, and the channel to one, written as far as the worker reads."""

from __future__ import annotations

from whitepool_mp.client.channel import Channel
from whitepool_mp.client.tasks import Task
from whitepool_mp.wire import frames, messages

LOST = "lost (its worker died)"
"""How a lease ended under which the worker died."""


class EngineLease:
    """A worker leased by an engine."""

    __slots__ = ("channel", "ended", "id", "kept", "number", "pid", "slot", "task", "worker")

    def __init__(self, grant: frames.Grant, kept: bool) -> None:
        self.id = grant.lease
        self.worker = grant.worker
        self.pid = grant.pid
        self.slot = grant.slot
        self.kept = kept  # its holder checks it in; otherwise it goes back after its task
        self.number = 0
        self.channel: EngineChannel | None = None
        self.task: Task | None = None
        self.ended: str | None = None


class EngineChannel(Channel):
    """A direct channel that is written to as far as the worker reads."""

    def __init__(self, sock_fd: int, page_fd: int) -> None:
        super().__init__(sock_fd, page_fd)
        self.sock.setblocking(False)
        self.unsent: list[memoryview] = []
        self.lease: EngineLease | None = None

    def push(self) -> bool:
        """Write what goes; whether all is written."""
        unsent = self.unsent
        while unsent:
            try:
                messages.drop_sent(unsent, self.sock.sendmsg(unsent[:512]))
            except BlockingIOError:
                return False
            except OSError:
                unsent.clear()  # it is dead: reading finds out
        return True
