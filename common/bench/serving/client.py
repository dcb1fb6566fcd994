"""One request to an OpenAI-compatible server, timed from outside.

The clock is `time.perf_counter`, read just before the request goes to the HTTP client and each time
a piece of the body has arrived, before it is parsed; request bodies are encoded beforehand. So the
client's own work on a chunk delays the next reading, never its own; it is about 0.1 ms of one core
a chunk, so thousands of tokens a second come through before the client is what is measured. Tokens arrive with a chunk that
carries text, token ids or logprobs: an opening chunk with the role alone and a closing one with the
finish reason alone are no tokens.

Failures are results too, by kind: `http_503` (any status of 400 and above), `connect`, `timeout`,
`disconnect` (the connection broke), `truncated` (the stream ended without [DONE] or a finish
reason), `error_event` (an error object in the stream), `bad_event` (not what the API promises), and
`finish_error`, `finish_abort` (the server gave up on the request).
"""

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.bench.core.latencies import RequestRecord
from common.bench.core.workload import WorkItem
from common.bench.serving.sse import SSEParser

if TYPE_CHECKING:
    import httpx

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
FAILED_FINISHES = ("error", "abort")


@dataclass(frozen=True)
class Target:
    """The server, and what every request says besides its prompt and its number of tokens."""

    url: str
    model: str
    endpoint: str = "completions"  # or "chat"
    stream: bool = True
    api_key: str | None = None
    timeout: float = 600.0  # seconds without a byte
    body: dict[str, Any] = field(default_factory=dict)  # fields added to every request

    @property
    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def encode(self, item: WorkItem) -> bytes:
        """The body of one request."""
        body: dict[str, Any] = {"model": self.model, "max_tokens": item.max_tokens}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": item.prompt}]
        else:
            body["prompt"] = item.prompt
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body | self.body).encode()


class RequestFailed(Exception):
    """A response that is a failure. `kind` is what it is counted as."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def open_client(target: Target) -> "httpx.AsyncClient":
    """An HTTP client that opens as many connections as there are requests in flight."""
    import httpx

    return httpx.AsyncClient(
        base_url=target.url,
        headers=target.headers,
        timeout=httpx.Timeout(target.timeout, connect=min(30.0, target.timeout), pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # no proxy between the clock and the server
    )


async def send(
    client: "httpx.AsyncClient",
    target: Target,
    item: WorkItem,
    index: int,
    due: float | None = None,
) -> RequestRecord:
    """Send one request and record what came back. Never raises for what a server does.

    due: the moment at which the schedule wanted it sent, on the same clock.
    """
    body = target.encode(item)
    record = RequestRecord(index)
    record.start = time.perf_counter()
    record.lag = 0.0 if due is None else record.start - due
    try:
        await receive(client, target, body, record)
    except RequestFailed as failure:
        record.error, record.detail = failure.kind, str(failure)
    except Exception as error:
        kind = transport_error(error)
        if kind is None:
            raise
        record.error, record.detail = kind, f"{type(error).__name__}: {error}"
    record.end = time.perf_counter()
    return record


def transport_error(error: Exception) -> str | None:
    """What a failure of the HTTP client is counted as; None for a bug."""
    import httpx

    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return "connect"
    if isinstance(error, httpx.TimeoutException):
        return "timeout"
    return "disconnect" if isinstance(error, httpx.TransportError) else None


async def receive(
    client: "httpx.AsyncClient", target: Target, body: bytes, record: RequestRecord
) -> None:
    """Read the response into `record`. Raises RequestFailed, or httpx's errors."""
    async with client.stream("POST", PATHS[target.endpoint], content=body) as response:
        if response.status_code >= 400:
            detail = error_text(await response.aread())
            raise RequestFailed(f"http_{response.status_code}", detail)
        reader = StreamReader(record) if target.stream else None
        pieces = []
        now = record.start
        async for piece in response.aiter_raw():
            now = time.perf_counter()
            if record.first_byte is None:
                record.first_byte = now
            if reader is None:
                pieces.append(piece)
            else:
                reader.take(piece, now)
        if reader is not None:
            reader.close()
        else:
            take_whole(b"".join(pieces), now, record)
    if record.finish_reason in FAILED_FINISHES:
        raise RequestFailed(f"finish_{record.finish_reason}", "the server ended the request")


def take_whole(body: bytes, now: float, record: RequestRecord) -> None:
    """A response that is not streamed: all its tokens arrive with its last byte."""
    try:
        message = json.loads(body)
        record.finish_reason = message["choices"][0]["finish_reason"]
    except (ValueError, LookupError, TypeError) as error:
        raise RequestFailed("bad_event", f"{type(error).__name__}: {error}") from None
    take_usage(message, record)
    record.arrivals.append(now)


class StreamReader:
    """Turns the pieces of a stream's body into the arrivals of a record."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.done = False
        self._parser = SSEParser()

    def take(self, piece: bytes, now: float) -> None:
        """A piece that arrived at `now`. Raises RequestFailed for errors in the stream."""
        for event in self._parser.feed(piece):
            if event.data.strip() == "[DONE]":
                self.done = True
            elif not self.done:
                self._take_event(event.name, event.data, now)

    def _take_event(self, name: str, data: str, now: float) -> None:
        if name == "error":
            raise RequestFailed("error_event", error_text(data.encode()))
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                raise RequestFailed("error_event", error_text(data.encode()))
            choices = chunk.get("choices") or []
            carries = any(carries_tokens(choice) for choice in choices)
            reasons = [reason for choice in choices if (reason := choice.get("finish_reason"))]
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestFailed("bad_event", f"{type(error).__name__}: {error}") from None
        take_usage(chunk, self.record)
        if carries:
            self.record.arrivals.append(now)
        if reasons:
            self.record.finish_reason = reasons[0]

    def close(self) -> None:
        """The body has ended. Raises RequestFailed if the stream had not."""
        if not self.done and self.record.finish_reason is None:
            raise RequestFailed("truncated", "the stream ended without a finish reason or [DONE]")


def carries_tokens(choice: dict[str, Any]) -> bool:
    """Whether a stream's choice has text, token ids or logprobs."""
    delta = choice.get("delta") or {}
    texts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"))
    others = (choice.get("token_ids"), choice.get("logprobs"), delta.get("tool_calls"))
    return any(texts) or any(others)


def take_usage(message: dict[str, Any], record: RequestRecord) -> None:
    usage = message.get("usage")
    if isinstance(usage, dict):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.completion_tokens = usage.get("completion_tokens")


def error_text(body: bytes) -> str:
    """The message of an OpenAI error object, else the beginning of what came instead."""
    text = body.decode("utf-8", errors="replace")
    try:
        error = json.loads(text)
        error = error.get("error", error)
        message = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = None
    return str(message or text)[:300]
