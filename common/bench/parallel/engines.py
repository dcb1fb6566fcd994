"""`parallel engines`: the same cores as one engine, as ranks of one engine, and as several engines.

    one    one engine with all cores
    tp N   N ranks of one engine (--set tensor_parallel_size), each with 1/N of the cores
    pp N   N stages of one engine, from part 15 on (--stages), each with 1/N of the cores
    dp N   N engines, each with 1/N of the cores and of the requests, handed out evenly; no router

Prompts of --prompt-len random tokens, --output-len tokens each, greedy. Decoding counts from when
all have their first token; of prefills one is a long prompt alone, and one is eight short ones
together. Every measurement is a fresh process; variants take turns in alternating order for --pairs
rounds. With --collectives (a result of `parallel collectives`) the cost model, calibrated on `one`,
predicts the others.
"""

import argparse
from pathlib import Path

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
)
from common.bench.core.machine import usable_cores
from common.bench.core.noise import OtherWork
from common.bench.core.processes import part_package, run_worker
from common.bench.core.results import load_result, save_result
from common.bench.core.workload import random_prompts
from common.bench.parallel.collectives import run_job
from common.bench.parallel.layouts import Layout
from common.bench.parallel.points import BUDGET, LONG, NUM_SHORT, SHORT, Point
from common.bench.parallel.replicas import Engines, Variant
from common.bench.parallel.rows import engines_result, ranks_result
from common.bench.prefix.plot import check_plot

BATCH_SIZES = (1, 4, 16, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=9, help="default: 9")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[2], help="ranks (default: 2)")
    parser.add_argument("--stages", type=positive, nargs="+", default=[], help="default: none")
    parser.add_argument(
        "--batches", type=positive, nargs="+", default=list(BATCH_SIZES), help="default: 1 4 16 32"
    )
    parser.add_argument("--prompt-len", type=positive, default=128, help="default: 128")
    parser.add_argument("--output-len", type=positive, default=48, help="default: 48")
    parser.add_argument("--no-prefill", action="store_true", help="decode only")
    add_engine_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=5, help="rounds (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of random token ids (default: 0)")
    parser.add_argument("--vocab-size", type=positive, help="draw token ids below this")
    parser.add_argument("--collectives", type=Path, metavar="FILE", help="to predict with")
    parser.add_argument(
        "--transport", default="shared memory", help="of those (default: shared memory)"
    )
    add_output_arguments(parser)
    parser.add_argument("--memory-json", type=Path, metavar="FILE", help="the ranks' table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    part_package(args.part)
    if args.plot:
        check_plot(args.plot)
    if args.output_len < 2:
        raise ValueError(f"--output-len {args.output_len}: the first token is not counted")
    links = load_result(args.collectives)["rows"] if args.collectives else None
    points = points_of(args)
    variants = variants_of(args)
    measure_rounds(variants, points, args)
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    sizes = {*args.sizes, *args.stages}
    lone_shares = {} if links is None else {size: lone_share(size) for size in sizes}
    result = engines_result(args, variants, points, limits, links, lone_shares)
    if args.memory_json:
        save_result(args.memory_json, ranks_result(args, variants, points, limits))
    if args.plot and result["rows"]:
        from common.bench.parallel.plot import plot_engines

        plot_engines(result, args.plot)
    finish(args, result)
    return 1 if any(variant.failure for variant in variants) else 0


def lone_share(size: int) -> float:
    """Of the machine's reading, what one of so many ranks reaches alone."""
    cores = usable_cores()
    job = {"job": "lone_read", "threads": cores // size, "all_threads": cores}
    return run_job(job)["share"]


def points_of(args: argparse.Namespace) -> list[Point]:
    points = [
        Point(f"decode, batch {size}", size, args.prompt_len, args.output_len)
        for size in sorted(set(args.batches))
    ]
    if not args.no_prefill:
        points.append(Point(f"prefill, 1 × {LONG}", 1, LONG, 1))
        points.append(Point(f"prefill, {NUM_SHORT} × {SHORT}", NUM_SHORT, SHORT, 1))
    return points


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """Raises ValueError for more ranks than cores: their times would say nothing."""
    cores = usable_cores()
    num_seqs = max(*args.batches, NUM_SHORT)
    longest = max(LONG, args.prompt_len + args.output_len)
    common = {
        "max_num_seqs": num_seqs,
        "num_blocks": num_seqs * -(-(args.prompt_len + args.output_len) // 16) + longest // 16,
        "max_num_batched_tokens": BUDGET,
        "prefix_cache": "off",
        **settings_of(args),
    }
    variants = [Variant("one engine", Layout(), {**common, "threads": cores})]
    for size in sorted(set(args.sizes)):
        if not 2 <= size <= cores:
            raise ValueError(f"--sizes {size}: must be between 2 and this machine's {cores} cores")
        threads = {"threads": cores // size}
        split = {"tensor_parallel_size": size}
        variants.append(Variant(f"TP {size}", Layout(size), common | threads | split))
        variants.append(Variant(f"DP {size}", Layout(1, size), common | threads))
    for size in sorted(set(args.stages)):
        if not 2 <= size <= cores:
            raise ValueError(f"--stages {size}: must be between 2 and this machine's {cores} cores")
        split = {"pipeline_parallel_size": size, "threads": cores // size}
        variants.append(Variant(f"PP {size}", Layout(pp=size), common | split))
    return variants


def measure_rounds(variants: list[Variant], points: list[Point], args: argparse.Namespace) -> None:
    """All, round by round. A variant that fails is told and takes no further part."""
    turns = [
        (number, variant)
        for number in range(args.pairs)
        for variant in variants[:: -1 if number % 2 else 1]
    ]
    for number, variant in progress(turns, "measurements"):
        if variant.failure is None:
            try:
                measure(variant, points, number, args)
            except BenchError as error:
                variant.failure = str(error)
                print(f"{variant.name}: {error}")


def measure(variant: Variant, points: list[Point], number: int, args: argparse.Namespace) -> None:
    """One round of a variant; every other round begins with the last point."""
    others = OtherWork()
    with Engines(args.part, args.model, variant, args.verbose) as engines:
        variant.facts = engines.facts
        vocab = args.vocab_size or (engines.facts["shape"] or {}).get("vocab_size") or 1000
        most = max(points, key=lambda point: point.num_prompts)
        engines.run(prompts_of(most, vocab, f"{args.seed} warm-up"), 4)
        for point in points[:: -1 if number % 2 else 1]:
            prompts = prompts_of(point, vocab, f"{args.seed} {number}")
            answer = engines.run(prompts, point.output_len)
            variant.runs.setdefault(point.name, {})[number] = answer
    if (cores := others.cores()) is not None:  # all engines have ended, and count as own work
        variant.other_cores.append(cores)


def prompts_of(point: Point, vocab_size: int, seed: str) -> list[list[int]]:
    lengths = [point.prompt_len] * point.num_prompts
    return random_prompts(lengths, vocab_size, f"{seed} {point.name}")
