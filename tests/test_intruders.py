"""Whoever is not let in, and what those who are may say: nobody else's pool, nobody else's harm.

The manager's socket is the one door. Nothing that comes through it is unpickled, by anybody, and
nothing of the user's at all in the manager: it does not even have a pickle to do that with.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deeds
import psutil
import pytest
import test_layers as layers
from anatomy import manager, nursery, workers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import fork, until, whole
from user_script import script

from whitepool_mp import AuthenticationFailed, Pool, Session, WhitepoolError
from whitepool_mp.client.joining import Handshake
from whitepool_mp.client.link import Link
from whitepool_mp.errors import ProtocolError
from whitepool_mp.manager.clients import HANDSHAKE_SECONDS, MAX_SILENT
from whitepool_mp.wire import auth, frames

SOON = 20.0
NOBODY = 65534


@pytest.fixture
def session(start_method: str) -> Iterator[Session]:
    with Pool(2, start_method=start_method) as running:
        workers(running, 2)
        yield running


def visit(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(SOON)
    sock.connect(path)
    return sock


def shown_out(sock: socket.socket) -> bytes:
    """All that the manager says, until it closes the connection."""
    heard = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            heard += data
    return heard


def join(session: Session) -> Link:
    """A client of this pool that is not this process's usual one."""
    link = Link(*session._member.joining()[:2], os.urandom(frames.MEMBER_BYTES))
    link._sock.settimeout(SOON)
    return link


def serves_on(session: Session) -> None:
    """A connection that is there, and a new one: a checkout and a call, each in its time."""
    assert session.run(pow, 2, 3, timeout=5) == 8

    def fresh() -> int:
        with session.checkout(timeout=5) as lease:
            return lease.call(pow, 2, 4, timeout=5)

    with ThreadPoolExecutor(1) as one:
        assert one.submit(fresh).result(SOON) == 16


def open_in(process: psutil.Process) -> int:
    """How many descriptors it has open."""
    return len(os.listdir(f"/proc/{process.pid}/fd"))


# --- another user -----------------------------------------------------------------------------

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def as_nobody(work: Callable[[], str]) -> str:
    """Do it in a process of another user; what it gave, or the error's name."""
    read, write = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            try:
                said = work()
            except Exception as error:
                said = type(error).__name__
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@as_root
def test_another_user_does_not_get_to_the_socket(session: Session) -> None:
    path = session._member.path
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    before = session.status().counters["connections"]

    def knock() -> str:
        visit(path)
        return "connected"

    assert as_nobody(knock) == "PermissionError"
    assert session.status().counters["connections"] == before
    serves_on(session)


@as_root
def test_another_user_who_gets_to_the_socket_does_not_get_in(session: Session) -> None:
    path = session._member.path
    os.chmod(path, 0o777)
    os.chmod(os.path.dirname(path), 0o755)

    address = session._member.joining()[0]

    def knock() -> str:
        Link(address, bytes(frames.KEY_BYTES), os.urandom(frames.MEMBER_BYTES))
        return "in"

    assert as_nobody(knock) == "AuthenticationFailed"
    assert session.status().counters["connections_without_proof"] == 1
    serves_on(session)


# --- before the proof -------------------------------------------------------------------------


def test_a_wrong_key_gets_a_denial_and_nothing_else(session: Session) -> None:
    with visit(session._member.path) as sock:
        challenge = sock.recv(65536)
        answer = Handshake(b"x" * frames.KEY_BYTES, bytes(16)).hear(challenge[4:])
        assert answer is not None
        sock.sendall(answer + frames.request(frames.TERMINATE, 1))
        (body,) = frames.FrameDecoder().feed(shown_out(sock))
    assert body == bytes((frames.DENIED,))
    assert session.status().counters["connections_without_proof"] == 1
    serves_on(session)


def test_a_proof_that_was_overheard_opens_nothing(session: Session) -> None:
    """Each connection is challenged anew."""
    with visit(session._member.path) as sock:
        key = session._member.joining()[1]
        proof = Handshake(key, bytes(16)).hear(sock.recv(65536)[4:])
        assert proof is not None
    for _ in range(3):
        with visit(session._member.path) as sock:
            sock.sendall(proof)
            heard = frames.FrameDecoder().feed(shown_out(sock))
            assert [body[0] for body in heard] == [frames.CHALLENGE, frames.DENIED]
    with pytest.raises(AuthenticationFailed):
        Link(session._member.joining()[0], key[::-1], bytes(16))
    serves_on(session)


