"""Conversations that pause and come back: a first turn of each, then a second turn of each."""

import statistics

from common.bench.core.workload import random_prompts
from common.bench.offload.contenders import BLOCK_SIZE, Answer
from common.bench.prefix.requests import Request

QUESTION, OUTPUT = 24, 16  # tokens of a second turn's question, and of every answer


def first_turns(count: int, length: int, vocab_size: int, seed: object) -> list[Request]:
    """One after the other: `count` prompts of `length` tokens."""
    prompts = random_prompts([length] * count, vocab_size, f"{seed} first")
    return [
        Request(f"first-{i}", i, f"first-{i - 1}" if i else None, None, prompt, OUTPUT)
        for i, prompt in enumerate(prompts)
    ]


def second_turns(first: list[Request], vocab_size: int, seed: object) -> list[Request]:
    """One after the other, after the last of the first: each continues its conversation."""
    questions = random_prompts([QUESTION] * len(first), vocab_size, f"{seed} again")
    before, requests = first[-1].request_id, []
    for i, question in enumerate(questions):
        request = Request(f"again-{i}", len(first) + i, before, f"first-{i}", question, OUTPUT)
        requests.append(request)
        before = request.request_id
    return requests


def num_blocks(length: int, conversations: float) -> int:
    """Blocks that hold so many whole conversations."""
    whole = length + QUESTION + 2 * OUTPUT
    return int(conversations * (-(-whole // BLOCK_SIZE) + 1))


def ttft_ms(answer: Answer, turn: str) -> float | None:
    """The median of one turn's, "first" or "again"."""
    times = [r["ttft_s"] for name, r in answer["records"].items() if name.startswith(turn)]
    return 1000 * statistics.median(times) if times else None


def cached_percent(answer: Answer, turn: str) -> float | None:
    """Prompt tokens that were found in a cache, wherever that lies."""
    records = [r for name, r in answer["records"].items() if name.startswith(turn)]
    prompt = sum(r["prompt_tokens"] for r in records)
    return 100 * sum(r["cached_tokens"] for r in records) / prompt if prompt else None
