"""`offload burst`: sequences that need more KV than there is: swapped out and in, or computed twice.

All requests come at once. They start with short prompts, so many are admitted together, and grow
until the KV cache is full: the engine must take blocks from some of them again and again. --times
says how many times the KV cache all of them would fill. Recomputed: tokens that were computed once
more after a preemption. Longest wait: between two tokens of a request, the median over requests.
"""

import argparse
import statistics
from typing import Any

from common.bench.core.arguments import finish, positive, positive_number
from common.bench.core.results import column, make_result
from common.bench.core.workload import random_prompts
from common.bench.ladder import known_vocab_size
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

COLUMNS = [
    column("engine", "preempted sequences are"),
    column("preemptions", "preemptions", digits=0),
    column("recomputed", "tokens recomputed", digits=0),
    column("swapped", "swapped", digits=0),
    column("copied_mb", "copied, both ways", "MB", 0),
    column("out_gbps", "out", "GB/s", 1),
    column("in_gbps", "in", "GB/s", 1),
    column("gap_ms", "longest wait", "ms", 0),
    column("total_s", "total", "s", 2),
    column("ratio", "times faster", digits=2),
    column("same", "same tokens", "%", 0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=positive, default=16, help="default: 16")
    parser.add_argument("--prompt-len", type=positive, default=32, help="tokens (default: 32)")
    parser.add_argument("--output-len", type=positive, default=224, help="tokens (default: 224)")
    parser.add_argument("--times", type=positive_number, default=4.0, help="default: 4")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    length = args.prompt_len + args.output_len
    blocks = int(args.requests * -(-length // BLOCK_SIZE) / args.times)
    if blocks * BLOCK_SIZE <= length:
        raise ValueError(f"--times {args.times:g}: no room for one request of {length} tokens")

    def contender(name: str, **settings: Any) -> Contender:
        own = {"num_blocks": blocks, "max_num_seqs": args.requests, **settings}
        return Contender(name, lambda n: engine_job(args, PART, requests(args, n), **own))

    contenders = [
        contender("computed again", offload="off"),
        contender("swapped", offload="swap", host_kv_memory=HOST_BYTES),
    ]
    take_turns(contenders, args.pairs)
    rows = [row(one, contenders[0]) for one in contenders if one.answers]
    notes = [
        f"Model {args.model}, greedy: {args.requests} requests of {args.prompt_len} tokens in and"
        f" {args.output_len} out, all at once. The KV cache has {blocks} blocks of {BLOCK_SIZE}"
        f" tokens, a {args.times:g}th of what all need. Fresh processes, in turns, {args.pairs}"
        " rounds, medians.",
        *remarks(contenders),
    ]
    limits = limits_of(args, contenders)
    title = f"A burst of {args.times:g} times the KV cache"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[PART], notes=notes))
    return 1 if any(one.failure for one in contenders) else 0


def requests(args: argparse.Namespace, number: int) -> list[Request]:
    lengths, vocab_size = [args.prompt_len] * args.requests, known_vocab_size(args.model)
    prompts = random_prompts(lengths, vocab_size, f"burst {args.seed} {number}")
    return [
        Request(f"burst-{i}", 0, None, None, prompt, args.output_len)
        for i, prompt in enumerate(prompts)
    ]


def row(one: Contender, first: Contender) -> dict[str, Any]:
    def seconds(answer: Answer) -> float:
        return answer["seconds"]

    def gap(answer: Answer) -> float:
        return 1000 * statistics.median(r["gap_s"] for r in answer["records"].values())

    def copied(answer: Answer) -> float:
        counters = answer["counters"]
        return sum(counters.get(f"offload_bytes_{way}", 0) for way in ("save", "load")) / 1e6

    return {
        "engine": one.name,
        "preemptions": one.count("num_preemptions"),
        "recomputed": one.count("num_recomputed_tokens"),
        "swapped": one.count("num_swapped_tokens"),
        "copied_mb": one.median(copied),
        "out_gbps": one.median(lambda answer: rate(answer, "save")),
        "in_gbps": one.median(lambda answer: rate(answer, "load")),
        "gap_ms": one.median(gap),
        "total_s": one.median(seconds),
        "ratio": times_less(one, first, seconds),
        "same": same_as(one, first),
        "seconds": list(one.each(seconds).values()),
        "counters": {number: answer["counters"] for number, answer in one.answers.items()},
    }
