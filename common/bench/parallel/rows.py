"""The tables of `parallel engines`: times beside the model's, and what each rank holds and sends."""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from common.bench.core.latencies import spread_percent
from common.bench.core.pairs import MIN_INTERVAL, paired_ratio
from common.bench.core.rates import same_tokens
from common.bench.core.report import plural
from common.bench.core.results import Result, column, make_result
from common.bench.costs import DTYPE_BYTES, ModelShape
from common.bench.ladder import remarks
from common.bench.parallel.cost_model import sent_bytes
from common.bench.parallel.layouts import memory
from common.bench.parallel.links import shared_all_reduce
from common.bench.parallel.machines import Device
from common.bench.parallel.points import Point
from common.bench.parallel.prediction import (
    NO_LINK,
    calibrate,
    machine_of,
    measured_link,
    part_of,
    seconds_of,
)
from common.bench.parallel.replicas import Variant

COLUMNS = [
    column("point", "workload"),
    column("engine", "cores as"),
    column("rate", "speed", "tok/s", 0),
    column("spread", "spread", "%", 0),
    column("time_ms", "step or prefill", "ms", 1),
    column("ratio", "ratio", digits=2),
    column("predicted_ms", "predicted", "ms", 1),
    column("error", "off by", "%", 0),
    column("messages", "in collectives", "%", 0),
    column("same", "same tokens", "%", 0),
]
INTERVAL_COLUMNS = [column("ratio_low", "95% from", digits=2), column("ratio_high", "to", digits=2)]
RANK_COLUMNS = [
    column("engine", "cores as"),
    column("rank", "rank", digits=0),
    column("weights", "weights", "MB", 1),
    column("weights_share", "of one engine's", "%", 1),
    column("weights_formula", "by formula", "MB", 1),
    column("kv", "KV of a token", "bytes", 0),
    column("kv_formula", "by formula", "bytes", 0),
    column("peak_mib", "peak memory at start", "MiB", 0),
    column("sent", "sent a token and layer", "bytes", 0),
    column("sent_formula", "by formula", "bytes", 0),
]


def engines_result(
    args: argparse.Namespace,
    variants: Sequence[Variant],
    points: Sequence[Point],
    limits: dict[str, Any],
    links: Sequence[dict[str, Any]] | None,
    lone_shares: dict[int, float],
) -> Result:
    """links: rows of a result of `parallel collectives`, for the predictions; None for none.
    lone_shares: by number of ranks, see `prediction.part_of`."""
    first = variants[0]
    predictions, notes = {}, []
    if links is not None and first.runs and first.facts.get("shape"):
        predictions, notes = predicted(args, variants, points, links, lone_shares)
    columns = list(COLUMNS)
    if first.num_rounds >= MIN_INTERVAL:
        columns[6:6] = INTERVAL_COLUMNS
    about = [
        f"Model {args.model}, {first.facts.get('dtype')}, greedy, prompts of {args.prompt_len}"
        f" random tokens and {args.output_len} tokens each where nothing else is said; each"
        f" measurement in fresh processes, in turns, medians of {plural(first.num_rounds, 'round')}."
        " Ratio: of speeds, to one engine, paired by round; same tokens: as it gave."
    ]
    rows = list(rows_of(variants, points, predictions))
    return make_result(
        "The same cores as one engine, as ranks, and as replicas",
        columns,
        rows,
        limits=limits,
        parts=[args.part],
        notes=[*about, *notes, *remarks(variants)],
    )


def rows_of(
    variants: Sequence[Variant],
    points: Sequence[Point],
    predictions: dict[tuple[str, str], float],
) -> Iterator[dict[str, Any]]:
    first = variants[0]
    for point in points:
        for variant in variants:
            runs = variant.runs.get(point.name)
            if not runs:
                continue
            times = {number: point.seconds_of(run) for number, run in runs.items()}
            rates = {number: run["num_tokens"] / run["seconds"] for number, run in runs.items()}
            middle = statistics.median(times.values())
            guess = predictions.get((variant.name, point.name))
            yield {
                "point": point.name,
                "engine": variant.name,
                "decodes": point.decodes,
                "batch_size": point.num_prompts,
                "rate": statistics.median(rates.values()),
                "spread": spread_percent(list(rates.values())),
                "time_ms": 1000 * middle,
                "predicted_ms": None if guess is None else 1000 * guess,
                "error": None if guess is None else 100 * (guess / middle - 1),
                "messages": waiting(runs) if variant.layout.tp > 1 else None,
                "rates": [rates[number] for number in sorted(rates)],
                "sent": {number: run["sent"] for number, run in sorted(runs.items())},
                **compared(variant, first, point, rates),
            }


def waiting(runs: dict[int, dict[str, Any]]) -> float | None:
    """Percent of its time that rank 0 was in collectives; None for what is not a decode."""
    shares = [
        100 * sum(total["seconds"] for total in run["sent"].values()) / run["whole_s"]
        for run in runs.values()
        if run["sent"] and run["whole_s"]
    ]
    return statistics.median(shares) if shares else None


