"""How a worker ended: what the manager can still find out about it."""

from __future__ import annotations

import os

from whitepool_mp.records import Record
from whitepool_mp.wire import pages

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from typing import Any

_PF_EXITING = 0x4
_LONGEST_STACK = 32_000
_OWN_FRAME = (
    r'File ".*/whitepool_mp/(worker|manager)/\w+\.py"|File "<string>", line \d+ in <module>'
)


class Obituary(Record):
    """One worker's end. Times in seconds, memory in bytes; None is unknown.

    `exitcode` is negative for a signal; `reason` says why the pool killed it, if it did.
    """

    pid: int | None
    slot: int
    exitcode: int | None
    age: float
    peak_rss: int | None
    calls: int
    stack: str | None
    reason: str | None

    def describe(self) -> str:
        """One line, for a failed start."""
        if self.exitcode is None:
            return self.reason or "the worker did not start"
        if self.reason is not None:
            return f"the worker was killed while starting: {self.reason}"
        how = f"exit code {self.exitcode}"
        if self.exitcode < 0:
            how = f"signal {-self.exitcode}"
        text = f"the worker process ended with {how} before its factory returned"
        return f"{text}\n{self.stack}" if self.stack else text

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the wire."""
        return self._asdict()


def unknown(pid: int | None, slot: int, reason: str) -> Obituary:
    """The obituary of a worker of which nothing is known but that it is lost."""
    return Obituary(pid, slot, None, 0.0, None, 0, None, reason)


def read_stack(page: int) -> str | None:
    """What faulthandler wrote behind the shared page, or None; without the worker's own frames."""
    text = os.pread(page, _LONGEST_STACK, pages.SIZE).decode("utf-8", "replace").strip()
    if not text:
        return None
    try:
        import re
    except (ImportError, OSError):  # no descriptor is left to import it with
        return text
    return "\n".join(line for line in text.splitlines() if not re.search(_OWN_FRAME, line))


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