def test_500_silent_connections_are_held_off_and_leave_nothing(session: Session) -> None:
    """More than may be unproven at once: some are hung up on at once, the rest in their time."""
    keeper = manager(session)
    serves_on(session)
    before = open_in(keeper)
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        silent = [stack.enter_context(visit(session._member.path)) for _ in range(500)]
        while time.monotonic() < began + 3:
            serves_on(session)
        most = open_in(keeper)
        assert most <= before + MAX_SILENT + 4
        counters = session.status().counters
        assert counters["connections_without_proof"] >= 500 - MAX_SILENT

        def all_gone() -> bool:
            """every silent connection hung up on"""
            serves_on(session)
            return session.status().counters["connections_without_proof"] == 500

        until(all_gone, HANDSHAKE_SECONDS + 10)
        heard = [frames.FrameDecoder().feed(shown_out(sock)) for sock in silent]
        # They got a challenge, if so much, and no word of the pool's.
        assert {body[0] for bodies in heard for body in bodies} == {frames.CHALLENGE}
    until(lambda: open_in(keeper) <= before + 2)
    serves_on(session)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(("", "length", "kind", "most of it", "all of it")),
    st.binary(min_size=1, max_size=3000),
)
def visit_with_nonsense(session: Session, begin: str, nonsense: bytes) -> None:
    """Something that begins as a proof should, and goes on as it should not."""
    proof = frames.auth(bytes(32), bytes(32), bytes(16), os.getpid(), "thread")
    ends = {"": 0, "length": 4, "kind": 5, "most of it": 80, "all of it": len(proof)}
    with visit(session._member.path) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(proof[: ends[begin]] + nonsense)
            sock.shutdown(socket.SHUT_WR)
        heard = frames.FrameDecoder().feed(shown_out(sock))
    # (A reset may take away what was said, the challenge even.)
    assert {body[0] for body in heard} <= {frames.CHALLENGE, frames.DENIED}


def test_no_nonsense_before_the_proof_gets_anybody_in_or_out(session: Session) -> None:
    keeper = manager(session)
    serves_on(session)
    before = open_in(keeper)
    with session.checkout(timeout=SOON) as lease:
        visit_with_nonsense(session)
        assert lease.call(pow, 2, 3, timeout=5) == 8
    until(lambda: open_in(keeper) <= before)
    serves_on(session)
    assert manager(session) == keeper


def test_descriptors_that_a_visitor_sends_along_go_nowhere(session: Session) -> None:
    keeper = manager(session)
    serves_on(session)
    before = open_in(keeper)
    with visit(session._member.path) as sock, open(os.devnull) as null:
        for part in (struct.pack("!i", 1000), *[b"\0"] * 20):
            socket.send_fds(sock, [part], [null.fileno()] * 50)
        link = join(session)
        socket.send_fds(link._sock, [frames.request(frames.STATUS, 1)], [null.fileno()] * 50)
        assert frames.read_reply(link.wait(1, None))["pool_size"] == 2
        assert open_in(keeper) <= before + 2
        link.close()
    serves_on(session)


# --- clients ----------------------------------------------------------------------------------


