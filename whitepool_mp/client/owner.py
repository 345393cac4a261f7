"""The process that made the pool: starting its manager, and another one in its place if it dies.

    Owner --starts--> manager     what they leave to each other: ledger, escrow (`wire`), listener
      |-- makes the folder        where the listener has its name (`folder`)
      '-- a thread waits for its death: in order, that is the end; otherwise another takes over

The lifeline is a pipe that nobody writes to. Its end-of-file tells the workers (by way of the
kernel), the manager and the nursery that the owner is gone, has become another program (`exec`), or
has given the pool up.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

from whitepool_mp.client import folder as folders
from whitepool_mp.client import heritage, interpreter, kernel
from whitepool_mp.client.adopted import Adopted
from whitepool_mp.client.interpreter import Proof
from whitepool_mp.client.poller import check as check_waiting
from whitepool_mp.config import PoolConfig
from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import folder as pool_folder
from whitepool_mp.wire import frames, marked, passed, payload, signals
from whitepool_mp.wire import ledger as ledgers
from whitepool_mp.wire.boot import Boot
from whitepool_mp.wire.ledger import Ledger

_PATIENCE = 10.0
_FALSE_STARTS = 3
"""How many managers in a row may die before they serve, until the pool is given up."""
_QUICK_SECONDS = 1.0
_QUICK_DEATHS = 20
"""How many in a row may die within a second of their start."""


_LULL_MS = 1000
"""How long after the start this process imports what it may want when that cannot be had."""
_QUEUE_BYTES = 1 << 20
"""Room for descriptors in escrow, of which the kernel gives what it allows."""


class Owner:
    """The manager as its parent sees it, whichever it is just now.

    Attributes:
        address: how to join, by a socket in a folder that only this user may enter.
        folder: that folder.
        key: the pool's key.
        manager: the pid of the manager that was started last.
        exitcode: how the last manager that ended did; None if nobody can know.
        lost: whether the pool has ended because its manager died and there is no other.
        why: what is in the way of another, if that is known.
    """

    def __init__(self, config: PoolConfig) -> None:
        check_waiting()
        kernel.require()
        factory = teardown = None
        stocked: list[passed.Outgoing] = []
        if config.factory is not None:
            factory, stocked = payload.dump_factory(config.factory)
        if config.teardown is not None:
            teardown = payload.dump_function(config.teardown, "teardown")
        command = interpreter.choose()
        self._environment = heritage.environment(config)
        # Locks and shared memory that they refer to are there for as long as these are.
        self._given = config.factory, config.teardown
        self.pid = os.getpid()
        self.key = os.urandom(frames.KEY_BYTES)
        self.pool_id = os.urandom(12).hex()
        self.exitcode: int | None = None
        self.lost = False
        self.why = ""
        self._name = config.name
        self._ending = False
        self._forked = False
        self._over = threading.Event()
        self._lock = threading.RLock()  # a signal may find its thread anywhere
        self._pidfd = -1
        self._adopted = Adopted()
        self._deaths = self._false_starts = 0
        self._boot = Boot(
            pool_id=self.pool_id,
            name=config.name,
            key=self.key,
            owner=self.pid,
            folders=folders.candidates(self.pool_id),
            policy=tuple(config.policy()),
            start_method=config.start_method,
            preload=tuple(config.preload),
            factory=factory,
            teardown=teardown,
            sys_path=heritage.search_path(config),
            argv=heritage.arguments(),
            interpreter=command,
            descriptor_limit=heritage.descriptor_limit(),
            family=heritage.family(),
        )
        self._open: contextlib.ExitStack | None = None
        self._thread = threading.Thread(target=self._watch, name="whitepool-owner", daemon=True)
        step = f"the manager of pool {config.name!r} could not be started"
        try:
            self._prepare(stocked)
            self._begin()
            step = f"pool {config.name!r} needs a thread that watches its manager"
            self._thread.start()
        except BaseException as error:
            if self._open is not None:
                if self._pidfd >= 0:
                    self._signal(signal.SIGKILL)
                    self._reap()
                self._finish()
            if isinstance(error, (OSError, RuntimeError)):
                raise WhitepoolError(f"{step}: {type(error).__name__}: {error}") from error
            raise

    # --- managers -------------------------------------------------------------------------

    def _prepare(self, stocked: list[passed.Outgoing]) -> None:
        """Make what managers leave to each other.

        Args:
            stocked: what travels with the factory, if anything does.
        """
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            self._inlet, self._outlet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(self._inlet)
            stack.enter_context(self._outlet)
            self._inlet.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
            self._ledger_fd = ledgers.create()
            stack.callback(os.close, self._ledger_fd)
            self._ledger = Ledger(self._ledger_fd)
            stack.callback(self._ledger.close)
            self._end_fd = os.eventfd(0, os.EFD_CLOEXEC)
            stack.callback(os.close, self._end_fd)
            # Nobody ever writes to it: it ends with this process, or when this closes it.
            self._lifeline, end = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, self._lifeline)
            stack.callback(os.close, end)
            # What is written to it stays there, for one manager after the other.
            self._listening, self._listens = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, self._listening)
            stack.callback(self._close_listens)
            for outgoing in stocked:
                stock = stack.enter_context(passed.store(outgoing))
                self._boot.stock = stock.fileno()
            self._open = stack.pop_all()

    def _listen(self) -> None:
        """Make the folder and the socket in it, now that there is a manager to remove them, and
        have that go on."""
        assert self._open is not None
        self.folder, self.address = folders.listen(self._boot.folders, self._listener, self._open)
        os.write(self._listens, b"!")
        self._close_listens()

    def _close_listens(self) -> None:
        fd, self._listens = self._listens, -1
        if fd >= 0:
            os.close(fd)

    def _begin(self) -> None:
        """Start the first manager, and wait until it is known to be one."""
        proof = Proof()
        try:
            self._launch(proof.fd)
            self._listen()
            proof.wait(self._pidfd, self._boot.interpreter)
        finally:
            proof.close()

    def _launch(self, proof: int = -1) -> None:
        """Start a manager.

        Args:
            proof: the descriptor that it has to prove itself by, if it is the first.

        Raises:
            OSError: that is not possible now.
        """
        self._ledger.words[ledgers.LAUNCHED] += 1
        given = (
            self._listener.fileno(),
            self._ledger_fd,
            self._lifeline,
            self._inlet.fileno(),
            self._outlet.fileno(),
            self._end_fd,
            self._listening,
        )
        stock = (self._boot.stock,) if self._boot.stock >= 0 else ()
        fd = boots.write(self._boot)
        before = signals.block()  # inherited: signals of others never reach it
        try:
            command = boots.command(
                self._boot.interpreter,
                fd,
                "whitepool_mp.manager.main",
                *given,
                # Workers that are forked are what the manager was when it started.
                site=self._boot.start_method != "loky",
                proof=proof,
            )
            environment = {**self._environment, boots.MARKER: self.pool_id}
            if proof >= 0:
                environment[boots.STARTING] = self.pool_id
            process = subprocess.Popen(
                command,
                pass_fds=(fd, *given, *stock, *([proof] if proof >= 0 else [])),
                env=environment,
            )
            process.returncode = 0  # it is ours to wait for from here on
            self.manager = process.pid
            self._launched = time.monotonic()
            try:
                self._pidfd = os.pidfd_open(process.pid)
            except BaseException:  # no descriptor is left: nobody would ever end it
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
                raise
        finally:
            os.close(fd)
            signals.restore(before)

    def _watch(self) -> None:
        """The thread: wait for the manager's death, and start another one unless it is the end.

        And reap what a killed one's death made this process's children, as it ends.
        """
        try:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(_LULL_MS):
                _warm_up()
            going_on = True
            while going_on:
                poller = select.poll()
                for fd in (self._pidfd, *self._adopted.held.values()):
                    poller.register(fd, select.POLLIN)
                ended = {fd for fd, _ in poller.poll()}
                if self._pidfd not in ended:
                    self._adopted.look()
                    continue
                with self._lock:
                    self._reap()
                    over = self._ending or self._ledger.words[ledgers.FINISHED]
                    going_on = not over and self._again()
                if going_on:
                    self._adopted.look()
        finally:
            self._finish()

    def _reap(self) -> None:
        try:
            # Not waitpid: gevent's waits for its own event loop to reap the process.
            ended = os.waitid(os.P_PID, self.manager, os.WEXITED)
            assert ended is not None
            code = ended.si_status
            self.exitcode = code if ended.si_code == os.CLD_EXITED else -code
        except ChildProcessError:
            self.exitcode = None  # other code of this process reaped it
        os.close(self._pidfd)
        self._pidfd = -1

    def _again(self) -> bool:
        """Start another manager in the place of one that died; whether there is one."""
        words = self._ledger.words
        served = words[ledgers.SERVED] == words[ledgers.LAUNCHED]
        quick = time.monotonic() - self._launched < _QUICK_SECONDS
        self._false_starts = 0 if served else self._false_starts + 1
        self._deaths = self._deaths + 1 if quick else 0
        if self._false_starts < _FALSE_STARTS and self._deaths < _QUICK_DEATHS:
            try:
                self._launch()
                return True
            except Exception as error:
                # No process or no descriptor is to be had, the interpreter is gone, this one is
                # about to end: whatever it is, it is not for this thread to die of.
                self.why = f" ({type(error).__name__}: {error})"
        self.lost = True
        return False

    def _finish(self) -> None:
        """The pool has ended: what it had in this process is closed, and what is left is killed."""
        try:
            orderly = bool(self._ledger.words[ledgers.FINISHED])
            with self._lock:
                self._close()
            if not orderly:
                with contextlib.suppress(OSError):  # no descriptor is left to look with
                    marked.kill(self.pool_id)
            if self._deaths:
                self._adopted.end(_PATIENCE)
            pool_folder.remove(self._boot.folders)
        finally:
            self._over.set()

    def _close(self) -> None:
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    # --- the end --------------------------------------------------------------------------

    @property
    def listens(self) -> bool:
        """Whether there still is what managers listen at."""
        return self._open is not None

    def wait(self, timeout: float | None) -> bool:
        """Wait for the pool to end.

        Args:
            timeout: at most how long, in seconds; None for ever.

        Returns:
            Whether it has ended. Its last manager is reaped, its folder gone and the thread that
            watched it has ended then (unless it is that thread which asks).
        """
        if self._forked:
            return True
        over = self._over.wait(timeout)
        if over and threading.current_thread() is not self._thread:
            self._thread.join()
        return over

    def end(self) -> None:
        """End the pool now: ask the manager to, and kill it if it does not.

        Does nothing in a process that was forked from the owner.
        """
        if self._forked or os.getpid() != self.pid:
            return
        if sys.is_finalizing():
            self._end_alone()
            return
        self._ask()
        if threading.current_thread() is self._thread:
            return  # collected there: the thread is about to see to it
        if not self.wait(_PATIENCE):
            # Stopped or stuck. The workers end with the lifeline.
            self._signal(signal.SIGKILL)
            self.wait(None)

    def _end_alone(self) -> None:
        """The interpreter is being taken down, and the thread that watches gets no turn any more:
        not to see the end, nor to let go of a lock."""
        if self._pidfd < 0 or self._open is None:
            return
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        os.eventfd_write(self._end_fd, 1)
        if not poller.poll(_PATIENCE * 1000):
            self._send(signal.SIGKILL)
            poller.poll()
        self._close()
        pool_folder.remove(self._boot.folders)

    def ask_to_end(self) -> int | None:
        """Ask the manager to end the pool.

        Returns:
            A descriptor that is readable when it has ended, the caller's to close; None if it has
            ended.
        """
        with self._lock:
            self._ask()
            return None if self._forked or self._open is None else os.dup(self._lifeline)

    def _ask(self) -> None:
        with self._lock:
            self._ending = True
            if self._open is not None:
                os.eventfd_write(self._end_fd, 1)

    def _signal(self, number: int) -> None:
        with self._lock:
            self._send(number)

    def _send(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # other code of ours reaped it
                signal.pidfd_send_signal(self._pidfd, number)

    def forked(self) -> None:
        """In a forked child: this is not ours."""
        self._forked = True
        self._close()
        self._adopted.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _warm_up() -> None:
    """Have ready what is wanted at deaths and at the end: the interpreter's files may be gone then,
    replaced under a process that lives for long."""
    with contextlib.suppress(Exception):  # they are gone already
        import json  # noqa: F401
        import traceback  # noqa: F401

        import whitepool_mp.client.threaded  # noqa: F401
