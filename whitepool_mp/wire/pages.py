"""The worker's page: a little memory that outlives it, shared with the manager and its holders.

    worker  --begun, calls, ended, quiet, answers-->  page  <--skip (holder), recalled (manager)--

It tells, at any moment and also after the worker's death, which call was begun last; and it takes
calls back that were sent and not begun. Both sides of that write their own number first and read
the other's after it; whoever takes back has the kernel order the two (`barrier`), so that a call is
either seen to have begun or is refused by the worker, or both, and never neither.

A worker that waits for calls, all that it began being answered, says so here as well. So a lease
that was taken back then is free at once, also if the worker will not run again (`recall`).

Answers that a worker has not sent yet, because more calls are waiting and one write for many is
cheaper, lie here too: they are not lost with it, and whoever does not want to wait reads them here.

Guarantees: each number is written and read whole (one aligned machine word).
"""

from __future__ import annotations

import mmap

from whitepool_mp.wire import barrier

NUMBERS = mmap.PAGESIZE
OUTBOX = 1 << 16
"""Bytes of answers that there is room for."""
SIZE = NUMBERS + OUTBOX
"""Bytes of all of it; a crash report may lie behind."""

BEGUN = 0
"""The token of the call begun last."""
CALLS = 1
"""How many calls were begun. While a call runs it differs from ENDED."""
ENDED = 2
"""How many calls have ended."""
RECALLED = 3
"""Calls under this lease, or an older one, are refused: it was taken back."""
ORDERED = 4
"""Whether the worker takes part in `barrier`."""
UNSENT = 5
"""How many bytes of answers lie here."""
SENDINGS = 6
"""How often the answers that lay here have been sent."""
FIRST = 7
"""If results of a BULK lie here: the number of the first call."""
RESULTS = 8
"""If they are pickled: how many of them lie here, above their bytes in the lower half."""
OWNER = 9
"""The lease whose calls these are the answers of."""
KIND = 10
"""What kind of results of a BULK lie here; 0 if none do."""
PICKLES = 1
INTEGERS = 2
FLOATS = 3
MARK = 11
"""If they are numbers: what lies behind the last of them."""
RSS = 12
"""The worker's resident memory in bytes, when it was ready and after each call that took long, or
with MAX_RSS after every one."""
THREAD = 13
"""By what number the worker's main thread is known in a stack, once it can be asked for one."""
PID = 14
"""The worker's process id, once it lives."""
READY = 15
"""Whether the worker has said READY."""
RETURNED = 16
"""The lease that its holder gave back last, written before the manager is told, ..."""
DESTROYED = 17
"""... or gave up as dirty: what a manager had not heard when it was killed, the next one reads."""
CHANNELS = 18
"""How many channels the worker was given."""
QUIET = 19
"""How many calls had begun when the worker last waited for one, with no answer unsent. While it has
begun none since, it differs neither from CALLS nor from ENDED."""
WORN = 20
"""Whether the worker has served for long enough, by one of these:"""
MAX_CALLS = 21
"""after how many calls it has, 0 for never, ..."""
MAX_RSS = 22
"""... and from how many bytes of resident memory. The manager writes both before the first call."""
ONCE = 23
"""The kept lease that its holder is to give back after what it has sent first: somebody waited for
it before its first call had begun."""
SLOTS = 240
"""How many channels have a place of their own. (The next one shares that of the first, which only a
client with a lease that ended so long ago could mistake for its own.)"""
_FIRST_SLOT = 32
"""Where they begin. A place is two numbers: calls with tokens above the first of them, up to the
second, were taken back, and the worker refuses them."""

STACKS_NOW = 59
"""At this signal a worker writes its stack into a pipe, whatever it is doing. It is SIGRTMAX - 5,
which is hardly anybody's, and so is the next one."""
STACKS_SOON = 60
"""At this one it does so between two steps of Python code."""

