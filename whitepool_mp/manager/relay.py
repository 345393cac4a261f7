"""What workers write to standard error, on its way to the owner's.

    worker's descriptor 2 --pipe--> Relay --> this process's descriptor 2, which is the owner's
                                      '-----> Hand.said: the last of it, for an obituary

Lines go on whole, as far as they came whole: each write is of whole lines, and short enough not to
be mixed with what others write to the same pipe.

Guarantees: the manager never waits for whoever reads the owner's standard error. What cannot be
written now waits in a buffer of limited size. When that is full the workers' pipes are not read any
more, so that who writes too much waits, as without a pool; but if the reader takes nothing at all
for a while (a stopped terminal, a pipe that nobody empties), what does not fit is dropped and
counted.
"""

from __future__ import annotations

import functools
import os
import select
import stat

from whitepool_mp.manager.loop import WRITE, Loop
from whitepool_mp.wire.descriptors import DONTWAIT, Socket

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Speaker(Protocol):
        """A worker, as far as this module looks at it: a `Hand`."""

        stderr: int | None
        said: bytes
        unfinished: bytes


KEPT = 4096
"""How many of the last bytes are kept for an obituary."""
PATIENCE = 1.0
"""Seconds for which a reader that takes nothing is waited for."""
ENOUGH = 256 << 10
"""Bytes in the buffer with which the workers' pipes are not read any more."""
_MOST = 4 << 20
"""Bytes in the buffer; the last words of dead workers go there up to this."""
_READ = 1 << 16
_ALL = 1 << 20
"""As much as a pipe can hold, by default for unprivileged users."""
_WHOLE = 4096
"""A write to a pipe of no more than this (PIPE_BUF) is not mixed with others."""
_CUT = 1 << 14
"""If this much was in a pipe, it may have been full, and the last line be cut."""


