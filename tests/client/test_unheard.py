"""What a manager may not have heard is said again to the next one; what it heard is not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from whitepool_mp.client.unheard import Unheard
from whitepool_mp.wire import frames

ALL = frames.request(frames.REJOINED, 0)


def test_of_nothing_only_the_end_is_said() -> None:
    assert Unheard().again() == ([], [ALL])


def test_what_has_no_answer_comes_first_then_what_is_waited_for() -> None:
    unheard = Unheard()
    unheard.asked[1] = b"first"
    unheard.said.append((1, b"checkin"))
    unheard.asked[2] = b"second"
    assert unheard.again() == ([b"checkin"], [b"first", b"second", ALL])
    assert unheard.again() == ([b"checkin"], [b"first", b"second", ALL])  # it may die as well


def test_an_answer_shows_what_was_heard_before_its_request() -> None:
    unheard = Unheard()
    for after, data in ((0, b"a"), (1, b"b"), (2, b"c")):
        unheard.said.append((after, data))
    unheard.answered(2)
    assert unheard.again()[0] == [b"c"]
    unheard.answered(2)
    assert unheard.again()[0] == [b"c"]  # said after that request, perhaps not heard
    unheard.answered(3)
    assert unheard.again()[0] == []


def test_a_request_that_is_given_up_keeps_its_place() -> None:
    unheard = Unheard()
    unheard.asked[1], unheard.asked[2] = b"checkout", b"why"
    unheard.asked[1] = b"cancel"
    assert unheard.again()[1] == [b"cancel", b"why", ALL]


@given(st.lists(st.sampled_from(["ask", "say", "answer"]), max_size=40), st.data())
def test_the_next_manager_hears_all_that_the_last_did_not(
    deeds: list[str], data: st.DataObject
) -> None:
    """A manager that hears in order, up to some frame, and answers requests in any order."""
    unheard = Unheard()
    sent: list[bytes] = []  # in order
    heard = 0  # how many of them at least
    last = 0
    for deed in deeds:
        if deed == "answer":
            if not unheard.asked:
                continue
            number = data.draw(st.sampled_from(sorted(unheard.asked)))
            heard = max(heard, sent.index(unheard.asked.pop(number)) + 1)
            unheard.answered(number)
            continue
        frame = b"%s %d" % (deed.encode(), len(sent))
        sent.append(frame)
        if deed == "ask":
            last += 1
            unheard.asked[last] = frame
        else:
            unheard.said.append((last, frame))
    said, asked = unheard.again()
    assert said == [frame for frame in sent[heard:] if frame.startswith(b"say")]
    assert asked == [*unheard.asked.values(), ALL]
