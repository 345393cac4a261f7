"""The manager process from start to end.

It begins as a fresh interpreter, forks the nursery while it is still small, and ends when the pool
is drained or terminated, or its owner dies (a pidfd in the one wait). Its last acts: every worker
and the nursery dead and reaped, the folder removed, whoever waits for the end told.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import time
from typing import NoReturn

from whitepool_mp.broker import Terminate
from whitepool_mp.config import Policy
from whitepool_mp.manager.clients import Door
from whitepool_mp.manager.core import Manager
from whitepool_mp.manager.crew import Crew
from whitepool_mp.manager.loop import Loop
from whitepool_mp.wire import boot as boots
from whitepool_mp.wire.boot import Boot
from whitepool_mp.worker import linux

LAST_SECONDS = 2.0
"""How long pools that ran inside workers have for their own end, before this one ends."""


def main(boot_fd: int, listener_fd: int) -> NoReturn:
    """Be the manager.

    Args:
        boot_fd: the memory file that says what pool this is.
        listener_fd: the listening socket, bound by the owner.
    """
    # Whatever the thread that made the pool had blocked: deaths are told by signals here.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    boot = boots.read(boot_fd)
    os.close(boot_fd)
    code = 1
    try:
        _stand_apart()
        owner = _watch(boot.owner)
        if owner is not None:
            _manage(boot, socket.socket(fileno=listener_fd), owner)
        else:
            shutil.rmtree(boot.folder, ignore_errors=True)
        code = 0
    finally:
        if code:
            import traceback

            traceback.print_exc()
        os._exit(code)


def _stand_apart() -> None:
    """Leave the owner's terminal and standard input to the owner."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    linux.adopt_orphans()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _watch(owner: int) -> int | None:
    """A descriptor that is readable once the owner has ended; None if it has already."""
    try:
        fd = os.pidfd_open(owner)
    except ProcessLookupError:
        return None
    # The owner is this process's parent, unless it died and another got its number.
    return fd if os.getppid() == owner else None


def _manage(boot: Boot, listener: socket.socket, owner: int) -> None:
    # The write end is never used and never closed: its end-of-file is this process's death.
    lifeline, _ = os.pipe2(os.O_CLOEXEC)
    policy = Policy(*boot.policy)
    loop = Loop()
    manager = Manager(policy, loop, time.monotonic)
    crew = Crew(boot, loop, manager, time.monotonic, lifeline, policy.start_timeout)
    crew.start_nursery()
    door = Door(listener, boot.key, loop, manager, time.monotonic)
    _watch_signals(loop, manager, crew)
    loop.add(owner, lambda _: _owner_died(loop, owner, manager))
    manager.start(crew, door)
    warm = False
    while not manager.finished:
        manager.turn()
        if not warm and loop.turn(0) == 0:
            # What is wanted later: have it ready when there may be no descriptor to import it with.
            import json  # noqa: F401

            import whitepool_mp.manager.census  # noqa: F401

            warm = True
    left = crew.end_nursery()
    deadline = time.monotonic() + LAST_SECONDS
    while left and (now := time.monotonic()) < deadline:
        loop.turn(deadline - now)  # SIGCHLD: somebody ended, and was reaped
        left = crew.end_nursery()
    crew.kill_rest()
    shutil.rmtree(boot.folder, ignore_errors=True)
    manager.answer_drainers()
    door.close()


def _owner_died(loop: Loop, owner: int, manager: Manager) -> None:
    loop.remove(owner)
    manager.apply(Terminate())


def _watch_signals(loop: Loop, manager: Manager, crew: Crew) -> None:
    """SIGCHLD and SIGTERM wake the loop through a pipe; SIGINT is the owner's affair."""
    wakeup_read, wakeup_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def woken(_: int) -> None:
        numbers = os.read(wakeup_read, 65536)
        if signal.SIGTERM in numbers:
            manager.apply(Terminate())
        crew.reap()

    loop.add(wakeup_read, woken)
