"""Control frames: what clients, the manager and the workers say to each other about workers.

    client  --CHECKOUT, CHECKIN, ...-->  manager  --ADOPT, RECALL, RETIRE-->   worker
            <--GRANT, REFUSED, ...----            <--READY, FAILED, RELEASED--

A client whose manager died says all that has no answer yet to the next one, and then REJOINED.

A frame is a length and a body, the length in the form that `multiprocessing.connection` uses
(`!i`). A body is one byte of kind, then fixed fields, then at most one text or JSON tail. There
is no I/O in this module: `FrameDecoder` takes bytes and gives bodies; encoders give bytes.

Guarantees: a frame longer than `MAX_FRAME` or shorter than its fields raises `ProtocolError`, and
decoding never runs code that a peer chose (no pickle here).
"""

from __future__ import annotations

import struct

from whitepool_mp.errors import ProtocolError
from whitepool_mp.records import Record

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Any

MAX_FRAME = 4 << 20
"""Longest body accepted, in bytes: a record of each of ten thousand workers is shorter."""
_MOST_KEPT = 500
"""How many characters of a client's words (a line of code, a thread's name, a reason) are kept.
Others are shown them, and no client is to burst what the others may receive."""

KEY_BYTES = 32
NONCE_BYTES = 32
MEMBER_BYTES = 16

_LENGTH = struct.Struct("!i")

# Client to manager.
AUTH = 1
CHECKOUT = 2
CANCEL = 3
CHECKIN = 4
DESTROY = 5
OPEN = 6
WHY = 7
STATUS = 8
WORKERS = 9
RESIZE = 10
DRAIN = 11
TERMINATE = 12
REJOINED = 13
PING = 14
STACKS = 15
# Manager to client.
CHALLENGE = 64
WELCOME = 65
DENIED = 66
GRANT = 67
REFUSED = 68
CHANNEL = 69
REPLY = 70
DRAINING = 71
# Between manager and worker.
ADOPT = 128
RETIRE = 129
READY = 130
FAILED = 131
RECALL = 132
RELEASED = 133

LEFT = ("finished", "unfinished", "asked")
"""What an engine says of its jobs when the pool drains."""

TERMINATED = "the pool was terminated"
"""The reason of a kill, as the broker gives it, when the whole pool is ended at once."""

REFUSALS = ("full", "closed", "timeout", "factory_failed", "cancelled")

# Numbers that only grow have 64 bits: no pool lives to see their end.
_REQUEST = struct.Struct("!BQ")
_AUTH = struct.Struct("!B32s32s16sIQ?")
_WELCOME = struct.Struct("!B32sII")
_CHECKOUT = struct.Struct("!BQBdd")
_BLOCK, _KEEP, _SPARE_OWN = 1, 2, 4
_LEASE = struct.Struct("!BQ")
_RECALL = struct.Struct("!BQ?")
_REQUEST_LEASE = struct.Struct("!BQQ")
_RESIZE = struct.Struct("!BQII")
_NONCE = struct.Struct("!B32s")
_GRANT = struct.Struct("!BQQQII?")
_REFUSED = struct.Struct("!BQB")
_CHANNEL = struct.Struct("!BQB?")


class Auth(Record):
    """The answer to a challenge: who asks, and the proof that it has the pool's key.

    `link` is the connection's own number, by which the next manager knows it again; 0 for none. An
    `engine` has jobs queued of which the manager does not know, and answers DRAINING.
    """

    nonce: bytes
    proof: bytes
    member: bytes
    pid: int
    thread: str
    link: int = 0
    engine: bool = False


class Checkout(Record):
    """A request for a worker; `deadline` is in seconds of the system-wide monotonic clock.

    `keep`: the lease is for jobs, and may be recalled between them. `spare_own`: not so that those
    which this client keeps are recalled for this one. `asked`: when this was first asked, on the
    same clock: a manager that takes over serves those who ask again in that order.
    """

    request: int
    block: bool
    deadline: float | None
    site: str
    keep: bool = False
    spare_own: bool = False
    asked: float = 0.0


class Grant(Record):
    """A worker is yours."""

    request: int
    lease: int
    worker: int
    pid: int
    slot: int
    keep: bool


class Refused(Record):
    """No worker for you, and why."""

    request: int
    why: str
    detail: str


