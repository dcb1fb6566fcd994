"""`prefix`: what a prefix cache finds, and what that saves, on four workloads.

    schema    one system prompt with a JSON schema before every question; all come at once
    document  one long document, and question after question about it, one at a time
    agent     a tree: each prompt is its parent's prompt, what the parent generated, and new tokens
    eviction  more documents than the KV cache holds: few that come back often, many seldom, and some
              that never do; two clients, each with one request at a time

--variants are parts (6), or parts with a kind of cache (7:off 7:hash 7:radix). Every measurement is
a fresh process with an engine for each workload; variants take turns, in alternating order, for
--pairs rounds. Hit rate: prompt tokens found in the cache. TTFT: from handing a request over to its
first token. Ratios are to the first variant, medians of the rounds' ratios, with a 95% bootstrap
interval from 5 rounds on.

--write-jsonl FOLDER writes the workloads for other servers instead, a file each (the format is in
common/bench/prefix/requests.py). --costs measures the caches alone instead: lookup and insert.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    positive_number,
    settings_of,
)
from common.bench.core.pairs import MIN_CLAIM, MIN_INTERVAL
from common.bench.core.processes import run_worker
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.ladder import known_vocab_size, most_rounds, remarks
from common.bench.prefix.plot import check_plot, plot_prefix
from common.bench.prefix.requests import whole_lengths, write_jsonl
from common.bench.prefix.rows import counter_remarks, rows, workload_note
from common.bench.prefix.variants import (
    Variant,
    checked_block_size,
    default_variants,
    make_variant,
    measure_variants,
    part_kind,
)
from common.bench.prefix.workloads import QUICK, WORKLOADS, Sizes, Workload, make_workload

DEFAULT_BLOCK_SIZE = 16  # on a GPU too, so that the same is found there
COLUMNS = [
    column("workload", "workload"),
    column("engine", "engine"),
    column("hit_rate", "hit rate", "%", 0),
    column("ttft_ms", "median TTFT", "ms", 0),
    column("p99_ms", "p99 TTFT", "ms", 0),
    column("ttft_ratio", "TTFT, times shorter", digits=1),
    column("rate", "output", "tok/s", 0),
    column("total_s", "total", "s", 2),
    column("ratio", "times faster", digits=2),
    column("same", "same tokens", "%", 0),
]
SERIAL_COLUMNS = [
    column("first_ms", "TTFT of the first", "ms", 0),
    column("others_ms", "of the others", "ms", 0),
]
INTERVAL_COLUMNS = [column("ratio_low", "95% from", digits=2), column("ratio_high", "to", digits=2)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants",
        type=part_kind,
        nargs="+",
        metavar="PART[:KIND]",
        help="default: the first part that has caches, with each kind, after the part before it",
    )
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    add_engine_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=3, help="rounds (default: 3)")
    parser.add_argument("--document-len", type=positive, help="tokens (default: 1200)")
    parser.add_argument(
        "--kv-share",
        type=positive_number,
        default=0.4,
        help="eviction: documents that the KV cache holds, of all (default: 0.4)",
    )
    parser.add_argument("--quick", action="store_true", help="small workloads, for a small model")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--vocab-size", type=positive, help="draw token ids below this")
    parser.add_argument("--write-jsonl", type=Path, metavar="FOLDER", help="write the workloads")
    parser.add_argument("--costs", action="store_true", help="measure the caches without an engine")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.costs:
        from common.bench.prefix.costs import run_costs

        if args.plot or args.write_jsonl:
            raise ValueError("--costs draws nothing and writes no workloads: see --json")
        return run_costs(args)
    if args.plot:
        check_plot(args.plot)
    settings = {"block_size": DEFAULT_BLOCK_SIZE, **settings_of(args)}
    block_size = checked_block_size(settings["block_size"])
    if given := {"num_blocks", "kv_cache_memory"} & settings.keys():
        raise ValueError(f"--set {min(given)}: the workloads decide that; see --kv-share")
    vocab_size = args.vocab_size or known_vocab_size(args.model)
    workloads = make_workloads(args, vocab_size, block_size)
    if args.write_jsonl:
        return write_workloads(args.write_jsonl, workloads)
    chosen = args.variants or default_variants()
    variants = [
        make_variant(part, kind, args.model, settings, args.pairs, args.verbose)
        for part, kind in dict.fromkeys(chosen)
    ]
    check_lengths(args, workloads)
    work = {
        "vocab_size": vocab_size,
        "workloads": [
            {
                "name": workload.name,
                "requests": [vars(request) for request in workload.requests],
                "num_blocks": workload.num_blocks,
            }
            for workload in workloads
        ],
    }
    measure_variants(variants, work, args.pairs)
    device = next((v.facts["device"] for v in variants if v.facts), "cpu").partition(":")[0]
    limits = run_worker({"job": "limits", "device": device, "quick": args.quick_limits})
    parts = sorted({part for part, _ in chosen})
    result = prefix_result(args, parts, variants, workloads, block_size, limits)
    if args.plot and result["rows"]:
        plot_prefix(result, args.plot)
    finish(args, result)
    return 1 if any(variant.failure for variant in variants) else 0


def make_workloads(args: argparse.Namespace, vocab_size: int, block_size: int) -> list[Workload]:
    sizes = QUICK if args.quick else Sizes()
    if args.document_len:
        sizes = replace(sizes, document=args.document_len)
    return [
        make_workload(name, sizes, vocab_size, args.seed, block_size, args.kv_share)
        for name in dict.fromkeys(args.workloads)
    ]


def write_workloads(folder: Path, workloads: list[Workload]) -> int:
    for workload in workloads:
        path = folder / f"{workload.name}.jsonl"
        write_jsonl(path, workload.requests)
        print(f"{path}: {plural(len(workload.requests), 'request')}; {workload.text}")
    return 0


def check_lengths(args: argparse.Namespace, workloads: list[Workload]) -> None:
    """Raise ValueError where the model's context is too short."""
    from common.models.checkpoint import read_json, resolve

    context = read_json(resolve(args.model) / "config.json").get("max_position_embeddings")
    context = settings_of(args).get("max_model_len") or context
    for workload in workloads:
        longest = max(whole_lengths(workload.requests).values())
        if context is not None and longest > context:
            flag = f"--document-len {args.document_len or Sizes.document}"
            raise ValueError(
                f"{flag if workload.name == 'document' else workload.name}: {longest} tokens with"
                f" question and answer, and {args.model} has a context of {context}; see --quick"
            )


