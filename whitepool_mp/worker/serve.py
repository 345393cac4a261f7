"""The worker's loop: one call at a time, from whoever holds the lease.

    manager --ADOPT (a channel), RETIRE--> |        | <--calls-- holder
                                           | Server | --answers--> holder

One wait on the control socket and every channel. A channel belongs to a client process that once
leased this worker; only the process with the newest lease is served (`fence`), others get FENCED.

Guarantees: before anything of a call's is unpickled, the page says that the call began; each call
is answered exactly once, or the worker is dead; nothing of a call is kept alive after it.
"""

from __future__ import annotations

import mmap
import select
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import descriptors, frames, messages, payload
from whitepool_mp.wire.messages import Message, MessageReader


class Channel:
    """A client's end of a direct channel, and what has come of its next message."""

    __slots__ = ("reader", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = MessageReader()


class Server:
    """Serves calls until the manager says RETIRE or is gone.

    Args:
        control: the socket to the manager.
        page: the shared page on which the call begun last is noted.
        resource: what the factory built.
        has_resource: whether there was a factory.
    """

    def __init__(
        self, control: socket.socket, page: mmap.mmap, resource: Any, has_resource: bool
    ) -> None:
        self._control = control
        self._decoder = frames.FrameDecoder()
        self._page = page
        self._resource = resource
        self._has_resource = has_resource
        self._channels: dict[int, Channel] = {}
        self._fence = 0
        self._calls = 0
        self._kept: dict[int, Any] = {}
        self._poll = select.epoll()
        self._poll.register(control.fileno(), select.EPOLLIN)
        self._retired = False

    def run(self) -> bool:
        """Serve.

        Returns:
            True if the manager asked for a clean stop, False if it is gone.
        """
        control = self._control.fileno()
        while True:
            ready = self._poll.poll()
            for fd, _ in ready:
                if fd == control:
                    if not self._hear_manager():
                        return self._retired
                elif fd in self._channels:
                    self._hear_client(self._channels[fd])

    def close_inherited(self) -> None:
        """In a child that user code forked: close its copies, so that our end-of-file comes."""
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
                self._channels[sock.fileno()] = Channel(sock)
                self._poll.register(sock.fileno(), select.EPOLLIN)
            elif body[0] == frames.RETIRE:
                self._retired = True
                return False
            else:
                raise ProtocolError(f"the manager sent a frame of kind {body[0]}")
        return True

    def _drop(self, channel: Channel) -> None:
        fd = channel.sock.fileno()
        if fd >= 0:
            self._poll.unregister(fd)
            del self._channels[fd]
            channel.sock.close()

    def _hear_client(self, channel: Channel) -> None:
        reader = channel.reader
        try:
            count = channel.sock.recv_into(reader.want())
            if not count:
                self._drop(channel)
                return
            reader.received(count)
            while (message := reader.pop()) is not None:
                self._serve(channel.sock, message)
        except (ConnectionError, ProtocolError):
            # The client is gone, or speaks nonsense: its channel ends, others go on. A lease that
            # it held is the manager's to take back.
            self._drop(channel)

    def _serve(self, sock: socket.socket, message: Message) -> None:
        lease = message.token
        if lease != self._fence:
            if lease < self._fence:
                if message.kind != messages.RELEASE:
                    self._refuse(sock, message)
                return
            self._fence = lease
            self._kept.clear()
        if message.kind == messages.CALL:
            self._call(sock, message)
        elif message.kind == messages.METHOD:
            self._method(sock, message)
        elif message.kind == messages.BATCH:
            self._batch(sock, message)
        elif message.kind == messages.RELEASE:
            self._kept.clear()
        else:
            raise ProtocolError(f"a client sent a message of kind {message.kind}")

    def _begin(self, lease: int, number: int) -> None:
        self._calls += 1
        messages.PAGE.pack_into(self._page, 0, messages.started_token(lease, number), self._calls)

    def _refuse(self, sock: socket.socket, message: Message) -> None:
        pieces = messages.pack(messages.ERROR, messages.FENCED, message.number, 0, b"")
        messages.send_all(sock, pieces)

    def _call(self, sock: socket.socket, message: Message) -> None:
        self._begin(message.token, message.number)
        started = time.perf_counter_ns()
        try:
            if message.flags & messages.SPLIT:
                function_pickle, rest = messages.read_split(message.payload)
                function = payload.loads(function_pickle)
                args, kwargs = payload.loads(rest, buffers=message.buffers)
            else:
                function, args, kwargs = message.load()
        except BaseException as error:
            self._fail(sock, message.number, messages.LOADING, error, started)
            return
        number, flags = message.number, message.flags
        del message
        self._run(sock, number, flags, function, args, kwargs, started)

    def _run(
        self,
        sock: socket.socket,
        number: int,
        flags: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        started: int,
    ) -> None:
        try:
            if flags & messages.WITH_RESOURCE:
                value = function(self._resource, *args, **kwargs)
            else:
                value = function(*args, **kwargs)
        except BaseException as error:
            self._fail(sock, number, messages.RAISED, error, started)
            return
        took = time.perf_counter_ns() - started
        try:
            data, buffers = payload.dumps(value)
        except BaseException as error:
            self._fail(sock, number, messages.DUMPING, error, started, function, value)
            return
        messages.send_all(sock, messages.pack(messages.RESULT, 0, number, took, data, buffers))

    def _method(self, sock: socket.socket, message: Message) -> None:
        self._begin(message.token, message.number)
        started = time.perf_counter_ns()
        number = message.number
        try:
            target_id, name, args, kwargs = message.load()
            target = self._kept[target_id] if target_id else self._resource
        except BaseException as error:
            self._fail(sock, number, messages.LOADING, error, started)
            return
        del message
        try:
            value = getattr(target, name)(*args, **kwargs)
        except BaseException as error:
            self._fail(sock, number, messages.RAISED, error, started)
            return
        del args, kwargs
        took = time.perf_counter_ns() - started
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
        messages.send_all(sock, messages.pack(messages.RESULT, flags, number, took, data, buffers))

    def _batch(self, sock: socket.socket, message: Message) -> None:
        function_pickle, items = messages.read_batch(message.payload)
        lease, number, flags = message.token, message.number, message.flags
        del message
        function: Callable[..., Any] | None = None
        for offset, item in enumerate(items):
            self._begin(lease, number + offset)
            started = time.perf_counter_ns()
            try:
                if function is None:
                    function = payload.loads(function_pickle)
                args, kwargs = payload.loads(item)
            except BaseException as error:
                self._fail(sock, number + offset, messages.LOADING, error, started)
                continue
            self._run(sock, number + offset, flags, function, args, kwargs, started)
            del args, kwargs

    def _fail(
        self,
        sock: socket.socket,
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
        took = time.perf_counter_ns() - started
        error.__traceback__ = None
        messages.send_all(sock, messages.pack(messages.ERROR, step, number, took, data))


def flush_output() -> None:
    """Write out what user code printed; a closed or broken output is its own business."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue
