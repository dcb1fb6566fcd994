"""`offload returning`: conversations that come back when the device has long evicted their blocks.

The KV cache holds one and a half conversations. Each has its first turn, one after the other, and
then each its second. So at each second turn its blocks are gone from the device: they are computed
anew, or they come back from the host. Beside them, a KV cache that is large enough for all.
"""

import argparse
from typing import Any

from common.bench.core.arguments import finish, positive
from common.bench.core.results import column, make_result
from common.bench.ladder import known_vocab_size
from common.bench.offload import conversations
from common.bench.offload.contenders import (
    BLOCK_SIZE,
    HOST_BYTES,
    PART,
    Answer,
    Contender,
    add_common_arguments,
    engine_job,
    limits_of,
    rate,
    remarks,
    same_as,
    take_turns,
    times_less,
)
from common.bench.prefix.requests import Request

SHARE = 1.5  # conversations that the small KV cache holds
COLUMNS = [
    column("engine", "second turn's prefix"),
    column("cached", "found", "%", 0),
    column("first_ms", "TTFT, first turn", "ms", 0),
    column("again_ms", "second turn", "ms", 0),
    column("ratio", "times shorter", digits=1),
    column("in_mb", "copied back", "MB", 0),
    column("in_gbps", "at", "GB/s", 1),
    column("token_kb", "a token's KV", "kB", 1),
    column("same", "same tokens", "%", 0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=positive, default=4, help="default: 4")
    parser.add_argument("--length", type=positive, default=800, help="tokens (default: 800)")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    small = conversations.num_blocks(args.length, SHARE)
    whole = conversations.num_blocks(args.length, args.conversations + 1)

    def contender(name: str, blocks: int, **settings: Any) -> Contender:
        return Contender(
            name, lambda n: engine_job(args, PART, requests(args, n), num_blocks=blocks, **settings)
        )

    contenders = [
        contender("computed anew", small, offload="off"),
        contender("on the host", small, offload="prefix", host_kv_memory=HOST_BYTES),
        contender("on the device", whole, offload="off"),
    ]
    take_turns(contenders, args.pairs)
    rows = [row(one, contenders[0]) for one in contenders if one.answers]
    notes = [
        f"Model {args.model}, greedy: {args.conversations} conversations of {args.length} tokens,"
        f" then a second turn of each with {conversations.QUESTION} more; answers of"
        f" {conversations.OUTPUT}. The KV cache has {small} blocks of {BLOCK_SIZE}, {SHARE:g}"
        f" conversations; in the last row {whole}. Fresh processes, in turns, {args.pairs} rounds,"
        " medians.",
        *remarks(contenders),
    ]
    limits = limits_of(args, contenders)
    title = "Conversations that return"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[PART], notes=notes))
    return 1 if any(one.failure for one in contenders) else 0


def requests(args: argparse.Namespace, number: int) -> list[Request]:
    vocab_size, seed = known_vocab_size(args.model), f"returning {args.seed} {number}"
    first = conversations.first_turns(args.conversations, args.length, vocab_size, seed)
    return first + conversations.second_turns(first, vocab_size, seed)


def row(one: Contender, first: Contender) -> dict[str, Any]:
    def again(answer: Answer) -> float | None:
        return conversations.ttft_ms(answer, "again")

    return {
        "engine": one.name,
        "cached": one.median(lambda answer: conversations.cached_percent(answer, "again")),
        "first_ms": one.median(lambda answer: conversations.ttft_ms(answer, "first")),
        "again_ms": one.median(again),
        "ratio": times_less(one, first, again),
        "in_mb": one.median(lambda answer: answer["counters"].get("offload_bytes_load", 0) / 1e6),
        "in_gbps": one.median(lambda answer: rate(answer, "load")),
        "token_kb": one.median(lambda answer: answer["token_bytes"] / 1000),
        "same": same_as(one, first),
        "again_runs_ms": list(one.each(again).values()),
        "counters": {number: answer["counters"] for number, answer in one.answers.items()},
    }
