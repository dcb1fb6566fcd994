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
    """

    num_chunks: int = 0
    ending: str = "cut"
    engine: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.ending == "done"


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Streamed:
    """One completion. A `[DONE]` after an error is told as `error, then done`."""
    result, parser = Streamed(), SSEParser()
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
    url: str, bodies: list[dict[str, Any]], concurrency: int | None = None
) -> list[Streamed]:
    """All of them, so many at a time, in their order."""
    limit = asyncio.Semaphore(concurrency or len(bodies))
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def one(body: dict[str, Any]) -> Streamed:
            async with limit:
                return await stream(session, url, body)

        return await asyncio.gather(*map(one, bodies))
