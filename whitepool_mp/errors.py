"""The error tree: everything the pool raises of its own.

    WhitepoolError
    ├── PoolClosed             the pool is shut down, or shutting down
    ├── PoolFull               no worker free, and the caller would not wait
    ├── CheckoutTimeout        no worker became free in time         (also a TimeoutError)
    ├── CallTimeout            a call took too long                  (also a TimeoutError)
    ├── ShutdownTimeout        the pool did not drain in time        (also a TimeoutError)
    ├── ShutdownIncomplete     the pool ended, and something was lost
    ├── ManagerDied            the pool's manager process is gone
    ├── FactoryFailed          workers cannot start
    ├── LeaseError             a lease used when or where it is not valid
    ├── SerializationError     something could not be pickled or unpickled
    ├── RemoteError            a worker's exception that could not itself travel
    ├── WorkerDied             a worker process ended under a call
    ├── AuthenticationFailed   the other side does not know the pool's key
    └── ProtocolError          the other side does not speak this protocol

An exception that a call raises in a worker is not in this tree: it arrives as its own type, with a
`RemoteTraceback` as its cause. Every error here can be pickled and copied; its fields, its notes
and a `RemoteTraceback` cause survive that.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = [
    "AuthenticationFailed",
    "CallTimeout",
    "CheckoutTimeout",
    "FactoryFailed",
    "LeaseError",
    "ManagerDied",
    "PoolClosed",
    "PoolFull",
    "ProtocolError",
    "RemoteError",
    "RemoteTraceback",
    "SerializationError",
    "ShutdownIncomplete",
    "ShutdownTimeout",
    "WhitepoolError",
    "WorkerDied",
]


class RemoteTraceback(Exception):
    """The traceback of an exception in another process, as text.

    Never raised: it is the ``__cause__`` of an exception that came from a worker, so that a printed
    traceback shows both sides. The idea is that of ``concurrent.futures.process``.

    Args:
        text: what ``traceback.format_exc()`` said in the other process.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


