"""Many streams at once from one client, and what became of each."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from common.bench.serving.sse import SSEParser


@dataclass
class Streamed:
    """A stream's chunks with text or a token, and how it ended: `done`, `error`, `status N`, `cut`.

    begin, times: when it was asked for, and each chunk's arrival (seconds of `time.perf_counter`).
    is_open: more of it may come.
    """

    num_chunks: int = 0
    ending: str = "cut"
    engine: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    is_open: bool = True

    @property
    def is_done(self) -> bool:
        return self.ending == "done"


async def stream(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], result: Streamed | None = None
) -> Streamed:
    """One completion. A `[DONE]` after an error is told as `error, then done`.

    result: filled in as chunks come.
    """
    result, parser = result or Streamed(), SSEParser()
    try:
        async with session.post(f"{url}/v1/completions", json=body | {"stream": True}) as response:
            result.engine = response.headers.get("x-engine", "")
            if response.status != 200:
                result.ending = f"status {response.status}"
                return result
            async for data in response.content.iter_any():
                for event in parser.feed(data):
                    take(event.data, result)
    except aiohttp.ClientError as error:
        result.ending = f"cut: {type(error).__name__}"
    finally:
        result.is_open = False
    return result


def take(data: str, result: Streamed) -> None:
    if data == "[DONE]":
        result.ending = "done" if not result.error else "error, then done"
        return
    chunk = json.loads(data)
    if "error" in chunk:
        result.error, result.ending = chunk["error"], "error"
    else:
        result.num_chunks += 1
        result.times.append(time.perf_counter())


async def stream_many(
    url: str,
    bodies: list[dict[str, Any]],
    concurrency: int | None = None,
    results: list[Streamed] | None = None,
) -> list[Streamed]:
    """All of them, so many at a time, in their order.

    results: an empty list that gets each stream as it begins.
    """
    results = [] if results is None else results
    limit = asyncio.Semaphore(concurrency or len(bodies))
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def one(body: dict[str, Any]) -> Streamed:
            async with limit:
                results.append(Streamed())
                return await stream(session, url, body, results[-1])

        return await asyncio.gather(*map(one, bodies))


async def streaming_engine(results: list[Streamed]) -> str:
    """Wait until a stream has begun and not ended; which engine gives it. Raises AssertionError after
    60 s."""
    deadline = time.monotonic() + 60
    while True:
        for result in results:
            if result.num_chunks and result.is_open:
                return result.engine
        assert time.monotonic() < deadline, "no stream begins"
        await asyncio.sleep(0.001)
