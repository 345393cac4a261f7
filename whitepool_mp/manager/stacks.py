"""The Python stack of every worker, now: asked for by a signal, collected from pipes.

    session.stacks() --STACKS--> Stacks --STACKS_SIGNAL--> workers
                     <--REPLY---        <----(pipes)------

A worker writes its stack in the signal's handler, busy or not. One that is stopped or still
starting is not asked; one that does not answer within a second (it blocks the signal, or the kernel
is busy on its behalf) is told as such. Nothing is waited for meanwhile, and no worker is asked
again before it has answered, so that one stack is not mixed with another.

How the end of a stack is known: faulthandler writes the oldest thread last, which is the main one,
and the outermost frame last, which is ours; or it stops at its hundredth frame or thread. Should a
future Python write it otherwise, the answer takes the whole second, and is there all the same.
"""

from __future__ import annotations

import os
import re

from whitepool_mp.manager.obituary import is_stopped, without_own_frames
from whitepool_mp.wire import pages

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Row = dict[str, Any]
    Done = Callable[[list[Row]], None]

PATIENCE = 1.0
"""Seconds for which a worker's answer is waited for."""
MOST_BYTES = 700_000
"""Of all stacks together: they have to fit one frame, as JSON."""
_LONGEST = 1 << 20
"""Bytes of one stack that are read."""
_FRAMES = 100
"""How many frames of a thread faulthandler writes."""
_OUTERMOST = re.compile(
    rb'/whitepool_mp/(manager|worker)/main\.py", line \d+ in main\n'
    rb'  File "<string>", line \d+ in <module>\n\Z'
)
_CUT_SHORT = re.compile(rb"\n(  )?\.\.\.\n\Z|\n  <truncated[^\n]*\n\Z")


class _Question:
    """One `session.stacks()`."""

    __slots__ = ("done", "rows", "until", "waiting")

    def __init__(self, until: float, done: Done) -> None:
        self.until = until
        self.done = done
        self.rows: dict[int, Row] = {}
        self.waiting: dict[int, Any] = {}  # hands that have not answered yet, by worker


class Stacks:
    """Asks workers for their stacks and collects them.

    Args:
        clock: the monotonic clock, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._questions: list[_Question] = []

    def ask(self, asked: list[tuple[Row, Any]], done: Done) -> None:
        """Ask workers for their stacks.

        Args:
            asked: of each worker what else is to be told of it (pid, slot, state), and its hand.
            done: gets these, each with "stack" (text) and "answered", when all have answered or a
                second has passed.
        """
        question = _Question(self._clock() + PATIENCE, done)
        for row, hand in asked:
            row["answered"], row["stack"] = False, ""
            question.rows[hand.worker] = row
            if hand.pid is None or not hand.page.words[pages.THREAD]:
                row["stack"] = "(it is being started and cannot tell yet)"
                if row["state"] != "booting":
                    row["stack"] = "(it was started without a way to tell: no descriptor was left)"
            elif is_stopped(hand.pid):
                row["state"] = "stopped"
                row["stack"] = "(it is stopped, by SIGSTOP or a debugger)"
            else:
                question.waiting[hand.worker] = hand
                if hand.dump is None:
                    hand.dump = bytearray()
                    os.kill(hand.pid, pages.STACKS_SIGNAL)  # not reaped yet: it is nobody else's
        self._questions.append(question)
        self._settle()

    def heard(self, hand: Any, data: bytes) -> None:
        """This has come through a worker's pipe."""
        if hand.dump is None:
            return  # somebody else sent it the signal
        hand.dump += data
        del hand.dump[_LONGEST:]
        if _is_whole(hand.dump, hand.page.words[pages.THREAD]):
            text, hand.dump = bytes(hand.dump), None
            for question in self._questions:
                if question.waiting.pop(hand.worker, None) is not None:
                    _answer(question.rows[hand.worker], hand, text)
            self._settle()

    def ended(self, hand: Any) -> None:
        """A worker died."""
        for question in self._questions:
            if question.waiting.pop(hand.worker, None) is not None:
                question.rows[hand.worker]["stack"] = "(it has just died)"
        self._settle()

    def next_deadline(self) -> float | None:
        """When to stop waiting for the oldest question's answers."""
        return self._questions[0].until if self._questions else None

    def tick(self, now: float) -> None:
        """Answer the questions whose time is up with what has come."""
        for question in self._questions:
            if now < question.until:
                break
            for worker, hand in question.waiting.items():
                row = question.rows[worker]
                if is_stopped(hand.pid):
                    row["state"] = "stopped"
                if hand.dump:
                    _answer(row, hand, bytes(hand.dump))
                    hand.dump = None
                else:
                    row["stack"] = f"(it did not answer within {PATIENCE:g} s)"
            question.waiting.clear()
        self._settle()

    def _settle(self) -> None:
        """Answer the questions that wait for nobody any more."""
        ready = [question for question in self._questions if not question.waiting]
        self._questions = [question for question in self._questions if question.waiting]
        for question in ready:
            rows = list(question.rows.values())
            share = MOST_BYTES // max(1, len(rows))
            for row in rows:
                row["stack"] = shortened(row["stack"], share)
            question.done(rows)


def _answer(row: Row, hand: Any, dump: bytes) -> None:
    text = without_own_frames(dump.decode("utf-8", "replace").strip())
    if text.endswith(":"):  # nothing is left of the main thread
        busy = hand.page.busy()
        text += "\n  " + ("(in a function of C code)" if busy else "(it waits for a call)")
    row["answered"], row["stack"] = True, text


def _is_whole(dump: bytearray, thread: int) -> bool:
    """Whether a stack has come to its end."""
    if not dump.endswith(b"\n"):
        return False
    tail = bytes(dump[-4096:])
    if _CUT_SHORT.search(tail):
        return True
    begin = dump.rfind(b"hread 0x%016x" % thread)
    if begin < 0:
        return False
    return bool(_OUTERMOST.search(tail)) or dump.count(b"\n  File ", begin) >= _FRAMES


def shortened(text: str, limit: int) -> str:
    """Text without the lines in its middle if it is longer than so many characters."""
    if len(text) <= limit:
        return text
    half = max(0, limit - 40) // 2
    begin, end = text[:half].rpartition("\n")[0], text[len(text) - half :].partition("\n")[2]
    return f"{begin}\n  ... (shortened) ...\n{end}"


__all__ = ["Stacks", "shortened"]
