"""A steady server does not grow: its memory after many requests is what it was after some."""

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.testing.parts import PARTS
from common.testing.server import server_process

BATCHING = [part for part in PARTS if part > 3]
FIRST, ALL = 200, 1400  # requests
CLIENTS = 16


def resident(pid: int) -> int:
    """Bytes of memory that belong to a process alone, swapped out or not."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def send(url: str, count: int, seed: int) -> None:
    """Requests of every kind, CLIENTS at a time; every answer is looked at."""
    rng = random.Random(seed)

    def body() -> dict[str, Any]:
        prompt = [rng.randrange(2, 512) for _ in range(rng.randrange(1, 60))]
        kinds = [{}, {"n": 2}, {"logprobs": 3}, {"frequency_penalty": 1.0}, {"temperature": 0}]
        base = {"prompt": prompt, "max_tokens": rng.randrange(1, 16), "ignore_eos": True}
        return base | rng.choice(kinds) | {"stream": rng.random() < 0.5}

    bodies = [body() for _ in range(count)]

    async def client() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while bodies:
                request = bodies.pop()
                answer = await http.post("/v1/completions", json=request)
                assert answer.status_code == 200, answer.text
                assert not request["stream"] or answer.text.rstrip().endswith("[DONE]")

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


@pytest.mark.parametrize(
    "part",
    [*(pytest.param(part, marks=pytest.mark.long) for part in BATCHING[:-1]), BATCHING[-1]],
)
def test_memory_is_steady(part: int) -> None:
    """1,400 requests: within 5% of the memory after the first 200, and no file left open."""
    pool = ["--num-blocks", "40", "--block-size", "4", "--max-num-seqs", "8"]
    with server_process(part, "--model", "random:tiny-llama", "--threads", "1", *pool) as server:
        pid = server.process.pid
        asyncio.run(send(server.base_url, FIRST, seed=0))
        before, files = resident(pid), open_files(pid)
        asyncio.run(send(server.base_url, ALL - FIRST, seed=1))
        after = resident(pid)
        assert after < before * 1.05, f"{before >> 10} KiB, then {after >> 10} KiB"
        assert open_files(pid) <= files + CLIENTS
        metrics = httpx.get(server.base_url + "/metrics").text
        values = dict(
            line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#")
        )
        [preemptions] = [v for k, v in values.items() if k.startswith("vllm:num_preemptions_total")]
        assert float(preemptions) > 10, "the pool was never short: this shows less than it should"
        [usage] = [v for k, v in values.items() if k.startswith("vllm:kv_cache_usage_perc")]
        assert float(usage) == 0
