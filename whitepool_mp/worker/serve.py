"""The worker's loop: one call at a time, from whoever holds the lease.

    manager --ADOPT (a channel), RECALL, RETIRE--> |        | <--calls---- holder
            <--RELEASED--------------------------- | Server | --answers--> holder

One wait on the control socket and every channel. A channel belongs to a client process that once
leased this worker; only the process with the newest lease is served (`fence`), others get FENCED.
Calls may be sent before the one that runs has been answered: they wait in the channel, and until
they begin they can be taken back, by their sender or together with the lease (`wire.pages`). Before
each wait the page is told that nothing runs and every answer is sent: a lease that is recalled then
is free without a RELEASED.
What becomes of a call is in `calls`, and of its answer in `answers`.
"""

from __future__ import annotations

import select
import sys

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import descriptors, frames, messages, pages, rooms
from whitepool_mp.wire.descriptors import DONTWAIT, Socket
from whitepool_mp.wire.messages import CALL, Message
from whitepool_mp.wire.pages import KIND, QUIET, RECALLED, RESULTS, SENDINGS, UNSENT, Page
from whitepool_mp.wire.passed import receive_due
from whitepool_mp.worker.answers import Channel
from whitepool_mp.worker.calls import Calls

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Any

_MOST_READY = 16
_WARM_SECONDS = 1.0
"""For how long an idle worker keeps memory for large arguments."""


class Server(Calls):
    """Serves calls until the manager says RETIRE or is gone.

    Args:
        control: the socket to the manager.
        page: where the call begun last is noted, and what was taken back.
        resource: what the factory built.
    """

    def __init__(self, control: Socket, page: Page, resource: Any) -> None:
        super().__init__(page, resource)
        self._control = control
        self._decoder = frames.FrameDecoder()
        self._channels: dict[int, Channel] = {}
        self._poll = select.epoll()
        self._poll.register(control.fileno(), select.EPOLLIN)
        self._retired = False

    def run(self) -> bool:
        """Serve.

        Returns:
            True if the manager asked for a clean stop, False if it is gone.
        """
        control = self._control.fileno()
        channels, poll, words = self._channels, self._poll.poll, self._words
        while True:
            words[QUIET] = self._calls
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

    def leave_open(self) -> None:
        """Have every socket end with this process, however long that takes, not with this object:
        who finds one closed takes the process for dead, or unreachable."""
        for channel in self._channels.values():
            channel.sock.detach()
        self._control.detach()

    def _hear_manager(self) -> bool:
        try:
            data, fds = descriptors.receive(self._control, 4096, 64)
        except ConnectionResetError:  # closed, with what this worker had said unread
            return False
        if not data:
            return False
        for body in self._decoder.feed(data):
            if body[0] == frames.ADOPT:
                sock = Socket(fileno=fds.pop(0))
                sock.setblocking(True)
                skip = pages.slot_words(frames.read_lease(body)[0])
                self._channels[sock.fileno()] = Channel(sock, skip)
                self._poll.register(sock.fileno(), select.EPOLLIN)
                self.set_limits()
            elif body[0] == frames.RECALL:
                lease, patient = frames.read_recall(body)
                if patient:
                    self._serve_sent()
                if lease >= self._fence:
                    self._fence = lease + 1
                    self._kept.clear()
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
            words = self._words
            words[UNSENT] = words[RESULTS] = words[KIND] = self._unsent = 0
            words[SENDINGS] += 1

    def _hear_client(self, channel: Channel) -> None:
        reader = channel.reader
        try:
            try:
                if reader.due:
                    count = receive_due(channel.sock, reader, DONTWAIT)
                else:
                    count = channel.sock.recv_into(reader.room, 0, DONTWAIT)
            except BlockingIOError:
                return  # it was served when the manager wanted that done first
            if not count:
                self._drop(channel)
                return
            message = reader.take(count)
            while message is not None:
                if message.token > self._fence:
                    self._begin_lease(channel, message.token)
                    if channel.sock.fileno() < 0:
                        return  # a newer lease has begun meanwhile
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

    def _begin_lease(self, channel: Channel, lease: int) -> None:
        """The first message under a lease came: nobody else has a say here any more.

        What others have sent is refused before anything is begun under this lease, which may take
        as long as it likes. They look, after they have sent something, whether they were too late
        for that.
        """
        if lease > pages.LAST_LEASE:
            raise ProtocolError(f"no lease has the number {lease}")
        self._fence = lease
        self._kept.clear()
        if self._words[RECALLED] >= lease:
            return
        if self._unsent:
            self._send_unsent(channel)  # answers that lie here are this one's
        for fd, _ in self._poll.poll(0):
            other = self._channels.get(fd)
            if other is not None and other is not channel:
                self._hear_client(other)
        for other in list(self._channels.values()):
            if other is not channel and other.reader.part_of_large:
                self._drop(other)  # who sends it must not wait for room

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


def flush_output() -> None:
    """Write out what user code printed; a closed or broken output is its own business."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
