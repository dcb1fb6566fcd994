"""`serve`: a load generator for any OpenAI-compatible server, and its latencies.

Closed loop with --concurrency, open loop with --request-rate (Poisson arrivals from the seed).
Prompts are random token ids on /v1/completions, random words where a server takes only text, or
lines of a dataset. TTFT is the time to the first token, ITL the latency between tokens, TPOT a
request's mean ITL, E2E = TTFT + the sum of ITLs. Failed requests are counted by kind and left out
of the latencies. Times are read when a chunk has arrived, before it is parsed; see "send lag" for
whether the load generator kept its schedule. On few cores it takes some of the server's time.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_output_arguments,
    finish,
    length_range,
    positive,
    positive_number,
    progress_bar,
)
from common.bench.core.latencies import percentile, summarize
from common.bench.core.processes import run_worker
from common.bench.core.results import Result, column, make_result
from common.bench.core.workload import (
    WorkItem,
    draw_lengths,
    load_dataset,
    poisson_arrivals,
    random_work,
)
from common.bench.serving.client import PATHS, Target
from common.bench.serving.load import LoadReport, run_load, served_model

COLUMNS = [
    column("metric", "latency"),
    column("count", "samples", digits=0),
    column("mean", "mean", "ms", 2),
    column("p50", "p50", "ms", 2),
    column("p95", "p95", "ms", 2),
    column("p99", "p99", "ms", 2),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first of /v1/models")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--endpoint", choices=sorted(PATHS), default="completions")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--num-requests", type=positive, help="default: 64, or the dataset's")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=positive, help="clients of a closed loop (default: 8)")
    load.add_argument("--request-rate", type=positive_number, help="requests/s of an open loop")
    pair = {"type": positive, "nargs": 2, "metavar": ("MIN", "MAX")}
    parser.add_argument("--input-range", **pair, help="tokens of a prompt (default: 128 128)")
    parser.add_argument("--output-range", **pair, help="tokens generated (default: 64 64)")
    parser.add_argument("--dataset", type=Path, help='JSON lines of {"prompt", "max_tokens"}')
    parser.add_argument("--text", action="store_true", help="prompts of words, not token ids")
    parser.add_argument("--vocab-size", type=positive, default=1000, help="default: 1000")
    parser.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    parser.add_argument(
        "--body", type=json_object, default={}, help="JSON object of more fields for every request"
    )
    parser.add_argument("--warmup", type=int, default=1, help="requests before it counts")
    parser.add_argument("--timeout", type=positive_number, default=600.0, help="s without a byte")
    parser.add_argument(
        "--probe-health",
        type=positive_number,
        nargs="?",
        const=0.1,
        metavar="SECONDS",
        help="probe GET /health meanwhile, every 0.1 s unless given",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--save-requests", type=Path, metavar="FILE.jsonl", help="one line each")
    parser.add_argument("--part", type=positive, help="the part served, noted in the result")
    parser.add_argument("--no-limits", action="store_true", help="the server is another machine")
    add_output_arguments(parser)


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    items = make_items(args)
    limits: dict[str, Any] = {"unmeasured": "the server may be another machine"}
    if not args.no_limits:
        limits = run_worker({"job": "limits", "device": "cpu", "quick": True})
    report = asyncio.run(run_serve(args, items))
    if args.save_requests:
        save_requests(args.save_requests, report)
    finish(args, serve_result(args, report, limits))
    return 0 if report.completed else 1


def make_items(args: argparse.Namespace) -> list[WorkItem]:
    if args.dataset:
        return load_dataset(args.dataset, args.num_requests)
    lengths = draw_lengths(
        args.num_requests or 64,
        length_range(args.input_range, None, 128),
        length_range(args.output_range, None, 64),
        args.seed,
    )
    as_text = args.text or args.endpoint == "chat"
    return random_work(lengths, None if as_text else args.vocab_size, args.seed)


async def run_serve(args: argparse.Namespace, items: list[WorkItem]) -> LoadReport:
    body = {"temperature": args.temperature, **args.body}
    if args.ignore_eos:
        body["ignore_eos"] = True
    if args.endpoint == "chat" and any(isinstance(item.prompt, list) for item in items):
        raise ValueError("--endpoint chat takes text, but the dataset has token ids")
    target = Target(
        url=args.url.rstrip("/"),
        model=args.model or "",
        endpoint=args.endpoint,
        stream=args.stream,
        api_key=args.api_key,
        timeout=args.timeout,
        body=body,
    )
    if not args.model:
        target = Target(**{**vars(target), "model": await served_model(target)})
    if args.warmup > 0:
        warmup = [items[index % len(items)] for index in range(args.warmup)]
        report = await run_load(target, warmup, concurrency=1)
        if not report.completed:
            first = report.requests[0]
            raise BenchError(f"warm-up failed: {first.error}: {first.detail}")
    loop: dict[str, Any] = {"concurrency": args.concurrency or 8}
    if args.request_rate:
        loop = {"arrivals": poisson_arrivals(len(items), args.request_rate, args.seed)}
    with progress_bar(len(items), "requests") as advance:
        return await run_load(
            target, items, probe_interval=args.probe_health, on_done=advance, **loop
        )


def save_requests(path: Path, report: LoadReport) -> None:
    """One JSON object a line: every request's times (seconds), counts and error."""
    lines = [json.dumps(record.to_json()) for record in report.requests]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def latency_samples(report: LoadReport) -> dict[str, list[float]]:
    """Milliseconds of every sample of each metric, completed requests only."""
    done = report.completed
    samples: dict[str, list[float | None]] = {
        "TTFT": [record.ttft for record in done],
        "ITL": [gap for record in done for gap in record.itls],
        "TPOT": [record.tpot for record in done],
        "E2E": [record.e2e for record in done],
    }
    if report.health is not None:
        samples["GET /health"] = list(report.health.latencies)
    return {
        name: [1000 * value for value in values if value is not None]
        for name, values in samples.items()
    }


