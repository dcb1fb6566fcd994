"""Part 10: the router over servers that speak the wire format, and fail in every way."""

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from part10.replicas import BreakerState, ReplicaSet
from part10.router import Router
from prometheus_client.parser import text_string_to_metric_families

from common.bench.serving.sse import SSEParser
from common.http.run import ServerConfig
from common.router.config import RouterConfig
from common.router.launching import GivenLauncher
from common.router.run import wait_until_well
from common.router.serving import create_app
from common.testing.http import raw_request, send
from common.testing.page.browser import Page, chromium
from common.testing.server import RunningServer, serving_thread
from common.testing.streams import stream_many


class StandIns:
    """Servers without an engine, each in a process of its own."""

    def __init__(self, count: int, *flags: str) -> None:
        module = "common.testing.stand_ins.server"
        self.servers = [RunningServer(0, *flags, module=module) for _ in range(count)]
        for server in self.servers:
            server.wait_until_ready()
        self.urls = tuple(server.base_url for server in self.servers)

    def fault(self, index: int, **fault: Any) -> None:
        httpx.post(f"{self.urls[index]}/fault", json=fault, headers=THEIRS)

    def stats(self, index: int) -> dict[str, Any]:
        return httpx.get(f"{self.urls[index]}/stats", headers=THEIRS).json()

    def close(self) -> None:
        for server in self.servers:
            server.kill()


@pytest.fixture(scope="module")
def shared_stand_ins() -> Iterator[StandIns]:
    stand_ins = StandIns(2, "--api-key", "theirs", "--interval", "0.002")
    yield stand_ins
    stand_ins.close()


@pytest.fixture
def stand_ins(shared_stand_ins: StandIns) -> StandIns:
    for index in range(2):
        httpx.post(f"{shared_stand_ins.urls[index]}/fault", json={}, headers=THEIRS)
    return shared_stand_ins


THEIRS = {"Authorization": "Bearer theirs"}
FAST = {"health_interval": 0.05, "health_timeout": 0.5}


@contextlib.contextmanager
def routing(
    urls: tuple[str, ...], server: ServerConfig | None = None, key: str | None = None, **flags: Any
) -> Iterator[tuple[str, Router]]:
    """(base URL, router) of a router over servers that run, in a thread of this process."""
    config = RouterConfig(replica=urls, replica_api_key=key, **(FAST | flags))
    replicas = ReplicaSet(GivenLauncher(urls, key), config, 5.0)
    asyncio.run(wait_until_well(replicas, None))
    router = Router(replicas, config, 2000)
    server = server or ServerConfig(port=0)
    with serving_thread(create_app(router, server), server) as url:
        yield url, router


def ask(
    url: str, path: str = "/v1/completions", headers: Any = None, **fields: Any
) -> httpx.Response:
    body = {"prompt": "x", **fields}
    return httpx.post(url + path, json=body, headers=headers, timeout=30)


