"""Control frames: what is encoded is decoded, and what is not a frame is a `ProtocolError`."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from whitepool_mp.errors import ProtocolError
from whitepool_mp.wire import frames
from whitepool_mp.wire.frames import MAX_FRAME, FrameDecoder

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=50)
NONCE = st.binary(min_size=32, max_size=32)
DEADLINE = st.none() | st.floats(allow_nan=False).filter(lambda when: when != float("inf"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
PLAIN = st.sampled_from((frames.RETIRE, frames.READY, frames.FAILED, frames.DENIED))
BARE = st.sampled_from(
    (
        frames.CANCEL,
        frames.STATUS,
        frames.WORKERS,
        frames.DRAIN,
        frames.TERMINATE,
        frames.REJOINED,
        frames.PING,
        frames.STACKS,
    )
)
ABOUT_A_LEASE = st.sampled_from((frames.OPEN, frames.WHY))


@st.composite
def sent(draw: st.DrawFn) -> tuple[bytes, int, Callable[[bytes], Any], Any]:
    """A frame of any kind: its bytes, its kind, its reader and what that must give."""
    number, lease, text = draw(U64), draw(U64), draw(TEXT)
    kind = draw(st.sampled_from(sorted(_MAKERS)))
    return _MAKERS[kind](draw, number, lease, text)


def _auth(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    member = draw(st.binary(min_size=16, max_size=16))
    fields = (draw(NONCE), draw(NONCE), member, draw(U32), text, draw(U64), draw(st.booleans()))
    return frames.auth(*fields), frames.AUTH, frames.read_auth, fields


def _checkout(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    flags = st.booleans()
    asked = draw(st.floats(allow_nan=False))
    fields = (number, draw(flags), draw(DEADLINE), text, draw(flags), draw(flags), asked)
    return frames.checkout(*fields), frames.CHECKOUT, frames.read_checkout, fields


def _request(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    kind = draw(BARE)
    return frames.request(kind, number), kind, frames.read_request, number


def _checkin(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    return frames.checkin(lease), frames.CHECKIN, frames.read_lease, (lease, "")


def _destroy(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    return frames.destroy(lease, text), frames.DESTROY, frames.read_lease, (lease, text)


def _request_lease(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    kind = draw(ABOUT_A_LEASE)
    data = frames.request_lease(kind, number, lease)
    return data, kind, frames.read_request_lease, (number, lease)


def _resize(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    fields = (number, draw(U32), draw(U32))
    return frames.resize(*fields), frames.RESIZE, frames.read_resize, fields


def _challenge(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    nonce = draw(NONCE)
    return frames.challenge(nonce), frames.CHALLENGE, frames.read_nonce, nonce


def _welcome(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    fields = draw(NONCE), draw(U32), draw(U32)
    return frames.welcome(*fields), frames.WELCOME, frames.read_welcome, fields


def _adopt(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    return frames.adopt(number), frames.ADOPT, frames.read_lease, (number, "")


def _pong(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    return frames.pong(number), frames.REPLY, frames.read_reply, True


def _grant(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    fields = (number, lease, draw(U64), draw(U32), draw(U32), draw(st.booleans()))
    return frames.grant(*fields), frames.GRANT, frames.read_grant, fields


def _refused(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    fields = (number, draw(st.sampled_from(frames.REFUSALS)), text)
    return frames.refused(*fields), frames.REFUSED, frames.read_refused, fields


def _channel(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    fields = draw(st.integers(0, 248)), draw(st.booleans())
    return frames.channel(number, *fields), frames.CHANNEL, frames.read_channel, fields


def _reply(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    value = draw(JSON)
    return frames.reply(number, value), frames.REPLY, frames.read_reply, value


def _recall(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    fields = (lease, draw(st.booleans()))
    return frames.recall(*fields), frames.RECALL, frames.read_recall, fields


def _released(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    return frames.released(lease), frames.RELEASED, frames.read_lease, (lease, "")


def _draining(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    left = draw(st.sampled_from(frames.LEFT))
    return frames.draining(left), frames.DRAINING, frames.read_draining, left


def _plain(draw: st.DrawFn, number: int, lease: int, text: str) -> Any:
    kind = draw(PLAIN)
    return frames.plain(kind, text), kind, frames.read_plain, text


_MAKERS = {
    name.removeprefix("_"): maker
    for name, maker in list(globals().items())
    if name.startswith("_") and getattr(maker, "__annotations__", {}).get("lease") == "int"
}

READERS = [getattr(frames, name) for name in dir(frames) if name.startswith("read_")]
KINDS = [
    value
    for name, value in vars(frames).items()
    if name[0].isalpha()
    and name.isupper()
    and type(value) is int
    and not name.endswith(("BYTES", "FRAME"))
]


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    marks = [0, *sorted(min(mark, len(data)) for mark in at), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(marks)]


@given(st.lists(sent(), min_size=1, max_size=6), st.lists(st.integers(0, 2000), max_size=12))
def test_every_frame_comes_out_as_it_went_in_however_it_was_cut(
    all_sent: list[Any], marks: list[int]
) -> None:
    decoder = FrameDecoder()
    stream = b"".join(data for data, _, _, _ in all_sent)
    bodies = [body for piece in cut(stream, marks) for body in decoder.feed(piece)]
    assert len(bodies) == len(all_sent)
    for body, (_, kind, read, expected) in zip(bodies, all_sent, strict=True):
        assert type(body) is bytes
        assert body[0] == kind
        assert read(body) == expected


@given(sent())
def test_a_frame_that_arrives_byte_by_byte_comes_out_at_its_last_byte(one: Any) -> None:
    data, kind, read, expected = one
    decoder = FrameDecoder()
    for byte in data[:-1]:
        assert decoder.feed(bytes([byte])) == []
    (body,) = decoder.feed(data[-1:])
    assert body[0] == kind and read(body) == expected


def test_every_kind_of_frame_is_in_the_round_trip() -> None:
    assert len(KINDS) == len(set(KINDS)) == 29
    readers = {"auth", "checkout", "request", "lease", "request_lease", "resize", "nonce", "grant"}
    readers |= {"refused", "channel", "reply", "plain", "recall", "welcome", "draining"}
    assert {read.__name__.removeprefix("read_") for read in READERS} == readers


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 100))
def test_the_decoder_raises_nothing_but_protocol_errors(pieces: list[bytes], limit: int) -> None:
    decoder = FrameDecoder(limit=limit)
    try:
        for piece in pieces:
            for body in decoder.feed(piece):
                assert 1 <= len(body) <= limit
    except ProtocolError:
        pass


@given(st.sampled_from(READERS), st.sampled_from(KINDS), st.binary(max_size=120))
@example(frames.read_reply, frames.REPLY, bytes(4) + b"[" * 100_000)
@example(frames.read_reply, frames.REPLY, bytes(4) + b"\xff")
@example(frames.read_checkout, frames.CHECKOUT, bytes(5) + struct.pack("!d", float("nan")))
@example(frames.read_refused, frames.REFUSED, bytes(4) + b"\x05")
def test_a_reader_raises_nothing_but_protocol_errors(
    read: Callable[[bytes], Any], kind: int, rest: bytes
) -> None:
    try:
        read(bytes([kind]) + rest)
    except ProtocolError:
        pass


@given(sent())
def test_a_truncated_body_is_read_or_refused_but_never_a_crash(one: Any) -> None:
    data, _, _, _ = one
    body = data[4:]
    for end in range(len(body)):
        for read in READERS:
            try:
                read(body[:end])
            except ProtocolError:
                pass


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (frames.read_auth, frames.auth(bytes(32), bytes(32), bytes(16), 1, "")),
        (frames.read_checkout, frames.checkout(1, True, None, "")),
        (frames.read_request, frames.request(frames.CANCEL, 1)),
        (frames.read_lease, frames.checkin(1)),
        (frames.read_request_lease, frames.request_lease(frames.OPEN, 1, 1)),
        (frames.read_resize, frames.resize(1, 1, 1)),
        (frames.read_nonce, frames.challenge(bytes(32))),
        (frames.read_welcome, frames.welcome(bytes(32))),
        (frames.read_grant, frames.grant(1, 1, 1, 1, 1)),
        (frames.read_refused, frames.refused(1, "full", "")),
        (frames.read_channel, frames.channel(1, 3)),
        (frames.read_reply, frames.reply(1, None)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_body_shorter_than_its_fields_is_refused(
    read: Callable[[bytes], Any], data: bytes
) -> None:
    for end in range(len(data) - 4):
        with pytest.raises(ProtocolError):
            read(data[4 : 4 + end])


@pytest.mark.parametrize("length", [0, -1, -(2**31), MAX_FRAME + 1, 2**31 - 1])
def test_an_impossible_length_is_refused_before_its_bytes_come(length: int) -> None:
    with pytest.raises(ProtocolError, match=str(length)):
        FrameDecoder().feed(struct.pack("!i", length))


@pytest.mark.parametrize("whole", [True, False], ids=["at once", "in pieces"])
def test_the_longest_frame_passes_and_one_byte_more_does_not(whole: bool) -> None:
    def feed(data: bytes) -> list[bytes]:
        decoder = FrameDecoder(limit=1000)
        if whole:
            return decoder.feed(data)
        return decoder.feed(data[:7]) + decoder.feed(data[7:])

    assert feed(frames.frame(bytes(1000))) == [bytes(1000)]
    with pytest.raises(ProtocolError, match="1001"):
        feed(frames.frame(bytes(1001)))


def test_a_long_text_is_shortened_to_fit_a_frame_and_keeps_both_ends() -> None:
    text = "begin" + "x" * MAX_FRAME + "end"
    (body,) = FrameDecoder().feed(frames.plain(frames.FAILED, text))
    read = frames.read_plain(body)
    assert len(body) < MAX_FRAME // 2
    assert read.startswith("begin") and read.endswith("end")
    assert "(shortened)" in read


def test_a_site_and_a_thread_name_fit_what_the_manager_accepts() -> None:
    """The manager takes at most 1 KiB from a client that has not proved itself."""
    assert len(frames.auth(bytes(32), bytes(32), bytes(16), 1, "n" * 5000)) < 1024
    assert len(frames.checkout(1, True, None, "s" * 5000)) < 1024
    assert len(frames.destroy(1, "r" * 5000)) < 1024


def test_text_that_utf_8_cannot_hold_still_travels() -> None:
    (body,) = FrameDecoder().feed(frames.plain(frames.FAILED, "a\ud800b"))
    assert frames.read_plain(body) == "a\\ud800b"


def test_no_deadline_and_an_endless_one_are_the_same() -> None:
    (body,) = FrameDecoder().feed(frames.checkout(1, True, float("inf"), ""))
    assert frames.read_checkout(body).deadline is None
