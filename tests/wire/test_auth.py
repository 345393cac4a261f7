"""Joining: both sides prove that they have the key, and no proof is worth anything twice."""

from __future__ import annotations

import os
import threading

import pytest

from whitepool_mp.client.joining import Handshake
from whitepool_mp.errors import AuthenticationFailed, ProtocolError
from whitepool_mp.wire import auth, frames

KEY = b"k" * frames.KEY_BYTES
OTHER_KEY = b"o" * frames.KEY_BYTES
MEMBER = b"m" * frames.MEMBER_BYTES


def body(frame: bytes) -> bytes:
    (only,) = frames.FrameDecoder().feed(frame)
    return only


class Gate:
    """The manager's side, as `manager.clients` computes it."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.nonce = os.urandom(frames.NONCE_BYTES)

    def challenge(self) -> bytes:
        return body(frames.challenge(self.nonce))

    def judge(self, answer: bytes) -> bytes:
        said = frames.read_auth(body(answer))
        if not auth.same(auth.client_proof(self.key, self.nonce, said.nonce), said.proof):
            return body(frames.plain(frames.DENIED))
        return body(frames.welcome(auth.server_proof(self.key, self.nonce, said.nonce)))


def test_the_right_key_lets_in_after_one_round_trip() -> None:
    gate, client = Gate(KEY), Handshake(KEY, MEMBER)
    answer = client.hear(gate.challenge())
    assert answer is not None and not client.done
    assert client.hear(gate.judge(answer)) is None
    assert client.done


def test_a_client_tells_who_it_is() -> None:
    answer = Handshake(KEY, MEMBER).hear(Gate(KEY).challenge())
    assert answer is not None
    said = frames.read_auth(body(answer))
    assert (said.member, said.pid) == (MEMBER, os.getpid())
    assert said.thread == threading.current_thread().name


def test_a_client_with_a_wrong_key_is_denied() -> None:
    gate, client = Gate(KEY), Handshake(OTHER_KEY, MEMBER)
    answer = client.hear(gate.challenge())
    assert answer is not None
    verdict = gate.judge(answer)
    assert verdict[0] == frames.DENIED
    with pytest.raises(AuthenticationFailed, match="refused"):
        client.hear(verdict)
    assert not client.done


def test_a_client_does_not_talk_to_whoever_lacks_the_key() -> None:
    impostor, client = Gate(OTHER_KEY), Handshake(KEY, MEMBER)
    answer = client.hear(impostor.challenge())
    assert answer is not None
    said = frames.read_auth(body(answer))
    forged = frames.welcome(auth.server_proof(OTHER_KEY, impostor.nonce, said.nonce))
    with pytest.raises(AuthenticationFailed, match="does not have the pool's key"):
        client.hear(body(forged))
    assert not client.done


def test_a_client_s_own_proof_does_not_convince_it() -> None:
    impostor, client = Gate(OTHER_KEY), Handshake(KEY, MEMBER)
    answer = client.hear(impostor.challenge())
    assert answer is not None
    with pytest.raises(AuthenticationFailed):
        client.hear(body(frames.welcome(frames.read_auth(body(answer)).proof)))


def test_the_manager_s_own_proof_does_not_convince_it() -> None:
    """What a manager says to one client (WELCOME) is no AUTH for another connection."""
    gate, honest = Gate(KEY), Handshake(KEY, MEMBER)
    answer = honest.hear(gate.challenge())
    assert answer is not None
    welcome = frames.read_nonce(gate.judge(answer))
    nonce = frames.read_auth(body(answer)).nonce
    replayed = frames.auth(nonce, welcome, MEMBER, 1, "")
    assert gate.judge(replayed)[0] == frames.DENIED


def test_a_proof_is_worth_nothing_on_another_connection() -> None:
    seen = Handshake(KEY, MEMBER).hear(Gate(KEY).challenge())
    assert seen is not None
    assert Gate(KEY).judge(seen)[0] == frames.DENIED


def test_a_welcome_is_worth_nothing_to_another_client() -> None:
    gate, first, second = Gate(KEY), Handshake(KEY, MEMBER), Handshake(KEY, MEMBER)
    answer = first.hear(gate.challenge())
    assert answer is not None
    welcome = gate.judge(answer)
    second.hear(gate.challenge())
    with pytest.raises(AuthenticationFailed):
        second.hear(welcome)


@pytest.mark.parametrize(
    "frame",
    [
        frames.welcome(bytes(32)),
        frames.reply(1, None),
        frames.grant(1, 1, 1, 1, 1),
        frames.plain(frames.READY),
    ],
    ids=["WELCOME", "REPLY", "GRANT", "READY"],
)
def test_anything_before_the_challenge_is_no_manager_s(frame: bytes) -> None:
    with pytest.raises(ProtocolError, match="while joining"):
        Handshake(KEY, MEMBER).hear(body(frame))


def test_a_second_challenge_is_no_manager_s() -> None:
    gate, client = Gate(KEY), Handshake(KEY, MEMBER)
    client.hear(gate.challenge())
    with pytest.raises(ProtocolError):
        client.hear(gate.challenge())


def test_the_key_itself_never_travels() -> None:
    gate, client = Gate(KEY), Handshake(KEY, MEMBER)
    answer = client.hear(gate.challenge())
    assert answer is not None
    assert KEY not in answer
    assert KEY not in gate.judge(answer)
