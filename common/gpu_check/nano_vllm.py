"""The benchmark that nano-vllm publishes: 256 requests of 100 to 1,024 tokens in and as many out.

Lengths, seed, temperature and the way of counting (tokens out, over the time from the first request
to the last answer, after one small request) are those of its `bench.py`. Its README says what it
and vLLM reached on another card; that number stands beside ours, and is no comparison.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

from common.gpu_check.engines import engine_of
from common.gpu_check.items import Check

SEED = 0
NUM_SEQS, SHORTEST, LONGEST = 256, 100, 1024
QUICK_NUM_SEQS, QUICK_SHORTEST, QUICK_LONGEST = 6, 5, 20
TEMPERATURE, LARGEST_TOKEN = 0.6, 10000
PUBLISHED = {  # its README, for Qwen3-0.6B
    "card": "RTX 4070 Laptop, 8 GB",
    "output_tokens": 133_966,
    "nano-vllm tok/s": 1434.13,
    "vLLM tok/s": 1361.84,
}


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"name", "part", "model", "device", "quick"} -> one check."""
    yield job["name"], lambda: throughput(job)


def throughput(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds, tokens, tokens a second, and steps."""
    from common.sampling import SamplingParams

    quick = job["quick"]
    engine, answer = engine_of(job, max_model_len=2 * QUICK_LONGEST if quick else 4096)
    prompts, lengths = workload(quick, engine.vocab_size)
    params = [
        SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=length)
        for length in lengths
    ]
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=16, ignore_eos=True), progress=False)
    first = engine.trace.last_record.step
    begin = time.perf_counter()
    completions = engine.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(done.token_ids) for done in completions)
    assert num_tokens == sum(lengths), (num_tokens, sum(lengths))
    return {
        "tok/s": num_tokens / seconds,
        "run_s": seconds,
        "tokens": num_tokens,
        "prompt_tokens": sum(map(len, prompts)),
        "steps": engine.trace.last_record.step - first,
        "preemptions": engine.stats()["num_preemptions"],
        "published, other card": PUBLISHED,
        **answer,
    }


def workload(quick: bool, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens to generate after each; drawn in the order of nano-vllm's own."""
    shortest, longest = (QUICK_SHORTEST, QUICK_LONGEST) if quick else (SHORTEST, LONGEST)
    largest, draw = min(LARGEST_TOKEN, vocab_size - 1), random.Random(SEED)
    prompts = [
        [draw.randint(0, largest) for _ in range(draw.randint(shortest, longest))]
        for _ in range(QUICK_NUM_SEQS if quick else NUM_SEQS)
    ]
    return prompts, [draw.randint(shortest, longest) for _ in prompts]
