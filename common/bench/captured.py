"""`captured`: decode steps replayed, and launched from Python, by one engine in turns.

Two processes on a shared machine differ by more than the launches of a step. So one engine does both: it decodes
with a fixed number of sequences, and changes over every few steps, in an order that is reversed each time.
Times are medians of slices of --steps steps; the ratio is that of neighbouring slices, the median of --pairs,
with its 95% bootstrap interval. `noting` is what a step takes longer while it is captured.
"""

import argparse
import statistics
import time
from typing import Any

from common.bench.compare import add_variant_argument, in_words
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
)
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.pairs import paired_ratio
from common.bench.core.processes import run_worker
from common.bench.core.results import column, make_result
from common.bench.core.workload import random_prompts

SETTLE = 2  # steps after a change: one launched the other way is still in flight
FIRST_PART = 15
COLUMNS = [
    column("engine", "engine"),
    column("batch_size", "batch", digits=0),
    column("launched", "launched", "ms", 2),
    column("replayed", "replayed", "ms", 2),
    column("ratio", "launched / replayed", digits=2),
    column("low", "95% from", digits=2),
    column("high", "to", digits=2),
    column("noting", "noting", "ms", 1),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=FIRST_PART, help="default: 15")
    add_engine_arguments(parser, limits=False)
    add_variant_argument(parser)
    sizes = [1, 4, 16, 32]
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=sizes, help="default: 1 4 16 32"
    )
    parser.add_argument("--prompt-len", type=positive, default=64, help="default: 64")
    parser.add_argument("--steps", type=positive, default=8, help="of a slice (default: 8)")
    parser.add_argument("--pairs", type=positive, default=15, help="of slices (default: 15)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.part < FIRST_PART:
        raise ValueError(f"part {args.part:02d} captures no steps: --part from {FIRST_PART} on")
    ours = f"part {args.part:02d}"
    variants = {ours: {}, **{f"{ours}, {name}": chosen for name, chosen in args.variants}}
    others, rows = OtherWork(), []
    kinds = [(name, size) for size in args.batch_sizes for name in variants]
    for name, size in progress(kinds, "engines"):
        settings = settings_of(args) | variants[name]
        job = {
            "job": "captured",
            "part": args.part,
            "model": settings.pop("model", args.model),
            "settings": {"max_num_seqs": max(args.batch_sizes)} | settings,
            "batch_size": size,
            **{key: getattr(args, key) for key in ("prompt_len", "steps", "pairs")},
        }
        rows.append(
            {"engine": name, "batch_size": size, **row(run_worker(job, verbose=args.verbose))}
        )
    notes = [
        f"Model {args.model}, greedy, {args.prompt_len} tokens of prompt; {args.pairs} pairs of"
        f" {args.steps} steps, in one process for each row.",
        *(f"{ours}, {name}: {in_words(chosen)}." for name, chosen in args.variants),
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    limits = {"unmeasured": "the two ways are compared with each other"}
    title = "A decode step, launched and replayed"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[args.part], notes=notes))
    return 0


def row(found: dict[str, Any]) -> dict[str, float | None]:
    """From seconds of a step in each slice."""
    launched, replayed = (dict(enumerate(found[name])) for name in ("launched", "replayed"))
    ratio = paired_ratio(launched, replayed)
    plain = statistics.median(launched.values())
    return {
        "launched": 1e3 * plain,
        "replayed": 1e3 * statistics.median(replayed.values()),
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "noting": 1e3 * (statistics.median(found["noted"]) - plain) if found["noted"] else None,
    }


def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """{"batch_size", "prompt_len", "steps", "pairs"} -> seconds: "launched" and "replayed", the median
    step of each slice; "noted", steps that were captured. Raises ValueError where none is."""
    from common.requests import Request
    from common.sampling import SamplingParams

    graphs, noted = engine.runner.graphs, []
    if graphs.reason is not None:
        raise ValueError(f"no step is captured: {graphs.reason}")
    capture = graphs.capture

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        graph = capture(*args)
        noted.append(time.perf_counter() - begin)
        return graph

    graphs.capture = timed
    each = job["steps"] + SETTLE
    params = SamplingParams(
        temperature=0, max_tokens=2 * each * (job["pairs"] + 2), ignore_eos=True
    )
    lengths = [job["prompt_len"]] * job["batch_size"]
    prompts = random_prompts(lengths, engine.vocab_size, "captured")
    for number, prompt in enumerate(prompts):
        engine.add_request(Request(str(number), prompt, params))
    while engine.stats()["num_waiting"] or len(engine.trace.last_record.scheduled) < len(prompts):
        engine.step()
    noted.clear()  # while they joined, sizes were smaller
    found: dict[str, list[float]] = {"launched": [], "replayed": []}
    try:
        for number in range(-1, job["pairs"]):  # one to warm up, which captures
            for way in ("replayed", "launched")[:: -1 if number % 2 else 1]:
                graphs.reason = None if way == "replayed" else "it is measured without"
                seconds = [step_seconds(engine) for _ in range(each)]
                if number >= 0:
                    found[way].append(statistics.median(seconds[SETTLE:]))
    finally:
        graphs.reason = None
    assert len(engine.trace.last_record.scheduled) == len(prompts), "not all decode"
    return {**found, "noted": noted}


def step_seconds(engine: Any) -> float:
    begin = time.perf_counter()
    engine.step()
    return time.perf_counter() - begin
