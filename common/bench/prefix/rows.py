"""The rows and remarks of `prefix`: from what the worker gave, by variant, workload and round."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from common.bench.core.latencies import percentile, spread_percent
from common.bench.core.pairs import paired_ratio
from common.bench.core.rates import same_tokens
from common.bench.core.report import plural
from common.bench.prefix.requests import possible_hits
from common.bench.prefix.variants import Variant
from common.bench.prefix.workloads import Workload

Run = dict[str, Any]  # one workload on one engine, as `worker.run_workload` gave it


def rows(
    variants: list[Variant], workloads: list[Workload], block_size: int
) -> Iterator[dict[str, Any]]:
    """A row for each workload and variant that was measured."""
    for workload in workloads:
        for variant in variants:
            if workload.name in variant.runs:
                yield {
                    "workload": workload.name,
                    "engine": variant.name,
                    **measured(variant, workload, block_size),
                    **compared(variant, variants[0], workload),
                }


def measured(variant: Variant, workload: Workload, block_size: int) -> dict[str, Any]:
    """Medians over the rounds; times to first token in ms. Counts are of the first round."""
    runs, rates = variant.runs[workload.name], variant.rates[workload.name]
    run, ttfts = runs[min(runs)], [ttfts_ms(run, workload) for run in runs.values()]
    firsts, others = [own[0] for own in ttfts], [typical_ttft(own, workload) for own in ttfts]
    outputs, num_prompt = outputs_of(run), total(run, "prompt_tokens")
    seconds = statistics.median(run["seconds"] for run in runs.values())
    num_possible = possible_hits(workload.requests, outputs, block_size)
    return {
        "hit_rate": 100 * total(run, "cached_tokens") / num_prompt,
        "possible": 100 * num_possible / num_prompt,
        "ttft_ms": statistics.median(map(statistics.median, ttfts)),
        "p99_ms": percentile([ttft for own in ttfts for ttft in own], 99),
        "first_ms": statistics.median(firsts) if workload.is_serial else None,
        "others_ms": statistics.median(others) if workload.is_serial else None,
        "rate": statistics.median(rates.values()),
        "prompt_rate": num_prompt / seconds,
        "total_s": seconds,
        "spread": spread_percent(list(rates.values())),
        "prompt_tokens": num_prompt,
        "output_tokens": sum(map(len, outputs.values())),
        "rates": [rates[number] for number in sorted(rates)],
        "ttfts_ms": ttfts,  # by round, in the order of the requests
        "counters": run["counters"],
    }


def compared(variant: Variant, first: Variant, workload: Workload) -> dict[str, Any]:
    """To the first variant: how many times faster, and its tokens; None for that one itself."""
    runs, theirs = variant.runs[workload.name], first.runs.get(workload.name, {})
    rates, their_rates = variant.rates[workload.name], first.rates.get(workload.name, {})
    if variant is first:
        theirs, their_rates = {}, {}
    ratio = paired_ratio(rates, their_rates)
    ttft_ratio = paired_ratio(ttft_by_round(theirs, workload), ttft_by_round(runs, workload))
    same = None
    if theirs:
        ours, those = outputs_of(runs[min(runs)]), outputs_of(theirs[min(theirs)])
        same = same_tokens(list(ours.values()), [those[name] for name in ours])
    return {
        "ttft_ratio": ttft_ratio.median,
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "no_slower": ratio.no_slower,
        "pairs": ratio.pairs or None,
        "same": same,
    }


def ttft_by_round(runs: Mapping[int, Run], workload: Workload) -> dict[int, float]:
    return {number: typical_ttft(ttfts_ms(run, workload), workload) for number, run in runs.items()}


def ttfts_ms(run: Run, workload: Workload) -> list[float]:
    """In the order in which the requests were handed over."""
    return [1000 * run["records"][r.request_id]["ttft_s"] for r in workload.requests]


def typical_ttft(ttfts: list[float], workload: Workload) -> float:
    """The median; where requests come one at a time, of those after the first."""
    return statistics.median(ttfts[1:] or ttfts if workload.is_serial else ttfts)


def total(run: Run, key: str) -> int:
    return sum(record[key] for record in run["records"].values())


def outputs_of(run: Run) -> dict[str, list[int]]:
    return {name: record["token_ids"] for name, record in run["records"].items()}


def workload_note(workload: Workload, variants: list[Variant], block_size: int) -> str:
    """What it is, and what a cache that forgets nothing would find."""
    runs = [run for variant in variants for run in variant.runs.get(workload.name, {}).values()]
    if not runs:
        return f"{workload.name}: {workload.text}."
    num_possible = possible_hits(workload.requests, outputs_of(runs[0]), block_size)
    percent = 100 * num_possible / total(runs[0], "prompt_tokens")
    return (
        f"{workload.name}: {workload.text}. A cache that forgets nothing would find {percent:.0f}%."
    )


def counter_remarks(variants: list[Variant]) -> Iterator[str]:
    """Preemptions, and caches that count otherwise than their outputs say."""
    for variant in variants:
        for name, runs in variant.runs.items():
            run = runs[min(runs)]
            num_preemptions = run["counters"].get("num_preemptions", 0)
            if num_preemptions:
                yield f"{variant.name}, {name}: {plural(num_preemptions, 'preemption')}."
            num_cached = total(run, "cached_tokens")
            num_hits = run["counters"].get("num_prefix_cache_hits", num_cached)
            if num_hits != num_cached:
                yield f"{variant.name}, {name}: {num_hits} hits in stats, {num_cached} in outputs."
