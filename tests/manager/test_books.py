"""What is written down of a pool is, after every step, what its broker knows."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whitepool_mp.broker import (
    Broker,
    Cancel,
    Checkin,
    Checkout,
    ClientGone,
    Destroy,
    Event,
    Resumed,
    Start,
    Tick,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerState,
)
from whitepool_mp.config import Policy
from whitepool_mp.manager.books import Books
from whitepool_mp.manager.clients import Client
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.ledger import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    made = fresh()
    yield made
    made.close()


def fresh() -> Ledger:
    fd = ledgers.create()
    try:
        return Ledger(fd)
    finally:
        os.close(fd)


def known(broker: Broker) -> list[Resumed]:
    """What the broker knows, as far as it is written down."""
    found = []
    for worker in broker.workers():
        leased = worker.state is WorkerState.LEASED
        found.append(
            Resumed(
                worker.id,
                worker.slot,
                worker.state,
                worker.born,
                worker.since,
                worker.leases_served,
                worker.lease if leased else None,
                worker.client if leased else None,
                worker.ticket if leased else None,
                worker.kept,
                worker.spare_own,
            )
        )
    return found


class Manager:
    """Has a broker and writes down what it decides, as the real one does."""

    def __init__(self, ledger: Ledger) -> None:
        self.broker = Broker(Policy(3, 2, overflow_ttl=1.0), random.Random(1))
        self.books = Books(ledger)
        self.books.sizes(3, 2)
        self.now = 1.0
        self.step(Start())

    def step(self, event: Event) -> None:
        self.broker.step(event, self.now)
        for worker in self.broker.changed():
            self.books.note(worker, self.broker.worker(worker.id) is not None)


MOVES = st.tuples(
    st.sampled_from(
        ["ready", "failed", "exited", "checkout", "checkin", "destroy", "cancel", "gone", "tick"]
    ),
    st.integers(0, 7),
    st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=50))
def test_another_manager_reads_what_the_last_one_knew(moves: list[tuple[str, int, bool]]) -> None:
    ledger = fresh()
    try:
        manager = Manager(ledger)
        for number, (what, pick, keep) in enumerate(moves):
            workers = list(manager.broker.workers())
            leased = [worker for worker in workers if worker.state is WorkerState.LEASED]
            booting = [worker for worker in workers if worker.state is WorkerState.BOOTING]
            client = pick % 3 + 1
            if what == "checkout":
                manager.step(Checkout(client, number + 1, True, None, keep, keep))
            elif what == "tick":
                manager.now += 0.5
                manager.step(Tick())
            elif what == "gone":
                manager.step(ClientGone(client))
            elif what in ("ready", "failed") and booting:
                worker = booting[pick % len(booting)]
                manager.step(
                    WorkerReady(worker.id) if what == "ready" else WorkerFailed(worker.id, "no")
                )
            elif what == "exited" and workers:
                manager.step(WorkerExited(workers[pick % len(workers)].id, "gone"))
            elif what in ("checkin", "destroy", "cancel") and leased:
                worker = leased[pick % len(leased)]
                assert worker.client is not None
                assert worker.lease is not None
                assert worker.ticket is not None
                manager.step(
                    Checkin(worker.client, worker.lease)
                    if what == "checkin"
                    else Destroy(worker.client, worker.lease, "dirty")
                    if what == "destroy"
                    else Cancel(worker.client, worker.ticket)
                )
            past = Books(ledger).past().resume
            assert sorted(past.workers) == sorted(known(manager.broker))
            granted = manager.broker.status().counters["granted"]
            assert (past.last_lease, past.pool_size, past.max_overflow) == (granted, 3, 2)
            assert past.last_worker == manager.broker.status().counters["spawned"]
    finally:
        ledger.close()


def test_a_worker_whose_record_was_being_written_is_to_be_killed(ledger: Ledger) -> None:
    manager = Manager(ledger)
    manager.step(WorkerReady(1))
    manager.step(Checkout(1, 1, True, None))
    at = next(
        Ledger.worker(index)
        for index in range(8)
        if ledger.words[Ledger.worker(index) + ledgers.ID] == 1
    )
    ledger.words[at + ledgers.STATE] = 0
    (found,) = (worker for worker in Books(ledger).past().resume.workers if worker.id == 1)
    assert found.state is WorkerState.KILLED
    assert found.lease is None


def test_a_manager_after_one_that_never_served_begins_with_nothing(ledger: Ledger) -> None:
    Manager(ledger)
    Books(ledger).clear()
    past = Books(ledger).past()
    assert past.resume.workers == ()
    assert (past.resume.last_worker, past.resume.last_lease) == (0, 0)


def test_records_are_used_again(ledger: Ledger) -> None:
    manager = Manager(ledger)
    for worker in range(1, 400):
        manager.step(WorkerReady(worker))
        manager.step(Checkout(1, worker, True, None))
        manager.step(Destroy(1, worker, "dirty"))
        manager.step(WorkerExited(worker, "killed"))
    assert not any(
        ledger.words[Ledger.worker(index) + ledgers.BORN] for index in range(10, ledgers.WORKERS)
    )
    assert len(Books(ledger).past().resume.workers) == 3


class Watched:
    """A ledger's words; looks after each write what another manager would read then."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.words = ledger, ledger.words
        self.read: list[Any] = []

    def __getitem__(self, at: int) -> int:
        return self.words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self.words[at] = value
        self.read.append(Books(self.ledger).past().clients)


def test_a_client_that_comes_back_is_known_all_the_while(ledger: Ledger) -> None:
    """A manager that is killed as it lets one in costs it neither its leases nor its place."""
    client: Any = Client(3, None, 0.0)  # type: ignore[arg-type]
    client.link, client.member, client.pid, client.engine = 77, bytes(range(16)), os.getpid(), True
    client.sites[1] = "here"
    books = Books(ledger)
    place = books.joined(client)
    books.waiting(client)
    before = Books(ledger).past().clients
    assert before[0].waiting

    again = Books(ledger)
    again.past()
    watched: Any = Watched(ledger)
    again._words = watched
    client.sites.clear()  # it has not asked again yet
    assert again.joined(client) == place
    assert all(read == before for read in watched.read)
    assert Books(ledger).past().clients == before
