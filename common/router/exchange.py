"""One client's request on its way through the router, and what the client has been sent of the answer.

Until the first token the client has seen nothing, and another replica may answer instead. So what
opens a stream is held back: the head, a chat's role. A comment that keeps the connection open lets
the head go, but still no event: from then on a failure is told as an event, and a retry is as good
as before.
"""

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
from starlette.types import Send

from common.http.errors import ApiError
from common.http.middleware import ClientGone
from common.router.request import NOT_RETURNED, RoutedRequest
from common.router.upstream import Answer, Upstream, UpstreamFailed

SEND_SECONDS = 60.0  # for a client to take what it is sent
MAX_EVENT = 64 << 20  # bytes of one event
EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
LAST_EVENT = re.compile(rb"^data: ?(\[DONE\]|\{\"error\")", re.MULTILINE)

BROKEN_OFF = "the engine that wrote this answer has failed: the answer is not complete"
FAILED = "the engines that were asked have failed"
NONE_THERE = "no engine is there to answer at the moment"

Headers = Iterable[tuple[bytes, bytes]]


class ReplicaBusy(Exception):
    """A replica is full, and says so: it is well, and others may have room."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("the replica is full")
        self.answer = answer


class Exchange:
    """A request and its client. `streamed`: a token has gone to the client, or a part of an answer."""

    def __init__(self, request: RoutedRequest, send: Send, *, endless: bool = False) -> None:
        """endless: the answer is passed on as it comes, whatever it is."""
        self.request, self.endless = request, endless
        self._send_raw = send
        self.started = self.streamed = False
        self.headers: dict[str, str] = {}  # that the router adds

    async def run(self, upstream: Upstream, on_answer: Callable[[], None]) -> None:
        """Let a replica answer; `on_answer` is called when it does. Raises UpstreamFailed,
        ReplicaBusy, ClientGone."""
        self._on_answer = on_answer
        async with upstream.send(self.request) as response:
            headers = kept(response.raw_headers)
            if response.status >= 500:
                answer = Answer(response.status, headers, await response.read())
                if response.status == 503 and "Retry-After" in response.headers:
                    raise ReplicaBusy(answer)
                raise UpstreamFailed(f"status {response.status}", answer)
            if self.endless:
                await self._pass_on(response, headers)
            elif response.content_type == "text/event-stream":
                await self._relay(response, headers)
            else:
                answer = Answer(response.status, headers, await response.read())
                on_answer()
                await self.answer(answer)

    async def answer(self, answer: Answer) -> None:
        """A whole answer; as an event where the head has gone."""
        if self.started:
            return await self._end(b"data: " + answer.body + b"\n\n")
        await self._start(answer.status, answer.headers, len(answer.body))
        await self._end(answer.body)

    async def give_up(self, failure: "UpstreamFailed | ReplicaBusy | None") -> None:
        """No replica will answer, or go on. What a client is told of it: what the last replica said;
        by a status, or as the last event of a stream that has begun. No `[DONE]`.

        failure: the last one; None where there was no replica to ask. Raises ApiError.
        """
        error = ApiError(502, BROKEN_OFF if self.streamed else FAILED, code="engine_failed")
        if failure is None:
            error = ApiError(503, NONE_THERE, code="no_engine", headers={"Retry-After": "1"})
        elif failure.answer is not None and not self.streamed:
            return await self.answer(failure.answer)
        if not self.started:
            raise error
        await self._end(b"data: " + json.dumps(error.body()).encode() + b"\n\n")

    async def _relay(self, response: aiohttp.ClientResponse, headers: Headers) -> None:
        """Hand events on whole: one that is cut by its server's end would be a riddle."""
        rest, held, complete = bytearray(), b"", False
        try:
            async for data in response.content.iter_any():
                rest += data
                end = max((match.end() for match in EVENT_END.finditer(rest)), default=0)
                if len(rest) - end > MAX_EVENT:
                    raise UpstreamFailed(f"an event is longer than {MAX_EVENT} bytes")
                events = bytes(rest[:end])
                del rest[:end]
                if not self.streamed:
                    held, events = self._hold_back(held + events)
                    if not events:
                        continue
                if not self.started:
                    await self._start(response.status, headers)
                complete = complete or LAST_EVENT.search(events) is not None
                await self._send_body(events)
        except (aiohttp.ClientError, OSError):
            if not complete:
                raise
        if not complete:
            raise UpstreamFailed("the stream ended before it was complete")
        await self._end(b"")

    def _hold_back(self, events: bytes) -> tuple[bytes, bytes]:
        """Split the events before the first token: (what waits, what may go).

        Raises UpstreamFailed where the replica gives up before the first token.
        """
        held, comments, begin = b"", b"", 0
        for match in EVENT_END.finditer(events):
            event = events[begin : match.end()]
            kind = kind_of(event)
            if kind == "token":
                self.streamed = True
                self._on_answer()
                return b"", comments + held + events[begin:]
            if kind == "error":
                body = event.partition(b"data:")[2].strip()
                headers = [(b"content-type", b"application/json")]
                raise UpstreamFailed("the request failed there", Answer(500, headers, body))
            begin = match.end()
            if kind == "comment":
                comments += event
            else:
                held += event
        return held, comments

    async def _pass_on(self, response: aiohttp.ClientResponse, headers: Headers) -> None:
        await self._start(response.status, headers)
        self.streamed = True
        self._on_answer()
        async for data in response.content.iter_any():
            await self._send_body(data)
        await self._end(b"")

    async def _start(self, status: int, headers: Headers, length: int | None = None) -> None:
        self.started = True
        own = ((name.encode(), value.encode()) for name, value in self.headers.items())
        headers = [*headers, *own]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_body(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self, data: bytes) -> None:
        self.streamed = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _send(self, message: Any) -> None:
        """Raises ClientGone when the client does not read: that is no fault of the replica's."""
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send_raw(message)
        except (TimeoutError, OSError):
            raise ClientGone from None


def kept(headers: Headers) -> list[tuple[bytes, bytes]]:
    """The headers that concern the answer, and not the connection that it came by."""
    lower = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lower if name not in NOT_RETURNED]


def kind_of(event: bytes) -> str:
    """What an event is before the first token: a token, an error, a comment, or what opens a stream."""
    lines = [line for line in event.splitlines() if line.startswith(b"data:")]
    if not lines:
        return "comment"
    try:
        chunk = json.loads(b"\n".join(line[5:] for line in lines))
        if chunk.get("error"):
            return "error"
        opens = all(map(is_opening, chunk.get("choices") or [{"text": "-"}]))
    except (ValueError, AttributeError):
        return "token"  # `[DONE]`, or what this router does not know
    return "opening" if opens else "token"


def is_opening(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has a role and nothing else."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    return not choice.get("finish_reason") and not any(
        value for name, value in delta.items() if name != "role"
    )