NUMBER = st.sampled_from((0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1))
LEASE = st.sampled_from((0, 1, 2, 3, 4, 5, 2**32, 2**40, 2**63, 2**64 - 1))
DEADLINE = st.sampled_from((float("-inf"), -1.0, 0.0, 5e-324, 1.7e308, float("nan"), float("inf")))
SAID = st.one_of(
    st.builds(
        lambda number, flags, deadline, site: frames.frame(
            struct.pack("!BQBd", frames.CHECKOUT, number, flags, deadline) + site
        ),
        NUMBER,
        st.integers(0, 255),
        DEADLINE,
        st.binary(max_size=50),
    ),
    st.builds(frames.checkin, LEASE),
    st.builds(frames.destroy, LEASE, st.text(max_size=20)),
    st.builds(frames.request_lease, st.sampled_from((frames.OPEN, frames.WHY)), NUMBER, LEASE),
    st.builds(
        frames.request, st.sampled_from((frames.CANCEL, frames.STATUS, frames.WORKERS)), NUMBER
    ),
    # Sizes that cannot be: those that can are any client's to ask for.
    st.builds(frames.resize, NUMBER, st.just(0), NUMBER),
    st.builds(frames.resize, NUMBER, st.sampled_from((10_001, 2**32 - 1)), NUMBER),
)
ENDS = {frames.DRAIN, frames.TERMINATE, frames.RESIZE}
"""What a client may ask for and get: the end of the pool, or other sizes."""


def is_harmless(data: bytes) -> bool:
    """Whether this asks for none of that."""
    try:
        bodies = frames.FrameDecoder(limit=64 * 1024).feed(data)
    except ProtocolError:
        return True
    for body in bodies:
        if body[0] == frames.RESIZE and len(body) >= 13:
            _, size, overflow = frames.read_resize(body)
            return not 1 <= size <= size + overflow <= 10_000
    return not any(body[0] in (frames.DRAIN, frames.TERMINATE) for body in bodies)


@st.composite
def garbled(draw: st.DrawFn) -> bytes:
    """Frames with a few bytes of them changed."""
    data = bytearray(b"".join(draw(st.lists(SAID, min_size=1, max_size=4))))
    for _ in range(draw(st.integers(1, 3))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(SAID, max_size=8), (st.binary(max_size=200) | garbled()).filter(is_harmless))
@example([frames.checkin(n) + frames.destroy(n, "spite") for n in range(1, 6)], b"")
def say_odd_things(session: Session, said: list[bytes], last: bytes) -> None:
    """A client that has the key, and knows no manners."""
    link = join(session)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link._sock.sendall(b"".join(said) + last)
            link._sock.shutdown(socket.SHUT_WR)
        shown_out(link._sock)
    finally:
        link.close()


def test_nothing_that_a_client_says_harms_another_client(session: Session) -> None:
    keeper = manager(session)
    held = session.checkout(timeout=SOON)
    pid = held.call(os.getpid, timeout=SOON)
    say_odd_things(session)
    assert held.call(os.getpid, timeout=5) == pid
    held.checkin()
    whole(session)
    serves_on(session)
    assert manager(session) == keeper
    now = session.status()
    assert (now.pool_size, now.max_overflow, now.counters["crashes"]) == (2, 0, 0)
    assert now.counters["foreign_checkins"] > 0  # it was tried


def test_what_is_said_of_another_s_lease_is_nothing(session: Session) -> None:
    """A checkin, a destroy, an open, a why: each names a lease that somebody else has."""
    with session.checkout(timeout=SOON) as held:
        pid = held.call(os.getpid, timeout=SOON)
        link = join(session)
        link._sock.sendall(frames.checkin(held.id) + frames.destroy(held.id, "spite"))
        assert link.open(held.id, time.monotonic() + SOON) is None
        assert link.why(held.id, time.monotonic() + SOON) is None
        status = session.status()
        assert status.leased == 1
        assert status.counters["foreign_checkins"] == 2
        assert held.call(os.getpid, timeout=5) == pid
        link.close()
    whole(session)


def test_a_deadline_that_is_no_number_is_never_in_the_queue(session: Session) -> None:
    """Those who wait before and behind it are served in their order."""
    leases = [session.checkout(timeout=SOON) for _ in range(2)]
    order: list[int] = []

    def wait(number: int) -> None:
        with session.checkout(timeout=SOON):
            order.append(number)

    with ThreadPoolExecutor(4) as threads:
        futures = []
        for number in range(4):
            futures.append(threads.submit(wait, number))
            until(lambda number=number: session.status().waiting == number + 1)
            link = join(session)
            odd = frames.checkout(1, True, float("nan"), "x")
            late = frames.checkout(2, True, -1.7e308, "x")
            link._sock.sendall(late)
            assert frames.read_refused(link.wait(2, None)).why == "timeout"
            link._sock.sendall(odd)
            assert shown_out(link._sock) == b""
            link.close()
        leases[0].checkin()
        for future in futures:
            future.result(SOON)
    leases[1].checkin()
    assert order == [0, 1, 2, 3]
    assert session.status().counters["protocol_errors"] == 4
    whole(session)