class Relay:
    """Reads the workers' standard error and writes it to the owner's.

    Args:
        loop: where descriptors are waited for.
        clock: the monotonic clock, in seconds.
        fd: the owner's standard error; it stays as it is.

    Attributes:
        dropped: how many bytes nobody took in time.
    """

    def __init__(self, loop: Loop, clock: Callable[[], float], fd: int = 2) -> None:
        self._loop = loop
        self._clock = clock
        self._sources: dict[int, Speaker] = {}
        self._unsent = bytearray()
        self._since = 0.0  # when the reader last took something, or began to take nothing
        self._paused = False
        self._dropping = False
        self.dropped = 0
        self._fd = fd
        self._sock: Socket | None = None
        self._poll: select.poll | None = None
        self._whole = False
        self._open()

    def _open(self) -> None:
        """Get a way to descriptor 2 that never blocks, and does not change it for the others who
        have it."""
        try:
            mode = os.fstat(self._fd).st_mode
        except OSError:
            return  # there is none; each write will say so
        if stat.S_ISREG(mode):
            self._whole = True
            return  # a file has its place for all who write to it, and does not block
        try:
            if stat.S_ISSOCK(mode):
                self._sock = Socket(fileno=os.dup(self._fd))
                self._fd = self._sock.fileno()
                return
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
            self._fd = os.open(f"/proc/self/fd/{self._fd}", flags)
        except OSError:  # nobody reads it; or it is another user's terminal: ask before each write
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)

    # --- in -------------------------------------------------------------------------------

    def add(self, speaker: Speaker) -> None:
        """Read a worker's standard error from now on."""
        if speaker.stderr is not None:
            self._sources[speaker.stderr] = speaker
            if not self._paused:
                self._listen(speaker.stderr, speaker)

    def end(self, speaker: Speaker) -> None:
        """A worker is dead: take what is still in its pipe, and close it. Whoever else may have the
        other end is not waited for."""
        fd = speaker.stderr
        if fd is None:
            return
        try:
            data = os.read(fd, _ALL)
        except OSError:
            data = b""
        self._loop.remove(fd)
        self._sources.pop(fd, None)
        os.close(fd)
        speaker.stderr = None
        self._take(speaker, data, last=True)

    def _listen(self, fd: int, speaker: Speaker) -> None:
        self._loop.add(fd, functools.partial(self._heard, fd, speaker))

    def _heard(self, fd: int, speaker: Speaker, _: int) -> None:
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._take(speaker, data)
        else:  # it has closed its standard error
            self._loop.remove(fd)
            del self._sources[fd]

    def _take(self, speaker: Speaker, data: bytes, last: bool = False) -> None:
        speaker.said = (speaker.said + data)[-KEPT:]
        data, speaker.unfinished = speaker.unfinished + data, b""
        if not last and len(data) >= _CUT:
            end = data.rfind(b"\n") + 1
            if 0 < end < len(data) <= end + _CUT:  # the rest of that line is about to come
                data, speaker.unfinished = data[:end], data[end:]
        self._forward(data)

    # --- out ------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """How many bytes wait until the reader takes them."""
        return len(self._unsent)

    def next_deadline(self) -> float | None:
        """When to stop waiting for a reader that takes nothing."""
        return self._since + PATIENCE if self._paused else None

    def tick(self, now: float) -> None:
        """Read on, and drop what does not fit, if the reader has taken nothing for so long."""
        if self._paused and now >= self._since + PATIENCE:
            self._dropping = True
            self._resume()

    def flush_until(self, deadline: float) -> float | None:
        """Until when it is worth waiting for the reader now; None if nothing is left to write, or
        it takes nothing.

        Args:
            deadline: when to give up in any case.
        """
        until = min(deadline, self._since + PATIENCE)
        return until if self._unsent and self._clock() < until else None

    def _forward(self, data: bytes) -> None:
        if self._unsent:
            room = (ENOUGH if self._dropping else _MOST) - len(self._unsent)
            if len(data) > room:
                self.dropped += len(data)
                return
            self._unsent += data
        elif data:
            self._since = self._clock()
            sent = self._write(memoryview(data))
            if sent < len(data):
                self._watch(data[sent:])
        if len(self._unsent) >= ENOUGH and not (self._paused or self._dropping):
            self._pause()

    def _write(self, data: memoryview) -> int:
        """Write what goes now, whole lines at a time; how much of it is done with."""
        at = 0
        while at < len(data):
            end = len(data)
            if end - at > _WHOLE and not self._whole:
                piece = bytes(data[at : at + _WHOLE])
                end = at + (piece.rfind(b"\n") + 1 or _WHOLE)
            try:
                if self._sock is not None:
                    sent = self._sock.send(data[at:end], DONTWAIT)
                elif self._poll is not None and not self._poll.poll(0):
                    return at
                else:
                    sent = os.write(self._fd, data[at:end])
            except BlockingIOError:
                return at
            except OSError:  # nobody reads it, there is none, the disk is full: it is lost
                self.dropped += len(data) - at
                return len(data)
            at += sent
        return at

    def _watch(self, data: bytes) -> None:
        try:
            self._loop.add(self._fd, self._writable, WRITE)
        except OSError:  # it is nothing that can be waited for
            self.dropped += len(data)
        else:
            self._unsent += data

    def _writable(self, _: int) -> None:
        sent = self._write(memoryview(bytes(self._unsent[:_READ])))
        del self._unsent[:sent]
        if sent:
            self._since = self._clock()
            self._dropping = False
        if not self._unsent:
            self._loop.remove(self._fd)
        if self._paused and len(self._unsent) < ENOUGH // 2:
            self._resume()

    def _pause(self) -> None:
        self._paused = True
        for fd in self._sources:
            self._loop.remove(fd)

    def _resume(self) -> None:
        self._paused = False
        for fd, speaker in self._sources.items():
            self._listen(fd, speaker)


def last_lines(said: bytes, lines: int = 20) -> str | None:
    """The last lines of what was kept of a worker's standard error; None if it wrote nothing."""
    if not said:
        return None
    if len(said) >= KEPT:
        said = said[said.find(b"\n") + 1 :] or said  # the first line may be cut
    return "\n".join(said.decode("utf-8", "replace").rstrip("\n").splitlines()[-lines:])


__all__ = ["Relay", "last_lines"]
