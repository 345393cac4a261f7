"""What the manager does between its start and its end: it serves, in one loop.

It ends when the pool is drained or terminated, or its owner asks for it, dies, or becomes another
program (three descriptors in the one wait). Signals of others end nothing (`wire.signals`). Its
last acts: every worker and the nursery dead and reaped, the folder removed, and those who wait for
the end told.

A manager that is not the pool's first takes over what the last one left (`takeover`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time

from whitepool_mp.broker import Terminate
from whitepool_mp.manager.books import Books
from whitepool_mp.manager.clients import Door
from whitepool_mp.manager.core import Manager
from whitepool_mp.manager.crew import Crew
from whitepool_mp.manager.loop import Loop
from whitepool_mp.policy import Policy
from whitepool_mp.wire import folder
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.boot import Boot
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.escrow import Escrow
from whitepool_mp.wire.kit import Kit
from whitepool_mp.wire.ledger import Ledger

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # as in `worker.linux`

LAST_SECONDS = 2.0
"""How long pools that ran inside workers have for their own end, before this one ends."""
WARM_UP_SECONDS = 0.5
"""When to import what is wanted later: not while the first callers wait."""


def serve(
    boot: Boot,
    listener_fd: int,
    ends: tuple[int, ...],
    lifeline: int,
    nursery: tuple[int, Socket],
    first: tuple[Kit, int | None] | None,
    ledger: Ledger,
    escrow: Escrow,
) -> None:
    """Serve a pool until it has ended.

    Args:
        boot: what pool it is.
        listener_fd: the listening socket, bound by the owner.
        ends: descriptors, each of which is readable once the pool is to end for the owner's sake:
            a pidfd of the owner; the lifeline, which an owner that becomes another program lets go
            of; and what the owner asks for the end by.
        lifeline: the read end of the pipe whose other end is the owner's alone.
        nursery: the nursery's pid and this process's end to it.
        first: of the worker that was started or ordered already, as from `nursery.begin`.
        ledger, escrow: what a manager leaves to the next one.
    """
    policy = Policy(*boot.policy)
    loop = Loop()
    books = Books(ledger)
    clock = time.monotonic
    manager = Manager(policy, loop, clock, books)
    crew = Crew(
        boot,
        loop,
        manager,
        clock,
        lifeline,
        escrow,
        policy.start_timeout,
        nursery,
        first,
        follows=books.generation > 1,
    )
    door = Door(Socket(fileno=listener_fd), boot.key, loop, manager, clock, books)
    _watch_signals(loop, crew)
    for fd in ends:
        loop.add(fd, functools.partial(_end, loop, fd, manager))
    if ledger.words[ledgers.SERVED]:
        from whitepool_mp.manager.takeover import take_over

        take_over(books, escrow, manager, crew, door)
    else:
        books.clear()
        manager.start(crew, door)
    books.serving()
    gc.freeze()
    gc.enable()
    crew.reap()  # of a nursery that died before its death could be told by a signal
    while not manager.finished:
        manager.turn()
    left = crew.end_nursery()
    deadline = time.monotonic() + LAST_SECONDS
    while left and (now := time.monotonic()) < deadline:
        loop.turn(deadline - now)  # SIGCHLD: somebody ended, and was reaped
        left = crew.end_nursery()
    crew.kill_rest()
    while (until := crew.relay.flush_until(deadline)) is not None:
        loop.turn(until - time.monotonic())  # what workers wrote is still on its way out
    folder.remove(boot.folders)  # before it is over: whoever is killed, somebody removes them
    books.finished()
    manager.answer_drainers()
    door.close()


def _end(loop: Loop, fd: int, manager: Manager, _: int) -> None:
    loop.remove(fd)
    manager.apply(Terminate())


def _watch_signals(loop: Loop, crew: Crew) -> None:
    """Signals wake the loop through a pipe: SIGCHLD, and SIGALRM once, soon after the start, to
    warm up. All others stay blocked."""
    wakeup_read, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    used = signal.SIGCHLD, signal.SIGALRM
    for number in used:
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, used)
    signal.setitimer(signal.ITIMER_REAL, WARM_UP_SECONDS)

    def woken(_: int) -> None:
        numbers = os.read(wakeup_read, 65536)
        crew.reap()
        if signal.SIGALRM in numbers:
            crew.sweep_marked()  # what workers left behind that died while there was no manager
            _warm_up()

    loop.add(wakeup_read, woken)


def _warm_up() -> None:
    """Have ready what is wanted later: there may be no descriptor to import it with then."""
    with contextlib.suppress(OSError, ImportError):  # there is none now
        import json  # noqa: F401
        import re  # noqa: F401
        import traceback  # noqa: F401

        import psutil  # noqa: F401

        import whitepool_mp.manager.stacks  # noqa: F401
