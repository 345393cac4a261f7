"""A worker held by this process, in blocking code: what a `Lease` and `Session.run` have in hand.

    granted --exchange, exchange, ...--> released | abandoned | lost | recalled

A hold that the manager lets `run` keep stays with the process between calls (`Member.kept`), until
a call finds that it was recalled, or the worker dead: neither of these calls had begun.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from whitepool_mp.client.channel import Channel
from whitepool_mp.client.joining import LinkBroken, TimedOut
from whitepool_mp.client.link import ChannelBroken, Link
from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import frames, pages
from whitepool_mp.wire.messages import Message

if TYPE_CHECKING:
    from whitepool_mp.client.member import Member

_WHY_SECONDS = 10.0
RECALLED = "recalled"
"""How a kept hold ended that the pool wanted back."""
FORGOTTEN = "forgotten, and so checked in"
"""How a hold ended that was collected."""


class Hold:
    """A leased worker and the way to it. One call at a time; used by one thread at a time.

    Attributes:
        ended: how it ended, None while it is good.
        told: whether the manager knows that it has ended.
        keep: whether it may be kept between calls, and may be recalled then.
        returned: whether it ended by being given back; otherwise its worker is gone.
    """

    __slots__ = (
        "channel",
        "ended",
        "id",
        "keep",
        "link",
        "number",
        "pid",
        "process",
        "returned",
        "slot",
        "told",
        "worker",
    )

    def __init__(self, link: Link, grant: frames.Grant) -> None:
        self.told = False
        self.ended: str | None = None
        self.returned = False
        self.process = os.getpid()
        self.link = link
        _, self.id, self.worker, self.pid, self.slot, self.keep = grant
        link.holds.add(self.id)
        self.number = 0
        self.channel: Channel | None = None

    def exchange(
        self,
        member: Member,
        kind: int,
        flags: int,
        data: bytes,
        buffers: Sequence[Any],
        deadline: float | None,
    ) -> Message:
        """Send a request and wait for its answer.

        Raises:
            TimedOut, ChannelBroken, LinkBroken, LeaseError: there is none; whoever calls ends the
                hold.
        """
        self.number = number = (self.number + 1) & 0xFFFF_FFFF
        channel = self.channel
        if channel is None:
            channel = self.channel = member.channel(self.worker, self.id, deadline)
        message = channel.exchange(kind, flags, number, self.id, data, buffers, deadline)
        if message.number != number:
            raise ChannelBroken
        return message

    def began(self) -> bool:
        """Whether the worker had begun the last call, also after its death."""
        return self.channel is not None and self.channel.began(self.id, self.number)

    def release(self, member: Member | None, how: str = "checked in") -> None:
        """Give the worker back; and the channel, if the pool's member here is still there."""
        self.ended = how
        self.returned = True
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.note(pages.RETURNED, self.id)
        if member is not None:
            member.return_channel(self.worker, channel)
        self._tell_manager(frames.checkin(self.id))
        self.told = True
        if channel is None and member is not None:
            # There is no page to write it on, for the manager after one that dies over it.
            member.make_sure(self.link)
        self._over()

    def abandon(self, how: str, reason: str, member: Member | None = None) -> None:
        """Have the worker killed; the hold and its channel are over.

        Args:
            how, reason: as the lease and the worker's obituary will tell.
            member: of whoever can wait until it has been heard, if there is no page to note it on.
        """
        self.ended = how
        noted = self.channel is not None
        self.drop_channel()
        self._tell_manager(frames.destroy(self.id, reason))
        self.told = True
        if not noted and member is not None:
            member.make_sure(self.link)
        self._over()

    def drop_channel(self) -> None:
        """Close the channel to a worker that is dead or was given up."""
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.note(pages.DESTROYED, self.id)
            channel.close()

    def interrupt(self, reason: str) -> None:
        """Have the worker killed under another thread's call, which finds its channel ended."""
        self.ended = f"ended ({reason})"
        channel = self.channel
        if channel is not None:
            channel.note(pages.DESTROYED, self.id)
        self._tell_manager(frames.destroy(self.id, reason))
        self._over()
        if channel is not None:
            channel.hang_up()

    def is_recalled(self) -> bool:
        """Whether the pool is known to have taken the worker back."""
        channel = self.channel
        return channel is not None and channel.page.words[pages.RECALLED] >= self.id

    def is_due(self) -> bool:
        """Whether the worker is to be given back after a call, and not to be kept."""
        channel = self.channel
        if channel is None:
            return False
        words = channel.page.words
        return words[pages.WORN] != 0 or words[pages.ONCE] == self.id

    def recalled(self) -> Channel | None:
        """The pool has taken the worker back; the channel is of use to the next lease."""
        self.ended = RECALLED
        self._over()
        channel, self.channel = self.channel, None
        return channel

    def refused(self, known: bool) -> bool:
        """Whether the pool has taken the worker back, and will not begin the last call; then the
        hold is over, and its channel, in which that call lies.

        Args:
            known: whether that was found out already. (A worker that comes to refuse it says for a
                moment that it begins.)
        """
        channel = self.channel
        if channel is None or not (known or channel.page.refuses(self.id, self.number)):
            return False
        self.recalled()
        channel.close()
        return True

    def lose(self) -> None:
        """The channel broke before a call began: nothing is lost but the worker."""
        self.abandon("lost (its worker died)", "its channel broke")

    def autopsy(self, member: Member) -> dict[str, Any] | WhitepoolError | None:
        """The channel broke: what the manager tells of the worker's end; the hold is over.

        Returns:
            The obituary, None if the manager knows nothing, or why there is nobody to ask.
        """
        self.drop_channel()
        self.ended = "lost (its worker died)"
        try:
            deadline = time.monotonic() + _WHY_SECONDS
            with member.link(deadline) as link:
                told: dict[str, Any] | None = link.why(self.id, deadline)
                return told
        except (LinkBroken, WhitepoolError):
            return member.gone()
        except TimedOut:
            self._tell_manager(frames.destroy(self.id, "its channel broke"))
            return None
        finally:
            self._over()

    def _over(self) -> None:
        """The manager knows that it has ended: the link that it was granted on may be closed."""
        self.told = True
        self.link.ended(self.id)

    def _tell_manager(self, data: bytes) -> None:
        try:
            self.link.say(data)
        except (LinkBroken, TimedOut):
            return  # the pool is gone, and every worker with it; or it will be said again

    def __del__(self) -> None:
        # Kept by a session that is gone, or an interrupt came between getting it and using it. (A
        # copy in a forked child is nobody's to end.)
        if not hasattr(self, "channel") or self.process != os.getpid():
            return
        if self.told:
            self.link.ended(self.id)  # an interrupt may have come just before that
        elif self.ended is None:
            self.release(None, FORGOTTEN)
        else:
            self._tell_manager(frames.destroy(self.id, "its end was interrupted"))
            self._over()
