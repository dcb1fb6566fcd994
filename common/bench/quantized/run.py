"""`formats`: number formats side by side: bits, memory, start-up, speed, and what `quality` found.

Each measurement is a fresh process; formats take turns, in alternating order, for --pairs rounds. Before
them each is started once with an empty cache of quantised weights, its own (the first start); its later
starts map what that one has kept. Speeds are of decoding alone, from prompts of --prompt-len tokens.

    bits a weight      bytes of all weights, scales among them, over their number
    of the formula     these bytes over what the format says, matrix by matrix
    peak of loading    private memory while the engine is built, beyond what its imports take
    of the read limit  weights, and keys and values, over a step's time, over the measured bandwidth

--kv compares formats of keys and values, by default in contexts of 1,024 tokens. --quality joins the
numbers of `python -m common.bench quality`, by the variants' names.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.bench import BenchError
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    progress,
    settings_of,
    variant,
)
from common.bench.core.processes import part_package, run_worker
from common.bench.core.rates import BATCH_SIZES
from common.bench.core.report import plural
from common.bench.core.results import Result, make_result
from common.bench.ladder import most_rounds, remarks
from common.bench.quantized.rows import columns, read_quality, rows
from common.bench.quantized.sizes import checkpoint_shapes
from common.bench.quantized.variants import (
    KV,
    WEIGHTS,
    FormatVariant,
    empty_caches,
    make_variant,
    start_first,
)
from common.bench.speculative.variants import measure_variants

PROMPT, KV_PROMPT, OUTPUT = 32, 1024, 48
KV_BATCH_SIZES = (1, 4, 8)
MOST_TOKENS_A_STEP = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", type=positive, default=14, help="part number (default: 14)")
    add_engine_arguments(parser)
    parser.add_argument("--kv", action="store_true", help="formats of keys and values")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the built-in variants")
    parser.add_argument(
        "--variant",
        dest="variants",
        type=variant,
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,…",
        help="one more, by fields of its EngineConfig; may be repeated",
    )
    parser.add_argument("--batch-sizes", type=positive, nargs="+", help="1 4 16 32; --kv: 1 4 8")
    parser.add_argument("--prompt-len", type=positive, help="tokens (32; --kv: 1024)")
    parser.add_argument("--output-len", type=positive, default=OUTPUT, help=f"default: {OUTPUT}")
    parser.add_argument("--pairs", type=positive, default=3, help="rounds (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--quality", type=Path, metavar="FILE", help="a result of `quality`")
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    part_package(args.part)
    if args.plot and args.plot.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must name a .png or an .svg, not {args.plot.name!r}")
    if args.plot and (args.kv or not args.quality):
        raise ValueError("--plot needs --quality, and has no meaning for --kv")
    quality = read_quality(args.quality)
    args.batch_sizes = sorted(set(args.batch_sizes or (KV_BATCH_SIZES if args.kv else BATCH_SIZES)))
    args.prompt_len = args.prompt_len or (KV_PROMPT if args.kv else PROMPT)
    shapes = checkpoint_shapes(args.model)
    with empty_caches() as new_cache:
        variants = make_variants(args, new_cache)
        measure(variants, args)
    measured = [entrant for entrant in variants if entrant.rates]
    if not measured:
        raise BenchError("nothing was measured")
    device = measured[0].facts["device"].partition(":")[0]
    limits = run_worker({"job": "limits", "device": device, "quick": args.quick_limits})
    lengths = args.prompt_len, args.output_len
    table = list(rows(measured, shapes, quality, limits["read_gbps"], *lengths))
    result = formats_result(args, variants, table, limits)
    if args.plot:
        from common.bench.quantized.plot import plot_formats

        plot_formats(result, args.plot)
    finish(args, result)
    return 1 if any(entrant.failure for entrant in variants) else 0


def make_variants(
    args: argparse.Namespace, new_cache: Callable[[], dict[str, str]]
) -> list[FormatVariant]:
    """Each with a cache of its own, whatever formats others share with it. Raises ValueError."""
    built_in = KV if args.kv else WEIGHTS
    unknown = set(args.only or ()) - set(built_in)
    if unknown:
        known = ", ".join(built_in)
        raise ValueError(f"--only {sorted(unknown)[0]!r}: the built-in variants are: {known}")
    chosen = {name: built_in[name] for name in built_in if name in (args.only or built_in)}
    if both := set(chosen) & {name for name, _ in args.variants}:
        raise ValueError(f"--variant {sorted(both)[0]!r}: there is a built-in one of this name")
    largest = max(args.batch_sizes)
    base = {
        "max_num_seqs": largest,
        "max_num_batched_tokens": min(MOST_TOKENS_A_STEP, max(256, largest * args.prompt_len)),
        "max_model_len": args.prompt_len + args.output_len + 1,
        **settings_of(args),
    }
    return [
        make_variant(
            name, fields, args.part, args.model, base, args.pairs, new_cache(), args.verbose
        )
        for name, fields in [*chosen.items(), *args.variants]
    ]


def measure(variants: list[FormatVariant], args: argparse.Namespace) -> None:
    """First starts, then the rounds. One that fails is told and takes no further part."""

    def work(number: int) -> dict[str, Any]:
        lengths = {"prompt_len": args.prompt_len, "output_len": args.output_len}
        order = args.batch_sizes[:: -1 if number % 2 else 1]
        return {**lengths, "batch_sizes": order, "seed": f"{args.seed} {number}"}

    for entrant in progress(variants, "first starts"):
        try:
            start_first(entrant, work(0))
        except BenchError as error:
            entrant.failure = str(error)
            print(f"{entrant.name}: {error}", file=sys.stderr)
    measure_variants(list(variants), work, args.pairs)


def formats_result(
    args: argparse.Namespace,
    variants: list[FormatVariant],
    table: list[dict[str, Any]],
    limits: dict[str, Any],
) -> Result:
    kind = "keys and values" if args.kv else "weights"
    notes = [
        f"Model {args.model}, greedy; each measurement in a fresh process, formats in turns, medians of"
        f" {plural(most_rounds(list(variants)), 'round')}. Decoding alone, {args.output_len} tokens"
        f" after {args.prompt_len}; read limit: at batch {min(args.batch_sizes)}."
    ]
    if any(row["kl"] is not None for row in table):
        notes.append(f"Quality: from {args.quality.name}, which says on what text.")
    elif args.quality:
        notes.append(f"No variant here is one of {args.quality.name}: quality is not known.")
    notes += remarks(list(variants))
    return make_result(
        f"Formats of {kind}",
        columns(args.batch_sizes),
        table,
        limits=limits,
        parts=[args.part],
        notes=notes,
    )
