"""Call messages: packed in one process, read in another, however the bytes were cut on the way."""

from __future__ import annotations

import ctypes
import gc
import pickle
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import messages, pages, payload, rooms
from whitepool_mp.wire.messages import Message, MessageReader

KIB = 1024
BUFFER = 64 * KIB
HEAD = messages.HEAD.size


def around(*sizes: int) -> st.SearchStrategy[int]:
    """Sizes at, just below and just above each of these."""
    return st.sampled_from(
        sorted({max(0, size + more) for size in sizes for more in (-25, -24, -1, 0, 1, 24)})
    )


PAYLOADS = around(0, HEAD, 1000, BUFFER - HEAD, BUFFER, 2 * BUFFER)
BUFFERS = st.lists(around(0, 16 * KIB, BUFFER, 256 * KIB), max_size=5)


class Packed:
    """A message that was packed, and what was put into it."""

    def __init__(self, kind: int, flags: int, number: int, token: int, size: int, sizes: list[int]):
        fill = (number * 7 + 1) % 251
        self.fields = (kind, flags, number, token)
        self.buffers: list[bytes | bytearray]
        self.payload = bytes((fill,)) * size
        self.buffers = [bytearray(((fill + i + 1) % 256,)) * each for i, each in enumerate(sizes)]
        for frozen in range(number % 2, len(sizes), 2) if number > 1 else ():
            self.buffers[frozen] = bytes(self.buffers[frozen])
        pieces = messages.pack(
            *self.fields, self.payload, [pickle.PickleBuffer(each) for each in self.buffers]
        )
        self.data = b"".join(pieces)

    def __repr__(self) -> str:
        sizes = [len(each) for each in self.buffers]
        return f"Packed{(*self.fields, len(self.payload), sizes)}"

    def is_in(self, message: Message) -> bool:
        """Whether a message that was read is this one; looked at before the next read."""
        return (
            message[:4] == self.fields
            and bytes(message.payload) == self.payload
            and [bytes(each) for each in message.buffers] == [bytes(each) for each in self.buffers]
            and [type(each) is bytes for each in message.buffers]
            == [type(each) is bytes or not each for each in self.buffers]
        )


PACKED = st.builds(
    Packed,
    st.integers(messages.CALL, messages.ERROR),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    PAYLOADS,
    BUFFERS,
)


def receive(reader: MessageReader, data: bytes, portions: Iterable[int] = ()) -> list[int]:
    """Feed bytes as a socket would, in these portions and then as much as fits."""
    at, sizes = 0, []
    given = iter(portions)
    while at < len(data):
        room = reader.room
        assert len(room) > 0
        count = min(len(room), len(data) - at, next(given, len(data)))
        room[:count] = data[at : at + count]
        yield_all(reader, reader.take(count))
        at += count
        sizes.append(count)
    return sizes


_found: list[tuple[Message, bool]] = []
_expected: list[Packed] = []


def yield_all(reader: MessageReader, message: Message | None) -> None:
    """Take out every whole message and compare it while its payload is valid."""
    while message is not None:
        _found.append((message, _expected[len(_found)].is_in(message)))
        message = reader.pop() if reader.more else None


def check(packed: Sequence[Packed], portions: Iterable[int]) -> None:
    """Every message comes out whole, in order, and nothing stays behind."""
    _found.clear()
    _expected[:] = packed
    reader = MessageReader()
    receive(reader, b"".join(each.data for each in packed), portions)
    assert len(_found) == len(packed)
    assert all(same for _, same in _found), packed
    assert not reader.more
    assert reader.pop() is None


@settings(max_examples=150, deadline=None)
@given(st.lists(PACKED, min_size=1, max_size=4), st.lists(st.integers(1, 40_000), max_size=30))
def test_messages_come_out_as_they_went_in_however_they_were_cut(
    packed: list[Packed], portions: list[int]
) -> None:
    check(packed, portions)


@settings(max_examples=20, deadline=None)
@given(st.lists(PACKED, min_size=2, max_size=5))
def test_several_messages_in_one_receive(packed: list[Packed]) -> None:
    check(packed, ())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 3 * HEAD), st.lists(st.integers(0, 50), max_size=3))
def test_messages_that_arrive_byte_by_byte(size: int, sizes: list[int]) -> None:
    packed = [Packed(messages.CALL, 0, i, 9, size, sizes) for i in range(3)]
    check(packed, [1] * sum(len(each.data) for each in packed))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=60, max_size=120), st.integers(1, 70_000))
def test_many_small_messages_pass_through_the_same_buffer(sizes: list[int], portion: int) -> None:
    packed = [Packed(messages.RESULT, 0, i, 1, size, []) for i, size in enumerate(sizes)]
    check(packed, [portion] * 1000)


def test_a_large_buffer_is_received_into_the_memory_in_which_it_stays() -> None:
    one = Packed(messages.CALL, 0, 1, 1, 10, [BUFFER * 8])
    reader = MessageReader()
    head = len(one.data) - BUFFER * 8
    reader.room[:head] = one.data[:head]
    assert reader.take(head) is None
    final = reader.room
    assert len(final) == BUFFER * 8
    where = ctypes.addressof(ctypes.c_char.from_buffer(final))
    final[:] = one.data[head:]
    message = reader.take(len(final))
    assert message is not None
    (buffer,) = message.buffers
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) == where
    final[0] = 200
    assert buffer[0] == 200


