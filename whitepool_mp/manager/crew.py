"""The worker processes: starting them, hearing from them, killing them, learning how they ended.

    Manager --spawn, retire, kill, adopt--> Crew --SPAWN--> nursery --fork--> worker
            <--ready, failed, exited-------      <------READY, FAILED, exit status---

Every worker is a child of this process (see the nursery), so its pid cannot be another's before it
is reaped here, and its exit status and peak memory come with its death: SIGCHLD wakes the loop
through a descriptor. A worker is the leader of a process group, which is killed before the leader
is reaped; whatever a dead worker leaves behind becomes a child of this process and is killed too
(`_sweep`), so nothing escapes by detaching itself.

Workers of a manager that was killed are taken over (`take_over`). They are nobody's children here:
a pidfd tells of their death (`kin`), and what they leave behind is found by its marker.

Nothing here decides: what becomes of a worker is the broker's affair.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque

from whitepool_mp.errors import ProtocolError
from whitepool_mp.manager import kin
from whitepool_mp.manager.loop import READ, WRITE, Loop
from whitepool_mp.manager.obituary import Obituary, OomKills, is_exiting, read_stack
from whitepool_mp.manager.relay import Relay, last_lines
from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import descriptors, frames, pages
from whitepool_mp.wire.boot import Boot
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.kit import Kit
from whitepool_mp.worker import nursery as nurseries

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any, Protocol

    from whitepool_mp.manager.books import Process
    from whitepool_mp.wire.escrow import Escrow
else:
    import _signal as signal  # as in `worker.linux`

    Protocol = object

_BIRTHS = nurseries.BORN_KIND, nurseries.UNBORN_KIND
_MARK = boots.MARKER.encode() + b"="


class Listener(Protocol):
    """Who is told what happens to workers."""

    def worker_born(self, worker: int, pid: int) -> None: ...
    def worker_ready(self, worker: int) -> None: ...
    def worker_failed(self, worker: int, reason: str) -> None: ...
    def worker_released(self, worker: int, lease: int) -> None: ...
    def worker_exited(self, worker: int, obituary: Obituary) -> None: ...


class Hand:
    """One worker process, from the order to start it until it is reaped.

    Attributes:
        stderr, stacks: the read ends of its pipes, None if there are none.
    """

    __slots__ = (
        "born",
        "channels",
        "control",
        "decoder",
        "dump",
        "inherited",
        "kill_reason",
        "page",
        "page_fd",
        "pid",
        "pidfd",
        "process",
        "said",
        "slot",
        "stacks",
        "stderr",
        "unfinished",
        "worker",
    )

    def __init__(
        self,
        worker: int,
        slot: int,
        control: Socket,
        page_fd: int,
        born: float,
        stderr: int | None = None,
        stacks: int | None = None,
    ):
        self.page = pages.Page(page_fd, pages.NUMBERS)
        self.page_fd = page_fd
        self.worker = worker
        self.slot = slot
        self.control = control
        self.decoder = frames.FrameDecoder(limit=64 * 1024)
        self.born = born
        self.channels = 0  # how many it was given
        self.pid: int | None = None
        self.inherited = False  # whether another manager started it
        self.pidfd = -1  # of one that was inherited
        self.kill_reason: str | None = None
        self.process: Any = None  # psutil.Process, made when it is first asked about
        self.stderr = stderr
        self.said = b""  # the last of it
        self.unfinished = b""  # of a line that came in parts
        self.stacks = stacks
        self.dump: bytearray | None = None  # what has come of a stack that was asked for

    def close(self) -> None:
        """Let go of the page."""
        self.page.close()
        os.close(self.page_fd)
        if self.pidfd >= 0:
            os.close(self.pidfd)


class Crew:
    """Every worker process of the pool, and the nursery they come from.

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
        follows: bool = False,
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
        self._nursery_word = ""
        self._first = first
        self._unborn: dict[int, Hand] = {}
        self._orders: deque[tuple[int, int, Kit]] = deque()
        self.relay = Relay(loop, clock)
        self._oom = OomKills(clock)
        self._stacks: Any = None  # a `Stacks`, made when it is first wanted
        self._sweep_due = False
        self._follows = follows
        # Open from the start: there may be no descriptor to spare when it is wanted.
        self._children_fd = _open_children()
        self._take_nursery(*nursery)

    # --- what the manager asks ------------------------------------------------------------

    def hand(self, worker: int) -> Hand | None:
        """The process of a worker, or None when there is none (any more)."""
        return self._hands.get(worker)

    def __len__(self) -> int:
        return len(self._hands)

    def spawn(self, worker: int, slot: int) -> str | None:
        """Order a new worker.

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
                kit = Kit()
                self._escrow.park(worker, kit.kept())
            kit.control.setblocking(False)
            hand = Hand(worker, slot, kit.control, kit.page, self._clock(), kit.stderr, kit.stacks)
        except OSError as error:
            if kit is not None:
                kit.close()
            return f"the manager cannot start a worker: {type(error).__name__}: {error}"
        self._hands[worker] = self._unborn[worker] = hand
        self.relay.add(hand)
        if kit.given:
            self._orders.append((worker, slot, kit))
            self._send_orders()
        elif pid is not None:
            self._born(hand, pid)
        return None

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
            _kill(hand)
            return
        if hand.inherited:
            # Nobody knows its pid yet. Without this socket it ends by itself, if it is ever born.
            self._bury(hand, None, None)
            return
        late = self._clock() - hand.born >= self._start_timeout
        if late or all(other.kill_reason for other in self._unborn.values() if not other.inherited):
            self._end_stuck_nursery(late)

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

    def recall(self, worker: int, lease: int, patient: bool) -> bool:
        """Take a lease back through its worker, which says RELEASED when no call under it runs.

        Args:
            worker, lease: whose, and which.
            patient: let it do first what it has been sent.

        Returns:
            Whether a call may be running now.
        """
        hand = self._hands.get(worker)
        if hand is None:
            return False
        busy = hand.page.busy() if patient else hand.page.recall(lease)
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
        nothing."""
        self.relay.tick(now)
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
            os.waitpid(pid, 0)
            if pid == self._nursery_pid:
                # What it (or a middleman of its) said last is still to be read, up to end-of-file.
                self._nursery_pid = None
            self._sweep_due = True
            return
        # Not reaped yet, so neither the pid nor the group can be anybody else's.
        _kill_group(pid)
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
        """Kill what dead workers left: children of ours that are neither worker nor nursery.

        A living worker adopts its own orphans, so what has come to this process is a dead one's. A
        pool that ran inside that worker is ending by itself, its owner being dead, and tidies up as
        it does: it is asked to, and killed only at the end (`last`).

        Returns:
            How many there were.
        """
        children = _children(self._children_fd)
        self._read_nursery()  # a worker may have been born while we looked
        strays = [pid for pid in children if pid not in self._by_pid and pid != self._nursery_pid]
        for pid in strays:
            # Only this process reaps its children, so the number is still that child's.
            patient = not last and _of_another_pool(pid, self._boot.pool_id)
            with contextlib.suppress(PermissionError):  # it became another user's, by sudo or su
                os.kill(pid, signal.SIGTERM if patient else signal.SIGKILL)
        return len(strays)

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
            OSError: no descriptor or no memory is left.
        """
        control = Socket(fileno=control_fd)
        control.setblocking(False)
        worker, slot = process.worker, process.slot
        hand = Hand(worker, slot, control, page_fd, process.born, stderr, stacks)
        hand.inherited = True
        hand.channels = hand.page.words[pages.CHANNELS]
        self._hands[hand.worker] = self._unborn[hand.worker] = hand
        pid = process.pid or hand.page.words[pages.PID]
        if pid:
            self._identify(hand, pid, process.started or kin.started(pid) or 0)

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

    def _outlived(self, hand: Hand) -> None:
        """One that was taken over has ended."""
        self._hear(hand)
        self._loop.remove(hand.pidfd)
        assert hand.pid is not None
        self._bury(hand, kin.exit_code(hand.pid, hand.pidfd), None)
        self.sweep_marked()

    def sweep_marked(self) -> None:
        """Kill what workers left behind that were not this process's children."""
        if self._follows:
            self._read_nursery()
            living = {os.getpid(), *self._by_pid}
            living |= {hand.pid for hand in self._hands.values() if hand.pid is not None}
            if self._nursery_pid is not None:
                living.add(self._nursery_pid)
            from whitepool_mp.wire import marked

            marked.kill(self._boot.pool_id, living)

    # --- the nursery ----------------------------------------------------------------------

    def _take_nursery(self, pid: int, sock: Socket) -> None:
        sock.setblocking(False)
        self._nursery, self._nursery_pid, self._nursery_word = sock, pid, ""
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
                self._nursery_word = "the nursery sent nonsense to the manager"
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
            _kill(hand)

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
            self._bury(hand, None, None, told or "the nursery, which starts the workers, died")

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
            if hand.pid is None and (pid := hand.page.words[pages.PID]):
                self._identify(hand, pid, kin.started(pid) or 0)
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


