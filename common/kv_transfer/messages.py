"""What the two sides of a transfer say to each other. Numbers, strings and bytes: nothing that runs.

msgspec checks types, lengths and ranges while it decodes; a message that breaks them raises
`msgspec.ValidationError`, and the connection ends.
"""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from common.kv_transfer.frames import MESSAGE_LIMIT

VERSION = 1
Count = Annotated[int, Meta(ge=0, le=1 << 31)]
Address = Annotated[int, Meta(ge=0, lt=1 << 62)]
TransferId = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=1000)]
Nonce = Annotated[bytes, Meta(min_length=32, max_length=32)]
Fingerprint = Annotated[dict[Text, Text], Meta(max_length=64)]


class Message(Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """A message says its type's name."""


class Hello(Message):
    """Receiver: begin."""

    version: int
    nonce: Nonce


class Challenge(Message):
    """Sender: prove that you know the secret."""

    version: int
    nonce: Nonce


class Answer(Message):
    """Receiver: the proof."""

    proof: Nonce


class Welcome(Message):
    """Sender: the same proof of mine, what my KV is like, and where it lies."""

    proof: Nonce
    fingerprint: Fingerprint
    transport: Text
    num_blocks: Count
    lease: Annotated[float, Meta(gt=0)]  # seconds
    agent: bytes = b""  # nixl's description of the sender
    addresses: Annotated[list[Address], Meta(max_length=8)] = []  # of each cache
    device: Count = 0  # number of its GPU


class Match(Message):
    """Receiver: mine."""

    fingerprint: Fingerprint


class Accepted(Message):
    """Sender: they agree. Begin."""


class Refused(Message):
    """Either side: no, and why. The connection ends."""

    reason: Text


class Prefill(Message):
    """Receiver: compute this prompt. Of its blocks the first `num_blocks` are wanted."""

    transfer_id: TransferId
    token_ids: list[Annotated[int, Meta(ge=0, lt=1 << 31)]]
    cache_salt: Annotated[str, Meta(max_length=1 << 16)] | None
    num_blocks: Count


class Pull(Message):
    """Receiver: send me blocks [first, first + count) of a transfer as they become ready (tcp)."""

    transfer_id: TransferId
    first: Count
    count: Count


class Renew(Message):
    """Receiver: I am still reading."""

    transfer_id: TransferId


class Check(Message):
    """Receiver: I have read all I want. Did you hold the blocks until now?"""

    transfer_id: TransferId


class Cancel(Message):
    """Receiver: I want it no more."""

    transfer_id: TransferId


class Ping(Message):
    """Receiver: are you there?"""


class Ready(Message):
    """Sender: the transfer's next blocks have these numbers; of all its blocks the first `counts[i]`
    are final in layer `layers[i]`."""

    transfer_id: TransferId
    new_blocks: list[Count]
    layers: list[Count]
    counts: list[Count]


class Computed(Message):
    """Sender: there is no more to come; the first `num_blocks` blocks are final in all layers."""

    transfer_id: TransferId
    num_blocks: Count


class Failed(Message):
    """Sender: the transfer has ended, without what you want."""

    transfer_id: TransferId
    reason: Text


class Held(Message):
    """Sender, to Check: all that you read was the transfer's own."""

    transfer_id: TransferId


class Pong(Message):
    """Sender: I am."""


class Pieces(Message):
    """Sender: of blocks [first, first + count) of a transfer what lies in this layer; the bytes follow
    in the same frame (tcp)."""

    transfer_id: TransferId
    layer: Count
    first: Count
    count: Count


FromReceiver = Hello | Answer | Match | Refused | Prefill | Pull | Renew | Check | Cancel | Ping
FromSender = (
    Challenge | Welcome | Accepted | Refused | Ready | Computed | Failed | Held | Pong | Pieces
)
encoder = msgspec.msgpack.Encoder()
from_receiver = msgspec.msgpack.Decoder(FromReceiver)
from_sender = msgspec.msgpack.Decoder(FromSender)


def problem(message: Message) -> str | None:
    """Why a message cannot be sent: the connection would end, and all that is on it. None: it can."""
    try:
        size = len(encoder.encode(message))
    except UnicodeEncodeError:
        return "a text in it has half of a surrogate pair"
    return None if size <= MESSAGE_LIMIT else f"it has {size} bytes: the limit is {MESSAGE_LIMIT}"
