"""The nursery: a single-threaded process that forks workers, so that a start needs no imports.

    manager --SPAWN(id, slot) + descriptors--> nursery --fork--> middleman --fork--> worker
            <--BORN(id, pid)-------------------------------------'   (exits at once)

The middleman's exit makes the worker a child of the manager (which adopts orphans): the manager
itself learns how a worker ended, and the nursery's death harms no worker. The middleman says BORN
before it exits, so a child of the manager's that no BORN announced is never a worker.

The nursery is forked from the manager, single-threaded as well, so it costs no interpreter start.
It imports all that a worker needs, and the user's `preload` modules: a failure there is reported
and ends it; the manager starts another when it next wants a worker. The manager's end of the socket
between them is in escrow as well, so end-of-file comes when the next manager lets go of it, or when
manager and owner have both ended without a word (SIGKILL). Then the nursery removes the pool's
folder and kills whatever still carries the pool's marker; the kernel has killed the workers by
then.

Importing this module is part of the manager's start, so it imports little itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import struct
import sys

from whitepool_mp.wire import boot as boots
from whitepool_mp.wire import descriptors, folder, lineage, marked, signals
from whitepool_mp.wire.boot import Boot
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.escrow import NURSERY, Escrow
from whitepool_mp.wire.kit import MOST, Kit, unpack
from whitepool_mp.worker import family, linux

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from types import ModuleType
    from typing import Any, NoReturn
else:
    import _signal as signal  # as in `worker.linux`

    ModuleType = type(sys)

SPAWN = struct.Struct("!BQI")
BORN = struct.Struct("!BQI")
SPAWN_KIND = 1
BORN_KIND = 2
UNBORN_KIND = 3
BROKEN_KIND = 4
MAX_TEXT = 32_000
FIRST = 1, 0
"""Number and slot of the worker that every broker wants first."""
_MOMENT_MS = 1000
"""How long a process may take to die."""
_LULL_MS = 500
"""How long there is no order before the nursery imports what later workers may want."""


def fork(boot: Boot, lifeline: int, escrow: Escrow) -> tuple[int, Socket]:
    """Fork a nursery from this process, the manager.

    Args:
        boot: what the pool's processes were told at the start.
        lifeline: the read end of the owner's pipe.
        escrow: where the manager's end is kept as well.

    Returns:
        The nursery's pid, and the manager's end of the socket pair between them (SOCK_SEQPACKET:
        several processes write to the other one).
    """
    ours, theirs = descriptors.pair(descriptors.SEQPACKET)
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            _main(boot, theirs, lifeline)
    escrow.park(NURSERY, (ours.fileno(),))
    return pid, ours


def order(nursery: Socket, worker: int, slot: int, kit: Kit) -> None:
    """Have a nursery start a worker.

    Args:
        nursery: the manager's end to it.
        worker, slot: the worker's number and place.
        kit: what it is given; copies travel.

    Raises:
        OSError: as for `socket.socket.sendmsg`.
    """
    descriptors.send(nursery, SPAWN.pack(SPAWN_KIND, worker, slot), kit.order())


def begin(
    boot: Boot, boot_fd: int, lifeline: int, escrow: Escrow
) -> tuple[tuple[int, Socket], tuple[Kit, int | None] | None]:
    """Fork the nursery, and have the `FIRST` worker started before there is a broker to say so.

    That of a nursery which only starts interpreters is started here, which saves two forks.

    Args:
        boot: what the pool's processes were told at the start.
        boot_fd: the memory file that says it.
        lifeline: the read end of the owner's pipe.
        escrow: where the manager's ends of the sockets are kept as well.

    Returns:
        As from `fork`; and what the worker was given and, if it is born already, its pid. None if
        there is no such worker: the broker will order it as any other, and is told then what is
        wrong.
    """
    pid = None
    try:
        kit = Kit(boot.stock)
    except OSError:
        return fork(boot, lifeline, escrow), None
    try:
        escrow.park(FIRST[0], kit.kept())
        if boot.start_method == "loky":
            pid = _exec(boot, boot_fd, FIRST[1], kit.order(), lifeline)
            # An interpreter takes longer to start than this, and what it started would be killed.
            lineage.mark(pid, lineage.of(FIRST[0]))
        nursery = fork(boot, lifeline, escrow)
        if pid is None:
            order(nursery[1], *FIRST, kit)
    except Exception:
        if pid is not None:
            raise  # there is no nursery: this is the end of the pool
        escrow.drop(FIRST[0])
        kit.close()
        return fork(boot, lifeline, escrow), None
    kit.give()
    return nursery, (kit, pid)


def _main(boot: Boot, sock: Socket, lifeline: int) -> NoReturn:
    """Be the nursery, in a process just forked from the manager. Never returns.

    Args:
        boot: what the pool's processes were told at the start.
        sock: the nursery's end of the socket pair.
        lifeline: the read end of the owner's pipe.
    """
    code = 1
    try:
        _leave_manager(sock.fileno(), lifeline)
        _Nursery(boot, sock, lifeline).run()
        code = 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _leave_manager(*keep: int) -> None:
    """Drop what the fork copied: every descriptor but ours (or end-of-file would never come)."""
    signal.set_wakeup_fd(-1)
    signals.block()  # also what the manager had opened for itself, while that still is caught
    for number in (signal.SIGCHLD, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signals.disregard(signal.SIGINT)
    signals.spare()  # for a preload, and for workers
    lineage.enter(lineage.NURSERY)
    os.setsid()  # for the same reason as a worker: it may be stopped, with orders to carry out
    previous = 2
    for fd in sorted(keep):
        os.closerange(previous + 1, fd)
        previous = fd
    # Beyond those: what is open, and not up to the limit. That may be a thousand million, which
    # takes minutes where the kernel has no `close_range`.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > previous:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


class _Nursery:
    def __init__(self, boot: Boot, sock: Socket, lifeline: int) -> None:
        self._boot = boot
        self._sock = sock
        self._lifeline = lifeline
        self._boot_fd = -1
        self._usual = False

    def run(self) -> None:
        if self._boot.start_method == "loky":
            _lokys_fork_exec()
            self._boot_fd = boots.write(self._boot)
        else:
            import whitepool_mp.worker.main  # noqa: F401

            if not self._preload():
                return
            if b"cloudpickle" in (self._boot.factory or b""):
                from whitepool_mp.wire import by_value  # noqa: F401
        # What is there stays: no worker looks it through for garbage, and so copies no page of it.
        gc.freeze()
        gc.enable()
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN)
        warm = False
        while True:
            if not warm and not poller.poll(_LULL_MS):
                self._warm_up()
                warm = True
            try:
                data, fds = descriptors.receive(self._sock, 64, MOST)
            except ConnectionResetError:
                continue  # said once: closed, with what was said from here unread; orders come next
            if not data:
                break
            _, worker, slot = SPAWN.unpack(data)
            if (worker, slot) != FIRST:
                self._import_usual()
            self._spawn(worker, slot, fds)
        self._clean_up()

    def _preload(self) -> bool:
        if not self._boot.preload:
            return True
        from whitepool_mp.worker import preload

        gc.enable()
        signals.restore()  # programs that user code starts here must be able to get them
        # While user code runs here, the kernel ends this process with the owner.
        spare = os.dup(self._lifeline)
        armed = linux.die_with(spare)
        family.introduce(f"whitepool fork server {self._boot.name}", self._boot, armed)
        sys.argv[:] = self._boot.argv
        problem = preload.load(self._boot.preload)
        if problem:
            self._sock.send(bytes((BROKEN_KIND,)) + problem.encode()[-MAX_TEXT:])
            return False
        linux.disarm(armed)
        os.close(armed)
        signals.block()
        return True

    def _warm_up(self) -> None:
        """Nothing to do just now: import what the next workers may want, and look round."""
        self._import_usual()
        if self._boot.start_method == "forkserver":
            from whitepool_mp.wire import by_value  # noqa: F401

            gc.freeze()
        for place in self._boot.folders:
            if os.path.isdir(place):
                folder.sweep(os.path.dirname(place))

    def _import_usual(self) -> None:
        """Import what most user code does, once for all workers but the first: that one cannot wait
        so long."""
        if self._usual or self._boot.start_method != "forkserver":
            return
        import signal  # noqa: F401
        import socket  # noqa: F401
        import threading  # noqa: F401
        import traceback  # noqa: F401
        import typing  # noqa: F401

        self._usual = True
        gc.freeze()

    def _spawn(self, worker: int, slot: int, fds: list[int]) -> None:
        poller = select.poll()
        for fd in fds[:1]:  # its control socket; none if there was no descriptor for it here
            poller.register(fd, 0)
        if poller.poll(0):  # hung up: its manager died, and the next one did not take it over
            for fd in fds:
                os.close(fd)
            return
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        try:
            middleman = os.fork()
        except OSError as error:
            self._unborn(worker, error)
        else:
            if middleman == 0:
                self._middleman(worker, slot, fds)
            if os.waitpid(middleman, 0)[1]:  # killed: if it said BORN before, this is ignored
                self._unborn(worker, OSError("the process between the nursery and it was killed"))
        finally:
            for fd in fds:
                os.close(fd)

    def _unborn(self, worker: int, error: OSError) -> None:
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(ConnectionError):  # that manager is dead: the next one sees
            self._sock.send(BORN.pack(UNBORN_KIND, worker, 0) + text.encode()[-MAX_TEXT:])

    def _middleman(self, worker: int, slot: int, fds: list[int]) -> NoReturn:
        try:
            lineage.enter(lineage.of(worker))  # before there is the worker, which inherits it
            if self._boot.start_method == "loky":
                pid = _exec(self._boot, self._boot_fd, slot, fds, self._lifeline)
            else:
                pid = os.fork()
                if pid == 0:
                    self._sock.close()
                    from whitepool_mp.worker import main as worker_main

                    worker_main.run(self._boot, slot, *unpack(fds), self._lifeline)
            self._sock.send(BORN.pack(BORN_KIND, worker, pid))
        except OSError as error:
            self._unborn(worker, error)
        finally:
            os._exit(0)

    def _clean_up(self) -> None:
        """Nobody wants workers from here any more: another manager has a nursery of its own, or the
        owner has ended too. If the pool ended in order there is nothing left to find."""
        poller = select.poll()
        poller.register(self._lifeline, select.POLLIN)
        # The two ends of a dying owner come one after the other.
        if not poller.poll(_MOMENT_MS):
            return
        folder.remove(self._boot.folders)
        marked.kill(self._boot.pool_id)


def _exec(boot: Boot, boot_fd: int, slot: int, fds: list[int], lifeline: int) -> int:
    """Start a fresh interpreter that is a worker; its pid."""
    numbers = slot, *unpack(fds), lifeline
    command = boots.command(boot.interpreter, boot_fd, "whitepool_mp.worker.main", *numbers)
    pid: int = _lokys_fork_exec()(command, (boot_fd, *fds, lifeline))
    return pid


_fork_exec: Any = None


def _lokys_fork_exec() -> Any:
    """loky's `fork_exec`, from its own file: nothing else of loky is needed here, and importing the
    package takes longer than all the rest of a start. So does `subprocess`, of which that file
    wants one constant."""
    global _fork_exec
    if _fork_exec is not None:
        return _fork_exec
    import _posixsubprocess  # noqa: F401  # for what it does; once here, for every middleman
    from importlib.machinery import PathFinder, SourceFileLoader

    package = PathFinder.find_spec("loky")  # finds it, and runs nothing of it
    assert package is not None and package.submodule_search_locations is not None
    path = os.path.join(package.submodule_search_locations[0], "backend", "fork_exec.py")
    module = ModuleType("loky.backend.fork_exec")
    known = "subprocess" in sys.modules
    if not known:
        sys.modules["subprocess"] = _Subprocess("subprocess")
    try:
        SourceFileLoader(module.__name__, path).exec_module(module)
    finally:
        if not known:
            del sys.modules["subprocess"]
    _fork_exec = module.fork_exec
    return _fork_exec


class _Subprocess(ModuleType):
    """What loky's file takes for `subprocess`: the real one stands behind it."""

    _USE_VFORK = True

    def __getattr__(self, name: str) -> Any:
        import subprocess

        return getattr(subprocess, name)
