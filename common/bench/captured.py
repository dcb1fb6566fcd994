"""`captured`: decode steps replayed, and launched from Python, by one engine in turns.

Two processes on a shared machine differ by more than the launches of a step. So one engine does both: it decodes
with a fixed number of sequences, and changes over every few steps, in an order that is reversed each time.
Times are medians of slices of --steps steps; the ratio is that of neighbouring slices, the median of --pairs,
with its 95% bootstrap interval. `noting` is what a forward takes longer while it is noted, the median of a
few times. Unlike in a server, no HTTP thread wants the interpreter's lock meanwhile.
"""

import argparse
import importlib
import statistics
import sys
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
from common.bench.core.processes import part_package, run_worker
from common.bench.core.results import column, make_result
from common.bench.core.workload import random_prompts

LAUNCHED = "it is measured without"  # why steps of a slice are not replayed
TOGETHER = "see max_num_seqs, max_model_len and the KV cache's size"
NOTINGS = 6  # of the size, of which the first does not count
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
        f"Model {args.model}, greedy, from {args.prompt_len} tokens on; {args.pairs} pairs of"
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
    """From seconds of a step in each slice, and of forwards that were noted and were not."""
    launched, replayed = (dict(enumerate(found[name])) for name in ("launched", "replayed"))
    ratio = paired_ratio(launched, replayed)
    noted, plain = found["noted"], found["plain"]
    return {
        "launched": 1e3 * statistics.median(launched.values()),
        "replayed": 1e3 * statistics.median(replayed.values()),
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "noting": 1e3 * (statistics.median(noted) - statistics.median(plain)) if plain else None,
    }


def measure(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """{"batch_size", "prompt_len", "steps", "pairs"} -> seconds: "launched" and "replayed", the median
    step of each slice; "noted" and "plain", forwards that were noted, and others at the same place (none
    on a GPU, which captures a size before it occurs). Raises ValueError where no step is captured."""
    from common.requests import Request
    from common.sampling import SamplingParams

    graphs, size = engine.runner.graphs, job["batch_size"]
    if engine.config.speculative != "off":
        raise ValueError("speculative must be off: with drafts, steps differ in their tokens")
    package = part_package(job["part"])
    sys.setswitchinterval(importlib.import_module(f"{package}.engine_core").SWITCH_INTERVAL)
    each = job["steps"] + SETTLE
    needed = each * (2 * job["pairs"] + 2 * NOTINGS) + size * job["prompt_len"]
    room = engine.max_model_len - job["prompt_len"]
    params = SamplingParams(temperature=0, max_tokens=min(needed, room), ignore_eos=True)
    prompts = random_prompts([job["prompt_len"]] * size, engine.vocab_size, "captured")
    for number, prompt in enumerate(prompts):
        engine.add_request(Request(str(number), prompt, params))
    while engine.stats()["num_waiting"] or len(engine.trace.last_record.scheduled) < size:
        engine.step()
        if len(engine.sequences) < size:
            raise ValueError(f"{size} sequences are not decoded together: {TOGETHER}")
    found: dict[str, list[float]] = {"launched": [], "replayed": [], "noted": [], "plain": []}
    note(engine, each, found)
    before = graphs.num_replays
    for number in range(job["pairs"]):
        for way in ("replayed", "launched")[:: -1 if number % 2 else 1]:
            if graphs.reason not in (None, LAUNCHED):
                raise ValueError(f"no step is captured: {graphs.reason}")
            graphs.reason = None if way == "replayed" else LAUNCHED
            seconds = [step_seconds(engine) for _ in range(each)]
            found[way].append(statistics.median(seconds[SETTLE:]))
            if len(engine.trace.last_record.scheduled) < size:
                raise ValueError(f"{size} sequences are not decoded together: {TOGETHER}")
    graphs.reason = None
    replayed, least = graphs.num_replays - before, job["pairs"] * job["steps"]
    if replayed < least:
        raise ValueError(f"{replayed} steps were replayed, not {least}")
    return found


def note(engine: Any, steps: int, found: dict[str, list[float]]) -> None:
    """Have the size noted NOTINGS times; the first time, which has costs of its own, is left out."""
    graphs, is_noting = engine.runner.graphs, False
    forward, capture = graphs.forward, graphs.capture

    def timed_forward(*args: Any) -> Any:
        begin = time.perf_counter()
        result = forward(*args)
        if not is_noting:
            found["plain"].append(time.perf_counter() - begin)
        return result

    def timed_capture(*args: Any) -> Any:
        nonlocal is_noting
        begin, is_noting = time.perf_counter(), True
        try:
            return capture(*args)
        finally:
            is_noting = False
            found["noted"].append(time.perf_counter() - begin)

    graphs.forward, graphs.capture = timed_forward, timed_capture
    try:
        for _ in range(NOTINGS if not graphs.on_gpu else 1):
            if not graphs.on_gpu:
                graphs.forget()
            for _ in range(steps):
                engine.step()
    finally:
        graphs.forward, graphs.capture = forward, capture
    del found["noted"][:1]


def step_seconds(engine: Any) -> float:
    begin = time.perf_counter()
    engine.step()
    return time.perf_counter() - begin
