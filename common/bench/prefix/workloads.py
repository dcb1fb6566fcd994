"""The four workloads of `prefix`, drawn from a seed.

    schema    one system prompt with a JSON schema before every question; all come at once
    document  one long document, and question after question about it, one at a time
    agent     a tree: each prompt is its parent's prompt, what the parent generated, and new tokens
    eviction  more documents than the KV cache holds: few that come back often, many seldom, and some
              that never do; two clients, each with one request at a time

Token ids are random, so that prompts share what is said here and nothing else.
"""

import itertools
import random
from dataclasses import dataclass

from common.bench.core.report import plural
from common.bench.core.workload import random_prompts
from common.bench.prefix.requests import Request, whole_lengths

WORKLOADS = ("schema", "document", "agent", "eviction")
NUM_CLIENTS = 2  # of the eviction workload


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are handed over, and the KV cache that they get."""

    name: str
    text: str  # what it is, for the notes
    requests: list[Request]
    num_blocks: int

    @property
    def is_serial(self) -> bool:
        """Whether there is one request at a time: one miss, and then the hits."""
        return len({request.stage for request in self.requests}) == len(self.requests)


@dataclass(frozen=True)
class Sizes:
    """Counts, and lengths in tokens; pairs are inclusive ranges."""

    schema: int = 400
    schema_requests: int = 32
    schema_question: tuple[int, int] = (32, 64)
    schema_output: int = 16
    document: int = 1200
    document_questions: int = 12
    document_question: tuple[int, int] = (16, 32)
    document_output: int = 16
    agent: int = 300  # of the root
    agent_levels: int = 3
    agent_branches: int = 3
    agent_new: tuple[int, int] = (32, 48)
    agent_output: tuple[int, int] = (16, 32)
    eviction: int = 128  # of each document
    eviction_documents: int = 12  # that may come back
    eviction_visits: int = 40  # every fourth is of a document that does not
    eviction_question: tuple[int, int] = (16, 32)
    eviction_output: int = 8


QUICK = Sizes(
    schema=64, schema_requests=16, schema_question=(8, 16), schema_output=4,
    document=160, document_questions=4, document_question=(8, 16), document_output=4,
    agent=48, agent_levels=3, agent_branches=2, agent_new=(8, 12), agent_output=(4, 8),
    eviction=48, eviction_documents=6, eviction_visits=16, eviction_question=(8, 12),
    eviction_output=4,
)  # fmt: skip


class Draw:
    """One workload's source of lengths and tokens."""

    def __init__(self, name: str, vocab_size: int, seed: int) -> None:
        self.name, self.vocab_size, self.seed = name, vocab_size, seed
        self.random = random.Random(f"{name} {seed}")
        self.numbers = itertools.count()

    def tokens(self, length: int | tuple[int, int]) -> list[int]:
        """New random token ids."""
        if not isinstance(length, int):
            length = self.random.randint(*length)
        name = f"{self.seed} {self.name} {next(self.numbers)}"
        return random_prompts([length], self.vocab_size, name)[0]


