"""`offload policies`: LRU against ARC: what each keeps on a host that cannot keep all.

zipf   documents are visited with a chance of 1 / rank; every fourth visit is to a new one
scans  a few documents are visited in turn, twice each; then come many that are never seen again
drift  the documents that are visited change slowly: the latest are visited, old ones never

The device's KV cache holds two requests, so that nearly all hits are the host's; the host holds
--host-share of the documents that come back. Hit rates do not depend on the model: a tiny one has the
same, in less time.
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

from common.bench.core.arguments import finish, positive, positive_number
from common.bench.core.results import column, make_result
from common.bench.core.workload import random_prompts
from common.bench.ladder import known_vocab_size
from common.bench.offload.contenders import (
    BLOCK_SIZE,
    PART,
    Answer,
    Contender,
    add_common_arguments,
    block_bytes,
    engine_job,
    limits_of,
    remarks,
    same_as,
    take_turns,
)
from common.bench.prefix.requests import Request

POLICIES = ("lru", "arc")
QUESTION, OUTPUT = 8, 4  # tokens
COLUMNS = [
    column("workload", "workload"),
    column("policy", "policy"),
    column("visits", "visits", digits=0),
    column("possible", "possible", "%", 0),
    column("found", "found", "%", 0),
    column("host", "of that on the host", "%", 0),
    column("host_blocks", "host blocks", digits=0),
    column("same", "same tokens", "%", 0),
]
Draw = random.Random


def zipf(draw: Draw, documents: int, visits: int) -> list[str]:
    weights = [1 / rank for rank in range(1, documents + 1)]
    chosen = draw.choices(range(documents), weights, k=visits)
    return [f"once-{i}" if i % 4 == 3 else str(one) for i, one in enumerate(chosen)]


def scans(draw: Draw, documents: int, visits: int) -> list[str]:
    """A quarter of the documents, all of them twice; then as many new ones as there are documents."""
    order: list[str] = []
    while len(order) < visits:
        often = [str(i) for i in range(max(2, documents // 4))]
        order += [*draw.sample(often, len(often)), *draw.sample(often, len(often))]
        order += [f"once-{len(order)}-{i}" for i in range(documents)]
    return order[:visits]


def drift(draw: Draw, documents: int, visits: int) -> list[str]:
    """A window of a quarter of the documents that goes on by one with every third visit."""
    width = max(2, documents // 4)
    return [str(i // 3 + draw.randrange(width)) for i in range(visits)]


WORKLOADS: dict[str, Callable[[Draw, int, int], list[str]]] = {
    "zipf": zipf,
    "scans": scans,
    "drift": drift,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--documents", type=positive, default=16, help="default: 16")
    parser.add_argument("--length", type=positive, default=64, help="tokens (default: 64)")
    parser.add_argument("--visits", type=positive, default=160, help="default: 160")
    parser.add_argument("--host-share", type=positive_number, default=0.4, help="default: 0.4")
    add_common_arguments(parser)
    parser.set_defaults(model="random:tiny-llama")


def run(args: argparse.Namespace) -> int:
    per_document = -(-args.length // BLOCK_SIZE)
    host_blocks = int(args.host_share * args.documents * per_document)
    blocks = 2 * (-(-(args.length + QUESTION + OUTPUT) // BLOCK_SIZE) + 1)

    def contender(workload: str, policy: str) -> Contender:
        settings = {
            "num_blocks": blocks,
            "offload": "prefix",
            "offload_policy": policy,
            "host_kv_memory": host_blocks * block_bytes(args.model),
        }
        return Contender(
            policy, lambda n: engine_job(args, PART, requests(args, workload, n), **settings)
        )

    rows, contenders = [], []
    for workload in dict.fromkeys(args.workloads):
        own = [contender(workload, policy) for policy in POLICIES]
        take_turns(own, args.pairs)
        rows += [row(args, workload, one, own[0]) for one in own if one.answers]
        contenders += own
    notes = [
        f"Model {args.model}: {args.visits} visits to {args.documents} documents of {args.length}"
        f" tokens (and new ones), one at a time. The host has {host_blocks} blocks of {BLOCK_SIZE},"
        f" {args.host_share:g} of the documents; the device {blocks}. Found: prompt tokens in either."
        f" Possible: with a host that forgets nothing. {args.pairs} rounds, medians.",
        *remarks(contenders),
    ]
    limits = limits_of(args, contenders)
    title = "Which blocks to keep on the host"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[PART], notes=notes))
    return 1 if any(one.failure for one in contenders) else 0


def requests(args: argparse.Namespace, workload: str, number: int) -> list[Request]:
    seed = f"policies {workload} {args.seed} {number}"
    order = WORKLOADS[workload](random.Random(seed), args.documents, args.visits)
    vocab_size = known_vocab_size(args.model)
    names = list(dict.fromkeys(order))
    documents = random_prompts([args.length] * len(names), vocab_size, f"{seed} documents")
    by_name = dict(zip(names, documents, strict=True))
    questions = random_prompts([QUESTION] * len(order), vocab_size, f"{seed} questions")
    return [
        Request(
            f"visit-{i}",
            i,
            f"visit-{i - 1}" if i else None,
            None,
            by_name[name] + question,
            OUTPUT,
        )
        for i, (name, question) in enumerate(zip(order, questions, strict=True))
    ]


def possible_percent(args: argparse.Namespace, workload: str, number: int) -> float:
    """Of all prompt tokens, those of whole blocks that were visited before."""
    seen: set[tuple[int, ...]] = set()
    found = total = 0
    for request in requests(args, workload, number):
        document = tuple(request.prompt_token_ids[: args.length])
        found += args.length // BLOCK_SIZE * BLOCK_SIZE * (document in seen)
        total += len(request.prompt_token_ids)
        seen.add(document)
    return 100 * found / total


def row(
    args: argparse.Namespace, workload: str, one: Contender, first: Contender
) -> dict[str, Any]:
    def found(answer: Answer) -> float:
        records = answer["records"].values()
        cached, prompt = (sum(r[k] for r in records) for k in ("cached_tokens", "prompt_tokens"))
        return 100 * cached / prompt

    def host(answer: Answer) -> float | None:
        cached = sum(r["cached_tokens"] for r in answer["records"].values())
        return 100 * answer["counters"].get("num_host_hits", 0) / cached if cached else None

    return {
        "workload": workload,
        "policy": one.name,
        "visits": args.visits,
        "possible": possible_percent(args, workload, 0),
        "found": one.median(found),
        "host": one.median(host),
        "host_blocks": int(args.host_share * args.documents * -(-args.length // BLOCK_SIZE)),
        "same": same_as(one, first),
        "found_by_round": list(one.each(found).values()),
    }
