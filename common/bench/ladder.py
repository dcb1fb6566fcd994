"""`ladder`: all parts on the same work, side by side: what each technique buys, and what it costs.

    mixed    requests of 16 to 256 tokens in and 16 to 128 out, handed over at once; batches of 16
    decode   batches of 1, 4, 16 and 32, with 128 tokens in and 64 out, prefill not counted
    prefill  prompts of 512 tokens

Every measurement is a fresh process, and parts take turns, in alternating order, for --pairs
rounds. Speeds are medians over the rounds; the ratio of a part to the one before it is the median
of the rounds' ratios, with a 95% bootstrap interval. "No slower" is claimed from 15 pairs on, where
the interval begins at 0.97 or above. Parts that run one sequence at a time are measured at batch 1,
and that rate stands for every batch. --overview draws all parts with their titles and lines of code, and
--with switches a part's technique on: --with 8:speculative=ngram.
"""

import argparse
import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.bench.core.arguments import (
    add_engine_arguments,
    add_output_arguments,
    finish,
    positive,
    settings_of,
    variant,
)
from common.bench.core.noise import disturbance
from common.bench.core.pairs import MIN_CLAIM
from common.bench.core.processes import ROOT, part_package, run_worker
from common.bench.core.rates import (
    BATCH_SIZES,
    WORKLOADS,
    Point,
    decode_point,
    mixed_point,
    prefill_point,
)
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.core.rounds import COLUMNS, Entrant, measure_rounds, rows

TITLES = {
    "mixed": "The parts on a mixed workload",
    "decode": "Decoding, part by part",
    "prefill": "Prefill, part by part",
}
REQUESTS = {"mixed": 64, "prefill": 4}  # by default


def part_pairs(text: str) -> tuple[int, int]:
    """PART=ROUNDS."""
    match = re.fullmatch(r"(\d+)=([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be PART=ROUNDS, not {text!r}")
    return int(match[1]), int(match[2])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=positive, nargs="+", help="default: all there are")
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed", help="default: mixed")
    add_engine_arguments(parser)
    parser.add_argument("--pairs", type=positive, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--part-pairs",
        type=part_pairs,
        action="append",
        default=[],
        metavar="PART=ROUNDS",
        help="fewer rounds for a slow part",
    )
    parser.add_argument("--requests", type=positive, help="mixed: 64, prefill: 4")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", help="of decode (1 4 16 32)")
    parser.add_argument("--repeats", type=positive, default=1, help="in each process (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--vocab-size", type=positive, help="draw token ids below this")
    parser.add_argument(
        "--with",
        dest="own_settings",
        type=variant,
        action="append",
        default=[],
        metavar="PART:KEY=VALUE,…",
        help="fields of one part's EngineConfig alone",
    )
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")
    parser.add_argument(
        "--overview", type=Path, metavar="FILE", help="draw the parts by their titles, and sizes"
    )


def run(args: argparse.Namespace) -> int:
    parts = args.parts or existing_parts()
    points = workload_points(args)
    pairs = dict(args.part_pairs)
    if unknown := set(pairs) - set(parts):
        raise ValueError(f"--part-pairs names part {min(unknown)}, which is not measured")
    if args.overview:
        from common.bench.prefix.plot import check_plot

        check_plot(args.overview, "--overview")
    own = own_settings(args.own_settings, parts)
    entrants = [
        part_entrant(part, points, args, pairs.get(part, args.pairs), own.get(part, {}))
        for part in parts
    ]
    vocab_size = args.vocab_size or known_vocab_size(args.model)
    measure_rounds(entrants, points, vocab_size, args.seed, args.repeats)
    device = next((e.facts["device"] for e in entrants if e.facts), "cpu").partition(":")[0]
    limits = run_worker({"job": "limits", "device": device, "quick": args.quick_limits})
    result = ladder_result(args, parts, entrants, points, limits)
    describe(result, parts, own, args.model)
    if args.plot:
        from common.bench.core.rates_plot import plot_rates

        plot_rates(result, args.plot)
    if args.overview and result["rows"]:
        from common.bench.ladder_plot import plot_overview

        plot_overview(result, args.overview)
    finish(args, result)
    return 1 if any(entrant.failure for entrant in entrants) else 0


def existing_parts() -> list[int]:
    return sorted(int(path.parent.name[4:6]) for path in ROOT.glob("part[0-9][0-9]_*/engine.py"))


def workload_points(args: argparse.Namespace) -> list[Point]:
    if args.batch_sizes and args.workload != "decode":
        raise ValueError(f"--batch-sizes has no meaning for {args.workload}")
    if args.requests and args.workload == "decode":
        raise ValueError("--requests has no meaning for decode: give --batch-sizes")
    if args.workload == "decode":
        return [decode_point(size) for size in sorted(set(args.batch_sizes or BATCH_SIZES))]
    count = args.requests or REQUESTS[args.workload]
    return [mixed_point(count, args.seed) if args.workload == "mixed" else prefill_point(count)]


