"""A worker's loop, in a thread: who hears what when several clients have sent something."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from whitepool_mp.wire import frames, messages, pages, payload
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.messages import Message, MessageReader
from whitepool_mp.wire.pages import Page
from whitepool_mp.worker.serve import Server

_arrivals: list[tuple[socket.socket, bytes]] = []


def arrive(number: int) -> int:
    """Runs in the worker's loop: another client's request comes just then."""
    sock, data = _arrivals.pop()
    sock.sendall(data)
    return number


def heard(number: int) -> bool:
    """Runs in the worker's loop: whether another client has an answer already."""
    sock, _ = _arrivals.pop()
    return bool(select.select([sock], [], [], 0)[0])


def call(number: int, lease: int, function: object = abs) -> bytes:
    assert callable(function)
    data, _, _ = payload.dump_job(function, (number,), {})
    return messages.pack(messages.CALL, 0, number, lease, data, [])[0]


class Bench:
    """A worker, and its manager's and its clients' ends."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.page_fd = os.memfd_create("page")
        os.ftruncate(self.page_fd, pages.SIZE)
        self.page = Page(self.page_fd)
        self.server = Server(Socket(fileno=theirs.detach()), self.page, None)
        self.clients: list[socket.socket] = []
        self.thread = threading.Thread(target=self.server.run)

    def client(self, data: bytes = b"") -> socket.socket:
        """Another channel, in which a request lies already."""
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        ours.sendall(data)
        self.clients.append(ours)
        adopt = frames.adopt(pages.slot(len(self.clients)))
        socket.send_fds(self.control, [adopt], [theirs.fileno()])
        theirs.close()
        return ours

    def close(self) -> None:
        self.control.close()
        self.thread.join(20)
        assert not self.thread.is_alive()
        for sock in self.clients:
            sock.close()
        self.server.close_inherited()
        self.page.close()
        os.close(self.page_fd)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def answers(sock: socket.socket, count: int) -> list[tuple[int, int, int]]:
    """Kind, flags and number of so many messages, and no more."""
    reader, found = MessageReader(), []
    while len(found) < count:
        received = sock.recv_into(reader.room)
        assert received
        message: Message | None = reader.take(received)
        while message is not None:
            found.append((message.kind, message.flags, message.number))
            message = reader.pop() if reader.more else None
    return found


def test_what_was_sent_under_an_older_lease_is_refused_before_a_newer_one_begins(
    bench: Bench,
) -> None:
    newer = bench.client(call(1, 5, heard))
    older = bench.client(call(2, 4))
    _arrivals.append((older, b""))
    bench.thread.start()
    data = newer.recv(4096)
    assert payload.loads(data[messages.HEAD.size :]) is True
    assert answers(older, 1) == [(messages.ERROR, messages.FENCED, 2)]


def test_everybody_gets_their_own_answers_when_a_lease_begins(bench: Bench) -> None:
    """The first of two calls that came together has been answered, and that is not sent yet."""
    first = bench.client(call(1, 5, arrive) + call(2, 7))
    other = bench.client()
    _arrivals.append((other, call(3, 4)))
    bench.thread.start()
    assert answers(other, 1) == [(messages.ERROR, messages.FENCED, 3)]
    assert answers(first, 2) == [(messages.RESULT, 0, 1), (messages.RESULT, 0, 2)]


def test_who_is_in_the_middle_of_sending_a_large_request_is_not_left_to_wait_for_room(
    bench: Bench,
) -> None:
    large = messages.pack(messages.CALL, 0, 1, 4, bytes(1 << 20), [])[0]
    older = bench.client(large[: 1 << 17])
    newer = bench.client()
    bench.thread.start()
    newer.sendall(call(2, 5))
    assert answers(newer, 1) == [(messages.RESULT, 0, 2)]
    with pytest.raises(ConnectionError):
        older.sendall(large[1 << 17 :])