@pytest.mark.parametrize("word", ["\x01", "\ufffd", "\\", "\U0001f600"], ids=ascii)
def test_no_client_s_words_burst_what_others_are_told(session: Session, word: str) -> None:
    """What a client says of itself is shown to others, in a frame that they must still accept."""
    words = word.encode() * (60_000 // len(word.encode()))
    key, nonce = session._member.joining()[1], bytes(32)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(visit(session._member.path))
            challenge = frames.read_nonce(sock.recv(65536)[4:])
            proof = auth.client_proof(key, challenge, nonce)
            begin = struct.pack("!B32s32s16sI", frames.AUTH, nonce, proof, os.urandom(16), 1)
            sock.sendall(frames.frame(begin + words[:900]))
            assert sock.recv(65536)[4] == frames.WELCOME
            ask = struct.pack("!BQBd", frames.CHECKOUT, 1, 1, float("inf"))
            sock.sendall(frames.frame(ask + words))
        until(lambda: session.status().leased == 2)
        rows = session.workers()
        assert len(rows) == 2
        for row in rows:
            assert row.site is not None and row.holder_thread is not None
            assert 0 < len(row.site) <= 500 and 0 < len(row.holder_thread) <= 500
            assert set(row.site) == {word}
    whole(session)


# --- workers ----------------------------------------------------------------------------------

WORDS = {
    "a release cut short": frames.frame(bytes((frames.RELEASED,))),
    "a release of no lease": frames.released(2**64 - 1),
    "ready": frames.plain(frames.READY),
    "failed": frames.plain(frames.FAILED, "x" * 5000),
    "an unknown kind": frames.frame(b"\xc8"),
    "an oversized frame": struct.pack("!i", 1 << 20) + bytes(2000),
    "a negative length": struct.pack("!i", -5),
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("what", WORDS)
def test_whatever_a_worker_tells_the_manager_costs_that_worker_alone(
    session: Session, what: str, tmp_path: Path
) -> None:
    """User code there may write to any descriptor of its process."""
    keeper = manager(session)
    with session.checkout(timeout=SOON) as other:
        pid = other.call(os.getpid, timeout=SOON)
        with session.checkout(timeout=SOON) as lease:
            # A release that is not awaited is nothing worse than late.
            timeout = 1 if what == "a release of no lease" else SOON
            with pytest.raises(WhitepoolError):
                lease.call(deeds.write_to_manager, WORDS[what], timeout=timeout)
        assert other.call(os.getpid, timeout=5) == pid
    serves_on(session)
    whole(session)
    assert manager(session) == keeper


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from((frames.READY, frames.FAILED, frames.RELEASED, 0, 0xFF)),
    st.binary(max_size=16),
    st.binary(max_size=16),
)
@example(frames.RELEASED, b"", b"")
def hear_nonsense_of_a_worker(session: Session, kind: int, body: bytes, more: bytes) -> None:
    """A frame that is none, or comes at the wrong time; and perhaps some of another."""
    data = frames.frame(bytes((kind,)) + body) + more
    # (A release of a lease that is not kept is no more than late, and the start of a frame waits
    # for the rest of it: then the worker goes on.)
    future = session.submit(deeds.write_to_manager, data, timeout=1)
    assert isinstance(future.exception(SOON), WhitepoolError)


def test_random_words_of_workers_cost_no_manager(session: Session) -> None:
    keeper = manager(session)
    with session.checkout(timeout=SOON) as other:
        hear_nonsense_of_a_worker(session)
        assert other.call(pow, 2, 3, timeout=5) == 8
    whole(session)
    assert manager(session) == keeper


def test_a_worker_cannot_take_shared_memory_from_under_the_manager(session: Session) -> None:
    """Reading what is not there any more would be the manager's death, by SIGBUS."""
    keeper = manager(session)
    cut = session.run(deeds.cut_page, timeout=SOON)
    assert cut == []
    assert len(session.workers()) == 2  # the manager reads the page for this
    serves_on(session)
    assert manager(session) == keeper


def test_nonsense_of_the_nursery_costs_the_nursery_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules that it preloads may write to any descriptor of its process, too."""
    (tmp_path / "rude.py").write_text(
        "import os\n"
        f"first = not os.path.exists({str(tmp_path / 'done')!r})\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "for fd in os.listdir('/proc/self/fd') if first else ():\n"
        "    try:\n"
        "        if os.readlink('/proc/self/fd/' + fd).startswith('socket:'):\n"
        "            os.write(int(fd), b'\\x02abc')\n"
        "            os.write(int(fd), b'\\xff' * 30)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Pool(1, preload=["rude"], start_method="forkserver") as session:
        keeper = manager(session)
        assert session.run(pow, 2, 3, timeout=SOON) == 8
        assert manager(session) == keeper
        assert "rude" in session.run(lambda: list(sys.modules), timeout=SOON)


# --- nothing is unpickled where it should not be ----------------------------------------------


def bomb(path: Path) -> bytes:
    """A pickle that leaves a trace where it is loaded."""
    data = pickle.dumps(deeds.OnUnpickling(deeds.note, str(path)), 5)
    pickle.loads(data)
    assert deeds.noted(path) == [os.getpid()]  # it works
    path.unlink()
    return data


def test_a_pickle_through_the_door_is_not_loaded(session: Session, tmp_path: Path) -> None:
    """Bare, in a frame, as a proof, as the name of a thread; after the proof, as any request."""
    path = tmp_path / "loaded"
    data = bomb(path)
    unproven = [
        data,
        frames.frame(data),
        frames.frame(bytes((frames.AUTH,)) + data),
        frames.frame(bytes((frames.AUTH,)) + bytes(84) + data),
        struct.pack("!i", len(data)) + data,
    ]
    for said in unproven:
        with visit(session._member.path) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(said)
                sock.shutdown(socket.SHUT_WR)
            shown_out(sock)
    for kind in (*range(1, 14), *range(64, 72), *range(128, 134), 255):
        if kind in ENDS:
            continue
        link = join(session)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            link._sock.sendall(frames.frame(bytes((kind,)) + bytes(13) + data))
            link._sock.shutdown(socket.SHUT_WR)
        shown_out(link._sock)
        link.close()
    serves_on(session)
    assert deeds.noted(path) == []


def test_a_client_s_pickle_is_loaded_by_nobody_but_workers_and_clients(
    start_method: str, tmp_path: Path
) -> None:
    """Factory, arguments, results, exceptions, items of a map, a teardown: each says where it was
    loaded."""
    paths = {name: str(tmp_path / name) for name in ("factory", "in", "out", "error", "teardown")}

    def loaded(name: str, value: Any) -> Any:
        return deeds.OnUnpickling(deeds.witness, paths[name], value)

    pool = Pool(
        2,
        0,
        loaded("factory", deeds.Counter),
        teardown=loaded("teardown", deeds.echo),
        start_method=start_method,
    )
    with pool as session:
        processes = workers(session, 2)
        ours = {process.pid for process in processes}
        others = {manager(session).pid, nursery(session).pid}
        with session.checkout(timeout=SOON) as lease:
            lease.call(lambda counter, value: value, loaded("in", 1), timeout=SOON)
            lease.get().add(loaded("in", 1))
            lease.call(lambda counter, path: deeds.OnUnpickling(deeds.note, path), paths["out"])
        session.run(deeds.echo, loaded("in", 1), timeout=SOON)
        session.submit(deeds.echo, loaded("in", 1)).result(SOON)
        assert list(session.map(deeds.echo, [loaded("in", 1)] * 4)) == [1] * 4
        assert list(session.map(deeds.add, [loaded("in", 1)] * 4, [1] * 4)) == [2] * 4
        back = session.map(deeds.OnUnpickling, [deeds.note] * 3, [paths["out"]] * 3)
        assert len(list(back)) == 3
        for raised in (session.run, lambda *args: session.submit(*args).result(SOON)):
            with pytest.raises(deeds.Witnessed):
                raised(deeds.throw, deeds.Witnessed, paths["error"])
        assert session.status().counters["crashes"] == 0
    pids = {name: set(deeds.noted(path)) for name, path in paths.items()}
    assert pids["factory"] == pids["teardown"] == ours
    assert pids["in"] <= ours and pids["in"]
    assert pids["out"] == {os.getpid()}
    assert pids["error"] <= ours | {os.getpid()} and os.getpid() in pids["error"]
    assert not others & set().union(*pids.values())


HOOK = """
import os, sys

def told(event, args):
    if event == "pickle.find_class" or (event == "import" and "pickle" in args[0]):
        fd = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{{os.getpid()}} {{event}} {{args[0]}}\\n".encode())
        os.close(fd)

sys.addaudithook(told)
"""

BUSY = """
    session = pool(2, factory=dict)
    with session as session:
        told = cast(session)
        with session.checkout(timeout=10) as lease:
            lease.call(lambda resource: None)
            lease.get().get(1)
        session.submit(pow, 2, 3).result(10)
        list(session.map(pow, range(30), range(30)))
        try:
            session.run(lambda: 1 / 0)
        except ZeroDivisionError:
            pass
        victim = session.run(os.getpid)
        os.kill(victim, signal.SIGKILL)
        session.resize(3, 1)
        while session.status().available < 3:
            pass
        session.workers()
        time.sleep(0.7)  # it imports what it may want later
        def maps_of(pid):
            with open(f"/proc/{pid}/maps") as file:
                return file.read()
        maps = maps_of(told["pids"][0])
        workers = [maps_of(row.pid) for row in session.workers()]
        tell([told["pids"][0], maps, workers])
"""


def test_a_manager_never_has_a_pickle_to_load_anything_with(
    start_method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import _pickle

    trace = tmp_path / "trace"
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(path=str(trace)))
    monkeypatch.setattr("user_script.ROOT", f"{tmp_path}{os.pathsep}{layers.ROOT.parent}")
    with script(BUSY, start_method) as client:
        pid, maps, workers = client.hear(40)
        _, err = client.finish()
    assert err == ""
    file = getattr(_pickle, "__file__", None)
    if file is not None:  # else it is part of the interpreter
        assert os.path.basename(file) not in maps
        assert all(os.path.basename(file) in each for each in workers)
    events = [line.split() for line in trace.read_text().splitlines()]
    assert len({line[0] for line in events}) > 1  # the hook works, elsewhere
    assert [line for line in events if int(line[0]) == pid] == []


NURSERY_S = {"_Nursery", "_main"}
"""What of the nursery's module runs in the nursery only, after the fork."""


def imports(name: str, path: Path) -> Iterator[str]:
    """What a module imports when it is imported, and in its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if name == "worker.nursery":
        tree.body = [each for each in tree.body if getattr(each, "name", "") not in NURSERY_S]
    # `if TYPE_CHECKING:` is for type checkers; its `else` is what runs.
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            inner = getattr(node, field, None)
            if isinstance(inner, list):
                setattr(
                    node,
                    field,
                    [
                        part
                        for each in inner
                        for part in (
                            each.orelse
                            if isinstance(each, ast.If)
                            and isinstance(each.test, ast.Name)
                            and each.test.id == "TYPE_CHECKING"
                            else [each]
                        )
                    ],
                )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached(start: str) -> dict[str, str]:
    """Every module, ours or not, that can be imported from one of ours on: by which of ours."""
    files = dict(layers.modules())
    found, queue = {}, [start]
    while queue:
        name = queue.pop()
        for other in imports(name, files[name]):
            if other in found:
                continue
            found[other] = name
            ours = other.removeprefix("whitepool_mp.")
            if ours in files and ours != other:
                queue.append(ours)
    return found


def test_no_import_of_the_manager_s_leads_to_a_pickle() -> None:
    found = reached("manager.main")
    assert "whitepool_mp.manager.core" in found and "whitepool_mp.wire.frames" in found
    assert [(name, found[name]) for name in found if "pickle" in name] == []
    assert "whitepool_mp.wire.payload" not in found and "whitepool_mp.wire.messages" not in found
    assert "_pickle" in reached("worker.main")  # it is seen where it is