def own_settings(
    given: list[tuple[str, dict[str, Any]]], parts: list[int]
) -> dict[int, dict[str, Any]]:
    """What --with gave, by part. Raises ValueError for a part that is not measured."""
    own: dict[int, dict[str, Any]] = {}
    for name, settings in given:
        if not name.isdecimal() or int(name) not in parts:
            raise ValueError(f"--with names part {name}, which is not measured")
        own[int(name)] = own.get(int(name), {}) | settings
    return own


def describe(result: Result, parts: list[int], own: dict[int, dict[str, Any]], model: str) -> None:
    """Write into the result's rows what each part is called, how long it is, and what was set for it."""
    from common.bench.ladder_plot import titles_and_sizes

    known = titles_and_sizes(parts)
    settings = {f"part {part:02d}": given for part, given in own.items()}
    result["model"] = model
    for row in result["rows"]:
        row["title"], row["code_lines"] = known.get(row["engine"], (row["engine"], None))
        given = settings.get(row["engine"], {})
        row["with"] = ", ".join(f"{key}={value}" for key, value in given.items())
    result["notes"] += [
        f"{name} with {', '.join(f'{k}={v}' for k, v in given.items())}."
        for name, given in settings.items()
    ]


def part_entrant(
    part: int, points: list[Point], args: argparse.Namespace, rounds: int, own: dict[str, Any]
) -> Entrant:
    """A part with room for the largest batch, where it has batches. own: settings for it alone."""
    config = importlib.import_module(f"{part_package(part)}.config").EngineConfig
    known = {entry.name for entry in fields(config)}
    largest = max(point.batch_size for point in points)
    settings = {"max_num_seqs": largest} if "max_num_seqs" in known else {}
    job = {
        "job": "generate",
        "part": part,
        "model": args.model,
        "settings": settings | settings_of(args) | own,
    }
    return Entrant(
        name=f"part {part:02d}",
        run=lambda runs: run_worker({**job, "runs": runs}, verbose=args.verbose),
        rounds=rounds,
        serial="max_num_seqs" not in known,
    )


def known_vocab_size(model: str) -> int:
    from common.models.checkpoint import read_json, resolve

    return read_json(resolve(model) / "config.json")["vocab_size"]


def ladder_result(
    args: argparse.Namespace,
    parts: list[int],
    entrants: list[Entrant],
    points: list[Point],
    limits: dict[str, Any],
) -> Result:
    before = dict(zip(map(id, entrants[1:]), entrants, strict=False))
    columns = [*COLUMNS]
    if most_rounds(entrants) >= MIN_CLAIM:
        columns.insert(-1, column("no_slower", "no slower"))
    notes = [
        f"Model {args.model}, greedy; each measurement in a fresh process, parts in turns, medians"
        f" of {plural(most_rounds(entrants), 'round')}. Ratio: to the part above, paired by round, with its 95%"
        " bootstrap interval; same tokens: as that part gave."
    ]
    facts = next((entrant.facts for entrant in entrants if entrant.facts), None)
    if facts:
        notes[0] = notes[0].replace(", greedy", f", {facts['dtype']}, {facts['device']}, greedy")
    serial = [entrant.name for entrant in entrants if entrant.serial]
    if serial and args.workload == "decode":
        notes.append(
            f"{', '.join(serial)}: one sequence at a time; the rate at batch"
            f" {points[0].batch_size} stands for every batch."
        )
    notes += remarks(entrants)
    return make_result(
        TITLES[args.workload],
        columns,
        rows(
            entrants,
            points,
            limits,
            lambda entrant: (entrant, before[id(entrant)]) if id(entrant) in before else None,
        ),
        limits=limits,
        parts=parts,
        notes=notes,
    )


def most_rounds(entrants: list[Entrant]) -> int:
    return max(entrant.num_rounds for entrant in entrants)


def remarks(entrants: list[Entrant]) -> list[str]:
    """Who was measured less, what went wrong, and who else used the machine."""
    notes = [
        f"{entrant.name}: {plural(entrant.num_rounds, 'round')}."
        for entrant in entrants
        if entrant.num_rounds < most_rounds(entrants)
    ]
    notes += [
        f"{entrant.name} failed: {entrant.failure}" for entrant in entrants if entrant.failure
    ]
    others = [cores for entrant in entrants for cores in entrant.other_cores]
    if others and (remark := disturbance(max(others))):
        notes.append(f"Disturbed, in the worst of {len(others)} measurements: {remark}.")
    return notes
