"""What HTTP processes and the engine core say to each other: numbers, texts and lists. Nothing that runs.

Requests, outputs and records are the engine's own dataclasses, so a new field of theirs passes unopened.
msgspec checks types while it decodes; what is no message is dropped by whoever gets it.
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
# One output without the names of its fields: a step of many requests is a fifth as long.
OutputFields = tuple[tuple(_HINTS[name] for name in _NAMES)]  # type: ignore[misc]
_fields_of = operator.attrgetter(*_NAMES)


class Message(Struct, tag=True, forbid_unknown_fields=True, frozen=True):
    """A message says its type's name."""


class Add(Message):
    """HTTP: run this."""

    request: Request


class Abort(Message):
    """HTTP: end this, if it runs."""

    request_id: str


class Ask(Message):
    """HTTP: call this method of the engine, between two steps."""

    number: int
    method: Literal["sleep", "wake_up"]
    arguments: list[int]


class Beat(Message):
    """HTTP: I live, and have read so much.

    number: what the answer is to bear. counts: what this process has counted for `/metrics`.
    """

    number: int
    num_bytes: int
    counts: Counts


class Welcome(Message):
    """Core: what there is to know of the engine, and its state before the first step that comes."""

    about: dict[str, Any]
    state: EngineState


class Step(Message):
    """Core: what the last step brought. records: all steps since the last message."""

    records: list[StepRecord]
    outputs: list[OutputFields]


class Status(Message):
    """Core: I live. counts: what the core and all other HTTP processes have counted."""

    number: int
    stats: dict[str, Any]
    counts: Counts


class Answer(Message):
    """Core, to Ask: what the method has returned, or what it has raised (its type's name)."""

    number: int
    value: dict[str, Any]
    error: str = ""
    raised: str = ""


encoder = msgspec.msgpack.Encoder()
from_http = msgspec.msgpack.Decoder(Add | Abort | Ask | Beat)
from_core = msgspec.msgpack.Decoder(Welcome | Step | Status | Answer)


def encode_records(records: Iterable[StepRecord]) -> Raw:
    """The `records` of a Step, encoded once for all who get it."""
    return Raw(encoder.encode(list(records)))


def step(records: Raw, outputs: Iterable[RequestOutput]) -> Step:
    """A Step to be encoded."""
    return Step(records, [_fields_of(output) for output in outputs])  # type: ignore[arg-type]


def outputs_of(message: Step) -> list[RequestOutput]:
    return [RequestOutput(*fields) for fields in message.outputs]
