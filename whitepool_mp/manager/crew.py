"""The worker processes: starting them, hearing from them, killing them, learning how they ended.

    Manager --spawn, retire, kill, adopt--> Crew --SPAWN--> nursery --fork--> worker
            <--ready, failed, exited-------      <------READY, FAILED, exit status---

Every worker is a child of this process (see the nursery), so its pid cannot be another's before it
is reaped here, and its exit status and peak memory come with its death: SIGCHLD wakes the loop
through a descriptor. A worker is the leader of a process group, which is killed before the leader
is reaped. What a worker's descendants leave behind, also while it lives, becomes a child of this
process, which reaps it when it ends. Its `lineage` tells which worker it came from: when that has
died it is killed too (`_sweep`), so nothing escapes by detaching itself.

Workers of a manager that was killed are taken over (`take_over`). They are nobody's children here:
a pidfd tells of their death (`kin`), and what they leave behind is found by its marker.

Nothing here decides: what becomes of a worker is the broker's affair.
"""

from __future__ import annotations

import contextlib
import functools
import os

from whitepool_mp.errors import ProtocolError
from whitepool_mp.manager import children, kin
from whitepool_mp.manager.births import Births
from whitepool_mp.manager.hand import Hand, kill, kill_group
from whitepool_mp.manager.obituary import Obituary, OomKills, is_exiting, read_stack
from whitepool_mp.manager.relay import last_lines
from whitepool_mp.wire import descriptors, frames, marked, pages
from whitepool_mp.wire.descriptors import Socket

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any, Protocol

    from whitepool_mp.manager.books import Process
    from whitepool_mp.manager.hand import Listener
    from whitepool_mp.manager.loop import Loop
    from whitepool_mp.wire.boot import Boot
    from whitepool_mp.wire.escrow import Escrow
    from whitepool_mp.wire.kit import Kit
else:
    import _signal as signal  # as in `worker.linux`

    Protocol = object


