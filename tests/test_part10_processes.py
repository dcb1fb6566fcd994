"""Part 10: replicas that are processes: started, killed, drained, scaled, and none left behind."""

import asyncio
import contextlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from part10.config import EngineConfig
from part10.replicas import ReplicaSet

from common.http.run import ServerConfig
from common.router.child import serve_job
from common.router.config import RouterConfig
from common.router.launchers import make_launcher
from common.router.launching import GivenLauncher
from common.router.run import wait_until_well
from common.testing.page.browser import chromium
from common.testing.page.engine_page import EnginePage
from common.testing.router import STAND_INS, children, engine_process, health, router, until
from common.testing.server import RunningServer
from common.testing.streams import Streamed, stream_many, streaming_engine

ENGINE = ("--model", "random:tiny-llama", "--kv-cache-memory", str(8 << 20), "--threads", "1")


@pytest.fixture(scope="module")
def engines() -> Iterator[RunningServer]:
    with router("--dp", "3", "--health-interval", "0.2", *ENGINE, module="part10.router") as server:
        yield server


def test_each_engine_answers_alike_and_only_to_the_router(engines: RunningServer):
    assert re.search(r"Engine 2 is ready after .* s: http://127.0.0.1:\d+\n", engines.output)
    body = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": False}
    answers, seen = set(), set()
    for number in range(12):
        fields = body | {"prompt": [5, 6, 7], "user": str(number), "logprobs": 1}
        response = httpx.post(f"{engines.base_url}/v1/completions", json=fields)
        answers.add(json.dumps(response.json()["choices"][0]["logprobs"]["tokens"]))
        seen.add(response.headers["x-engine"])
    assert len(answers) == 1 and seen == {"0", "1", "2"}
    for process in children(engines):
        listening = [c.laddr for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert [address.ip for address in listening] == ["127.0.0.1"]
        url = f"http://127.0.0.1:{listening[0].port}"
        for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer x"}):
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
            assert answer.status_code == 401
        assert "ENGINE_API_KEY" not in process.environ()
        assert not any(len(word) > 40 for word in process.cmdline()), "a secret to see in ps"


def test_the_page_sees_the_engine_that_is_chosen(engines: RunningServer):
    for index in "012":
        with httpx.stream("GET", f"{engines.base_url}/trace?engine={index}") as response:
            assert response.headers["x-engine"] == index
            assert response.headers["x-engines"] == "0,1,2"
            assert next(response.iter_lines()).startswith("event: state")
    missing = httpx.get(f"{engines.base_url}/trace?engine=9")
    assert missing.status_code == 503
    saved = httpx.get(f"{engines.base_url}/trace.jsonl?engine=1")
    assert saved.status_code == 200 and json.loads(saved.text.splitlines()[0])


@pytest.mark.browser
def test_the_page_shows_the_engine_that_is_chosen(engines: RunningServer):
    with chromium() as driver:
        driver.set_window_size(1400, 900)
        page = EnginePage(driver, f"{engines.base_url}/?engine=1")
        page.watch()
        choice = "const one = document.getElementById('engine-choice');"
        shown = "return [one.hidden, one.value, [...one.options].map((o) => o.value).join()]"
        assert page.js(choice + shown) == [False, "1", "0,1,2"]
        page.js(choice + "one.value = '2'; one.dispatchEvent(new Event('change'))")
        page.until(lambda: page.status == "live" and page.js(choice + shown)[1] == "2")
        assert page.js("return location.search") == "?engine=2"
        assert not page.complaints()


def test_a_replica_killed_under_load_fails_nothing_that_had_no_token(engines: RunningServer):
    until(lambda: health(engines)["available"] == 3)
    bodies = [
        {"prompt": [n, 2, 3] * 5, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        for n in range(60)
    ]
    processes = {str(engine): engine_process(engines, engine) for engine in range(3)}

    async def load() -> list[Streamed]:
        begun: list[Streamed] = []
        streams = asyncio.ensure_future(stream_many(engines.base_url, bodies, 24, begun))
        processes[await streaming_engine(begun)].send_signal(signal.SIGKILL)
        return await streams

    streams = asyncio.run(load())
    broken = [stream for stream in streams if not stream.is_done]
    assert broken, "nothing ran there: the test shows nothing"
    for stream in broken:
        assert stream.ending == "error" and stream.num_chunks > 0, stream
        assert stream.error["code"] == "engine_failed"
    assert all(stream.num_chunks >= 400 for stream in streams if stream.is_done)
    until(lambda: health(engines)["available"] == 3)
    assert "was ended by SIGKILL; it starts again in 0.25 s" in engines.output
    assert re.search(r"Engine \d is ready again: http://127.0.0.1:\d+\n", engines.output)
    again = asyncio.run(stream_many(engines.base_url, bodies[:24]))  # what broke off too
    assert {stream.ending for stream in again} == {"done"}
    assert {stream.engine for stream in again} == {"0", "1", "2"}


def test_a_router_that_is_killed_leaves_no_replica(engines: RunningServer):
    """Not even one that has much to do. (The last test that needs these engines.)"""
    processes = children(engines)
    assert len(processes) == 3
    bodies = [{"prompt": [n, 2, 3], "max_tokens": 900, "ignore_eos": True} for n in range(6)]

    async def load() -> list[Streamed]:
        begun: list[Streamed] = []
        streams = asyncio.ensure_future(stream_many(engines.base_url, bodies, None, begun))
        await streaming_engine(begun)
        engines.kill()
        return await streams

    streams = asyncio.run(load())
    assert all(stream.ending.startswith("cut") for stream in streams), streams
    until(lambda: not any(process.is_running() for process in processes), 20)


def test_more_engines_under_load_fewer_after_it_and_a_drain_at_the_end():
    flags = (
        "--min-replicas", "1", "--max-replicas", "3", "--health-interval", "0.1",
        "--scale-up-pending", "3", "--scale-up-seconds", "0.3", "--scale-down-seconds", "0.5",
    )  # fmt: skip
    with router(*flags) as server:
        assert health(server) == {"status": "ok", "available": 1, "engines": 1}

        async def grow() -> set[str]:
            busy = [{"prompt": "x", "metadata": {"tokens": "40", "interval": "1"}}] * 15
            load = asyncio.ensure_future(stream_many(server.base_url, busy))
            await asyncio.to_thread(until, lambda: health(server)["available"] == 3)
            assert not load.done()
            bodies = [{"prompt": [n] * 64} for n in range(12)]
            streams = await stream_many(server.base_url, bodies)
            load.cancel()
            assert {stream.ending for stream in streams} == {"done"}
            return {stream.engine for stream in streams}

        assert asyncio.run(grow()) >= {"1", "2"}  # the first has enough to do
        until(lambda: health(server)["engines"] == 1)
        [process] = children(server)

        async def drain() -> list[Streamed]:
            begun: list[Streamed] = []
            bodies = [{"prompt": "x", "metadata": {"interval": "0.1"}}] * 8  # for 4 s
            load = asyncio.ensure_future(stream_many(server.base_url, bodies, None, begun))
            while len(begun) < 8 or not all(stream.num_chunks for stream in begun):
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(until, lambda: not answers(server))
            assert any(stream.is_open for stream in begun)
            return await load

        streams = asyncio.run(drain())
        assert {(stream.ending, stream.num_chunks) for stream in streams} == {("done", 41)}
        assert server.stop() == 0
        assert not process.is_running()


def answers(server: RunningServer) -> bool:
    """Whether it takes a request."""
    try:
        httpx.get(f"{server.base_url}/health")
    except httpx.TransportError:
        return False
    return True


@pytest.fixture(scope="module")
def stand_in() -> Iterator[RunningServer]:
    server = RunningServer(0, "--model", "m", module="common.testing.stand_ins.server")
    server.wait_until_ready()
    yield server
    server.kill()


def refused(*flags: str) -> str:
    """What the router says that does not start."""
    command = [sys.executable, "-m", STAND_INS, "--port", "0", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("[engine")]
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.stderr
    return lines[0]


def test_what_cannot_start_says_so_in_one_line(stand_in: RunningServer):
    before = set(psutil.pids())
    down = refused("--replica", stand_in.base_url, "--replica", "http://127.0.0.1:9")
    assert "127.0.0.1:9" in down
    assert "does-not-exist" in refused("--model", "does-not-exist", "--dp", "2")
    until(lambda: not any(is_stand_in(pid) for pid in set(psutil.pids()) - before), 10)


def is_stand_in(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return any("stand_ins" in word for word in psutil.Process(pid).cmdline())
    return False


def test_replicas_must_serve_one_model(stand_in: RunningServer):
    def start(model: str | None, *urls: str) -> None:
        config = RouterConfig(replica=urls)
        replicas = ReplicaSet(GivenLauncher(urls, None), config, 1.0)
        asyncio.run(wait_until_well(replicas, model))

    start("m", stand_in.base_url)
    with pytest.raises(ValueError, match=r"engine 0: it serves 'm', and not 'mine'"):
        start("mine", stand_in.base_url)
    other = RunningServer(0, "--model", "other", module="common.testing.stand_ins.server")
    other.wait_until_ready()
    try:
        with pytest.raises(ValueError, match=r"engine 1: it serves 'other', and not 'm'"):
            start(None, stand_in.base_url, other.base_url)
    finally:
        other.kill()
    with pytest.raises(ValueError, match="model has no effect"):
        config = RouterConfig(replica=(stand_in.base_url,))
        make_launcher("no.module", EngineConfig(model="x"), config, ServerConfig(port=0))


@pytest.mark.parametrize("server", [{}, {"api_key": ""}, {"api_key": None}])
def test_a_replica_without_a_key_does_not_start(server: dict[str, Any], monkeypatch):
    monkeypatch.delenv("ENGINE_API_KEY", raising=False)
    job = {"engine": {}, "server": {"port": 0, **server}, "grace": 1}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(job) + "\n"))
    with pytest.raises(SystemExit, match="api_key"):
        serve_job(lambda engine, config: pytest.fail("it is built"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit, match="JSON"):
        serve_job(lambda engine, config: pytest.fail("it is built"))
