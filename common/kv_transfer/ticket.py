"""What a proxy writes on a request: from which prefill worker its keys and values may be fetched.

A worker connects to the address that a ticket names, so no client may write one: it would choose
where the worker connects to. A ticket is signed with the secret that proxy and workers share, is good for a
minute, and names one transfer, by 128 random bits.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path

logger = logging.getLogger(__name__)
HEADER = "x-kv-transfer"
SECONDS = 60.0  # that a ticket is good for
MAX_LENGTH = 2048  # of one as text
MIN_SECRET = 16  # bytes


@dataclass(frozen=True)
class Ticket:
    """address: of a prefill worker's sender. expires: in seconds of `time.time`."""

    address: str
    transfer_id: str
    expires: float

    def child(self, number: int) -> "Ticket":
        """The ticket of one of several completions that a request asks for."""
        return replace(self, transfer_id=f"{self.transfer_id}-{number}")


def new_ticket(address: str) -> Ticket:
    return Ticket(address, secrets.token_hex(16), time.time() + SECONDS)


def write_ticket(ticket: Ticket, secret: bytes) -> str:
    """A ticket as the value of a header."""
    fields = [ticket.address, ticket.transfer_id, ticket.expires]
    body = base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()
    return f"{body}.{signature(body, secret)}"


def read_ticket(text: str, secret: bytes) -> Ticket:
    """The ticket that a header's value is. Raises ValueError where it was not signed with the secret, or
    is no longer good; the message does not repeat it."""
    body, _, signed = text.partition(".")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{HEADER} has {len(text)} characters, more than {MAX_LENGTH}")
    own = signature(body, secret).encode()
    if not hmac.compare_digest(own, signed.encode(errors="surrogateescape")):
        raise ValueError(f"{HEADER} is not signed with the secret of this worker")
    try:
        ticket = Ticket(*json.loads(base64.urlsafe_b64decode(body)))
    except (binascii.Error, ValueError, TypeError):
        raise ValueError(f"{HEADER} is not a ticket") from None
    if ticket.expires < time.time():
        raise ValueError(f"{HEADER} is no longer good")
    return ticket


def accept_ticket(header: str | None, secret: bytes | None) -> Ticket | None:
    """The same, for a worker that serves the request in any case: None where there is no good ticket."""
    if header is None or secret is None:
        return None
    try:
        return read_ticket(header, secret)
    except ValueError as error:
        logger.warning("a prompt is computed here: %s", error)
        return None


def signature(body: str, secret: bytes) -> str:
    assert len(secret) >= MIN_SECRET, "a secret that is known to be long enough"
    message = b"ticket\0" + body.encode(errors="surrogateescape")
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


def read_secret(path: str) -> bytes:
    """The secret in a file that its owner alone may read. Raises ValueError."""
    try:
        descriptor = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"kv_secret_file must be a file, not {path!r}")
            if status.st_mode & 0o077:
                raise ValueError(f"kv_secret_file {path!r} may be read by others: chmod 600 it")
            secret = file.read(4096).strip()
    except OSError as error:
        raise ValueError(f"kv_secret_file {path!r} cannot be read: {error.strerror}") from None
    if len(secret) < MIN_SECRET:
        raise ValueError(
            f"kv_secret_file {path!r} has {len(secret)} bytes, fewer than {MIN_SECRET}"
        )
    return secret
