"""Descriptors that travel with messages: they arrive with theirs, or are closed."""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Iterator

import pytest

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import descriptors, messages, passed
from whitepool_mp.wire.messages import HEAD, Message, MessageReader
from whitepool_mp.wire.passed import Arrived, Incoming, Outgoing

DESCRIPTORS = 1 << 62


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """The ends of some pipes."""
    ends = [end for _ in range(3) for end in os.pipe()]
    yield ends
    for end in ends:
        os.close(end)


def outgoing(*fds: int) -> Outgoing:
    """These on their way."""
    travelling = Outgoing(None)
    for fd in fds:
        travelling.add(fd)
    return travelling


def opened() -> int:
    """This process's open descriptors."""
    return len(os.listdir("/proc/self/fd"))


def exchange(
    ends: tuple[socket.socket, socket.socket], pieces: list[bytes | memoryview]
) -> list[Message]:
    """Write all that there is room for, read once, and so on; the messages."""
    rest = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    reader, found = MessageReader(), []
    while True:
        try:
            if rest:
                messages.send_some(ends[0], rest)
        except BlockingIOError:
            pass
        try:
            if reader.due:
                count = passed.receive_due(ends[1], reader)
            else:
                count = ends[1].recv_into(reader.room)
        except BlockingIOError:
            if not rest:
                return found
            continue
        message = reader.take(count)
        while message is not None:
            found.append(message._replace(payload=memoryview(bytes(message.payload))))
            message = reader.pop() if reader.more else None


def test_descriptors_arrive_with_their_message_among_others(
    pair: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    before = opened()
    travelling = outgoing(*pipes)
    large = pickle.PickleBuffer(bytearray(300_000))
    small = messages.pack(messages.CALL, 0, 1, 7, b"small")
    many = messages.pack(messages.CALL, 0, 2, 7, b"x" * 100, [travelling, large])
    few = messages.pack(messages.RESULT, 0, 3, 7, b"y" * 100_000, [outgoing(pipes[0])])
    found = exchange(pair, [*small, *small, *many, *few, *small, *many, *small])
    assert [message.number for message in found] == [1, 1, 2, 3, 1, 2, 1]
    assert [bytes(message.payload) for message in found[2:4]] == [b"x" * 100, b"y" * 100_000]
    for message, count in (found[2], 6), (found[3], 1), (found[5], 6):
        incoming = message.buffers[0]
        assert type(incoming) is Incoming and incoming.expected == count
        for place in range(count):
            fd = incoming.take(place)
            assert os.path.sameopenfile(fd, pipes[place]) and not os.get_inheritable(fd)
            os.close(fd)
    assert bytes(found[2].buffers[1]) == bytes(300_000)
    travelling.close()
    del found, many, few
    assert opened() == before


def test_what_is_not_taken_is_closed(
    pair: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    before = opened()
    for data in pickle.dumps(3), pickle.dumps((Arrived, 3)), b"nonsense":
        travelling = outgoing(*pipes)
        (message,) = exchange(pair, messages.pack(messages.CALL, 0, 1, 7, data, [travelling]))
        travelling.close()
        try:
            message.load()
        except pickle.UnpicklingError:
            assert data == b"nonsense"
        assert opened() == before


def test_descriptors_that_were_not_announced_are_closed(
    pair: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    before = opened()
    data = HEAD.pack(messages.CALL, 0, 0, 1, 7, 4) + b"data"
    socket.send_fds(pair[0], [data], pipes)
    (message,) = exchange(pair, [])
    assert bytes(message.payload) == b"data" and not message.buffers
    assert opened() == before


@pytest.mark.parametrize("sent", [0, 1, 6])
def test_other_descriptors_than_were_announced(
    pair: tuple[socket.socket, socket.socket], pipes: list[int], sent: int
) -> None:
    """The first ones, as many as were announced, are there; others were closed, or are missed."""
    before = opened()
    head = HEAD.pack(messages.CALL, 0, 1, 1, 7, 4) + struct.pack("<Q", DESCRIPTORS | 2)
    reader = MessageReader()
    pair[0].sendall(head + bytes(65536))
    while not reader.due:
        assert reader.take(pair[1].recv_into(reader.room)) is None
    assert reader.due == 2 and len(reader.room) == 1
    if sent:
        socket.send_fds(pair[0], [b"0"], pipes[:sent])
    else:
        pair[0].sendall(b"0")
    assert reader.take(passed.receive_due(pair[1], reader)) is None
    pair[0].sendall(b"data")
    message = reader.take(pair[1].recv_into(reader.room))
    assert message is not None
    incoming = message.buffers[0]
    for place in range(2):
        if place < sent:
            os.close(incoming.take(place))
        with pytest.raises(OSError):
            incoming.take(place)
    with pytest.raises(OSError):
        incoming.take(2)
    assert opened() == before


@pytest.mark.parametrize("told", [0, 254, 1 << 40])
def test_a_number_of_descriptors_that_cannot_be_is_no_message(told: int) -> None:
    reader = MessageReader()
    head = HEAD.pack(messages.CALL, 0, 1, 1, 7, 4) + struct.pack("<Q", DESCRIPTORS | told)
    reader.room[: len(head)] = head
    with pytest.raises(ProtocolError):
        reader.take(len(head))


def test_a_closed_number_is_never_sent(
    pair: tuple[socket.socket, socket.socket], pipes: list[int]
) -> None:
    """What was given up in the middle of its writing comes without, not with others."""
    travelling = outgoing(pipes[0])
    pieces = messages.pack(messages.CALL, 0, 1, 7, b"data", [travelling])
    travelling.close()
    (message,) = exchange(pair, pieces)
    with pytest.raises(OSError):
        message.buffers[0].take(0)


def test_what_is_stored_is_handed_out_any_number_of_times(pipes: list[int]) -> None:
    before = opened()
    with passed.store(outgoing(*pipes)) as stock:
        for _ in range(3):
            ours, theirs = descriptors.pair()
            with ours, theirs:
                passed.hand_out(stock.fileno(), ours)
                ours.sendall(b"next")
                incoming = passed.take_out(theirs)
                assert theirs.recv(9) == b"next"
                fd = incoming.take(5)
                assert os.path.sameopenfile(fd, pipes[5])
                os.close(fd)
                incoming.close()
    assert opened() == before


def test_a_pickle_without_its_descriptors_says_so() -> None:
    with pytest.raises(RuntimeError, match="travelled with"):
        Arrived(0).detach()
