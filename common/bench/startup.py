"""`startup`: how long parts take to start, and what memory their servers hold.

Everything in fresh processes, caches warm: one start of each kind goes before those that count, so
converted models and compiled kernels are there, as at every start but a machine's first. Times are
medians. Memory is the server's (with its child processes) after one short request, since mapped
weights count as resident only once they have been read.
"""

import argparse
import statistics
from typing import Any

from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
)
from common.bench.core.memory import tree_memory
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.processes import PartServer, part_package, post_json, run_worker
from common.bench.core.results import column, make_result

COLUMNS = [
    column("part", "part", digits=0),
    column("import_s", "import", "s", 2),
    column("construct_s", "build engine", "s", 2),
    column("ready_s", "server ready", "s", 2),
    column("peak_mib", "peak memory", "MiB", 0),
    column("rss_mib", "resident", "MiB", 0),
    column("anon_mib", "private", "MiB", 0),
    column("file_mib", "mapped files", "MiB", 0),
    column("pss_mib", "PSS", "MiB", 0),
]
REQUEST_TOKENS = list(range(100, 116))  # 16 tokens in, 8 out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=positive, nargs="+", required=True, help="part numbers")
    add_engine_arguments(parser)
    parser.add_argument("--repeats", type=positive, default=3, help="starts of each (default: 3)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for part in args.parts:
        part_package(part)
    samples: dict[int, list[dict[str, Any]]] = {part: [] for part in args.parts}
    rounds = [(number, part) for number in range(args.repeats + 1) for part in args.parts]
    others = OtherWork()
    for number, part in progress(rounds, "starts"):
        sample = one_start(part, args)
        if number > 0:
            samples[part].append(sample)
    rows = [{"part": part, **medians(samples[part])} for part in args.parts]
    notes = [
        f"Model {args.model}; medians of {args.repeats} starts with warm caches. Memory after one"
        " request of 16 tokens in and 8 out."
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    if rows[0]["peak_mib"] is None:
        notes.append("No memory: this system has no /proc.")
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    title = "Start-up time and memory"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=args.parts, notes=notes))
    return 0


def one_start(part: int, args: argparse.Namespace) -> dict[str, float | None]:
    """Start the engine in one process and the server in another; seconds and MiB."""
    settings = settings_of(args)
    job = {"job": "startup", "part": part, "model": args.model, "settings": settings}
    engine = run_worker(job, verbose=args.verbose)
    with PartServer(part, args.model, settings, verbose=args.verbose) as server:
        body = {"model": args.model, "prompt": REQUEST_TOKENS, "max_tokens": 8, "temperature": 0}
        post_json(server.url + "/v1/completions", body)
        memory = tree_memory(server.pid)
        ready = server.ready_s
    times = {"import_s": engine["import_s"], "construct_s": engine["construct_s"]}
    return {**times, "ready_s": ready, **memory}


def medians(samples: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Key by key; None where no sample has the value."""
    result: dict[str, float | None] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples if sample[key] is not None]
        result[key] = statistics.median(values) if values else None
    return result
