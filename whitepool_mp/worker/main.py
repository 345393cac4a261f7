"""A worker from birth to death: arm the switch, build the resource, serve, tear down.

    nursery --fork--> run() --READY--> Server.run() --RETIRE--> teardown --> exit code 0
                        |--FAILED(traceback)--> exit code 1

A worker that was asked to stop ends as an interpreter does: after its teardown it waits for threads
that are no daemons, then runs what `atexit` has. A fresh interpreter does so by itself; a forked
one ends there, as a child of `multiprocessing` does, without destroying what it shares with others.

A worker that cannot say what happened (killed, crashed) says nothing: the manager is its parent and
reads its exit status; `faulthandler` has by then written the Python stack beside the page.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import os
import sys
from _thread import get_ident

from whitepool_mp.wire import frames, pages, passed, payload, signals
from whitepool_mp.wire.boot import Boot
from whitepool_mp.wire.descriptors import Socket
from whitepool_mp.wire.unpickling import load
from whitepool_mp.worker import context, family, linux
from whitepool_mp.worker.calls import told
from whitepool_mp.worker.serve import Server, flush_output

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import TracebackType
    from typing import NoReturn
else:
    import _signal as signal  # as in `linux`


def run(
    boot: Boot,
    slot: int,
    control_fd: int,
    page_fd: int,
    stderr_fd: int,
    stacks_fd: int,
    lifeline: int,
) -> NoReturn:
    """Be a worker, forked from the nursery. Never returns: the process ends here, whatever happens.

    Args: as for `_live`.
    """
    code = 1
    try:
        _forget_inherited_exits()
        code = _live(boot, slot, control_fd, page_fd, stderr_fd, stacks_fd, lifeline)
        _finish()
    finally:
        flush_output()
        os._exit(code)


def _forget_inherited_exits() -> None:
    """Run nothing at this process's end that was registered for the nursery's.

    What such a handler cleans up is shared with other workers (a temporary folder), or belongs to
    threads that are not here. But two modules of the standard library register once, when they are
    imported, what each process is to do with its own. (`multiprocessing` does the same in its own
    forked children, with these names, and there as well its list of children begins empty.)
    """
    atexit._clear()
    process, util = map(sys.modules.get, ("multiprocessing.process", "multiprocessing.util"))
    if process is not None:
        process._children = set()  # type: ignore[attr-defined]
    if util is not None:
        atexit.register(util._exit_function)
    logging = sys.modules.get("logging")
    if logging is not None:
        atexit.register(logging.shutdown)


def _finish() -> None:
    """Do what an interpreter does when it ends: wait for threads, and run what `atexit` has."""
    threading = sys.modules.get("threading")
    if threading is not None:
        # This has no public name. `multiprocessing` calls it at the end of its own forked children,
        # and `concurrent.futures` has its executors' threads end by it.
        threading._shutdown()
    atexit._run_exitfuncs()


def _live(
    boot: Boot,
    slot: int,
    control_fd: int,
    page_fd: int,
    stderr_fd: int,
    stacks_fd: int,
    lifeline: int,
) -> int:
    """Be a worker, up to the end of its teardown. It returns only if it was asked to stop.

    Args:
        boot: what the pool's processes were told at the start.
        slot: this worker's slot.
        control_fd: the socket to the manager.
        page_fd: the memory file with the shared page; a crash report goes behind the page.
        stderr_fd: the pipe that becomes this process's standard error, or -1.
        stacks_fd: the pipe where its stack goes when the manager asks for it, or -1.
        lifeline: the read end of the manager's pipe.

    Returns:
        The exit code.
    """
    code, own, orderly = 1, os.getpid(), False
    try:
        if stderr_fd >= 0:
            _take_stderr(stderr_fd)
        # A session of its own, and with it a process group. As a group of the manager's session it
        # would be sent SIGHUP if the manager died while it is stopped: whoever stopped the members
        # of an orphaned group is taken to be gone. (A session has no terminal unless its leader
        # opens one that is nobody's, without O_NOCTTY; the owner's is the owner's.)
        os.setsid()
        armed = linux.die_with(lifeline)
        linux.be_killed_first()
        _prepare(boot, slot, page_fd)
        family.introduce(f"whitepool worker {boot.name}-{slot}", boot, armed)
        end = _serve(boot, control_fd, page_fd, stacks_fd)
        if isinstance(end, int):
            code = end
        else:
            orderly = True
            end()
            code = 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    if not orderly or os.getpid() != own:
        flush_output()
        os._exit(code & 0xFF)
    return code & 0xFF


def _take_stderr(fd: int) -> None:
    """Make a pipe this process's standard error.

    Its other end is opened here, too, and stays open: should the manager be gone for a moment, what
    is written waits in the pipe, and nobody is told that it is broken.
    """
    with contextlib.suppress(OSError):  # no descriptor is left
        os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.dup2(fd, 2)
    os.close(fd)


def _show_stacks(fd: int) -> int:
    """From now on write this process's stack into a pipe when one of two signals comes.

    At the first one faulthandler does so in the signal's handler: also in C code, whoever holds the
    interpreter's lock; a system call that it interrupts is restarted. But its handler leaves
    another `errno` behind, which matters if code was just about to read it: so that signal is for
    who is asleep, in the kernel, or in C code for long. At the second one Python code is run, as
    at any signal; it is for who is awake.

    A full pipe is not waited for, and a broken one (this end reads as well) breaks nothing.

    Returns:
        What says on the page that it does: by what the main thread is known in such a stack.
    """
    try:
        both = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no descriptor is left
        return 0
    os.close(fd)
    faulthandler.register(pages.STACKS_NOW, file=both, all_threads=True, chain=False)
    signal.signal(pages.STACKS_SOON, lambda *_: faulthandler.dump_traceback(both, True))
    signal.siginterrupt(pages.STACKS_SOON, False)
    return get_ident()


def _prepare(boot: Boot, slot: int, page_fd: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signals.spare_no_fork()
    linux.limit_descriptors(boot.descriptor_limit)  # the manager had raised its own
    sys.argv[:] = boot.argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)  # what was printed before a crash is seen
    os.lseek(page_fd, pages.SIZE, os.SEEK_SET)
    faulthandler.enable(page_fd, all_threads=True)
    linux.widen_signal_stack()
    signals.restore()
    if "numpy.random" in sys.modules:  # forked copies would all draw the same numbers
        sys.modules["numpy.random"].seed()
    context._set(context.WorkerContext(slot, os.getpid(), boot.name))


def _serve(boot: Boot, control_fd: int, page_fd: int, stacks_fd: int) -> int | Callable[[], object]:
    """Build the resource and serve.

    Returns:
        The teardown, if a clean stop was asked for; otherwise the code to exit with at once, since
        nobody is there who would end a process that does not come to its end.
    """
    control = Socket(fileno=control_fd)
    control.setblocking(True)
    stock = [passed.take_out(control)] if boot.stock >= 0 else []
    page = pages.Page(page_fd)
    page.words[pages.PID] = os.getpid()  # also where news of the birth were lost with a manager
    page.order_me()
    if stacks_fd >= 0:
        page.words[pages.THREAD] = _show_stacks(stacks_fd)
    resource = None
    own = os.getpid()
    if boot.factory is not None:
        try:
            resource = load(boot.factory, stock)()
        except BaseException as error:
            if os.getpid() != own:
                raise
            text = told(error, _beyond(error))
            _say(control, frames.plain(frames.FAILED, text))
            return 1
    if os.getpid() != own:  # the factory forked, and its child came back as well
        return 0
    teardown = payload.loads(boot.teardown) if boot.teardown is not None else None
    page.words[pages.RSS] = linux.resident()
    if not _say(control, frames.plain(frames.READY)):
        return 0
    page.words[pages.READY] = 1  # after it was said: a manager that lost the message knows it now
    server = Server(control, page, resource)
    os.register_at_fork(after_in_child=server.close_inherited)
    if not server.run():
        return 0
    server.leave_open()
    return (lambda: None) if teardown is None else functools.partial(teardown, resource)


def _say(control: Socket, frame: bytes) -> bool:
    """Tell the manager how the start went; whether it listens.

    It does not if it was never told of this worker's birth (the nursery or the middleman was killed
    just then): it has ordered another, and is about to kill this one.
    """
    try:
        control.sendall(frame)
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _beyond(error: BaseException) -> TracebackType | None:
    """The traceback without this module's own frame."""
    trace = error.__traceback__
    return trace.tb_next if trace is not None and trace.tb_next is not None else trace


def main(boot_fd: int, slot: int, *fds: int) -> NoReturn:
    """Be a worker in a fresh interpreter (`start_method="loky"`)."""
    from whitepool_mp.wire import boot as boots

    gc.enable()
    signals.spare()
    boot = boots.read(boot_fd)
    os.close(boot_fd)
    for fd in fds[:-1]:  # they came through an exec, and are to go no further
        if fd >= 0:
            os.set_inheritable(fd, False)
    sys.exit(_live(boot, slot, *fds))
