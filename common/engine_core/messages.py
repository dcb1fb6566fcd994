"""The messages between HTTP processes and the engine core: numbers, texts and lists, never code.

Requests, outputs and records are the engine's own dataclasses, so a new field of theirs needs no change
here. msgspec checks types while it decodes; the receiver drops bytes that are not a message.
"""

import dataclasses
import operator
import typing
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from common.completions import RequestOutput
from common.metrics import Counts
from common.requests import Request
from common.trace import EngineState, StepRecord

_HINTS = typing.get_type_hints(RequestOutput)
_NAMES = [field.name for field in dataclasses.fields(RequestOutput)]
# One output without its fields' names: the message of a step with many requests is a fifth as long.
OutputFields = tuple[tuple(_HINTS[name] for name in _NAMES)]  # type: ignore[misc]
_fields_of = operator.attrgetter(*_NAMES)


class Message(Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """Carries its type's name, which the decoder goes by."""


class Add(Message):
    """From HTTP: run this request."""

    request: Request


class Abort(Message):
    """From HTTP: abort this request, if it runs."""

    request_id: str


class Ask(Message):
    """From HTTP: call this method of the engine, between two steps."""

    number: int
    method: Literal["sleep", "wake_up"]
    arguments: list[int]


class Beat(Message):
    """From HTTP: a sign of life, with the bytes read so far.

    number: repeated in the Status that answers it. counts: this process's, for `/metrics`.
    """

    number: int
    num_bytes: int
    counts: Counts


class Welcome(Message):
    """From the core: facts about the engine, and its state before the first Step that follows."""

    about: dict[str, Any]
    state: EngineState


class Step(Message):
    """From the core: the last step's outputs. records: of all steps since the last message."""

    records: list[StepRecord]
    outputs: list[OutputFields]


class Status(Message):
    """From the core: a sign of life. counts: those of the core and of all other HTTP processes."""

    number: int
    stats: dict[str, Any]
    counts: Counts


class Answer(Message):
    """From the core, to Ask: what the method returned; or the error's text and its type's name."""

    number: int
    value: dict[str, Any]
    error: str = ""
    raised: str = ""


encoder = msgspec.msgpack.Encoder()
from_http = msgspec.msgpack.Decoder(Add | Abort | Ask | Beat)
from_core = msgspec.msgpack.Decoder(Welcome | Step | Status | Answer)


def encode_records(records: Iterable[StepRecord]) -> Raw:
    """The `records` of a Step, encoded once for all HTTP processes."""
    return Raw(encoder.encode(list(records)))


def step(records: Raw, outputs: Iterable[RequestOutput]) -> Step:
    """A Step to be encoded."""
    return Step(records, [_fields_of(output) for output in outputs])  # type: ignore[arg-type]


def outputs_of(message: Step) -> list[RequestOutput]:
    return [RequestOutput(*fields) for fields in message.outputs]