def _open_children() -> int | None:
    """The kernel's list of this process's children, if it keeps one."""
    own = os.getpid()
    try:
        return os.open(f"/proc/{own}/task/{own}/children", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _children(listed: int | None) -> list[int]:
    """The pids of this process's children, zombies included.

    Source: proc(5), /proc/pid/task/tid/children; psutil where the kernel does not have it.
    """
    if listed is None:
        import psutil

        return [child.pid for child in psutil.Process().children()]
    text = b""
    while piece := os.pread(listed, 1 << 16, len(text)):
        text += piece
    return [int(pid) for pid in text.split()]


def _of_another_pool(pid: int, pool_id: str) -> bool:
    """Whether an unreaped child is part of another pool (one that a worker of ours made)."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            marks = [entry for entry in file.read().split(b"\0") if entry.startswith(_MARK)]
    except OSError:
        return False  # it is a zombie, or another user's by now
    return bool(marks) and marks != [_MARK + pool_id.encode()]


def _kill(hand: Hand) -> None:
    """SIGKILL to a worker and its group."""
    assert hand.pid is not None
    if not hand.inherited:
        _kill_group(hand.pid)
    elif hand.pidfd >= 0:
        kin.kill_group(hand.pid, hand.pidfd)


def _kill_group(pid: int) -> None:
    """SIGKILL to an unreaped child and to the group it leads."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


__all__ = ["Crew", "Hand", "Listener"]
