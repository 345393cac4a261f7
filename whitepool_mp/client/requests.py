"""What an engine asks of the manager, without waiting for any of it.

    asyncio, Dispatcher --checkout, checkin...--> _outbox --Engine.flush--> manager
                        <--done, heard, told----- _replies <--Engine.pump--

The part of an engine that stands between who asks and the control connection. It reads and writes
nothing itself: requests are numbered and lie in `_outbox` until the engine can send them, and the
engine looks in `_replies` for who waits for an answer.

Guarantees: whoever waits for an answer hears once, of it or of the pool's end. When a checkout is
given up, who gave it up hears of it instead of who asked. Should the manager be killed, all that it
may not have heard is said again to the next one (`unheard`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.engine_lease import RETURNED, EngineLease
from whitepool_mp.client.unheard import Unheard
from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import frames

if TYPE_CHECKING:
    from whitepool_mp.client.dispatch import Dispatcher

Done = Callable[[Any], None]
"""Called once with the result, or with an exception object."""

TicketHeard = Callable[[int, "frames.Grant | None", "frames.Refused | None"], None]
"""Called once with a ticket and its grant or refusal; with neither if the manager is gone."""


class Requests:
    """What was asked of the manager: what is still to be sent, and who waits for an answer.

    Attributes:
        jobs: the engine's dispatcher, which hears first that a worker was granted anew.
        broken: why nothing can be asked any more, None while the manager is there.
    """

    jobs: Dispatcher

    def __init__(self) -> None:
        self._outbox = bytearray()
        self._numbers = itertools.count(1)
        self._replies: dict[int, Callable[[bytes], None]] = {}  # an empty one: it is gone
        self._unheard = Unheard()
        self._asked, self._said = self._unheard.asked, self._unheard.said
        self.broken: WhitepoolError | None = None

    # --- of the pool ----------------------------------------------------------------------

    def request(self, kind: int, done: Done) -> None:
        """A request without fields; `done` gets its JSON answer."""
        number = next(self._numbers)
        self._ask(
            number, frames.request(kind, number), lambda body: done(frames.read_reply(body)), done
        )

    def resize(self, pool_size: int, max_overflow: int, done: Done) -> None:
        """Ask for other sizes."""
        number = next(self._numbers)
        data = frames.resize(number, pool_size, max_overflow)
        self._ask(number, data, lambda body: done(frames.read_reply(body)), done)

    # --- of workers -----------------------------------------------------------------------

    def checkout(self, block: bool, deadline: float | None, site: str, done: Done) -> int:
        """Ask for a worker; `done` gets an `EngineLease`, a `Refused` or an exception.

        Returns:
            The ticket, for `cancel_checkout`.
        """
        number = next(self._numbers)

        def answer(body: bytes) -> None:
            if body[0] == frames.GRANT:
                grant = frames.read_grant(body)
                self.jobs.superseded(grant.worker)
                done(EngineLease(grant, manual=True))
            else:
                done(frames.read_refused(body))

        data = frames.checkout(number, block, deadline, site, asked=time.monotonic())
        self._ask(number, data, answer, done)
        return number

    def ask_for_worker(self, site: str, heard: TicketHeard) -> int:
        """Ask for a worker to run jobs on; the ticket."""
        number = next(self._numbers)

        def answer(body: bytes) -> None:
            if not body:
                heard(number, None, None)
            elif body[0] == frames.GRANT:
                heard(number, frames.read_grant(body), None)
            else:
                heard(number, None, frames.read_refused(body))

        now = time.monotonic()
        data = frames.checkout(number, True, None, site, keep=True, spare_own=True, asked=now)
        self._send(number, data, answer)
        return number

    def cancel_checkout(self, ticket: int, done: Done | None) -> None:
        """Give a checkout up: `done` gets the `Refused` for it; a grant under way is void."""

        def answer(body: bytes) -> None:
            if not body:
                if done is not None:
                    done(self.broken)
            elif body[0] == frames.GRANT:
                # It crossed the cancel; the refusal follows.
                self._replies[ticket] = answer
                self._asked[ticket] = frames.request(frames.CANCEL, ticket)
            elif done is not None:
                done(frames.read_refused(body))

        if self.broken is None:
            self._send(ticket, frames.request(frames.CANCEL, ticket), answer)

    def checkin(self, lease: EngineLease) -> None:
        """Give a worker back."""
        if lease.ended is None:
            lease.ended = RETURNED
            lease.note_returned()
            if lease.channel is not None:
                lease.channel.lease = None
            self._say(frames.checkin(lease.id))

    def say_destroyed(self, lease: EngineLease, reason: str) -> None:
        """Have the manager kill and replace a leased worker."""
        self._say(frames.destroy(lease.id, reason))

    def ask_why(self, lease: EngineLease, told: Callable[[object], None]) -> None:
        """Ask how the worker of a lease ended; `told` gets the obituary, None or an error."""
        number = next(self._numbers)
        data = frames.request_lease(frames.WHY, number, lease.id)
        self._ask(number, data, lambda body: told(frames.read_reply(body)), told)

    # --- how they are asked ---------------------------------------------------------------

    def _ask(self, number: int, data: bytes, answer: Callable[[bytes], None], done: Done) -> None:
        if self.broken is not None:
            done(self.broken)
            return

        def heard(body: bytes) -> None:
            if not body:
                assert self.broken is not None
                done(self.broken)
            else:
                answer(body)

        self._send(number, data, heard)

    def _send(self, number: int, data: bytes, heard: Callable[[bytes], None]) -> None:
        """Send a request; `heard` gets the body of its answer."""
        self._replies[number] = heard
        self._asked[number] = data
        self._outbox += data

    def _say(self, data: bytes) -> None:
        """Send what has no answer."""
        self._said.append((next(self._numbers), data))
        self._outbox += data

    def _answered(self, body: bytes) -> Callable[[bytes], None] | None:
        """An answer came: who waits for it."""
        number = frames.read_request(body)
        self._asked.pop(number, None)
        if self._said:
            self._unheard.answered(number)
        return self._replies.pop(number, None)

    def _again(self) -> None:
        """There is another manager: say to it what the last one may not have heard."""
        said, asked = self._unheard.again()
        self._outbox[:] = b"".join([*said, *asked])