def make_workload(
    name: str, sizes: Sizes, vocab_size: int, seed: int, block_size: int, kv_share: float
) -> Workload:
    """One of WORKLOADS; the same arguments give the same.

    kv_share: how much of the eviction workload's documents the KV cache holds. The others get one
    that holds every request by itself. Raises ValueError where two requests do not fit.
    """
    draw = Draw(name, vocab_size, seed)
    if name == "eviction":
        return eviction(draw, sizes, block_size, kv_share)
    text, requests = {"schema": schema, "document": document, "agent": agent}[name](draw, sizes)
    lengths = whole_lengths(requests).values()
    num_blocks = sum(-(-length // block_size) for length in lengths) + len(requests)
    return Workload(name, text, requests, num_blocks)


def schema(draw: Draw, sizes: Sizes) -> tuple[str, list[Request]]:
    shared, count = draw.tokens(sizes.schema), sizes.schema_requests
    requests = [
        Request(
            f"schema-{number}",
            0,
            None,
            None,
            shared + draw.tokens(sizes.schema_question),
            sizes.schema_output,
        )
        for number in range(count)
    ]
    text = (
        f"{sizes.schema} tokens before {count} questions of {span(sizes.schema_question)}, all at"
        f" once; {sizes.schema_output} out"
    )
    return text, requests


def document(draw: Draw, sizes: Sizes) -> tuple[str, list[Request]]:
    shared, count = draw.tokens(sizes.document), sizes.document_questions
    requests = [
        Request(
            f"document-{number}",
            number,
            f"document-{number - 1}" if number else None,
            None,
            shared + draw.tokens(sizes.document_question),
            sizes.document_output,
        )
        for number in range(count)
    ]
    text = (
        f"{sizes.document} tokens, {count} questions of {span(sizes.document_question)} about them,"
        f" one after the other; {sizes.document_output} out"
    )
    return text, requests


def agent(draw: Draw, sizes: Sizes) -> tuple[str, list[Request]]:
    requests: list[Request] = []
    parents: list[str | None] = [None]
    for level in range(sizes.agent_levels):
        names: list[str | None] = []
        for parent in parents:
            for _ in range(sizes.agent_branches if level else 1):
                names.append(f"agent-{len(requests)}")
                tokens = draw.tokens(sizes.agent_new if level else sizes.agent)
                most = draw.random.randint(*sizes.agent_output)
                requests.append(Request(names[-1], level, parent, parent, tokens, most))
        parents = names
    text = (
        f"a tree of {sizes.agent_levels} levels, {sizes.agent_branches} branches each,"
        f" {len(requests)} requests: {sizes.agent} tokens in the root; each other has its parent's"
        f" prompt, the parent's output and {span(sizes.agent_new)} more; {span(sizes.agent_output)}"
        " out"
    )
    return text, requests


def eviction(draw: Draw, sizes: Sizes, block_size: int, kv_share: float) -> Workload:
    documents = [draw.tokens(sizes.eviction) for _ in range(sizes.eviction_documents)]
    weights = [1 / rank for rank in range(1, len(documents) + 1)]  # Zipf's
    visited: list[list[int]] = []
    requests: list[Request] = []
    for visit in range(sizes.eviction_visits):
        [chosen] = draw.random.choices(documents, weights)
        if visit % 4 == 3:
            chosen = draw.tokens(sizes.eviction)
        if chosen not in visited:
            visited.append(chosen)
        stage = visit // NUM_CLIENTS
        before = f"eviction-{visit - NUM_CLIENTS}" if stage else None
        prompt = chosen + draw.tokens(sizes.eviction_question)
        requests.append(
            Request(f"eviction-{visit}", stage, before, None, prompt, sizes.eviction_output)
        )
    num_blocks = int(kv_share * len(visited) * -(-sizes.eviction // block_size))
    longest = max(whole_lengths(requests).values())
    needed = NUM_CLIENTS * (-(-longest // block_size) + 1)
    if num_blocks < needed:
        raise ValueError(
            f"--kv-share {kv_share:g} leaves {num_blocks} blocks of {block_size} tokens;"
            f" {NUM_CLIENTS} requests need {needed}"
        )
    text = (
        f"{len(requests)} visits, by {NUM_CLIENTS} clients, to {len(visited)} documents of"
        f" {sizes.eviction} tokens, the most popular ones often, {sizes.eviction_visits // 4} once,"
        f" with questions of {span(sizes.eviction_question)}; {sizes.eviction_output} out; the KV"
        f" cache has {plural(num_blocks, 'block')}, {100 * kv_share:.0f}% of the documents"
    )
    return Workload("eviction", text, requests, num_blocks)


def span(pair: tuple[int, int]) -> str:
    return f"{pair[0]} to {pair[1]}"
