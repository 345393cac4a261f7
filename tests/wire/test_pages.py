"""The worker's page: what it tells, and calls taken back that never begin, also in a hammering."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import random
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from whitepool_mp.wire import descriptors, frames, messages, pages
from whitepool_mp.wire.pages import (
    BEGUN,
    RECALLED,
    UNSENT,
    Page,
    token,
)
from whitepool_mp.worker import answers
from whitepool_mp.worker.answers import Channel
from whitepool_mp.worker.bulk import Bulk
from whitepool_mp.worker.serve import Server

ROOT = Path(__file__).parents[2]
LEASE = 7
ALONE = len(os.sched_getaffinity(0)) == 1
"""Whether two processes never run at the same moment."""


class Sheet:
    """A page's memory, and the views of it that were made."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("page", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, pages.SIZE)
        self._views: list[Page] = []

    def view(self, size: int = pages.SIZE) -> Page:
        page = Page(self.fd, size)
        self._views.append(page)
        return page

    def close(self) -> None:
        for page in self._views:
            page.close()
        os.close(self.fd)


class Worker:
    """The worker's side: the server's own steps, taken one at a time."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.manager, control = socket.socketpair()
        self.client, sock = socket.socketpair()
        self._ends = self.manager, control, self.client, sock
        self.server = Server(control, page, None)
        self.channel = Channel(sock, pages.slot_words(1))
        self.channel.reader.take(1)  # more calls have come: answers are kept

    def begin(self, number: int, lease: int = LEASE) -> bool:
        """Whether a call may begin; a refusal is answered."""
        self._adopt(lease)
        why = self.server._claim(self.channel, lease, number, 1)
        if why:
            self.server._refuse(self.channel, number, why)
        return not why

    def _adopt(self, lease: int) -> None:
        self.server._fence = max(self.server._fence, lease)

    def end(self, number: int = 0) -> None:
        self.server._answer(self.channel, answer(number), answers.SHORT)

    def put(self, data: bytes) -> None:
        """Keep an answer."""
        self.server._fence = max(self.server._fence, LEASE)
        unsent = self.page.words[UNSENT]
        self.server._answer(self.channel, data, 0)
        assert self.page.words[UNSENT] == unsent + len(data)

    def send(self) -> None:
        """Send what is kept."""
        self.server._send_unsent(self.channel)

    def rest(self) -> None:
        """Wait for calls, until the manager has something else to say."""
        self.manager.send(frames.plain(frames.RETIRE))
        assert self.server.run()

    def close(self) -> None:
        self.server._poll.close()
        for sock in self._ends:
            sock.close()


@pytest.fixture
def sheet() -> Iterator[Sheet]:
    made = Sheet()
    yield made
    made.close()


@pytest.fixture
def worker(sheet: Sheet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(answers, "_HELD_BACK", 10**15)  # nanoseconds: answers are sent by `send`
    page = sheet.view()
    page.order_me()
    assert page.ordered
    made = Worker(page)
    yield made
    made.close()
    del made.server


@pytest.fixture
def holder(sheet: Sheet, worker: Worker) -> Page:
    return sheet.view()


def answer(number: int, size: int = 8) -> bytes:
    (piece,) = messages.pack(messages.RESULT, 0, number, 0, bytes([number % 251]) * size)
    return bytes(piece)


def numbers(data: bytes) -> list[int]:
    return [message.number for message in messages.read_all(data)]


# --- the names of calls -----------------------------------------------------------------------


def test_tokens_are_in_the_order_of_leases_and_then_of_numbers() -> None:
    names = [(1, 0), (1, 1), (1, 2), (1, 0xFF_FFFF), (2, 0), (2, 1), (3, 0), (1 << 39, 5)]
    tokens = [token(*name) for name in names]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) == len(tokens)


def test_a_token_is_one_word_however_large_its_parts_are(sheet: Sheet) -> None:
    page = sheet.view()
    for lease, number in ((1 << 60, 1), (1 << 70, 0xFFFF_FFFF), ((1 << 40) - 1, 0xFF_FFFF)):
        page.words[BEGUN] = token(lease, number)
        assert page.words[BEGUN] == token(lease, number)


def test_what_was_begun_last_is_behind_the_call_whose_number_wraps(sheet: Sheet) -> None:
    page = sheet.view()
    end = 1 << pages.NUMBER_BITS
    for wrap in (end, 1 << 32):
        page.words[BEGUN] = token(LEASE, wrap - 1)
        assert page.began(LEASE, wrap - 2) and page.began(LEASE, wrap - 1)
        assert not page.began(LEASE, wrap) and not page.began(LEASE, wrap + 1)
        page.words[BEGUN] = token(LEASE, wrap)
        assert page.began(LEASE, wrap - 1) and page.began(LEASE, wrap)
        assert not page.began(LEASE, wrap + 1)
        assert not page.began(LEASE - 1, wrap) and not page.began(LEASE + 1, wrap)


# --- what it tells ----------------------------------------------------------------------------


def test_a_new_page_tells_of_nothing(sheet: Sheet) -> None:
    page = sheet.view()
    assert not page.began(1, 1)
    assert not page.busy()
    assert not page.ordered
    assert page.calls == 0
    assert page.unsent(LEASE) == b""


def test_every_view_tells_of_the_call_begun_last(worker: Worker, holder: Page) -> None:
    assert worker.begin(1)
    assert holder.began(LEASE, 1)
    assert holder.busy()
    worker.end()
    assert holder.began(LEASE, 1) and not holder.busy()
    assert worker.begin(2)
    assert holder.began(LEASE, 2) and not holder.began(LEASE, 3)
    assert not holder.began(LEASE + 1, 2) and not holder.began(LEASE - 1, 2)
    assert holder.calls == 2


def test_a_view_of_the_numbers_tells_them_too(sheet: Sheet, worker: Worker) -> None:
    manager = sheet.view(pages.NUMBERS)
    worker.begin(1)
    assert manager.busy() and manager.calls == 1
    assert manager.recall(LEASE)
    worker.end()
    assert not worker.begin(2)
    assert len(manager.outbox) == 0


def test_it_outlives_the_process_that_wrote_it(sheet: Sheet) -> None:
    code = """
        import os, signal
        page = pages.Page(int(sys.argv[1]))
        page.words[pages.BEGUN] = pages.token(7, 41)
        page.words[pages.CALLS] = 41
        page.outbox[:5] = b"hello"
        page.words[pages.UNSENT] = 5
        page.words[pages.OWNER] = 7
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with process(code, sheet.fd) as other:
        other.wait(20)
    page = sheet.view()
    assert page.began(7, 41) and page.busy()
    assert bytes(page.outbox[: page.words[UNSENT]]) == b"hello"
    assert page.unsent(LEASE) == b"hello"


