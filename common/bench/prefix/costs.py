"""`prefix --costs`: what a part's prefix caches take by themselves, without a model.

    one prompt    of N blocks
    many prompts  of 32 blocks each; all begin with the same 16, so that N blocks are distinct

Each prompt is inserted (published), all are given up, and then looked up by new sequences with the
same tokens; sequences with other tokens find nothing; at last N blocks are taken from the full
cache, which has to forget what was in them. Milliseconds per 1,000 blocks: of the prompts' for
lookup and release, of new ones for insertion and eviction. Hashing the tokens of a new sequence is
part of its lookup, and of its insertion what is left of it.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import finish, progress, settings_of
from common.bench.core.processes import part_package
from common.bench.core.results import column, make_result
from common.bench.core.workload import random_prompts
from common.bench.prefix.variants import checked_block_size, default_variants, make_variant, run_job

VOCAB_SIZE = 50_000
NUM_BLOCKS, QUICK_NUM_BLOCKS = (1_000, 10_000), (64,)
BRANCH, TRUNK = 32, 16  # blocks of each of many prompts, and those of them that all share
REPEATS = 5
OPERATIONS = ("lookup", "insert", "release", "evict")
COLUMNS = [
    column("cache", "cache"),
    column("prompts", "prompts"),
    column("num_blocks", "blocks", digits=0),
    *(column(f"{name}_ms", name, "ms per 1,000 blocks", 3) for name in OPERATIONS),
    column("miss_us", "lookup of a miss", "µs per prompt", 0),
]


@dataclass(frozen=True)
class Case:
    """Prompts whose full blocks are `num_blocks` distinct ones. Each ends with a token more."""

    name: str
    num_blocks: int
    prompts: list[list[int]]
    others: list[list[int]]  # that have nothing in common with them, as many and as long


def make_cases(num_blocks: int, block_size: int, seed: int) -> list[Case]:
    """The one prompt and the many."""
    count = (num_blocks - TRUNK) // (BRANCH - TRUNK)

    def tokens(name: str, blocks: list[int]) -> list[list[int]]:
        lengths = [number * block_size for number in blocks]
        return random_prompts(lengths, VOCAB_SIZE, f"{seed} {name} {num_blocks}")

    [trunk] = tokens("trunk", [TRUNK])
    [one], [other] = tokens("one", [num_blocks]), tokens("other", [num_blocks])
    branches = tokens("branches", [BRANCH - TRUNK] * count)
    return [
        Case("one", num_blocks, [[*one, 0]], [[*other, 0]]),
        Case(
            f"{count} of {BRANCH}",
            TRUNK + count * (BRANCH - TRUNK),
            [[*trunk, *branch, 0] for branch in branches],
            [[*prompt, 0] for prompt in tokens("others", [BRANCH] * count)],
        ),
    ]


def run_costs(args: argparse.Namespace) -> int:
    """Measure the kinds of cache of --variants, each in a fresh process."""
    chosen = [pair for pair in args.variants or default_variants() if pair[1] not in (None, "off")]
    if not chosen:
        raise ValueError("--costs: --variants must name a cache, as in 7:hash")
    block_size = checked_block_size(settings_of(args).get("block_size", 16))
    for part, kind in chosen:
        make_variant(part, kind, args.model, {}, 1, args.verbose)  # whether the part has it
    rows: list[dict[str, Any]] = []
    for part, kind in progress(chosen, "caches"):
        job = {
            "job": "prefix_costs",
            "part": part,
            "kind": kind,
            "block_size": block_size,
            "num_blocks": QUICK_NUM_BLOCKS if args.quick else NUM_BLOCKS,
            "seed": args.seed,
        }
        rows += run_job(job, args.verbose)["rows"]
    rows.sort(key=lambda row: (row["num_blocks"], row["prompts"] == "one"))
    result = make_result(
        "What prefix caches cost",
        COLUMNS,
        rows,
        limits={"unmeasured": "only the host works here"},
        parts=sorted({part for part, _ in chosen}),
        notes=[
            f"Blocks of {block_size} tokens; medians of {REPEATS} runs in one process. Lookup: by a"
            " new sequence, whose tokens are hashed for it; per 1,000 blocks of its prompt. Insert,"
            " evict: per 1,000 blocks that come or go. Many prompts share their first"
            f" {TRUNK} blocks."
        ],
    )
    finish(args, result)
    return 0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "kind", "block_size", "num_blocks", "seed"} -> a row for each case. In the worker."""
    package = part_package(job["part"])
    make_cache = importlib.import_module(f"{package}.prefix_cache").make_block_cache
    pool_class = importlib.import_module(f"{package}.kv_cache").BlockPool
    sequence_class = importlib.import_module(f"{package}.sequence").Sequence
    from common.requests import Request
    from common.sampling import SamplingParams

    def sequences(prompts: list[list[int]]) -> list[Any]:
        requests = [Request(str(n), prompt, params) for n, prompt in enumerate(prompts)]
        return [
            sequence_class(request, 0, frozenset(), request.limit(1 << 30)) for request in requests
        ]

    params, size, kind = SamplingParams(), job["block_size"], job["kind"]
    rows = []
    for num_blocks in job["num_blocks"]:
        for case in make_cases(num_blocks, size, job["seed"]):
            runs = []
            for _ in range(REPEATS):
                cache = make_cache(kind, pool_class(case.num_blocks), size)
                new = map(sequences, (case.prompts, case.prompts, case.others))
                runs.append(times(cache, case, size, *new))
            row = {"cache": kind, "prompts": case.name, "num_blocks": case.num_blocks}
            for name in runs[0]:
                row[name] = statistics.median(run[name] for run in runs)
            rows.append(row)
    return {"rows": rows}