def events(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    return [event.data for event in SSEParser().feed(response.content)]


def texts(response: httpx.Response) -> str:
    chunks = [json.loads(data) for data in events(response) if data != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
    return "".join(c.get("text") or c.get("delta", {}).get("content", "") for c in choices)


WHOLE = "".join(f" {n}" for n in range(8))


@pytest.fixture(scope="module")
def round_robin(shared_stand_ins: StandIns) -> Iterator[tuple[str, Router]]:
    with routing(
        shared_stand_ins.urls, key="theirs", policy="round-robin", breaker_failures=1000
    ) as pair:
        yield pair


@pytest.fixture
def routed(round_robin: tuple[str, Router], stand_ins: StandIns) -> tuple[str, Router, StandIns]:
    return (*round_robin, stand_ins)


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.01)


def test_answers_come_through_whole_and_keys_do_not(routed):
    url, _, stand_ins = routed
    engines = set()
    for _ in range(4):
        headers = {"Authorization": "Bearer a client's", "X-Request-Id": "17", "Cookie": "c"}
        response = ask(url, stream=True, headers=headers)
        assert texts(response) == WHOLE and events(response)[-1] == "[DONE]"
        engines.add(response.headers["x-engine"])
        last = stand_ins.stats(int(response.headers["x-engine"]))["last"]
        assert last["authorization"] == "Bearer theirs" and last["x-request-id"] == "17"
        assert "cookie" not in last and "accept-encoding" not in last
    assert engines == {"0", "1"}
    assert ask(url).json()["choices"][0]["text"] == WHOLE
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "stand-in"
    assert httpx.post(f"{url}/tokenize", json={"prompt": "x"}).json()["count"] == 3
    assert (
        httpx.get(f"{url}/").status_code == 200 and httpx.get(f"{url}/nothing").status_code == 404
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"status": "500"},
        {"status": "503"},
        {"status": "503", "busy": "1"},
        {"cut_after": "0"},
        {"error_after": "0"},
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_before_the_first_token_another_replica_answers(routed, fault: dict[str, str], chat: bool):
    url, router, stand_ins = routed
    stand_ins.fault(0, **fault)
    fields = {"messages": [{"role": "user", "content": "x"}]} if chat else {}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    retries = router.num_retries
    for _ in range(4):
        response = ask(url, path, stream=True, **fields)
        assert texts(response) == WHOLE and response.headers["x-engine"] == "1"
        opening = [data for data in events(response) if "assistant" in data]
        assert len(opening) == chat  # of the first attempt there is no trace
    assert 1 <= router.num_retries - retries <= 4
    if "error_after" not in fault:
        for _ in range(2):
            assert ask(url).json()["choices"][0]["text"] == WHOLE


@pytest.mark.parametrize("fault", [{"cut_after": "3"}, {"error_after": "3"}])
def test_after_the_first_token_nothing_is_tried_again(routed, fault: dict[str, str]):
    url, _, stand_ins = routed
    before = sum(stand_ins.stats(index)["requests"] for index in (0, 1))
    for index in (0, 1):
        stand_ins.fault(index, **fault)
    response = ask(url, stream=True)
    data = events(response)
    assert texts(response) == " 0 1 2" and "[DONE]" not in data and len(data) == 4
    error = json.loads(data[-1])["error"]
    assert error["message"] and "half" not in response.text
    if "cut_after" in fault:
        assert error["code"] == "engine_failed" and error["type"] == "server_error"
    assert sum(stand_ins.stats(index)["requests"] for index in (0, 1)) == before + 1


def test_when_all_fail_the_client_is_told_what_the_last_one_said(routed):
    url, _, stand_ins = routed
    for index in (0, 1):
        stand_ins.fault(index, status="500")
    assert ask(url, stream=True).json()["error"]["message"] == "asked for 500"
    for index in (0, 1):
        stand_ins.fault(index, status="503", busy="1")
    response = ask(url)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    for index in (0, 1):
        stand_ins.fault(index, cut_after="0")
    response = ask(url, stream=True)
    assert response.status_code == 502 and response.json()["error"]["code"] == "engine_failed"
    for index in (0, 1):
        stand_ins.fault(index, error_after="0")
    assert ask(url, stream=True).json()["error"]["message"] == "out of order"


def test_a_client_that_goes_away_ends_its_request(routed):
    url, router, stand_ins = routed
    before = sum(stand_ins.stats(index).get("aborted", 0) for index in (0, 1))
    body = {"prompt": "x", "stream": True, "metadata": {"interval": "0.2"}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        next(response.iter_bytes())
    for stream, slow in ((True, "first"), (False, "interval")):
        body = {"prompt": "x", "stream": stream, "metadata": {slow: "5"}}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.2)
    until(lambda: sum(stand_ins.stats(i).get("aborted", 0) for i in (0, 1)) == before + 3)
    until(lambda: not any(replica.outstanding for replica in router.replicas.replicas))
    assert router.admission.count == 0


@pytest.mark.parametrize(
    "target",
    ["/v1/models/%zz", "/v1/models/a?b=%ff&c=[", "/v1/models/..%2f..%2fhealth", "/v1/models//x:9/",
     "/v1/models/%0d%0aX:1", "/version?" + "x" * 5000],
)  # fmt: skip
def test_no_target_is_a_replicas_fault_or_leaves_it(routed, target: str):
    url, router, _ = routed
    before = [replica.num_failures for replica in router.replicas.replicas]
    status, _, body = send(url, raw_request("GET", target))
    assert status == 404, body
    for other in ("//127.0.0.1:9/v1/models", "http://127.0.0.1:9/v1/models", "*"):
        status, _, body = send(url, raw_request("GET", other))
        assert status in (400, 404), body
    assert [replica.num_failures for replica in router.replicas.replicas] == before


def test_metrics_of_all_replicas_and_the_routers_own(routed):
    url, router, _ = routed
    response = httpx.get(f"{url}/metrics")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    for name in ("vllm:num_requests_running", "vllm:request_success", "router:engine_up"):
        assert {s.labels["engine"] for s in families[name].samples} == {"0", "1"}, name
    sent = {s.labels["engine"]: s.value for s in families["router:engine_requests"].samples}
    assert sent == {str(r.index): r.num_requests for r in router.replicas.replicas}
    assert families["router:retries"].samples[0].labels == {"policy": "round-robin"}
    until(lambda: all(r.status.model == "stand-in" for r in router.replicas.replicas))


def test_the_guard_stands_before_the_router(stand_ins):
    server = ServerConfig(port=0, api_key="ours", max_body_size=2048)
    with routing(stand_ins.urls, server, "theirs") as (url, router):
        requests = sum(replica.num_requests for replica in router.replicas.replicas)
        ours = {"Authorization": "Bearer ours"}
        for path in ("/v1/completions", "/tokenize"):
            assert ask(url, path).status_code == 401
            assert ask(url, path, headers=THEIRS).status_code == 401
        for path in ("/metrics", "/v1/models", "/trace"):
            assert httpx.get(url + path).status_code == 401
        assert ask(url, headers=ours | {"Host": "evil.example"}).status_code == 403
        assert ask(url, headers=ours | {"Origin": "http://evil.example"}).status_code == 403
        assert ask(url, headers=ours, text="x" * 3000).status_code == 413
        assert sum(replica.num_requests for replica in router.replicas.replicas) == requests
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "available": 2, "engines": 2}
        assert ask(url, headers=ours).status_code == 200


