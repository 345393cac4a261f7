"""What a page tells the next manager that the last one did not live to write down."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from whitepool_mp.broker import Checkin, Destroy, Recall, WorkerReady, WorkerState
from whitepool_mp.broker.state import Worker
from whitepool_mp.manager.takeover import missed
from whitepool_mp.wire import pages
from whitepool_mp.wire.pages import Page

NUMBER, CLIENT, LEASE = 3, 2, 7


@pytest.fixture
def page() -> Iterator[Page]:
    fd = os.memfd_create("page")
    os.ftruncate(fd, pages.SIZE)
    made = Page(fd, pages.NUMBERS)
    os.close(fd)
    yield made
    made.close()


def worker(state: WorkerState) -> Worker:
    made = Worker(NUMBER, 0, 0.0, 0)
    made.state = state
    if state is WorkerState.LEASED:
        made.lease, made.client, made.ticket = LEASE, CLIENT, 1
    return made


def test_of_an_idle_worker_there_is_nothing_to_tell(page: Page) -> None:
    page.words[pages.READY] = 1
    page.words[pages.RETURNED] = page.words[pages.RECALLED] = LEASE
    assert missed(worker(WorkerState.IDLE), page) is None


def test_a_worker_that_said_it_was_ready_is(page: Page) -> None:
    booting = worker(WorkerState.BOOTING)
    assert missed(booting, page) is None
    page.words[pages.READY] = 1
    assert missed(booting, page) == WorkerReady(NUMBER)


@pytest.mark.parametrize("worn", [False, True])
def test_a_lease_that_was_given_back_is_over(page: Page, worn: bool) -> None:
    leased = worker(WorkerState.LEASED)
    page.words[pages.RETURNED] = LEASE - 1
    assert missed(leased, page) is None
    page.words[pages.RETURNED], page.words[pages.WORN] = LEASE, worn
    assert missed(leased, page) == Checkin(CLIENT, LEASE, worn)


def test_a_worker_that_was_given_up_is_killed_whatever_else_was_said(page: Page) -> None:
    leased = worker(WorkerState.LEASED)
    page.words[pages.DESTROYED] = page.words[pages.RETURNED] = LEASE
    event = missed(leased, page)
    assert isinstance(event, Destroy) and event[:2] == (CLIENT, LEASE)


def test_a_kept_lease_that_was_taken_back_is_asked_for_at_once(page: Page) -> None:
    leased = worker(WorkerState.LEASED)
    page.words[pages.RECALLED] = LEASE
    assert missed(leased, page) is None  # that is said of kept leases only
    leased.kept = True
    assert missed(leased, page) == Recall(NUMBER, LEASE, patient=False)
    page.words[pages.RECALLED] = LEASE - 1
    assert missed(leased, page) is None
