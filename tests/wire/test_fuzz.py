"""Whatever bytes come: every parser gives a value or raises `ProtocolError`, and nothing else.

The bytes are random, or a frame that is right but for a few bytes of it, or one whose numbers are
as odd as its fields allow.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whitepool_mp.client.joining import Handshake
from whitepool_mp.errors import AuthenticationFailed, ProtocolError
from whitepool_mp.wire import frames, messages, pages
from whitepool_mp.wire.frames import FrameDecoder
from whitepool_mp.wire.messages import HEAD, MessageReader

KEY = b"k" * frames.KEY_BYTES
MEMBER = b"m" * frames.MEMBER_BYTES

READERS = sorted(
    (getattr(frames, name) for name in dir(frames) if name.startswith("read_")),
    key=lambda read: read.__name__,
)
"""Every parser of a body there is; one that is added later is among them."""

WHOLE = [
    frames.auth(bytes(32), bytes(range(32)), bytes(16), 1, "thread"),
    frames.checkout(1, True, 3.5, "file.py:3", True, True),
    frames.request(frames.CANCEL, 1),
    frames.checkin(7),
    frames.destroy(7, "reason"),
    frames.request_lease(frames.OPEN, 1, 7),
    frames.resize(1, 2, 3),
    frames.challenge(bytes(32)),
    frames.grant(1, 7, 3, 100, 0, True),
    frames.refused(1, "timeout", "detail"),
    frames.channel(1, 3),
    frames.draining(),
    frames.reply(1, {"a": [1, 2.5, None, "text"], "b": {}}),
    frames.recall(7, True),
    frames.released(7),
    frames.plain(frames.FAILED, "Traceback"),
]


@st.composite
def mutated(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """One of these with a few bytes replaced, left out or put in."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(("replace", "cut", "insert", "end")))
        if how == "replace" and data:
            data[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        else:
            del data[at:]
    return bytes(data)


def cut(draw: Callable[[st.SearchStrategy[int]], int], data: bytes) -> list[bytes]:
    """Bytes in portions."""
    pieces = []
    while data:
        size = draw(st.integers(1, len(data)))
        pieces.append(data[:size])
        data = data[size:]
    return pieces


# --- control frames ---------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | mutated(WHOLE), st.data())
@example(b"\0\0\0\1", None)
def test_a_decoder_takes_any_bytes_in_any_portions(data: bytes, more: Any) -> None:
    """It gives the same bodies, or the same refusal, however the bytes were cut."""

    def decode(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        decoder, bodies = FrameDecoder(limit=1024), []
        for piece in pieces:
            try:
                bodies += decoder.feed(piece)
            except ProtocolError:
                return bodies, False
        return bodies, True

    pieces = [data] if more is None else cut(more.draw, data)
    bodies, fine = decode(pieces)
    assert all(0 < len(body) <= 1024 for body in bodies)
    # In one piece nothing is given of what comes before the nonsense: that connection ends.
    at_once, fine_at_once = decode([data])
    assert fine_at_once == fine
    assert not fine or at_once == bodies


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@settings(max_examples=200, deadline=None)
@given(body=st.binary(min_size=1, max_size=200) | mutated([whole[4:] for whole in WHOLE]))
@example(body=bytes((frames.REPLY, 0, 0, 0, 1)) + b"[" * 100_000)
@example(body=bytes((frames.REPLY, 0, 0, 0, 1)) + b"1" * 5_000)
@example(body=bytes((frames.REPLY, 0, 0, 0, 1)) + b"1e400")
@example(body=bytes((frames.REPLY, 0, 0, 0, 1)) + b'"\xff\xfe"')
@example(body=bytes((frames.REPLY, 0, 0, 0, 1)) + b"\xff\xfe\x00")
@example(body=bytes((frames.REPLY,)))
@example(body=b"")
def test_a_body_is_read_or_refused(read: Callable[[bytes], Any], body: bytes) -> None:
    try:
        read(body)
    except ProtocolError:
        pass


NUMBERS = st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1))
ODD = st.sampled_from((float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1.7e308, -1.7e308))