def test_a_fault_of_the_request_never_opens_the_breaker_and_faults_of_a_replica_do(stand_ins):
    flags = {"policy": "round-robin", "breaker_failures": 3, "breaker_seconds": 1000.0}
    with routing(stand_ins.urls, key="theirs", **flags) as (url, router):
        first, _ = router.replicas.replicas
        now = 0.0
        first.breaker.clock = lambda: now
        for status in ("400", "404", "413", "422", "429") * 3:
            assert ask(url, metadata={"status": status}).status_code == int(status)
        assert ask(url, metadata={"status": "503", "busy": "1"}).status_code == 503
        assert {r.breaker.state for r in router.replicas.replicas} == {BreakerState.CLOSED}
        stand_ins.fault(0, status="500")
        requests = first.num_requests
        for _ in range(20):
            assert ask(url).json()["choices"][0]["text"] == WHOLE
        assert first.num_requests == requests + 3 and first.breaker.state is BreakerState.OPEN
        assert 'router:engine_breaker_state{engine="0"} 2' in httpx.get(f"{url}/metrics").text
        now += 1000.0
        for _ in range(4):
            assert ask(url).status_code == 200
        assert first.num_requests == requests + 4  # one more try, and it is open again
        stand_ins.fault(0)
        now += 1000.0
        for _ in range(6):
            assert ask(url).status_code == 200
        assert first.breaker.state is BreakerState.CLOSED and first.num_requests >= requests + 6


