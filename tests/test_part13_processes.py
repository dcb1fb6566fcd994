"""Part 13: prefill and decode workers in processes, each killed and stopped in every state of a transfer.

| state of the prefill worker | SIGKILL | SIGSTOP |
|---|---|---|
| asked, computing, slice, computed | connection gone: the prompt is computed here, at once | the same, after `kv_timeout` |
| read | the request has all; the next one is computed here | the same, after `kv_timeout` |

| state of the decode worker | SIGKILL | SIGSTOP |
|---|---|---|
| asked, loading, reading | connection gone: the prefill worker drops the prompt | blocks are held for `kv_lease`; woken later, it does not use what it has read |
| arrived, running | it has all, and the prefill worker knows | the same |
"""

import contextlib
import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

import httpx
import psutil
import pytest

from common.kv_transfer.ticket import new_ticket
from common.requests import Request
from common.testing.leaks import shared_names
from common.testing.router import children, health, router, until
from common.testing.server import RunningServer
from common.testing.transfer_pair import KNOWN, LONG, SECRET, SMALL, Pair, engine
from common.testing.transfer_worker import DECODE_STATES, PREFILL_STATES, Worker

SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
OPTIONS = SMALL | {"kv_secret": SECRET}
TIMEOUT = 0.6  # seconds


PREFILL_SHORT = [(state, "shm", signal.SIGKILL) for state in PREFILL_STATES]
PREFILL_SHORT += [("computing", "tcp", signal.SIGSTOP), ("read", "shm", signal.SIGSTOP)]
DECODE_SHORT = [(state, "shm", signal.SIGSTOP) for state in ("asked", "reading")]
DECODE_SHORT += [("loading", "tcp", signal.SIGSTOP), ("reading", "shm", signal.SIGKILL)]


def cases(states: dict[str, str], short: list[tuple[str, str, Any]]) -> list[Any]:
    """Every state, transport and signal; but for a few they belong to the long form."""
    every = product(states, ("shm", "tcp"), SIGNALS)
    long = (pytest.mark.long,)
    return [
        pytest.param(
            *case, marks=() if case in short else long, id=f"{case[0]}-{case[1]}-{case[2].name}"
        )
        for case in every
    ]


def request(name: str, address: str, salt: str) -> Request:
    known = KNOWN[LONG]
    made = Request(name, known.prompt, known.params, cache_salt=salt)
    return dataclasses.replace(made, kv_ticket=new_ticket(address))


@pytest.fixture(scope="module")
def decode() -> Iterator[Any]:
    made = engine("decode", kv_timeout=TIMEOUT)
    yield made
    made.shutdown()


@pytest.mark.parametrize(
    ("state", "transport", "signal_number"), cases(PREFILL_STATES, PREFILL_SHORT)
)
def test_a_prefill_worker_that_dies_or_stops(
    decode: Any, state: str, transport: str, signal_number: int
) -> None:
    worker = Worker("prefill", OPTIONS | {"kv_transfer": transport}, state, signal_number)
    begin, salt = time.monotonic(), f"{state} {transport} {signal_number}"
    failed = decode.connector.outcomes.counts["num_kv_failed"]
    try:
        for number in range(2):  # the second meets a worker that is dead, or stands still
            decode.add_request(request(f"r{number}", worker.address, f"{salt} {number}"))
            tokens = []
            while decode.has_unfinished():
                tokens += [t for output in decode.step() for t in output.token_ids]
                decode.check_integrity()
            assert tokens == KNOWN[LONG].output
            worker.wait_for_state()
    finally:
        worker.close()
    lost = decode.connector.outcomes.counts["num_kv_failed"] - failed
    assert lost == (1 if state == "read" else 2)
    assert decode.stats()["num_used_blocks"] == 0
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("state", "transport", "signal_number"), cases(DECODE_STATES, DECODE_SHORT)
)
def test_a_decode_worker_that_dies_or_stops(state: str, transport: str, signal_number: int) -> None:
    both = Pair(engine("prefill", kv_lease=0.5, kv_transfer=transport), healthy := shared_decode())
    address = both.prefill.connector.describe()["address"]
    worker = Worker("decode", OPTIONS | {"kv_min_tokens": 4}, state, signal_number)
    try:
        worker.pipe.send(request("r", address, "victim"))
        deadline = time.monotonic() + 20
        while worker.process_state() not in "TZX" or both.inbox or both.prefill.has_unfinished():
            assert time.monotonic() < deadline, "blocks do not come back"
            both.step_prefill()
            time.sleep(0.001)
        assert both.prefill.stats()["num_used_blocks"] == 0
        both.prefill.kv.data[:] = 1e4  # what was held is anybody's now
        both.prefill.scheduler.cache.__init__(both.prefill.kv.pool, 4)
        assert both.run(LONG, cache_salt="another") == KNOWN[LONG].output
        if signal_number == signal.SIGSTOP:
            os.kill(worker.process.pid, signal.SIGCONT)
            while not worker.pipe.poll(0.001):
                both.step_prefill()
            assert worker.pipe.recv() == ("r", KNOWN[LONG].output)
    finally:
        worker.close()
    both.settle()
    assert healthy.connector.outcomes.counts["num_kv_failed"] == 0
    both.prefill.shutdown()


