"""The Python stack of every worker, now: asked for by a signal, collected from pipes.

    session.stacks() --STACKS--> Stacks --signals--> workers
                     <--REPLY---        <--(pipes)--

A worker that is asleep (in a system call) writes its stack in the handler of one signal, in the
midst of whatever it was doing. One that is awake gets another signal first, at which it does so
between two steps of Python code; if it takes none within a moment, because it is busy in C code, it
gets the first one, too. (Why: see `worker.main`.) One that is stopped or still starting is not
asked; one that does not answer within a second (it blocks the signals, or the kernel is busy on its
behalf) is told as such. Nothing is waited for meanwhile.

How the end of a stack is known: faulthandler writes the oldest thread last, which is the main one,
and the outermost frame last, which is ours; or it stops at its hundredth frame or thread. Should a
future Python write it otherwise, the answer takes the whole second, and is there all the same.
"""

from __future__ import annotations

import contextlib
import os
import re

from whitepool_mp.manager.obituary import without_own_frames
from whitepool_mp.records import Record
from whitepool_mp.wire.pages import STACKS_NOW, STACKS_SOON, THREAD

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Row = dict[str, Any]
    Done = Callable[[list[Row]], None]

PATIENCE = 1.0
"""Seconds for which a worker's answer is waited for."""
POLITE = 0.2
"""Seconds for which one that is awake has time to come to its next step of Python code."""
MOST_BYTES = 700_000
"""Of all stacks together: they have to fit one frame, as JSON."""
_LONGEST = 1 << 20
"""Bytes of one stack that are read."""
_FRAMES = 100
"""How many frames of a thread faulthandler writes."""
_BEGIN = re.compile(rb"^(Current t|T)hread 0x", re.MULTILINE)
_OUTERMOST = re.compile(
    rb'/whitepool_mp/(manager|worker)/main\.py", line \d+ in main\n'
    rb'  File "<string>", line \d+ in <module>\n\Z'
)
_NO_MORE_FRAMES = re.compile(rb"\n  (\.\.\.|<truncated[^\n]*)\n\Z")
_NO_MORE_THREADS = b"\n...\n"


_STARTING = "(it is being started and cannot tell yet)"
_DEAD = "(it has just died)"
_CANNOT = (
    "(it cannot tell: there was no descriptor left for that when it was started, or it does "
    f"something else at signal {STACKS_NOW})"
)


class _Look(Record):
    """A process as the kernel describes it: state, and signals as bits."""

    state: str
    caught: int
    pending: int

    def catches(self, number: int) -> bool:
        """Whether it has a handler for a signal."""
        return bool(self.caught >> (number - 1) & 1)

    def waits(self, number: int) -> bool:
        """Whether a signal is still to be delivered."""
        return bool(self.pending >> (number - 1) & 1)


def _look(pid: int) -> _Look | None:
    """Look at an unreaped child; None if there is no descriptor to look with.

    Source: proc(5), /proc/pid/status.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
    except OSError:
        return None
    bits = {name: int(lines.get(name, b"0"), 16) for name in (b"SigCgt", b"SigPnd", b"ShdPnd")}
    state = lines[b"State"].split()[0].decode()
    return _Look(state, bits[b"SigCgt"], bits[b"SigPnd"] | bits[b"ShdPnd"])


def _send(pid: int, number: int) -> None:
    """Send a child a signal. It has not been reaped, so the process number is nobody else's."""
    with contextlib.suppress(PermissionError):  # it has become another user's
        os.kill(pid, number)