class Crew(Births):
    """Every worker process of the pool, and the nursery they come from.

    Args:
        boot, loop, listener, clock, lifeline, escrow, start_timeout, nursery, first: as for
            `Births`.
        follows: whether there was a manager before this one, which may have left processes that are
            not this one's children.
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
        *,
        follows: bool,
    ) -> None:
        super().__init__(
            boot, loop, listener, clock, lifeline, escrow, start_timeout, nursery, first
        )
        self._oom = OomKills(self._clock)
        self._stacks: Any = None  # a `Stacks`, made when it is first wanted
        self._sweep_due = False
        self._follows = follows
        self._marked_due = False  # whether to sweep by the marker, when all births are known
        # Open from the start: there may be no descriptor to spare when it is wanted.
        self._children_fd = children.open_list()

    # --- what the manager asks ------------------------------------------------------------

    def retire(self, worker: int) -> None:
        """Ask for a clean stop."""
        hand = self._hands.get(worker)
        if hand is not None:
            self._tell(hand, frames.plain(frames.RETIRE))

    def adopt(self, worker: int, channel: Socket) -> int:
        """Hand a worker its end of a new channel.

        Returns:
            The channel's place on the worker's page, or 0 if that could not be done.
        """
        hand = self._hands.get(worker)
        if hand is None:
            return 0
        hand.channels += 1
        hand.page.words[pages.CHANNELS] = hand.channels
        place = pages.slot(hand.channels)
        return place if self._tell(hand, frames.adopt(place), channel) else 0

    def kill(self, worker: int, reason: str | None) -> None:
        """Kill a worker and its process group, now.

        Args:
            worker: which.
            reason: why, for its obituary; None when it is thought to be dying anyway.
        """
        hand = self._hands.get(worker)
        if hand is None:
            return
        hand.kill_reason = hand.kill_reason or reason
        if hand.pid is not None:
            kill(hand)
            return
        if hand.inherited:
            self._look_for(hand)
            if hand.pid is not None:
                kill(hand)
                return
            # Nobody knows its pid yet. Without this socket it ends by itself, if it is ever born.
            self._bury(hand, None, None)
            return
        late = self._clock() - hand.born >= self._start_timeout
        if late or all(other.kill_reason for other in self._unborn.values() if not other.inherited):
            self._end_stuck_nursery(late)

    def recall(self, worker: int, lease: int, patient: bool) -> bool | None:
        """Take a lease back through its worker, which says RELEASED when no call under it runs.

        One that waits for calls is not asked, since it may be stopped: its page is enough.

        Args:
            worker, lease: whose, and which.
            patient: let it do first what it has been sent.

        Returns:
            Whether a call may be running now, or has been sent; None if the lease is free already.
        """
        hand = self._hands.get(worker)
        if hand is None:
            return False
        # What has been sent and has not begun is not on the page.
        busy = True if patient else hand.page.recall(lease)
        if busy is not None:
            self._tell(hand, frames.recall(lease, patient))
        return busy

    # --- what they say of themselves ------------------------------------------------------

    def ask_stacks(
        self, rows: dict[int, dict[str, Any]], done: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        """Ask workers for their stacks.

        Args:
            rows: what else is to be told of each, by worker.
            done: gets these with the stacks, in a second at the latest; see `manager.stacks`.
        """
        if self._stacks is None:
            from whitepool_mp.manager.stacks import Stacks

            self._stacks = Stacks(self._clock)
        hands = self._hands
        self._stacks.ask([(row, hands[each]) for each, row in rows.items() if each in hands], done)

    def _heard_stack(self, hand: Hand, _: int) -> None:
        assert hand.stacks is not None
        try:
            data = os.read(hand.stacks, 1 << 16)
        except BlockingIOError:
            return
        if not data:  # it has closed its end
            self._loop.remove(hand.stacks)
        elif self._stacks is not None:  # otherwise somebody else sent the signal
            self._stacks.heard(hand, data)

    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        stacks = None if self._stacks is None else self._stacks.next_deadline()
        relay = self.relay.next_deadline()
        return min((when for when in (stacks, relay) if when is not None), default=None)

    def tick(self, now: float) -> None:
        """Stop waiting for stacks that do not come, and for a reader of standard error who takes
        nothing; and sweep, if that had to wait."""
        self.relay.tick(now)
        if self._marked_due:
            self.sweep_marked()
        if self._stacks is not None:
            self._stacks.tick(now)

    @property
    def counters(self) -> dict[str, int]:
        """What happened so far, by name."""
        return {"stderr_bytes_dropped": self.relay.dropped}

    # --- deaths ---------------------------------------------------------------------------

    def reap(self) -> None:
        """A child died (SIGCHLD came): find out who, tell how, and sweep up what they left."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                found = None
            if found is None:
                break
            self._reap_one(found.si_pid)
        if self._sweep_due:
            self._sweep_due = False
            self._sweep()

    def _reap_one(self, pid: int) -> None:
        hand = self._by_pid.get(pid)
        if hand is None and pid != self._nursery_pid:
            self._read_nursery()  # its birth may be announced and not yet read
            hand = self._by_pid.get(pid)
        if hand is None:
            if pid == self._nursery_pid:
                # What it (or a middleman of its) said last is still to be read, up to end-of-file.
                self._nursery_pid = None
            # Of a dead worker's there may be more: that one's children are this process's now.
            self._sweep_due = self._sweep_due or not self._is_living(pid)
            os.waitpid(pid, 0)
            return
        # Not reaped yet, so neither the pid nor the group can be anybody else's.
        kill_group(pid)
        self._hear(hand)
        oom_killed = self._oom.look() if self._oom.covers(pid) else None
        _, status, usage = os.wait4(pid, 0)
        del self._by_pid[pid]
        self._sweep_due = True
        exitcode = os.waitstatus_to_exitcode(status)
        if exitcode != -signal.SIGKILL or hand.kill_reason is not None:
            oom_killed = None
        self._bury(hand, exitcode, usage.ru_maxrss * 1024, oom_killed=oom_killed)

    def _bury(
        self,
        hand: Hand,
        exitcode: int | None,
        peak: int | None,
        why: str = "",
        oom_killed: bool | None = None,
    ) -> None:
        self._hands.pop(hand.worker, None)
        self._unborn.pop(hand.worker, None)
        self._escrow.drop(hand.worker)
        self.relay.end(hand)
        obituary = Obituary(
            pid=hand.pid,
            slot=hand.slot,
            exitcode=exitcode,
            age=self._clock() - hand.born,
            peak_rss=peak,
            calls=hand.page.calls,
            stack=read_stack(hand.page_fd),
            reason=why or (hand.kill_reason if exitcode in (None, -signal.SIGKILL) else None),
            rss=hand.page.rss,
            stderr=last_lines(hand.said),
            oom_killed=oom_killed,
            running=hand.page.busy(),
        )
        self._drop_control(hand)
        if hand.stacks is not None:
            self._loop.remove(hand.stacks)
            os.close(hand.stacks)
            hand.stacks = None
        if self._stacks is not None:
            self._stacks.ended(hand)
        hand.close()
        self._listener.worker_exited(hand.worker, obituary)

    def _sweep(self, last: bool = False) -> int:
        """Kill what dead workers left: children of ours that are neither worker nor nursery, and
        that no living one's descendants left to us.

        A pool that ran inside a dead worker ends by itself, since its owner is dead, and tidies up.
        It is killed only at the end (`last`).

        Returns:
            How many there were.
        """
        pids = children.pids(self._children_fd)
        self._read_nursery()  # a worker may have been born while we looked
        known = {*self._by_pid, self._nursery_pid}
        strays = [pid for pid in pids if pid not in known and (last or not self._is_living(pid))]
        children.kill(strays, None if last else self._boot.pool_id)
        return len(strays)

    def _is_living(self, pid: int) -> bool:
        """Whether a process, or zombie, descends from a living worker or the nursery."""
        nursery = self._nursery_pid is not None
        return children.descends(pid, self._hands, self._by_pid, nursery)

    # --- those of another manager ---------------------------------------------------------

    def take_over(
        self,
        process: Process,
        control_fd: int,
        page_fd: int,
        stderr: int | None = None,
        stacks: int | None = None,
    ) -> None:
        """Have charge of a worker that another manager started; `resume` will look after it.

        Args:
            process: what is known of it.
            control_fd, page_fd, stderr, stacks: this process's copies; owned from here on.

        Raises:
            OSError: no descriptor or no memory is left; all of that is closed.
        """
        worker, slot = process.worker, process.slot
        with contextlib.ExitStack() as undo:
            for fd in (stderr, stacks):
                if fd is not None:
                    undo.callback(os.close, fd)
            control = undo.enter_context(Socket(fileno=control_fd))
            control.setblocking(False)
            try:
                hand = Hand(worker, slot, control, page_fd, process.born, stderr, stacks)
            except OSError:
                os.close(page_fd)
                raise
            undo.callback(hand.close)
            hand.inherited = True
            hand.channels = hand.page.words[pages.CHANNELS]
            pid = process.pid or hand.page.words[pages.PID]
            self._hands[worker] = self._unborn[worker] = hand
            undo.callback(self._unborn.pop, worker, None)
            undo.callback(self._hands.pop, worker, None)
            if pid:
                self._identify(hand, pid, process.started or kin.started(pid) or 0)
            undo.pop_all()

    def give_up(self, process: Process) -> None:
        """Kill a worker that another manager started and that cannot be taken over."""
        if process.pid:
            with contextlib.suppress(OSError):  # no descriptor: `sweep_marked` finds it
                pidfd = kin.hold(process.pid, process.started)
                if pidfd is not None:
                    kin.kill_group(process.pid, pidfd)
                    os.close(pidfd)

    def resume(self, worker: int) -> None:
        """Hear what a worker that was taken over has said meanwhile, or how it ended."""
        hand = self._hands.get(worker)
        if hand is None:
            return
        if hand.pid is not None and hand.pidfd < 0:
            self._hear(hand)
            if worker in self._hands:
                self._bury(hand, None, None)
            return
        if hand.control.fileno() >= 0:
            self._loop.add(hand.control.fileno(), functools.partial(self._heard, hand))
            self._hear(hand)
        if worker in self._hands:
            self.relay.add(hand)
            if hand.stacks is not None:
                self._loop.add(hand.stacks, functools.partial(self._heard_stack, hand))

    def _identify(self, hand: Hand, pid: int, created: int) -> None:
        """The process of a worker that was taken over is found out, or that it has ended."""
        self._unborn.pop(hand.worker, None)
        hand.pid = pid
        pidfd = kin.hold(pid, created)
        if pidfd is not None:
            hand.pidfd = pidfd
            self._loop.add(pidfd, lambda _: self._outlived(hand))
            self._listener.worker_born(hand.worker, pid)
            if kin.parent(pid) == self._boot.owner:
                # What its jobs leave behind goes to the owner, which hears of the worker's end and
                # not of theirs: another worker, of which we do, takes its place when it is free.
                hand.page.words[pages.WORN] = 1

    def _look_for(self, hand: Hand) -> None:
        """A worker that was taken over may have noted its birth, and said nothing yet."""
        if hand.pid is None and self._find(hand) and hand.pid is not None and hand.pidfd < 0:
            self._hear(hand)
            if hand.worker in self._hands:
                self._bury(hand, None, None)

    def _find(self, hand: Hand) -> bool:
        """Identify a worker that was taken over by what it noted, if it did; whether it is still
        there afterwards."""
        pid = hand.page.words[pages.PID]
        try:
            if pid:
                self._identify(hand, pid, kin.started(pid) or 0)
        except OSError as error:  # it ends with its connection
            self._bury(hand, None, None, f"it could not be taken over: {error}")
            return False
        return True

    def _outlived(self, hand: Hand) -> None:
        """One that was taken over has ended."""
        self._hear(hand)
        self._loop.remove(hand.pidfd)
        assert hand.pid is not None
        self._bury(hand, kin.exit_code(hand.pid, hand.pidfd), None)
        self.sweep_marked()

    def sweep_marked(self) -> None:
        """Kill what workers left behind that were not this process's children.

        It waits until each worker that another manager ordered is known or given up: one may just
        have been born, or be about to be by that one's nursery, and nothing but the marker is to be
        seen of it.
        """
        if self._follows:
            self._read_nursery()
            for hand in [hand for hand in self._unborn.values() if hand.inherited]:
                self._look_for(hand)
            self._marked_due = any(hand.inherited for hand in self._unborn.values())
            if self._marked_due:
                return
            living = {os.getpid(), *self._by_pid}
            living |= {hand.pid for hand in self._hands.values() if hand.pid is not None}
            if self._nursery_pid is not None:
                living.add(self._nursery_pid)
            try:
                marked.kill(self._boot.pool_id, living, self._is_living)
            except OSError:  # no descriptor to look with
                self._marked_due = True

    # --- the workers' own words -----------------------------------------------------------

    def _heard(self, hand: Hand, _: int) -> None:
        self._hear(hand)

    def _hear(self, hand: Hand) -> None:
        while hand.control.fileno() >= 0:
            try:
                data = hand.control.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop_control(hand)
                if hand.inherited and hand.pid is None:
                    # The nursery was told by another manager to start it, and did not come to it.
                    self._bury(hand, None, None, "it was never started: the manager had died")
                elif not is_exiting(hand.pid):
                    self.kill(hand.worker, "it closed its connection to the manager")
                return
            if hand.pid is None and not self._find(hand):
                return
            try:
                for body in hand.decoder.feed(data):
                    self._take_in(hand, body)
            except ProtocolError as error:
                self.kill(hand.worker, f"it sent nonsense to the manager: {error}")
                return
            if hand.inherited and hand.pid is not None and hand.pidfd < 0:
                self._bury(hand, None, None)  # it has ended since it said that

    def _take_in(self, hand: Hand, body: bytes) -> None:
        """One thing that a worker said; or user code there that wrote to a socket not its own."""
        if body[0] == frames.READY:
            self._listener.worker_ready(hand.worker)
        elif body[0] == frames.FAILED:
            self._listener.worker_failed(hand.worker, frames.read_plain(body))
        elif body[0] == frames.RELEASED:
            self._listener.worker_released(hand.worker, frames.read_lease(body)[0])
        else:
            raise ProtocolError(f"a frame of kind {body[0]}")

    def _tell(self, hand: Hand, data: bytes, passed: Socket | None = None) -> bool:
        """Send a worker a frame. Its socket holds hundreds; a worker that reads none is stuck."""
        try:
            if passed is None:
                hand.control.send(data)
            else:
                descriptors.send(hand.control, data, [passed.fileno()])
        except BlockingIOError:
            self.kill(hand.worker, "it does not read what the manager tells it")
            return False
        except OSError:
            return False  # dead or dying: its exit is about to be reported
        return True

    def _drop_control(self, hand: Hand) -> None:
        if hand.control.fileno() >= 0:
            self._loop.remove(hand.control.fileno())
            hand.control.close()

    # --- the end --------------------------------------------------------------------------

    def end_nursery(self) -> int:
        """Kill the nursery and reap it; for the manager's own orderly end.

        Returns:
            How many processes are left to end: reap until there are none, then `kill_rest`.
        """
        pid = self._nursery_pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._nursery_pid = None
        if self._nursery is not None:
            self._lose_nursery()
        return self._sweep()

    def kill_rest(self) -> None:
        """Kill whatever still is a child of this process, or a worker's that was taken over."""
        self._sweep(last=True)
        self.sweep_marked()


__all__ = ["Crew"]
