"""How a worker ended: what the manager can still find out about it."""

from __future__ import annotations

import os

from whitepool_mp.records import Record
from whitepool_mp.wire import pages

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any
else:
    import _signal as signal  # as in `worker.linux`

OOM_KILLED = "the kernel's out-of-memory killer has struck in its control group"
_OOM_SECONDS = 5.0
"""A kill that was counted so long before a death may have been that death: it takes a while."""
_PF_EXITING = 0x4
_LONGEST_STACK = 32_000
_OWN_FRAME = (
    r'File ".*/whitepool_mp/(worker|manager)/\w+\.py"|File "<string>", line \d+ in <module>'
)


_NOT_NAMES = ("SIG_", "SIGRT", "SIGIOT", "SIGCLD", "SIGPOLL")
"""Other things than signals, and second names of some."""


class Obituary(Record):
    """One worker's end. Times in seconds, memory in bytes; None is unknown.

    `exitcode` is negative for a signal; `reason` says why the pool killed it, if it did; `running`
    whether a call had begun and not ended.
    """

    pid: int | None
    slot: int
    exitcode: int | None
    age: float
    peak_rss: int | None
    calls: int
    stack: str | None
    reason: str | None
    rss: int | None = None
    stderr: str | None = None
    oom_killed: bool | None = None
    running: bool = False

    def describe(self) -> str:
        """One line, for a failed start."""
        if self.exitcode is None:
            return self.reason or "the worker did not start"
        if self.reason is not None:
            return f"the worker was killed while starting: {self.reason}"
        how = f"exit code {self.exitcode}"
        if self.exitcode < 0:
            how = signal_name(-self.exitcode)
            if self.oom_killed:
                how += f" ({OOM_KILLED})"
        text = f"the worker process ended with {how} before its factory returned"
        told = self.stack or (self.stderr and f"its standard error ended with:\n{self.stderr}")
        return f"{text}\n{told}" if told else text

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the wire."""
        return self._asdict()


def unknown(pid: int | None, slot: int, reason: str) -> Obituary:
    """The obituary of a worker of which nothing is known but that it is lost."""
    return Obituary(pid, slot, None, 0.0, None, 0, None, reason)


def read_stack(page: int) -> str | None:
    """What faulthandler wrote behind the shared page, or None; without the worker's own frames."""
    text = os.pread(page, _LONGEST_STACK, pages.SIZE).decode("utf-8", "replace").strip()
    return without_own_frames(text) if text else None


def without_own_frames(text: str) -> str:
    """What faulthandler wrote, without the frames that every worker has."""
    try:
        import re
    except (ImportError, OSError):  # no descriptor is left to import it with
        return text
    return "\n".join(line for line in text.splitlines() if not re.search(_OWN_FRAME, line))


def signal_name(number: int) -> str:
    """A signal by name, such as "SIGSEGV"; by its number if it has none."""
    for name, value in vars(signal).items():
        if value == number and name.startswith("SIG") and not name.startswith(_NOT_NAMES):
            return name
    return f"signal {number}"


def is_exiting(pid: int | None) -> bool:
    """Whether an unreaped child is already on its way out (its exit code is settled).

    Source: proc(5), /proc/pid/stat, field 9; PF_EXITING in the kernel's sched.h.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # no descriptor to look with
        return False
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & _PF_EXITING)


class OomKills:
    """How often the kernel's out-of-memory killer has struck in this process's control group, which
    the workers share.

    It counts whatever process of the group it killed, so a rise says what has most likely become of
    a worker that somebody killed, and no rise says that it was somebody else. It is looked at when
    a worker has died, not before.

    Args:
        clock: the monotonic clock, in seconds.
        listed: the file that names this process's control groups.
        root: where they are mounted.

    Source: cgroups(7); the kernel's cgroup-v2.rst, memory.events, and cgroup-v1/memory.rst,
    memory.oom_control.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        listed: str = "/proc/self/cgroup",
        root: str = "/sys/fs/cgroup",
    ) -> None:
        self._clock = clock
        self._group: str | None = None  # under the second version of control groups
        self._fd = self._open(listed, root)
        self._count = self._read()
        self._rose = float("-inf")

    def _open(self, listed: str, root: str) -> int | None:
        """The file with the counter; None if there is none."""
        for version, controllers, path in _groups(listed):
            if "memory" in controllers.split(","):
                # In a container the mount may begin where the path ends.
                places = f"{root}/memory{path}", f"{root}/memory"
                name = "memory.oom_control"
            elif version == "0":
                places = f"{root}{path}", root
                name = "memory.events"
            else:
                continue
            for place in places:
                try:
                    fd = os.open(f"{place}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                except OSError:
                    continue
                if version == "0":
                    self._group = path.rstrip("/")
                return fd
        return None

    def _read(self) -> int | None:
        if self._fd is None:
            return None
        try:
            for line in os.pread(self._fd, 4096, 0).splitlines():
                if line.startswith(b"oom_kill "):
                    return int(line.split()[1])
        except (OSError, ValueError):
            pass
        return None  # an old kernel does not count

    def look(self) -> bool | None:
        """Whether it has struck lately: since the last look, or within the seconds before; None if
        that cannot be known."""
        before, self._count = self._count, self._read()
        if before is None or self._count is None:
            return None
        now = self._clock()
        if self._count > before:
            self._rose = now
        return now - self._rose <= _OOM_SECONDS

    def covers(self, pid: int) -> bool:
        """Whether a dead child that has not been reaped was in a group that is counted here, as far
        as that can be known."""
        if self._group is None:
            return True
        for version, _, path in _groups(f"/proc/{pid}/cgroup"):
            if version == "0":
                return f"{path}/".startswith(f"{self._group}/")
        return True

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _groups(listed: str) -> list[list[str]]:
    """The lines of a /proc/pid/cgroup: number of the hierarchy, controllers, path."""
    try:
        fd = os.open(listed, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        text = os.read(fd, 1 << 16).decode("utf-8", "surrogateescape")
    except OSError:
        return []
    finally:
        os.close(fd)
    return [fields for line in text.splitlines() if len(fields := line.split(":", 2)) == 3]