def test_buffers_are_writable_at_every_size() -> None:
    sizes = [1, 16 * KIB, 256 * KIB - 1, 256 * KIB]
    _expected[:] = [Packed(messages.CALL, 0, 1, 1, 1, sizes)]
    _found.clear()
    receive(MessageReader(), _expected[0].data)
    ((message, _),) = _found
    assert [memoryview(each).readonly for each in message.buffers] == [False] * 4


def test_a_large_buffer_that_nobody_refers_to_any_more_is_filled_again() -> None:
    rooms.let_go()
    one = Packed(messages.CALL, 0, 1, 1, 10, [BUFFER * 8])
    reader = MessageReader()

    def received() -> memoryview:
        _expected[:] = [one]
        _found.clear()
        receive(reader, one.data)
        ((message, _),) = _found
        _found.clear()
        assert isinstance(message.buffers[0], memoryview)
        return message.buffers[0]

    def place(buffer: memoryview) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))

    try:
        first = place(received())
        gc.collect()
        kept = received()
        assert place(kept) == first
        assert place(received()) != first
    finally:
        rooms.let_go()


def test_a_reader_in_the_middle_of_a_message_is_not_clean() -> None:
    one = Packed(messages.CALL, 0, 1, 1, 100, [BUFFER * 2])
    for end in (1, HEAD, HEAD + 8, HEAD + 50, len(one.data) - 1):
        reader = MessageReader()
        _found.clear()
        receive(reader, one.data[:end])
        assert _found == []
        assert reader.more


@pytest.mark.parametrize("kind", [0, 9, 64, 255])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    reader = MessageReader()
    with pytest.raises(ProtocolError, match="no message"):
        receive(reader, messages.HEAD.pack(kind, 0, 0, 1, 1, 0))


@pytest.mark.parametrize("length", [2**40, 2**46, 2**46 + 1, 2**63, 2**64 - 1])
def test_a_payload_that_fits_no_memory_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        receive(MessageReader(), messages.HEAD.pack(messages.CALL, 0, 0, 1, 1, length))


@pytest.mark.parametrize("sizes", [[2**46], [2**64 - 1], [2**62, 2**62], [100, 2**46]])
def test_buffers_that_fit_no_memory_are_refused(sizes: list[int]) -> None:
    head = messages.HEAD.pack(messages.CALL, 0, len(sizes), 1, 1, 5)
    with pytest.raises(ProtocolError):
        receive(MessageReader(), head + struct.pack(f"<{len(sizes)}Q", *sizes))


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=HEAD, max_size=400))
@example(messages.HEAD.pack(messages.CALL, 0, 0xFFFF, 1, 1, 5))
def test_garbage_raises_nothing_but_protocol_errors(data: bytes) -> None:
    _found.clear()
    _expected[:] = [Packed(messages.CALL, 0, 0, 0, 0, [])] * 20
    try:
        receive(MessageReader(), data)
    except ProtocolError:
        pass


def test_whatever_payload_dumps_a_reader_takes() -> None:
    """The most buffers that travel beside a pickle are as many as a reader accepts."""
    count = payload.MAX_BUFFERS
    packed = Packed(messages.CALL, 0, 1, 1, 10, [1] * count)
    check([packed], ())


# --- sockets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 600, 1500])
def test_a_message_of_many_pieces_goes_through_a_socket(count: int) -> None:
    one = Packed(messages.CALL, 0, 1, 1, 10, [1000] * count)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pieces = messages.pack(
            *one.fields, one.payload, [pickle.PickleBuffer(each) for each in one.buffers]
        )
        sender = threading.Thread(target=messages.send_all, args=(ours, pieces))
        sender.start()
        reader = MessageReader()
        while (message := reader.take(theirs.recv_into(reader.room))) is None:
            pass
        sender.join()
        assert one.is_in(message)


def test_a_large_message_is_gathered_from_where_it_lies() -> None:
    block = bytearray(1 << 20)
    pieces = messages.pack(messages.CALL, 0, 1, 1, b"pickle", [pickle.PickleBuffer(block)])
    assert pieces[-1].obj is block  # type: ignore[union-attr]


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=10), st.data())
def test_what_was_sent_is_taken_off_the_front(pieces: list[bytes], data: st.DataObject) -> None:
    everything = b"".join(pieces)
    rest = [memoryview(piece) for piece in pieces]
    sent = data.draw(st.integers(0, len(everything)))
    messages.drop_sent(rest, sent)
    assert b"".join(rest) == everything[sent:]
    assert all(len(piece) for piece in rest)


# --- what a payload holds ---------------------------------------------------------------------


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_split_payload_round_trip(function: bytes, arguments: bytes) -> None:
    packed = messages.pack_split(function, arguments)
    assert messages.read_split(memoryview(packed)) == (function, arguments)


@given(st.binary(max_size=50), st.lists(st.binary(max_size=50), max_size=20))
def test_a_batch_payload_round_trip(function: bytes, items: list[bytes]) -> None:
    packed = messages.pack_batch(function, items)
    assert messages.read_batch(memoryview(packed)) == (function, items)


@settings(max_examples=300)
@given(st.binary(max_size=60), st.sampled_from([messages.read_split, messages.read_batch]))
def test_garbage_in_a_payload_raises_nothing_but_protocol_errors(data: bytes, read: Any) -> None:
    try:
        read(memoryview(data))
    except ProtocolError:
        pass


@given(st.integers(1, 2**39), st.integers(1, 2**23))
def test_a_token_tells_two_calls_apart(lease: int, number: int) -> None:
    token = pages.token(lease, number)
    assert token != pages.token(lease, number + 1)
    assert token != pages.token(lease + 1, number)
    assert 0 < token < 2**64
