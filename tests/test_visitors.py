"""500 connections at once that say nothing, or nonsense: who belongs here does not notice."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

import pytest
from anatomy import manager
from support import sibling, until

from whitepool_mp import Pool, Session
from whitepool_mp.wire import frames

T = 20.0
"""Seconds that nothing here should need: a deadline against hanging."""

SAID = {
    "nothing": b"",
    "garbage": bytes(range(255, -1, -1)) * 4,
    "half a frame": struct.pack("!i", 100) + b"only this",
    "an oversized frame": struct.pack("!i", 1 << 30) + b"x",
    "a wrong proof": frames.auth(bytes(32), bytes(32), bytes(16), 1, "x"),
    "a request before any proof": frames.request(frames.TERMINATE, 1),
}
PATIENT = ("nothing", "half a frame")
"""What a client that is only slow says, too: it has ten seconds."""


def connection(session: Session, stack: contextlib.ExitStack) -> socket.socket:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.settimeout(T)
    sock.connect(session._member.path)
    return sock


def ended(sock: socket.socket) -> bool:
    """Read to the end of what the manager says."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(65536):
            pass
    return True


@pytest.mark.parametrize("what", ["nothing", "a wrong proof", "all of it"])
def test_500_visitors_cost_nobody_a_call(start_method: str, what: str, tmp_path: Path) -> None:
    said = [SAID[what]] if what in SAID else list(SAID.values())
    with Pool(2, start_method=start_method) as session, sibling(session, tmp_path):
        session.run(abs, -1, timeout=T)
        process = manager(session)
        session.workers()  # what is imported late opens nothing later
        before = process.num_fds()
        with contextlib.ExitStack() as stack:
            visitors = []
            for number in range(500):
                visitors.append(connection(session, stack))
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    visitors[-1].sendall(said[number % len(said)])
                if number % 50 == 0:
                    began = time.monotonic()
                    assert session.run(pow, 2, 3, timeout=T) == 8
                    with session.checkout(T) as lease:
                        assert lease.call(os.getpid, timeout=T) == lease.pid
                    assert time.monotonic() - began < 5
            if what not in (*PATIENT, "all of it"):
                assert all(map(ended, visitors))
            else:  # of those who are silent the oldest are shown out, down to 256
                assert what == "all of it" or ended(visitors[0])
            assert session.run(pow, 2, 4, timeout=T) == 16
        until(lambda: process.num_fds() <= before)
        counters = session.status().counters
        assert (counters["killed"], counters["crashes"]) == (0, 0)
        if what not in (*PATIENT, "all of it"):  # the others hung up themselves
            assert counters["protocol_errors"] + counters["connections_without_proof"] == 500
