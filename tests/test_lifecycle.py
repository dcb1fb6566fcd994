"""Requests and servers from their first moment to their last, where something goes wrong between.

A client that leaves, a step that fails, an engine that dies, a signal at the wrong time: afterwards
nothing is held, nobody waits, and what comes next is served. Most tests drive the engine's steps by
a gate, so that "while decoding" is a fact and not a matter of luck; deadlines are for liveness only.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fastapi import FastAPI

from common.http.run import ServerConfig
from common.http.trace_routes import add_trace_routes
from common.testing.leaks import shared_names
from common.testing.parts import (
    PARTS,
    certain_logits,
    distinct_files,
    engine_of,
    http_parts,
    module_of,
    short_form,
    wrap_model,
)
from common.testing.server import RunningServer, server_process, serving_thread
from common.trace import Trace

MODEL = "random:tiny-llama"
COMPLETIONS = "/v1/completions"
BASE: dict[str, Any] = {
    "prompt": [5, 6, 7],
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 0,
}
STREAMING = [part for part in PARTS if part > 1]
ASYNC_ENGINES = {*distinct_files("async_engine.py"), PARTS[-1]}  # each with code of its own
SECONDS = 60.0  # for what must happen to happen


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until something is so. Raises AssertionError when it never is."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.005)


class Gate:
    """Stands before each forward of the model and lets through as many as it is told."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.num_arrived = 0

        def gated(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
            self.num_arrived += 1
            if not self._is_open:
                assert self._permits.acquire(timeout=SECONDS), "nobody opened the gate"
            return real()

        wrap_model(engine, monkeypatch, gated)

    def let(self, count: int) -> None:
        """Let `count` forwards through, and wait for the next one to arrive."""
        arrived = self.num_arrived
        self._permits.release(count)
        until(lambda: self.num_arrived >= arrived + count, "the next forward")

    def open(self) -> None:
        self._is_open = True
        self._permits.release(1)


class Rig:
    """A part's app in a thread of this process, and what is inside it."""

    def __init__(self, part: int, monkeypatch: pytest.MonkeyPatch, model: str = MODEL) -> None:
        self.part, self.monkeypatch = part, monkeypatch
        self.engine = engine_of(part, model, threads=1)
        self.admission: Any = None
        self.async_engine: Any = None
        server = module_of(part, "server")
        self._capture(server, "Admission", "admission")
        if hasattr(server, "AsyncEngine"):
            self._capture(server, "AsyncEngine", "async_engine")

    def _capture(self, module: Any, class_name: str, attribute: str) -> None:
        """Remember the instance that the app makes of a class."""
        real = getattr(module, class_name)

        def make(*args: Any, **kwargs: Any) -> Any:
            setattr(self, attribute, real(*args, **kwargs))
            return getattr(self, attribute)

        self.monkeypatch.setattr(module, class_name, make)

    def fresh_trace(self) -> Trace:
        """A trace without the requests of other tests, which bear the same names."""
        trace = Trace()
        for owner in (self.engine, getattr(self.engine, "scheduler", None)):
            if owner is not None:
                self.monkeypatch.setattr(owner, "trace", trace)
        return trace

    def gate(self) -> Gate:
        return Gate(self.engine, self.monkeypatch)

    def all_launched(self) -> bool:
        """Whether the engine has launched all that it may before it must read a step."""
        most = getattr(self.engine, "num_in_flight", None)  # from part 05 on
        sequences = list(self.engine.sequences.values()) if most else []
        return all(sequence.num_placeholders == most for sequence in sequences)

    def fake_model(self, choose: Callable[[int], int]) -> None:
        """No arithmetic: the model's next token is `choose(number of forwards before this)`."""
        calls = iter(range(10**9))

        def fake(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
            return certain_logits(self.engine, num_rows, choose(next(calls)))

        wrap_model(self.engine, self.monkeypatch, fake)

    @contextlib.contextmanager
    def serve(self, **config: Any) -> Iterator[str]:
        server_config = ServerConfig(port=0, **config)
        app = module_of(self.part, "server").create_app(self.engine, server_config)
        with serving_thread(app, server_config) as url:
            yield url

    def check_idle(self) -> None:
        """Wait until nothing is held for anybody."""
        until(lambda: self.admission.count == 0, "every place given back")
        if self.async_engine is not None:
            until(lambda: not self.engine.has_unfinished(), "the engine idle")
            until(lambda: self.async_engine.streams == {}, "every stream forgotten")
            self.engine.check_integrity()
            stats = self.engine.stats()
            assert (stats["num_running"], stats["num_waiting"]) == (0, 0)
            held = "num_used_blocks" if "num_used_blocks" in stats else "kv_cache_bytes"
            assert stats[held] == 0


@pytest.fixture
def make_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    yield lambda part, model=MODEL: Rig(part, monkeypatch, model)


def start(url: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and do not wait for its answer."""
    content = json.dumps(body)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=SECONDS)
    sock.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    return sock


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = sock.recv(65536)
        assert piece, f"closed after {data[-200:]!r}"
        data += piece
    return data


def leave(sock: socket.socket, how: str) -> None:
    """Close a connection in order, or cut it."""
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def ask(url: str, **change: Any) -> httpx.Response:
    return httpx.post(url + COMPLETIONS, json=BASE | change, timeout=SECONDS)


def tokens_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["tokens"]


def events_of(url: str, **change: Any) -> list[str]:
    """The data of a stream's events, to its end."""
    body = BASE | {"stream": True} | change
    with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        lines = list(answer.iter_lines())
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


# Clients that leave.


# When a client leaves, whether its answer is a stream, and how: in the short form every way where
# streams begin and in the latest part, and three in the parts between.
LEAVING = list(
    itertools.product(("queued", "prefilling", "decoding"), (True, False), ("close", "reset"))
)
SOME = [("queued", True, "close"), ("prefilling", False, "reset"), ("decoding", True, "reset")]


@pytest.mark.parametrize(
    ("part", "when", "is_streamed", "how"),
    [
        pytest.param(
            part, *way, marks=[] if way in SOME or part in (2, PARTS[-1]) else pytest.mark.long
        )
        for part in STREAMING
        for way in LEAVING
    ],
)
def test_a_client_that_leaves(
    make_rig: Callable[..., Rig], part: int, when: str, is_streamed: bool, how: str
) -> None:
    """At most the token under way is computed for it; the one behind it is served as if alone."""
    rig = make_rig(part)
    gate = rig.gate()
    with rig.serve() as url:
        gate.open()
        expected = tokens_of(ask(url))
        rig.check_idle()
    rig = make_rig(part)
    rig.fresh_trace()
    gate = rig.gate()
    long = BASE | {"prompt": [9, 9], "max_tokens": 900, "stream": is_streamed}
    with rig.serve() as url, ThreadPoolExecutor(1) as pool:
        ahead = None
        if when == "queued":
            ahead = start(url, BASE | {"max_tokens": 900})
            until(lambda: gate.num_arrived == 1, "the first request at the gate")
            until(rig.all_launched, "the engine waiting at the gate")
        leaving = start(url, long)
        until(lambda: rig.admission.count == 1 + (ahead is not None), "the request admitted")
        if when != "queued":
            until(lambda: gate.num_arrived == 1, "the request at the gate")
        else:  # a place is taken before the text is read
            until(lambda: len(rig.async_engine.streams) == 2, "the request with the engine")
        if when == "decoding":
            gate.let(4)
        if is_streamed and when == "decoding":
            read_until(leaving, b"token_id:")
        [leaving_id] = list(rig.async_engine.streams)[-1:]
        behind = pool.submit(ask, url)
        until(lambda: rig.admission.count == 2 + (ahead is not None), "the one behind admitted")
        num_computed = steps_of(rig.engine, leaving_id)
        leave(leaving, how)
        until(lambda: leaving_id not in rig.async_engine.streams, "the departure noticed")
        if ahead is not None:
            leave(ahead, how)
            until(lambda: len(rig.async_engine.streams) == 1, "the other departure noticed")
        gate.open()
        assert tokens_of(behind.result()) == expected
        rig.check_idle()
        under_way = 0 if when == "queued" else 1
        assert steps_of(rig.engine, leaving_id) <= num_computed + under_way


def steps_of(engine: Any, request_id: str) -> int:
    """How many finished steps ran a request."""
    return sum(request_id in record.scheduled for record in engine.trace.records())


def test_part_01_goes_on_for_a_client_that_left(make_rig: Callable[..., Rig]) -> None:
    """It cannot know, as its docstring says; but it must serve the next one."""
    rig = make_rig(1)
    gate = rig.gate()
    with rig.serve() as url, ThreadPoolExecutor(1) as pool:
        leaving = start(url, BASE)
        until(lambda: gate.num_arrived == 1, "the request at the gate")
        leave(leaving, "reset")
        behind = pool.submit(ask, url)
        gate.open()
        assert len(tokens_of(behind.result())) == 8
        rig.check_idle()


@pytest.mark.parametrize("part", http_parts(first=2))
def test_clients_that_never_read(make_rig: Callable[..., Rig], part: int) -> None:
    """Neither a stream nor the trace waits for its reader, and neither grows for ever."""
    rig = make_rig(part)
    trace = rig.fresh_trace()
    rig.fake_model(lambda call: 5 + call % 400)
    with rig.serve() as url, contextlib.ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        follower = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        follower.sendall(b"GET /trace HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        body = BASE | {"prompt": [[5]] * 4, "max_tokens": 1000, "logprobs": 20, "stream": True}
        sock = stack.enter_context(start(url, body))
        until(lambda: len(trace._followers) == 1, "the trace followed")
        assert len(tokens_of(ask(url))) == 8
        until(lambda: not rig.engine.has_unfinished(), "the stream computed, though nobody reads")
        assert httpx.get(url + "/health").status_code == 200
        assert all(len(queue) <= 256 for queue in trace._followers)
        leave(sock, "reset")
        leave(follower, "reset")
        rig.check_idle()
        until(lambda: trace._followers == [], "the trace left")


@pytest.mark.parametrize("path", ["/trace.jsonl", "/trace.perfetto.json"])
def test_a_download_that_nobody_reads_ends(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would keep the steps of its moment for as long as its client likes."""
    monkeypatch.setattr("common.http.trace_routes.SEND_SECONDS", 0.3)
    trace = Trace(capacity=1000)

    def fill() -> weakref.ref[Any]:
        for _ in range(trace.capacity):
            with trace.step():
                for number in range(300):
                    trace.scheduled(f"a request with a long name {number}", 1)
        return weakref.ref(trace.last_record)

    app = FastAPI()
    app.state.stopping = False
    add_trace_routes(app, trace)
    record = fill()
    with serving_thread(app) as url, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert sock.recv(10) == b"HTTP/1.1 2"
        fill()
        until(lambda: record() is None, "the steps of the download forgotten")
        text = httpx.get(url + path, timeout=60).text  # who reads has all of it
        assert text == "".join(trace.lines()) or json.loads(text) == trace.to_perfetto()


@pytest.mark.parametrize("part", http_parts(4, first=2))
def test_forty_clients_some_of_whom_leave(make_rig: Callable[..., Rig], part: int) -> None:
    """Whoever stays gets what they get alone; when all are gone nothing is left of any."""
    rig = make_rig(part)
    rng = random.Random(7)
    prompts = [[rng.randrange(2, 512) for _ in range(rng.randrange(1, 30))] for _ in range(40)]
    bodies = [
        BASE | {"prompt": p, "max_tokens": rng.randrange(1, 12), "stream": rng.random() < 0.6}
        for p in prompts
    ]
    patience = [rng.choice([None, None, 0, 1, 2]) for _ in bodies]  # chunks until they leave

    async def one(client: httpx.AsyncClient, body: dict[str, Any], chunks: int | None) -> Any:
        if chunks is not None and not body["stream"]:
            with contextlib.suppress(httpx.TimeoutException):
                await client.post(COMPLETIONS, json=body, timeout=0.02 * chunks + 0.001)
            return None
        if not body["stream"]:
            return tokens_of(await client.post(COMPLETIONS, json=body))
        tokens: list[str] = []
        async with client.stream("POST", COMPLETIONS, json=body) as answer:
            async for line in answer.aiter_lines():
                if chunks is not None and len(tokens) >= chunks:
                    return None
                if line.startswith("data: {"):
                    [choice] = json.loads(line[6:])["choices"]
                    tokens += choice["logprobs"]["tokens"]
        return tokens

    async def all_of_them(url: str) -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=SECONDS) as client:
            return await asyncio.gather(*map(one, [client] * len(bodies), bodies, patience))

    with rig.serve() as url:
        results = asyncio.run(all_of_them(url))
        rig.check_idle()
        alone = [tokens_of(ask(url, **(body | {"stream": False}))) for body in bodies]
        rig.check_idle()
    assert sum(result is None for result in results) > 10
    assert sum(result is not None for result in results) > 10
    for result, expected in zip(results, alone, strict=True):
        assert result in (None, expected)


# More requests than places.


@pytest.mark.parametrize("part", http_parts(4))
def test_a_full_server_says_503(make_rig: Callable[..., Rig], part: int) -> None:
    """And is healthy: being full is no illness."""
    rig = make_rig(part)
    gate = rig.gate()
    places = getattr(rig.engine.config, "max_num_seqs", 1) + 1
    with rig.serve(max_waiting=1) as url, ThreadPoolExecutor(places) as pool:
        admitted = [pool.submit(ask, url) for _ in range(places)]
        until(lambda: rig.admission.count == places, "all that may run, and one waiting")
        refused = ask(url)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["code"] == "overloaded"
        assert ask(url, prompt=[[5]] * 2).status_code == 503
        assert ask(url, prompt=[[5]] * (places + 1)).status_code == 400, "waiting would never help"
        if part in STREAMING:
            assert ask(url, stream=True).status_code == 503
        assert httpx.get(url + "/health").status_code == 200
        gate.open()
        assert [len(tokens_of(answer.result())) for answer in admitted] == [8] * places
        rig.check_idle()
        assert len(tokens_of(ask(url))) == 8


# Failures inside.


def fail_on(rig: Rig, token_id: int) -> None:
    """Make the model fail on prompts with this token."""

    def fail(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
        if token_id in token_ids:
            raise RuntimeError(f"the model failed on {token_ids}")
        return real()

    wrap_model(rig.engine, rig.monkeypatch, fail)


@pytest.mark.parametrize("part", PARTS)
def test_a_failing_step_fails_one_request(make_rig: Callable[..., Rig], part: int) -> None:
    rig = make_rig(part)
    with rig.serve() as url:
        expected = tokens_of(ask(url))
        fail_on(rig, 13)
        failed = ask(url, prompt=[5, 13])
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "internal server error"
        assert tokens_of(ask(url)) == expected
        assert httpx.get(url + "/health").status_code == 200
        rig.check_idle()


@pytest.mark.parametrize("part", STREAMING)
def test_a_failing_step_ends_its_stream_with_an_error(
    make_rig: Callable[..., Rig], part: int
) -> None:
    """Never with [DONE], which would make half an answer look whole; before or after a token."""
    rig = make_rig(part)
    rig.fake_model(lambda call: 5)
    calls: list[int] = []
    num_failed = 0

    def fail(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
        if 6 in token_ids:
            calls.clear()  # the second request begins; a step of the first may have been in flight
        calls.append(len(token_ids))
        if 13 in token_ids or (len(calls) == 3 and num_failed == 1):
            raise RuntimeError("the model failed")
        return real()

    wrap_model(rig.engine, rig.monkeypatch, fail)
    with rig.serve() as url:
        for prompt, num_tokens in (([5, 13], 0), ([5, 6], 2)):
            events = events_of(url, prompt=prompt)
            assert "[DONE]" not in events
            assert len(events) == num_tokens + 1
            assert json.loads(events[-1])["error"]["type"] == "server_error"
            num_failed += 1
        assert events_of(url)[-1] == "[DONE]"
        rig.check_idle()


@pytest.mark.parametrize("part", short_form(STREAMING, ASYNC_ENGINES))
def test_failures_in_a_row_reach_everyone(make_rig: Callable[..., Rig], part: int) -> None:
    """Once the second failing step took the first one's error with it, and its client waited on."""
    rig = make_rig(part)
    gate = rig.gate()
    fail_on(rig, 13)
    with rig.serve() as url, ThreadPoolExecutor(6) as pool:
        first = pool.submit(ask, url)
        until(lambda: gate.num_arrived == 1, "the first request at the gate")
        failing = [pool.submit(ask, url, prompt=[13]) for _ in range(4)]
        until(lambda: rig.admission.count == 5, "four more admitted")
        gate.open()
        assert [answer.result().status_code for answer in failing] == [500] * 4
        last = pool.submit(ask, url)  # sooner, it might share their step and their end
        # From part 06 on prompts share their step with the tokens of those before them.
        assert first.result().status_code == (500 if part >= 6 else 200)
        assert len(tokens_of(last.result())) == 8
        rig.check_idle()


class Death(BaseException):
    """What no handler of exceptions stops."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("death", [Death, torch.AcceleratorError])
@pytest.mark.parametrize("part", short_form(STREAMING, ASYNC_ENGINES))
def test_a_dead_engine_is_no_secret(
    make_rig: Callable[..., Rig], part: int, death: type[BaseException]
) -> None:
    """Health says so, open requests end with an error, and new ones do not wait."""
    rig = make_rig(part)
    gate = rig.gate()
    with rig.serve() as url, ThreadPoolExecutor(3) as pool:
        assert httpx.get(url + "/health").status_code == 200
        streamed, waiting = pool.submit(events_of, url), pool.submit(events_of, url)
        whole = pool.submit(ask, url)
        until(lambda: rig.admission.count == 3, "three requests admitted")
        gate.let(2)

        def die(*args: Any) -> None:
            raise death

        rig.monkeypatch.setattr(rig.engine, "schedule", die)
        gate.open()
        for events in (streamed.result(), waiting.result()):
            assert "[DONE]" not in events
            assert json.loads(events[-1])["error"]["type"] == "server_error"
        assert whole.result().status_code == 500
        health = httpx.get(url + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
        # The moment between the end of the work and the end of the thread must not matter.
        rig.monkeypatch.setattr(rig.async_engine.thread, "is_alive", lambda: True)
        assert ask(url).status_code == 500
        assert "[DONE]" not in events_of(url)
        assert httpx.get(url + "/v1/models").status_code == 200
        assert rig.admission.count == 0
        rig.monkeypatch.undo()


# Text that is longer than its tokens.

TEXT = "Grüße, 日本語 🙂🙃 und 👩‍👩‍👧‍👦 naïve café.\nSTOP here; the rest is not asked for."


@pytest.mark.parametrize(
    "stop", [None, "STOP", "日本", "🙃", "語 🙂", "\n", ["nowhere", "café.\nS"], "G", "‍👧"]
)
@pytest.mark.parametrize("part", http_parts())
def test_text_is_the_same_streamed_and_whole(
    make_rig: Callable[..., Rig], part: int, stop: Any
) -> None:
    """Characters and stop strings that straddle tokens; the tokens are scripted, the rest is real."""
    rig = make_rig(part, "smollm2-135m")
    script = rig.engine.tokenizer.encode(TEXT)
    script += sorted(rig.engine.eos_token_ids)[:1]
    position = iter(range(10**9))

    def recite(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
        nonlocal position
        if len(token_ids) > 1:  # a prompt begins a completion
            position = iter(range(10**9))
        return certain_logits(rig.engine, num_rows, script[next(position)])

    wrap_model(rig.engine, rig.monkeypatch, recite)
    stops = [stop] if isinstance(stop, str) else stop or []
    expected = TEXT
    for string in stops:
        expected = expected.split(string)[0]
    body = {"prompt": "Say it.", "max_tokens": 200, "ignore_eos": False, "stop": stop}
    body |= {"logprobs": None}
    with rig.serve() as url:
        answer = ask(url, **body).json()
        [choice] = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected, "stop")
        if part in STREAMING:
            events = events_of(url, **body, stream_options={"include_usage": True})
            assert events.pop() == "[DONE]"
            chunks = [json.loads(event) for event in events]
            assert chunks.pop()["usage"] == answer["usage"]
            texts = [chunk["choices"][0]["text"] for chunk in chunks]
            assert "".join(texts) == expected
            assert len(texts) > 1 or len(expected) < 4
            assert not any("\ufffd" in text for text in texts)
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        rig.check_idle()


# Servers that start and stop.


@pytest.mark.parametrize("part", http_parts())
def test_ten_starts_and_stops_leave_nothing(make_rig: Callable[..., Rig], part: int) -> None:
    rig = make_rig(part)
    rig.fake_model(lambda call: 5 + call % 400)
    switch_interval = sys.getswitchinterval()

    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), psutil.Process().num_fds()

    before = None
    for cycle in range(10):
        with rig.serve() as url:
            assert ask(url).status_code == 200
            if part in STREAMING and cycle % 2:
                start(url, BASE | {"stream": True, "max_tokens": 900}).close()
        if cycle == 2:
            before = held()
    assert before is not None
    until(lambda: held() <= before, f"no more threads and files than {before}")
    assert sys.getswitchinterval() == switch_interval


@pytest.mark.parametrize("part", http_parts(4))
def test_requests_leave_nothing(make_rig: Callable[..., Rig], part: int) -> None:
    """No object stays for each request, finished, failed, refused or left."""
    rig = make_rig(part)
    if part in STREAMING:
        rig.monkeypatch.setattr(rig.engine.trace, "capacity", 16)
    rig.fake_model(lambda call: 5 + call % 400)
    fail_on(rig, 13)
    logging.disable()  # pytest keeps every record, and so every traceback's objects

    def round_of_requests(url: str, client: httpx.Client) -> int:
        for i in range(50):
            for body in (BASE, BASE | {"prompt": [13]}, BASE | {"prompt": [600]}, BASE | {"x": i}):
                client.post(url + COMPLETIONS, json=body | {"max_tokens": 2})
            if part in STREAMING:
                events_of(url, max_tokens=2)
                leave(start(url, BASE | {"max_tokens": 50, "stream": bool(i % 2)}), "reset")
        rig.check_idle()
        gc.collect()
        return len(gc.get_objects())

    with rig.serve() as url, httpx.Client(timeout=SECONDS) as client:
        round_of_requests(url, client)
        before = round_of_requests(url, client)
        round_of_requests(url, client)
        # What the last of them left may still be on its way out; what stays is a leak.
        settled = lambda: gc.collect() >= 0 and len(gc.get_objects()) - before < 100  # noqa: E731
        until(settled, "50 requests of each kind leave nothing")
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", http_parts())
def test_sigterm_lets_running_requests_finish(part: int) -> None:
    """Then the process ends with 0, and its port is free for the next one at once."""
    body = BASE | {"max_tokens": 400}
    with server_process(part, "--model", MODEL, "--threads", "1") as server:
        port = server.port
        client = httpx.Client(base_url=server.base_url, timeout=SECONDS)
        client.get("/health")  # and its connection stays open, idle
        sock = start(server.base_url, body | {"stream": part in STREAMING})
        if part in STREAMING:
            data = read_until(sock, b"token_id:")
        else:
            busy = psutil.Process(server.process.pid)
            used = sum(busy.cpu_times()[:2])
            until(lambda: sum(busy.cpu_times()[:2]) > used + 0.3, "the request under way")
            data = b""
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not accepts(port), "no new connections")
        assert server.process.poll() is None, "it must drain, or the test shows nothing"
        data += read_until(sock, b"[DONE]" if part in STREAMING else b'"completion_tokens":400')
        assert server.stop() == 0
        assert "Traceback" not in server.output, server.output
    if part != PARTS[-1]:
        return
    again = RunningServer(part, "--model", MODEL, "--threads", "1", "--port", str(port))
    try:
        again.wait_until_ready()
        assert again.port == port
        # SIGKILL: nothing of it stays, and so the port is free once more.
        process = psutil.Process(again.process.pid)
        assert process.children(recursive=True) == []
        shared = shared_names()
    finally:
        again.kill()
    assert shared_names() <= shared
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))


def accepts(port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("part", http_parts(first=2))
def test_the_end_waits_for_no_watcher(make_rig: Callable[..., Rig], part: int) -> None:
    """The trace has no end of its own, and requests are waited for until the timeout only."""
    rig = make_rig(part)
    with rig.serve(shutdown_timeout=600) as url:
        trace = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        trace.sendall(b"GET /trace HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        read_until(trace, b" 200 ")
    trace.close()

    def choose(call: int) -> int:
        time.sleep(0.05)
        return 5

    rig.fake_model(choose)
    with rig.serve(shutdown_timeout=1) as url:
        sock = start(url, BASE | {"max_tokens": 1000, "stream": True})
        data = read_until(sock, b"token_id:")
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            data += piece
    assert b"[DONE]" not in data
    rig.check_idle()


LOADING = """
import signal, socket, sys, time
from fastapi import FastAPI
from common.http.run import ServerConfig, serve

def build():
    print("loading", flush=True)
    if "port" in sys.argv:
        # Another server, that bound before this one and begins to listen while it loads.
        other.listen()
        return FastAPI()
    time.sleep(60)

other = socket.socket()
other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
other.bind(("127.0.0.1", 0))
serve(build, ServerConfig(port=other.getsockname()[1]))
"""


def load(*args: str) -> subprocess.Popen[str]:
    """A server that is loading its model."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, *args],
        # Tests that run in the background of a shell have SIGINT ignored, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    return process


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_signals_while_the_model_loads(name: str, status: int) -> None:
    process = load()
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output, errors) == (status, "", "")


def test_a_port_that_is_taken_while_the_model_loads() -> None:
    """Two servers may bind before either listens; the second must say so, and not run deaf."""
    process = load("port")
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1 and "in use" in errors, errors


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("delay", [0.2, 1.0, 2.0, 3.0, 4.0])
def test_sigterm_at_any_time_of_a_start(part: int, delay: float, tmp_path: Path) -> None:
    """Before the handler is there the signal's default ends the process; never a traceback."""
    server = RunningServer(part, "--model", MODEL, "--threads", "1")
    time.sleep(delay)
    assert server.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in server.output, server.output
