"""The manager on a real loop and real sockets, with scripted workers and a clock of its own.

Time moves only when nothing is ready: then the clock jumps to where the loop would have waited to.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whitepool_mp.broker import Drain, Terminate
from whitepool_mp.client.joining import Handshake
from whitepool_mp.config import Policy
from whitepool_mp.manager import muster
from whitepool_mp.manager.books import Books
from whitepool_mp.manager.clients import (
    HANDSHAKE_SECONDS,
    MAX_SILENT,
    MAX_UNREAD,
    MOMENT_SECONDS,
    Door,
)
from whitepool_mp.manager.core import Manager
from whitepool_mp.manager.loop import Loop
from whitepool_mp.manager.obituary import Obituary
from whitepool_mp.wire import barrier, frames, pages
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.ledger import Ledger

KEY = b"k" * frames.KEY_BYTES


class JumpingLoop(Loop):
    """A loop that does not wait: with nothing ready, the clock jumps to the end of the wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def clock(self) -> float:
        return self.now

    def turn(self, timeout: float | None) -> int:
        ready = super().turn(0)
        if not ready:
            assert timeout is not None, "the manager would wait for ever"
            self.now += timeout
        return ready


class Hand:
    """A scripted worker, with as much of a process as the manager looks at."""

    def __init__(self, worker: int, slot: int) -> None:
        self.worker = worker
        self.slot = slot
        self.pid = 100_000_000 + worker  # above every real one
        self.page_fd = os.memfd_create("page")
        os.ftruncate(self.page_fd, pages.SIZE)
        self.page = pages.Page(self.page_fd, pages.NUMBERS)
        self.control: list[socket.socket] = []


class Crew:
    """Scripted workers: nothing happens to one but what a test says."""

    def __init__(self, loop: JumpingLoop) -> None:
        self.loop = loop
        self.hands: dict[int, Hand] = {}
        self.spawned: list[float] = []
        self.limits: dict[int, tuple[int, int]] = {}
        self.retired: list[int] = []
        self.recalled: list[tuple[int, int]] = []
        self.waits = False  # whether workers wait, so that their leases are free when recalled
        self.killed: dict[int, str | None] = {}
        self.on_spawn: Callable[[int], None] = lambda worker: None
        self.refuse: str | None = None

    def spawn(self, worker: int, slot: int, max_calls: int, max_rss: int) -> str | None:
        self.spawned.append(self.loop.now)
        if self.refuse is not None:
            return self.refuse
        self.hands[worker] = Hand(worker, slot)
        self.limits[worker] = (max_calls, max_rss)
        self.on_spawn(worker)
        return None

    def retire(self, worker: int) -> None:
        self.retired.append(worker)

    def kill(self, worker: int, reason: str | None) -> None:
        self.killed[worker] = reason

    def adopt(self, worker: int, channel: socket.socket) -> int:
        self.hands[worker].control.append(socket.socket(fileno=os.dup(channel.fileno())))
        return 1

    def hand(self, worker: int) -> Hand | None:
        return self.hands.get(worker)

    def ask_stacks(self, rows: dict[int, Any], done: Callable[[list[Any]], None]) -> None:
        done([row | {"answered": True, "stack": f"stack {worker}"} for worker, row in rows.items()])

    def next_deadline(self) -> float | None:
        return None

    def tick(self, now: float) -> None:
        pass

    @property
    def counters(self) -> dict[str, int]:
        return {"scripted": 1}

    def recall(self, worker: int, lease: int, patient: bool) -> bool | None:
        self.recalled.append((worker, lease))
        return None if self.waits else self.hands[worker].page.busy()

    def bury(self, worker: int) -> Obituary:
        hand = self.hands.pop(worker)
        hand.page.close()
        os.close(hand.page_fd)
        for sock in hand.control:
            sock.close()
        return Obituary(hand.pid, hand.slot, 0, 1.0, 1024, 0, None, self.killed.get(worker))


