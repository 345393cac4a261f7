"""How workers are started: what they are given, and the nursery that is told to fork them.

    Manager --spawn--> Births --SPAWN--> nursery --fork--> worker
                          ^-----BORN--------'

The lower half of a `Crew`, which adds what becomes of a worker once it lives.
"""

from __future__ import annotations

import functools
import os
from collections import deque

from whitepool_mp.manager.hand import Hand, Listener, kill
from whitepool_mp.manager.loop import READ, WRITE, Loop
from whitepool_mp.manager.relay import Relay
from whitepool_mp.wire import pages
from whitepool_mp.wire.boot import Boot
from whitepool_mp.wire.kit import Kit
from whitepool_mp.worker import nursery as nurseries

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

    from whitepool_mp.wire.descriptors import Socket
    from whitepool_mp.wire.escrow import Escrow
else:
    import _signal as signal  # as in `worker.linux`


_BIRTHS = nurseries.BORN_KIND, nurseries.UNBORN_KIND


class Births:
    """The nursery, and the workers as far as their birth.

    Args:
        boot: what the pool's processes are told.
        loop: where descriptors are waited for.
        listener: who is told.
        clock: the monotonic clock, in seconds.
        lifeline: the read end of the pipe whose end-of-file tells everyone that the owner is gone.
        escrow: where copies of the descriptors are kept for the next manager.
        start_timeout: how long a worker may take to be born and ready, in seconds.
        nursery: the first nursery, already forked: its pid and this process's end to it.
        first: of a worker that is on its way already: what it was given, and the pid if it is born.
    """

    def __init__(
        self,
        boot: Boot,
        loop: Loop,
        listener: Listener,
        clock: Callable[[], float],
        lifeline: int,
        escrow: Escrow,
        start_timeout: float,
        nursery: tuple[int, Socket],
        first: tuple[Kit, int | None] | None,
    ) -> None:
        self._boot = boot
        self._loop = loop
        self._listener = listener
        self._clock = clock
        self._lifeline = lifeline
        self._escrow = escrow
        self._start_timeout = start_timeout
        self._hands: dict[int, Hand] = {}
        self._by_pid: dict[int, Hand] = {}
        self._nursery_pid: int | None = None
        self._nursery: Socket | None = None
        self._nursery_word = ""  # why it gave up, if it said so
        self._nursery_fate = ""
        self._first = first
        self._unborn: dict[int, Hand] = {}
        self._orders: deque[tuple[int, int, Kit]] = deque()
        self.relay = Relay(loop, clock)
        self._take_nursery(*nursery)

    def hand(self, worker: int) -> Hand | None:
        """The process of a worker, or None when there is none (any more)."""
        return self._hands.get(worker)

    def __len__(self) -> int:
        return len(self._hands)

    def spawn(self, worker: int, slot: int, max_calls: int, max_rss: int) -> str | None:
        """Order a new worker.

        Args:
            worker, slot, max_calls, max_rss: as the broker's `Spawn` says.

        Returns:
            None, or why there cannot be one now (no descriptors or no processes left).
        """
        first, self._first = self._first, None
        kit = pid = None
        try:
            if first is not None and (worker, slot) == nurseries.FIRST:
                kit, pid = first  # it is on its way
            else:
                if self._nursery is None:
                    forked = nurseries.fork(self._boot, self._lifeline, self._escrow)
                    self._take_nursery(*forked)
                kit = Kit(self._boot.stock)
                self._escrow.park(worker, kit.kept())
            kit.control.setblocking(False)
            hand = Hand(worker, slot, kit.control, kit.page, self._clock(), kit.stderr, kit.stacks)
        except OSError as error:
            if kit is not None:
                self._escrow.drop(worker)
                kit.close()
            return f"the manager cannot start a worker: {type(error).__name__}: {error}"
        hand.page.words[pages.MAX_CALLS] = max_calls
        hand.page.words[pages.MAX_RSS] = max_rss
        self._hands[worker] = self._unborn[worker] = hand
        self.relay.add(hand)
        if kit.given:
            self._orders.append((worker, slot, kit))
            self._send_orders()
        elif pid is not None:
            self._born(hand, pid)
        return None

    def _end_stuck_nursery(self, late: bool) -> None:
        """Nobody wants what the nursery has yet to fork, or it does not come to it (in a preload,
        or stopped). Its end tells all that were ordered from it; the next order starts another."""
        if self._nursery_pid is None:
            return
        if late:
            self._nursery_word = (
                f"the nursery did not start a worker within {self._start_timeout:g} s "
                f"(preload={list(self._boot.preload)!r})"
            )
        os.kill(self._nursery_pid, signal.SIGKILL)

    def _take_nursery(self, pid: int, sock: Socket) -> None:
        sock.setblocking(False)
        self._nursery, self._nursery_pid, self._nursery_word = sock, pid, ""
        self._nursery_fate = "the nursery, which starts the workers, died"
        self._loop.add(sock.fileno(), self._hear_nursery)

    def _send_orders(self) -> None:
        nursery = self._nursery
        if nursery is None:
            return
        while self._orders:
            order = self._orders[0]
            try:
                nurseries.order(nursery, *order)
            except BlockingIOError:
                self._loop.change(nursery.fileno(), READ | WRITE)
                return
            except OSError:
                break  # it is gone; its end-of-file, read in a moment, says so to all who wait
            self._orders.popleft()
            order[2].give()
        self._loop.change(nursery.fileno(), READ)

    def _hear_nursery(self, events: int) -> None:
        if events & WRITE:
            self._send_orders()
        if events & ~WRITE:
            self._read_nursery()

    def _read_nursery(self) -> None:
        nursery = self._nursery
        while nursery is not None:
            try:
                data = nursery.recv(65536)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # said once: it ended with orders unread; its last words come next
            except OSError:
                data = b""
            if not data:
                self._lose_nursery()
                return
            if data[0] == nurseries.BROKEN_KIND:
                self._nursery_word = data[1:].decode("utf-8", "replace")
                continue
            if data[0] not in _BIRTHS or len(data) < nurseries.BORN.size:
                # Code that it preloaded wrote to a socket not its own.
                self._nursery_fate = "the nursery, which starts the workers, sent nonsense"
                if self._nursery_pid is not None:
                    os.kill(self._nursery_pid, signal.SIGKILL)
                continue
            kind, worker, pid = nurseries.BORN.unpack_from(data)
            hand = self._unborn.get(worker)
            if hand is None:
                continue
            if kind == nurseries.UNBORN_KIND:
                text = data[nurseries.BORN.size :].decode("utf-8", "replace")
                self._bury(hand, None, None, f"no process could be started: {text}")
                continue
            self._born(hand, pid)

    def _born(self, hand: Hand, pid: int) -> None:
        del self._unborn[hand.worker]
        hand.pid = pid
        self._by_pid[pid] = hand
        self._listener.worker_born(hand.worker, pid)
        # Not listened to before: a quick worker's READY can overtake the news of its birth.
        self._loop.add(hand.control.fileno(), functools.partial(self._heard, hand))
        if hand.stacks is not None:
            self._loop.add(hand.stacks, functools.partial(self._heard_stack, hand))
        if hand.kill_reason is not None:
            kill(hand)

    def _lose_nursery(self) -> None:
        assert self._nursery is not None
        self._loop.remove(self._nursery.fileno())
        self._nursery.close()
        self._nursery = None
        while self._orders:
            self._orders.popleft()[2].give()
        told = self._nursery_word
        for hand in list(self._unborn.values()):
            if hand.inherited:
                continue  # it is another nursery's
            if told:
                self._listener.worker_failed(hand.worker, told)
            self._bury(hand, None, None, told or self._nursery_fate)

    # --- what a `Crew` adds ---------------------------------------------------------------

    def _heard(self, hand: Hand, events: int) -> None:
        raise NotImplementedError

    def _heard_stack(self, hand: Hand, events: int) -> None:
        raise NotImplementedError

    def _bury(self, hand: Hand, exitcode: int | None, peak: int | None, why: str = "") -> None:
        raise NotImplementedError