class WhitepoolError(Exception):
    """Above every error of the pool. Catch it to catch them all."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not the inherited way, which calls the class with `args`: subclasses take keywords, and
        # OSError (under TimeoutError) has ideas of its own about `args`.
        cause = self.__cause__ if isinstance(self.__cause__, RemoteTraceback) else None
        return _restore, (type(self), self.args, self.__dict__, cause)


def _restore(
    kind: type[WhitepoolError],
    args: tuple[Any, ...],
    state: Mapping[str, Any],
    cause: RemoteTraceback | None,
) -> WhitepoolError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    if cause is not None:
        error.__cause__ = cause
    return error


def headline(text: str) -> str:
    """The line of a traceback (or of another account of a failure) that says what happened.

    Args:
        text: a formatted traceback, perhaps with a title before it; the exception's own message may
            have several lines.

    Returns:
        The title, if there is one, and the line that names the exception.
    """
    lines = text.strip().splitlines() or ["no reason given"]
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    if not begins:
        return lines[0]
    named = next((line for line in lines[begins[-1] + 1 :] if not line.startswith(" ")), lines[-1])
    return f"{lines[0]} {named}" if begins[0] > 0 else named


class PoolClosed(WhitepoolError):
    """The pool is shut down, or is shutting down and takes no new work.

    Raised by a checkout, call or submit after ``safe_shutdown()``, ``terminate()`` or the end of
    the ``with`` block, and to whoever is still waiting when the pool is terminated. Make a new
    pool, or keep the block open until the work is done.
    """


class PoolFull(WhitepoolError):
    """All ``pool_size + max_overflow`` workers are taken and the caller asked not to wait.

    Raised by ``checkout(block=False)``. Wait instead (``checkout(timeout=...)``), shed
    the load, or enlarge the pool.
    """


class CheckoutTimeout(WhitepoolError, TimeoutError):
    """No worker became free within the checkout's timeout.

    Nothing was started, so trying again is safe. If it is frequent, the pool is too small for its
    load, or leases are held too long: ``session.workers()`` tells who holds them.
    """


class CallTimeout(WhitepoolError, TimeoutError):
    """A call took longer than its timeout; its worker was killed and is being replaced.

    The call may have had effects outside the worker. A lease it was made on is over: check out
    another.
    """


class ShutdownTimeout(WhitepoolError, TimeoutError):
    """``safe_shutdown(timeout=...)`` ended with leases still out.

    The pool still refuses new work. Wait again, or end it now with ``session.terminate()``.
    """


class ShutdownIncomplete(WhitepoolError):
    """``safe_shutdown()`` ended the pool, and what it had promised to finish was lost.

    A worker was killed, or the pool was terminated by another process, during the shutdown or
    before jobs of this process were done. Each of these calls has an error of its own
    (``WorkerDied``, ``PoolClosed``). A crash or ``os._exit`` in a call is not counted.

    Attributes:
        jobs: how many jobs that this process had submitted were lost.
        leases: how many leases, of any process, were lost while the pool was shutting down,
            checkouts that still waited included. (A job that was running may be counted in both.)
    """

    def __init__(self, message: str = "", jobs: int = 0, leases: int = 0) -> None:
        super().__init__(message)
        self.jobs = jobs
        self.leases = leases


class ManagerDied(WhitepoolError):
    """The pool's manager process is gone, none can be started in its place, and the workers ended.

    A manager that is killed is replaced, and nobody notices. This one was not: those after it died
    as well, no process can be started, or the process that owned the pool died with it. A call that
    was running may have had its effects. Make a new pool.
    """


class FactoryFailed(WhitepoolError):
    """Workers cannot start: the factory raised, took too long, or the process died in it.

    Raised to whoever waits for a worker when no live one could serve them. The pool goes on trying,
    at growing intervals, so a later checkout may succeed once the reason is gone.

    Attributes:
        remote_traceback: the traceback in the worker, or ``""`` where there was none.
    """

    def __init__(self, message: str = "", remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.__cause__ = RemoteTraceback(remote_traceback)


class LeaseError(WhitepoolError):
    """A lease was used when or where it is not valid.

    After its checkin, after its worker was destroyed, in another pool than its own, or in another
    process or a fork of the one that checked it out. Check out a worker where it is used.
    """


class SerializationError(WhitepoolError):
    """Something on its way to or from a worker could not be pickled or unpickled.

    The message names it: the function, the argument, the result, the factory. Only that call
    failed; the worker lives on. Pass what can be pickled, or build it inside the worker.
    """


class RemoteError(WhitepoolError):
    """A call raised an exception that could not itself be brought over from the worker.

    Its type could not be pickled there, or not be imported here. What can be told of it is here.

    Attributes:
        type_name: the qualified name of the exception's type.
        message: its ``str()``.
        remote_traceback: its traceback in the worker.
    """

    def __init__(
        self, text: str = "", *, type_name: str, message: str = "", remote_traceback: str = ""
    ) -> None:
        super().__init__(text or (f"{type_name}: {message}" if message else type_name))
        self.type_name = type_name
        self.message = message
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.__cause__ = RemoteTraceback(remote_traceback)


class WorkerDied(WhitepoolError):
    """A worker process ended under the call or lease that had it. A replacement is on its way.

    The call was not run again: where ``started`` is true it may have had effects, so whether to
    repeat it is the caller's decision; where it is false nothing of it was run.

    Attributes:
        pool: the pool's name.
        pid: the dead process.
        slot: the worker's place in the pool, which its replacement takes.
        exitcode: its exit code; ``-n`` when signal n ended it.
        age: how long it lived, in seconds.
        calls: how many calls it had begun, the one it was running included.
        rss: its resident memory when it was last looked at, in bytes: when its factory had
            returned, and after each call that took more than 1.5 ms.
        peak_rss: the highest that it ever was, in bytes.
        running: what it was running, such as ``"crunch"``.
        started: whether the call had begun.
        stack: its Python stack at a fatal signal.
        stderr: the last lines (at most 20, and 4 KiB) that it and its children wrote to standard
            error; None if they wrote nothing.
        oom_killed: after a SIGKILL that this pool did not send: whether the kernel's out-of-memory
            killer has struck in the control group of the pool's processes since a worker last died.
            (The kernel counts its kills there, and does not say whom it killed: True means most
            likely this worker. It goes by the group that the pool was started in.) None: it was
            another end, or the kernel does not tell.
        reason: who ended it and why, when it was this pool.
    """

    def __init__(
        self,
        *,
        pool: str,
        pid: int | None = None,
        slot: int | None = None,
        exitcode: int | None = None,
        age: float | None = None,
        calls: int | None = None,
        rss: int | None = None,
        peak_rss: int | None = None,
        running: str | None = None,
        started: bool = False,
        stack: str | None = None,
        stderr: str | None = None,
        oom_killed: bool | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.pid = pid
        self.slot = slot
        self.exitcode = exitcode
        self.age = age
        self.calls = calls
        self.rss = rss
        self.peak_rss = peak_rss
        self.running = running
        self.started = started
        self.stack = stack
        self.stderr = stderr
        self.oom_killed = oom_killed
        self.reason = reason

    @property
    def signal(self) -> str | None:
        """The signal that ended the worker, such as ``"SIGSEGV"``, or None."""
        if self.exitcode is None or self.exitcode >= 0:
            return None
        try:
            from signal import Signals  # not before: importing `enum` for it takes long

            return Signals(-self.exitcode).name
        except (ValueError, ImportError, OSError):
            # A real-time signal has a number only; or no descriptor is left to import it with.
            return f"signal {-self.exitcode}"

    def __str__(self) -> str:
        who = "a worker" if self.slot is None else f"worker {self.slot}"
        parts = [f"{who} of pool {self.pool!r}"]
        if self.pid is not None:
            parts.append(f"(pid {self.pid})")
        parts.append(self._death())
        if self.age is not None:
            parts.append(f"after {_duration(self.age)}")
        if self.calls is not None:
            calls = "1 call" if self.calls == 1 else f"{self.calls} calls"
            parts.append(f"{'after' if self.age is None else 'and'} {calls}")
        if self.running is not None:
            when = "while running" if self.started else "before it began"
            parts.append(f"{when} {_one_line(self.running)}")
        clauses = [" ".join(parts)]
        memory = []
        if self.rss is not None:
            memory.append(f"memory {_size(self.rss)}")
        if self.peak_rss is not None:
            memory.append(f"{'peak' if memory else 'peak memory'} {_size(self.peak_rss)}")
        if memory:
            clauses.append(", ".join(memory))
        if self.reason is not None:
            clauses.append(_one_line(self.reason))
        elif self.signal == "SIGKILL":
            clauses.append(f"not killed by this pool{_KILLERS[self.oom_killed]}")
        lines = ["; ".join(clauses)]
        if self.stack:
            lines.append(self.stack.rstrip())
        said = (self.stderr or "").rstrip().rpartition("\n")[2]
        if said:
            lines.append(f"its last line on standard error: {said}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        told = (f"{name}={value!r}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({', '.join(told)})"

    def _death(self) -> str:
        if self.exitcode is None:
            return "died"
        if self.signal is not None:
            return f"died from {self.signal}"
        return f"exited with code {self.exitcode}"


class AuthenticationFailed(WhitepoolError):
    """The process at the other end does not know the pool's key.

    Raised when a session is used that belongs to another pool at the same address, or to another
    user. Nothing was unpickled from that peer.
    """


class ProtocolError(WhitepoolError):
    """A frame was malformed, oversized or out of order, and its connection was closed.

    Both ends run different versions of this package, or something else wrote to the socket.
    """


_KILLERS = {
    None: ": perhaps the system ran out of memory",
    True: (
        ": most likely by the kernel, for want of memory (its out-of-memory killer has struck in "
        "the pool's control group)"
    ),
    False: ", nor by the kernel's out-of-memory killer",
}


def _duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    if count < 10 * 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"


def _one_line(text: str) -> str:
    return " ".join(text.split())
