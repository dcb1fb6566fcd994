"""Two workloads as services see them, drawn from a seed: a chat, and long documents.

Lengths are log-normal: most are short, some are many times as long. The means are published ones; the
shape parameter sigma is ours, chosen so that the 99th percentile is 6 to 7 times the median for chats,
whose lengths vary most, and about 2 for documents, all of which are long.

    chat       ShareGPT's means, 161 tokens in and 338 out (Kwon et al., SOSP 2023, figure 11): 12 users,
               each with a conversation of up to three turns, in which each turn has all before it
    documents  LongBench's means, 1738 in and 91 out (Zhong et al., OSDI 2024, figure 7): 4 users with two
               documents each, one after the other; asked for the document's words again

Texts are sentences in a random order where the model has a tokenizer, so that drafts have a language to
work on; else token ids.
"""

import math
import random
import re
from dataclasses import dataclass
from typing import Any

from common.bench.core.workload import random_prompts
from common.bench.prefix.requests import Request, whole_lengths
from common.bench.prefix.workloads import Workload
from common.bench.speculative.prompts import PROGRAMS, TEXTS

MIXES = ("chat", "documents")
MIN_TOKENS = 4
QUOTE = "\n\nThe same text again, word for word:\n\n"


@dataclass(frozen=True)
class LogNormal:
    """A length in tokens, by its mean and the standard deviation of its logarithm."""

    mean: float
    sigma: float
    most: int  # what is longer is cut

    def draw(self, source: random.Random, scale: float) -> int:
        """scale: all lengths are multiplied by it."""
        mu = math.log(self.mean * scale) - self.sigma**2 / 2
        length = source.lognormvariate(mu, self.sigma)
        return max(MIN_TOKENS, min(round(length), round(self.most * scale)))


@dataclass(frozen=True)
class Mix:
    """users: each has one request at a time, and `requests` in all, at most."""

    prompt: LogNormal
    output: LogNormal
    users: int
    requests: int
    is_conversation: bool  # a request has all before it in its prompt


MIX = {
    "chat": Mix(LogNormal(161, 0.8, 1024), LogNormal(338, 0.8, 1024), 12, 3, True),
    "documents": Mix(LogNormal(1738, 0.3, 4096), LogNormal(91, 0.5, 512), 4, 2, False),
}


class Words:
    """Tokens of sentences in a random order, without an end."""

    def __init__(self, tokenizer: Any, vocab_size: int, seed: object) -> None:
        self.tokenizer, self.vocab_size, self.seed = tokenizer, vocab_size, seed
        self.source, self.count = random.Random(f"words {seed}"), 0
        self.sentences = [s for text in TEXTS for s in re.findall(r"[^.]+\.", text)]

    def tokens(self, length: int) -> list[int]:
        self.count += 1
        if self.tokenizer is None:
            return random_prompts([length], self.vocab_size, f"{self.seed} {self.count}")[0]
        found: list[int] = []
        while len(found) < length:
            pieces = [*self.source.sample(self.sentences, 8), self.source.choice(PROGRAMS)]
            found += self.tokenizer.encode("".join(pieces) + "\n")
        return found[:length]


def make_mix(
    name: str, tokenizer: Any, vocab_size: int, seed: int, block_size: int, scale: float, most: int
) -> Workload:
    """One of MIXES; the same arguments give the same.

    scale: of all lengths. most: the model's context, which no request passes: the conversation that
    would ends before. The KV cache holds the longest requests of as many users as there are.
    """
    mix, source = MIX[name], random.Random(f"{name} {seed}")
    words = Words(tokenizer, vocab_size, f"{name} {seed}")
    turns: list[list[Request]] = []  # by user
    for user in range(mix.users):
        own: list[Request] = []
        length = 0  # of the conversation so far
        count = source.randint(1, mix.requests) if mix.is_conversation else mix.requests
        for turn in range(count):
            prompt = words.tokens(mix.prompt.draw(source, scale))
            if not mix.is_conversation and tokenizer is not None:
                prompt = prompt + tokenizer.encode(QUOTE)
            output = mix.output.draw(source, scale)
            length = len(prompt) + output + (length if mix.is_conversation else 0)
            if length > most:
                break
            before = own[-1].request_id if own else None
            parent = before if mix.is_conversation else None
            request_id = f"{name}-{user}-{turn}"
            own.append(Request(request_id, turn, before, parent, prompt, output))
        turns.append(own)
    requests = [request for own in turns for request in own]
    if not requests:
        raise ValueError(f"{name}: no request fits a context of {most} tokens; see --scale")
    lengths = sorted(whole_lengths(requests).values())[-mix.users :]
    num_blocks = sum(-(-length // block_size) + 1 for length in lengths)
    return Workload(name, text_of(name, requests, mix), requests, num_blocks)


def text_of(name: str, requests: list[Request], mix: Mix) -> str:
    """What it is, for the notes."""
    prompts = [len(request.prompt_token_ids) for request in requests]
    outputs = [request.max_tokens for request in requests]
    what = "turns of conversations" if mix.is_conversation else "documents"
    new = "new " if mix.is_conversation else ""
    return (
        f"{len(requests)} {what} by {mix.users} users, {min(prompts)} to {max(prompts)} {new}tokens in"
        f" (mean {sum(prompts) / len(prompts):.0f}), {min(outputs)} to {max(outputs)} out (mean"
        f" {sum(outputs) / len(outputs):.0f})"
    )
