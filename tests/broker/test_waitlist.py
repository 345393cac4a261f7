"""The list of waiters against a plain one that is scanned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from whitepool_mp.broker import Waiter
from whitepool_mp.broker.waitlist import Waitlist

JOIN, LEAVE, LOOK, TURN_AWAY = range(4)
DEEDS = st.tuples(st.sampled_from([JOIN, JOIN, LEAVE, LOOK, TURN_AWAY]), st.integers(0, 11))


@given(st.lists(DEEDS, max_size=40))
def test_it_is_what_a_plain_list_is(deeds: list[tuple[int, int]]) -> None:
    waitlist = Waitlist()
    plain: list[Waiter] = []
    for number, (deed, pick) in enumerate(deeds):
        beyond = [waiter for waiter in plain[pick:] if not waiter.block]
        if deed == JOIN:
            plain.append(Waiter(pick % 2, number, pick % 3 > 0, 0.0, False, pick % 4 > 0))
            waitlist.add(plain[-1])
        elif deed == LEAVE and plain:
            waitlist.remove(plain.pop(pick % len(plain)))
        elif deed == LOOK:
            assert waitlist.beyond(pick) == beyond
        elif deed == TURN_AWAY:
            for waiter in waitlist.beyond(pick):
                waitlist.remove(waiter)
            plain = [waiter for waiter in plain if waiter not in beyond]
        assert waitlist.all() == plain
        assert len(waitlist) == len(plain)
        assert not plain or waitlist.first() is plain[0]
        assert waitlist.impatient == sum(not waiter.block for waiter in plain)
        owners = {waiter.client if waiter.spare_own else None for waiter in plain}
        assert waitlist.spared() == (owners.pop() if len(owners) == 1 else None)


def test_nobody_is_within_fewer_than_no_places() -> None:
    waitlist = Waitlist()
    waiter = Waiter(1, 1, False, 0.0)
    waitlist.add(waiter)
    assert waitlist.beyond(1) == []
    assert waitlist.beyond(-1) == [waiter]