UNLIMITED = 1 << 62
"""How many calls are left where there is no limit."""

NUMBER_BITS = 24
NUMBER_MASK = (1 << NUMBER_BITS) - 1
_AHEAD = 1 << NUMBER_BITS - 1
"""Numbers of calls wrap. Fewer than this are in flight at once: what is further ahead is behind."""
LAST_LEASE = (1 << 64 - NUMBER_BITS) - 1
_WORD = (1 << 64) - 1


def token(lease: int, number: int) -> int:
    """What names a call: its lease and its number on the channel, in one word."""
    return (lease << NUMBER_BITS | number & NUMBER_MASK) & _WORD


def slot(channels: int) -> int:
    """The place, 1 to `SLOTS`, of the channel that is the so manieth of its worker."""
    return (channels - 1) % SLOTS + 1


def slot_words(place: int) -> int:
    """Where the two numbers of a place are."""
    return _FIRST_SLOT + 2 * (place - 1)


class Page:
    """One process's view of a worker's page.

    Args:
        fd: the memory file; it may be closed afterwards.
        size: how much of it to map: all, or with `NUMBERS` only the numbers.
        slot: in a client, the place of its channel.

    Raises:
        OSError: there is no descriptor or no memory left.
    """

    __slots__ = ("_map", "_skip", "outbox", "words")

    def __init__(self, fd: int, size: int = SIZE, slot: int = 1) -> None:
        self._skip = slot_words(slot)
        self._map = mmap.mmap(fd, size)
        view = memoryview(self._map)
        self.words = view[:NUMBERS].cast("Q")
        self.outbox = view[NUMBERS:]

    def began(self, lease: int, number: int) -> bool:
        """Whether the first call that was not answered has begun; also after the worker's death."""
        begun, call = self.words[BEGUN], token(lease, number)
        same = begun >> NUMBER_BITS == call >> NUMBER_BITS
        return same and begun - call & NUMBER_MASK < _AHEAD

    def busy(self) -> bool:
        """Whether a call is running."""
        words = self.words
        return words[CALLS] != words[ENDED]

    @property
    def ordered(self) -> bool:
        """Whether calls can be taken back."""
        return bool(self.words[ORDERED])

    @property
    def calls(self) -> int:
        """How many calls were begun."""
        return self.words[CALLS]

    @property
    def rss(self) -> int | None:
        """The worker's resident memory when it was last looked at, in bytes."""
        return self.words[RSS] or None

    @property
    def worn(self) -> bool:
        """Whether the worker has served for long enough, and is to be given back."""
        return bool(self.words[WORN])

    @property
    def left(self) -> int:
        """How many calls the worker may still begin, while none is on its way to it."""
        words = self.words
        return words[MAX_CALLS] - words[CALLS] if words[MAX_CALLS] else UNLIMITED

    def recall(self, lease: int) -> bool | None:
        """Take a lease back: no call under it begins from now on.

        A call that begins all the same has read RECALLED before it was written here. So the CALLS
        that it wrote first is seen here, and that is more than QUIET until it has been answered. (A
        call that is refused raises CALLS for a moment: then the worker is asked in vain.)

        Returns:
            Whether a call may be running. (Also where the kernel cannot put it in order.) None if
            the lease is free: all calls under it have been answered, and nothing was left unsent.
        """
        words = self.words
        words[RECALLED] = lease
        if not self._order():
            return True
        if words[QUIET] == words[CALLS] == words[ENDED]:
            return None
        return self.busy()

    def once(self, lease: int) -> bool:
        """Have the holder of a kept lease give it back after its first call, if that has not begun.

        A lease that is granted is good for one call: who asks for it again because it was taken
        back before that would have the next one's taken back, and so on. The holder reads ONCE
        after the answer to its first call, and so after that call's BEGUN. The worker's writes are
        ordered with this one, so if no call is seen to have begun the holder will see ONCE.

        Returns:
            Whether no call had begun. False where the kernel cannot put it in order, and for a
            lease that has been taken back; then `recall` is what is left.
        """
        words = self.words
        if words[BEGUN] >> NUMBER_BITS == lease or words[RECALLED] >= lease or not self.ordered:
            return False
        words[ONCE] = lease
        return self._order() and words[BEGUN] >> NUMBER_BITS != lease

    def due(self, lease: int) -> bool:
        """Whether the holder of a kept lease is to give it back when nothing runs under it: the
        worker is worn, or somebody waits for it (`once`)."""
        words = self.words
        return bool(words[WORN] or words[ONCE] == lease)

    def used(self, lease: int) -> bool:
        """Whether a call under this lease, or a later one, has begun. Before that the lease is not
        taken back, so who has no call to make gives it back."""
        return self.words[BEGUN] >> NUMBER_BITS >= lease

    def take_back(self, lease: int, after: int, to: int) -> int | None:
        """Take back the calls of a lease numbered `after` + 1 to `to`; those before that have been
        taken back must have been answered, or be among these.

        Returns:
            The number up to which they may have begun, at least `after`: one that was just
            beginning is answered all the same, be it with a refusal. None if the kernel cannot
            put the two sides in order; then nothing is taken back.
        """
        words = self.words
        if not self._order():
            return None
        first = token(lease, after)
        words[self._skip] = first
        words[self._skip + 1] = token(lease, to)
        self._order()
        return min(to, after + max(0, words[BEGUN] - first))

    def forget_taken(self) -> None:
        """No call is taken back any more: their numbers are about to be used again."""
        self.words[self._skip + 1] = self.words[self._skip] = 0

    def refuses(self, lease: int, number: int) -> bool:
        """Whether a call that was sent will never begin, since its lease has been taken back; or it
        has been answered, and another lease's has begun since."""
        return self.words[RECALLED] >= lease and self._order() and not self.began(lease, number)

    def is_recalled(self, lease: int) -> bool:
        """Whether a lease has been taken back."""
        return self.words[RECALLED] >= lease

    @property
    def sendings(self) -> int:
        """How often answers that lay here have been sent."""
        return self.words[SENDINGS]

    def unsent(self, lease: int) -> bytes:
        """The answers to calls under a lease that lie here; nothing if they were sent while this
        looked."""
        words = self.words
        sendings = words[SENDINGS]
        self._order()
        data = bytes(self.outbox[: words[UNSENT]])
        owner = words[OWNER]
        self._order()
        return data if words[SENDINGS] == sendings and owner == lease else b""

    def results(self, lease: int) -> tuple[int, int, int, bytes] | None:
        """The results of a BULK under a lease that lie here: the first one's number, how many, of
        what kind, and their bytes."""
        words = self.words
        sendings = words[SENDINGS]
        self._order()
        first = words[FIRST]
        kind = words[KIND]  # in this order: it is nothing while the other one changes
        if kind == PICKLES:
            count, end = divmod(words[RESULTS], 1 << 32)
            data = bytes(self.outbox[:end])
        else:
            data = bytes(self.outbox)
        mark, owner = words[MARK], words[OWNER]
        self._order()
        if not kind or owner != lease or words[SENDINGS] != sendings:
            return None
        if kind != PICKLES:
            try:
                count = memoryview(data).cast("Q").tolist().index(mark)
            except ValueError:  # something in the worker wrote over it
                return None
            data = data[: 8 * count]
        return (first, count, kind, data) if count else None

    def order_me(self) -> None:
        """In the worker: have the kernel order its reads and writes when others ask for it."""
        self.words[ORDERED] = barrier.register()

    def _order(self) -> bool:
        """Order this process's accesses before and after this with those of the worker."""
        return self.ordered and barrier.issue()

    def close(self) -> None:
        """Unmap it here."""
        self.words.release()
        self.outbox.release()
        self._map.close()
