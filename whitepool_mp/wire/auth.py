"""The proof, on joining, that both sides have the pool's key.

The scheme of `multiprocessing.connection` (HMAC over the other side's random challenge), in both
directions in one round trip. It is spelled out here, and not borrowed, because that module's
functions block on the peer, and the manager must never wait for a peer: here the manager only
computes. (OpenSSL behind it takes milliseconds to load: nobody waits for that who needs no proof.)
The two sides hash different labels, so neither proof can be played back as the other.
"""

from __future__ import annotations


def client_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What a client answers to a challenge (32 bytes)."""
    import hmac

    return hmac.digest(key, b"whitepool client" + server_nonce + client_nonce, "sha256")


def server_proof(key: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What the manager answers to a client that proved itself (32 bytes)."""
    import hmac

    return hmac.digest(key, b"whitepool server" + server_nonce + client_nonce, "sha256")


def same(left: bytes, right: bytes) -> bool:
    """Whether two proofs are equal, in constant time."""
    import hmac

    return hmac.compare_digest(left, right)