class _Question:
    """One `session.stacks()`."""

    __slots__ = ("begun", "done", "rows", "until", "waiting")

    def __init__(self, now: float, done: Done) -> None:
        self.begun: float | None = now  # None once nobody is asked politely any more
        self.until = now + PATIENCE
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
        question = _Question(self._clock(), done)
        for row, hand in asked:
            row["answered"] = False
            question.rows[hand.worker] = row
            row["stack"] = self._signal(row, hand)
            if not row["stack"]:
                question.waiting[hand.worker] = hand
        self._questions.append(question)
        self._settle()

    def _signal(self, row: Row, hand: Any) -> str:
        """Have a worker write its stack; or why it cannot."""
        looked = None if hand.pid is None else _look(hand.pid)
        if looked is None:
            return _STARTING if row["state"] == "booting" else "(it cannot be looked at)"
        if looked.state in "ZX":
            return _DEAD
        if looked.state in "tT":
            row["state"] = "stopped"
            return "(it is stopped, by SIGSTOP or a debugger)"
        if not (looked.catches(STACKS_NOW) and hand.page.words[THREAD]):
            # The signal would end it.
            return _STARTING if row["state"] == "booting" else _CANNOT
        if hand.dump is None:
            hand.dump = bytearray()
            awake = looked.state == "R" and looked.catches(STACKS_SOON)
            _send(hand.pid, STACKS_SOON if awake else STACKS_NOW)
        return ""

    def heard(self, hand: Any, data: bytes) -> None:
        """This has come through a worker's pipe."""
        if hand.dump is None:
            return  # somebody else sent it the signal
        hand.dump += data
        del hand.dump[_LONGEST:]
        if _is_whole(hand.dump, hand.page.words[THREAD]):
            text, hand.dump = bytes(hand.dump), None
            for question in self._questions:
                if question.waiting.pop(hand.worker, None) is not None:
                    _answer(question.rows[hand.worker], hand, text)
            self._settle()

    def ended(self, hand: Any) -> None:
        """A worker died."""
        for question in self._questions:
            if question.waiting.pop(hand.worker, None) is not None:
                question.rows[hand.worker]["stack"] = _DEAD
        self._settle()

    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        due = [
            each.until if each.begun is None else each.begun + POLITE for each in self._questions
        ]
        return min(due, default=None)

    def tick(self, now: float) -> None:
        """Insist, or answer the questions whose time is up with what has come."""
        for question in self._questions:
            if question.begun is not None and now >= question.begun + POLITE:
                question.begun = None
                self._insist(question)
            if now >= question.until:
                self._give_up(question)
        self._settle()

    def _insist(self, question: _Question) -> None:
        for hand in question.waiting.values():
            looked = None if hand.dump else _look(hand.pid)
            if looked is not None and not looked.waits(STACKS_NOW) and looked.catches(STACKS_NOW):
                _send(hand.pid, STACKS_NOW)

    def _give_up(self, question: _Question) -> None:
        for worker, hand in question.waiting.items():
            row = question.rows[worker]
            looked = _look(hand.pid)
            if looked is not None and looked.state in "tT":
                row["state"] = "stopped"
            if hand.dump:
                _answer(row, hand, bytes(hand.dump))
                hand.dump = None  # its end will not come
            else:
                row["stack"] = f"(it did not answer within {PATIENCE:g} s)"
        question.waiting.clear()

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
    begin = _BEGIN.search(dump)  # behind what is left of one that was for nobody
    if begin is not None:
        dump = dump[begin.start() :]
    text = without_own_frames(dump.decode("utf-8", "replace").strip())
    if text.endswith(":"):  # nothing is left of the main thread
        busy = hand.page.busy()
        text += "\n  " + ("(in a function of C code)" if busy else "(it waits for a call)")
    row["answered"], row["stack"] = True, text


def _is_whole(dump: bytearray, thread: int) -> bool:
    """Whether a stack has come to its end."""
    if not dump.endswith(b"\n"):
        return False
    if dump.endswith(_NO_MORE_THREADS):
        return True
    begin = dump.rfind(b"hread 0x%016x" % thread)
    if begin < 0:
        return False
    tail = bytes(dump[-4096:])
    if _OUTERMOST.search(tail) or _NO_MORE_FRAMES.search(tail):
        return True
    return dump.count(b"\n  File ", begin) >= _FRAMES


def shortened(text: str, limit: int) -> str:
    """Text without the lines in its middle if it is longer than so many characters."""
    if len(text) <= limit:
        return text
    half = max(0, limit - 40) // 2
    begin, end = text[:half].rpartition("\n")[0], text[len(text) - half :].partition("\n")[2]
    return f"{begin}\n  ... (shortened) ...\n{end}"


__all__ = ["Stacks", "shortened"]