def times(
    cache: Any, case: Case, block_size: int, first: list[Any], again: list[Any], others: list[Any]
) -> dict[str, float]:
    """One run of a case, on sequences that the cache has not seen. Raises BenchError where it finds
    other than it should."""
    spent = dict.fromkeys(OPERATIONS, 0.0)

    def timed(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        answer = call(*arguments)
        spent[name] += time.perf_counter() - begin
        return answer

    for sequence in first:
        count = len(sequence.prompt_token_ids) // block_size
        found = look_up(cache, sequence)
        sequence.block_table = found + cache.allocate(count - len(found))
        timed("insert", cache.publish, sequence, count * block_size)
    release(cache, first, timed)
    num_found = 0
    for sequence in again:
        sequence.block_table = timed("lookup", look_up, cache, sequence)
        num_found += len(sequence.block_table)
    num_in_prompts = sum(len(prompt) // block_size for prompt in case.prompts)
    if num_found != num_in_prompts:
        raise BenchError(f"{num_found} blocks found of {num_in_prompts}")
    release(cache, again, timed)
    begin = time.perf_counter()
    tables = [look_up(cache, sequence) for sequence in others]
    miss = (time.perf_counter() - begin) / len(others)
    if any(tables):
        raise BenchError(f"{sum(map(len, tables))} blocks found of prompts that were never there")
    release(cache, others, lambda _, call, *arguments: call(*arguments))
    timed("evict", cache.allocate, case.num_blocks)
    per_thousand = {
        "insert_ms": spent["insert"] / case.num_blocks,
        "lookup_ms": spent["lookup"] / num_in_prompts,
        "release_ms": spent["release"] / (2 * num_in_prompts),
        "evict_ms": spent["evict"] / case.num_blocks,
    }
    return {name: 1e6 * value for name, value in per_thousand.items()} | {"miss_us": 1e6 * miss}


def look_up(cache: Any, sequence: Any) -> list[int]:
    """The blocks found for a sequence, which it owns from now on."""
    found = cache.match(sequence)
    cache.take(sequence, found)
    return found.blocks


def release(cache: Any, sequences: list[Any], timed: Callable[..., Any]) -> None:
    for sequence in sequences:
        timed("release", cache.release, sequence)
        sequence.block_table = []