def compared(
    variant: Variant, first: Variant, point: Point, rates: dict[int, float]
) -> dict[str, Any]:
    """To the first variant; None for itself."""
    theirs = first.runs.get(point.name, {})
    if variant is first or not theirs:
        return dict.fromkeys(("ratio", "ratio_low", "ratio_high", "same"))
    ratio = paired_ratio(
        rates, {number: run["num_tokens"] / run["seconds"] for number, run in theirs.items()}
    )
    both = sorted(rates.keys() & theirs.keys())
    ours, those = (
        [output for number in both for output in side[number]["outputs"]]
        for side in (variant.runs[point.name], theirs)
    )
    return {
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "same": same_tokens(ours, those),
    }


def predicted(
    args: argparse.Namespace,
    variants: Sequence[Variant],
    points: Sequence[Point],
    links: Sequence[dict[str, Any]],
    lone_shares: dict[int, float],
) -> tuple[dict[tuple[str, str], float], list[str]]:
    """Seconds by (variant, point), and what they rest on. Raises ValueError."""
    first = variants[0]
    shape, dtype_bytes = ModelShape.from_config(first.facts["shape"]), dtype_of(first)
    measured = [
        (
            point.steps(),
            statistics.median(point.seconds_of(run) for run in first.runs[point.name].values()),
        )
        for point in points
        if point.name in first.runs
    ]
    if len(measured) < 4:
        return {}, ["Not predicted: fewer than four workloads were measured."]
    whole = calibrate(shape, measured, dtype_bytes)
    found = {}
    for variant in variants:
        layout = variant.layout
        for point in points:
            busy = layout.tp * min(layout.dp * layout.pp, point.num_prompts)
            share = lone_shares.get(layout.num_ranks)
            device = part_of(whole, layout.num_ranks, busy, share)
            size = layout.tp * layout.pp
            link = measured_link(links, args.transport, size) if size > 1 else NO_LINK
            machine, work = machine_of(device, layout.num_ranks, link), point.steps(layout.dp)
            found[variant.name, point.name] = seconds_of(shape, layout, machine, work, dtype_bytes)
    rates = (
        f"{whole.read_bytes_per_s / 1e9:.1f} GB/s, {whole.flops_per_s / 1e9:.0f} GFLOP/s and"
        f" {1000 * whole.step_s:.1f} ms a step"
    )
    shares = " or ".join(f"{share:.0%}" for share in lone_shares.values())
    note = (
        f"Predicted: the cost model calibrated on one engine ({rates}). Ranks and replicas get their"
        f" part of these rates, and one that works alone {shares} of the reading; messages take what"
        f" was measured of {args.transport}. Off by: predicted to measured."
    )
    return found, [note]


def dtype_of(variant: Variant) -> int:
    return DTYPE_BYTES[variant.facts["dtype"]]


def ranks_result(
    args: argparse.Namespace,
    variants: Sequence[Variant],
    points: Sequence[Point],
    limits: dict[str, Any],
) -> Result:
    notes = [
        f"Model {args.model}. Weights and KV are what the ranks say of themselves. Peak memory:"
        " resident, of the process until the engine is ready, with Python, the libraries and the KV"
        " cache. Sent: by rank 0 in all-reduces of the layers, to the tokens of all steps and the"
        " layers; by formula, as tensors are written once into memory that the ranks share."
    ]
    return make_result(
        "What each rank holds and sends",
        RANK_COLUMNS,
        list(rank_rows(args, variants)),
        limits=limits,
        parts=[args.part],
        notes=notes,
    )


def rank_rows(args: argparse.Namespace, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    whole = variants[0].facts.get("rank_bytes", [[None]])[0][0]
    for variant in variants:
        facts = variant.facts
        if not facts or variant.layout.dp > 1:  # replicas are each like one engine
            continue
        shape, dtype_bytes = ModelShape.from_config(facts["shape"]), dtype_of(variant)
        tied = bool(facts["shape"].get("tie_word_embeddings"))
        machine = machine_of(Device(1.0, 1.0, 1.0, 0.0), 1)
        split = variant.layout.tp > 1
        by_formula = sent_bytes(shape, variant.layout, dtype_bytes, shared_all_reduce)
        for rank, (weights, kv) in enumerate(facts["rank_bytes"]):
            peaks = facts["peak_mib"]
            formula = memory(shape, variant.layout, machine, 1, dtype_bytes, tied, rank)
            yield {
                "engine": variant.name,
                "rank": rank,
                "weights": weights / 1e6,
                "weights_share": 100 * weights / whole if whole else None,
                "weights_formula": formula.weight_bytes / 1e6,
                "kv": kv / facts["kv_tokens"],
                "kv_formula": formula.kv_bytes_per_token,
                "peak_mib": peaks[rank] if rank < len(peaks) else None,
                "sent": sent(variant, shape) if split and rank == 0 else None,
                "sent_formula": by_formula if split and rank == 0 else None,
            }


def sent(variant: Variant, shape: ModelShape) -> float | None:
    """Bytes of rank 0's all-reduces for each token and layer, in all runs together. An all-reduce a
    step is the embedding's and no layer's: of 2 n + 1 alike, 2 n count."""
    num_bytes = tokens = 0
    for runs in variant.runs.values():
        for run in runs.values():
            num_bytes += run["sent"].get("all_reduce", {"num_bytes": 0})["num_bytes"]
            tokens += run["num_computed"]
    layers = shape.num_layers
    share = 2 * layers / (2 * layers + 1)
    return num_bytes * share / tokens / layers if tokens else None