decodes: list[Any] = []


def shared_decode() -> Any:
    if not decodes:
        decodes.append(engine("decode", prefix_cache="off"))
    return decodes[0]


# Over HTTP

FLAGS = (
    "--role", "proxy", "--num-prefill", "1", "--num-decode", "1", "--health-interval", "0.2",
    "--model", "random:tiny-llama", "--kv-cache-memory", str(4 << 20), "--threads", "1",
    "--kv-min-tokens", "16", "--kv-timeout", "1", "--health-timeout", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def proxy() -> Iterator[RunningServer]:
    with router(*FLAGS, module="part13.server") as server:
        yield server


def complete(server: RunningServer, prompt: list[int], **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": False}
    return httpx.post(f"{server.base_url}/v1/completions", json=body | fields, timeout=60)


def count(server: RunningServer, name: str) -> float:
    text = httpx.get(f"{server.base_url}/metrics", timeout=30).text
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))


def worker_of(server: RunningServer, role: str) -> psutil.Process:
    """A prefill worker is the one that listens on a socket in the abstract namespace. One that was
    lost a moment ago may not be missed yet: then this waits for the next, until it serves."""
    found: dict[str, psutil.Process] = {}

    def look() -> bool:
        found.clear()
        for process in children(server):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(c.status == "LISTEN" for c in process.net_connections("inet")):
                    names = [str(c.laddr) for c in process.net_connections("unix")]
                    is_sender = any(name.startswith("@kv-") for name in names)
                    found["prefill" if is_sender else "decode"] = process
        return len(found) == 2

    until(look)
    return found[role]


def test_prompts_are_computed_by_one_worker_and_tokens_by_another(proxy: RunningServer) -> None:
    whole = complete(proxy, [7] * 100, logprobs=2).json()["choices"][0]["logprobs"]
    assert count(proxy, "kv_transfer:fetched_total") == 1
    again = complete(proxy, [7] * 100, logprobs=2)  # known there by now
    assert again.json()["choices"][0]["logprobs"]["tokens"] == whole["tokens"]
    assert again.headers["x-engine"] == "1"
    short = complete(proxy, [9] * 10)
    assert short.status_code == 200 and count(proxy, "kv_transfer:local_total") == 2
    several = complete(proxy, [[n] * 50 for n in range(20, 23)], n=2, temperature=0.5, seed=1)
    assert len(several.json()["choices"]) == 6
    with httpx.stream(
        "POST",
        f"{proxy.base_url}/v1/completions",
        json={"prompt": [11] * 60, "max_tokens": 5, "stream": True},
    ) as response:
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert count(proxy, "kv_transfer:failed_total") == 0
    assert count(proxy, "kv_transfer:held") == 0


