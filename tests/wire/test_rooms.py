"""Memory for large buffers is filled again only when nothing refers to it, whoever holds what.

The test of each kind of holder is that what it sees stays as it was, however much is received
after it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import fork

from whitepool_mp.wire import rooms

LEAST = rooms.IN_OWN_MAPPING
SIZES = [LEAST, LEAST + 1, LEAST + 5000, LEAST * 3 // 2, 2 * LEAST - 1, 2 * LEAST, 5 * LEAST]
T = 60.0
"""Seconds that nothing here should need: a deadline against hanging."""

HOLDERS: dict[str, Callable[[memoryview], Any]] = {
    "the view": lambda view: view,
    "a part of it": lambda view: view[1000:-1000],
    "one byte": lambda view: view[-1:],
    "a view of a part of a view": lambda view: memoryview(view[10:])[10:],
    "other items": lambda view: view[: len(view) // 8 * 8].cast("d"),
    "read only": lambda view: view.toreadonly(),
    "what the view is of": lambda view: view.obj,
    "an array": lambda view: np.frombuffer(view, np.uint8),
    "a part of an array": lambda view: np.frombuffer(view, np.uint8)[5000:5001],
    "an array of another shape": lambda view: np.frombuffer(view, np.uint8)[:100].reshape(10, 10),
    "what an array is of": lambda view: np.frombuffer(view, np.uint8).base,
    "an unpickled array": lambda view: _unpickled(np.zeros(len(view), np.uint8), view),
    "an unpickled bytearray": lambda view: _unpickled(pickle.PickleBuffer(b"x"), view),
    "a pickle's buffer": pickle.PickleBuffer,
    "a ctypes array": lambda view: (ctypes.c_char * len(view)).from_buffer(view),
    "a copy": bytes,
    "in a cycle": lambda view: _in_a_cycle(view),
}


def _unpickled(value: Any, view: memoryview) -> Any:
    """What a pickle of `value` loads as whose buffer has come in `view`."""
    return pickle.loads(pickle.dumps(value, 5, buffer_callback=lambda _: None), buffers=[view])


def _in_a_cycle(view: memoryview) -> list[Any]:
    cycle = [view.cast("b")]
    cycle.append(cycle)  # type: ignore[arg-type]
    return cycle


def filled(size: int, number: int) -> memoryview:
    """A buffer of this size as it is when it was received: full of `number`."""
    view: memoryview = rooms.room(size)
    assert len(view) == size
    np.frombuffer(view, np.uint8).fill(number)
    return view


def holds(holder: Any, number: int) -> bool:
    """Whether a holder still sees nothing but `number`."""
    seen = np.frombuffer(holder[0] if isinstance(holder, list) else holder, np.uint8)
    # What a view is of may be larger than the view.
    return bool((seen[:LEAST] == number).all())


def place(view: memoryview) -> int:
    """Where in memory it is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    rooms.let_go()
    yield
    rooms.let_go()