def test_replicas_that_are_not_well_get_nothing_until_they_are(stand_ins):
    with routing(stand_ins.urls, key="theirs") as (url, router):
        stand_ins.fault(0, ill=True)
        until(lambda: not router.replicas.replicas[0].is_well)
        assert {ask(url).headers["x-engine"] for _ in range(4)} == {"1"}
        assert httpx.get(f"{url}/health").json()["available"] == 1
        stand_ins.fault(1, ill=True)
        until(lambda: not router.replicas.available())
        response = ask(url, stream=True)
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "no_engine"
        assert httpx.get(f"{url}/health").status_code == 503
        stand_ins.fault(0)
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        assert ask(url).headers["x-engine"] == "0"


def test_a_frozen_replica_loses_its_requests_to_others_or_to_an_error():
    stand_ins = StandIns(2, "--interval", "0.05")
    try:
        with routing(stand_ins.urls, policy="round-robin", health_timeout=0.3) as (url, router):
            first, second = router.replicas.replicas
            answers: dict[str, httpx.Response] = {}

            def run(name: str, **metadata: str) -> None:
                answers[name] = ask(url, stream=True, metadata=metadata)

            names = {"streams": {"tokens": "40"}, "on 1": {}, "waits": {"first": "2"}}
            threads = [threading.Thread(target=run, args=(n,), kwargs=k) for n, k in names.items()]
            for number, thread in enumerate(threads, 1):
                thread.start()
                until(lambda n=number: first.num_requests + second.num_requests == n)
            time.sleep(0.3)  # for the first token of the first
            stand_ins.servers[0].process.send_signal(signal.SIGSTOP)
            for thread in threads:
                thread.join(20)
        assert texts(answers["on 1"]) == WHOLE and events(answers["on 1"])[-1] == "[DONE]"
        assert texts(answers["waits"]) == WHOLE and answers["waits"].headers["x-engine"] == "1"
        broken = events(answers["streams"])
        assert json.loads(broken[-1])["error"]["code"] == "engine_failed" and len(broken) < 40
    finally:
        stand_ins.close()


def test_one_replica_that_fails_and_comes_back_with_another_model_stays_out(tmp_path):
    stand_ins, other = StandIns(2), None
    try:
        with routing(stand_ins.urls) as (url, router):
            port = stand_ins.servers[0].port
            stand_ins.servers[0].kill()
            for _ in range(6):
                assert ask(url).headers["x-engine"] == "1"
            until(lambda: not router.replicas.replicas[0].is_well)
            module = "common.testing.stand_ins.server"
            other = RunningServer(0, "--port", str(port), "--model", "another", module=module)
            other.wait_until_ready()
            time.sleep(0.4)
            assert not router.replicas.replicas[0].is_well
    finally:
        stand_ins.close()
        if other is not None:
            other.kill()


@pytest.mark.parametrize("streams", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_many_streams_at_once(streams: int):
    stand_ins = StandIns(2, "--interval", "0.2", "--tokens", "5")
    try:
        with routing(stand_ins.urls, policy="least-pending") as (url, router):
            answers = asyncio.run(stream_many(url, [{"prompt": "x"}] * streams))
            assert {(a.ending, a.num_chunks) for a in answers} == {("done", 6)}
            requests = [replica.num_requests for replica in router.replicas.replicas]
            assert sum(requests) == streams and max(requests) - min(requests) <= streams // 10
    finally:
        stand_ins.close()


@pytest.mark.browser
def test_the_chat_works_through_the_router(routed):
    with chromium() as driver:
        page = Page(driver, routed[0])
        page.open()
        page.one("#prompt").send_keys("Count.", "\ue007")
        page.until(lambda: page.text(".turn").find("7") > 0)
        assert "0 1 2 3 4 5 6 7" in page.text(".turn")
        assert not page.complaints()
