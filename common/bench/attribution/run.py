"""`attribution`: part 15 with everything on, with each technique off in turn, and with nothing on.

    schema, document, agent, eviction   the workloads of `prefix`
    chat, documents                     lengths as in ShareGPT and LongBench (common/bench/attribution/mixes.py)

What a technique is worth here is what is lost without it while all others stay, so the shares do not add
up: a prefix cache leaves chunked prefill less to do. Quantised weights and keys change the tokens, which
the column "same tokens" shows. Asynchronous scheduling does nothing beside speculation: to see it, leave
speculation off throughout (--without speculation).

Every measurement is a fresh process with an engine for each workload; the engines take turns, in
alternating order, for --pairs rounds. Ratios are to everything, medians of the rounds' ratios, with a 95%
bootstrap interval from 5 rounds on. --write-workloads FOLDER writes the workloads as JSON lines instead.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.bench.attribution.mixes import MIXES, make_mix
from common.bench.attribution.plot import plot_attribution
from common.bench.attribution.techniques import (
    EVERYTHING,
    NAMES,
    TECHNIQUES,
    Configuration,
    configurations,
    known_techniques,
)
from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    positive_number,
    settings_of,
)
from common.bench.core.pairs import MIN_INTERVAL
from common.bench.core.processes import run_worker
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.ladder import known_vocab_size, most_rounds, remarks
from common.bench.prefix import variants as prefix_variants
from common.bench.prefix.plot import check_plot
from common.bench.prefix.requests import whole_lengths, write_jsonl
from common.bench.prefix.rows import counter_remarks, rows, workload_note
from common.bench.prefix.variants import Variant, checked_block_size, config_class
from common.bench.prefix.workloads import QUICK, WORKLOADS, Sizes, Workload, make_workload

PART = 15
BLOCK_SIZE = 16
QUICK_SCALE = 0.06
COLUMNS = [
    column("workload", "workload"),
    column("engine", "engine"),
    column("rate", "output", "tok/s", 0),
    column("ratio", "of everything's", digits=2),
    column("ttft_ms", "median TTFT", "ms", 0),
    column("p99_ms", "p99 TTFT", "ms", 0),
    column("hit_rate", "hit rate", "%", 0),
    column("same", "same tokens", "%", 0),
]
INTERVAL_COLUMNS = [column("ratio_low", "95% from", digits=2), column("ratio_high", "to", digits=2)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*WORKLOADS, *MIXES]
    parser.add_argument("--part", type=positive, default=PART, help=f"default: {PART}")
    parser.add_argument("--techniques", choices=NAMES, nargs="+", default=list(NAMES))
    parser.add_argument(
        "--without", choices=NAMES, nargs="+", default=[], help="off throughout, in everything too"
    )
    parser.add_argument("--workloads", choices=names, nargs="+", default=names)
    add_engine_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--scale", type=positive_number, help="of the lengths of chat and documents (default: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="small workloads, for a small model")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--vocab-size", type=positive, help="draw token ids below this")
    parser.add_argument(
        "--write-workloads", type=Path, metavar="FOLDER", help="and do nothing else"
    )
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    settings = {"block_size": BLOCK_SIZE, **settings_of(args)}
    block_size = checked_block_size(settings["block_size"])
    if given := {"num_blocks", "kv_cache_memory"} & settings.keys():
        raise ValueError(f"--set {min(given)}: the workloads decide that")
    vocab_size = args.vocab_size or known_vocab_size(args.model)
    workloads = make_workloads(args, vocab_size, block_size)
    if args.write_workloads:
        return write_workloads(args.write_workloads, workloads)
    engines, left_out = make_engines(args, settings)
    variants = [make_variant(engine, args) for engine in engines]
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
    prefix_variants.measure_variants(variants, work, args.pairs)
    device = next((v.facts["device"] for v in variants if v.facts), "cpu").partition(":")[0]
    limits = run_worker({"job": "limits", "device": device, "quick": args.quick_limits})
    result = attribution_result(args, variants, workloads, left_out, block_size, limits)
    if args.plot and result["rows"]:
        plot_attribution(result, args.plot)
    finish(args, result)
    return 1 if any(variant.failure for variant in variants) else 0


def make_workloads(args: argparse.Namespace, vocab_size: int, block_size: int) -> list[Workload]:
    """Those asked for. Raises ValueError where the model's context is too short."""
    from common.models.checkpoint import read_json, resolve
    from common.models.tokenizer import Tokenizer

    folder = resolve(args.model)
    context = read_json(folder / "config.json").get("max_position_embeddings") or 1 << 30
    context = settings_of(args).get("max_model_len") or context
    tokenizer = Tokenizer.load(folder) if set(args.workloads) & set(MIXES) else None
    sizes, scale = (QUICK, QUICK_SCALE) if args.quick else (Sizes(), 1.0)
    workloads = []
    for name in dict.fromkeys(args.workloads):
        if name in MIXES:
            drawn = (tokenizer, vocab_size, args.seed, block_size, args.scale or scale, context)
            workloads.append(make_mix(name, *drawn))
        else:
            workloads.append(make_workload(name, sizes, vocab_size, args.seed, block_size, 0.4))
        longest = max(whole_lengths(workloads[-1].requests).values())
        if longest > context:
            raise ValueError(
                f"{name}: {longest} tokens, and {args.model} has a context of {context}; see --quick"
            )
    return workloads