@given(NUMBERS, st.integers(0, 255), ODD | st.floats(), ODD | st.floats(), st.binary(max_size=20))
def test_a_checkout_s_deadline_is_a_number_or_none(
    number: int, flags: int, deadline: float, asked: float, site: bytes
) -> None:
    """A NaN is neither before nor after anything: it would never be due, and never in time."""
    body = struct.pack("!BQBdd", frames.CHECKOUT, number, flags, deadline, asked) + site
    try:
        read = frames.read_checkout(body)
    except ProtocolError:
        assert deadline != deadline or asked != asked
        return
    assert read.deadline is None or read.deadline == deadline < float("inf")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=100) | mutated([w[4:] for w in WHOLE]), max_size=4))
@example([b"\x40" + bytes(32), b"\x41" + bytes(32)])
@example([b"\x40" + bytes(31)])
@example([b"\x40" + bytes(32), b"\x41"])
def test_a_client_that_joins_takes_nonsense_for_no_manager(bodies: list[bytes]) -> None:
    handshake = Handshake(KEY, MEMBER)
    try:
        for body in bodies:
            if body:
                handshake.hear(body)
    except (ProtocolError, AuthenticationFailed):
        pass
    assert not handshake.done


# --- the messages of direct channels ----------------------------------------------------------

SENT = [
    b"".join(messages.pack(messages.CALL, 0, 1, 7, b"payload")),
    b"".join(messages.pack(messages.CALL, 1, 1, 7, messages.pack_split(b"function", b"args"))),
    b"".join(messages.pack(messages.BATCH, 0, 1, 7, messages.pack_batch(b"f", [b"a", b"bc"]))),
    messages.pack_results(1, 100, 2, pages.INTEGERS, struct.pack("qq", 1, 2)),
    messages.pack_results(1, 100, 2, pages.PICKLES, b"K\x01K\x02"),
    b"".join(messages.pack(messages.RELEASE, 0, 0, 7, b"")),
    HEAD.pack(messages.CALL, 0, 2, 1, 7, 4) + struct.pack("<QQ", 3, 1 << 63 | 2) + b"pickabcde",
    HEAD.pack(messages.CALL, 0, 2, 1, 7, 4) + struct.pack("<QQ", 1 << 62 | 2, 3) + b"pickabc",
]


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | mutated(SENT), st.data())
def test_a_message_reader_takes_any_bytes_in_any_portions(data: bytes, more: Any) -> None:
    """Its room is never empty, it never says `more` of nothing, and what comes out is a message."""

    def count(pieces: list[bytes]) -> tuple[int, bool]:
        reader, found = MessageReader(), 0
        try:
            for piece in pieces:
                while piece:
                    size = min(len(piece), len(reader.room))
                    assert size > 0
                    reader.room[:size] = piece[:size]
                    piece = piece[size:]
                    message = reader.take(size)
                    while message is not None:
                        found += 1
                        assert messages.CALL <= message.kind <= messages.RESULTS
                        message = reader.pop() if reader.more else None
        except ProtocolError:
            return found, False
        return found, True

    assert count(cut(more.draw, data)) == count([data])


@pytest.mark.parametrize(
    "read",
    [messages.read_split, messages.read_batch, messages.count_results, messages.load_results],
    ids=lambda read: read.__name__,
)
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | mutated([sent[HEAD.size :] for sent in SENT]))
@example(data=b"")
@example(data=b"\1\0\0\0")
@example(data=struct.pack("<II", 1, pages.INTEGERS) + bytes(7))
@example(data=struct.pack("<II", 2, pages.INTEGERS) + bytes(8))
@example(data=struct.pack("<II", 1, 77) + bytes(8))
@example(data=struct.pack("<II", 1, pages.PICKLES) + b"\x80")
@example(data=struct.pack("<II", 2, pages.PICKLES) + b"K\x01")
def test_what_a_message_holds_is_read_or_refused(read: Callable[[Any], Any], data: bytes) -> None:
    try:
        read(memoryview(data))
    except ProtocolError:
        pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | mutated(SENT))
@example(HEAD.pack(messages.RESULT, 0, 0, 1, 1, 1 << 40))
@example(bytes(23))
def test_answers_that_lie_on_a_page_are_read_or_refused(data: bytes) -> None:
    """What is there is a worker's, and it may have died of writing where it should not."""
    try:
        read = messages.read_all(data)
    except ProtocolError:
        return
    assert sum(HEAD.size + len(message.payload) for message in read) == len(data)