def prefix_result(
    args: argparse.Namespace,
    parts: list[int],
    variants: list[Variant],
    workloads: list[Workload],
    block_size: int,
    limits: dict[str, Any],
) -> Result:
    rounds = most_rounds(variants)
    columns = list(COLUMNS)
    if rounds >= MIN_INTERVAL:
        columns[-1:-1] = INTERVAL_COLUMNS
    if rounds >= MIN_CLAIM:
        columns.insert(-1, column("no_slower", "no slower"))
    if any(workload.is_serial for workload in workloads):
        columns[5:5] = SERIAL_COLUMNS
    facts = next((variant.facts for variant in variants if variant.facts), None)
    kind = f", {facts['dtype']}, {facts['device']}" if facts else ""
    notes = [
        f"Model {args.model}{kind}, greedy, blocks of {block_size}; each measurement in a fresh"
        f" process, variants in turns, medians of {plural(rounds, 'round')}, p99 over all of them."
        f" Ratios: to {variants[0].name}, paired by round; that of TTFT where requests come one at"
        " a time is of those after the first. Same tokens: as it gave."
    ]
    notes += [workload_note(workload, variants, block_size) for workload in workloads]
    notes += [*counter_remarks(variants), *remarks(variants)]
    table = list(rows(variants, workloads, block_size))
    title = "Prefix caching"
    return make_result(title, columns, table, limits=limits, parts=parts, notes=notes)