class FrameDecoder:
    """Bytes in, bodies out, however they were cut on the way.

    Attributes:
        limit: the longest body accepted, in bytes.
    """

    __slots__ = ("_buffer", "limit")

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self.limit = limit

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes and return every body that is now whole.

        Raises:
            ProtocolError: a length that is negative, zero or over the limit.
        """
        buffer = self._buffer
        if not buffer and len(data) >= 5:
            # Almost always exactly one frame arrives: spare it the copy through the buffer.
            (length,) = _LENGTH.unpack_from(data)
            if length == len(data) - 4:
                if length > self.limit:
                    raise ProtocolError(f"a frame of {length} bytes (at most {self.limit})")
                return [data[4:]]
        buffer += data
        bodies = []
        start, end = 0, len(buffer)
        while end - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if not 0 < length <= self.limit:
                raise ProtocolError(f"a frame of {length} bytes (1 to {self.limit} are allowed)")
            if end - start - 4 < length:
                break
            bodies.append(bytes(buffer[start + 4 : start + 4 + length]))
            start += 4 + length
        if start:
            del buffer[:start]
        return bodies


def frame(body: bytes) -> bytes:
    """A body with its length in front."""
    return _LENGTH.pack(len(body)) + body


def _unpack(layout: struct.Struct, body: bytes) -> tuple[Any, ...]:
    try:
        return layout.unpack_from(body)
    except struct.error:
        raise ProtocolError(f"a frame is cut short: {body[:64]!r}") from None


def _text(body: bytes, start: int) -> str:
    return body[start:].decode("utf-8", "replace")


def _clip(text: str, limit: int = 60_000) -> bytes:
    """Text as bytes, its middle left out when it is long enough to burst a frame."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data
    half = limit // 2
    return data[:half] + b"\n... (shortened) ...\n" + data[-half:]


# --- requests ---------------------------------------------------------------------------------


def auth(
    nonce: bytes,
    proof: bytes,
    member: bytes,
    pid: int,
    thread: str,
    link: int = 0,
    engine: bool = False,
) -> bytes:
    """Answer to CHALLENGE."""
    return frame(_AUTH.pack(AUTH, nonce, proof, member, pid, link, engine) + _clip(thread, 200))


def read_auth(body: bytes) -> Auth:
    """Decode AUTH."""
    _, nonce, proof, member, pid, link, engine = _unpack(_AUTH, body)
    return Auth(nonce, proof, member, pid, _text(body, _AUTH.size)[:_MOST_KEPT], link, engine)


def checkout(
    request: int,
    block: bool,
    deadline: float | None,
    site: str,
    keep: bool = False,
    spare_own: bool = False,
    asked: float = 0.0,
) -> bytes:
    """Ask for a worker."""
    when = float("inf") if deadline is None else deadline
    flags = _BLOCK * block | _KEEP * keep | _SPARE_OWN * spare_own
    return frame(_CHECKOUT.pack(CHECKOUT, request, flags, when, asked) + _clip(site, 400))


def in_thread(site: str, thread: str) -> str:
    """A checkout's `site` that also says which thread asks, if it is not the connection's own."""
    return f"{thread[:100]}\0{site}"


def site_and_thread(site: str) -> tuple[str, str]:
    """The line of code, and the thread's name, "" if it was not told."""
    thread, _, line = site.rpartition("\0")
    return line, thread


def read_checkout(body: bytes) -> Checkout:
    """Decode CHECKOUT."""
    _, request, flags, deadline, asked = _unpack(_CHECKOUT, body)
    if deadline != deadline or asked != asked:
        raise ProtocolError("a checkout whose times are not numbers")
    return Checkout(
        request,
        bool(flags & _BLOCK),
        None if deadline == float("inf") else deadline,
        _text(body, _CHECKOUT.size)[:_MOST_KEPT],
        bool(flags & _KEEP),
        bool(flags & _SPARE_OWN),
        asked,
    )


def request(kind: int, number: int) -> bytes:
    """A request without fields: CANCEL, STATUS, WORKERS, STACKS, DRAIN, TERMINATE, PING; or
    REJOINED."""
    return frame(_REQUEST.pack(kind, number))


def read_request(body: bytes) -> int:
    """The number of a request (or reply) of any kind that has one."""
    number: int = _unpack(_REQUEST, body)[1]
    return number


def checkin(lease: int) -> bytes:
    """Give a worker back. It is not answered."""
    return frame(_LEASE.pack(CHECKIN, lease))


def destroy(lease: int, reason: str) -> bytes:
    """Have a leased worker replaced. It is not answered."""
    return frame(_LEASE.pack(DESTROY, lease) + _clip(reason, 400))


def read_lease(body: bytes) -> tuple[int, str]:
    """Decode CHECKIN, DESTROY or RELEASED: the lease, and the reason of a DESTROY. Or ADOPT: the
    place."""
    _, lease = _unpack(_LEASE, body)
    return lease, _text(body, _LEASE.size)[:_MOST_KEPT]


def request_lease(kind: int, number: int, lease: int) -> bytes:
    """OPEN (a channel to the leased worker, please) or WHY (its channel broke: what happened?)."""
    return frame(_REQUEST_LEASE.pack(kind, number, lease))


def read_request_lease(body: bytes) -> tuple[int, int]:
    """Decode OPEN or WHY: the request's number and the lease."""
    _, number, lease = _unpack(_REQUEST_LEASE, body)
    return number, lease


def resize(number: int, pool_size: int, max_overflow: int) -> bytes:
    """Ask for other sizes."""
    return frame(_RESIZE.pack(RESIZE, number, pool_size, max_overflow))


def read_resize(body: bytes) -> tuple[int, int, int]:
    """Decode RESIZE."""
    _, number, pool_size, max_overflow = _unpack(_RESIZE, body)
    return number, pool_size, max_overflow