def test_no_client_writes_a_ticket_and_no_worker_is_open(proxy: RunningServer) -> None:
    prompt = {"prompt": [31] * 40, "max_tokens": 1}
    headers = {"x-kv-transfer": "WyJ0Y3A6MTI3LjAuMC4xOjkiLCAiYSIsIDllOV0=.0"}
    before = count(proxy, "kv_transfer:fetched_total")
    answer = httpx.post(f"{proxy.base_url}/v1/completions", json=prompt, headers=headers)
    assert answer.status_code == 200 and count(proxy, "kv_transfer:fetched_total") == before + 1
    for process in children(proxy):
        listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert [c.laddr.ip for c in listening] == ["127.0.0.1"]
        url = f"http://127.0.0.1:{listening[0].laddr.port}"
        for path in ("/kv_transfer", "/v1/models"):
            assert httpx.get(url + path).status_code == 401
        assert not any(len(word) > 40 for word in process.cmdline()), "a secret to see in ps"


@pytest.mark.parametrize("signal_number", SIGNALS, ids=lambda s: s.name)
def test_without_its_prefill_worker_a_decode_worker_does_all(
    proxy: RunningServer, signal_number: int
) -> None:
    until(lambda: health(proxy)["available"] == 2)
    expected = complete(proxy, [40 + signal_number] * 70).json()["choices"]
    victim = worker_of(proxy, "prefill")
    victim.send_signal(signal_number)
    for n in range(3):
        answer = complete(proxy, [50 + n + signal_number] * 70)
        assert answer.status_code == 200 and answer.headers["x-engine"] == "1"
    assert complete(proxy, [40 + signal_number] * 70).json()["choices"] == expected
    until(lambda: health(proxy)["available"] == 1)
    until(lambda: health(proxy)["available"] == 2)  # it is started again
    before = count(proxy, "kv_transfer:fetched_total")
    assert complete(proxy, [90 + signal_number] * 70).status_code == 200
    assert count(proxy, "kv_transfer:fetched_total") == before + 1


def test_a_decode_worker_that_is_killed_is_replaced_by_any_other(proxy: RunningServer) -> None:
    """As long as the client has no token: even a prefill worker can do all."""
    until(lambda: health(proxy)["available"] == 2)
    expected = complete(proxy, [17] * 70).json()["choices"]
    worker_of(proxy, "decode").kill()
    answer = complete(proxy, [17] * 70)
    assert answer.json()["choices"] == expected and answer.headers["x-engine"] == "0"
    until(lambda: health(proxy)["available"] == 1)
    until(lambda: health(proxy)["available"] == 2)
    assert complete(proxy, [17] * 70).headers["x-engine"] == "1"


def leaks(server: RunningServer) -> dict[str, Any]:
    """What must not grow: blocks in use and held, requests."""
    return {
        "blocks": count(server, "vllm:kv_cache_usage_perc"),
        "held": count(server, "kv_transfer:held"),
        "running": count(server, "vllm:num_requests_running"),
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_faults_leave_nothing_behind(proxy: RunningServer) -> None:
    """One after the other, so a worker is started again later each time: at last after 30 s."""
    generator = random.Random(3)
    expected = {n: complete(proxy, [n] * 80).json()["choices"] for n in range(100, 105)}
    before, children_before, names = leaks(proxy), len(children(proxy)), shared_names()
    for number in range(20):
        until(lambda: health(proxy)["available"] == 2, 60)
        victim = worker_of(proxy, generator.choice(["prefill", "decode"]))
        victim.send_signal(generator.choice(SIGNALS))
        for n, choices in expected.items():
            answer = complete(proxy, [n] * 80, cache_salt=str(number))
            assert answer.status_code in (200, 502, 503), answer.text
            if answer.status_code == 200:
                assert answer.json()["choices"] == choices
        until(lambda victim=victim: not victim.is_running() or victim.status() == "zombie")
    until(lambda: health(proxy)["available"] == 2, 60)
    until(lambda: leaks(proxy) == before and shared_names() <= names)
    assert len(children(proxy)) == children_before


def test_a_proxy_that_is_killed_leaves_no_worker(proxy: RunningServer) -> None:
    """The last test that needs it."""
    until(lambda: health(proxy)["available"] == 2)
    processes = children(proxy)
    assert len(processes) == 2
    proxy.kill()
    until(lambda: not any(process.is_running() for process in processes), 20)