def write_workloads(folder: Path, workloads: list[Workload]) -> int:
    for workload in workloads:
        path = folder / f"{workload.name}.jsonl"
        write_jsonl(path, workload.requests)
        print(f"{path}: {plural(len(workload.requests), 'request')}; {workload.text}")
    return 0


def make_engines(
    args: argparse.Namespace, settings: dict[str, Any]
) -> tuple[list[Configuration], list[str]]:
    """The engines to measure, and a line for each technique that is left out.

    Raises ValueError where the engine with everything cannot be configured.
    """
    config = config_class(args.part)
    known_fields = {entry.name for entry in fields(config)}
    known, left_out = known_techniques(TECHNIQUES, known_fields)
    for technique in (t for t in known if t.name in args.without):
        settings = {**settings, **technique.off}
    wanted = set(args.techniques) - set(args.without)
    chosen = [technique for technique in known if technique.name in wanted]
    left_out = [
        line for line in left_out if any(t.title in line for t in TECHNIQUES if t.name in wanted)
    ]
    engines = []
    for engine in configurations(chosen, settings):
        try:
            config(model=args.model, **engine.settings)
        except (TypeError, ValueError) as error:
            problem = str(error).replace("EngineConfig.__init__() ", "")
            if engine.name == EVERYTHING:
                raise ValueError(problem) from None
            left_out.append(f"{engine.name} is left out: {problem}")
        else:
            engines.append(engine)
    for line in left_out:
        print(line, file=sys.stderr)
    if len(engines) < 2:
        raise ValueError("--techniques: there is nothing to switch off")
    return engines, left_out


def make_variant(engine: Configuration, args: argparse.Namespace) -> Variant:
    job = {"job": "prefix", "part": args.part, "model": args.model, "settings": engine.settings}

    def measure(work: list[dict[str, Any]]) -> dict[str, Any]:
        return prefix_variants.run_job({**job, **work[0]}, args.verbose)

    return Variant(engine.name, measure, args.pairs)


def attribution_result(
    args: argparse.Namespace,
    variants: list[Variant],
    workloads: list[Workload],
    left_out: list[str],
    block_size: int,
    limits: dict[str, Any],
) -> Result:
    rounds = most_rounds(variants)
    columns = list(COLUMNS)
    if rounds >= MIN_INTERVAL:
        columns[4:4] = INTERVAL_COLUMNS
    facts = next((variant.facts for variant in variants if variant.facts), None)
    kind = f", {facts['dtype']}, {facts['device']}" if facts else ""
    notes = [
        f"Model {args.model}{kind}, part {args.part:02d}, greedy, blocks of {block_size}; each"
        f" measurement in a fresh process, engines in turns, medians of {plural(rounds, 'round')}, p99"
        " over all of them. Ratios and same tokens: to everything, paired by round. Losses do not add"
        " up: each technique is off while all others are on."
    ]
    if args.without:
        notes.append(f"Off throughout: {', '.join(args.without)}.")
    notes += [f"{line}." for line in left_out]
    notes += [workload_note(workload, variants, block_size) for workload in workloads]
    notes += [*counter_remarks(variants), *remarks(variants)]
    table = list(rows(variants, workloads, block_size))
    title = "What each technique is worth"
    return make_result(title, columns, table, limits=limits, parts=[args.part], notes=notes)
