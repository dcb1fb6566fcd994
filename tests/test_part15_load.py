"""A thousand streams on one server: none lost, none mixed up, no memory kept; overload; the end."""

import asyncio
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import pytest

from common.sampling import SamplingParams
from common.testing.parts import make_engine
from common.testing.server import server_process
from common.testing.soak import memory

MODEL = "random:tiny-llama"
NUM_TOKENS = 12
MANY = [200, pytest.param(1000, marks=pytest.mark.long)]
GROWTH = 1.05  # of a process from the second wave to the last, as in a soak
FORMS = [
    (),
    pytest.param(("--engine-core", "process"), marks=pytest.mark.long),
    pytest.param(("--engine-core", "process", "--api-server-count", "2"), marks=pytest.mark.long),
]


@dataclass(frozen=True)
class Ended:
    """How a stream ended. status: 0 where no answer began. is_whole: it had its end."""

    status: int
    text: str = ""
    is_whole: bool = False
    seconds: float = 0.0


def prompts(count: int) -> list[list[int]]:
    """Distinct prompts, of several lengths."""
    return [[3 + i % 251, 5 + i // 251, *range(7, 8 + i % 9)] for i in range(count)]


def expected(given: Sequence[list[int]]) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    engine = make_engine(15, MODEL, max_num_seqs=32)
    return [c.text for c in engine.generate(given, params, progress=False)]


async def stream(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> Ended:
    body = {"prompt": prompt, "stream": True, "temperature": 0}
    body |= {"max_tokens": max_tokens, "ignore_eos": True}
    begun, status, text, is_whole = time.monotonic(), 0, "", False
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            status = response.status_code
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    is_whole = True
                elif line.startswith('data: {"error"') and "full" in line:
                    status = (
                        503  # others took its place after it was looked for: it is told so here
                    )
                elif line.startswith("data: "):
                    assert '"choices"' in line, line
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    except httpx.TransportError:
        if status:
            raise
    return Ended(status, text, is_whole, time.monotonic() - begun)


async def all_at_once(
    url: str, given: Sequence[list[int]], max_tokens: int = NUM_TOKENS
) -> list[Ended]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(stream(client, prompt, max_tokens) for prompt in given))


def metric(text: str, name: str) -> float:
    """The sum of a metric's series; there must be some."""
    found = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)]
    assert found, name
    return sum(found)


@pytest.mark.parametrize("count", MANY)
@pytest.mark.parametrize("form", FORMS)
def test_none_is_lost_or_mixed_up_and_memory_stays(count: int, form: tuple[str, ...]) -> None:
    given = prompts(count)
    wanted, sizes = expected(given), []
    with server_process(15, "--model", MODEL, "--max-waiting", str(count), *form) as server:
        for _ in range(4 if count > 500 else 2):
            ended = asyncio.run(all_at_once(server.base_url, given))
            assert {(one.status, one.is_whole) for one in ended} == {(200, True)}
            assert [one.text for one in ended] == wanted
            sizes.append(memory(server.process.pid))
        text = httpx.get(f"{server.base_url}/metrics").text
        assert metric(text, "vllm:num_requests_running") == 0
        assert metric(text, "vllm:num_requests_waiting{") == 0
    if len(sizes) > 2:
        assert sizes[-1] <= GROWTH * sizes[1], sizes


@pytest.mark.parametrize("count", MANY)
def test_overload_is_refused_at_once(count: int) -> None:
    """More streams than may wait: the others are refused before the first of these has ended, by a
    503, or in the stream where others have taken the place since it was looked for."""
    given = prompts(count)
    room = ("--max-num-seqs", "8", "--max-waiting", "40")
    with server_process(15, "--model", MODEL, *room) as server:
        ended = asyncio.run(all_at_once(server.base_url, given, max_tokens=400))
    served = [one for one in ended if one.status == 200]
    refused = [one for one in ended if one.status == 503]
    assert len(served) + len(refused) == count and all(one.is_whole for one in served)
    assert len(served) >= 48 and len(refused) > count / 4
    last = max(one.seconds for one in served)
    assert sorted(one.seconds for one in refused)[len(refused) // 2] < last


@pytest.mark.parametrize("count", MANY)
def test_all_that_has_begun_ends_after_sigterm(count: int) -> None:
    given = prompts(count)
    wanted = expected(given)
    with server_process(15, "--model", MODEL, "--max-waiting", str(count)) as server:

        async def run() -> list[Ended]:
            streams = asyncio.ensure_future(all_at_once(server.base_url, given))
            async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as other:
                while metric((await other.get("/metrics")).text, "vllm:num_requests_running") < 1:
                    await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            return await streams

        ended = asyncio.run(run())
        assert server.process.wait(60) == 0
    begun = [(one, text) for one, text in zip(ended, wanted, strict=True) if one.status]
    assert {one.status for one, _ in begun} <= {200, 503} and len(begun) > 10
    assert all(one.is_whole and one.text == text for one, text in begun if one.status == 200)
