"""Tokens a second of an engine at one point of a workload, and the share of the limits that is.

    mixed    requests of mixed lengths, all handed over at once: tokens generated / whole time
    decode   a batch of equal prompts, as `offline` does it: one run stops after the first token
             (t1), one goes on (tn): (tokens - one each) / (tn - t1)
    prefill  prompts with one token to generate each: prompt tokens / whole time

A warm-up with the point's own shapes comes first. Every run has new random prompts, the same for
every engine, so that no prefix cache answers and all do the same work.
"""

import statistics
from dataclasses import dataclass
from typing import Any

from common.bench import BenchError
from common.bench.core.workload import draw_lengths, random_prompts
from common.bench.costs import DTYPE_BYTES, ModelShape, decode_cost, prefill_flops
from common.bench.offline import matmul_rate

WORKLOADS = ("mixed", "decode", "prefill")
BATCH_SIZES = (1, 4, 16, 32)
MIXED_PROMPT, MIXED_OUTPUT, MIXED_BATCH = (16, 256), (16, 128), 16
DECODE_PROMPT, DECODE_OUTPUT = 128, 64
PREFILL_PROMPT = 512


@dataclass(frozen=True)
class Point:
    """One number to measure: the requests handed over together, by their tokens in and out."""

    kind: str
    label: str
    prompt: list[int]
    output: list[int]
    batch_size: int  # sequences that the engine is to decode together at most

    @property
    def max_model_len(self) -> int:
        """Tokens that the longest sequence has."""
        return max(map(sum, zip(self.prompt, self.output, strict=True)))


def mixed_point(num_requests: int, seed: int) -> Point:
    lengths = draw_lengths(num_requests, MIXED_PROMPT, MIXED_OUTPUT, seed)
    label = f"{num_requests} mixed requests"
    return Point("mixed", label, lengths.prompt, lengths.output, MIXED_BATCH)


def decode_point(
    batch_size: int, prompt: int = DECODE_PROMPT, output: int = DECODE_OUTPUT
) -> Point:
    label = f"decode, batch {batch_size}"
    return Point("decode", label, [prompt] * batch_size, [output] * batch_size, batch_size)


def prefill_point(num_prompts: int, prompt: int = PREFILL_PROMPT) -> Point:
    label = f"prefill, {num_prompts} x {prompt}"
    return Point("prefill", label, [prompt] * num_prompts, [1] * num_prompts, num_prompts)


def planned_runs(point: Point, vocab_size: int, seed: object, repeats: int) -> list[dict[str, Any]]:
    """What to ask of an engine, in order: the warm-up, then `repeats` times what is timed."""

    def run(name: str, most: int, count: int | None = None) -> dict[str, Any]:
        prompts = random_prompts(point.prompt[:count], vocab_size, f"{seed} {point.label} {name}")
        return {"prompts": prompts, "max_tokens": [min(most, n) for n in point.output[:count]]}

    runs = [run("warm-up", 2, point.batch_size)]
    for number in range(repeats):
        if point.kind == "decode":
            runs.append(run(f"first {number}", 1))
        runs.append(run(f"whole {number}", max(point.output)))
    return runs


def rate(point: Point, runs: list[dict[str, Any]]) -> float:
    """Tokens a second from the answers to `planned_runs`, the median over the repeats.

    Raises BenchError for an engine that generated other than was asked.
    """
    timed = runs[1:]
    wholes = timed[1::2] if point.kind == "decode" else timed
    for run in wholes:
        counts = [len(output) for output in run["outputs"]]
        if counts != point.output:
            raise BenchError(f"{point.label}: {sum(counts)} tokens, not {sum(point.output)}")
    seconds = [run["seconds"] for run in wholes]
    if point.kind == "decode":
        firsts = [run["seconds"] for run in timed[::2]]
        seconds = [whole - first for whole, first in zip(seconds, firsts, strict=True)]
    median = statistics.median(seconds)
    if median <= 0:
        raise BenchError(f"{point.label}: the time to decode is within the noise of the prefill's")
    return num_tokens(point) / median


def num_tokens(point: Point) -> int:
    """Tokens that the rate counts."""
    if point.kind == "prefill":
        return sum(point.prompt)
    return sum(point.output) - (len(point.output) if point.kind == "decode" else 0)


def shares(
    point: Point,
    tokens_per_s: float,
    batch_size: int,
    facts: dict[str, Any],
    limits: dict[str, Any],
) -> dict[str, float | None]:
    """MBU and MFU in percent; None where the model's shape, its format or the limit is not known.

    facts: the engine's `shape` (config.json) and `dtype`. batch_size: what it can decode together.
    """
    nothing = {"mbu": None, "mfu": None}
    dtype = facts["dtype"]
    if dtype not in DTYPE_BYTES or not facts.get("shape"):
        return nothing
    try:
        shape = ModelShape.from_config(facts["shape"])
    except ValueError:
        return nothing
    seconds = num_tokens(point) / tokens_per_s
    batch_size = min(batch_size, point.batch_size)
    cost = decode_cost(shape, point.prompt, point.output, batch_size, DTYPE_BYTES[dtype])
    flops = cost.flops if point.kind != "prefill" else 0
    if point.kind != "decode":
        flops += prefill_flops(shape, point.prompt)
    peak = matmul_rate(dtype, limits)
    read = cost.num_bytes / seconds / (limits["read_gbps"] * 1e9)
    return {
        "mbu": 100 * read if point.kind != "prefill" else None,
        "mfu": 100 * flops / seconds / peak if peak else None,
    }


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Percent of tokens up to which each output agrees with its fellow."""
    equal = 0
    for left, right in zip(ours, theirs, strict=True):
        pairs = zip(left, right, strict=False)
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), len(left))
    return 100 * equal / max(1, sum(map(len, ours)))
