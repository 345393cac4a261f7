"""Client connections: letting in who has the key, reading frames, never blocking on anybody.

    listener --accept--> silent --CHALLENGE/AUTH--> Client --frames--> Manager

Guarantees: nothing but the proof is looked at before a client has given it; a connection that says
nothing, or nonsense, or does not read its answers, is closed and counted, and costs the others
nothing; with no descriptors left, connections are refused instead of spinning on them.

The clients of a manager that was killed are absent at first: known by their link's number, and by a
pidfd for as long as their process lives. What they held stays theirs until they are back, or say in
their mark that they are over; whoever finds no manager to say so to connects and leaves again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections import OrderedDict, deque

from whitepool_mp.errors import ProtocolError
from whitepool_mp.manager import kin
from whitepool_mp.manager.loop import READ, WRITE, Loop
from whitepool_mp.wire import auth, descriptors, frames

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Protocol

    from whitepool_mp.manager.books import Books, PastClient
    from whitepool_mp.wire.descriptors import Socket
else:
    Protocol = object

HANDSHAKE_SECONDS = 10.0
"""How long a new connection may take to prove itself."""
MAX_SILENT = 256
"""How many connections may be unproven at once; the oldest goes when another comes."""
MOMENT_SECONDS = 1.0
"""How long an unproven connection is left alone, however many more come."""
MAX_UNREAD = 4 << 20
"""How many bytes of answers a client may leave unread."""


class Audience(Protocol):
    """Who is told what clients say."""

    def client_joined(self, client: Client, number: int) -> None: ...
    def client_said(self, client: Client, body: bytes) -> None: ...
    def client_gone(self, client: Client) -> None: ...


class Client:
    """One control connection."""

    __slots__ = (
        "decoder",
        "engine",
        "id",
        "link",
        "member",
        "nonce",
        "pid",
        "proven",
        "since",
        "sites",
        "sock",
        "thread",
        "unsent",
        "unsent_bytes",
    )

    def __init__(self, number: int, sock: Socket, now: float) -> None:
        self.id = number
        self.sock = sock
        self.since = now
        self.decoder = frames.FrameDecoder(limit=1024)
        self.nonce = os.urandom(frames.NONCE_BYTES)
        self.proven = False
        self.engine = False  # whether it may have jobs queued, and answers DRAINING
        self.link = 0  # by which it is known again, 0 if never
        self.member = b""  # which process's membership it is of
        self.pid = 0
        self.thread = ""
        self.sites: dict[int, str] = {}  # open checkouts: from which line
        self.unsent: deque[tuple[bytes, tuple[Any, ...]]] = deque()
        self.unsent_bytes = 0


class Door:
    """Accepts and serves every client connection.

    Args:
        listener: the listening socket, made by the owner.
        key: the pool's key.
        loop: where descriptors are waited for.
        audience: who is told.
        clock: the monotonic clock, in seconds.
        books: where to write down who is there.
    """

    def __init__(
        self,
        listener: Socket,
        key: bytes,
        loop: Loop,
        audience: Audience,
        clock: Callable[[], float],
        books: Books,
    ) -> None:
        self._books = books
        self._absent: dict[int, tuple[Client, int]] = {}  # by link, with a pidfd
        self._listener = listener
        self._key = key
        self._loop = loop
        self._audience = audience
        self._clock = clock
        self._numbers = 0
        self._silent: OrderedDict[int, Client] = OrderedDict()
        self.clients: dict[int, Client] = {}
        self.counters = {
            "connections": 0,
            "connections_refused": 0,
            "connections_without_proof": 0,
            "protocol_errors": 0,
            "clients_not_reading": 0,
        }
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        listener.setblocking(False)
        self._listening = False
        self._starved: float | None = None  # since when there is no descriptor at all
        self._listen_again()

    def take_over(self, clients: Iterable[PastClient], last: int) -> None:
        """Expect the clients of another manager, those whose process lives.

        Args:
            clients: who they were.
            last: the highest number that any had.
        """
        self._numbers = last
        nowhere: Any = _Nowhere()
        for past in clients:
            client = Client(past.number, nowhere, self._clock())
            client.link, client.member, client.pid = past.link, past.member, past.pid
            client.proven = True
            try:
                known = past.link and not past.over
                pidfd = kin.hold(past.pid, past.started) if known else None
            except OSError:
                pidfd = None  # no descriptor to watch it with: it counts as gone
            if pidfd is None:
                self._books.left(client)
                continue
            self.clients[client.id] = client
            self._absent[client.link] = client, pidfd
            self._loop.add(pidfd, functools.partial(self._never_back, client))

    def _never_back(self, client: Client, _: int) -> None:
        """An absent client is over, or its process has ended."""
        self._not_absent(client.link)
        if self.clients.pop(client.id, None) is not None:
            self._books.left(client)
            self._audience.client_gone(client)

    def _look_for_ended(self) -> None:
        """A stranger went: to have us look who of the absent is over, perhaps."""
        for client, _ in list(self._absent.values()):
            if self._books.is_over(client):
                self._never_back(client, 0)

    def _not_absent(self, link: int) -> Client | None:
        client, pidfd = self._absent.pop(link, (None, -1))
        if client is not None:
            self._loop.remove(pidfd)
            os.close(pidfd)
        return client

    def busy(self) -> set[int]:
        """The numbers of all who may have jobs: who has just come, and who is marked so."""
        if self._listening:
            self._accept()
        marked = {each.id for each in self.clients.values() if self._books.has_jobs(each)}
        return marked | set(self._silent)

    def next_deadline(self) -> float | None:
        """When the oldest unproven connection has to be closed, or may be for another."""
        if self._starved is not None:
            return self._starved + MOMENT_SECONDS
        for client in self._silent.values():
            return client.since + (HANDSHAKE_SECONDS if self._listening else MOMENT_SECONDS)
        return None

    def tick(self, now: float) -> None:
        """Close unproven connections whose time is up."""
        while self._silent:
            client = next(iter(self._silent.values()))
            if now < client.since + HANDSHAKE_SECONDS:
                break
            self.counters["connections_without_proof"] += 1
            self.drop(client)
        if self._starved is not None and now >= self._starved + MOMENT_SECONDS:
            self._take_spare()
            self._starved = now if self._spare < 0 else None
        if not self._listening and self._starved is None and not self._crowded():
            self._listen_again()

    def send(self, client: Client, data: bytes, passed: tuple[Any, ...] = ()) -> None:
        """Send a frame, now or when the client reads again.

        Args:
            client: to whom; it may be gone.
            data: the frame.
            passed: objects with `fileno` or plain descriptors that travel with it.
        """
        if client.sock.fileno() < 0:
            return
        if not client.unsent:
            sent = self._try(client, data, passed)
            if sent is None or sent == len(data):
                return
            data, passed = data[sent:], passed if sent == 0 else ()
            self._loop.change(client.sock.fileno(), READ | WRITE)
        if client.unsent_bytes + len(data) > MAX_UNREAD:
            self.counters["clients_not_reading"] += 1
            self.drop(client)
            return
        if passed:
            # The originals are the caller's to close: keep copies until they are sent.
            try:
                passed = tuple(_Copy(item) for item in passed)
            except OSError:  # no descriptors left here: it may come back
                self.drop(client)
                return
        client.unsent.append((data, passed))
        client.unsent_bytes += len(data)

    def _try(self, client: Client, data: bytes, passed: tuple[Any, ...]) -> int | None:
        """Write what goes; None if the client was dropped for it."""
        try:
            if not passed:
                return client.sock.send(data)
            fds = [item if isinstance(item, int) else item.fileno() for item in passed]
            return descriptors.send(client.sock, data, fds)
        except BlockingIOError:
            return 0
        except OSError as error:
            if passed and error.errno in (errno.ETOOMANYREFS, errno.EMFILE, errno.ENFILE):
                return 0  # the receiver has too many descriptors in flight: later
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                # It is gone. What it said before, a checkin perhaps, is still to be read, and then
                # its end.
                return len(data)
            self.drop(client)
            return None

    def _flush(self, client: Client) -> None:
        while client.unsent:
            data, passed = client.unsent[0]
            sent = self._try(client, data, passed)
            if sent is None:
                return
            if sent:
                for item in passed:
                    item.close()
                client.unsent_bytes -= sent
            if sent < len(data):
                client.unsent[0] = (data[sent:], () if sent else passed)
                return
            client.unsent.popleft()
        self._loop.change(client.sock.fileno(), READ)

    def drop(self, client: Client) -> None:
        """Close a connection, and tell."""
        if client.sock.fileno() < 0:
            return
        self._loop.remove(client.sock.fileno())
        client.sock.close()
        unproven = self._silent.pop(client.id, None) is client
        for _, passed in client.unsent:
            for item in passed:
                item.close()
        client.unsent.clear()
        if unproven:
            self._books.newcomers(len(self._silent))
            self._audience.client_gone(client)
            self._look_for_ended()
        elif self.clients.pop(client.id, None) is not None:
            self._books.left(client)
            self._audience.client_gone(client)

    def close(self) -> None:
        """Close everything, after one last try to send what is unsent."""
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        for link in list(self._absent):
            self._not_absent(link)
        for client in [*self.clients.values(), *self._silent.values()]:
            if client.unsent:
                self._flush(client)
            if client.sock.fileno() >= 0:
                self._loop.remove(client.sock.fileno())
                client.sock.close()
        self.clients.clear()
        self._silent.clear()
        if self._spare >= 0:
            os.close(self._spare)

    # --- from the sockets -----------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            if self._crowded():
                # They have had no time to answer: let the others wait in the queue.
                self._stop_listening()
                return
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    if self._refuse_one():
                        continue
                    if self._spare < 0:
                        self._stop_listening()  # not even to refuse: look again in a moment
                        self._starved = self._clock()
                return
            sock.setblocking(False)
            self._numbers += 1
            self.counters["connections"] += 1
            client = Client(self._numbers, sock, self._clock())
            if len(self._silent) >= MAX_SILENT:
                self.counters["connections_without_proof"] += 1
                self.drop(next(iter(self._silent.values())))
            self._silent[client.id] = client
            self._books.newcomers(len(self._silent))
            self._loop.add(sock.fileno(), functools.partial(self._ready, client))
            self.send(client, frames.challenge(client.nonce))

    def _crowded(self) -> bool:
        """Whether there is no room for one more unproven connection: all have just come."""
        if len(self._silent) < MAX_SILENT:
            return False
        oldest = next(iter(self._silent.values()))
        return self._clock() < oldest.since + MOMENT_SECONDS

    def _stop_listening(self) -> None:
        self._loop.remove(self._listener.fileno())
        self._listening = False

    def _take_spare(self) -> None:
        with contextlib.suppress(OSError):  # somebody else took its place: then without
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _listen_again(self) -> None:
        if not self._listening and self._starved is None and self._listener.fileno() >= 0:
            self._listening = True
            self._loop.add(self._listener.fileno(), lambda _: self._accept())

    def _refuse_one(self) -> bool:
        """No descriptor is left: use the spare one to take a connection and close it.

        Returns:
            Whether there was one. (The kernel says that there is no descriptor before it looks.)
        """
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            self._listener.accept()[0].close()
        except OSError:
            return False
        finally:
            self._take_spare()
        self.counters["connections_refused"] += 1
        self._look_for_ended()
        return True

    def _ready(self, client: Client, events: int) -> None:
        if events & WRITE:
            self._flush(client)
        if events & ~WRITE and client.sock.fileno() >= 0:
            self._read(client)

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        try:
            for body in client.decoder.feed(data):
                if client.proven:
                    self._audience.client_said(client, body)
                else:
                    self._prove(client, body)
                if client.sock.fileno() < 0:
                    return
        except ProtocolError:
            self.counters["protocol_errors"] += 1
            self.drop(client)

    def _prove(self, client: Client, body: bytes) -> None:
        if body[0] != frames.AUTH:
            raise ProtocolError("a client spoke before it proved itself")
        answer = frames.read_auth(body)
        expected = auth.client_proof(self._key, client.nonce, answer.nonce)
        if not auth.same(expected, answer.proof):
            self.counters["connections_without_proof"] += 1
            self.send(client, frames.plain(frames.DENIED))
            self.drop(client)
            return
        client.proven = True
        client.member, client.pid, client.thread = answer.member, answer.pid, answer.thread
        client.decoder.limit = 64 * 1024
        del self._silent[client.id]
        client.link, client.engine = answer.link, answer.engine
        number = client.id
        known = self._not_absent(client.link)
        if known is not None:
            client.id = known.id
        self.clients[client.id] = client
        place = self._books.joined(client)
        self._books.newcomers(len(self._silent))
        self._listen_again()
        proof = auth.server_proof(self._key, client.nonce, answer.nonce)
        welcome = frames.welcome(proof, self._books.generation, place or 0)
        marked = client.engine and place is not None
        self.send(client, welcome, (self._books.ledger_fd,) if marked else ())
        if client.sock.fileno() >= 0:
            self._audience.client_joined(client, number)


class _Nowhere:
    """The socket of a client that is not back yet. It takes no descriptor: there may be none."""

    __slots__ = ()

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        return


class _Copy:
    """A duplicate of a descriptor that waits to be sent."""

    __slots__ = ("_fd",)

    def __init__(self, item: Any) -> None:
        self._fd = os.dup(item if isinstance(item, int) else item.fileno())

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)
