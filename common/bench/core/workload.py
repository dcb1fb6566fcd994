"""What is asked of an engine: random prompts of given lengths, a file of prompts, arrival times.

Everything is drawn from a seed, so two engines get the same work, and so does tomorrow's run.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

WORDS = ("the", "a", "one", "of", "to", "and", "in", "is", "that", "for", "with", "on", "as", "at")


@dataclass(frozen=True)
class WorkItem:
    """One request: a prompt (text or token ids) and how many tokens to generate."""

    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """Tokens in and out of each request of a workload."""

    prompt: list[int]
    output: list[int]


def draw_lengths(
    num_prompts: int, input_range: tuple[int, int], output_range: tuple[int, int], seed: int
) -> Lengths:
    """Lengths drawn uniformly from two inclusive ranges of tokens."""
    draw = random.Random(f"lengths {seed}")
    return Lengths(
        prompt=[draw.randint(*input_range) for _ in range(num_prompts)],
        output=[draw.randint(*output_range) for _ in range(num_prompts)],
    )


def random_prompts(lengths: list[int], vocab_size: int, seed: object) -> list[list[int]]:
    """Random token ids, one list for each length. `seed` is anything that prints the same.

    The first ids of a vocabulary are left out: most models keep their special tokens there.
    """
    draw = random.Random(f"tokens {seed}")
    first = min(100, vocab_size // 2)
    return [[draw.randrange(first, vocab_size) for _ in range(length)] for length in lengths]


def random_texts(lengths: list[int], seed: object) -> list[str]:
    """Texts of that many short words, close to as many tokens; the server counts the true ones."""
    draw = random.Random(f"words {seed}")
    return [" ".join(draw.choices(WORDS, k=length)) for length in lengths]


def random_work(lengths: Lengths, vocab_size: int | None, seed: object) -> list[WorkItem]:
    """A workload of token ids, or of text where `vocab_size` is None."""
    prompts: list[list[int]] | list[str]
    if vocab_size is None:
        prompts = random_texts(lengths.prompt, seed)
    else:
        prompts = random_prompts(lengths.prompt, vocab_size, seed)
    pairs = zip(prompts, lengths.output, strict=True)
    return [WorkItem(prompt, max_tokens) for prompt, max_tokens in pairs]


def load_dataset(path: str | Path, num_requests: int | None) -> list[WorkItem]:
    """A JSON-lines file of {"prompt", "max_tokens"}, repeated from its start until enough.

    Raises ValueError that names the line.
    """
    items = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            items.append(parse_item(line, f"{path}:{number}"))
    if not items:
        raise ValueError(f"{path}: no requests")
    count = len(items) if num_requests is None else num_requests
    return [items[index % len(items)] for index in range(count)]


def parse_item(line: str, where: str) -> WorkItem:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    prompt = item.get("prompt") if isinstance(item, dict) else None
    tokens = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
    if not tokens and not (isinstance(prompt, str) and prompt):
        raise ValueError(f"{where}: prompt must be a text or a list of token ids")
    if type(item.get("max_tokens")) is not int or item["max_tokens"] < 1:
        raise ValueError(f"{where}: max_tokens must be a positive integer")
    return WorkItem(prompt, item["max_tokens"])


def poisson_arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Arrival times in seconds from 0: gaps are exponential with mean 1 / `rate`, so that
    requests come independently of each other and of the server."""
    draw = random.Random(f"arrivals {seed}")
    times, now = [], 0.0
    for _ in range(num_requests):
        times.append(now)
        now += draw.expovariate(rate)
    return times
