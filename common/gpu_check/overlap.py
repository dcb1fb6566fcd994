"""How long the device waits for the host between two decode steps: with the loop in turns, and with
two steps in flight. Only parts that launch a step before the last one is read."""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

from common.bench.core.worker import start_engine
from common.bench.core.workload import random_prompts
from common.gpu_check.items import Item, attempt

BATCH_SIZES, QUICK_BATCH_SIZES = (1, 16, 64, 256), (2,)
OUTPUT_LEN, QUICK_OUTPUT_LEN = 128, 12
SETTLED = 8  # steps at either end that are left out


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"name", "part", "model", "device", "quick"} -> an item for each loop."""
    for is_async in (False, True):
        loop = "two steps in flight" if is_async else "in turns"
        yield attempt(f"{job['name']}, {loop}", lambda is_async=is_async: measure(job, is_async))


def measure(job: dict[str, Any], is_async: bool) -> dict[str, Any]:
    """For each batch size: microseconds between the device's steps and of a step, tokens a second."""
    from common.sampling import SamplingParams

    sizes = QUICK_BATCH_SIZES if job["quick"] else BATCH_SIZES
    output_len = QUICK_OUTPUT_LEN if job["quick"] else OUTPUT_LEN
    settings = {
        "device": job["device"],
        "dtype": "bfloat16" if job["device"].startswith("cuda") else "float32",
        "max_num_seqs": max(sizes),
        "max_model_len": 512,
    }
    engine, _, _ = start_engine({"part": job["part"], "model": job["model"], "settings": settings})
    if not is_async:
        engine.num_in_flight = 1  # each step is read before the next one is launched
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    found: dict[str, Any] = {}
    for size in sizes:
        prompts = random_prompts([32] * size, engine.vocab_size, f"overlap {size}")
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=4), progress=False)
        start = engine.trace.last_record.step
        begin = time.perf_counter()
        engine.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - begin
        records = [record for record in engine.trace.records() if record.step > start]
        spans = [span for record in records for span in record.device][1:]
        skip = min(SETTLED, len(spans) // 4)
        spans = spans[skip : len(spans) - skip]
        gaps = [after[1] - before[2] for before, after in itertools.pairwise(spans)]
        found[f"gap us at {size}"] = 1e6 * statistics.median(gaps)
        found[f"step us at {size}"] = 1e6 * statistics.median(
            end - begin for _, begin, end in spans
        )
        found[f"tok/s at {size}"] = size * output_len / seconds
    return found
