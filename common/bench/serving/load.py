"""Load on a server: many requests at once, closed or open loop, with /health probed meanwhile.

Closed loop: `concurrency` clients, each sending its next request when its last is done. It shows
what a server can do, but a slow server is asked less. Open loop: requests come when the schedule
says, whatever the server does, as users do; where they come faster than they are served, latency
grows for as long as the run lasts, and should.

A probe of /health goes out at every tick even while earlier ones wait, so a server that hangs for a
second shows ten slow probes and not one.
"""

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.bench import BenchError
from common.bench.core.latencies import RequestRecord
from common.bench.core.workload import WorkItem
from common.bench.serving.client import Target, open_client, send, transport_error

if TYPE_CHECKING:
    import httpx

PROBE_TIMEOUT = 60.0


@dataclass
class HealthRecord:
    """Latencies (seconds) of the probes answered with 200, and the others by kind."""

    latencies: list[float] = field(default_factory=list)
    failures: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass
class LoadReport:
    """What a load run saw. `duration` is first send to last end, in seconds."""

    requests: list[RequestRecord]
    duration: float
    health: HealthRecord | None = None

    @property
    def completed(self) -> list[RequestRecord]:
        return [record for record in self.requests if record.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """Failed requests by kind."""
        kinds = collections.Counter(record.error for record in self.requests if record.error)
        return dict(sorted(kinds.items()))

    @property
    def request_rate(self) -> float:
        """Completed requests a second."""
        return len(self.completed) / self.duration

    def token_rate(self, kind: str) -> float | None:
        """Tokens a second of completed requests, `kind` prompt or completion; None where the
        server counted for none of them."""
        counts = [getattr(record, f"{kind}_tokens") for record in self.completed]
        known = [count for count in counts if count is not None]
        return sum(known) / self.duration if known else None


async def run_load(
    target: Target,
    items: Sequence[WorkItem],
    *,
    concurrency: int | None = None,
    arrivals: Sequence[float] | None = None,
    probe_interval: float | None = None,
    on_done: Callable[[RequestRecord], object] = lambda record: None,
) -> LoadReport:
    """Send `items`: closed loop with `concurrency` clients, or open loop at `arrivals` (seconds).

    probe_interval: seconds between probes of /health; None probes nothing.
    """
    if (concurrency is None) == (arrivals is None):
        raise ValueError("give either concurrency or arrivals")
    async with open_client(target) as client, probing(target, probe_interval) as health:
        if arrivals is None:
            records = await closed_loop(client, target, items, concurrency or 1, on_done)
        else:
            records = await open_loop(client, target, items, arrivals, on_done)
    duration = max(r.end for r in records) - min(r.start for r in records)
    return LoadReport(sorted(records, key=lambda record: record.index), duration, health)


async def closed_loop(
    client: "httpx.AsyncClient",
    target: Target,
    items: Sequence[WorkItem],
    concurrency: int,
    on_done: Callable[[RequestRecord], object],
) -> list[RequestRecord]:
    waiting = collections.deque(enumerate(items))
    records = []

    async def work() -> None:
        while waiting:
            index, item = waiting.popleft()
            record = await send(client, target, item, index)
            records.append(record)
            on_done(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(work())
    return records


async def open_loop(
    client: "httpx.AsyncClient",
    target: Target,
    items: Sequence[WorkItem],
    arrivals: Sequence[float],
    on_done: Callable[[RequestRecord], object],
) -> list[RequestRecord]:
    records = []
    start = time.perf_counter()

    async def work(index: int, item: WorkItem, due: float) -> None:
        record = await send(client, target, item, index, due)
        records.append(record)
        on_done(record)

    async with asyncio.TaskGroup() as group:
        for index, (item, offset) in enumerate(zip(items, arrivals, strict=True)):
            due = start + offset
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(work(index, item, due))
    return records


@contextlib.asynccontextmanager
async def probing(target: Target, interval: float | None) -> AsyncIterator[HealthRecord | None]:
    """Probe GET /health every `interval` seconds while inside; on leaving, wait for the answers."""
    if interval is None:
        yield None
        return
    health = HealthRecord()
    async with open_client(target) as client, asyncio.TaskGroup() as group:

        async def tick() -> None:
            due = time.perf_counter()
            while True:
                group.create_task(probe(client, health))
                due += interval
                await asyncio.sleep(max(0.0, due - time.perf_counter()))

        ticker = group.create_task(tick())
        try:
            yield health
        finally:
            ticker.cancel()


async def probe(client: "httpx.AsyncClient", health: HealthRecord) -> None:
    start = time.perf_counter()
    try:
        response = await client.get("/health", timeout=PROBE_TIMEOUT)
    except Exception as error:
        kind = transport_error(error)
        if kind is None:
            raise
        health.failures[kind] += 1
        return
    if response.status_code == 200:
        health.latencies.append(time.perf_counter() - start)
    else:
        health.failures[f"http_{response.status_code}"] += 1


async def served_model(target: Target) -> str:
    """The first model of GET /v1/models. Raises BenchError where the server does not tell."""
    async with open_client(target) as client:
        try:
            response = await client.get("/v1/models")
            response.raise_for_status()
            return response.json()["data"][0]["id"]
        except Exception as error:
            raise BenchError(f"{target.url}/v1/models: {type(error).__name__}: {error}") from None
