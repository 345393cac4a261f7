"""The channels of an engine: one to each worker that it met, read and written without waiting.

    Dispatcher --push--------->  EngineChannel  ===calls====>  worker
               <--answered, lost--  |     <=====answers======    |
                                    '--unsent, results-- page <--'

The part of an engine that faces the workers. A channel is asked of the manager at the first meeting
and stays when the lease ends, for the next one with that worker. The engine's pump says when there
is something to read or room to write, and what comes goes to its dispatcher.

Guarantees: the answers of a worker are heard before its death is, those that it had not sent yet
and that lie on its page included.
"""

from __future__ import annotations

from collections import deque

from whitepool_mp.client.engine_lease import EngineChannel, EngineLease
from whitepool_mp.client.link import take_pair
from whitepool_mp.client.poller import IN, OUT, new_poller
from whitepool_mp.client.requests import Requests
from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import frames, messages
from whitepool_mp.wire.passed import receive_due


class Channels(Requests):
    """The channels to workers, and the epoll that tells what can be read and written."""

    def __init__(self) -> None:
        super().__init__()
        self._epoll = new_poller()
        self._fds: deque[int] = deque()  # came with the manager's answers
        self._opening: set[EngineLease] = set()
        self._channels: dict[int, EngineChannel] = {}  # by worker
        self._by_fd: dict[int, EngineChannel] = {}

    # --- opening --------------------------------------------------------------------------

    def channel(self, lease: EngineLease) -> EngineChannel | None:
        """The channel to a leased worker, or None: it is asked for, and `opened` will hear."""
        channel = self._channels.get(lease.worker)
        if channel is None and lease not in self._opening:
            self._opening.add(lease)
            number = next(self._numbers)
            data = frames.request_lease(frames.OPEN, number, lease.id)
            self._send(number, data, lambda body: self._heard_channel(lease, body))
        return channel

    def _heard_channel(self, lease: EngineLease, body: bytes) -> None:
        self._opening.discard(lease)
        if not body:
            assert self.broken is not None
            self.jobs.break_all(self.broken, [lease])
            return
        slot, lost = frames.read_channel(body)
        if not slot:
            if lease.ended is None and (lost or lease.manual):
                self.jobs.lost(lease)
            elif lease.ended is None:
                self.jobs.recalled(lease)  # before its first call
            return
        self._forget_dead()
        try:
            channel = EngineChannel(*take_pair(self._fds), slot)
        except OSError as error:
            self.jobs.give_up(lease, error)
            return
        self._channels[lease.worker] = channel
        fd = channel.sock.fileno()
        self._by_fd[fd] = channel
        self._epoll.register(fd, IN)
        if lease.ended is None:
            self.jobs.opened(lease, channel)
        else:
            self._close_channel(lease.worker)

    def _forget_dead(self) -> None:
        for worker, channel in list(self._channels.items()):
            if channel.lease is None and channel.dead():
                self._close_channel(worker)

    # --- to the workers -------------------------------------------------------------------

    def push(self, channel: EngineChannel) -> None:
        """Write what is queued, now or when the worker reads."""
        fd = channel.sock.fileno()
        if fd >= 0 and not channel.push():
            self._epoll.modify(fd, IN | OUT)

    # --- from the workers -----------------------------------------------------------------

    def _hear_worker(self, channel: EngineChannel) -> bool:
        """Read once; whether there may be more."""
        reader = channel.reader
        try:
            if reader.due:
                count = receive_due(channel.sock, reader)
            else:
                count = channel.sock.recv_into(reader.room)
        except BlockingIOError:
            return False
        except OSError:
            count = 0
        if not count:
            self._hear_unsent(channel)
            self._hung_up(channel)
            return False
        try:
            message = reader.take(count)
            while message is not None:
                self.jobs.answered(channel, message)
                message = reader.pop() if reader.more else None
        except ProtocolError:  # something in the worker wrote to descriptors not its own
            self._hung_up(channel)
            return False
        return True

    def hear_all(self, channel: EngineChannel) -> None:
        """Take in every answer that there is, those that have not been sent yet as well."""
        while channel.sock.fileno() >= 0:
            while channel.sock.fileno() >= 0 and self._hear_worker(channel):
                pass
            self._hear_unsent(channel)
            # What was sent meanwhile was in neither place when this looked there; now it is here.
            if channel.sock.fileno() < 0 or not self._hear_worker(channel):
                return

    def _hear_unsent(self, channel: EngineChannel) -> None:
        """Take in answers that the worker is about to send, or could not send before it died.

        If they come again through the channel, their numbers are not expected any more.
        """
        lease = channel.lease
        try:
            if lease is not None and channel.sock.fileno() >= 0:
                for message in messages.read_all(channel.page.unsent(lease.id)):
                    self.jobs.answered(channel, message)
            if lease is not None and channel.sock.fileno() >= 0:
                found = channel.page.results(lease.id)
                if found is not None:
                    first, count, kind, data = found
                    packed = messages.pack_results(first, 0, count, kind, data)
                    for message in messages.read_all(packed):
                        self.jobs.answered(channel, message)
        except ProtocolError:
            return  # something in the worker wrote to memory not its own: no answer is there

    # --- closing --------------------------------------------------------------------------

    def _hung_up(self, channel: EngineChannel) -> None:
        """Nothing more can come through a channel."""
        lease = channel.lease
        if lease is not None and lease.ended is None:
            self.jobs.lost(lease)
        else:
            self._close_channel(
                next(worker for worker, known in self._channels.items() if known is channel)
            )

    def drop(self, lease: EngineLease) -> None:
        """The worker of a lease is dead or given up: close the channel to it."""
        channel, lease.channel = lease.channel, None
        if channel is not None:
            channel.lease = None
            self._close_channel(lease.worker)

    def _close_channel(self, worker: int) -> None:
        channel = self._channels.pop(worker, None)
        if channel is not None:
            fd = channel.sock.fileno()
            self._epoll.unregister(fd)
            del self._by_fd[fd]
            channel.close()