# --- replies ----------------------------------------------------------------------------------


def challenge(nonce: bytes) -> bytes:
    """The manager's first word."""
    return frame(_NONCE.pack(CHALLENGE, nonce))


def welcome(proof: bytes, generation: int = 1, place: int = 0) -> bytes:
    """The manager's proof that it has the key too, and the how manieth of the pool it is.

    With an engine's travels the ledger, in which its mark is at that place.
    """
    return frame(_WELCOME.pack(WELCOME, proof, generation, place))


def read_welcome(body: bytes) -> tuple[bytes, int, int]:
    """Decode WELCOME: the proof, which manager of the pool it is, and the client's place."""
    _, proof, generation, place = _unpack(_WELCOME, body)
    return proof, generation, place


def read_nonce(body: bytes) -> bytes:
    """Decode CHALLENGE."""
    nonce: bytes = _unpack(_NONCE, body)[1]
    return nonce


def grant(request: int, lease: int, worker: int, pid: int, slot: int, keep: bool = False) -> bytes:
    """Answer to CHECKOUT: here it is, and whether it may be kept between calls."""
    return frame(_GRANT.pack(GRANT, request, lease, worker, pid, slot, keep))


def read_grant(body: bytes) -> Grant:
    """Decode GRANT."""
    return Grant._make(_unpack(_GRANT, body)[1:])


def refused(request: int, why: str, detail: str) -> bytes:
    """Answer to CHECKOUT or CANCEL: no."""
    # Hundreds may be refused at once, each with the same traceback.
    return frame(_REFUSED.pack(REFUSED, request, REFUSALS.index(why)) + _clip(detail, 8_000))


def read_refused(body: bytes) -> Refused:
    """Decode REFUSED."""
    _, number, why = _unpack(_REFUSED, body)
    if why >= len(REFUSALS):
        raise ProtocolError(f"an unknown refusal {why}")
    return Refused(number, REFUSALS[why], _text(body, _REFUSED.size))


def channel(number: int, slot: int, lost: bool = False) -> bytes:
    """Answer to OPEN: the channel's place on the worker's page, or 0 if there is none.

    If there is, two descriptors come with it: the socket and the page. If not, `lost` says that the
    worker died or cannot be reached; otherwise the lease has been taken back.
    """
    return frame(_CHANNEL.pack(CHANNEL, number, slot, lost))


def read_channel(body: bytes) -> tuple[int, bool]:
    """Decode CHANNEL: the channel's place on the page, or 0 if nothing came with it; and whether
    the worker is lost."""
    _, _, slot, lost = _unpack(_CHANNEL, body)
    return slot, lost


def draining(left: str = "finished") -> bytes:
    """To every client, unasked: finish what was begun, the pool is shutting down.

    And what an engine says: "unfinished" when it has jobs, "finished" when it has none any more,
    and, only in answer, "asked" when it has asked for all that its jobs need.
    """
    return frame(_REQUEST.pack(DRAINING, LEFT.index(left)))


def read_draining(body: bytes) -> str:
    """Decode an engine's DRAINING."""
    left = read_request(body)
    if left >= len(LEFT):
        raise ProtocolError(f"a DRAINING of {left}")
    return LEFT[left]


def reply(number: int, value: Any) -> bytes:
    """Answer to WHY, STATUS, WORKERS, STACKS, RESIZE, DRAIN and TERMINATE, as JSON."""
    import json

    return frame(_REQUEST.pack(REPLY, number) + json.dumps(value).encode())


def pong(number: int) -> bytes:
    """Answer to PING: all that the client said before it was heard."""
    return frame(_REQUEST.pack(REPLY, number) + b"true")


def read_reply(body: bytes) -> Any:
    """Decode REPLY."""
    import json

    try:
        return json.loads(body[_REQUEST.size :])
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a reply that is not JSON: {error}") from None


# --- manager and worker ---------------------------------------------------------------------


def recall(lease: int, patient: bool) -> bytes:
    """Tell a worker that a lease was taken back; or will be, when it has done all it was sent."""
    return frame(_RECALL.pack(RECALL, lease, patient))


def read_recall(body: bytes) -> tuple[int, bool]:
    """Decode RECALL: the lease, and whether it comes after what was sent."""
    _, lease, patient = _unpack(_RECALL, body)
    return lease, patient


def adopt(place: int) -> bytes:
    """Give a worker a channel (a descriptor comes with it), and its place on the page."""
    return frame(_LEASE.pack(ADOPT, place))


def released(lease: int) -> bytes:
    """Answer to RECALL: no call under this lease runs or will begin."""
    return frame(_LEASE.pack(RELEASED, lease))


def plain(kind: int, text: str = "") -> bytes:
    """RETIRE, READY, FAILED (with the traceback) or DENIED."""
    return frame(bytes((kind,)) + _clip(text))


def read_plain(body: bytes) -> str:
    """The text of a plain frame."""
    return _text(body, 1)
