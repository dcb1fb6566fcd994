"""Server-sent events: what keeps a connection from being idle must not disturb any client."""

import asyncio
import json
from collections.abc import AsyncIterator

from common.bench.serving.sse import SSEParser
from common.http.events import EventStream

EVENTS = [json.dumps({"number": number}) for number in range(3)]


def sent(ping: float) -> list[bytes]:
    """The pieces of a stream whose events come after 0.2 s each."""
    pieces: list[bytes] = []

    async def events() -> AsyncIterator[str]:
        for event in EVENTS:
            await asyncio.sleep(0.2)
            yield event

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        pieces.append(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "headers": []}
    asyncio.run(EventStream(events(), ping)(scope, receive, send))
    return [piece for piece in pieces if piece]


def as_vllm_reads(pieces: list[bytes]) -> list[str]:
    """`vllm bench serve`: each piece is stripped; what is no whole event waits for the next piece."""
    found, rest = [], ""
    for piece in pieces:
        rest += piece.strip().decode()
        *whole, rest = rest.split("\n\n")
        if rest.startswith("data: "):
            whole, rest = [*whole, rest], ""
        found += [event.removeprefix("data: ") for event in whole if event]
    return found


def test_empty_lines_come_meanwhile_and_are_no_events() -> None:
    pieces = sent(ping=0.05)
    assert pieces.count(b"\n\n") >= 4
    assert [event.data for event in SSEParser().feed(b"".join(pieces))] == EVENTS
    assert as_vllm_reads(pieces) == EVENTS
    together = [b"".join(pieces[:4]), b"".join(pieces[4:])]
    assert as_vllm_reads(together)[-1] == EVENTS[-1]


def test_a_comment_alone_would_be_taken_for_the_next_events_beginning() -> None:
    """The control: why pings are no comments."""
    pieces = [piece if piece != b"\n\n" else b": ping\n\n" for piece in sent(ping=0.05)]
    assert [event.data for event in SSEParser().feed(b"".join(pieces))] == EVENTS
    assert as_vllm_reads(pieces) == []


def test_a_stream_that_is_never_idle_has_nothing_more() -> None:
    assert [piece.decode() for piece in sent(ping=5)] == [f"data: {event}\n\n" for event in EVENTS]
