"""The proof, on joining, that both sides have the pool's key.

The scheme of `multiprocessing.connection` (a keyed hash of the other side's random challenge), in
both directions in one round trip. It is spelled out here, and not borrowed, because that module's
functions block on the peer, and the manager must never wait for a peer: here the manager only
computes. The two sides hash under different names, so neither proof can be played back as the
other.

The hash is BLAKE2b, which takes a key itself (RFC 7693) and needs no HMAC around it. Python brings
it along; what `hmac` and `hashlib` import, OpenSSL, takes some milliseconds to load, and the first
client waits.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from hashlib import blake2b
    from hmac import compare_digest
else:
    try:
        from _blake2 import blake2b
        from _operator import _compare_digest as compare_digest
    except ImportError:
        from hashlib import blake2b
        from hmac import compare_digest


def client_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What a client answers to a challenge (32 bytes)."""
    nonces = server_nonce + client_nonce
    return blake2b(nonces, digest_size=32, key=key, person=b"whitepool client").digest()


def server_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What the manager answers to a client that proved itself (32 bytes)."""
    nonces = server_nonce + client_nonce
    return blake2b(nonces, digest_size=32, key=key, person=b"whitepool server").digest()


def same(left: bytes, right: bytes) -> bool:
    """Whether two proofs are equal, in constant time."""
    return compare_digest(left, right)
