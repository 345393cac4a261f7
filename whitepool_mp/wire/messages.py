"""Call messages: what the holder of a lease and its worker say on their direct channel.

    client  --CALL | METHOD | BATCH | BULK | RELEASE-->  worker
            <--RESULT | ERROR (one for each call, in order), RESULTS (for several)--

A message is a 24-byte head, the sizes of its out-of-band buffers, a pickle and the buffers:

    kind u8 | flags u8 | buffers u16 | number u32 | token u64 | pickle length u64

A size's highest bit says that the buffer is a `bytes` object's, and is to be one again. The next
one, of the first size alone, says that this is not a size but how many descriptors travel with the
message (`passed`). Then a gap and one byte stand before the pickle, and that byte carries them.
`number` counts the calls of a lease. `token` is the lease id in a request (the worker refuses an
older one than it has seen) and the call's duration in nanoseconds in an answer.

`MessageReader` is the protocol without I/O: it says where to put the next bytes; tell it how many
came, take whole messages out. Small messages cost one receive; large buffers are received straight
into the memory in which they stay. Descriptors get lost when the byte that carries them is received
in the usual way. So the gap is as long as the reader's buffer: whoever receives that byte has read
the head before, and knows that it comes `due`.
"""

from __future__ import annotations

import struct

from whitepool_mp.errors import ProtocolError
from whitepool_mp.records import Record
from whitepool_mp.wire import descriptors, passed
from whitepool_mp.wire.pages import FLOATS, INTEGERS, PICKLES
from whitepool_mp.wire.passed import Incoming, Outgoing, Passing
from whitepool_mp.wire.rooms import room

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import pickle
    from collections.abc import Sequence
    from typing import Any
else:
    # What `pickle` takes its functions from. It adds the same once more in Python, which a worker
    # would have imported for nothing.
    import _pickle as pickle

CALL = 1
METHOD = 2
BATCH = 3
RELEASE = 4
RESULT = 5
ERROR = 6
BULK = 7
"""Calls of one function with one plain value each; the payload is as of a SPLIT call, with a list
in the place of the arguments."""
RESULTS = 8
"""What several calls of a BULK returned, numbered from the message's number; plain values."""

NUMBERS = frozenset((type(None), bool, int, float))
PLAIN = NUMBERS | {str, bytes}
"""Types whose pickles run no code, and mean the same when they are put one behind the other."""

# Flags of a request.
SPLIT = 1
"""The payload is a function's pickle and, apart, its arguments' pickle."""
WITH_RESOURCE = 2
"""The call gets the worker's resource as its first argument."""

# Flags of a RESULT.
REFERENCE = 1
"""The payload names an object that stays in the worker (METHOD's results that cannot travel)."""

# Flags of an ERROR: at which step.
RAISED = 0
LOADING = 1
DUMPING = 2
FENCED = 3
"""It has not begun and never will: its lease is over."""
SKIPPED = 4
"""It has not begun and never will: it was taken back (see `pages`)."""

HEAD = struct.Struct("<BBHIQQ")
_HEAD_SIZE = HEAD.size
_unpack_head = HEAD.unpack_from

_SIZE = struct.Struct("<I")
_RESULTS = struct.Struct("<II")
_BUFFER = 64 * 1024
_LARGEST = 1 << 46
_AS_BYTES = 1 << 63
_DESCRIPTORS = 1 << 62
_GAP = bytes(_BUFFER)
_MAX_SIZES = (_BUFFER - HEAD.size) // 8
MAX_BUFFERS = _MAX_SIZES - 1
"""How many buffers a message may have: head and sizes must fit the reader's buffer, and one that
tells of descriptors."""
_GATHER = 512


class Message(Record):
    """A whole message; `payload` is valid until the reader is next given bytes."""

    kind: int
    flags: int
    number: int
    token: int
    payload: memoryview
    buffers: Sequence[Any]

    @property
    def size(self) -> int:
        """How many bytes the payload and the buffers have."""
        beside = (each for each in self.buffers if type(each) is not Incoming)
        return len(self.payload) + sum(memoryview(each).nbytes for each in beside)

    def load(self) -> Any:
        """Unpickle the payload with its buffers."""
        return passed.take(pickle.loads, self.payload, self.buffers)


_new = tuple.__new__  # a NamedTuple's own constructor costs three times as much


