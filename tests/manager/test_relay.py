"""Workers' standard error on its way to the owner's: nothing is lost in order, nothing blocks."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import tempfile
import termios
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from whitepool_mp.manager import relay as relays
from whitepool_mp.manager.loop import Loop
from whitepool_mp.manager.relay import ENOUGH, KEPT, PATIENCE, Relay


class Bench:
    """A relay with an owner's standard error of some kind, and workers."""

    def __init__(self, fd: int) -> None:
        self.now = 10.0
        self.loop = Loop()
        self.relay = Relay(self.loop, lambda: self.now, fd)
        self.writers: list[int] = []
        self.workers: list[Any] = []

    def worker(self) -> tuple[Any, int]:
        """A new one, and the end it writes to."""
        read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        speaker = SimpleNamespace(stderr=read, said=b"", unfinished=b"")
        self.writers.append(write)
        self.workers.append(speaker)
        self.relay.add(speaker)
        return speaker, write

    def settle(self) -> None:
        """Do all that can be done now."""
        for _ in range(10_000):
            if not self.loop.turn(0):
                return
        pytest.fail("it never comes to rest")

    def close(self) -> None:
        for speaker in self.workers:
            self.relay.end(speaker)
        for fd in self.writers:
            os.close(fd)
        if self.relay.unsent:
            self.loop.remove(self.relay._fd)
        if self.relay._sock is not None:
            self.relay._sock.close()
        self.loop.close()


@pytest.fixture
def pipe() -> Iterator[tuple[Bench, int]]:
    """A bench whose owner's standard error is a pipe, and that pipe's read end."""
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read, False)
    bench = Bench(write)
    own = bench.relay._fd
    yield bench, read
    bench.close()
    assert own != write
    for fd in (own, read, write):
        os.close(fd)


def drain(fd: int) -> bytes:
    """Everything that is in a pipe."""
    data = b""
    while True:
        try:
            piece = os.read(fd, 1 << 16)
        except BlockingIOError:
            return data
        if not piece:
            return data
        data += piece


def test_what_a_worker_writes_comes_out(pipe: tuple[Bench, int]) -> None:
    bench, out = pipe
    speaker, write = bench.worker()
    os.write(write, b"one\ntwo\n")
    bench.settle()
    assert drain(out) == b"one\ntwo\n"
    os.write(write, b"a prompt: ")
    bench.settle()
    assert drain(out) == b"a prompt: "  # it is not held back for its end
    assert speaker.said == b"one\ntwo\na prompt: "


def test_the_last_words_come_out_though_others_keep_the_pipe(pipe: tuple[Bench, int]) -> None:
    bench, out = pipe
    speaker, write = bench.worker()
    os.write(write, b"x" * 5000 + b"\nlast\n")
    bench.relay.end(speaker)
    assert drain(out) == b"x" * 5000 + b"\nlast\n"
    assert len(speaker.said) == KEPT and speaker.said.endswith(b"\nlast\n")
    assert speaker.stderr is None
    bench.relay.end(speaker)  # twice is harmless


def test_a_full_pipe_loses_nothing_if_it_is_read_again(pipe: tuple[Bench, int]) -> None:
    bench, out = pipe
    _, write = bench.worker()
    lines = [b"line %d of many\n" % number for number in range(40_000)]
    data, got, at = b"".join(lines), b"", 0
    while len(got) < len(data):
        try:
            at += os.write(write, data[at : at + 50_000]) if at < len(data) else 0
        except BlockingIOError:  # the worker waits, as it would for the owner's pipe itself
            got += drain(out)
        bench.settle()
        if at == len(data):
            got += drain(out)
    assert got == data
    assert bench.relay.dropped == 0
    assert bench.relay.unsent == 0


