"""`disagg`: what streams notice of long prompts: one engine, or prefill apart from decode.

--streams clients read answers one after the other, while long prompts arrive at fixed times, in every
contender the same. ITL: time between two tokens of a stream. TTFT: of the long prompts. Then a crowd
of equal requests, --crowd-at-once at a time, as fast as they are answered: the throughput.

All contenders have the same cores. One engine uses all of them for each step; two engines, or a
prefill and a decode worker, have half of them each. A contender is a fresh process for each round; contenders
take turns, in alternating order.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
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
from common.bench.core.pairs import paired_ratio
from common.bench.core.processes import as_flags, run_worker
from common.bench.core.results import column, make_result
from common.bench.disagg.load import Seen, Sizes, measure
from common.bench.ladder import known_vocab_size
from common.bench.router.processes import router_process
from common.device import usable_cores

PART = 13
SMALL_BUDGET = 64  # tokens a step: the other way to keep steps short
COLUMNS = [
    column("engine", "engine"),
    column("itl_p50", "ITL p50", "ms", 0),
    column("itl_p99", "p99", "ms", 0),
    column("itl_max", "longest", "ms", 0),
    column("itl_ratio", "p99, times shorter", digits=1),
    column("ttft_p50", "TTFT of long prompts, p50", "ms", 0),
    column("ttft_p99", "p99", "ms", 0),
    column("stream_rate", "streams", "tok/s", 0),
    column("crowd_rate", "crowd", "tok/s", 0),
    column("crowd_ratio", "times", digits=2),
]


@dataclass
class Contender:
    name: str
    module: str
    flags: list[str]
    seen: dict[int, Seen] = field(default_factory=dict)  # by round
    failure: str | None = None

    def each(self, value: Callable[[Seen], float]) -> dict[int, float]:
        return {number: value(seen) for number, seen in self.seen.items()}

    def median(self, value: Callable[[Seen], float]) -> float:
        return statistics.median(self.each(value).values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for one in fields(Sizes):
        kind = positive if one.type is int else positive_number
        flag = f"--{one.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=one.default, help=f"default: {one.default}")
    parser.add_argument("--transfer", default="shm", help="of the workers' KV (default: shm)")
    parser.add_argument("--pairs", type=positive, default=3, help="rounds (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_engine_arguments(parser)
    add_output_arguments(parser)


def contenders(args: argparse.Namespace) -> list[Contender]:
    cores = usable_cores()
    half = max(1, cores // 2)
    common = ["--model", args.model, *as_flags(settings_of(args))]
    before = f"part{PART - 1}"
    whole = [*common, "--threads", str(cores)]
    budget = ["--max-num-batched-tokens", str(SMALL_BUDGET)]
    each = [*common, "--threads", str(half)]
    workers = ["--role", "proxy", "--num-prefill", "1", "--num-decode", "1"]
    workers += ["--kv-transfer", args.transfer]
    return [
        Contender("one engine", f"{before}.server", whole),
        Contender(f"one engine, {SMALL_BUDGET} tokens a step", f"{before}.server", whole + budget),
        Contender("two engines and a router", f"{before}.router", ["--dp", "2", *each]),
        Contender("prefill and decode workers", f"part{PART}.server", workers + each),
    ]


def run(args: argparse.Namespace) -> int:
    sizes = Sizes(**{one.name: getattr(args, one.name) for one in fields(Sizes)})
    vocab_size, all_of_them = known_vocab_size(args.model), contenders(args)
    others = OtherWork()
    turns = [
        (number, one)
        for number in range(args.pairs)
        for one in all_of_them[:: -1 if number % 2 else 1]
    ]
    for number, one in progress(turns, "measurements"):
        if one.failure is None:
            take_turn(one, sizes, vocab_size, f"{args.seed} {number}", number, args.verbose)
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    measured = [one for one in all_of_them if one.seen]
    rows = [row(one, all_of_them[0]) for one in measured]
    notes = [
        f"Model {args.model}, greedy, {usable_cores()} cores for all of a contender. {sizes.streams}"
        f" streams ({sizes.stream_prompt} tokens in, {sizes.stream_output} out, one after the other);"
        f" a prompt of {sizes.long_prompt} tokens every {sizes.gap:g} s, {sizes.longs} of them. Crowd:"
        f" {sizes.crowd} requests, {sizes.crowd_at_once} at a time, {sizes.crowd_prompt} tokens in and"
        f" {sizes.crowd_output} out; prompts count as tokens. KV by {args.transfer}. Fresh processes, in"
        f" turns, {args.pairs} rounds; percentiles are over all rounds, ratios medians of the rounds'.",
        *(f"{one.name} failed: {one.failure}" for one in all_of_them if one.failure),
    ]
    if remark := disturbance(others.cores()):
        notes.append(f"Cores were busy, with the contenders themselves included: {remark}.")
    splits = [seen.split for seen in all_of_them[-1].seen.values() if seen.split]
    notes += [split_note(splits)] if splits else []
    result = make_result(
        "Long prompts among streams",
        COLUMNS,
        rows,
        limits=limits,
        parts=[PART - 1, PART],
        notes=notes,
        extra={"splits": splits},
    )
    finish(args, result)
    return 1 if any(one.failure for one in all_of_them) else 0


def take_turn(
    one: Contender, sizes: Sizes, vocab_size: int, seed: str, number: int, verbose: bool
) -> None:
    try:
        with router_process(one.module, *one.flags, verbose=verbose) as (url, _):
            one.seen[number] = asyncio.run(measure(url, sizes, vocab_size, seed))
    except BenchError as error:
        one.failure = str(error)
        print(f"{one.name}: {error}", file=sys.stderr)
    except ExceptionGroup as errors:
        one.failure = str(errors.exceptions[0])
        print(f"{one.name}: {one.failure}", file=sys.stderr)


def row(one: Contender, first: Contender) -> dict[str, Any]:
    itls = [1000 * value for seen in one.seen.values() for value in seen.itls]
    ttfts = [1000 * value for seen in one.seen.values() for value in seen.ttfts]

    def p99(seen: Seen) -> float:
        return percentile(seen.itls, 99)

    def crowd(seen: Seen) -> float:
        return seen.crowd_rate

    is_first = one is first
    return {
        "engine": one.name,
        "itl_p50": percentile(itls, 50),
        "itl_p99": percentile(itls, 99),
        "itl_max": max(itls),
        "itl_ratio": None if is_first else paired_ratio(first.each(p99), one.each(p99)).median,
        "ttft_p50": percentile(ttfts, 50),
        "ttft_p99": percentile(ttfts, 99),
        "stream_rate": one.median(lambda seen: seen.stream_rate),
        "crowd_rate": one.median(crowd),
        "crowd_ratio": None
        if is_first
        else paired_ratio(one.each(crowd), first.each(crowd)).median,
        "itls_p99_ms": [1000 * value for value in one.each(p99).values()],
        "crowd_rates": list(one.each(crowd).values()),
    }


def split_note(splits: list[dict[str, float]]) -> str:
    """The mean time to first token, by what it was spent on."""
    names = list(splits[0])
    mean = {name: statistics.mean(one[name] for one in splits if name in one) for name in names}
    text = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in mean.items())
    return f"Mean time to first token of the long prompts, prefilled by another worker: {text}."