def pack(
    kind: int,
    flags: int,
    number: int,
    token: int,
    payload: bytes,
    buffers: Sequence[Any] = (),
) -> list[bytes | memoryview]:
    """A message as pieces to write one after the other; one piece when it is small.

    Args:
        kind, flags, number, token, payload: see the module's text.
        buffers: what travels beside the pickle: `pickle.PickleBuffer`s, and perhaps an `Outgoing`
            before them.
    """
    first: list[int] = []
    passing: list[bytes] = []
    if buffers and type(buffers[0]) is Outgoing:
        outgoing, *buffers = buffers
        if outgoing.fds:
            first = [_DESCRIPTORS | len(outgoing.fds)]
            passing = [_GAP, Passing.of(outgoing)]
    if not (buffers or first):
        head = HEAD.pack(kind, flags, 0, number, token, len(payload))
        return [head + payload] if len(payload) < _BUFFER else [head, payload]
    count = len(first) + len(buffers)
    head = HEAD.pack(kind, flags, count, number, token, len(payload))
    raws = [buffer.raw() for buffer in buffers]
    sizes = struct.pack(
        f"<{count}Q",
        *first,
        *(raw.nbytes | _AS_BYTES if type(raw.obj) is bytes else raw.nbytes for raw in raws),
    )
    return [head + sizes, *passing, payload, *raws]


def pack_split(function: bytes, arguments: bytes) -> bytes:
    """The payload of a SPLIT call."""
    return _SIZE.pack(len(function)) + function + arguments


def read_split(payload: memoryview) -> tuple[memoryview, memoryview]:
    """The function's pickle and the arguments' of a SPLIT call.

    Raises:
        ProtocolError: it is no such payload.
    """
    end = 4 + _size(payload, 0)
    return payload[4:end], payload[end:]


def _size(payload: memoryview, at: int) -> int:
    """The size that stands there."""
    try:
        (size,) = _SIZE.unpack_from(payload, at)
    except struct.error:
        raise ProtocolError(f"a payload of {len(payload)} bytes is cut short") from None
    return int(size)


def pack_batch(function: bytes, items: Sequence[bytes]) -> bytes:
    """The payload of a BATCH: one function, the arguments of each call."""
    parts = [_SIZE.pack(len(function)), function]
    for item in items:
        parts.append(_SIZE.pack(len(item)))
        parts.append(item)
    return b"".join(parts)


def read_batch(payload: memoryview) -> tuple[bytes, list[bytes]]:
    """The function's pickle and those of each call's arguments.

    Raises:
        ProtocolError: it is no such payload.
    """
    size = _size(payload, 0)
    at = 4 + size
    function = bytes(payload[4:at])
    items = []
    end = len(payload)
    while at < end:
        size = _size(payload, at)
        items.append(bytes(payload[at + 4 : at + 4 + size]))
        at += 4 + size
    return function, items


def pack_results(first: int, took: int, count: int, kind: int, data: bytes | memoryview) -> bytes:
    """A RESULTS message.

    Args:
        first: the number of the first of these calls.
        took: nanoseconds for all of them.
        count: how many there are.
        kind: of what kind their results are.
        data: these one behind the other: numbers of eight bytes, or pickles, each without its last
            byte.
    """
    head = HEAD.pack(RESULTS, 0, 0, first, took, _RESULTS.size + len(data))
    return b"".join((head, _RESULTS.pack(count, kind), data))


def count_results(payload: memoryview) -> int:
    """How many results a RESULTS message has.

    Raises:
        ProtocolError: it is no such payload.
    """
    count, kind = _size(payload, 0), _size(payload, 4)
    room = len(payload) - _RESULTS.size
    # A pickle has two bytes at least, of which the last one does not travel.
    fits = count <= room if kind == PICKLES else 8 * count == room
    if not (count and fits and PICKLES <= kind <= FLOATS):
        raise ProtocolError(f"{count} results of kind {kind} are not {room} bytes")
    return count


def load_results(payload: bytes | memoryview) -> list[Any]:
    """The values of a RESULTS message.

    Raises:
        ProtocolError: it is no such payload.
    """
    view = memoryview(payload)
    count, kind = count_results(view), _size(view, 4)
    data = view[_RESULTS.size :]
    if kind != PICKLES:
        return data.cast("q" if kind == INTEGERS else "d").tolist()
    try:  # together: as the items of one list
        values = list(pickle.loads(b"".join((b"(", data, b"l."))))
    except Exception as error:
        raise ProtocolError(f"results that cannot be unpickled: {error!r}") from error
    if len(values) != count:
        raise ProtocolError(f"{len(values)} results where {count} were told")
    return values


