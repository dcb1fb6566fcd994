"""Before anything is asked: both sides prove that they know the secret, and compare what their KV is.

    receiver                          sender
    Hello(version, nonce)  ->
                           <-  Challenge(version, nonce)
    Answer(proof)          ->
                           <-  Welcome(proof, fingerprint, where the KV lies)
    Match(fingerprint)     ->
                           <-  Accepted

A proof is HMAC-SHA256(secret, role, both nonces): it is good once, in one direction. The side that
connects proves first, so that a stranger who connects learns nothing. A fingerprint is a dictionary of
strings (model, dtype, block size, ...); the first field that differs is named on both sides.
Nothing after the greeting is encrypted or signed: a checksum is against accidents. On a network where
others can write into a connection, run it inside TLS or WireGuard.

Each side is a generator: it yields the message to send, and is sent the message that came.
"""

import hashlib
import hmac
import os
from collections.abc import Callable, Generator
from typing import TypeVar

from common.kv_transfer.messages import (
    VERSION,
    Accepted,
    Answer,
    Challenge,
    Hello,
    Match,
    Message,
    Refused,
    Welcome,
)

MIN_SECRET = 16  # bytes
M = TypeVar("M", bound=Message)


class Refusal(ValueError):
    """No connection with this peer. `told`: the reason is the peer's."""

    def __init__(self, reason: str, told: bool = False) -> None:
        super().__init__(reason)
        self.told = told


def check_secret(secret: bytes) -> None:
    """Raises ValueError."""
    if len(secret) < MIN_SECRET:
        raise ValueError(f"kv secret has {len(secret)} bytes: at least {MIN_SECRET} are needed")


def receiver_side(
    secret: bytes, fingerprint: dict[str, str]
) -> Generator[Message, Message, Welcome]:
    """Returns the sender's welcome. Raises Refusal."""
    nonce = os.urandom(32)
    challenge = _expect(Challenge, (yield Hello(VERSION, nonce)))
    _compare("protocol version", VERSION, challenge.version)
    nonces = nonce + challenge.nonce
    welcome = _expect(Welcome, (yield Answer(_prove(secret, b"receiver", nonces))))
    if not hmac.compare_digest(welcome.proof, _prove(secret, b"sender", nonces)):
        raise Refusal("the sender does not know the secret")
    try:
        compare_fingerprints(fingerprint, welcome.fingerprint)
    except Refusal:
        yield Match(fingerprint)  # so that the sender can say what differs
        raise
    _expect(Accepted, (yield Match(fingerprint)))
    return welcome


def sender_side(
    secret: bytes, fingerprint: dict[str, str], welcome: Callable[[bytes], Welcome]
) -> Generator[Message | None, Message, None]:
    """welcome: makes the message, of a proof. The first thing yielded is None: the receiver begins.
    Raises Refusal."""
    hello = _expect(Hello, (yield None))
    _compare("protocol version", VERSION, hello.version)
    nonce = os.urandom(32)
    nonces = hello.nonce + nonce
    answer = _expect(Answer, (yield Challenge(VERSION, nonce)))
    if not hmac.compare_digest(answer.proof, _prove(secret, b"receiver", nonces)):
        raise Refusal("the receiver does not know the secret")
    match = _expect(Match, (yield welcome(_prove(secret, b"sender", nonces))))
    compare_fingerprints(fingerprint, match.fingerprint)
    yield Accepted()


def compare_fingerprints(ours: dict[str, str], theirs: dict[str, str]) -> None:
    """Raises Refusal that names the first field that differs."""
    for field in sorted(ours.keys() | theirs.keys()):
        _compare(field, ours.get(field), theirs.get(field))


def _compare(field: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise Refusal(f"{field} is {ours!r} here and {theirs!r} there")


def _expect(kind: type[M], message: Message) -> M:
    if isinstance(message, Refused):
        raise Refusal(message.reason, told=True)
    if not isinstance(message, kind):
        raise Refusal(f"{type(message).__name__} has come where {kind.__name__} was due")
    return message


def _prove(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    text = b"fifteen engines, kv transfer\0" + role + b"\0" + nonces
    return hmac.new(secret, text, hashlib.sha256).digest()
