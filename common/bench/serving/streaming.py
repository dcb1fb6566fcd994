"""`streaming`: what a reader waits for when one part answers whole and another streams.

A lone request to each part's own server (fresh processes, alternating order): time to the first
byte, to the first token, and to the end. Then --streams requests at once, of which parts 01 and 02
run one and queue the rest, while /health is probed: a server that generates must still answer.
Part 01 cannot stream and answers whole; every other part streams.
"""

import argparse
import asyncio
import statistics
from dataclasses import dataclass, field
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    positive_number,
    progress,
    settings_of,
)
from common.bench.core.latencies import percentile
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.processes import PartServer, part_package, run_worker
from common.bench.core.report import plural
from common.bench.core.results import column, make_result
from common.bench.core.workload import Lengths, random_work
from common.bench.serving.client import Target
from common.bench.serving.load import LoadReport, run_load, served_model

WHOLE_PARTS = (1,)  # parts that cannot stream
COLUMNS = [
    column("part", "part", digits=0),
    column("mode", "response"),
    column("ttfb_ms", "first byte", "ms", 0),
    column("ttft_ms", "first token", "ms", 0),
    column("total_ms", "whole response", "ms", 0),
    column("health_p50", "/health p50", "ms", 1),
    column("health_p95", "p95", "ms", 1),
    column("health_p99", "p99", "ms", 1),
    column("health_failures", "probes failed", digits=0),
]


@dataclass
class Samples:
    """One part's measurements, in ms."""

    ttfb: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    health_failures: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=positive, nargs="+", default=[1, 2], help="default: 1 2")
    add_engine_arguments(parser)
    parser.add_argument("--prompt-len", type=positive, default=32, help="default: 32")
    parser.add_argument("--output-len", type=positive, default=64, help="default: 64")
    parser.add_argument("--repeats", type=positive, default=3, help="servers a part (default: 3)")
    parser.add_argument("--streams", type=positive, default=8, help="at once (default: 8)")
    parser.add_argument(
        "--probe-health", type=positive_number, default=0.05, help="s between probes (0.05)"
    )
    parser.add_argument("--vocab-size", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for part in args.parts:
        part_package(part)
    samples = {part: Samples() for part in args.parts}
    rounds = []
    for number in range(args.repeats):
        rounds += [(number, part) for part in args.parts[:: -1 if number % 2 else 1]]
    others = OtherWork()
    for number, part in progress(rounds, "servers"):
        with PartServer(part, args.model, settings_of(args), verbose=args.verbose) as server:
            asyncio.run(measure(server.url, part, number, args, samples[part]))
    rows = [row(part, samples[part]) for part in args.parts]
    notes = [
        f"Model {args.model}, {args.prompt_len} tokens in, {args.output_len} out, greedy. First"
        f" byte, first token and whole response: a lone request, median over"
        f" {plural(args.repeats, 'fresh server')}. /health: probed every {args.probe_health:g} s while {args.streams} requests"
        " are open, all probes of all servers together."
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    title = "Whole responses and streams"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=args.parts, notes=notes))
    return 0


async def measure(
    url: str, part: int, number: int, args: argparse.Namespace, samples: Samples
) -> None:
    """One server: a warm-up, a lone request, then all streams with probes of /health."""
    body = {"temperature": 0, "ignore_eos": True}
    target = Target(url, model="", stream=part not in WHOLE_PARTS, body=body)
    target = Target(**{**vars(target), "model": await served_model(target)})
    count = args.streams + 2
    lengths = Lengths([args.prompt_len] * count, [args.output_len] * count)
    warmup, lone, *rest = random_work(lengths, args.vocab_size, f"{args.seed} {number}")
    check(await run_load(target, [warmup], concurrency=1), part)
    report = check(await run_load(target, [lone], concurrency=1), part)
    record = report.requests[0]
    for values, value in (
        (samples.ttfb, record.ttfb),
        (samples.ttft, record.ttft),
        (samples.total, record.e2e),
    ):
        if value is not None:
            values.append(1000 * value)
    report = await run_load(target, rest, concurrency=len(rest), probe_interval=args.probe_health)
    check(report, part)
    if report.health is not None:
        samples.health += [1000 * latency for latency in report.health.latencies]
        samples.health_failures += sum(report.health.failures.values())


def check(report: LoadReport, part: int) -> LoadReport:
    """The report, if every request completed. Raises BenchError otherwise."""
    for record in report.requests:
        if record.error:
            raise BenchError(f"part {part:02d}: {record.error}: {record.detail}")
    return report


def row(part: int, samples: Samples) -> dict[str, Any]:
    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    def health(percent: float) -> float | None:
        return percentile(samples.health, percent) if samples.health else None

    return {
        "part": part,
        "mode": "whole" if part in WHOLE_PARTS else "stream",
        "ttfb_ms": median(samples.ttfb),
        "ttft_ms": median(samples.ttft),
        "total_ms": median(samples.total),
        "health_p50": health(50),
        "health_p95": health(95),
        "health_p99": health(99),
        "health_failures": samples.health_failures,
        "num_probes": len(samples.health),
        "ttfb_runs_ms": samples.ttfb,
        "total_runs_ms": samples.total,
    }