def read_all(data: bytes) -> list[Message]:
    """The messages without buffers that stand one behind the other in some bytes.

    Raises:
        ProtocolError: something else stands there.
    """
    found = []
    view = memoryview(data)
    at, end = 0, len(data)
    while at < end:
        if end - at < _HEAD_SIZE:
            raise ProtocolError(f"{end - at} bytes are no message")
        kind, flags, buffers, number, token, length = HEAD.unpack_from(data, at)
        at += _HEAD_SIZE + length
        if at > end or buffers or not CALL <= kind <= RESULTS:
            raise ProtocolError(f"a message of kind {kind} and {length} bytes does not stand here")
        found.append(Message(kind, flags, number, token, view[at - length : at], ()))
    return found


class MessageReader:
    """Received bytes in, whole messages out, without a copy of large ones.

    Use: `message = reader.take(sock.recv_into(reader.room))`, then `pop()` as long as there is
    `more` and it gives one. While something is `due`, `passed.receive_due` receives instead.

    Attributes:
        due: how many descriptors come with the next byte.
        incoming: those that came.
        room: where the next bytes belong. Never empty.
        more: whether something has come that was not taken out.
    """

    __slots__ = (
        "_as_bytes",
        "_begin",
        "_buffer",
        "_carrier",
        "_end",
        "_fds",
        "_head",
        "_parts",
        "_targets",
        "_view",
        "due",
        "incoming",
        "more",
        "room",
    )

    def __init__(self) -> None:
        self._new_buffer(b"")
        self._begin = 0
        self.more = False
        # A message too large for the buffer: its head, all its parts, what is yet to be filled.
        self._head: tuple[int, int, int, int] | None = None
        self._parts: list[Any] = []
        self._as_bytes: list[int] = []  # which of them
        self._targets: list[memoryview] = []
        # Descriptors that a message brings: how many, and the byte that they come with.
        self._fds = self.due = 0
        self._carrier: memoryview | None = None
        self.incoming: Incoming | None = None

    def _new_buffer(self, rest: bytes | bytearray) -> None:
        self._buffer = bytearray(_BUFFER)
        self._buffer[: len(rest)] = rest
        self._view = memoryview(self._buffer)
        self._begin, self._end = 0, len(rest)
        self.room = self._view[self._end :]

    @property
    def part_of_large(self) -> bool:
        """Whether a message that is too large for the buffer has come in part."""
        return self._head is not None

    def take(self, count: int) -> Message | None:
        """`count` bytes were written to `room`: the next whole message, or None.

        Raises:
            ProtocolError: the bytes are no message.
        """
        if not self.more:
            if count >= _HEAD_SIZE:  # mostly it is one small message that came whole
                kind, flags, buffers, number, token, length = _unpack_head(self._buffer)
                if not buffers and length == count - _HEAD_SIZE and CALL <= kind <= RESULTS:
                    body = self._view[_HEAD_SIZE:count]
                    return _new(Message, (kind, flags, number, token, body, ()))
            self._end = count
        elif self._targets:
            target = self._targets[-1]
            if count < len(target):
                self._targets[-1] = target[count:]
            else:
                self._targets.pop()
        else:
            self._end += count
        return self.pop()

    def pop(self) -> Message | None:
        """The next whole message of what has come, or None.

        Raises:
            ProtocolError: the bytes are no message.
        """
        message = self._pop()
        if self._targets:
            self.more = True
            self.room = self._targets[-1]
            self.due = self._fds if self.room is self._carrier else 0
        elif self._begin == self._end:
            self.more = False
            self._begin = self._end = 0
            self.room = self._view
        else:
            self.more = True
            if self._end == _BUFFER:  # what a message before refers to stays as it is
                self._new_buffer(self._buffer[self._begin :])
            else:
                self.room = self._view[self._end :]
        return message

    def _pop(self) -> Message | None:
        if self._head is not None:
            if self._targets:
                return None
            kind, flags, number, token = self._head
            parts, self._parts, self._head = self._parts, [], None
            for index in self._as_bytes:
                parts[index] = self._to_bytes(parts[index])
            buffers = parts[1:]
            if self._fds:
                incoming, self.incoming = self.incoming, None
                buffers.insert(0, incoming or Incoming(self._fds, []))
                self._fds, self._carrier = 0, None
            return Message(kind, flags, number, token, memoryview(parts[0]), buffers)
        begin = self._begin
        available = self._end - begin
        if available < _HEAD_SIZE:
            return None
        kind, flags, count, number, token, length = _unpack_head(self._buffer, begin)
        if not CALL <= kind <= RESULTS or length > _LARGEST:
            raise ProtocolError(f"no message begins with {bytes(self._view[begin : begin + 24])!r}")
        body = begin + _HEAD_SIZE
        if not count:
            end = body + length
            if end <= self._end:
                self._begin = end
                return _new(Message, (kind, flags, number, token, self._view[body:end], ()))
            if length <= _BUFFER - _HEAD_SIZE:
                return None
            sizes = []
            self._as_bytes = []
        else:
            if available < _HEAD_SIZE + 8 * count:
                if count > _MAX_SIZES:
                    raise ProtocolError(f"a message of {count} buffers")
                return None
            told = struct.unpack_from(f"<{count}Q", self._buffer, body)
            if told[0] & _DESCRIPTORS:
                self._fds = told[0] & ~_DESCRIPTORS
                told = told[1:]
                if not 0 < self._fds <= passed.MOST:
                    raise ProtocolError(f"a message with {self._fds} descriptors")
            sizes = [size & ~_AS_BYTES for size in told]
            self._as_bytes = [index for index, size in enumerate(told, 1) if size & _AS_BYTES]
            if sum(sizes) > _LARGEST:
                raise ProtocolError(f"a message of {sum(sizes)} bytes")
            body += 8 * count
        self._head = (kind, flags, number, token)
        self._collect(body, [length, *sizes])
        return self._pop()

    def _collect(self, at: int, sizes: list[int]) -> None:
        """Make room for a large message's parts and move in what has come of them already."""
        before: list[Any] = [bytearray(_BUFFER), bytearray(1)] if self._fds else []
        try:
            self._parts = [room(size) if size else b"" for size in sizes]
        except (OSError, MemoryError, ValueError) as error:
            raise _no_memory(sum(sizes), error) from None
        targets = []
        for part in (*before, *self._parts):
            view = memoryview(part)
            have = min(len(view), self._end - at)
            if have:
                view[:have] = self._view[at : at + have]
                at += have
            if have < len(view):
                targets.append(view[have:])
        self._begin = at
        if before:
            self._carrier = targets[1]  # of the gap, nobody can have read all by now
        targets.reverse()
        self._targets = targets

    def _to_bytes(self, part: Any) -> bytes:
        try:
            return bytes(part)
        except MemoryError as error:
            raise _no_memory(len(part), error) from None