def test_a_closed_page_is_unmapped_and_the_others_are_not(sheet: Sheet, worker: Worker) -> None:
    page = Page(sheet.fd)
    inode = os.fstat(sheet.fd).st_ino
    before = mappings(inode)
    page.close()
    assert mappings(inode) == before - 1
    with pytest.raises(ValueError, match="released"):
        page.began(1, 1)
    assert worker.begin(1)
    page.close()  # twice is harmless


def mappings(inode: int) -> int:
    with open("/proc/self/maps") as file:
        return sum(line.split()[4] == str(inode) for line in file)


def test_without_memory_there_is_no_page() -> None:
    fd = os.memfd_create("small", os.MFD_CLOEXEC)
    try:
        with pytest.raises((OSError, ValueError)):
            Page(fd)
    finally:
        os.close(fd)


# --- taking back ------------------------------------------------------------------------------


def test_what_is_behind_the_running_call_is_taken_back(worker: Worker, holder: Page) -> None:
    assert worker.begin(1)
    assert holder.take_back(LEASE, 1, 5) == 1
    worker.end()
    assert [worker.begin(number) for number in range(2, 6)] == [False] * 4
    assert worker.begin(6)
    assert holder.calls == 2


def test_calls_that_have_begun_are_not_taken_back(worker: Worker, holder: Page) -> None:
    for number in range(1, 4):
        assert worker.begin(number)
        worker.end()
    assert holder.take_back(LEASE, 1, 5) == 3
    assert not worker.begin(4) and not worker.begin(5)
    assert holder.began(LEASE, 3) and not holder.began(LEASE, 4)


def test_nothing_is_taken_back_when_all_has_begun(worker: Worker, holder: Page) -> None:
    for number in range(1, 6):
        assert worker.begin(number)
        worker.end()
    assert holder.take_back(LEASE, 1, 5) == 5
    assert holder.take_back(LEASE, 1, 3) == 3
    assert worker.begin(6)


def test_the_first_in_flight_may_be_taken_for_begun_and_begins_later(
    worker: Worker, holder: Page
) -> None:
    assert holder.take_back(LEASE, 1, 3) == 1
    assert worker.begin(1)
    worker.end()
    assert not worker.begin(2)


def test_calls_of_an_older_lease_do_not_count_as_begun(worker: Worker, holder: Page) -> None:
    assert worker.begin(500, LEASE - 1)
    worker.end()
    assert holder.take_back(LEASE, 1, 9) == 1
    assert worker.begin(1) and not worker.begin(2)


