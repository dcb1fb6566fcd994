"""`speculative`: decode speed with and without speculation, where drafts are easy and where they are not.

    copy   prompts whose answer repeats long pieces of them: texts to be copied or corrected
    prose  stories, explanations and letters, of which the prompt says nothing

--variants are parts (7, 8), or parts with somebody who drafts (8:ngram 8:self 8:draft=MODEL). Every
measurement is a fresh process that decodes all batches of both kinds; variants take turns, in
alternating order, for --pairs rounds with other prompts in each. Speed: tokens a second from when
all have their first token until all are done; the median of the rounds. Greedy, and no token ends
an answer. Batch 1 is three prompts, one after the other. Ratios are to the first variant, medians
of the rounds' ratios, with a 95% bootstrap interval from 5 rounds on. --set of a field that only
drafting has (num_speculative_tokens, draft_layers, …) is for the variants that draft.
"""

import argparse
from pathlib import Path
from typing import Any

from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    settings_of,
)
from common.bench.core.pairs import MIN_CLAIM, MIN_INTERVAL
from common.bench.core.processes import run_worker
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.ladder import known_vocab_size, most_rounds, remarks
from common.bench.prefix.plot import check_plot
from common.bench.speculative.plot import plot_speculative
from common.bench.speculative.prompts import WORKLOADS, prompt_token_ids
from common.bench.speculative.rows import Point, rows
from common.bench.speculative.variants import (
    Choice,
    Variant,
    choice,
    make_variant,
    measure_variants,
)

BATCH_SIZES = (1, 4, 16, 32)
OUTPUT = 64  # tokens
DEFAULT_VARIANTS = (Choice(7), Choice(8), Choice(8, "ngram"))
COLUMNS = [
    column("workload", "workload"),
    column("batch_size", "batch", digits=0),
    column("engine", "engine"),
    column("rate", "speed", "tok/s", 0),
    column("spread", "spread", "%", 0),
    column("acceptance", "drafts accepted", "%", 0),
    column("draft_length", "draft length", digits=1),
    column("accepted_length", "accepted of it", digits=1),
    column("tokens_per_turn", "tokens a step", digits=2),
    column("step_ms", "step", "ms", 1),
    column("propose_ms", "drafting", "ms", 2),
    column("ratio", "ratio", digits=2),
    column("same", "same tokens", "%", 0),
]
INTERVAL_COLUMNS = [column("ratio_low", "95% from", digits=2), column("ratio_high", "to", digits=2)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants",
        type=choice,
        nargs="+",
        default=list(DEFAULT_VARIANTS),
        metavar="PART[:PROPOSER]",
        help="default: 7 8 8:ngram",
    )
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument(
        "--batches", type=positive, nargs="+", default=list(BATCH_SIZES), help="default: 1 4 16 32"
    )
    add_engine_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--output-len", type=positive, default=OUTPUT, help=f"tokens (default: {OUTPUT})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random token ids (default: 0)")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    if args.output_len < 2:
        raise ValueError(f"--output-len {args.output_len}: the first token is not counted")
    points = [
        Point(workload, size)
        for workload in dict.fromkeys(args.workloads)
        for size in sorted(set(args.batches))
    ]
    settings = {"max_num_seqs": max(args.batches), **settings_of(args)}
    chosen = list(dict.fromkeys(args.variants))
    variants = [make_variant(one, args.model, settings, args.pairs, args.verbose) for one in chosen]
    work = Work(args, points)
    measure_variants(variants, work.of_round, args.pairs)
    device = next((v.facts["device"] for v in variants if v.facts), "cpu").partition(":")[0]
    limits = run_worker({"job": "limits", "device": device, "quick": args.quick_limits})
    result = speculative_result(args, chosen, variants, points, limits)
    if args.plot and result["rows"]:
        plot_speculative(result, args.plot)
    finish(args, result)
    return 1 if any(variant.failure for variant in variants) else 0


class Work:
    """The prompts of every round, as the worker's job takes them."""

    def __init__(self, args: argparse.Namespace, points: list[Point]) -> None:
        """Raises ValueError for a model that cannot be had, or has no chat format."""
        from common.models.checkpoint import resolve
        from common.models.tokenizer import Tokenizer

        self.args, self.points = args, points
        self.tokenizer = Tokenizer.load(resolve(args.model))
        self.vocab_size = known_vocab_size(args.model)
        self.prompt(points[0].workload, 0)

    def prompt(self, workload: str, index: int) -> list[int]:
        return prompt_token_ids(workload, index, self.tokenizer, self.vocab_size, self.args.seed)

    def of_round(self, number: int) -> dict[str, Any]:
        """Every other round begins with the largest batch. The warm-up has the largest batches, so
        where there is a prefix cache it knows all prompts."""
        largest = max(point.batch_size for point in self.points)
        warm_up = [point for point in self.points if point.batch_size == largest]
        return {
            "max_tokens": self.args.output_len,
            "warm_up": [batch for point in warm_up for batch in self.batches(point, number)],
            "points": [
                {"name": point.name, "batches": self.batches(point, number)}
                for point in self.points[:: -1 if number % 2 else 1]
            ],
        }

    def batches(self, point: Point, number: int) -> list[list[list[int]]]:
        return [
            [self.prompt(point.workload, index) for index in batch]
            for batch in point.prompts(number)
        ]


def speculative_result(
    args: argparse.Namespace,
    chosen: list[Choice],
    variants: list[Variant],
    points: list[Point],
    limits: dict[str, Any],
) -> Result:
    rounds = most_rounds(variants)
    columns = list(COLUMNS)
    if rounds >= MIN_INTERVAL:
        columns[-1:-1] = INTERVAL_COLUMNS
    if rounds >= MIN_CLAIM:
        columns.insert(-1, column("no_slower", "no slower"))
    facts = next((variant.facts for variant in variants if variant.facts), None)
    kind = f", {facts['dtype']}, {facts['device']}" if facts else ""
    notes = [
        f"Model {args.model}{kind}, greedy, {args.output_len} tokens each; each measurement in a fresh"
        f" process, variants in turns, speeds are medians of {plural(rounds, 'round')}. Ratio: to"
        f" {variants[0].name}, paired by round; same tokens: as it gave. Tokens a step: of one"
        " sequence. Drafting: a part of the step."
    ]
    return make_result(
        "Decoding with and without speculation",
        columns,
        rows(variants, points),
        limits=limits,
        parts=sorted({one.part for one in chosen}),
        notes=[*notes, *remarks(variants)],
    )
