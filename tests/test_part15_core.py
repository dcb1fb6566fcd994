"""Part 15: an engine core in a process of its own, and several HTTP processes in front of it.

Most tests run the core in a thread, with real sockets, so that they can reach inside. Those at the end
start processes, and kill and stop them.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import zmq
from part15.config import EngineConfig
from part15.server import create_app

from common.completions import DraftCounts, RequestOutput, TokenLogprobs
from common.engine_core import link, messages, serving
from common.http.app import Admission, Seat
from common.http.errors import ApiError
from common.http.run import ServerConfig
from common.kv_transfer.ticket import Ticket, write_ticket
from common.requests import Request
from common.sampling import SamplingParams
from common.structured.grammar import Grammar
from common.testing.engine_core import CoreInThread, core_in_thread
from common.testing.parts import make_engine
from common.testing.server import RunningServer, serving_thread
from common.trace import EngineState, StepRecord

MODEL = "random:tiny-llama"
COMPLETIONS = "/v1/completions"
SECONDS = 60.0
BASE = {"prompt": [3, 4, 5], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.01)


def new_engine(**flags: Any) -> Any:
    flags = {"num_blocks": 128, "max_num_seqs": 8, "threads": 1} | flags
    return make_engine(15, MODEL, **flags)


@pytest.fixture(scope="module")
def core() -> Iterator[CoreInThread]:
    with core_in_thread(15, new_engine()) as core:
        yield core


@contextlib.contextmanager
def served(core: CoreInThread, seat: Seat | None = None, **settings: Any) -> Iterator[httpx.Client]:
    """One HTTP process's app, in a thread."""
    config = ServerConfig(port=0, **settings)
    app = create_app(core.remote(), config, *([seat] if seat else []))
    with serving_thread(app, config) as url, httpx.Client(base_url=url, timeout=SECONDS) as client:
        yield client


@pytest.fixture(scope="module")
def client(core: CoreInThread) -> Iterator[httpx.Client]:
    with served(core) as client:
        yield client


@pytest.fixture(scope="module")
def other(core: CoreInThread) -> Iterator[httpx.Client]:
    with served(core) as client:
        yield client


def idle(core: CoreInThread) -> bool:
    return not core.engine.has_unfinished() and not core.server.owners


# What passes.


FULL_PARAMS = SamplingParams(
    0.5, 0.9, 7, 0.1, 2**64 - 1, 9, ("stop", "日本"), (3, 4), True, 1, 5, 0.5, -0.5, 2, True, 3,
    {5: -1.5, 6: 100.0},
)  # fmt: skip
FULL_REQUEST = Request(
    "a-1",
    [1, 2, 65000],
    FULL_PARAMS,
    3,
    "salt",
    False,
    Ticket("h:1", "t", 5.5),
    Grammar("regex", "a+"),
)


def fields_at_default(value: Any) -> list[str]:
    names = []
    for field in dataclasses.fields(value):
        default = field.default
        if default is not dataclasses.MISSING and getattr(value, field.name) == default:
            names.append(field.name)
    return names


def test_a_request_passes_whole():
    """Every field of it, so that a new one is noticed here when it does not pass."""
    assert fields_at_default(FULL_PARAMS) == ["n"], "the test's premise: a request is for one"
    assert not fields_at_default(FULL_REQUEST)
    data = messages.encoder.encode(messages.Add(FULL_REQUEST))
    assert messages.from_http.decode(data) == messages.Add(FULL_REQUEST)


def test_outputs_and_records_pass_whole():
    logprobs = [TokenLogprobs(5, -0.5, ((5, -0.5), (7, -float("inf"))), 1), None]
    outputs = [
        RequestOutput("a", [5, 6], logprobs, "stop", [logprobs[0]], 12, DraftCounts(1, 2, 3)),
        RequestOutput("b", [], finish_reason="abort"),
    ]
    record = StepRecord(
        3, 1.5, 2.5, {"a": 1}, [("schedule", 1.5, 1.6)], {"b": "abort"}, {"c": 9}, {"a": [1, 2]},
        {"b": [7]}, ["d"], [(2, 1.0, 1.4)], {"a": 16}, {"a": 2},
    )  # fmt: skip
    data = messages.encoder.encode(messages.step(messages.encode_records([record]), outputs))
    came = messages.from_core.decode(data)
    assert came.records == [record] and messages.outputs_of(came) == outputs
    state = EngineState(9, 16, 4, {"a": 0}, {"b": 5}, {"b": [1, 2]}, {"b": 16})
    welcome = messages.Welcome({"connector": {"address": None}}, state)
    assert messages.from_core.decode(messages.encoder.encode(welcome)) == welcome