def test_a_buffer_that_is_full_is_not_filled_further(pipe: tuple[Bench, int]) -> None:
    bench, out = pipe
    _, write = bench.worker()
    written = 0
    while True:
        try:
            written += os.write(write, b"0123456789abcde\n" * 256)
        except BlockingIOError:
            break
        bench.settle()
    assert ENOUGH <= bench.relay.unsent < ENOUGH + (1 << 17)
    assert bench.relay.next_deadline() == bench.now + PATIENCE
    assert bench.relay.dropped == 0
    # It is read again: all goes on as if nothing had been.
    got = b""
    while len(got) < written:
        got += drain(out)
        bench.settle()
    assert got == b"0123456789abcde\n" * (written // 16)
    assert bench.relay.next_deadline() is None
    os.write(write, b"more\n")
    bench.settle()
    assert drain(out) == b"more\n"


def test_who_never_reads_costs_what_does_not_fit_and_holds_nobody_up(
    pipe: tuple[Bench, int],
) -> None:
    bench, out = pipe
    _, write = bench.worker()

    def fill() -> None:
        try:
            while True:
                os.write(write, b"x" * 99 + b"\n")
                bench.settle()
        except BlockingIOError:
            pass

    fill()
    bench.now += PATIENCE - 0.01
    bench.relay.tick(bench.now)
    bench.settle()
    assert bench.relay.dropped == 0
    bench.now += 0.01
    bench.relay.tick(bench.now)
    assert bench.relay.next_deadline() is None
    bench.settle()
    dropped = bench.relay.dropped
    assert dropped > 0
    for _ in range(5000):
        os.write(write, b"x" * 99 + b"\n")  # never full again
        bench.settle()
    assert bench.relay.dropped == dropped + 500_000
    assert bench.relay.unsent < ENOUGH + (1 << 17)
    # And when it reads again: what was kept, whole, and what comes from then on.
    got = b""
    while bench.relay.unsent:
        got += drain(out)
        bench.settle()
    os.write(write, b"the end\n")
    bench.settle()
    got += drain(out)
    assert set(got.splitlines()) == {b"x" * 99, b"the end"}
    assert got.endswith(b"\nthe end\n")


def test_a_reader_that_is_gone_costs_only_the_text() -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    bench = Bench(write)
    _, worker = bench.worker()
    os.write(worker, b"seen\n")
    bench.settle()
    assert os.read(read, 100) == b"seen\n"
    os.close(read)
    for _ in range(3):
        os.write(worker, b"unseen\n")
        bench.settle()
    assert bench.relay.dropped == 21
    own = bench.relay._fd
    bench.close()
    os.close(write)
    os.close(own)


def test_a_reader_that_leaves_while_text_waits() -> None:
    other_read, other_write = os.pipe2(os.O_CLOEXEC)
    other = Bench(other_write)
    _, worker = other.worker()
    for _ in range(40):
        os.write(worker, b"x" * 4095 + b"\n")
        other.settle()
    waiting = other.relay.unsent
    assert waiting > 0
    os.close(other_read)
    other.settle()
    assert other.relay.unsent == 0
    assert other.relay.dropped == waiting
    own = other.relay._fd
    other.close()
    os.close(other_write)
    os.close(own)


def test_a_pipe_without_a_reader_from_the_start() -> None:
    read, write = os.pipe2(os.O_CLOEXEC)
    os.close(read)
    bench = Bench(write)
    _, worker = bench.worker()
    os.write(worker, b"unseen\n")
    bench.settle()
    assert bench.relay.dropped == 7
    own = bench.relay._fd
    bench.close()
    os.close(write)
    os.close(own)


def test_a_closed_standard_error() -> None:
    fd = os.dup(0)
    os.close(fd)
    bench = Bench(fd)
    bench.relay._forward(b"unseen\n")
    assert bench.relay.dropped == 7
    bench.close()


def test_the_owners_flags_stay_as_they_are(pipe: tuple[Bench, int]) -> None:
    """A description that blocks for the owner goes on doing so."""
    read, write = os.pipe2(os.O_CLOEXEC)
    bench = Bench(write)
    assert not fcntl.fcntl(write, fcntl.F_GETFL) & os.O_NONBLOCK
    assert fcntl.fcntl(bench.relay._fd, fcntl.F_GETFL) & os.O_NONBLOCK
    own = bench.relay._fd
    bench.close()
    for fd in (read, write, own):
        os.close(fd)


def test_a_regular_file_keeps_its_place() -> None:
    """Others who have it write behind what is written here, and the other way round."""
    with tempfile.TemporaryFile() as file:
        bench = Bench(file.fileno())
        _, worker = bench.worker()
        os.write(file.fileno(), b"owner 1\n")
        os.write(worker, b"worker\n")
        bench.settle()
        os.write(file.fileno(), b"owner 2\n")
        assert os.pread(file.fileno(), 100, 0) == b"owner 1\nworker\nowner 2\n"
        bench.close()


def test_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        bench = Bench(theirs.fileno())
        _, worker = bench.worker()
        got = b""
        for _ in range(100):
            os.write(worker, b"y" * 4095 + b"\n")
            bench.settle()
        assert bench.relay.unsent > 0
        assert theirs.getblocking()
        while len(got) < 100 * 4096:
            got += ours.recv(1 << 16)
            bench.settle()
        assert got == (b"y" * 4095 + b"\n") * 100
        bench.close()


def test_a_terminal_that_is_stopped_does_not_stop_the_manager() -> None:
    master, slave = pty.openpty()
    attributes = termios.tcgetattr(slave)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    bench = Bench(slave)
    _, worker = bench.worker()
    termios.tcflow(slave, termios.TCOOFF)
    for _ in range(30):
        os.write(worker, b"z" * 999 + b"\n")
        bench.settle()
    assert bench.relay.unsent > 0
    termios.tcflow(slave, termios.TCOON)
    os.set_blocking(master, False)
    got = b""
    while len(got) < 30_000:
        bench.settle()
        got += drain(master)
    assert got == (b"z" * 999 + b"\n") * 30
    own = bench.relay._fd
    bench.close()
    for fd in (master, slave, own):
        os.close(fd)


def test_a_terminal_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be opened anew; then it is asked before each write."""
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(read, False)

    def refuse(*_: Any) -> int:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        bench = Bench(write)
    assert bench.relay._fd == write
    _, worker = bench.worker()
    for _ in range(40):
        os.write(worker, b"x" * 4095 + b"\n")
        bench.settle()
    assert bench.relay.unsent >= 40 * 4096 - (1 << 16)
    got = b""
    while bench.relay.unsent:
        got += drain(read)
        bench.settle()
    assert got + drain(read) == (b"x" * 4095 + b"\n") * 40
    bench.close()
    for fd in (read, write):
        os.close(fd)


def test_lines_of_several_workers_are_whole(pipe: tuple[Bench, int]) -> None:
    """Also those of more than a pipe holds at once, as far as the next one follows soon."""
    bench, out = pipe
    writers = [bench.worker()[1] for _ in range(5)]
    rest = {
        write: b"".join(
            b"worker %d line %d %s\n" % (number, line, b"." * (line % 300)) for line in range(3000)
        )
        for number, write in enumerate(writers)
    }
    sent = dict.fromkeys(writers, 0)
    expected = sorted(b"".join(rest.values()).splitlines())
    got = b""
    while any(sent[write] < len(rest[write]) for write in writers):
        for write in writers:
            if sent[write] < len(rest[write]):
                try:
                    sent[write] += os.write(write, rest[write][sent[write] :])
                except BlockingIOError:
                    pass
        bench.loop.turn(0)
        got += drain(out)
    for speaker in bench.workers:
        bench.relay.end(speaker)
    while bench.relay.unsent:
        bench.settle()
        got += drain(out)
    got += drain(out)
    assert sorted(got.splitlines()) == expected


def test_each_write_is_of_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """And short enough to be one piece for the kernel, which others cannot write into."""
    read, write = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    bench = Bench(write)
    pieces: list[bytes] = []
    real = os.write

    def watched(fd: int, data: Any) -> int:
        pieces.append(bytes(data))
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(relays.os, "write", watched)
        bench.relay._forward(b"".join(b"%d\n" % number for number in range(50_000)))
    assert len(pieces) > 50
    assert all(len(piece) <= 4096 and piece.endswith(b"\n") for piece in pieces)
    pieces.clear()
    with monkeypatch.context() as patch:
        patch.setattr(relays.os, "write", watched)
        bench.relay._forward(b"x" * 10_000)
    assert [len(piece) for piece in pieces] == [4096, 4096, 1808]
    own = bench.relay._fd
    bench.close()
    for fd in (read, write, own):
        os.close(fd)


def test_a_worker_that_closes_its_end_is_not_read_for_ever(pipe: tuple[Bench, int]) -> None:
    bench, _ = pipe
    speaker, write = bench.worker()
    os.close(write)
    bench.writers.clear()
    bench.settle()
    assert speaker.stderr is not None
    bench.relay.end(speaker)
    assert speaker.stderr is None


def test_how_long_the_end_waits_for_the_reader(pipe: tuple[Bench, int]) -> None:
    bench, out = pipe
    _, write = bench.worker()
    assert bench.relay.flush_until(bench.now + 2) is None
    for _ in range(40):
        os.write(write, b"x" * 4095 + b"\n")
        bench.settle()
    assert bench.relay.flush_until(bench.now + 2) == bench.now + PATIENCE
    assert bench.relay.flush_until(bench.now + 0.1) == bench.now + 0.1
    bench.now += 0.9
    drain(out)
    bench.settle()  # it takes something: another second
    assert bench.relay.flush_until(bench.now + 2) == bench.now + PATIENCE
    bench.now += 1.0
    assert bench.relay.flush_until(bench.now + 2) is None
