"""What `disagg` asks of a server: streams without end among which long prompts arrive, then a crowd."""

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.bench import BenchError
from common.bench.core.latencies import RequestRecord
from common.bench.core.workload import Lengths, WorkItem, random_work
from common.bench.disagg.split import read_totals, split
from common.bench.serving.client import Target, open_client, send
from common.bench.serving.load import open_loop, run_load, served_model

if TYPE_CHECKING:
    import httpx

GREEDY = {"temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Sizes:
    """Counts, and lengths in tokens; seconds between two long prompts."""

    streams: int = 4
    stream_prompt: int = 32
    stream_output: int = 192
    longs: int = 6
    long_prompt: int = 768
    long_output: int = 16
    gap: float = 3.0
    crowd: int = 8
    crowd_prompt: int = 384
    crowd_output: int = 48
    crowd_at_once: int = 4


@dataclass
class Seen:
    """What clients saw. itls, ttfts: seconds. stream_rate: tokens of the streams a second while
    long prompts came. crowd_rate: tokens of the crowd, prompts included, a second."""

    itls: list[float] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    stream_ttfts: list[float] = field(default_factory=list)
    stream_rate: float = 0.0
    crowd_rate: float = 0.0
    split: dict[str, float] | None = None  # of the long prompts' times to first token


async def measure(url: str, sizes: Sizes, vocab_size: int, seed: str) -> Seen:
    """One server that is fresh. Raises BenchError for a request that failed."""
    name = await served_model(Target(url, ""))
    scores = {"logprobs": 0} if name.startswith("random:") else {}  # without text, to see tokens by
    target = Target(url, name, body=GREEDY | scores)
    seen = Seen()
    async with open_client(target) as client:
        warm = items(4, sizes.long_prompt, 8, vocab_size, f"{seed} warm-up")
        checked([await send(client, target, item, 0) for item in warm[:2]])
        checked(await asyncio.gather(*(send(client, target, item, 0) for item in warm[2:])))
        before = await asyncio.to_thread(read_totals, url)
        await streams_and_longs(client, target, sizes, vocab_size, seed, seen)
        after = await asyncio.to_thread(read_totals, url)
        seen.split = split(before, after, statistics.mean(seen.ttfts))
    crowd = items(sizes.crowd, sizes.crowd_prompt, sizes.crowd_output, vocab_size, f"{seed} crowd")
    report = await run_load(target, crowd, concurrency=sizes.crowd_at_once)
    checked(report.requests)
    counted = [report.token_rate(kind) or 0.0 for kind in ("prompt", "completion")]
    seen.crowd_rate = sum(counted)
    return seen


async def streams_and_longs(
    client: "httpx.AsyncClient",
    target: Target,
    sizes: Sizes,
    vocab_size: int,
    seed: str,
    seen: Seen,
) -> None:
    """Long prompts at fixed times, among streams that follow each other until the last long one has
    its answer."""
    longs = items(sizes.longs, sizes.long_prompt, sizes.long_output, vocab_size, f"{seed} longs")
    done, records = asyncio.Event(), list[RequestRecord]()

    async def stream(number: int) -> None:
        turn = 0
        while not done.is_set():
            name = f"{seed} stream {number} {turn}"
            [item] = items(1, sizes.stream_prompt, sizes.stream_output, vocab_size, name)
            records.append(await send(client, target, item, number))
            turn += 1

    async with asyncio.TaskGroup() as group:
        for number in range(sizes.streams):
            group.create_task(stream(number))
        await asyncio.sleep(sizes.gap / 2)
        begin = time.perf_counter()
        arrivals = [sizes.gap * number for number in range(sizes.longs)]
        answered = await open_loop(client, target, longs, arrivals, lambda record: None)
        end = time.perf_counter()
        done.set()
    for record in checked(records):
        pairs = zip(record.arrivals, record.arrivals[1:], strict=False)
        seen.itls += [after - before for before, after in pairs if begin <= after <= end]
        seen.stream_ttfts += [record.ttft or 0.0] if begin <= record.start <= end else []
    tokens = sum(begin <= at <= end for record in records for at in record.arrivals)
    seen.stream_rate = tokens / (end - begin)
    seen.ttfts = [record.ttft or 0.0 for record in checked(answered)]


def items(count: int, prompt: int, output: int, vocab_size: int, seed: str) -> list[WorkItem]:
    return random_work(Lengths([prompt] * count, [output] * count), vocab_size, seed)


def checked(records: list[RequestRecord]) -> list[RequestRecord]:
    for record in records:
        if record.error:
            raise BenchError(f"a request failed: {record.error}: {record.detail}")
    return records
