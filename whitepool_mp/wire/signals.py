"""Which signals of others the processes of a pool obey.

A service manager sends SIGTERM to every process of a service, a terminal that closes sends SIGHUP
to every process of its session. What becomes of the pool then is for its owner to say:

    owner --starts it, OTHERS blocked--> manager --fork--> nursery --fork or exec--> worker
                                         all blocked       all blocked               none blocked,
                                                           (not in a preload)        SPARED caught

- The manager and the nursery are born with these signals blocked, so there is no moment at which
  one could end them. SIGKILL, SIGSTOP and faults cannot be blocked, or should not be; SIGXCPU tells
  of a limit that was set for the process itself.
- A worker catches `SPARED` and does nothing, unless user code has its own idea. They are caught and
  not ignored because an ignored signal stays ignored in the programs that a worker starts, and a
  caught one is back at its default action there. SA_RESTART is set, so that the kernel itself goes
  on with what a signal interrupted in C code (all but sleep, poll, select and their kin).
- A process that a worker forks gets the default action back before any user code runs there, and
  no signal that comes meanwhile is lost: `multiprocessing` ends its processes by SIGTERM.

What the owner ignores (as under `nohup`) is ignored in all of them, as in any program that it
starts.
"""

from __future__ import annotations

import os
from _thread import get_ident

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
    from types import FrameType
else:
    import _signal as signal  # as in `worker.linux`

FAULTS = frozenset(
    (
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGABRT,
        signal.SIGTRAP,
        signal.SIGSYS,
    )
)
"""What a process is sent for what it did itself."""
_OWN = {signal.SIGKILL, signal.SIGSTOP, signal.SIGXCPU}
OTHERS = frozenset(int(number) for number in signal.valid_signals() - FAULTS - _OWN)
"""What is blocked in the manager and the nursery. (The manager opens two that it uses itself.)"""
SPARED = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""What does nothing to a worker unless user code says otherwise."""

_masks: dict[int, set[int]] = {}  # of threads that are forking


def block() -> set[int]:
    """Block `OTHERS` in this thread, and in what it starts.

    Returns:
        What was blocked before, for `restore`.
    """
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, OTHERS)}


def restore(mask: Iterable[int] = ()) -> None:
    """Have just these signals blocked in this thread. Those that came meanwhile act now."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def was_killed(exitcode: int | None) -> bool:
    """Whether a worker was ended from outside, or may have been.

    Args:
        exitcode: how it ended, negative for a signal; None if that is not known.
    """
    return exitcode is None or (exitcode < 0 and -exitcode not in FAULTS)


def spare() -> None:
    """Catch `SPARED` in this process and do nothing, where their action is the default one."""
    for number in SPARED:
        if signal.getsignal(number) == signal.SIG_DFL:
            disregard(number)


def disregard(number: int) -> None:
    """Catch a signal and do nothing."""
    signal.signal(number, _disregarded)
    signal.siginterrupt(number, False)


def spare_no_fork() -> None:
    """From now on, give processes that this one forks the default actions back."""
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )


def _disregarded(number: int, frame: FrameType | None) -> None:
    """What a worker does about a signal of somebody else."""


def _before_fork() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SPARED)
    _masks[get_ident()] = {int(number) for number in before}


def _after_in_parent() -> None:
    restore(_masks.pop(get_ident(), ()))


def _after_in_child() -> None:
    mask = _masks.pop(get_ident(), set())
    _masks.clear()
    for number in SPARED:
        if signal.getsignal(number) is _disregarded:
            signal.signal(number, signal.SIG_DFL)
    restore(mask)
