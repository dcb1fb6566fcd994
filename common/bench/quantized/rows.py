"""The rows of `formats`: from what the worker gave of each variant, and from what `quality` found."""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.bench.core.latencies import spread_percent
from common.bench.core.results import column, load_result
from common.bench.costs import ModelShape
from common.bench.quantized.sizes import looked_up_bytes, model_bytes
from common.bench.quantized.variants import PLAIN, FormatVariant

QUALITY = ("perplexity", "kl", "same")
REFERENCE = "reference"  # what `quality` calls the model without quantisation
MIB = 2**20


def columns(batch_sizes: list[int]) -> list[dict[str, Any]]:
    return [
        column("variant", "format"),
        column("bits", "bits a weight", digits=2),
        column("weights_mib", "weights", "MiB"),
        column("of_formula", "of the formula", "%", 2),
        column("kv_bytes", "KV of a token", "bytes", 0),
        column("first_s", "first start", "s"),
        column("cached_s", "later starts", "s"),
        column("load_private_mib", "peak of loading, private", "MiB", 0),
        *(column(f"rate_{size}", f"batch {size}", "tok/s", 0) for size in batch_sizes),
        column("mbu", "of the read limit, smallest batch", "%", 0),
        column("kl", "KL to fp32", digits=4),
        column("same", "same first choice", "%", 1),
        column("perplexity", "perplexity", digits=2),
    ]


def read_quality(path: Path | None) -> dict[str, Mapping[str, Any]]:
    """Rows of a result of `quality` by variant. Raises ValueError where it is none."""
    if path is None:
        return {}
    found = {}
    for row in load_result(path)["rows"]:
        missing = [key for key in ("variant", *QUALITY) if key not in row]
        if missing:
            raise ValueError(f"{path}: a row has no {missing[0]!r}: this is no result of `quality`")
        found[row["variant"]] = row
    if REFERENCE in found:
        found[PLAIN] = found[REFERENCE]
    return found


def rows(
    variants: list[FormatVariant],
    shapes: Mapping[str, tuple[int, ...]],
    quality: Mapping[str, Mapping[str, Any]],
    read_gbps: float,
    prompt_len: int,
    output_len: int,
) -> Iterator[dict[str, Any]]:
    """A row for each variant that was measured."""
    num_weights = sum(product(shape) for shape in shapes.values())
    for variant in variants:
        if not variant.rates:
            continue
        facts, first = variant.facts, variant.first
        formula = None if variant.is_checkpoint else model_bytes(shapes, variant.settings)
        yield {
            "variant": variant.name,
            "settings": variant.in_words,
            "bits": 8 * facts["weight_bytes"] / num_weights,
            "kv_bits": kv_bits(facts),
            "weights_mib": facts["weight_bytes"] / MIB,
            "of_formula": formula and 100 * facts["weight_bytes"] / formula,
            "kv_bytes": facts["token_bytes"],
            "first_s": first["construct_s"],
            "cached_s": statistics.median(variant.starts),
            "load_peak_mib": first["load_peak_mib"],
            "load_private_mib": first["load_private_mib"],
            "rss_mib": facts["rss_mib"],
            **speeds(variant),
            "mbu": bandwidth_share(variant, shapes, read_gbps, prompt_len, output_len),
            **{key: quality.get(variant.name, {}).get(key) for key in QUALITY},
        }


def product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def kv_bits(facts: Mapping[str, Any]) -> float | None:
    """Bits of a key's or value's number, its share of the scale among them."""
    if not facts.get("shape"):
        return None
    return 8 * facts["token_bytes"] / ModelShape.from_config(facts["shape"]).kv_elements


def speeds(variant: FormatVariant) -> dict[str, Any]:
    """Median tokens a second at each batch, spread and all rounds."""
    found: dict[str, Any] = {}
    for name, rates in variant.rates.items():
        size = name.removeprefix("batch ")
        values = [rates[number] for number in sorted(rates)]
        found[f"rate_{size}"] = statistics.median(values)
        found[f"spread_{size}"] = spread_percent(values)
        found[f"rates_{size}"] = values
    return found


def bandwidth_share(
    variant: FormatVariant,
    shapes: Mapping[str, tuple[int, ...]],
    read_gbps: float,
    prompt_len: int,
    output_len: int,
) -> float | None:
    """Percent of the read limit at the smallest batch: all weights, and the keys and values of a mean
    context, once a step. None for a checkpoint whose embedding is no head: its bytes are not known."""
    if variant.is_checkpoint and "lm_head.weight" in shapes:
        return None
    size = min(int(name.removeprefix("batch ")) for name in variant.rates)
    step_s = size / statistics.median(variant.rates[f"batch {size}"].values())
    context = prompt_len + output_len / 2
    num_bytes = variant.facts["weight_bytes"] - looked_up_bytes(shapes, variant.settings)
    num_bytes += size * context * variant.facts["token_bytes"]
    return 100 * num_bytes / step_s / (read_gbps * 1e9)
