"""What a worker is given at its birth, and what the manager keeps of each.

    manager  <--control (a socket pair)-->  worker
             <--stderr (a pipe)-----------  worker's descriptor 2
             <--stacks (a pipe)-----------  where its stack goes when it is asked for
             ---page (a memory file)------

The pipes are a convenience: when there is no descriptor left for them a worker is started without,
and writes to the descriptor 2 that it inherits.
"""

from __future__ import annotations

import fcntl
import os

from whitepool_mp.wire import descriptors, pages, passed

MOST = 4
"""How many descriptors a worker is given at most."""


class Kit:
    """The manager's ends, and the worker's until they are on their way.

    Attributes:
        page: the memory file; both use the same.
        control: the manager's end of the socket pair.
        stderr, stacks: the read ends of the pipes, None if there are none.
        given: what the worker gets besides the page: its end of the socket pair, and the write ends
            if there are pipes.

    Args:
        stock: the descriptors that its factory needs, or -1 (see `passed.store`).

    Raises:
        OSError: there are no descriptors left.
    """

    __slots__ = ("control", "given", "page", "stacks", "stderr")

    def __init__(self, stock: int = -1) -> None:
        self.stderr: int | None = None
        self.stacks: int | None = None
        self.given: list[int] = []
        self.page = os.memfd_create("whitepool-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.page, pages.SIZE)
            # Whoever took pages of it away would have all who mapped them die of it (SIGBUS).
            fcntl.fcntl(self.page, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self.control, theirs = descriptors.pair()
        except OSError:
            os.close(self.page)
            raise
        if stock >= 0:
            passed.hand_out(stock, self.control)
        self.given.append(theirs.detach())
        try:
            stderr = os.pipe2(os.O_CLOEXEC)
        except OSError:
            return
        try:
            stacks = os.pipe2(os.O_CLOEXEC)
        except OSError:
            for fd in stderr:
                os.close(fd)
            return
        self.stderr, self.stacks = stderr[0], stacks[0]
        self.given += stderr[1], stacks[1]
        for fd in self.stderr, self.stacks:
            os.set_blocking(fd, False)

    def kept(self) -> list[int]:
        """The manager's descriptors: control, page and, if there are pipes, their read ends."""
        pipes = [fd for fd in (self.stderr, self.stacks) if fd is not None]
        return [self.control.fileno(), self.page, *pipes]

    def order(self) -> list[int]:
        """The descriptors that travel to whoever starts the worker; see `unpack`."""
        return [self.given[0], self.page, *self.given[1:]]

    def give(self) -> None:
        """The worker has its ends, or never will: close them here."""
        while self.given:
            os.close(self.given.pop())

    def close(self) -> None:
        """There is no worker: close everything."""
        self.give()
        self.control.close()
        for fd in self.page, self.stderr, self.stacks:
            if fd is not None:
                os.close(fd)


def unpack(fds: list[int]) -> tuple[int, int, int, int]:
    """The worker's ends of what was ordered: control, page, stderr and stacks; -1 for no pipe."""
    control, page, *pipes = fds
    stderr, stacks = pipes or (-1, -1)
    return control, page, stderr, stacks