class Holding(RuleBasedStateMachine):
    """Buffers come, are held in one way or another, handed on, and let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[Any, int]] = []
        self.count = 0

    @rule(size=st.sampled_from(SIZES), how=st.sampled_from(sorted(HOLDERS)))
    def receive(self, size: int, how: str) -> None:
        self.count += 1
        self.held.append((HOLDERS[how](filled(size, self.count % 256)), self.count % 256))

    @rule(size=st.sampled_from(SIZES))
    def receive_and_forget(self, size: int) -> None:
        filled(size, 255)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["the view", "a part of it", "an array"]))
    def hold_otherwise(self, data: st.DataObject, how: str) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        holder, number = self.held[index]
        if not isinstance(holder, (bytes, list)):
            # Of what the view is of, the end has never been filled.
            view = memoryview(np.frombuffer(holder, np.uint8)[:LEAST])
            if len(view) > 2000 and not view.readonly:
                self.held[index] = HOLDERS[how](view), number

    @rule()
    def let_go(self) -> None:
        rooms.let_go()

    @invariant()
    def all_is_as_it_was(self) -> None:
        assert all(holds(holder, number) for holder, number in self.held)

    def teardown(self) -> None:
        self.held.clear()


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("how", sorted(HOLDERS))
def test_what_is_held_stays_as_it_was(how: str) -> None:
    holder = HOLDERS[how](filled(LEAST, 1))
    for _ in range(5):
        filled(LEAST, 2)
    assert holds(holder, 1)


def test_what_the_view_is_of_can_be_viewed_again_later() -> None:
    """In between there is no view, and nothing that was made of one."""
    view = filled(LEAST, 1)
    owner = view.obj
    view.release()
    for _ in range(5):
        filled(LEAST, 2)
    assert holds(memoryview(owner), 1)


def test_memory_that_nothing_refers_to_is_filled_again() -> None:
    first = place(filled(LEAST, 1))
    gc.collect()
    view = filled(LEAST, 2)
    assert place(view) == first
    other = filled(LEAST, 3)
    assert place(other) != first
    del view
    gc.collect()
    assert place(filled(LEAST, 4)) == first


def test_a_holder_that_is_collected_gives_its_memory_back() -> None:
    view = filled(LEAST, 1)
    first = place(view)
    cycle = _in_a_cycle(view)
    del view, cycle
    gc.collect()
    assert place(filled(LEAST, 2)) == first


def test_a_process_keeps_no_more_than_it_says() -> None:
    size = rooms.MOST_KEPT // 2 - LEAST
    process = psutil.Process()
    before = process.memory_info().rss
    held = [filled(size, number) for number in range(1, 5)]
    assert all(holds(view, number) for number, view in enumerate(held, 1))
    held.clear()
    gc.collect()
    assert process.memory_info().rss - before < rooms.MOST_KEPT + size // 2
    rooms.let_go()
    assert process.memory_info().rss - before < size // 2
    assert not rooms.kept()


def test_what_is_larger_than_all_that_may_be_kept_is_not_kept() -> None:
    view = rooms.room(rooms.MOST_KEPT + 1)
    view[-1] = 1
    assert not rooms.kept()
    assert view[-1] == 1


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_never_get_the_same_memory(threads: int) -> None:
    """Each holds the last few of its own, and lets another thread go on before it looks."""
    wrong: list[str] = []
    start = threading.Barrier(threads)

    def receive(number: int) -> None:
        try:
            held: list[Any] = []
            start.wait(T)
            for turn in range(300):
                how = list(HOLDERS)[(turn + number) % len(HOLDERS)]
                held.append((HOLDERS[how](filled(LEAST + turn, number)), how))
                del held[: -(turn % 4) or None]
                wrong.extend(how for each, how in held if not holds(each, number))
        except BaseException:
            wrong.append(traceback.format_exc())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        group = [threading.Thread(target=receive, args=(i,)) for i in range(1, threads + 1)]
        for thread in group:
            thread.start()
        for thread in group:
            thread.join(T)
            assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_whatever_interrupts_the_handing_out_may_ask_as_well() -> None:
    """A signal handler or a finalizer runs at each line of it in turn, and receives, too."""
    kept = [filled(LEAST, 1) for _ in range(3)]
    inner: list[memoryview] = []
    where: set[int] = set()

    def ask(line: int) -> None:
        sys.settrace(None)
        inner.append(filled(LEAST, 2))
        where.add(line)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != rooms.__file__:
            return None
        if event == "line" and frame.f_lineno not in where:
            ask(frame.f_lineno)
        return trace

    old = sys.gettrace()
    try:
        for number in range(3, 60):
            del kept[:1]
            sys.settrace(trace)
            view: memoryview = rooms.room(LEAST)
            sys.settrace(None)
            np.frombuffer(view, np.uint8).fill(number)
            kept.append(view)
            assert all(holds(each, 2) for each in inner)
            del inner[:-2]
            if number > 6:
                assert [int(each[0]) for each in kept] == [number - 2, number - 1, number]
            assert all(holds(each, each[0]) for each in kept)
    finally:
        sys.settrace(old)
    assert len(where) > 10


def test_a_forked_child_and_its_parent_keep_what_they_hold() -> None:
    held = HOLDERS["a part of it"](filled(LEAST, 1))
    filled(LEAST, 2)  # is kept, and free
    pid = fork()
    if pid == 0:
        code = 1
        try:
            ours = [filled(LEAST, 3) for _ in range(5)]
            code = 0 if holds(held, 1) and all(holds(each, 3) for each in ours) else 2
        finally:
            os._exit(code)
    ours = [filled(LEAST, 4) for _ in range(5)]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert holds(held, 1) and all(holds(each, 4) for each in ours)


def test_a_forked_child_begins_with_nothing_kept() -> None:
    filled(LEAST, 1)
    pid = fork()
    if pid == 0:
        os._exit(rooms.kept())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert rooms.kept()


def test_without_ctypes_there_is_memory_that_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ctypes", None)
    room = rooms.room(LEAST)
    room[-1] = 1
    assert len(room) == LEAST
    assert not rooms.kept()
