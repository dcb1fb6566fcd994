"""The trace over HTTP: the steps as they happen, and those kept until now."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import Message, Send

from common.http.events import SEND_SECONDS, EventStream
from common.trace import Trace, perfetto_events, to_json

SECONDS = 0.05  # between looks at what is new
EXPERT_SECONDS = 1.0
LINES = 32  # written before others have their turn: about a millisecond


class Download(StreamingResponse):
    """A file written as it is sent; a client that does not read it is left.

    Else it would hold the records of that moment for as long as it likes.
    """

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            pass  # uvicorn closes a connection whose answer has no end
        finally:
            await self.body_iterator.aclose()


# {"expert_layers": [layer], "expert_load": [[choices]], "expert_copies": [[count]], …}, or {}
ExpertStats = Callable[[], dict[str, Any]]


def add_trace_routes(app: FastAPI, trace: Trace, experts: ExpertStats | None = None) -> None:
    """Add `GET /trace`, `GET /trace.jsonl` and `GET /trace.perfetto.json`."""

    async def expert_events() -> AsyncIterator[dict[str, str]]:
        """The experts' loads where they have changed, at most once a second; else nothing."""
        told, looked = "", 0.0
        while True:
            event: dict[str, str] = {}
            if experts is not None and time.monotonic() >= looked + EXPERT_SECONDS:
                looked, loads = time.monotonic(), await asyncio.to_thread(experts)
                if loads and (now := json.dumps(loads, allow_nan=False)) != told:
                    told, event = now, {"event": "experts", "data": now}
            yield event

    async def events() -> AsyncIterator[dict[str, str]]:
        with trace.follow() as records:
            following = None  # the step that should come next
            loads = expert_events()
            while not app.state.stopping:
                if following is None or (records and records[0].step != following):
                    state = await asyncio.to_thread(trace.catch_up, records)
                    following = state.step + 1
                    yield {"event": "state", "data": to_json(state)}
                while records and records[0].step == following:
                    following += 1
                    yield {"data": to_json(records.popleft())}
                if event := await anext(loads):
                    yield event
                await asyncio.sleep(SECONDS)

    async def kept() -> AsyncIterator[str]:
        lines = trace.lines()
        while some := "".join(itertools.islice(lines, LINES)):
            yield some
            await asyncio.sleep(0)

    async def as_perfetto() -> AsyncIterator[str]:
        yield '{"displayTimeUnit": "ms", "traceEvents": [\n'
        lines = (json.dumps(event, allow_nan=False) for event in perfetto_events(trace.records()))
        separator = ""
        while some := list(itertools.islice(lines, 8 * LINES)):
            yield separator + ",\n".join(some)
            separator = ",\n"
            await asyncio.sleep(0)
        yield "\n]}\n"

    async def follow() -> EventStream:
        """The steps as server-sent events, from now on.

        An event named `state` comes first, and again after steps that a slow reader has lost. One
        named `experts` says how often each expert was chosen since the start.
        This stream has no end of its own; it ends when the server is to end.
        """
        return EventStream(events())

    async def download() -> Download:
        """The steps kept, as `Trace.save` writes them."""
        headers = {"Content-Disposition": 'attachment; filename="trace.jsonl"'}
        return Download(kept(), media_type="application/x-ndjson", headers=headers)

    async def perfetto() -> Download:
        """The steps kept, for ui.perfetto.dev and chrome://tracing."""
        headers = {"Content-Disposition": 'attachment; filename="trace.perfetto.json"'}
        return Download(as_perfetto(), media_type="application/json", headers=headers)

    app.add_api_route("/trace", follow, methods=["GET"], response_model=None)
    app.add_api_route("/trace.jsonl", download, methods=["GET"], response_model=None)
    app.add_api_route("/trace.perfetto.json", perfetto, methods=["GET"], response_model=None)
