"""The process that made the pool: starting its manager, and seeing that it ends."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading

from whitepool_mp.config import PoolConfig, worker_env
from whitepool_mp.errors import WhitepoolError
from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import frames, payload
from whitepool_mp.wire.boot import Boot

_LONGEST_PATH = 100
"""A Unix socket's path has at most 107 bytes."""
_PATIENCE = 10.0


class Owner:
    """The manager as its parent sees it.

    Attributes:
        path: the socket to join by, in a folder that only this user may enter.
        key: the pool's key.
        exitcode: how the manager ended; None while it lives or if nobody can know.
    """

    def __init__(self, config: PoolConfig) -> None:
        if not hasattr(os, "pidfd_open") or not hasattr(os, "memfd_create"):
            raise WhitepoolError(
                f"whitepool_mp needs Linux 5.3 or newer; this is {sys.platform}, without pidfds"
            )
        factory = teardown = None
        if config.factory is not None:
            factory = payload.dump_function(config.factory, "factory")
        if config.teardown is not None:
            teardown = payload.dump_function(config.teardown, "teardown")
        self.pid = os.getpid()
        self.key = os.urandom(frames.KEY_BYTES)
        self.pool_id = os.urandom(12).hex()
        self.exitcode: int | None = None
        self._reaped = False
        self._waiting = 0
        self._lock = threading.RLock()
        self.folder = _folder(self.pool_id)
        self.path = os.path.join(self.folder, "manager")
        try:
            self._start(config, factory, teardown)
        except BaseException:
            _remove(self.folder)
            raise

    def _start(self, config: PoolConfig, factory: bytes | None, teardown: bytes | None) -> None:
        boot = Boot(
            pool_id=self.pool_id,
            name=config.name,
            key=self.key,
            owner=self.pid,
            folder=self.folder,
            policy=tuple(config.policy()),
            start_method=config.start_method,
            preload=tuple(config.preload),
            env=worker_env(config),
            factory=factory,
            teardown=teardown,
            sys_path=[os.path.abspath(entry) if entry == "" else entry for entry in sys.path],
            argv=list(sys.argv),
            interpreter=_interpreter(),
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(self.path)
            except OSError as error:  # its folder's disk is full
                raise WhitepoolError(
                    f"the socket of pool {config.name!r} could not be made in {self.folder}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            listener.listen(4096)
            fd = boots.write(boot)
            try:
                command = boots.command(
                    boot.interpreter,
                    fd,
                    "whitepool_mp.manager.main",
                    listener.fileno(),
                    # Workers that are forked are what the manager was when it started.
                    site=config.start_method != "loky",
                )
                process = subprocess.Popen(
                    command,
                    pass_fds=(fd, listener.fileno()),
                    env={**os.environ, boots.MARKER: self.pool_id},
                )
            except OSError as error:
                raise WhitepoolError(
                    f"the manager of pool {config.name!r} could not be started: "
                    f"{type(error).__name__}: {error}"
                ) from error
            finally:
                os.close(fd)
        self.manager = process.pid
        process.returncode = 0  # it is ours to wait for from here on
        try:
            self._pidfd = os.pidfd_open(self.manager)
        except BaseException:  # no descriptor is left, or an interrupt: nobody would ever end it
            os.kill(self.manager, signal.SIGKILL)
            os.waitpid(self.manager, 0)
            raise

    def wait(self, timeout: float | None) -> bool:
        """Wait for the manager to end, and reap it.

        Args:
            timeout: at most how long, in seconds; None for ever.

        Returns:
            Whether it has ended. Its folder is gone then.
        """
        with self._lock:
            if self._reaped:
                return True
            self._waiting += 1
        try:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            ended = bool(poller.poll(None if timeout is None else timeout * 1000))
        finally:
            with self._lock:
                self._waiting -= 1
        with self._lock:
            if ended and not self._reaped:
                self._reap()
            if self._reaped and not self._waiting and self._pidfd >= 0:
                os.close(self._pidfd)  # nobody polls it any more
                self._pidfd = -1
        return ended

    def _reap(self) -> None:
        self._reaped = True
        try:
            _, status = os.waitpid(self.manager, 0)
            self.exitcode = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            self.exitcode = None  # other code of this process reaped it
        _remove(self.folder)

    def end(self) -> None:
        """End the pool now: ask the manager to, and kill it if it does not.

        Does nothing in a process that was forked from the owner.
        """
        if os.getpid() != self.pid or self._reaped:
            return
        self._signal(signal.SIGTERM)
        if not self.wait(_PATIENCE):
            # Stopped or stuck. Its death is the workers' (the kernel sees to it); the nursery kills
            # what else is left.
            self._signal(signal.SIGKILL)
            self.wait(None)

    def ask_to_end(self) -> int | None:
        """Ask the manager to end the pool.

        Returns:
            A descriptor that is readable when it has ended, the caller's to close (a copy: whoever
            reaps the manager meanwhile closes the original); None if it has ended.
        """
        self._signal(signal.SIGTERM)
        with self._lock:
            return None if self._reaped else os.dup(self._pidfd)

    def _signal(self, number: int) -> None:
        with self._lock:
            if not self._reaped:
                with contextlib.suppress(ProcessLookupError):  # other code of ours reaped it
                    signal.pidfd_send_signal(self._pidfd, number)

    def forked(self) -> None:
        """In a forked child: this is not ours."""
        if not self._reaped:
            os.close(self._pidfd)
            self._reaped = True


def _interpreter() -> list[str]:
    """How to start an interpreter with the flags of this one."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags]


def _folder(pool_id: str) -> str:
    """A new folder for the socket, short enough for one, that only this user may enter.

    It is where `tempfile` would put it, without the 3 ms that importing that takes.
    """
    chosen = getattr(sys.modules.get("tempfile"), "tempdir", None)
    wishes = (os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    problem: OSError | None = None
    for base in (chosen, *wishes, "/tmp", "/var/tmp"):
        if not base or len(os.fsencode(base)) + 40 > _LONGEST_PATH:
            continue
        try:
            folder = os.path.join(os.path.abspath(base), f"whitepool-{pool_id[:16]}")
            os.mkdir(folder, 0o700)
        except OSError as error:
            problem = problem or error
        else:
            return folder
    raise WhitepoolError(f"there is no temporary folder to be had: {problem}") from problem


def _remove(folder: str) -> None:
    """Remove a pool's folder, in which there is at most the socket.

    It takes no descriptor, which `shutil.rmtree` would: there may be none left.
    """
    for remove, path in ((os.unlink, os.path.join(folder, "manager")), (os.rmdir, folder)):
        with contextlib.suppress(OSError):  # the manager or the nursery was quicker
            remove(path)
