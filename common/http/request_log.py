"""Counts HTTP requests, and keeps the times of each stage of the last completions.

The counts have the names and labels that vLLM's server gets from prometheus-fastapi-instrumentator.
The log is a ring of `Life`s, served by `GET /trace.requests.jsonl`: the times of a request outside of
the engine. The engine's own trace has its times inside, by the same clock. `python -m common.bench life`
draws both as one picture. A life holds times, counts and ids, and no text of a prompt or an answer.
"""

import contextlib
import json
import time
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.http.responses import Job

CAPACITY = 256  # lives kept
NOT_COUNTED = {"/metrics", "/health", "/version"}  # as in vLLM: monitoring polls them
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # a client may invent others
# fmt: off
FINE_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)
# fmt: on
COARSE_BOUNDS = (0.1, 0.5, 1)
OPERATION_BOUNDS = (0.01, 0.1, 1, 10, 30, 60, 120, 300, 600)


@dataclass
class Life:
    """The times of one HTTP request, in seconds of `time.perf_counter`.

    sent: when each piece of the answer was handed to the socket. job: the completion's; None for other
    requests.
    """

    path: str
    arrived: float
    status: int = 500  # until its answer begins
    num_bytes: int = 0  # of its answer
    sent: array = field(default_factory=lambda: array("d"))
    ended: float = 0.0
    job: Job | None = None

    def to_json(self) -> str:
        """One line of JSON. Only a completion has one."""
        assert self.job is not None
        job = self.job
        values = {
            "id": job.id,
            "path": self.path,
            "status": self.status,
            "stream": job.stream,
            "num_prompt_tokens": [len(prompt) for prompt in job.prompts],
            "request_ids": job.request_ids,
            "arrived": self.arrived,
            **job.marks,
            "taken": job.taken.tolist(),
            "detokenized": job.detokenized.tolist(),
            "sent": self.sent.tolist(),
            "ended": self.ended,
        }
        return json.dumps(values, allow_nan=False) + "\n"


class Instruments:
    """The metrics of HTTP requests, in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        own: dict[str, Any] = {"registry": registry}
        self.requests = Counter(
            "http_requests", "HTTP requests.", ["handler", "method", "status"], **own
        )
        self.request_bytes = Summary(
            "http_request_size_bytes", "Bytes of requests' bodies.", ["handler"], **own
        )
        self.response_bytes = Summary(
            "http_response_size_bytes", "Bytes of answers' bodies.", ["handler"], **own
        )
        self.fine_seconds = Histogram(
            "http_request_duration_highr_seconds",
            "From a request's headers to its last byte, in many buckets.",
            buckets=FINE_BOUNDS,
            **own,
        )
        self.seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's headers to its last byte, by handler.",
            ["handler", "method"],
            buckets=COARSE_BOUNDS,
            **own,
        )
        self.operation_seconds = Histogram(
            "vllm:sleep_mode_operation_duration_seconds",
            "Seconds that falling asleep and waking up took.",
            ["operation"],
            buckets=OPERATION_BOUNDS,
            **own,
        )
        self.operations = Gauge(
            "vllm:sleep_mode_operations_in_flight",
            "Sleeps and wake-ups under way.",
            ["operation"],
            **own,
        )
        for operation in ("sleep", "wake"):  # shown before the first of them
            self.operation_seconds.labels(operation)
            self.operations.labels(operation)

    def count(self, scope: Scope, life: Life) -> None:
        """Count a request that has ended."""
        handler = getattr(scope.get("route"), "path", "none")  # not the path: clients invent those
        if handler in NOT_COUNTED:
            return
        method = scope["method"] if scope["method"] in METHODS else "other"
        headers = dict(scope["headers"])
        length, seconds = headers.get(b"content-length", b"0"), life.ended - life.arrived
        self.requests.labels(handler, method, f"{life.status // 100}xx").inc()
        self.request_bytes.labels(handler).observe(int(length) if length.isdigit() else 0)
        self.response_bytes.labels(handler).observe(life.num_bytes)
        self.fine_seconds.observe(seconds)
        self.seconds.labels(handler, method).observe(seconds)

    @contextlib.contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Measure a sleep or a wake-up, whether it succeeds or not."""
        begin = time.perf_counter()
        with self.operations.labels(operation).track_inprogress():
            try:
                yield
            finally:
                seconds = time.perf_counter() - begin
                self.operation_seconds.labels(operation).observe(seconds)


class RequestLog:
    """The outermost middleware of an app, so that refused requests are counted too."""

    def __init__(self, app: ASGIApp, instruments: Instruments, lives: deque[Life]) -> None:
        self.app, self.instruments, self.lives = app, instruments, lives

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        life = scope["life"] = Life(scope["path"], time.perf_counter())

        async def send_noted(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                life.status = message["status"]
            elif body := message.get("body"):
                life.num_bytes += len(body)
                life.sent.append(time.perf_counter())

        try:
            await self.app(scope, receive, send_noted)
        finally:
            life.ended = time.perf_counter()
            self.instruments.count(scope, life)
            if life.job is not None:
                self.lives.append(life)


def add_request_log(app: FastAPI, registry: CollectorRegistry | None) -> Instruments:
    """Count an app's requests in a registry, and add `GET /trace.requests.jsonl`.

    registry: None with several HTTP processes. The next scrape may then be answered by another process,
    so the counts are not shown.
    """
    instruments, lives = Instruments(registry), deque[Life](maxlen=CAPACITY)
    app.add_middleware(RequestLog, instruments=instruments, lives=lives)

    async def download() -> Response:
        """The last completions that ended, oldest first, a line of JSON each."""
        text = "".join(life.to_json() for life in list(lives))
        return Response(text, media_type="application/x-ndjson")

    app.add_api_route("/trace.requests.jsonl", download, methods=["GET"], response_model=None)
    return instruments
