"""`router --overhead`: what a router adds to a request, and many streams at once, over stand-ins.

Stand-ins speak the wire format and generate nothing, so all that is measured is the way there and
back: requests one by one, in turns straight to a stand-in and through the router; then --streams
streams at once, 20 tokens each, one every half second, both ways; then the router's memory over the
same requests again and again.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.bench.core.arguments import finish
from common.bench.core.latencies import percentile
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.processes import run_worker
from common.bench.core.results import column, make_result
from common.bench.router.processes import router_process

if TYPE_CHECKING:
    import aiohttp

STAND_IN = "common.testing.stand_ins.server"
TOKENS, INTERVAL = 20, 0.5  # of a stream
COLUMNS = [
    column("what", "what"),
    column("direct", "straight to a server", digits=2),
    column("routed", "through the router", digits=2),
    column("added", "added", digits=2),
    column("unit", "unit"),
]
WARM_UP = 200


def run(args: argparse.Namespace) -> int:
    others = OtherWork()
    rows = asyncio.run(measure(args))
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    notes = [
        f"Two stand-ins without an engine, the router (policy cache-aware) and the client share the"
        f" machine's cores. One by one: {args.requests} requests each way, in turns. At once:"
        f" {args.streams} streams of {TOKENS} tokens, one every {INTERVAL:g} s, so {TOKENS * INTERVAL:g} s"
        " if nothing waits."
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    title = "What the router costs"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[10], notes=notes))
    return 0


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    with (
        router_process(STAND_IN) as (first, _),
        router_process(STAND_IN) as (second, _),
    ):
        flags = ["--replica", first, "--replica", second, "--max-waiting", str(args.streams)]
        with router_process("part10.router", *flags) as (router, pid):
            return [
                *await one_by_one(first, router, args.requests),
                *await at_once(first, router, args.streams, pid),
                await memory(router, args.requests, pid),
            ]


def row(what: str, direct: float | None, routed: float | None, unit: str) -> dict[str, Any]:
    added = None if direct is None or routed is None else routed - direct
    return {"what": what, "direct": direct, "routed": routed, "added": added, "unit": unit}


async def one_by_one(direct: str, routed: str, count: int) -> list[dict[str, Any]]:
    import aiohttp

    rows = []
    async with aiohttp.ClientSession() as session:
        for stream, name in ((False, "a whole answer"), (True, "the first token of a stream")):
            times: dict[str, list[float]] = {direct: [], routed: []}
            for number in range(count + WARM_UP):
                for url in (direct, routed) if number % 2 else (routed, direct):
                    begin = time.perf_counter()
                    body = {"prompt": f"{number} " * 100, "stream": stream}
                    async with session.post(f"{url}/v1/completions", json=body) as response:
                        await response.content.readany()
                        seconds = time.perf_counter() - begin
                        await response.read()
                    if number >= WARM_UP:
                        times[url].append(1000 * seconds)
            for label, percent in (("median", 50), ("p99", 99)):
                values = [percentile(times[url], percent) for url in (direct, routed)]
                rows.append(row(f"{name}, {label}", *values, "ms"))
    return rows


async def at_once(direct: str, routed: str, count: int, pid: int) -> list[dict[str, Any]]:
    """Seconds until all have ended, the wait for the first token, gaps between tokens."""
    cpu = cpu_seconds(pid)
    ways = [await streams(url, count) for url in (direct, routed)]
    used = cpu_seconds(pid) - cpu
    for way, name in zip(ways, ("straight", "routed"), strict=True):
        if way["kinds"]:
            print(f"streams that failed, {name}: {dict(way['kinds'])}", file=sys.stderr)
    titles = {
        "total": (f"{count} streams at once, all of them", "s"),
        "first": ("their first tokens, median", "ms"),
        "gap": ("their gaps between tokens, p99", "ms"),
        "failed": ("streams that failed", "streams"),
    }
    rows = [row(title, ways[0][key], ways[1][key], unit) for key, (title, unit) in titles.items()]
    per_token = 1e6 * used / (count * TOKENS)
    return [*rows, row("the router's processor time per token", None, per_token, "µs")]


async def streams(url: str, count: int) -> dict[str, Any]:
    import aiohttp

    body = {
        "prompt": "x",
        "stream": True,
        "metadata": {"tokens": str(TOKENS), "interval": str(INTERVAL)},
    }
    firsts: list[float] = []
    gaps: list[float] = []

    async def one(session: "aiohttp.ClientSession") -> bool:
        begin = last = time.perf_counter()
        whole = b""
        async with session.post(f"{url}/v1/completions", json=body) as response:
            async for data in response.content.iter_any():
                now = time.perf_counter()
                (gaps if whole else firsts).append(1000 * (now - (last if whole else begin)))
                last, whole = now, whole + data
        return whole.endswith(b"data: [DONE]\n\n") and whole.count(b"\n\n") == TOKENS + 2

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        begin = time.perf_counter()
        whole = await asyncio.gather(*(one(session) for _ in range(count)), return_exceptions=True)
        total = time.perf_counter() - begin
    failed = sum(one is not True for one in whole)
    return {
        "total": total,
        "first": statistics.median(firsts),
        "gap": percentile(gaps, 99),
        "failed": failed,
        "kinds": Counter(str(one) for one in whole if one is not True),
    }


async def memory(routed: str, count: int, pid: int) -> dict[str, Any]:
    """Growth over requests that are all new, after twice as many that fill what has a limit."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        limit = asyncio.Semaphore(50)

        async def one(number: int) -> None:
            body = {"prompt": f"{number} " * 1200, "stream": True}
            async with limit, session.post(f"{routed}/v1/completions", json=body) as response:
                await response.read()

        await asyncio.gather(*map(one, range(4 * count)))
        before = resident(pid)
        await asyncio.gather(*map(one, range(4 * count, 6 * count)))
    growth = (resident(pid) - before) / (2 * count) * 1000 / 1024
    return row("the router's memory, growth over 1,000 requests", None, growth, "KiB")


def resident(pid: int) -> int:
    """Bytes, what is swapped out included."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return 1024 * (int(sizes["RssAnon"]) + int(sizes["VmSwap"]))


def cpu_seconds(pid: int) -> float:
    import os

    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
