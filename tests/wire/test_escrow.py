"""Descriptors in escrow: whatever becomes of who put them there, the next one finds them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fork

from whitepool_mp.wire import descriptors
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.escrow import NURSERY, Escrow


class Owner:
    """Has the queue, and as many managers as a test wants, one after the other."""

    def __init__(self) -> None:
        self.ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.copies: list[Socket] = []
        self.managers = 0
        self.inode: dict[int, int] = {}  # of the file that each key stands for
        self.open: dict[int, int] = {}  # the manager's own descriptor of it

    def manager(self) -> Escrow:
        """Another one; what the last one had open is closed."""
        self.managers += 1
        for fd in self.open.values():
            os.close(fd)
        self.open.clear()
        for copy in self.copies:
            copy.close()
        self.copies = [Socket(fileno=os.dup(end.fileno())) for end in self.ends]
        return Escrow(*self.copies)

    def new(self, escrow: Escrow, key: int) -> bool:
        """Park a new file under a key."""
        fd = os.memfd_create("test")
        self.open[key] = fd
        self.inode[key] = os.fstat(fd).st_ino
        return escrow.park(key, (fd, fd))

    def end(self, escrow: Escrow, key: int) -> None:
        """Whose it was has ended."""
        escrow.drop(key)
        os.close(self.open.pop(key))

    def queued(self) -> int:
        """How many entries lie there; they are gone then."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                _, fds = descriptors.receive(self.copies[1], 64, 8)
                count += 1
                for fd in fds:
                    os.close(fd)
        return count

    def close(self) -> None:
        for end in (*self.ends, *self.copies):
            end.close()
        for fd in self.open.values():
            os.close(fd)


@pytest.fixture
def owner() -> Iterator[Owner]:
    with contextlib.closing(Owner()) as found:
        yield found


def taken(owner: Owner, escrow: Escrow) -> set[int]:
    """What another manager finds there; it goes on with that."""
    found = escrow.take(owner.managers)
    for key, fds in found.items():
        assert [os.fstat(fd).st_ino for fd in fds] == [owner.inode[key]] * 2
        os.close(fds.pop())
        owner.open[key] = fds[0]
        escrow.park(key, (fds[0], fds[0]))
    return set(found)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["new", "new", "end first", "end last", "take over"]), max_size=60))
def test_another_manager_finds_all_that_live(steps: list[str]) -> None:
    with contextlib.closing(Owner()) as owner:
        escrow, last = owner.manager(), 0
        for step in [*steps, "take over"]:
            live = set(owner.open)
            if step == "new":
                last += 1
                assert owner.new(escrow, last)
            elif step == "take over":
                escrow = owner.manager()
                found = taken(owner, escrow)
                assert live <= found
                assert len(found) <= 3 * len(live) + 18, "those of the dead pile up"
                for key in found - live:
                    owner.end(escrow, key)
            elif live:
                owner.end(escrow, min(live) if step == "end first" else max(live))


def test_a_queue_of_those_who_come_and_go_stays_short(owner: Owner) -> None:
    escrow = owner.manager()
    owner.new(escrow, 1)  # it stays at the head, and is moved
    for key in range(2, 2000):
        assert owner.new(escrow, key)
        owner.end(escrow, key)
    assert owner.queued() < 30
    assert escrow.refused == 0


def test_nurseries_that_come_and_go_leave_few_entries(owner: Owner) -> None:
    escrow = owner.manager()
    owner.new(escrow, 1)
    for _ in range(50):
        if NURSERY in owner.open:
            os.close(owner.open.pop(NURSERY))
        owner.new(escrow, NURSERY)
    for key in range(2, 10):
        owner.new(escrow, key)
        owner.end(escrow, key)
    assert owner.queued() < 30


@pytest.mark.parametrize("moved", [0, 1, 7, 18])
def test_a_manager_killed_while_it_moves_an_entry_leaves_it_there(owner: Owner, moved: int) -> None:
    escrow = owner.manager()
    for key in range(1, 20):
        owner.new(escrow, key)
    pid = fork()
    if not pid:
        discard, moves = Escrow._discard, iter(range(moved))

        def killed_at_the_last(self: Escrow) -> None:
            if next(moves, None) is None:
                os._exit(9)  # it has sent the entry again, and not taken the first one out
            discard(self)

        Escrow._discard = killed_at_the_last  # type: ignore[method-assign]
        owner.manager().take(1000)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert taken(owner, owner.manager()) == set(range(1, 20))


def test_a_full_queue_is_told_and_loses_nobody_who_is_in_it(owner: Owner) -> None:
    escrow = owner.manager()
    parked = set()
    for key in range(1, 3000):
        if not owner.new(escrow, key):
            break
        parked.add(key)
    else:
        pytest.fail("there was no end of room")
    assert len(parked) > 100
    assert escrow.refused == 1
    assert parked <= taken(owner, owner.manager())
    assert parked <= taken(owner, owner.manager())


def test_the_nurserys_socket_is_nobody_elses(owner: Owner) -> None:
    escrow = owner.manager()
    ours, theirs = descriptors.pair()
    with ours, theirs:
        escrow.park(NURSERY, (ours.fileno(),))
        owner.new(escrow, 1)
        ours.close()
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)  # no end-of-file: a copy lies there
        assert taken(owner, owner.manager()) == {1}
        assert theirs.recv(1) == b""
