"""The manager process from start to end.

It begins as a fresh interpreter, forks the nursery before it imports what only it needs itself (the
nursery is the smaller for it, and both import at once), and serves until the pool has ended.
"""

from __future__ import annotations

import fcntl
import os
import resource
import sys

from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.escrow import Escrow
from whitepool_mp.wire.ledger import Ledger

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal  # as in `worker.linux`


def main(
    boot_fd: int, listener_fd: int, ledger_fd: int, lifeline: int, inlet_fd: int, outlet_fd: int
) -> NoReturn:
    """Be the manager. All descriptors are the owner's, and this process's copies.

    Args:
        boot_fd: the memory file that says what pool this is.
        listener_fd: the listening socket.
        ledger_fd: the pool's ledger.
        lifeline: the read end of the pipe that ends with the owner.
        inlet_fd, outlet_fd: the two ends of the queue of descriptors in escrow.
    """
    # Whatever the thread that made the pool had blocked: deaths are told by signals here.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    boot = boots.read(boot_fd)
    given = [boot_fd, listener_fd, ledger_fd, lifeline, inlet_fd, outlet_fd]
    if min(given) <= 2 or None in (sys.stdin, sys.stdout, sys.stderr):
        given = _stand_clear(*given)
        boot_fd, listener_fd, ledger_fd, lifeline, inlet_fd, outlet_fd = given
    for fd in given:
        os.set_inheritable(fd, False)
    # Only now: with them comes libffi, which opens itself, under any number that is free.
    from whitepool_mp.worker import nursery as nurseries

    code = 1
    try:
        _stand_apart()
        owner = _watch(boot.owner)
        if owner is not None:
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

            serve(boot, listener_fd, owner, lifeline, nursery, first, ledger, escrow)
        else:
            nurseries.remove(boot.folder)
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
