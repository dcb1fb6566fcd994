"""`router`: several engines behind part 10's router: what each policy finds in their prefix caches.

The workload is `prefix`'s tree of an agent, several of them at once: each prompt is its parent's, what
the parent generated, and new tokens. Each measurement is a fresh router with fresh engines; policies
take turns, in alternating order, for --pairs rounds. Hit rate: prompt tokens that an engine found in
its cache. Skew: requests of the busiest engine, to an equal share of them. TTFT: from sending a
request to its first token.

--overhead measures the router alone instead, over servers without an engine: see
common/bench/router/overhead.py.
"""

import argparse
import asyncio
import statistics
from collections import Counter
from typing import Any

from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    positive_number,
    progress,
    settings_of,
)
from common.bench.core.latencies import percentile, spread_percent
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.processes import run_worker
from common.bench.core.report import plural
from common.bench.core.results import column, make_result
from common.bench.prefix.workloads import QUICK, Sizes
from common.bench.router import overhead
from common.bench.router.agents import Run, make_trees, run_agents
from common.bench.router.processes import router_process
from common.router.config import POLICIES

PART, BLOCK_SIZE = 10, 16
COLUMNS = [
    column("policy", "policy"),
    column("hit_rate", "hit rate", "%", 0),
    column("hit_ratio", "times that of the first", digits=2),
    column("skew", "skew", digits=2),
    column("ttft_ms", "median TTFT", "ms", 0),
    column("p99_ms", "p99 TTFT", "ms", 0),
    column("total_s", "total", "s", 1),
    column("ratio", "times faster than the first", digits=2),
    column("spread", "spread", "%", 0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policies", choices=POLICIES, nargs="+", help="default: all")
    parser.add_argument("--engines", type=positive, default=4, help="default: 4")
    parser.add_argument("--agents", type=positive, default=8, help="trees at once (default: 8)")
    parser.add_argument(
        "--kv-share",
        type=positive_number,
        default=1.25,
        help="an engine's KV cache, in equal shares of all trees (default: 1.25)",
    )
    parser.add_argument("--pairs", type=positive, default=3, help="rounds (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small trees, for a small model")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--overhead", action="store_true", help="measure the router alone")
    parser.add_argument("--streams", type=positive, default=1000, help="with --overhead: at once")
    parser.add_argument(
        "--requests", type=positive, default=2000, help="with --overhead: one by one"
    )
    add_engine_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.overhead:
        return overhead.run(args)
    sizes = QUICK if args.quick else Sizes()
    policies = list(dict.fromkeys(args.policies or ("round-robin", *POLICIES)))
    turns = [
        (number, policy)
        for number in range(args.pairs)
        for policy in policies[:: -1 if number % 2 else 1]
    ]
    runs: dict[str, dict[int, Run]] = {policy: {} for policy in policies}
    others = OtherWork()
    for number, policy in progress(turns, "measurements"):
        seed = args.seed + number
        blocks = num_blocks(args, sizes, seed)
        flags = ["--dp", str(args.engines), "--policy", policy, "--model", args.model]
        flags += ["--block-size", str(BLOCK_SIZE), "--num-blocks", str(blocks)]
        for name, value in settings_of(args).items():
            flags += [f"--{name.replace('_', '-')}", str(value)]
        with router_process(f"part{PART}.router", *flags, verbose=args.verbose) as (url, _):
            runs[policy][number] = asyncio.run(
                run_agents(url, args.model, sizes, args.agents, seed)
            )
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    rows = [row(policy, runs, args.engines) for policy in policies]
    trees = len(next(iter(runs[policies[0]].values())).records) // args.agents
    notes = [
        f"Model {args.model}, greedy; {args.engines} engines on one machine, each with its share of"
        f" the cores; {plural(args.agents, 'agent')} at once, each a tree of {trees} requests"
        f" (`prefix`'s workload `agent`); the KV cache of an engine has {blocks} blocks of"
        f" {BLOCK_SIZE}, {args.kv_share:g} times its share of the trees; fresh engines for each measurement, policies in turns,"
        f" medians of {plural(args.pairs, 'round')}, p99 over all of them. `session` gets the"
        " agent's number as the session's name."
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Disturbed: {remark}.")
    title = "Routing policies on branching agents"
    result = make_result(title, COLUMNS, rows, limits=limits, parts=[PART], notes=notes)
    finish(args, result)
    return 0


def num_blocks(args: argparse.Namespace, sizes: Sizes, seed: int) -> int:
    """Blocks for the trees' tokens, each once, by `--kv-share`."""
    trees = make_trees(args.model, sizes, args.agents, seed)
    blocks = sum(
        -(-(len(request.prompt_token_ids) + request.max_tokens) // BLOCK_SIZE)
        for tree in trees
        for request in tree
    )
    return int(args.kv_share * blocks / args.engines)


def row(policy: str, runs: dict[str, dict[int, Run]], engines: int) -> dict[str, Any]:
    mine, first = list(runs[policy].values()), list(next(iter(runs.values())).values())
    ttfts = [1000 * record.ttft for run in mine for record in run.records]
    seconds = [run.seconds for run in mine]

    def skew(run: Run) -> float:
        busiest = max(Counter(record.engine for record in run.records).values())
        return busiest * engines / len(run.records)

    is_first = mine == first
    ratios = [b.hit_rate / a.hit_rate for a, b in zip(first, mine, strict=True) if a.hit_rate]
    speeds = [a.seconds / b.seconds for a, b in zip(first, mine, strict=True)]
    return {
        "policy": policy,
        "hit_rate": 100 * statistics.median(run.hit_rate for run in mine),
        "hit_ratio": None if is_first or not ratios else statistics.median(ratios),
        "skew": statistics.median(map(skew, mine)),
        "ttft_ms": statistics.median(ttfts),
        "p99_ms": percentile(ttfts, 99),
        "total_s": statistics.median(seconds),
        "ratio": None if is_first else statistics.median(speeds),
        "spread": spread_percent(seconds),
        "hit_rates": [100 * run.hit_rate for run in mine],
        "seconds": seconds,
    }
