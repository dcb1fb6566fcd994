"""The benchmark that nano-vllm publishes: 256 requests of 100 to 1,024 tokens in and as many out.

Lengths, seed, temperature and the way of counting (tokens out, over the time from the first request
to the last answer, after one small request) are those of its `bench.py`, so that the number may
stand beside the published ones: Qwen3-0.6B, 133,966 tokens.
"""

import random
import time
from collections.abc import Iterator
from typing import Any

from common.bench.core.worker import start_engine
from common.gpu_check.items import Item, attempt

SEED = 0
NUM_SEQS, SHORTEST, LONGEST = 256, 100, 1024
QUICK_NUM_SEQS, QUICK_SHORTEST, QUICK_LONGEST = 6, 5, 20
TEMPERATURE, LARGEST_TOKEN = 0.6, 10000


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"name", "part", "model", "device", "quick"} -> one item."""
    yield attempt(job["name"], lambda: throughput(job))


def throughput(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds, tokens, tokens a second."""
    from common.sampling import SamplingParams

    quick, cuda = job["quick"], job["device"].startswith("cuda")
    count = QUICK_NUM_SEQS if quick else NUM_SEQS
    settings = {
        "device": job["device"],
        "dtype": "bfloat16" if cuda else "float32",
        "max_model_len": 2 * QUICK_LONGEST if quick else 4096,
    }
    engine, _, answer = start_engine(
        {"part": job["part"], "model": job["model"], "settings": settings}
    )
    prompts, lengths = workload(count, quick, engine.vocab_size)
    params = [
        SamplingParams(temperature=TEMPERATURE, ignore_eos=True, max_tokens=length)
        for length in lengths
    ]
    engine.generate([[1, 2, 3]], SamplingParams(), progress=False)
    begin = time.perf_counter()
    completions = engine.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(done.token_ids) for done in completions)
    assert num_tokens == sum(lengths), (num_tokens, sum(lengths))
    return {"run_s": seconds, "tokens": num_tokens, "tok/s": num_tokens / seconds, **answer}


def workload(count: int, quick: bool, vocab_size: int) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens to generate after each; drawn in the order of nano-vllm's own."""
    shortest, longest = (QUICK_SHORTEST, QUICK_LONGEST) if quick else (SHORTEST, LONGEST)
    draw = random.Random(SEED)
    prompts = [
        [draw.randint(0, min(LARGEST_TOKEN, vocab_size - 1)) for _ in range(draw.randint(shortest, longest))]
        for _ in range(count)
    ]
    return prompts, [draw.randint(shortest, longest) for _ in range(count)]