# What no peer may do.


class Canary:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def garbage(tmp_path: Path, seed: int = 0) -> list[bytes]:
    """Pickles with a canary, malformed and mutated messages, and some that only look right."""
    generator = random.Random(seed)
    good = messages.encoder.encode(messages.Add(FULL_REQUEST))
    pickles = [pickle.dumps(Canary(tmp_path / "canary"), protocol) for protocol in range(6)]
    broken = [b"", b"\xc1", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x81\xa4type\xa3Add"]
    for _ in range(300):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        broken.append(bytes(data[: generator.randint(1, len(data))]))
    wrong = [
        {"type": "Add", "request": {}},
        {"type": "Ask", "number": 1, "method": "shutdown", "arguments": []},
        {"type": "Ask", "number": 1, "method": "__class__", "arguments": []},
        {"type": "Beat", "number": "one", "num_bytes": 1, "counts": {}},
        {"type": "Abort", "request_id": "x", "more": 1},
        {"type": "Nothing"},
    ]
    return pickles + broken + [msgspec.msgpack.encode(message) for message in wrong]


def test_garbage_is_dropped_by_both_sides_and_runs_nothing(
    core: CoreInThread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pickle.loads(pickle.dumps(Canary(tmp_path / "works")))
    assert (tmp_path / "works").exists(), "the test's premise"
    kept: list[str] = []
    remove = link.shutil.rmtree

    @contextlib.contextmanager
    def kept_folder() -> Iterator[str]:
        with real() as folder:
            kept.append(folder)
            monkeypatch.setattr(link.shutil, "rmtree", lambda *a, **k: None)
            yield folder
        monkeypatch.undo()

    real = link.private_folder
    monkeypatch.setattr(link, "private_folder", kept_folder)
    with served(core) as client:
        expected = client.post(COMPLETIONS, json=BASE).json()["choices"]
        [connection] = [c for c in core.server.connections.values() if c.folder in kept]
        remote = core.remotes[-1].link
        peer = zmq.Context.instance().socket(zmq.PUSH)
        peer.connect(f"ipc://{kept[0]}/outputs")
        for data in garbage(tmp_path):
            peer.send(data)
            peer.send_multipart([data, data])
            with remote.lock:
                remote.requests.send(data)
                remote.requests.send_multipart([b"", data, b"more"])
        assert client.post(COMPLETIONS, json=BASE).json()["choices"] == expected
        before = connection.num_received
        until(lambda: connection.num_received > before, "a sign of life")
        peer.close(linger=0)
    until(lambda: idle(core), "the requests that were mutated, and still were requests, ended")
    assert not (tmp_path / "canary").exists()
    remove(kept[0])


def test_decoders_raise_only_what_is_caught(tmp_path: Path):
    for data in garbage(tmp_path, seed=1):
        for decoder in (messages.from_http, messages.from_core):
            with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
                decoder.decode(data)
    assert not (tmp_path / "canary").exists()


def test_sockets_are_files_for_one_user_and_only_for_a_moment(core: CoreInThread):
    seen: list[int] = []

    def connect(folder: str) -> None:
        seen.append(os.stat(folder).st_mode & 0o777)
        assert sorted(os.listdir(folder)) == ["outputs", "requests"]
        core.parent.tell(connect=folder)

    one = link.Link(connect, core.health, 30.0)
    assert seen == [0o700] and not os.path.exists(one.folder)
    assert type(next(one.receive())).__name__ == "Welcome"
    core.parent.tell(disconnect=one.folder)
    until(lambda: one.folder not in core.server.connections, "the link forgotten")


def test_a_long_temporary_folder_does_not_matter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with link.private_folder() as folder:
        assert len(folder) < 30


# The same as in a thread.

BODIES: list[dict[str, Any]] = [
    BASE,
    BASE | {"logprobs": 3, "prompt": [[7, 8], [9]], "n": 2},
    BASE | {"temperature": 1, "seed": 7, "n": 3, "max_tokens": 20},
    BASE | {"echo": True, "logprobs": 2, "max_tokens": 3},
    BASE | {"stop_token_ids": [11], "logit_bias": {"11": 50}, "min_tokens": 3},
    BASE | {"presence_penalty": 1, "frequency_penalty": 0.5, "cache_salt": "a"},
]


def rounded(value: Any) -> Any:
    """Log probabilities differ in their last digits with the requests that share a step."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def answers(client: httpx.Client) -> list[Any]:
    """Whole and streamed, without what differs from call to call."""
    found: list[Any] = []
    for body in BODIES:
        answer = client.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        found.append((answer.json()["choices"], answer.json()["usage"]))
        if "echo" in body:
            continue
        options = {"stream": True, "stream_options": {"include_usage": True}}
        lines = client.post(COMPLETIONS, json=body | options).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "data: [DONE]" in lines
        text = [(c["index"], c["text"], c["logprobs"]) for x in chunks for c in x["choices"]]
        found.append((sorted(text, key=lambda item: item[0]), chunks[-1]["usage"]))
    return rounded(found)


def test_answers_are_the_same_in_a_thread_and_in_a_process(client: httpx.Client):
    engine = new_engine()
    with (
        serving_thread(create_app(engine, ServerConfig(port=0))) as url,
        httpx.Client(base_url=url, timeout=SECONDS) as in_thread,
    ):
        assert answers(client) == answers(in_thread)
        for path in ("/v1/models", "/is_sleeping", "/kv_transfer", "/version"):
            ours, theirs = client.get(path).json(), in_thread.get(path).json()
            for found in (ours, theirs):
                for card in found.get("data", []):
                    card.pop("created")
            assert ours == theirs, path


def test_what_is_refused_in_a_thread_is_refused(client: httpx.Client):
    for change in ({"prompt": [99999]}, {"max_tokens": 10**6}, {"temperature": -1}, {"n": 1000}):
        assert client.post(COMPLETIONS, json=BASE | change).status_code == 400


def test_the_trace_is_the_cores(core: CoreInThread, other: httpx.Client):
    other.post(COMPLETIONS, json=BASE)
    until(lambda: idle(core), "the engine idle")
    ours = [json.loads(line) for line in other.get("/trace.jsonl").text.splitlines()]
    cores = [json.loads(line) for line in core.engine.trace.lines()]
    assert len(ours) > 5 and ours[1:] == cores[-len(ours) + 1 :]
    with other.stream("GET", "/trace") as feed:
        assert next(feed.iter_lines()) == "event: state"


def test_sleep_is_known_to_all(core: CoreInThread, client: httpx.Client, other: httpx.Client):
    until(lambda: idle(core), "the engine idle")
    slept = client.post("/sleep?level=1").json()
    assert slept["is_sleeping"] and slept["bytes_before"] > 0
    assert other.get("/is_sleeping").json() == {"is_sleeping": True}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.post, COMPLETIONS, json=BASE)
        assert client.post("/sleep?level=3").status_code == 400
        until(lambda: core.engine.scheduler.waiting, "the request that waits")
        assert not other.post("/wake_up").json()["is_sleeping"]
        assert waiting.result().status_code == 200
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}


def test_what_sleeping_raises_is_told(
    core: CoreInThread, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    from common.memory import SleepError

    def fail(level: int) -> Any:
        raise SleepError("the disk is full")

    monkeypatch.setattr(core.engine, "sleep", fail)
    answer = client.post("/sleep")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "sleep_failed")
    assert answer.json()["error"]["message"] == "the disk is full"
    assert client.post(COMPLETIONS, json=BASE).status_code == 200


def test_tickets_are_read_by_the_http_process(core: CoreInThread, monkeypatch: pytest.MonkeyPatch):
    secret = b"x" * 20
    config = dataclasses.replace(core.engine.config, role="decode", kv_secret=secret.decode())
    monkeypatch.setattr(core.engine, "config", config)
    remote = core.remote()
    ticket = Ticket("127.0.0.1:5", "t", time.time() + 60)
    assert remote.connector.ticket_of(write_ticket(ticket, secret)) == ticket
    assert remote.connector.ticket_of("forged") is None
    core.parent.tell(disconnect=remote.link.folder)


# Clients and HTTP processes that go.


def test_a_client_that_goes_away_has_its_requests_ended(core: CoreInThread, client: httpx.Client):
    until(lambda: idle(core), "the engine idle")
    for stream in (True, False):
        body = json.dumps(BASE | {"max_tokens": 900, "n": 2, "stream": stream})
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as sock:
            sock.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
            until(lambda: core.engine.stats()["num_running"] == 2, "both run")
        until(lambda: idle(core), "both ended")
    assert all("abort" in r.finished.values() for r in core.engine.trace.records()[-1:])
    core.engine.check_integrity()
    assert core.engine.stats()["num_used_blocks"] == 0


def test_a_step_that_fails_ends_its_requests_only(
    core: CoreInThread, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    def fail(request: Request) -> None:
        raise RuntimeError

    monkeypatch.setattr(core.engine, "add_request", fail)
    assert client.post(COMPLETIONS, json=BASE).status_code == 500
    monkeypatch.undo()
    assert client.post(COMPLETIONS, json=BASE).status_code == 200


def test_one_that_does_not_read_costs_others_nothing_and_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
):
    """As a stopped process does not. It has requests of its own under way. When it reads again they have
    ended with an error, and new ones are run."""
    monkeypatch.setattr(serving, "MOST_UNREAD", 100_000)
    monkeypatch.setattr(link, "MOST_READ", 5_000)
    with core_in_thread(15, new_engine()) as core, served(core) as client:
        idler = core.remote()
        long = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
        for number in range(3):
            idler.put(Request(f"idle-{number}", [5, 6], long))
        until(lambda: core.engine.stats()["num_running"] == 3, "its requests run")
        connection = core.server.connections[idler.link.folder]
        with ThreadPoolExecutor(4) as pool:
            bodies = [BASE | {"prompt": [n], "max_tokens": 300} for n in range(4)]
            done = list(pool.map(lambda body: client.post(COMPLETIONS, json=body), bodies))
        assert [answer.json()["usage"]["completion_tokens"] for answer in done] == [300] * 4
        until(lambda: idle(core), "its requests aborted")
        assert connection.state.name == "LOST" and {"lost": idler.link.folder} in core.parent.said
        at_most = serving.MOST_UNREAD + 5_000
        assert connection.num_unread < at_most
        client.post(COMPLETIONS, json=BASE)
        assert connection.num_unread < at_most, "nothing more is sent to it"
        # It reads again.
        outputs: dict[str, Any] = {}
        thread = threading.Thread(
            target=idler.run,
            args=(lambda record, new: outputs.update({o.request_id: o for o in new}),),
        )
        thread.start()
        until(lambda: len(outputs) == 3, "news of its requests")
        until(lambda: {o.finish_reason for o in outputs.values()} == {"error"}, "their ends")
        idler.put(Request("again", [3, 4, 5], SamplingParams(temperature=0.0, max_tokens=4)))
        until(lambda: outputs.get("again") and outputs["again"].finished, "a new request's end")
        assert connection.state.name == "OPEN"
        assert idler.trace.catch_up(deque()).blocks == {}
        idler.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_one_that_is_silent_is_given_up_and_one_that_leaves_forgotten():
    with core_in_thread(15, new_engine(), timeout=1.0) as core:
        silent, gone = core.remote(), core.remote()
        long = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
        silent.put(Request("silent", [5, 6], long))
        until(lambda: {"lost": silent.link.folder} in core.parent.said, "the silent one given up")
        until(lambda: idle(core), "its request aborted")
        gone.put(Request("gone", [5, 6], long))
        until(lambda: core.engine.has_unfinished(), "the other's request runs")
        core.parent.tell(disconnect=gone.link.folder)
        until(lambda: idle(core), "it is aborted")
        assert list(core.server.connections) == [silent.link.folder]
        core.engine.check_integrity()


def test_one_cannot_end_anothers_requests(core: CoreInThread, client: httpx.Client):
    stranger = core.remote()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, COMPLETIONS, json=BASE | {"max_tokens": 200})
        until(lambda: core.server.owners, "its request")
        [request_id] = core.server.owners
        stranger.put(messages.Abort(request_id))
        assert answer.result().json()["usage"]["completion_tokens"] == 200
    core.parent.tell(disconnect=stranger.link.folder)


# Numbers of all.


def scrape(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
    return {name.replace('model_name="random:tiny-llama"', ""): float(v) for name, _, v in pairs}


def test_metrics_add_up_over_http_processes():
    places = [0, 0]
    with (
        core_in_thread(15, new_engine()) as core,
        served(core, Seat(0, places)) as one,
        served(core, Seat(1, places)) as two,
    ):
        for client, count in ((one, 3), (two, 5)):
            for _ in range(count):
                assert client.post(COMPLETIONS, json=BASE).status_code == 200
        label = '{engine="0",}'
        done = f"vllm:request_success_total{label.replace(',}', ',')}"
        for client in (one, two):
            until(
                lambda client=client: scrape(client)[f"vllm:generation_tokens_total{label}"] == 64,
                "the tokens of both",
            )
            found = scrape(client)
            assert found[f"vllm:prompt_tokens_total{label}"] == 24
            assert found[f"vllm:time_to_first_token_seconds_count{label}"] == 8
            assert found[f"vllm:request_queue_time_seconds_count{label}"] == 8
            assert sum(v for name, v in found.items() if name.startswith(done)) == 8
            steps = sum(bool(record.scheduled) for record in core.engine.trace.records())
            assert found[f"vllm:iteration_tokens_total_count{label}"] == steps
            assert not any(name.startswith("process_") for name in found), "one of several"
        # One ends: what it has counted stays.
        folder = core.remotes[0].link.folder
        core.parent.tell(disconnect=folder)
        until(lambda: folder not in core.server.connections, "one forgotten")
        assert scrape(two)[f"vllm:generation_tokens_total{label}"] == 64
        assert places == [0, 0]


def test_admission_counts_all_and_never_too_many():
    places = [0, 0]
    one, two = Admission(3, Seat(0, places)), Admission(3, Seat(1, places))
    with one.admit(2):
        assert (one.count, two.count) == (2, 2)
        with two.admit(1), pytest.raises(ApiError) as refused, one.admit(1):
            pass
        assert refused.value.status == 503
        # Both have looked before either has taken its place.
        two.check(1)
        with one.admit(1), pytest.raises(ApiError):
            two.check = lambda count: None
            with two.admit(1):
                pass
        assert places == [2, 0]
    assert places == [0, 0]


# Settings.


def test_settings_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"^api_server_count .*engine_core"):
        EngineConfig(engine_core="thread", api_server_count=2)
    with pytest.raises(ValueError, match=r"^engine_core must be one of auto, thread, process"):
        EngineConfig(engine_core="fork")


def test_an_engine_imports_without_zeromq_and_msgspec():
    code = (
        "import sys\n"
        "sys.modules['zmq'] = sys.modules['msgspec'] = None\n"
        "import part15.engine, part15.server, part15.async_engine\n"
        "from common.engine_core.launch import check_packages\n"
        "try:\n"
        "    check_packages()\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "needs pyzmq: pip install pyzmq, or --engine-core thread" in done.stdout


# Processes.

FLAGS = ("--model", MODEL, "--num-blocks", "128", "--threads", "1", "--rank-timeout", "4")
STREAM = BASE | {"max_tokens": 700, "stream": True}


class Server:
    """A server of several processes, and its clients."""

    def __init__(self, *flags: str) -> None:
        self.folder = tempfile.mkdtemp()  # for its sockets, and what is left of them
        self.server = RunningServer(15, *FLAGS, *flags, env={"TMPDIR": self.folder})
        self.server.wait_until_ready()
        self.url, self.parent = self.server.base_url, psutil.Process(self.server.process.pid)
        self.ends: list[str] = []

    def named(self, module: str) -> list[psutil.Process]:
        found = self.parent.children()
        return [one for one in found if f"part15.{module}" in one.cmdline()]

    @property
    def core(self) -> psutil.Process:
        [core] = self.named("engine_core")
        return core

    def stream(self, **change: Any) -> "Client":
        return Client(self, STREAM | change)

    def health(self) -> int:
        return httpx.get(f"{self.url}/health", timeout=20).status_code

    def stop(self) -> None:
        """It ends in order, and leaves nothing."""
        family = self.family()
        assert self.server.stop() == 0, self.server.output
        self.nothing_left(family)

    def family(self) -> list[psutil.Process]:
        return [self.parent, *self.parent.children(recursive=True)]

    def nothing_left(self, family: list[psutil.Process]) -> None:
        until(lambda: not any(map(is_alive, family)), f"all of {family} ended", 20)
        assert not glob.glob(os.path.join(self.folder, "core-*"))

    def close(self) -> None:
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = self.parent.children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.server.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Client:
    """One stream, read in a thread: what came, and how it ended."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.end, self.status, self.port = "", 0, 0
        self.thread = threading.Thread(target=self._read, args=(server.url, body))
        self.thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=SECONDS) as answer:
                self.status = answer.status_code
                network = answer.extensions["network_stream"]
                self.port = network.get_extra_info("client_addr")[1]
                for line in filter(None, answer.iter_lines()):
                    self.lines.append(line)
        except httpx.TransportError as error:
            self.lines.append(type(error).__name__)

    def begin(self) -> "Client":
        until(lambda: len(self.lines) > 3, "the stream's beginning")
        return self

    def ended(self) -> str:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "a stream without an end"
        return self.lines[-1]

    def server_of(self, processes: list[psutil.Process]) -> psutil.Process:
        """Which process gives it."""
        [found] = [
            process
            for process in processes
            if any(c.raddr and c.raddr.port == self.port for c in process.net_connections("tcp"))
        ]
        return found


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def run(*flags: str) -> Server:
        started.append(Server(*flags))
        return started[-1]

    yield run
    for server in started:
        server.close()


def streams_on_both(server: Server) -> dict[int, list[Client]]:
    """Streams until each HTTP process has some; by process. The last one's has just begun."""
    workers, by_pid = server.named("api_server"), {}
    for _ in range(50):
        client = server.stream(max_tokens=900).begin()
        by_pid.setdefault(client.server_of(workers).pid, []).append(client)
        if len(by_pid) == len(workers):
            return by_pid
    raise AssertionError("one HTTP process took all connections")


def test_two_http_processes_in_every_trouble(start: Callable[..., Server]):
    """One server for several tests in a row: to start one takes longer than any of them."""
    server = start("--api-server-count", "2", "--max-num-seqs", "4", "--max-waiting", "4")
    listening = [c.laddr.ip for p in [server.parent, *server.parent.children()]
                 for c in p.net_connections("inet") if c.status == "LISTEN"]  # fmt: skip
    assert set(listening) == {"127.0.0.1"}
    # Overload: eight places, whoever gives them.
    streams = [server.stream() for _ in range(8)]
    until(lambda: all(one.status == 200 for one in streams), "eight streams")
    for _ in range(6):
        refused = httpx.post(server.url + COMPLETIONS, json=BASE)
        assert refused.status_code == 503 and refused.headers["retry-after"]
    assert [one.ended() for one in streams] == ["data: [DONE]"] * 8
    # One is killed: its streams break off, the other's go on, and it starts again.
    by_pid = streams_on_both(server)
    kept, killed = by_pid
    os.kill(killed, signal.SIGKILL)
    assert all("Error" in one.ended() for one in by_pid[killed])
    assert {one.ended() for one in by_pid[kept]} == {"data: [DONE]"}
    until(lambda: "was killed by SIGKILL; it starts again in 0.25 s" in server.server.output, "it")
    until(lambda: len(server.named("api_server")) == 2, "two again")
    # One is stopped: the other's streams go on; it is given up, and starts again.
    time.sleep(0.5)
    until(lambda: accepts(server, 2), "the new one's streams")
    by_pid = streams_on_both(server)
    kept, stopped = by_pid
    os.kill(stopped, signal.SIGSTOP)
    assert {one.ended() for one in by_pid[kept]} == {"data: [DONE]"}
    assert all("Error" in one.ended() for one in by_pid[stopped])
    until(lambda: len(server.named("api_server")) == 2, "two again")
    # The core stands still: every stream ends, and health says so.
    streams = [server.stream(max_tokens=900).begin() for _ in range(4)]
    server.core.suspend()
    assert all(one.ended().startswith('data: {"error"') for one in streams)
    assert server.health() == 503
    assert httpx.post(server.url + COMPLETIONS, json=BASE).status_code == 500
    server.stop()


def accepts(server: Server, count: int) -> bool:
    """Whether so many HTTP processes listen."""
    workers = server.named("api_server")
    listening = [p for p in workers if any(c.status == "LISTEN" for c in p.net_connections("tcp"))]
    return len(listening) == count


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)]
)
def test_the_core_is_lost(start: Callable[..., Server], how: signal.Signals):
    server = start("--engine-core", "process")
    streams = [server.stream().begin() for _ in range(3)]
    core = server.core
    core.send_signal(how)
    assert all(one.ended().startswith('data: {"error"') for one in streams)
    reason = httpx.get(f"{server.url}/health").json()["reason"]
    assert reason.startswith("the engine core was killed by SIGKILL") or how == signal.SIGSTOP
    assert server.health() == 503
    assert server.stream().ended().startswith('data: {"error"')
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    server.stop()
    assert f"the engine has ended: {reason}" in server.server.output


