"""The rows of `speculative`: from what the worker gave, by variant, point and round."""

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.bench.core.latencies import spread_percent
from common.bench.core.pairs import paired_ratio
from common.bench.core.rates import same_tokens
from common.bench.speculative.variants import Variant

Run = dict[str, Any]  # one point on one engine, as `worker.merged` gave it
NUM_SINGLES = 3  # prompts that batch 1 has, one after the other: one alone would decide too much


@dataclass(frozen=True)
class Point:
    """A kind of prompts, and how many of them are decoded together."""

    workload: str
    batch_size: int

    @property
    def name(self) -> str:
        return f"{self.workload}, batch {self.batch_size}"

    def prompts(self, number: int) -> list[list[int]]:
        """Which prompts the batches of a round have; each round begins elsewhere."""
        first, size = NUM_SINGLES * number, self.batch_size
        num_batches = NUM_SINGLES if size == 1 else 1
        return [list(range(first + i * size, first + (i + 1) * size)) for i in range(num_batches)]


def rows(variants: list[Variant], points: list[Point]) -> Iterator[dict[str, Any]]:
    """A row for each point and variant that was measured."""
    for point in points:
        for variant in variants:
            if point.name in variant.runs:
                yield {
                    "workload": point.workload,
                    "batch_size": point.batch_size,
                    "engine": variant.name,
                    **measured(variant, point),
                    **compared(variant, variants[0], point),
                }


def measured(variant: Variant, point: Point) -> dict[str, Any]:
    """Median speed; all else is of the rounds together. None for drafts where none were made."""
    runs, rates = list(variant.runs[point.name].values()), variant.rates[point.name]
    totals: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    for run in runs:
        totals.update({name: run[name] for name in ("num_tokens", "num_steps", "num_turns")})
        totals.update(run["counters"])
        phases.update(run["phases"])
    return {
        "rate": statistics.median(rates.values()),
        "spread": spread_percent(list(rates.values())),
        "acceptance": percent(totals["num_accepted_tokens"], totals["num_draft_tokens"]),
        "draft_length": quotient(totals["num_draft_tokens"], totals["num_drafts"]),
        "accepted_length": quotient(totals["num_accepted_tokens"], totals["num_drafts"]),
        "tokens_per_turn": totals["num_tokens"] / totals["num_turns"],
        "step_ms": 1000 * sum(run["seconds"] for run in runs) / totals["num_steps"],
        "propose_ms": quotient(
            1000 * phases["propose"], totals["num_steps"] * ("propose" in phases)
        ),
        "phases_ms": {name: 1000 * phases[name] / totals["num_steps"] for name in phases},
        "counters": {name: totals[name] for name in totals},
        "rates": [rates[number] for number in sorted(rates)],
        "whole_s": [run["whole_s"] for run in runs],
    }


def compared(variant: Variant, first: Variant, point: Point) -> dict[str, Any]:
    """To the first variant: how many times faster, and its tokens; None for that one itself."""
    runs, theirs = variant.runs[point.name], first.runs.get(point.name, {})
    rates, their_rates = variant.rates[point.name], first.rates.get(point.name, {})
    if variant is first:
        theirs, their_rates = {}, {}
    ratio = paired_ratio(rates, their_rates)
    both = sorted(runs.keys() & theirs.keys())
    ours, those = (
        [output for number in both for output in side[number]["outputs"]] for side in (runs, theirs)
    )
    return {
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "ratios": [rates[n] / their_rates[n] for n in sorted(rates.keys() & their_rates.keys())],
        "no_slower": ratio.no_slower,
        "pairs": ratio.pairs or None,
        "same": same_tokens(ours, those) if both else None,
    }


def quotient(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def percent(count: int, total: int) -> float | None:
    return 100 * count / total if total else None
