"""For tests of code that uses a pool: faults on demand, and waiting until the pool is whole again.

from whitepool_mp import testing

def test_my_code_survives_a_crash():
    with Pool(pool_size=2) as session:
        testing.kill_worker(session, slot=0)
        testing.wait_until_whole(session)
        assert my_code(session) == ...

    with pytest.raises(WorkerDied):
        session.run(testing.segfault)
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from whitepool_mp.session import Session

_ALIVE = ("booting", "idle", "leased")

# --- faults, to be run in a worker --------------------------------------------------------------


def segfault() -> NoReturn:
    """Read address 0: the process dies from SIGSEGV."""
    ctypes.string_at(0)
    raise AssertionError("reading address 0 should have ended this process")


def exit_now(code: int = 3) -> NoReturn:
    """End the process without a word, as `os._exit` does.

    Args:
        code: its exit code.
    """
    os._exit(code)


def kill_self(number: int = signal.SIGKILL) -> None:
    """Send a signal to the process itself (SIGKILL: as the kernel's out-of-memory killer does).

    Args:
        number: which signal.
    """
    os.kill(os.getpid(), number)


def hang() -> NoReturn:
    """Never return."""
    while True:
        signal.pause()


# --- faults, from outside -----------------------------------------------------------------------


def kill_worker(session: Session, slot: int = 0, number: int = signal.SIGKILL) -> int:
    """Send a signal to the worker in a slot, idle or busy; after SIGKILL, see that it is gone.

    Args:
        session: the pool.
        slot: which worker.
        number: which signal.

    Returns:
        The pid it was sent to.

    Raises:
        LookupError: no worker lives in that slot now.
    """
    import psutil

    for row in session.workers():
        if row.slot == slot and row.pid is not None and row.state in _ALIVE:
            process = psutil.Process(row.pid)
            if process.create_time() == row.created:
                process.send_signal(number)
                while number == signal.SIGKILL and any(
                    other.pid == row.pid and other.state in _ALIVE for other in session.workers()
                ):
                    time.sleep(0.002)  # the pool is about to be told by the kernel
                return row.pid
    raise LookupError(f"no worker lives in slot {slot} of pool {session.name!r}")


def wait_until_whole(session: Session, timeout: float = 10.0) -> None:
    """Wait until at least `pool_size` workers are ready and nothing is being started or stopped.

    Args:
        session: the pool.
        timeout: at most how many seconds.

    Raises:
        TimeoutError: it did not come to that; says how it stands.
    """
    deadline = time.monotonic() + timeout
    while True:
        now = session.status()
        ready = now.available + now.leased
        if ready >= now.pool_size and not now.booting and not now.retiring:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"pool {session.name!r} is not whole after {timeout:g} s: {now}")
        time.sleep(0.002)  # a pool tells its state when it is asked, and only then