def _no_memory(size: int, error: Exception) -> ProtocolError:
    return ProtocolError(f"no memory for a message of {size} bytes: {error}")


def send_all(sock: Any, pieces: list[bytes | memoryview]) -> None:
    """Write a whole message to a blocking socket, gathering its pieces from where they lie."""
    if len(pieces) == 1:
        sock.sendall(pieces[0])
        return
    rest = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    while rest:
        send_some(sock, rest)


def send_some(sock: Any, rest: list[memoryview], flags: int = 0) -> None:
    """Write what goes at once of what is left to write, and take it off.

    Args:
        sock: a connected socket.
        rest: at least one piece that is not empty.
        flags: as for `socket.socket.sendmsg`.

    Raises:
        OSError: as for `socket.socket.sendmsg`.
    """
    pieces = rest[:_GATHER]
    for at, piece in enumerate(pieces):
        if type(piece.obj) is Passing:
            if not at:
                drop_sent(rest, descriptors.send(sock, piece, piece.obj.outgoing.fds, flags))
                return
            del pieces[at:]
            break
    drop_sent(rest, sock.sendmsg(pieces, (), flags))


def drop_sent(rest: list[memoryview], sent: int) -> None:
    """Take `sent` bytes off the front of what is left to write."""
    done = 0
    for piece in rest:
        if sent < len(piece):
            break
        sent -= len(piece)
        done += 1
    del rest[:done]
    if sent:
        rest[0] = rest[0][sent:]