class Bench:
    """A manager with everything around it."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self.loop = JumpingLoop()
        self.path = str(folder / "manager")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(self.path)
        self.listener.listen(1024)
        self.crew = Crew(self.loop)
        sizes = {"pool_size": 2, "max_overflow": 0} | policy
        self.ledger = Ledger(ledgers.create())
        self.ledger.words[ledgers.LAUNCHED] = 1
        books = Books(self.ledger)
        clock = self.loop.clock
        self.manager = Manager(Policy(**sizes), self.loop, clock, books)
        self.door = Door(self.listener, KEY, self.loop, self.manager, clock, books)
        self.guests: list[Guest] = []

    def start(self) -> Bench:
        self.manager.start(self.crew, self.door)
        return self

    def settle(self) -> None:
        """Let the manager deal with everything that has arrived."""
        while Loop.turn(self.loop, 0):
            pass

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with everything that is due in it."""
        end = self.loop.now + seconds
        self.settle()
        while True:
            due = self.manager._timeout()
            if due is None or self.loop.now + due > end:
                break
            self.manager.turn()
        self.loop.now = end
        self.settle()

    def ready(self, *workers: int) -> None:
        for worker in workers or sorted(self.crew.hands):
            self.manager.worker_ready(worker)

    def exits(self, *workers: int) -> None:
        for worker in workers:
            self.manager.worker_exited(worker, self.crew.bury(worker))

    def exits_killed(self) -> None:
        self.exits(*[worker for worker in self.crew.killed if worker in self.crew.hands])

    def join(self, member: bytes = b"m" * frames.MEMBER_BYTES, engine: bool = False) -> Guest:
        guest = self.connect()
        handshake = Handshake(KEY, member, engine=engine)
        while not handshake.done:
            self.settle()
            for body in guest.receive():
                if handshake.done:
                    guest.inbox.append(body)
                elif (answer := handshake.hear(body)) is not None:
                    guest.sock.sendall(answer)
        if engine:
            (fd,) = guest.fds
            guest.mark = ledgers.mark(fd, handshake.place)
            os.close(guest.fds.pop())
        assert guest.fds == []
        guest.number = max(self.door.clients)
        return guest

    def connect(self) -> Guest:
        guest = Guest(self)
        self.guests.append(guest)
        return guest

    def close(self) -> None:
        for guest in self.guests:
            guest.sock.close()
            if guest.mark is not None:
                guest.mark.release()
        self.settle()
        self.door.close()
        for worker in list(self.crew.hands):
            self.crew.bury(worker)
        os.close(self.ledger.fd)
        self.ledger.close()
        self.loop.close()


