"""The manager process from start to end.

It begins as a fresh interpreter, forks the nursery before it imports what only it needs itself (the
nursery is the smaller for it, and both import at once), and serves until the pool has ended.
"""

from __future__ import annotations

import fcntl
import os
import resource
import select
import sys

from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import folder, signals
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.escrow import Escrow
from whitepool_mp.wire.ledger import Ledger

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import NoReturn


def main(
    boot_fd: int,
    listener_fd: int,
    ledger_fd: int,
    lifeline: int,
    inlet_fd: int,
    outlet_fd: int,
    end_fd: int,
    listening: int,
) -> NoReturn:
    """Be the manager. All descriptors are the owner's, and this process's copies.

    Args:
        boot_fd: the memory file that says what pool this is.
        listener_fd: the listening socket.
        ledger_fd: the pool's ledger.
        lifeline: the read end of the pipe that ends with the owner.
        inlet_fd, outlet_fd: the two ends of the queue of descriptors in escrow.
        end_fd: readable once the owner has asked for the end.
        listening: readable once the owner has made the folder, and listens there.
    """
    # They have been since this process was born, whatever else the owner's thread had blocked.
    signals.restore(signals.OTHERS)
    boot = boots.read(boot_fd)
    given = [boot_fd, listener_fd, ledger_fd, lifeline, inlet_fd, outlet_fd, end_fd, listening]
    if boot.stock >= 0:
        given.append(boot.stock)
    if min(given) <= 2 or None in (sys.stdin, sys.stdout, sys.stderr):
        given = _stand_clear(*given)
        boot_fd, listener_fd, ledger_fd, lifeline, inlet_fd, outlet_fd, *others = given
        end_fd, listening, *stock = others
        boot.stock = stock[0] if stock else -1
    for fd in given:
        os.set_inheritable(fd, False)
    # Only now: with them comes libffi, which opens itself, under any number that is free.
    from whitepool_mp.worker import nursery as nurseries

    code = 1
    try:
        _stand_apart()
        owner = _watch(boot.owner)
        if owner is not None and _listens(listening, owner):
            os.close(listening)
            ledger = Ledger(ledger_fd)
            escrow = Escrow(Socket(fileno=inlet_fd), Socket(fileno=outlet_fd))
            first = None
            if ledger.words[ledgers.SERVED]:
                nursery = nurseries.fork(boot, lifeline, escrow)
            else:
                escrow.clear()  # of a manager that died before it served
                nursery, first = nurseries.begin(boot, boot_fd, lifeline, escrow)
            os.close(boot_fd)
            from whitepool_mp.manager.service import serve

            ends = owner, lifeline, end_fd
            serve(boot, listener_fd, ends, lifeline, nursery, first, ledger, escrow)
        else:
            folder.remove(boot.folders)
        code = 0
    finally:
        if code:
            import traceback

            traceback.print_exc()
        os._exit(code)


def _stand_clear(*fds: int) -> list[int]:
    """The owner had closed its standard input, output or error, and something of ours may have got
    that number: move it away, or what workers print would go there."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) if fd <= 2 else fd for fd in fds]
    for fd in fds:
        if fd <= 2:
            os.close(fd)
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    return moved


def _stand_apart() -> None:
    """Leave the owner's terminal and standard input to the owner."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    from whitepool_mp.worker import linux

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


def _listens(listening: int, owner: int) -> bool:
    """Wait until the owner listens; False if it died first.

    It makes the folder when this process lives, which is to remove it: whenever the owner is
    killed, before it makes the folder or after, nobody makes it once its death is seen here.
    """
    poller = select.poll()
    poller.register(listening, select.POLLIN)
    poller.register(owner, select.POLLIN)
    ready = dict(poller.poll())
    return bool(ready.get(listening, 0) & select.POLLIN)