def test_under_a_newer_lease_everything_counts_as_begun(worker: Worker, holder: Page) -> None:
    assert worker.begin(1, LEASE + 1)
    assert holder.take_back(LEASE, 1, 9) == 9


def test_more_may_be_taken_back_before_the_worker_has_passed_the_first(
    worker: Worker, holder: Page
) -> None:
    assert worker.begin(1)
    assert holder.take_back(LEASE, 1, 5) == 1
    worker.end()
    assert not worker.begin(2)
    # 6 to 9 were sent meanwhile.
    assert holder.take_back(LEASE, 1, 9) in (1, 2)
    assert [worker.begin(number) for number in range(3, 10)] == [False] * 7
    assert worker.begin(10)


def test_the_next_lease_is_not_touched_by_what_was_taken_back(worker: Worker, holder: Page) -> None:
    assert holder.take_back(LEASE, 1, 9) == 1
    assert not worker.begin(3)
    assert all(worker.begin(number, LEASE + 1) for number in range(1, 10))


def test_a_call_that_is_just_beginning_is_not_both_taken_back_and_run(
    worker: Worker, holder: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        ran: list[bool] = []
        calls = 0

        def between(step: int = step, ran: list[bool] = ran) -> bool:
            """The worker begins at the moment of this barrier."""
            nonlocal calls
            calls += 1
            if calls == step:
                ran.append(worker.begin(10 * step + 2))
            return True

        monkeypatch.setattr(pages.barrier, "issue", between)
        begun = holder.take_back(LEASE, 10 * step + 1, 10 * step + 5)
        assert ran == [step == 1]
        assert begun is not None and begun >= 10 * step + 1 + ran[0]
        assert calls == 2


def test_nothing_is_taken_back_where_the_kernel_cannot_order(
    sheet: Sheet, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = sheet.view()
    assert not page.ordered
    assert page.take_back(LEASE, 1, 5) is None
    page.order_me()
    monkeypatch.setattr(pages.barrier, "issue", lambda: False)
    assert page.take_back(LEASE, 1, 5) is None
    with contextlib.closing(Worker(page)) as worker:
        assert all(worker.begin(number) for number in range(1, 6))


# --- recall -----------------------------------------------------------------------------------


def test_a_recalled_lease_begins_nothing(worker: Worker, holder: Page) -> None:
    assert worker.begin(1)
    worker.end()
    assert holder.recall(LEASE) is False
    assert not worker.begin(2)
    assert not worker.begin(1, LEASE - 1)
    assert worker.begin(1, LEASE + 1)


def test_a_recall_tells_that_a_call_is_running(worker: Worker, holder: Page) -> None:
    assert worker.begin(1)
    assert holder.recall(LEASE) is True
    worker.end()
    assert not worker.begin(2)
    assert not holder.busy()  # a refused call is none
    assert holder.calls == 1


def test_a_recall_says_running_where_the_kernel_cannot_order(
    sheet: Sheet, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = sheet.view()
    assert not page.busy()
    assert page.recall(LEASE) is True
    page.order_me()
    assert page.recall(LEASE) is None
    monkeypatch.setattr(pages.barrier, "issue", lambda: False)
    assert page.recall(LEASE) is True


def test_a_lease_under_which_the_worker_waits_is_free(worker: Worker, holder: Page) -> None:
    assert holder.recall(LEASE - 1) is None  # it has just been made
    assert worker.begin(1)
    worker.end()
    worker.rest()
    assert holder.recall(LEASE) is None
    assert not worker.begin(2)
    assert holder.recall(LEASE) is None  # what was refused makes no difference
    assert worker.begin(1, LEASE + 1)
    worker.end()
    assert holder.recall(LEASE + 1) is False  # it has not come to waiting yet
    worker.rest()
    assert holder.recall(LEASE + 1) is None


def test_a_lease_whose_answers_are_unsent_is_not_free(worker: Worker, holder: Page) -> None:
    worker.rest()
    assert worker.begin(1)
    worker.put(answer(1))
    assert not holder.busy()
    assert holder.recall(LEASE) is False
    worker.send()
    assert holder.recall(LEASE) is False
    worker.rest()
    assert holder.recall(LEASE) is None


def test_a_lease_whose_answer_is_half_sent_is_not_free(worker: Worker, holder: Page) -> None:
    size = 1 << 22
    worker.rest()
    assert worker.begin(1)
    sender = threading.Thread(
        target=worker.server._answer, args=(worker.channel, bytes(size), answers.SHORT)
    )
    sender.start()
    got = len(worker.client.recv(1))
    assert holder.recall(LEASE) is not None
    while got < size:
        got += len(worker.client.recv(size))
    sender.join(20)
    assert not holder.busy()
    assert holder.recall(LEASE) is False
    worker.rest()
    assert holder.recall(LEASE) is None


@pytest.mark.parametrize("count", [1, 3])
def test_a_lease_under_which_a_call_is_just_beginning_is_not_free(
    worker: Worker, holder: Page, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Whichever step of beginning the worker has come to when the lease is recalled."""
    worker.rest()
    for stop in (1, 2):
        lease, written, told = LEASE + stop, 0, []

        def then(stop: int = stop, lease: int = lease, told: list[Any] = told) -> None:
            nonlocal written
            written += 1
            if written == stop:
                told.append(holder.recall(lease))

        monkeypatch.setattr(worker.server, "_words", Watched(worker.page.words, then))
        assert worker.server._claim(worker.channel, lease, count, count) == messages.FENCED
        assert told == [True]
        monkeypatch.undo()
        worker.rest()
        assert holder.recall(lease) is None
    # At the moment of the barrier: what was written first is seen by the one that comes then.
    began: list[bool] = []

    def between() -> bool:
        began.append(worker.begin(1, LEASE + 3))
        return True

    monkeypatch.setattr(pages.barrier, "issue", between)
    assert holder.recall(LEASE + 3) is None
    assert began == [False]


# --- before the first call --------------------------------------------------------------------


def test_a_lease_without_a_call_is_given_back_after_its_first_one(
    worker: Worker, holder: Page
) -> None:
    assert not holder.used(LEASE)
    assert holder.once(LEASE)
    assert holder.due(LEASE)
    assert not holder.due(LEASE + 1)
    assert worker.begin(1)
    assert holder.used(LEASE)
    assert holder.used(LEASE - 1)
    assert not holder.used(LEASE + 1)


def test_a_lease_with_a_call_is_not_given_back_by_its_holder(worker: Worker, holder: Page) -> None:
    assert worker.begin(1)
    worker.end()
    assert not holder.once(LEASE)
    assert not holder.due(LEASE)


def test_a_lease_that_was_taken_back_is_not_given_back_by_its_holder(holder: Page) -> None:
    holder.recall(LEASE)
    assert not holder.once(LEASE)
    assert not holder.due(LEASE)


def test_a_first_call_that_begins_just_then_is_seen(
    worker: Worker, holder: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder may have looked by then, and keep the lease: so it is taken back."""

    def between() -> bool:
        assert worker.begin(1)
        return True

    monkeypatch.setattr(pages.barrier, "issue", between)
    assert not holder.once(LEASE)


def test_no_lease_is_given_back_by_its_holder_where_the_kernel_cannot_order(
    sheet: Sheet, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = sheet.view()
    assert not page.once(LEASE)
    page.order_me()
    monkeypatch.setattr(pages.barrier, "issue", lambda: False)
    assert not page.once(LEASE)


def test_who_hears_late_of_a_recall_does_not_undo_another(worker: Worker, holder: Page) -> None:
    """Of a lease that was given back meanwhile; the next one was taken back by the page alone."""
    assert holder.recall(LEASE + 1) is None
    worker.manager.send(frames.recall(LEASE, False))
    worker.rest()
    assert worker.page.words[RECALLED] == LEASE + 1
    assert not worker.begin(1, LEASE + 1)


# --- answers that lie there -------------------------------------------------------------------


def test_answers_lie_there_until_they_are_sent(worker: Worker, holder: Page) -> None:
    worker.put(answer(1))
    worker.put(answer(2, 0))
    worker.put(answer(3, 1000))
    assert numbers(holder.unsent(LEASE)) == [1, 2, 3]
    assert numbers(holder.unsent(LEASE)) == [1, 2, 3]
    worker.send()
    assert holder.unsent(LEASE) == b""
    worker.put(answer(4))
    assert numbers(holder.unsent(LEASE)) == [4]


def test_an_outbox_that_is_full_can_be_read(worker: Worker, holder: Page) -> None:
    size = pages.OUTBOX - len(answer(1, 0))
    worker.put(answer(1, size))
    (message,) = messages.read_all(holder.unsent(LEASE))
    assert len(message.payload) == size


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_answers_that_are_sent_while_one_looks_are_whole_or_not_there(
    worker: Worker, holder: Page, monkeypatch: pytest.MonkeyPatch, step: int, again: bool
) -> None:
    calls = 0

    def between() -> bool:
        nonlocal calls
        calls += 1
        if calls == step:
            worker.send()
            if again:
                worker.put(answer(3, 100))
        return True

    worker.put(answer(1))
    worker.put(answer(2))
    monkeypatch.setattr(pages.barrier, "issue", between)
    assert holder.unsent(LEASE) == b""


class Watched:
    """A page's words, with something to do after each one is written."""

    def __init__(self, words: Any, then: Callable[[], None]) -> None:
        self._words, self._then = words, then

    def __getitem__(self, index: int) -> int:
        return int(self._words[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value
        self._then()


class Meanwhile:
    """An outbox in which something happens between the question for its content and the answer."""

    def __init__(self, outbox: Any, deed: Callable[[], None]) -> None:
        self._outbox, self._deed = outbox, deed

    def __getitem__(self, where: Any) -> Any:
        self._deed()
        return self._outbox[where]


@contextlib.contextmanager
def in_the_middle(page: Page, stop: int) -> Iterator[Callable[..., None]]:
    """Gives `run(deed, reader, look)`: the worker does its deed as far as `stop` words written on
    its page; then somebody looks, and it does the rest between that one's question for what the
    outbox contains and the answer."""
    written, go, reached = 0, threading.Event(), threading.Event()
    words = page.words

    def then() -> None:
        nonlocal written
        written += 1
        if written == stop:
            reached.set()
            assert go.wait(20)

    def run(deed: Callable[[], None], reader: Page, look: Callable[[], None]) -> None:
        def body() -> None:
            if not stop:
                reached.set()
                assert go.wait(20)
            deed()
            reached.set()

        def the_rest() -> None:
            go.set()
            runner.join(20)
            assert not runner.is_alive()

        runner = threading.Thread(target=body)
        runner.start()
        assert reached.wait(20)
        outbox = reader.outbox
        reader.outbox = Meanwhile(outbox, the_rest)  # type: ignore[assignment]
        try:
            look()
        finally:
            reader.outbox = outbox
            the_rest()

    page.words = Watched(words, then)  # type: ignore[assignment]
    try:
        yield run
    finally:
        page.words = words


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_answers_that_replace_others_while_one_reads_are_not_mixed_with_them(
    worker: Worker, holder: Page, stop: int
) -> None:
    """However far the worker has come with sending (`stop` words written) when somebody reads."""
    worker.put(answer(1, 8))
    worker.put(answer(2, 8))
    seen: list[list[int]] = []
    with in_the_middle(worker.page, stop) as other:
        worker.server._words = worker.page.words

        def body() -> None:
            worker.send()
            worker.put(answer(3, 1))

        other(body, holder, lambda: seen.append(numbers(holder.unsent(LEASE))))
    assert seen[0] in ([], [1, 2], [3])


def test_answers_to_calls_of_another_lease_are_not_seen(worker: Worker, holder: Page) -> None:
    worker.put(answer(1))
    assert holder.unsent(LEASE - 1) == holder.unsent(LEASE + 1) == b""
    worker.send()
    assert worker.begin(1, LEASE + 1)
    worker.put(answer(1))
    assert holder.unsent(LEASE) == b""
    assert numbers(holder.unsent(LEASE + 1)) == [1]


def test_what_was_taken_back_on_one_channel_is_nothing_to_another(sheet: Sheet) -> None:
    page = sheet.view()
    page.order_me()
    views = [Page(sheet.fd, slot=pages.slot(n)) for n in (1, 2, pages.SLOTS)]
    with contextlib.closing(Worker(page)) as worker:
        for view, place in zip(views, (1, 2, pages.SLOTS), strict=True):
            assert view.take_back(LEASE, 1, 9) is not None
            for other in (1, 2, 3, pages.SLOTS):
                worker.channel.skip = pages.slot_words(other)
                assert worker.begin(5) is (other > place or other == 3 != place)
    for view in views:
        view.close()


def test_every_channel_has_a_place_on_the_page() -> None:
    places = [pages.slot(n) for n in range(1, 3 * pages.SLOTS)]
    assert places[: pages.SLOTS] == list(range(1, pages.SLOTS + 1))
    assert set(places) == set(range(1, pages.SLOTS + 1))
    words = [pages.slot_words(place) + half for place in set(places) for half in (0, 1)]
    assert len(set(words)) == len(words)
    assert min(words) >= 16 and max(words) < pages.NUMBERS // 8


# --- results of a bulk ------------------------------------------------------------------------


@pytest.fixture
def begin(worker: Worker) -> Iterator[Callable[[int], Bulk]]:
    """A bulk whose first call has this number."""
    begun: list[Bulk] = []

    def begin(first: int) -> Bulk:
        begun.append(Bulk(worker.page, LEASE, first))
        return begun[-1]

    yield begin
    for bulk in begun:
        bulk.forbid()  # its views of the page


def values(found: tuple[int, int, int, bytes] | None) -> tuple[int, list[Any]] | None:
    """The first one's number, and the results."""
    if found is None:
        return None
    first, count, kind, data = found
    (message,) = messages.read_all(messages.pack_results(first, 0, count, kind, data))
    loaded = messages.load_results(message.payload)
    assert len(loaded) == count == messages.count_results(message.payload)
    return first, loaded


def run(bulk: Bulk, function: Callable[[Any], Any], arguments: list[Any]) -> int:
    """Run them as the server does, one after the other; how many results were kept."""
    done, _ = bulk.run(function, arguments)
    if done < len(arguments) and not done and bulk.turn():
        return 1 + run(bulk, function, arguments[1:])
    return done


KINDS = [[1, -2, 3], [1.5, -0.0, 3.25], ["one", b"2", None]]


@pytest.mark.parametrize("kind", KINDS, ids=["integers", "floats", "others"])
def test_results_lie_there_until_they_are_sent(
    begin: Callable[[int], Bulk], holder: Page, kind: list[Any]
) -> None:
    assert holder.results(LEASE) is None
    bulk = begin(5)
    assert holder.results(LEASE) is None
    assert run(bulk, lambda value: value, kind[:2]) == 2
    assert values(holder.results(LEASE)) == (5, kind[:2])
    assert run(bulk, lambda value: value, kind[2:]) == 1
    assert repr(values(holder.results(LEASE))) == repr((5, kind))
    assert holder.results(LEASE + 1) is None
    message = bulk.message()
    assert message is not None
    (read,) = messages.read_all(message)
    assert messages.load_results(read.payload) == kind
    bulk.sent(8)
    assert holder.results(LEASE) is None
    assert bulk.message() is None
    assert run(bulk, lambda value: value, kind[:1]) == 1
    assert values(holder.results(LEASE)) == (8, kind[:1])


@pytest.mark.parametrize(
    ("before", "odd"),
    [
        (1, 1.0),
        (1, True),
        (1, 2**63),
        (1, "x"),
        (1.0, 1),
        (1.0, None),
        ("x", [1]),
        ("x", "y" * 300),
    ],
)
def test_a_result_of_another_kind_ends_a_run_and_keeps_its_type(
    begin: Callable[[int], Bulk], holder: Page, before: Any, odd: Any
) -> None:
    bulk = begin(1)
    assert run(bulk, lambda value: value, [before]) == 1
    assert bulk.run(lambda value: value, [before, odd, before]) == (1, None)
    assert values(holder.results(LEASE)) == (1, [before, before])
    bulk.sent(3)
    if bulk.turn():
        found = values(holder.results(LEASE))
        assert found == (3, [odd]) and type(found[1][0]) is type(odd)
        assert bulk.odd is None
    else:
        assert holder.results(LEASE) is None
        assert bulk.odd is odd


def test_results_that_keep_changing_their_kind_are_all_pickled(
    begin: Callable[[int], Bulk], holder: Page
) -> None:
    bulk = begin(1)
    expected: list[Any] = []
    for number in range(20):
        value = float(number) if number % 2 else number
        if not bulk.run(lambda value: value, [value])[0]:
            bulk.sent(number + 1)
            expected.clear()
            assert bulk.turn()
        expected.append(value)
    assert len(expected) > 10
    found = values(holder.results(LEASE))
    assert found is not None and repr(found[1]) == repr(expected)


def test_results_before_the_call_that_fails_lie_there(
    begin: Callable[[int], Bulk], holder: Page
) -> None:
    bulk = begin(1)
    done, problem = bulk.run(lambda n: 1 // n, [1, 1, 0, 1])
    assert done == 2 and isinstance(problem, ZeroDivisionError)
    assert values(holder.results(LEASE)) == (1, [1, 1])


def test_a_copy_of_the_process_keeps_nothing(begin: Callable[[int], Bulk], holder: Page) -> None:
    bulk = begin(1)

    def forks(number: int) -> int:
        if number == 2:
            bulk.forbid()
        return number

    assert bulk.run(forks, [1, 2, 3]) == (1, None)
    assert values(holder.results(LEASE)) == (1, [1])


@pytest.mark.parametrize("kind", KINDS, ids=["integers", "floats", "others"])
@pytest.mark.parametrize("stop", range(7))
def test_results_that_replace_others_while_one_reads_are_not_mixed_with_them(
    worker: Worker, begin: Callable[[int], Bulk], holder: Page, stop: int, kind: list[Any]
) -> None:
    """However far the worker has come with sending (`stop` words written) when somebody reads."""
    bulk = begin(1)
    run(bulk, lambda value: value, kind[:2])
    seen: list[Any] = []
    with in_the_middle(worker.page, stop) as other:

        def body() -> None:
            bulk.sent(3)
            run(bulk, lambda value: value, kind[2:])

        other(body, holder, lambda: seen.append(values(holder.results(LEASE))))
    assert seen[0] in (None, (1, kind[:2]), (3, kind[2:]))


# --- two processes ----------------------------------------------------------------------------


@contextlib.contextmanager
def process(code: str, *fds: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs some lines with these descriptors as its arguments."""
    begin = "import mmap, os, sys\nfrom whitepool_mp.wire import pages\n"
    running = subprocess.Popen(
        [sys.executable, "-c", begin + textwrap.dedent(code), *map(str, fds)],
        pass_fds=fds,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


SENT, PASSED, LOG = 0, 1, 4096
MOST = 1 << 20

SERVE = """
    # Begins every call that was sent, as the server does, and logs what it began.
    import socket
    from whitepool_mp.worker.answers import Channel
    from whitepool_mp.worker.serve import Server
    page = pages.Page(int(sys.argv[1]))
    page.order_me()
    shared = mmap.mmap(int(sys.argv[2]), 0)
    words = memoryview(shared)[:4096].cast("Q")
    log = memoryview(shared)[4096:]
    one, other = socket.socketpair()
    server = Server(one, page, None)
    channel = Channel(other, pages.slot_words(1))
    parent = os.getppid()
    number = 0
    while os.getppid() == parent:
        while words[0] > number:
            number += 1
            lease = words[2]
            if lease > server._fence:
                server._fence = lease
            if not server._claim(channel, lease, number, 1):
                log[number] = 1
            page.words[pages.ENDED] = server._calls
            words[1] = number
"""


class Other:
    """A worker in another process that begins whatever it is sent, and the log of what it began."""

    def __init__(self, sheet: Sheet) -> None:
        self.page = sheet.view()
        self._fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, LOG + MOST)
        self._map = mmap.mmap(self._fd, 0)
        self.words = memoryview(self._map)[:LOG].cast("Q")
        self.log = memoryview(self._map)[LOG:]
        self.sent = 0
        self.words[2] = LEASE
        self._process = process(SERVE, sheet.fd, self._fd)
        self.running = self._process.__enter__()
        self._until(lambda: self.page.ordered)

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline and self.running.poll() is None
            time.sleep(0)

    def send(self, count: int) -> None:
        self.sent += count
        assert self.sent < MOST
        self.words[0] = self.sent

    def passes(self) -> None:
        """Wait until it has looked at all that it was sent."""
        self._until(lambda: self.words[1] == self.sent)

    def began(self, number: int) -> bool:
        return bool(self.log[number])

    def close(self) -> None:
        self._process.__exit__(None, None, None)
        self.words.release()
        self.log.release()
        self._map.close()
        os.close(self._fd)


@pytest.fixture
def other(sheet: Sheet) -> Iterator[Other]:
    made = Other(sheet)
    yield made
    made.close()


def linger(chance: random.Random) -> None:
    """Let the worker come to another place."""
    for _ in range(chance.randrange(300)):
        pass
    if chance.random() < 0.3:
        os.sched_yield()


def test_no_call_is_both_taken_back_and_begun(other: Other) -> None:
    """A hammering; a call beyond the number that `take_back` returns never begins, others do."""
    chance = random.Random()
    middle = 0
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline and other.sent < MOST - 200:
        first = other.sent + 1
        other.send(chance.randrange(2, 60))
        linger(chance)
        begun = other.page.take_back(LEASE, first, other.sent)
        assert begun is not None and first <= begun <= other.sent
        if chance.random() < 0.5:  # and more behind them, before it has passed those
            other.send(chance.randrange(1, 20))
            linger(chance)
            begun = other.page.take_back(LEASE, first, other.sent)
            assert begun is not None
        last = other.sent
        other.passes()
        # The first one mostly begins; one that is just about to may be refused with the others,
        # while only one of the two numbers has been written. It is answered either way.
        for number in range(begun + 1, last + 1):
            assert not other.began(number)
        middle += first < begun < last
        other.send(1)  # what comes behind them begins
        other.passes()
        assert other.began(other.sent)
    assert middle or ALONE  # some were taken back in the middle of their run


def test_nothing_begins_under_a_recalled_lease(other: Other) -> None:
    """A hammering; `recall` returning False or None says that nothing runs and nothing will."""
    chance = random.Random()
    seen = {True: 0, False: 0}
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline and other.sent < MOST - 200:
        lease = other.words[2]
        first = other.sent + 1
        other.send(chance.randrange(1, 60))
        linger(chance)
        busy = bool(other.page.recall(lease))
        begun = other.log[first : other.sent + 1].tolist()
        seen[busy] += 1
        other.passes()
        after = other.log[first : other.sent + 1].tolist()
        assert sum(after) - sum(begun) <= busy
        assert after == sorted(after, reverse=True)  # the first ones, to the recall
        other.words[2] = lease + 1
        other.send(1)
        other.passes()
        assert other.began(other.sent)
    assert seen[False]


ANSWER = """
    # A whole server, and a job that counts how often it was run with each number.
    from whitepool_mp.wire.descriptors import Socket
    from whitepool_mp.worker.serve import Server
    page = pages.Page(int(sys.argv[1]))
    page.order_me()
    log = mmap.mmap(int(sys.argv[2]), 0)
    def job(number):
        log[number] += 1
        return number
    Server(Socket(fileno=int(sys.argv[3])), page, None).run()
"""
JOB = b"c__main__\njob\n."
ROUND = 32
"""Each round of the hammering has so many numbers, and a lease, of its own."""


def calls(numbers: range) -> bytes:
    """Each in a message of its own."""
    return b"".join(
        bytes(messages.pack(messages.CALL, messages.SPLIT, n, lease_of(n), split(((n,), {})))[0])
        for n in numbers
    )


def lease_of(number: int) -> int:
    return LEASE + number // ROUND


def split(arguments: Any) -> bytes:
    return messages.pack_split(JOB, pickle.dumps(arguments))


def batch(numbers: range) -> bytes:
    data = messages.pack_batch(JOB, [pickle.dumps(((number,), {})) for number in numbers])
    return bytes(messages.pack(messages.BATCH, 0, numbers[0], lease_of(numbers[0]), data)[0])


def bulk(numbers: range) -> bytes:
    data = split(numbers)
    return bytes(messages.pack(messages.BULK, 0, numbers[0], lease_of(numbers[0]), data)[0])


def returned(data: bytes) -> list[int]:
    """The numbers of the calls of which these are the results."""
    found = []
    for message in messages.read_all(data):
        if message.kind == messages.RESULTS:
            count = messages.count_results(message.payload)
            found += range(message.number, message.number + count)
        elif message.kind == messages.RESULT:
            found.append(message.number)
    return found


def refused(data: bytes, number: int) -> bool:
    """Whether these say that this call was refused."""
    return number in [
        message.number for message in messages.read_all(data) if message.kind == messages.ERROR
    ]


def test_all_calls_under_a_lease_that_is_free_have_been_answered(sheet: Sheet) -> None:
    """A hammering of a whole server; `recall` returning None says as much as RELEASED does."""
    chance = random.Random()
    page = sheet.view()
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, MOST)
    control, its_end = descriptors.pair()
    mine, channel = descriptors.pair()
    seen: Counter[bool | None] = Counter()
    ran: list[int] = []
    never: list[int] = []
    with (
        control,
        mine,
        mmap.mmap(fd, 0) as log,
        process(ANSWER, sheet.fd, fd, its_end.fileno()),
    ):
        os.close(fd)
        descriptors.send(control, frames.adopt(1), [channel.fileno()])
        its_end.close()
        channel.close()
        control.settimeout(20)
        deadline = time.monotonic() + 2.5
        turn = 0
        while time.monotonic() < deadline and (turn + 2) * ROUND < MOST:
            turn += 1
            numbers = range(turn * ROUND, turn * ROUND + chance.randrange(1, ROUND + 1))
            lease = lease_of(numbers[0])
            mine.sendall(chance.choice((calls, batch, bulk))(numbers))
            for _ in range(chance.randrange(20)):
                linger(chance)
            busy = page.recall(lease)
            seen[busy] += 1
            if busy is not None:
                control.sendall(frames.recall(lease, False))
                assert control.recv(100) == frames.released(lease)
            answered = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    answered += returned(mine.recv(1 << 20, descriptors.DONTWAIT))
            answered = sorted(number for number in answered if number in numbers)
            assert answered == [number for number in numbers if log[number]]
            ran += answered
            never += set(numbers).difference(answered)
            if turn % 3 == 0:  # before its refusals fill the channel: a call that is refused, too
                mine.sendall(calls(range(1)))
                while not refused(mine.recv(1 << 20), 0):
                    pass
        control.sendall(frames.recall(lease, True))
        assert control.recv(100) == frames.released(lease)
        assert ran and {log[number] for number in ran} == {1}
        assert not any(log[number] for number in never)
    assert (seen[None] and seen[True]) or ALONE