class Guest:
    """A client's bare control connection."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(bench.path)
        self.sock.setblocking(False)
        self.decoder = frames.FrameDecoder()
        self.inbox: list[bytes] = []
        self.fds: list[int] = []
        self.closed = False
        self.mark: memoryview | None = None  # an engine's
        self.number = 0

    def say(self, *data: bytes) -> None:
        """Send frames and let the manager answer."""
        rest = memoryview(b"".join(data))
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                self.bench.settle()
        self.bench.settle()

    def receive(self) -> list[bytes]:
        """Everything that has arrived."""
        while not self.closed:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 65536, 16)
            except BlockingIOError:
                break
            except ConnectionError:
                data, fds = b"", []
            self.fds += fds
            self.closed = not data
            self.inbox += self.decoder.feed(data)
        found, self.inbox = self.inbox, []
        return found

    def grants(self) -> list[frames.Grant]:
        return [frames.read_grant(body) for body in self.receive() if body[0] == frames.GRANT]

    def refusals(self) -> list[frames.Refused]:
        return [frames.read_refused(body) for body in self.receive() if body[0] == frames.REFUSED]

    def only(self) -> bytes:
        (body,) = self.receive()
        return body

    def checkout(self, *requests: int, block: bool = True, seconds: float | None = None) -> None:
        deadline = None if seconds is None else self.bench.loop.now + seconds
        self.say(*(frames.checkout(number, block, deadline, "here:1") for number in requests))

    def lease(self, request: int = 1) -> frames.Grant:
        self.checkout(request)
        (grant,) = self.grants()
        return grant

    def ask(self, kind: int, number: int = 999) -> Any:
        self.say(frames.request(kind, number))
        return frames.read_reply(self.only())

    def hung_up(self) -> bool:
        self.receive()
        return self.closed


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**policy: Any) -> Bench:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Bench(folder, **policy))
        return made[-1]

    yield build
    for bench in made:
        bench.close()


# --- checkout ---------------------------------------------------------------------------------


def test_the_first_workers_are_ordered_at_the_start(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=3).start()
    assert [hand.slot for hand in bench.crew.hands.values()] == [0, 1, 2]


def test_a_checkout_is_granted_when_a_worker_is_ready(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    guest = bench.join()
    guest.checkout(7)
    assert guest.receive() == []
    (worker,) = bench.crew.hands
    bench.ready(worker)
    (grant,) = guest.grants()
    assert grant.request == 7
    assert (grant.worker, grant.slot, grant.pid) == (worker, 0, bench.crew.hands[worker].pid)


def test_waiters_are_served_in_the_order_in_which_they_asked(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    first, second, third = bench.join(), bench.join(), bench.join()
    for guest in (second, first, third):
        guest.checkout(1)
    bench.ready()
    for guest in (second, first, third):
        others = [each for each in (first, second, third) if each is not guest]
        (grant,) = guest.grants()
        assert all(other.receive() == [] for other in others)
        guest.say(frames.checkin(grant.lease))


@pytest.mark.parametrize("busy", [False, True])
def test_a_kept_lease_is_recalled_through_its_worker_for_who_waits(
    make: Callable[..., Bench], busy: bool
) -> None:
    bench = make(pool_size=1, max_overflow=1).start()
    bench.ready()
    keeper, waiter = bench.join(), bench.join()
    keeper.say(frames.checkout(1, True, None, "here:1", keep=True))
    (kept,) = keeper.grants()
    assert kept.keep
    status = waiter.ask(frames.STATUS)
    assert (status["idle"], status["leased"], status["state"]) == (1, 0, "ready")
    if busy:
        bench.crew.hands[kept.worker].page.words[pages.CALLS] += 1
        status = waiter.ask(frames.STATUS)
        assert (status["idle"], status["leased"], status["state"]) == (0, 1, "overflow")
    waiter.checkout(1)
    assert bench.crew.recalled == [(kept.worker, kept.lease)]
    assert len(bench.crew.hands) == 1 + busy  # nobody waits for the end of the call
    assert waiter.receive() == []
    bench.manager.worker_released(kept.worker, kept.lease)
    (grant,) = waiter.grants()
    assert grant.worker == kept.worker and grant.lease > kept.lease
    assert keeper.receive() == []
    bench.manager.worker_released(kept.worker, kept.lease)  # said twice: late
    assert waiter.ask(frames.STATUS)["counters"]["late_events"] == 1


def test_a_recalled_lease_under_which_nothing_is_left_to_do_is_free_at_once(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1, max_overflow=1).start()
    bench.ready()
    bench.crew.waits = True
    keeper, waiter = bench.join(), bench.join()
    keeper.say(frames.checkout(1, True, None, "here:1", keep=True))
    (kept,) = keeper.grants()
    waiter.checkout(1)
    (grant,) = waiter.grants()
    assert bench.crew.recalled == [(kept.worker, kept.lease)]
    assert grant.worker == kept.worker and grant.lease > kept.lease
    assert len(bench.crew.hands) == 1
    counters = waiter.ask(frames.STATUS)["counters"]
    assert (counters["recalled"], counters["late_events"]) == (1, 0)


def test_a_kept_lease_is_not_taken_back_before_its_first_call(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    keeper, waiter, third = bench.join(), bench.join(), bench.join()
    keeper.say(frames.checkout(1, True, None, "here:1", keep=True))
    (kept,) = keeper.grants()
    page = bench.crew.hands[kept.worker].page
    page.order_me()
    waiter.say(frames.checkout(1, True, None, "here:1", keep=True))
    third.checkout(1)
    assert bench.crew.recalled == [] and not page.is_recalled(kept.lease)
    assert page.due(kept.lease)
    assert waiter.receive() == third.receive() == []
    page.words[pages.BEGUN] = pages.token(kept.lease, 1)
    keeper.say(frames.checkin(kept.lease))
    (grant,) = waiter.grants()
    assert not grant.keep and not page.due(grant.lease)
    waiter.say(frames.checkin(grant.lease))
    assert third.grants()


def test_a_worker_that_released_a_lease_has_it_on_its_page(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    keeper = bench.join()
    keeper.say(frames.checkout(1, True, None, "here:1", keep=True))
    (kept,) = keeper.grants()
    page = bench.crew.hands[kept.worker].page
    for lease in (kept.lease + 1, 0):  # said by mistake
        bench.manager.worker_released(kept.worker, lease)
        assert not page.is_recalled(kept.lease)
    bench.manager.worker_released(kept.worker, kept.lease)
    assert page.is_recalled(kept.lease) and not page.is_recalled(kept.lease + 1)


def test_a_checkin_of_another_s_lease_frees_nothing(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, thief = bench.join(), bench.join()
    grant = holder.lease()
    thief.say(frames.checkin(grant.lease), frames.destroy(grant.lease, "mine"))
    thief.checkout(2)
    assert thief.receive() == []
    assert bench.crew.killed == {}
    status = holder.ask(frames.STATUS)
    assert status["leased"] == 1 and status["counters"]["foreign_checkins"] == 2


@pytest.mark.parametrize("worn", [False, True])
def test_a_worker_whose_page_says_that_it_is_worn_retires_at_its_checkin(
    make: Callable[..., Bench], worn: bool
) -> None:
    bench = make(pool_size=1, max_calls=10, max_rss=1000).start()
    bench.ready()
    ((calls, rss),) = bench.crew.limits.values()
    assert 8 <= calls <= 10 and 800 <= rss <= 1000
    holder = bench.join()
    grant = holder.lease()
    bench.crew.hands[grant.worker].page.words[pages.WORN] = worn
    assert bench.crew.retired == []
    holder.say(frames.checkin(grant.lease))
    assert bench.crew.retired == [grant.worker] * worn
    assert holder.ask(frames.STATUS)["counters"]["recycled"] == worn
    assert len(bench.crew.spawned) == 1 + worn


def test_a_non_blocking_checkout_is_refused_when_all_are_leased(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, other = bench.join(), bench.join()
    holder.lease()
    other.checkout(5, block=False)
    (refused,) = other.refusals()
    assert (refused.request, refused.why) == (5, "full")
    assert "leased=1" in refused.detail


def test_a_waiter_whose_deadline_has_passed_is_never_given_a_worker(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, late, patient = bench.join(), bench.join(), bench.join()
    grant = holder.lease()
    late.checkout(1, seconds=5.0)
    patient.checkout(1, seconds=60.0)
    bench.pass_time(6.0)
    holder.say(frames.checkin(grant.lease))
    (refused,) = late.refusals()
    assert refused.why == "timeout"
    assert len(patient.grants()) == 1


def test_a_waiter_is_served_until_its_deadline(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, waiter = bench.join(), bench.join()
    grant = holder.lease()
    waiter.checkout(1, seconds=5.0)
    bench.pass_time(4.999)
    holder.say(frames.checkin(grant.lease))
    assert len(waiter.grants()) == 1


def test_a_cancel_while_waiting_is_answered_and_gives_the_place_up(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    quitter, other = bench.join(), bench.join()
    quitter.checkout(1)
    other.checkout(1)
    quitter.say(frames.request(frames.CANCEL, 1))
    (refused,) = quitter.refusals()
    assert (refused.request, refused.why) == (1, "cancelled")
    bench.ready()
    assert quitter.receive() == []
    assert len(other.grants()) == 1


def test_a_cancel_that_crosses_its_grant_acts_as_a_checkin(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    quitter, other = bench.join(), bench.join()
    quitter.checkout(1)
    other.checkout(1)
    # Sent before the grant, read after it.
    quitter.sock.send(frames.request(frames.CANCEL, 1))
    bench.ready()
    bench.settle()
    kinds = [body[0] for body in quitter.receive()]
    assert kinds == [frames.GRANT, frames.REFUSED]
    assert len(other.grants()) == 1
    assert bench.crew.killed == {}


def test_a_cancel_after_the_checkin_frees_nobody_else_s_worker(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    first, second = bench.join(), bench.join()
    grant = first.lease(1)
    first.say(frames.checkin(grant.lease))
    second.lease(1)
    first.say(frames.request(frames.CANCEL, 1))
    assert [refused.why for refused in first.refusals()] == ["cancelled"]
    assert second.ask(frames.STATUS)["leased"] == 1


def test_a_client_that_goes_while_waiting_is_never_given_a_worker(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    gone, other = bench.join(), bench.join()
    gone.checkout(1, 2, 3)
    other.checkout(1)
    gone.sock.close()
    bench.settle()
    bench.ready()
    assert len(other.grants()) == 1
    assert other.ask(frames.STATUS)["leased"] == 1


def test_the_worker_of_a_client_that_goes_while_holding_is_replaced(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    gone, other = bench.join(), bench.join()
    grant = gone.lease()
    other.checkout(1)
    gone.sock.close()
    bench.settle()
    assert bench.crew.killed == {grant.worker: "its client has gone"}
    assert other.receive() == []
    bench.exits_killed()
    bench.ready()
    (successor,) = other.grants()
    assert successor.worker != grant.worker
    assert successor.slot == grant.slot
    assert successor.lease > grant.lease


@pytest.mark.parametrize("left", ["nothing", "a call", "an answer"])
def test_the_worker_that_a_gone_client_kept_is_free_if_no_call_runs(
    make: Callable[..., Bench], left: str
) -> None:
    assert barrier.register()
    bench = make(pool_size=1).start()
    bench.ready()
    gone, other = bench.join(), bench.join()
    gone.say(frames.checkout(1, True, None, "", keep=True, spare_own=True))
    (grant,) = gone.grants()
    words = bench.crew.hands[grant.worker].page.words
    words[pages.ORDERED] = 1
    words[pages.CALLS] = 3
    words[pages.ENDED] = 3 - (left == "a call")
    words[pages.QUIET] = 3 - (left != "nothing")
    other.checkout(1)
    bench.crew.recalled.clear()
    gone.checkout(2, 3)
    gone.sock.close()
    bench.settle()
    assert words[pages.RECALLED] == grant.lease  # what the client may have sent never begins
    assert bool(bench.crew.killed) is (left == "a call")
    assert [each.worker for each in other.grants()] == [grant.worker][: not bench.crew.killed]


def test_a_holder_s_other_connections_may_open_its_channel(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, sibling, stranger = bench.join(), bench.join(), bench.join(member=b"s" * 16)
    grant = holder.lease()
    stranger.say(frames.request_lease(frames.OPEN, 3, grant.lease))
    assert frames.read_channel(stranger.only()) == (0, False)
    sibling.say(frames.request_lease(frames.OPEN, 4, grant.lease))
    assert frames.read_channel(sibling.only()) == (1, False)
    ours, page = sibling.fds
    with socket.socket(fileno=ours) as sock, bench.crew.hands[grant.worker].control[0] as theirs:
        theirs.send(b"from the worker")
        assert sock.recv(100) == b"from the worker"
    os.close(page)


def test_a_holder_learns_how_its_worker_ended(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder = bench.join()
    grant = holder.lease()
    bench.exits(grant.worker)
    holder.say(frames.request_lease(frames.WHY, 5, grant.lease))
    told = frames.read_reply(holder.only())
    assert (told["pid"], told["slot"], told["exitcode"]) == (grant.pid, grant.slot, 0)


@pytest.mark.parametrize("how", ["asked", "was asked", "checkin", "destroy", "gone"])
def test_how_a_worker_ended_is_kept_until_its_holder_knows_or_cannot_ask(
    make: Callable[..., Bench], how: str
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, same, other = bench.join(), bench.join(), bench.join(b"o" * frames.MEMBER_BYTES)
    grant = holder.lease()
    ask = frames.request_lease(frames.WHY, 5, grant.lease)
    if how == "was asked":
        same.say(ask)
    bench.exits(grant.worker)
    kept = bench.manager._obituaries
    assert len(kept) == (how != "was asked")
    if how == "asked":
        same.say(ask)
    elif how == "checkin":
        holder.say(frames.checkin(grant.lease))
    elif how == "destroy":
        holder.say(frames.destroy(grant.lease, "its channel broke"))
    elif how == "gone":
        other.sock.close()
        holder.sock.close()
        bench.settle()
        assert len(kept) == 1  # its process has another connection
        same.sock.close()
        bench.settle()
    assert not kept
    if how in ("asked", "was asked"):
        assert frames.read_reply(same.only())["pid"] == grant.pid


# --- workers that do not start ----------------------------------------------------------------


def test_failing_starts_back_off(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1, backoff_first=1.0, backoff_max=8.0)

    def fail(worker: int) -> None:
        bench.manager.worker_failed(worker, "ValueError: no")
        bench.exits(worker)

    bench.crew.on_spawn = fail
    bench.start()
    bench.pass_time(100.0)
    # Delays of 1, 2, 4, 8, 8, ... seconds, each less up to half of it by jitter.
    count = len(bench.crew.spawned)
    assert 4 + (100 - 15) / 8 <= count <= 4 + 2 * (100 - 7.5) / 8 + 1
    pauses = [b - a for a, b in zip(bench.crew.spawned, bench.crew.spawned[1:], strict=False)]
    for pause, full in zip(pauses, [1.0, 2.0, 4.0, *[8.0] * 1000], strict=False):
        assert full / 2 <= pause <= full + 0.001


def test_a_pool_that_recovers_stops_backing_off(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1, backoff_first=1.0, backoff_max=8.0)
    outcomes = iter([False, False, True])

    def script(worker: int) -> None:
        if next(outcomes):
            bench.manager.worker_ready(worker)
        else:
            bench.manager.worker_failed(worker, "ValueError: no")
            bench.exits(worker)

    bench.crew.on_spawn = script
    bench.start()
    bench.pass_time(60.0)
    assert len(bench.crew.spawned) == 3
    status = bench.join().ask(frames.STATUS)
    assert (status["failing"], status["idle"]) == (False, 1)


def test_waiters_learn_the_traceback_of_a_failed_start(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    guest = bench.join()
    guest.checkout(1)
    (worker,) = bench.crew.hands
    bench.manager.worker_failed(worker, "Traceback ...\nValueError: no database")
    (refused,) = guest.refusals()
    assert refused.why == "factory_failed"
    assert refused.detail.endswith("ValueError: no database")


def test_a_spawn_that_cannot_be_ordered_is_a_failed_start(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1, backoff_first=1.0)
    bench.crew.refuse = "OSError: no descriptors left"
    bench.start()
    status = bench.join().ask(frames.STATUS)
    assert status["failing"] is True
    assert status["last_failure"] == "OSError: no descriptors left"
    bench.crew.refuse = None
    bench.pass_time(1.0)
    assert len(bench.crew.hands) == 1


def test_a_slow_start_does_not_block_the_others(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=3, start_timeout=60.0).start()
    slow, *quick = sorted(bench.crew.hands)
    bench.ready(*quick)
    guest = bench.join()
    guest.checkout(1, 2)
    assert {grant.worker for grant in guest.grants()} == set(quick)
    bench.pass_time(59.0)
    assert bench.crew.killed == {}
    bench.pass_time(1.5)
    assert bench.crew.killed == {slow: "did not start within 60 s"}
    assert guest.ask(frames.STATUS)["leased"] == 2


def test_a_slow_stop_is_cut_short(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1, stop_timeout=5.0).start()
    bench.ready()
    bench.manager.apply(Drain())
    (worker,) = bench.crew.retired
    bench.pass_time(4.9)
    assert bench.crew.killed == {}
    bench.pass_time(0.2)
    assert bench.crew.killed == {worker: "did not stop within 5 s"}


def test_overflow_retires_after_its_time(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1, max_overflow=1, overflow_ttl=5.0).start()
    guest = bench.join()
    guest.checkout(1, 2)
    bench.ready()
    first, second = guest.grants()
    guest.say(frames.checkin(first.lease), frames.checkin(second.lease))
    bench.pass_time(4.9)
    assert bench.crew.retired == []
    bench.pass_time(0.2)
    assert len(bench.crew.retired) == 1


# --- the end ----------------------------------------------------------------------------------


def test_a_drain_serves_who_waits_and_refuses_who_comes(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    holder, waiter, late, ender = bench.join(), bench.join(), bench.join(), bench.join()
    grant = holder.lease()
    waiter.checkout(1)
    ender.say(frames.request(frames.DRAIN, 9))
    late.checkout(1)
    assert [refused.why for refused in late.refusals()] == ["closed"]
    holder.say(frames.checkin(grant.lease))
    (served,) = waiter.grants()
    assert bench.crew.retired == [] and not bench.manager.finished
    waiter.say(frames.checkin(served.lease))
    assert bench.crew.retired == [served.worker]
    assert not bench.manager.finished
    bench.exits(served.worker)
    assert bench.manager.finished
    assert [body[0] for body in ender.receive()] == [frames.DRAINING]
    bench.manager.answer_drainers()
    assert frames.read_request(ender.only()) == 9


def a_job(number: int) -> bytes:
    """An engine that has one job asks for a worker, as it does."""
    return frames.checkout(number, True, None, "here:1", keep=True, spare_own=True)


def test_a_drain_waits_until_every_engine_has_asked_for_what_its_jobs_need(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    engines = [bench.join(engine=True) for _ in range(3)]
    ender, other = bench.join(), bench.join()
    ender.say(frames.request(frames.DRAIN, 9))
    ender.say(frames.request(frames.DRAIN, 10))
    for engine in engines:
        assert engine.receive()[0][0] == frames.DRAINING
        assert bench.crew.retired == [], "the worker may be wanted"
        engine.say(frames.draining("unfinished"), a_job(1), frames.draining("asked"))
    other.checkout(1)
    assert [refused.why for refused in other.refusals()] == ["closed"]
    for engine in engines:
        (grant,) = engine.grants()
        engine.say(frames.checkin(grant.lease), frames.draining())
    assert len(bench.crew.retired) == 1
    bench.exits(*bench.crew.retired)
    assert bench.manager.finished


@pytest.mark.parametrize("how", ["finished", "gone", "silent"])
def test_a_drain_is_not_over_before_an_engine_has_no_jobs_left(
    make: Callable[..., Bench], how: str
) -> None:
    """It may be about to ask for the next worker."""
    bench = make(pool_size=1).start()
    bench.ready()
    engine, ender = bench.join(engine=True), bench.join()
    ender.say(frames.request(frames.DRAIN, 9))
    engine.say(frames.draining("unfinished"), frames.draining("asked"))
    bench.exits(*bench.crew.retired)
    assert not bench.manager.finished
    engine.say(a_job(1))
    (worker,) = bench.crew.hands
    bench.ready(worker)
    (grant,) = engine.grants()
    engine.say(frames.checkin(grant.lease))
    bench.exits(worker)
    assert not bench.manager.finished
    if how == "finished":
        engine.say(frames.draining())
    elif how == "gone":
        engine.sock.close()
        bench.settle()
    else:  # its process is stopped, or its event loop is not run any more
        bench.pass_time(muster.SECONDS)
    assert bench.manager.finished


@pytest.mark.parametrize("how", ["says nothing", "goes"])
def test_a_drain_waits_but_a_while_for_an_engine_that_does_not_answer(
    make: Callable[..., Bench], how: str
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    engine, ender = bench.join(engine=True), bench.join()
    ender.say(frames.request(frames.DRAIN, 9))
    bench.pass_time(muster.SECONDS * 0.9)
    assert bench.crew.retired == []
    if how == "goes":
        engine.sock.close()
        bench.settle()
    else:
        bench.pass_time(muster.SECONDS * 0.2)
    assert len(bench.crew.retired) == 1
    bench.exits(*bench.crew.retired)
    assert bench.manager.finished


def test_what_an_engine_said_before_it_was_asked_is_no_answer(make: Callable[..., Bench]) -> None:
    """It had a job when it joined, has finished that, and has another one since."""
    bench = make(pool_size=1).start()
    bench.ready()
    engine, ender = bench.join(engine=True), bench.join()
    engine.say(frames.draining("unfinished"))
    ender.say(frames.request(frames.DRAIN, 9))
    engine.say(frames.draining("finished"))
    assert bench.crew.retired == []
    engine.say(frames.draining("unfinished"), a_job(1), frames.draining("asked"))
    (grant,) = engine.grants()
    engine.say(frames.checkin(grant.lease), frames.draining("finished"))
    bench.exits(*bench.crew.retired)
    assert bench.manager.finished


def test_a_drain_does_not_wait_for_an_engine_that_is_marked_as_having_no_jobs(
    make: Callable[..., Bench],
) -> None:
    """It may be stopped, or its event loop not run, for as long as it likes."""
    bench = make(pool_size=1).start()
    bench.ready()
    engines = [bench.join(engine=True) for _ in range(3)]
    ender = bench.join()
    for engine in engines:
        assert engine.mark is not None
        assert engine.mark[0] == 1, "it may have been made for a job"
        engine.mark[0] = 0
    engines[0].mark[0] = 1
    ender.say(frames.request(frames.DRAIN, 9))
    assert bench.crew.retired == []
    engines[0].say(frames.draining("asked"))
    assert len(bench.crew.retired) == 1
    bench.exits(*bench.crew.retired)
    assert bench.manager.finished


def test_the_mark_of_an_engine_is_its_own(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    engines = [bench.join(engine=True) for _ in range(600)]  # more than fit on a page
    assert bench.join().mark is None
    for number, engine in enumerate(engines):
        assert engine.mark is not None
        engine.mark[0] = number % 3 == 0
    marked = [engine.number for engine in engines[::3]]
    assert bench.door.busy() == set(marked)
    engines[0].sock.close()
    bench.settle()
    assert bench.door.busy() == set(marked[1:])
    again = bench.join(engine=True)  # in the other one's place
    assert bench.door.busy() == {*marked[1:], again.number}


def test_an_engine_that_answers_a_drain_late_is_served_if_the_pool_has_not_ended(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    engine, ender = bench.join(engine=True), bench.join()
    ender.say(frames.request(frames.DRAIN, 9))
    bench.pass_time(muster.SECONDS * 1.1)
    (first,) = bench.crew.retired
    engine.say(frames.draining("unfinished"), a_job(1), frames.draining("asked"))
    bench.exits(first)
    (second,) = bench.crew.hands
    bench.ready(second)
    (grant,) = engine.grants()
    engine.say(frames.checkin(grant.lease), frames.draining())
    bench.exits(second)
    assert bench.manager.finished


@pytest.mark.parametrize("how", ["asked by a client", "by itself"])
def test_a_pool_that_is_terminated_waits_for_no_engine(
    make: Callable[..., Bench], how: str
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    engine, ender = bench.join(engine=True), bench.join()
    ender.say(frames.request(frames.DRAIN, 9))
    if how == "by itself":  # its owner has died, or has sent a signal
        bench.manager.apply(Terminate())
    else:
        ender.say(frames.request(frames.TERMINATE, 10))
    assert len(bench.crew.killed) == 1
    engine.say(frames.draining("unfinished"), a_job(1), frames.draining("asked"))
    ender.say(frames.request(frames.DRAIN, 11))
    assert [refused.why for refused in engine.refusals()] == ["closed"]
    bench.exits_killed()
    assert bench.manager.finished
    assert len(bench.crew.spawned) == 1


@pytest.mark.parametrize("when", ["before", "in time", "late"])
def test_an_engine_that_is_just_joining_is_asked_too(make: Callable[..., Bench], when: str) -> None:
    """It may have been made for the job that was submitted before the shutdown."""
    bench = make(pool_size=1).start()
    bench.ready()
    holder, ender = bench.join(), bench.join()
    grant = holder.lease()
    if when == "before":
        bench.connect()  # one that says nothing, and is not waited for longer than others
        bench.guests[-1].receive()
    ender.say(frames.request(frames.DRAIN, 9))
    bench.pass_time(muster.SECONDS * {"before": 0.5, "in time": 0.0, "late": 1.1}[when])
    engine = bench.join(engine=True)
    engine.say(frames.draining("unfinished"), a_job(1), frames.draining("asked"))
    holder.say(frames.checkin(grant.lease))
    bench.pass_time(muster.SECONDS)
    heard = engine.receive()
    assert [body[0] for body in heard] == [frames.DRAINING, frames.GRANT]
    engine.say(frames.checkin(frames.read_grant(heard[1]).lease), frames.draining())
    bench.exits(*bench.crew.retired)
    assert bench.manager.finished


def test_a_terminate_kills_every_worker_and_refuses_every_waiter(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=2).start()
    leased, _ = sorted(bench.crew.hands)
    bench.ready(leased)
    guest = bench.join()
    guest.checkout(1, 2, 3)
    bench.manager.apply(Terminate())
    assert [body[0] for body in guest.receive()] == [frames.GRANT, frames.REFUSED, frames.REFUSED]
    assert sorted(bench.crew.killed) == sorted(bench.crew.hands)
    bench.exits_killed()
    assert bench.manager.finished


# --- bad clients ------------------------------------------------------------------------------


def test_a_client_that_does_not_read_is_dropped_and_the_others_are_unharmed(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    deaf, other = bench.join(), bench.join()
    grant = deaf.lease()
    asked = 0
    while not bench.door.counters["clients_not_reading"]:
        try:
            deaf.sock.send(frames.request(frames.STATUS, 1) * 100)
        except BrokenPipeError:
            break
        bench.settle()
        asked += 100
        assert asked < MAX_UNREAD  # far more answers than it may leave unread
    bench.settle()
    assert bench.door.counters["clients_not_reading"] == 1
    assert bench.crew.killed == {grant.worker: "its client has gone"}
    status = other.ask(frames.STATUS)
    assert status["counters"]["clients_not_reading"] == 1


def test_answers_wait_for_a_client_that_reads_late(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    slow = bench.join()
    count = 2000
    for number in range(1, count + 1):
        slow.say(frames.request(frames.STATUS, number))
    (client,) = bench.door.clients.values()
    assert client.unsent_bytes > 0
    numbers = []
    while len(numbers) < count:
        numbers += [frames.read_request(body) for body in slow.receive()]
        bench.settle()
    assert numbers == list(range(1, count + 1))
    assert client.unsent_bytes == 0 and not client.unsent


def test_a_silent_connection_is_closed_when_its_time_is_up(make: Callable[..., Bench]) -> None:
    bench = make().start()
    silent = bench.connect()
    bench.pass_time(HANDSHAKE_SECONDS - 0.1)
    proven = bench.join()
    assert not silent.hung_up()
    bench.pass_time(0.2)
    assert silent.hung_up()
    assert bench.door.counters["connections_without_proof"] == 1
    bench.pass_time(2 * HANDSHAKE_SECONDS)
    assert not proven.hung_up()


def test_the_oldest_of_too_many_silent_connections_goes(make: Callable[..., Bench]) -> None:
    bench = make().start()
    silent = [bench.connect() for _ in range(MAX_SILENT + 3)]
    bench.settle()
    assert not any(guest.hung_up() for guest in silent), "they have had no time to answer"
    bench.pass_time(MOMENT_SECONDS + 0.1)
    assert [guest.hung_up() for guest in silent] == [True] * 3 + [False] * MAX_SILENT
    assert bench.join().ask(frames.STATUS)["counters"]["connections_without_proof"] == 4


def test_a_client_with_a_wrong_key_is_denied_and_hung_up_on(make: Callable[..., Bench]) -> None:
    bench = make().start()
    guest = bench.connect()
    bench.settle()
    answer = Handshake(b"x" * 32, b"m" * 16).hear(guest.only())
    assert answer is not None
    guest.say(answer)
    assert guest.only()[0] == frames.DENIED
    assert guest.hung_up()
    assert bench.door.counters["connections_without_proof"] == 1


@pytest.mark.parametrize(
    "data",
    [
        frames.request(0, 1),
        frames.request(63, 1),
        frames.request(frames.GRANT, 1),
        frames.request(255, 1),
        frames.frame(b"\x02"),
        frames.frame(bytes((frames.RESIZE,)) + bytes(12)),
        frames.frame(bytes(70_000)),
        b"\x00\x00\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["0", "63", "GRANT", "255", "short", "no worker", "long", "empty", "HTTP"],
)
def test_nonsense_closes_that_connection_only(make: Callable[..., Bench], data: bytes) -> None:
    bench = make(pool_size=2).start()
    bench.ready()
    vandal, other = bench.join(), bench.join()
    mine, theirs = vandal.lease(), other.lease()
    vandal.say(data)
    assert vandal.hung_up()
    assert bench.door.counters["protocol_errors"] == 1
    assert list(bench.crew.killed) == [mine.worker]
    assert theirs.worker not in bench.crew.killed
    assert other.ask(frames.STATUS)["leased"] == 1


@pytest.mark.parametrize(
    "data",
    [frames.checkout(1, True, None, ""), frames.request(frames.TERMINATE, 1), bytes(2000)],
    ids=["CHECKOUT", "TERMINATE", "zeros"],
)
def test_nothing_is_heard_of_a_connection_before_its_proof(
    make: Callable[..., Bench], data: bytes
) -> None:
    bench = make().start()
    guest = bench.connect()
    bench.settle()
    guest.say(data)
    assert guest.hung_up()
    assert bench.door.counters["protocol_errors"] == 1
    assert bench.crew.killed == {} and not bench.manager.finished


def test_what_follows_the_proof_at_once_is_heard_whole(make: Callable[..., Bench]) -> None:
    bench = make(pool_size=1).start()
    bench.ready()
    guest = bench.connect()
    bench.settle()
    answer = Handshake(KEY, b"m" * 16).hear(guest.only())
    assert answer is not None
    asked = frames.checkout(1, True, None, "here") + frames.request(frames.STATUS, 2)
    guest.say(answer + asked[:-3])
    guest.say(asked[-3:])
    assert [body[0] for body in guest.receive()] == [frames.WELCOME, frames.GRANT, frames.REPLY]


# --- size -------------------------------------------------------------------------------------


def test_ten_thousand_waiters_are_each_served_once_and_in_order(
    make: Callable[..., Bench],
) -> None:
    bench = make(pool_size=4).start()
    guests = [bench.join() for _ in range(10)]
    for number in range(1, 1001):
        for guest in guests:
            guest.sock.send(frames.checkout(number, True, None, "here:1"))
        bench.settle()
    assert guests[0].ask(frames.STATUS)["waiting"] == 10_000
    bench.ready()
    served: list[list[int]] = [[] for _ in guests]
    leases: list[int] = []
    while sum(map(len, served)) < 10_000:
        before = len(leases)
        for guest, numbers in zip(guests, served, strict=True):
            for grant in guest.grants():
                numbers.append(grant.request)
                leases.append(grant.lease)
                guest.sock.send(frames.checkin(grant.lease))
        bench.settle()
        assert len(leases) > before, "nobody was served"
    assert served == [list(range(1, 1001))] * 10
    assert max(Counter(leases).values()) == 1
    assert bench.crew.killed == {}
    assert len(bench.crew.spawned) == 4
