"""The manager: turns what clients and workers do into events, and performs the broker's effects.

    clients --frames--> Door --+                          +--> Door  (GRANT, REFUSED, ...)
                               |--> events -> broker -> effects
    workers --READY, exit-> Crew --+                      +--> Crew  (spawn, retire, kill)

It never runs or unpickles anything of the user's, and never waits for anybody: its one wait ends
at the broker's next deadline. An effect that fails becomes an event of its own, performed after.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from whitepool_mp.broker import (
    Broker,
    Busy,
    Cancel,
    Checkin,
    Checkout,
    ClientGone,
    Destroy,
    Drain,
    Drained,
    Effect,
    Event,
    Finished,
    Grant,
    Kill,
    Recall,
    Refuse,
    Released,
    Resize,
    Retire,
    Spawn,
    Start,
    Terminate,
    Tick,
    Unfinished,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerState,
)
from whitepool_mp.errors import ProtocolError
from whitepool_mp.manager import reunion as reunions
from whitepool_mp.manager.census import Census
from whitepool_mp.manager.clients import Client, Door
from whitepool_mp.manager.loop import Loop
from whitepool_mp.manager.losses import Losses
from whitepool_mp.manager.muster import Muster
from whitepool_mp.manager.obituary import Obituary, is_exiting
from whitepool_mp.policy import MAX_WORKERS, Policy
from whitepool_mp.wire import descriptors, frames, pages

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from whitepool_mp.manager.books import Books, Past
    from whitepool_mp.wire.descriptors import Socket
else:
    Protocol = object

MAX_OBITUARIES = 4096
"""How many deaths under a lease are kept until the holder asks about them."""


class Workers(Protocol):
    """What the manager needs of a crew; tests script one."""

    def spawn(self, worker: int, slot: int, max_calls: int, max_rss: int) -> str | None: ...
    def retire(self, worker: int) -> None: ...
    def kill(self, worker: int, reason: str | None) -> None: ...
    def adopt(self, worker: int, channel: Socket) -> int: ...
    def recall(self, worker: int, lease: int, patient: bool) -> bool | None: ...
    def hand(self, worker: int) -> Any: ...
    def resume(self, worker: int) -> None: ...
    def ask_stacks(
        self, rows: dict[int, dict[str, Any]], done: Callable[[list[dict[str, Any]]], None]
    ) -> None: ...
    def next_deadline(self) -> float | None: ...
    def tick(self, now: float) -> None: ...
    @property
    def counters(self) -> dict[str, int]: ...


class Manager:
    """One pool's manager, given its loop, its clock and its policy.

    Args:
        policy: the broker's numbers.
        loop: where descriptors are waited for.
        clock: the monotonic clock, in seconds; deadlines of clients are on it.
        books: where to write down what the next manager has to know.
    """

    def __init__(
        self, policy: Policy, loop: Loop, clock: Callable[[], float], books: Books
    ) -> None:
        self._policy = policy
        self._books = books
        self._broker = Broker(policy)
        self._wears = bool(policy.max_calls or policy.max_rss)
        self._loop = loop
        self._clock = clock
        self._crew: Workers
        self._door: Door
        self._muster: Muster
        self._events: deque[Event] = deque()
        self._performing = False
        self._sites: dict[int, str] = {}
        self._obituaries: OrderedDict[tuple[bytes, int], Obituary] = OrderedDict()
        self._asking: dict[int, list[tuple[Client, int]]] = {}
        self._drainers: list[tuple[Client, int]] = []
        self._losses = Losses(books)
        self.finished = False
        self._reunion: reunions.Reunion | None = None  # while those who waited ask again
        self._handlers: dict[int, Callable[[Client, bytes], None]] = {
            frames.CHECKOUT: self._on_checkout,
            frames.CHECKIN: self._on_checkin,
            frames.CANCEL: self._on_cancel,
            frames.DESTROY: self._on_destroy,
            frames.OPEN: self._on_open,
            frames.WHY: self._on_why,
            frames.STATUS: self._on_status,
            frames.WORKERS: self._on_workers,
            frames.STACKS: self._on_stacks,
            frames.RESIZE: self._on_resize,
            frames.DRAIN: self._on_drain,
            frames.DRAINING: self._on_draining,
            frames.TERMINATE: self._on_terminate,
            frames.REJOINED: self._on_rejoined,
            frames.PING: self._on_ping,
        }

    def start(self, crew: Workers, door: Door) -> None:
        """Begin: order the first workers."""
        self._meet(crew, door)
        self._books.sizes(self._policy.pool_size, self._policy.max_overflow)
        self.apply(Start())

    def _meet(self, crew: Workers, door: Door) -> None:
        self._crew, self._door = crew, door
        self._muster = Muster(door, self._clock, lambda: self.apply(Drain()))
        self._census = Census(self._broker, crew, door, self._books, self._sites, self._clock)

    def resume(self, crew: Workers, door: Door, past: Past, lost: dict[int, Obituary]) -> None:
        """Go on where another manager stopped.

        Args:
            crew, door: as for `start`; they have taken over workers and clients.
            past: what the other one left.
            lost: the workers of which nothing is left to take over, and how they ended.
        """
        self._meet(crew, door)
        self._losses = Losses(self._books, begun=past.draining == 1)
        self._wears = True  # a worker that is taken over may be worn for another reason
        self.apply(past.resume)
        for worker, obituary in lost.items():
            self.worker_exited(worker, obituary)
        for process in past.processes:
            if process.worker not in lost:
                self._resume(process.worker)
        holders = {each.client for each in past.resume.workers if each.client is not None}
        for client in [*(each.number for each in past.clients), *holders]:
            if client not in door.clients:
                self._gone(client)
        self._muster.strangers = past.newcomers if past.draining == 1 else 0
        waiting = {each.number for each in past.clients if each.waiting} & set(door.clients)
        self._reunion = reunions.Reunion(
            waiting, past.draining == 1, self._clock() + reunions.SECONDS
        )
        if past.draining == 2:
            self.apply(Terminate())
        elif not waiting:
            self._reunited()

    def _resume(self, worker: int) -> None:
        self._crew.resume(worker)
        deed = self._missed(worker)
        if isinstance(deed, Recall):
            self._recall(*deed)
        elif deed is not None:
            self.apply(deed)

    def _missed(self, worker: int) -> Event | Recall | None:
        """What is on a worker's page and was not heard."""
        from whitepool_mp.manager.takeover import missed

        record, hand = self._broker.worker(worker), self._crew.hand(worker)
        return None if record is None or hand is None else missed(record, hand.page)

    def turn(self) -> int:
        """Wait until something happens or is due, and deal with it; how many descriptors it was."""
        ready = self._loop.turn(self._timeout())
        now = self._clock()
        due = self._broker.next_deadline()
        if due is not None and now >= due:
            self.apply(Tick())
        if self._reunion is not None and now >= self._reunion.until:
            self._reunited()
        self._muster.tick(now)
        self._door.tick(now)
        self._crew.tick(now)
        return ready

    def _timeout(self) -> float | None:
        parts: tuple[Any, ...] = (self._broker, self._door, self._crew, self._muster)
        waits = [part.next_deadline() for part in parts]
        if self._reunion is not None:
            waits.append(self._reunion.until)
        due = min((when for when in waits if when is not None), default=None)
        return None if due is None else max(0.0, due - self._clock())

    def apply(self, event: Event) -> None:
        """Let the broker decide about an event, and perform what it decided.

        An event that a performed effect brings about waits for its turn: effects are performed in
        the order in which they were decided.
        """
        if type(event) is Terminate:
            if self._reunion is not None:
                self._reunited()
            self._muster.end()
            self._losses.terminated(self._census.busy(), self._broker.status().waiting)
        self._events.append(event)
        if self._performing:
            return
        self._performing = True
        broker, books = self._broker, self._books
        try:
            while self._events:
                effects = broker.step(self._events.popleft(), self._clock())
                for worker in broker.changed():
                    books.note(worker, broker.worker(worker.id) is not None)
                for effect in effects:
                    self._perform(effect)
        finally:
            self._performing = False

    def _perform(self, effect: Effect) -> None:
        kind = type(effect)
        if kind is Grant:
            self._grant(effect)  # type: ignore[arg-type]
        elif isinstance(effect, Refuse):
            self._refuse(effect)
        elif isinstance(effect, Recall):
            self._recall(*effect)
        elif isinstance(effect, Spawn):
            problem = self._crew.spawn(*effect)
            if problem is not None:
                self._events.append(WorkerExited(effect.worker, problem))
        elif isinstance(effect, Retire):
            self._crew.retire(effect.worker)
        elif isinstance(effect, Kill):
            self._crew.kill(effect.worker, effect.reason or None)
        elif isinstance(effect, Drained):
            self.finished = True

    def _recall(self, worker: int, lease: int, patient: bool) -> None:
        hand = self._crew.hand(worker)
        if not patient and hand is not None and hand.page.once(lease):
            # Its holder has made no call yet, and gives it back after the first one.
            self.apply(Busy(worker, lease))
            return
        busy = self._crew.recall(worker, lease, patient)
        if busy is None:
            self.apply(Released(worker, lease, self._worn(worker)))
        elif busy:
            self.apply(Busy(worker, lease))

    def _grant(self, effect: Grant) -> None:
        client = self._door.clients.get(effect.client)
        hand = self._crew.hand(effect.worker)
        if client is None or hand is None:
            return  # its end is an event that is on its way
        self._sites[effect.worker] = client.sites.pop(effect.ticket, "")
        self._books.waiting(client)
        self._door.send(
            client,
            frames.grant(
                effect.ticket, effect.lease, effect.worker, hand.pid, hand.slot, effect.keep
            ),
        )

    def _refuse(self, effect: Refuse) -> None:
        client = self._door.clients.get(effect.client)
        if client is None:
            return
        client.sites.pop(effect.ticket, None)
        self._books.waiting(client)
        detail = effect.detail
        if effect.why != "factory_failed":
            detail = self._census.summary()
        self._door.send(client, frames.refused(effect.ticket, effect.why, detail))

    # --- what clients say -----------------------------------------------------------------

    def client_said(self, client: Client, body: bytes) -> None:
        """A whole frame came from a client that proved itself."""
        handler = self._handlers.get(body[0])
        if handler is None:
            raise ProtocolError(f"a client sent a frame of kind {body[0]}")
        if self._reunion is not None and self._reunion.keep(client, body):
            return
        handler(client, body)

    def client_gone(self, client: Client) -> None:
        """A client's connection ended: what it held for its user is dirty."""
        if client.proven:
            if self._books.generation > 1:
                self._take_back(client)
            self._gone(client.id)
            self._forget_obituaries(client.member)
        self._is_back(client)
        self._muster.came(client)

    def _forget_obituaries(self, member: bytes) -> None:
        """A connection ended: if it was the last of its process, nobody will ask any more."""
        if any(holder == member for holder, _ in self._obituaries) and not any(
            each.member == member for each in self._door.clients.values()
        ):
            for key in [key for key in self._obituaries if key[0] == member]:
                del self._obituaries[key]

    def _gone(self, client: int) -> None:
        """A client will not come back. What it held for jobs is taken back first, and is clean if
        no call runs then: the client may have had no moment in which to give it back. (Whether the
        last answer was sent does not matter, since nobody waits for it.)"""
        released = []
        for worker in self._broker.job_leases(client):
            hand, lease = self._crew.hand(worker.id), worker.lease
            if hand is not None and lease is not None and not hand.page.recall(lease):
                released.append(Released(worker.id, lease, hand.page.worn))
        self.apply(ClientGone(client, tuple(released)))

    def _take_back(self, client: Client) -> None:
        """One that has not come back, or not said all again, may have noted on a page that it gave
        the worker back."""
        for worker in list(self._broker.workers()):
            if worker.client == client.id:
                deed = self._missed(worker.id)
                if isinstance(deed, Checkin):
                    self.apply(deed)

    def _on_checkout(self, client: Client, body: bytes) -> None:
        asked = frames.read_checkout(body)
        client.sites[asked.request] = asked.site
        self._books.waiting(client)
        self.apply(
            Checkout(
                client.id, asked.request, asked.block, asked.deadline, asked.keep, asked.spare_own
            )
        )

    def _on_checkin(self, client: Client, body: bytes) -> None:
        lease = frames.read_lease(body)[0]
        self._obituaries.pop((client.member, lease), None)  # its holder does not ask any more
        worker = self._broker.lease_worker(client.id, lease) if self._wears else None
        self.apply(Checkin(client.id, lease, self._worn(worker)))

    def _worn(self, worker: int | None) -> bool:
        """Whether a worker has said on its page that it has served for long enough."""
        hand = None if worker is None else self._crew.hand(worker)
        return hand is not None and hand.page.worn

    def _on_cancel(self, client: Client, body: bytes) -> None:
        self.apply(Cancel(client.id, frames.read_request(body)))

    def _on_destroy(self, client: Client, body: bytes) -> None:
        lease, reason = frames.read_lease(body)
        self._obituaries.pop((client.member, lease), None)
        self.apply(Destroy(client.id, lease, reason or "its holder had it destroyed"))

    def _on_open(self, client: Client, body: bytes) -> None:
        number, lease = frames.read_request_lease(body)
        worker = self._broker.lease_worker(self._holder(client, lease).id, lease)
        hand = None if worker is None else self._crew.hand(worker)
        if worker is None or hand is None:
            lost = worker is not None or (client.member, lease) in self._obituaries
            self._door.send(client, frames.channel(number, 0, lost=lost))
            return
        try:
            ours, theirs = descriptors.pair()
        except OSError:  # no descriptors left: this one call fails, and says so
            self._door.send(client, frames.channel(number, 0, lost=True))
            return
        with ours, theirs:
            slot = self._crew.adopt(worker, theirs)
            passed = (ours, hand.page_fd) if slot else ()
            self._door.send(client, frames.channel(number, slot, lost=not slot), passed)

    def _holder(self, client: Client, lease: int) -> Client:
        """Who holds a lease on a client's behalf: another connection of its process may."""
        number = self._broker.lease_holder(lease)
        holder = None if number is None else self._door.clients.get(number)
        return holder if holder is not None and holder.member == client.member else client

    def _on_why(self, client: Client, body: bytes) -> None:
        number, lease = frames.read_request_lease(body)
        known = self._obituaries.pop((client.member, lease), None)
        if known is not None:
            self._door.send(client, frames.reply(number, known.as_dict()))
            return
        holder = self._holder(client, lease)
        worker = self._broker.lease_worker(holder.id, lease)
        hand = None if worker is None else self._crew.hand(worker)
        if worker is None or hand is None:
            # It was kept and has been recalled; or it is the end of the pool.
            ended = {"reason": frames.TERMINATED} if self._broker.status().draining else None
            self._door.send(client, frames.reply(number, ended))
            return
        self._asking.setdefault(worker, []).append((client, number))
        if not is_exiting(hand.pid):
            # It lives and cannot be reached. Otherwise its exit is about to be reported.
            self.apply(Destroy(holder.id, lease, "its channel broke while it was alive"))

    def _on_status(self, client: Client, body: bytes) -> None:
        self._door.send(client, frames.reply(frames.read_request(body), self._census.status()))

    def _on_workers(self, client: Client, body: bytes) -> None:
        self._door.send(client, frames.reply(frames.read_request(body), self._census.workers()))

    def _on_stacks(self, client: Client, body: bytes) -> None:
        number = frames.read_request(body)
        self._crew.ask_stacks(
            self._census.states(), lambda told: self._door.send(client, frames.reply(number, told))
        )

    def _on_resize(self, client: Client, body: bytes) -> None:
        number, pool_size, max_overflow = frames.read_resize(body)
        if not 1 <= pool_size <= pool_size + max_overflow <= MAX_WORKERS:
            raise ProtocolError(f"a resize to {pool_size}+{max_overflow} workers")
        self._books.sizes(pool_size, max_overflow)
        self.apply(Resize(pool_size, max_overflow))
        self._door.send(client, frames.reply(number, True))

    def _on_drain(self, client: Client, body: bytes) -> None:
        self._drainers.append((client, frames.read_request(body)))
        self._drain()

    def _drain(self) -> None:
        self._losses.begin()
        self._books.draining(terminated=False)
        self._muster.begin()

    def client_joined(self, client: Client, number: int) -> None:
        """A connection has proved itself; `number` is what it had before."""
        self._muster.joined(client, number)

    def _on_draining(self, client: Client, body: bytes) -> None:
        """An engine says what is left of its jobs."""
        left = frames.read_draining(body)
        if left == "unfinished":
            self.apply(Unfinished(client.id))
        elif left == "finished":  # of what was unfinished when it joined, perhaps: no answer
            self.apply(Finished(client.id))
        else:
            self._muster.came(client)

    def _on_terminate(self, client: Client, body: bytes) -> None:
        self._drainers.append((client, frames.read_request(body)))
        self._books.draining(terminated=True)
        self.apply(Terminate())

    def answer_drainers(self) -> None:
        """Everything has ended: tell whoever waits for that."""
        for client, number in self._drainers:
            self._door.send(client, frames.reply(number, self._losses.told()))

    def _on_ping(self, client: Client, body: bytes) -> None:
        self._door.send(client, frames.pong(frames.read_request(body)))

    # --- after another manager ------------------------------------------------------------

    def _on_rejoined(self, client: Client, body: bytes) -> None:
        self._is_back(client)
        if self._reunion is None:
            self._books.waiting(client)
        if not client.engine:  # an engine is asked
            self._muster.came(client)

    def _is_back(self, client: Client) -> None:
        """One who waited has asked again, or will not."""
        self._muster.late.discard(client.id)
        if self._reunion is not None and self._reunion.came(client):
            self._reunited()

    def _reunited(self) -> None:
        """Take up what was asked meanwhile: in the order in which it was asked first."""
        reunion, self._reunion = self._reunion, None
        assert reunion is not None
        self._muster.late = reunion.missing
        for client, body in reunion.taken_up():
            if self._door.clients.get(client.id) is client:
                self._handlers[body[0]](client, body)
        for client in reunion.back:
            self._books.waiting(client)
        if reunion.draining:
            self._drain()

    # --- what workers do ------------------------------------------------------------------

    def worker_born(self, worker: int, pid: int) -> None:
        """A worker's process exists."""
        self._books.born(worker, pid)

    def worker_ready(self, worker: int) -> None:
        """A factory returned."""
        if self._starting(worker):
            self.apply(WorkerReady(worker))

    def worker_failed(self, worker: int, reason: str) -> None:
        """A factory raised; `reason` is the traceback."""
        if self._starting(worker):
            self.apply(WorkerFailed(worker, reason))

    def _starting(self, worker: int) -> bool:
        """Whether a worker may say how its start went; one that did so before is killed."""
        record = self._broker.worker(worker)
        if record is None:
            return False
        if record.state in (WorkerState.BOOTING, WorkerState.KILLED):
            return True
        self._crew.kill(worker, "it said twice how its start went (did its factory fork?)")
        return False

    def worker_released(self, worker: int, lease: int) -> None:
        """No call under this lease runs or will begin."""
        record, hand = self._broker.worker(worker), self._crew.hand(worker)
        if record is None:
            return
        if hand is not None and record.kept and record.lease == lease:
            hand.page.words[pages.RECALLED] = lease  # was not, if it was recalled patiently
        self.apply(Released(worker, lease, self._worn(worker)))

    def worker_exited(self, worker: int, obituary: Obituary) -> None:
        """A worker's process is gone."""
        record = self._broker.worker(worker)
        if record is not None:
            self._losses.died(record, obituary)
        if record is not None and record.lease is not None and record.client is not None:
            holder = self._door.clients.get(record.client)
            asked = self._asking.get(worker, ())
            if holder is not None and all(each.member != holder.member for each, _ in asked):
                self._obituaries[holder.member, record.lease] = obituary
                if len(self._obituaries) > MAX_OBITUARIES:
                    self._obituaries.popitem(last=False)
        self._sites.pop(worker, None)
        for client, number in self._asking.pop(worker, ()):
            self._door.send(client, frames.reply(number, obituary.as_dict()))
        self.apply(WorkerExited(worker, obituary.describe()))