def serve_result(args: argparse.Namespace, report: LoadReport, limits: dict[str, Any]) -> Result:
    samples = latency_samples(report)
    rows = [{"metric": name, **summarize(values)} for name, values in samples.items()]
    quantiles = {
        name: [round(percentile(values, percent), 4) for percent in range(101)]
        for name, values in samples.items()
        if values
    }
    load = (
        f"open loop, {args.request_rate:g} requests/s"
        if args.request_rate
        else f"closed loop, {args.concurrency or 8} clients"
    )
    return make_result(
        f"Serving under load: {load}",
        COLUMNS,
        rows,
        limits=limits,
        parts=[args.part] if args.part else [],
        notes=summary_notes(report),
        extra={"summary": summary(report), "quantiles_ms": quantiles},
    )


def summary(report: LoadReport) -> dict[str, Any]:
    """Counts and rates; the send lag is the load generator's own lateness, in ms."""
    lags = [1000 * record.lag for record in report.requests]
    health = report.health
    return {
        "num_requests": len(report.requests),
        "num_completed": len(report.completed),
        "errors": report.errors,
        "health_failures": dict(health.failures) if health else None,
        "duration_s": report.duration,
        "requests_per_s": report.request_rate,
        "prompt_tokens_per_s": report.token_rate("prompt"),
        "output_tokens_per_s": report.token_rate("completion"),
        "send_lag_p99_ms": percentile(lags, 99),
    }


def summary_notes(report: LoadReport) -> list[str]:
    facts = summary(report)
    errors = ", ".join(f"{count} {kind}" for kind, count in facts["errors"].items()) or "none"
    rate = facts["output_tokens_per_s"]
    tokens = f"{rate:.1f} output tokens/s" if rate is not None else "no usage in the responses"
    notes = [
        f"{facts['num_completed']} of {facts['num_requests']} requests completed in"
        f" {facts['duration_s']:.2f} s: {facts['requests_per_s']:.2f} requests/s, {tokens}."
        f" Errors: {errors}. Send lag p99 {facts['send_lag_p99_ms']:.1f} ms."
    ]
    silent = sum(not record.arrivals for record in report.completed)
    if silent:
        notes.append(
            f"{silent} streams carried no text and so have no latencies (a model without a"
            " tokenizer?); --body '{\"logprobs\": 0}' makes each token visible."
        )
    if facts["health_failures"]:
        notes.append(f"Failed probes of /health: {facts['health_failures']}.")
    return notes
