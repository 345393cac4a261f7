"""What a pool asks of the kernel and of its surroundings: system calls, /proc, limits, folders."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile

import psutil
import pytest
import seccomp
from anatomy import manager, nursery, workers
from user_script import script

from whitepool_mp import Session

WITHOUT = f"""
sys.path.insert(0, {os.path.dirname(__file__)!r})
import seccomp

def without(call, error):
    try:
        seccomp.without(call, error)
    except OSError:
        tell("no filters")
        sys.exit()
"""

needs_filters = pytest.mark.skipif(not seccomp.NUMBERS, reason="system calls' numbers not known")


def hear(owner: object) -> object:
    """What a script tells, unless it cannot filter system calls or mount."""
    said = owner.hear()  # type: ignore[attr-defined]
    if said in ("no filters", "no mounts"):
        pytest.skip(f"{said} are allowed here")
    return said


@needs_filters
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM], ids=["ENOSYS", "EPERM"])
@pytest.mark.parametrize("call", ["pidfd_open", "pidfd_send_signal", "memfd_create", "prctl"])
def test_a_system_call_that_is_missing_is_named_at_the_start(
    start_method: str, call: str, error: int
) -> None:
    code = f"""
        without({call!r}, {error})
        before = set(os.listdir("/proc/self/fd"))
        try:
            pool(1).run_service()
        except WhitepoolError as problem:
            tell(str(problem))
        tell(set(os.listdir("/proc/self/fd")) == before)
    """
    with script(code, start_method, WITHOUT) as owner:
        said = hear(owner)
        assert isinstance(said, str)
        assert call in said and os.strerror(error) in said
        assert "needed" in said and "seccomp" in said
        assert owner.hear() is True
        _, err = owner.finish()
        assert err == ""


WORKS = """
    with pool(2) as session:
        first = session.run(os.getpid)
        futures = [session.submit(abs, -i) for i in range(50)]
        tell([future.result(timeout=20) for future in futures] == list(range(50)))
        with contextlib.suppress(WorkerDied):
            session.run(os._exit, 3)
        tell(session.run(abs, -2))
"""


@needs_filters
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM], ids=["ENOSYS", "EPERM"])
@pytest.mark.parametrize("call", ["close_range", "membarrier"])
def test_a_system_call_that_can_be_done_without_is(
    start_method: str, call: str, error: int
) -> None:
    with script(f"    without({call!r}, {error})\n" + WORKS, start_method, WITHOUT) as owner:
        assert hear(owner) is True
        assert owner.hear() == 2
        _, err = owner.finish()
        assert err == ""


@needs_filters
def test_a_huge_limit_of_descriptors_is_not_counted_up_to(start_method: str) -> None:
    code = (
        """
    import resource
    with open("/proc/sys/fs/nr_open") as file:
        most = int(file.read())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))
    without("close_range", 38)
    import whitepool_mp.worker.nursery as nursery, whitepool_mp.wire.descriptors as descriptors
    closerange, widths = os.closerange, []
    def counted(low, high):
        widths.append(high - low)
        closerange(low, high)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.closerange = counted
        nursery._leave_manager(write)
        os.write(write, json.dumps([sum(widths), os.listdir("/proc/self/fd")]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    width, left = json.loads(os.read(read, 65536))
    tell([width < 1000, len(left) == 5])
"""
        + WORKS
    )
    with script(code, start_method, WITHOUT) as owner:
        assert hear(owner) == [True, True]
        assert owner.hear() is True
        assert owner.hear() == 2
        owner.finish()


def test_without_proc_a_pool_says_what_is_missing(start_method: str) -> None:
    code = """
        import ctypes, subprocess
        libc = ctypes.CDLL(None)
        CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 16384, 1 << 18
        if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
            tell("no mounts")
            sys.exit()
        if libc.mount(b"none", b"/proc", b"tmpfs", 0, b""):
            tell("no mounts")
            sys.exit()
        try:
            pool(1).run_service()
        except WhitepoolError as problem:
            tell(str(problem))
    """
    with script(code, start_method) as owner:
        said = hear(owner)
        assert isinstance(said, str)
        assert "/proc" in said and "mount" in said
        _, err = owner.finish()
        assert err == ""


def test_a_pool_is_at_home_in_no_folder(start_method: str) -> None:
    """The working directory is gone when it is made, replaced and taken over."""
    folder = tempfile.mkdtemp()
    code = f"""
        sys.path.insert(0, "")
        os.chdir({folder!r})
        os.rmdir({folder!r})
        with pool(2, factory=list) as session:
            tell(session.run(abs, -1))
            with contextlib.suppress(WorkerDied):
                session.run(os._exit, 3)
            tell(session.run(abs, -2))
            owner = session._member.owner
            first = owner.manager
            os.kill(first, signal.SIGKILL)
            while owner.manager == first:
                time.sleep(0.01)
            tell(session.run(abs, -3, timeout=20))
            with contextlib.suppress(WorkerDied):
                session.run(os._exit, 3)
            tell(session.run(abs, -4))
    """
    try:
        with script(code, start_method) as owner:
            assert [owner.hear() for _ in range(4)] == [1, 2, 3, 4]
            owner.finish()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def oom_score(pid: int) -> int:
    with open(f"/proc/{pid}/oom_score_adj") as file:
        return int(file.read())


def test_a_worker_is_killed_for_memory_before_its_owner(session: Session) -> None:
    own = oom_score(os.getpid())
    for worker in workers(session, 2):
        assert oom_score(worker.pid) == min(1000, own + 500)
        worker.kill()
    for worker in workers(session, 2):  # a replacement no more than the first
        assert oom_score(worker.pid) == min(1000, own + 500)
    assert oom_score(manager(session).pid) == oom_score(nursery(session).pid) == own
    child = session.run(_child_score)
    assert child == min(1000, own + 500)


def _child_score() -> int:
    with psutil.Popen(["sleep", "100"]) as process:
        try:
            return oom_score(process.pid)
        finally:
            process.kill()