def test_a_killed_server_leaves_nothing_and_one_that_ends_drains(start: Callable[..., Server]):
    """Killed while its core is stopped, which can read nothing. And SIGTERM to all at once, as systemd
    sends it."""
    draining, server = start("--engine-core", "process"), start("--engine-core", "process")
    streams = [draining.stream().begin() for _ in range(3)]
    for process in (draining.core, draining.parent):
        process.terminate()
    family = server.family()
    server.stream().begin()
    server.core.suspend()
    server.server.process.kill()
    server.nothing_left(family)
    assert [one.ended() for one in streams] == ["data: [DONE]"] * 3
    draining.stop()


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("victim", ["parent", "engine_core", "api_server"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_each_process_in_each_state(
    start: Callable[..., Server], count: int, busy: bool, victim: str, how: signal.Signals
):
    if victim == "api_server" and count == 1:
        pytest.skip("the parent is the HTTP process")
    server = start("--engine-core", "process", "--api-server-count", str(count))
    streams = [server.stream(max_tokens=900).begin() for _ in range(4 * busy)]
    family = server.family()
    process = server.parent if victim == "parent" else server.named(victim)[0]
    process.send_signal(how)
    if victim == "parent":
        if how == signal.SIGSTOP:  # longer than the core has patience
            time.sleep(4)
            process.resume()
            ends = [one.ended() for one in streams]
            assert all('"error"' in end or end == "data: [DONE]" for end in ends)
            assert httpx.post(server.url + COMPLETIONS, json=BASE).status_code == 200
            return server.stop()
        return server.nothing_left(family)
    for one in streams:
        one.ended()
    if victim == "engine_core":
        until(lambda: server.health() == 503, "the loss known", 20)
    else:
        until(lambda: process not in server.named("api_server"), "it given up", 20)
        until(lambda: accepts(server, 2), "it started again", 60)
        assert httpx.post(server.url + COMPLETIONS, json=BASE).status_code == 200
    server.stop()


@pytest.mark.long
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("server", ("--tp", "2")),
        ("server", ("--pp", "2", "--api-server-count", "2")),
        ("server", ("--offload", "both", "--speculative", "ngram", "--prefix-cache", "radix")),
        ("router", ("--dp", "2")),
        ("server", ("--role", "proxy", "--num-prefill", "1", "--num-decode", "1")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_core_has_ranks_and_tiers_and_is_a_replica(module: str, flags: tuple[str, ...]):
    flags = *FLAGS[:6], "--engine-core", "process", *flags
    server = RunningServer(15, *flags, module=f"part15.{module}")
    try:
        server.wait_until_ready()
        answers = [httpx.post(server.base_url + COMPLETIONS, json=BASE, timeout=60) for _ in "ab"]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [8, 8]
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any("part15.engine_core" in one.cmdline() for one in family)
        assert server.stop() == 0, server.output
        until(lambda: not any(map(is_alive, family)), "all ended", 20)
    finally:
        server.kill()


@pytest.mark.long
def test_five_kills_leave_nothing(start: Callable[..., Server]):
    for cycle in range(5):
        server = start("--engine-core", "process", "--api-server-count", str(1 + cycle % 2))
        streams = [server.stream().begin() for _ in range(2)]
        family = server.family()
        server.server.process.kill()
        for one in streams:
            one.ended()
        server.nothing_left(family)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--engine-core", "process"), marks=pytest.mark.long),
        ("--api-server-count", "2"),
    ],
    ids=lambda flags: flags[0],
)
def test_a_core_that_does_not_start_is_one_line(flags: tuple[str, ...]):
    command = [sys.executable, "-m", "part15.server", "--port", "0", "--model", "/nowhere", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "/nowhere" in done.stderr and not done.stdout


def test_a_replica_has_one_http_process():
    from part15.server import connect_engine

    with pytest.raises(ValueError, match=r"^api_server_count is 2: a replica has one"):
        connect_engine(EngineConfig(api_server_count=2))
