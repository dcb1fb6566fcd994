"""`kv`: how many sequences a piece of KV memory holds, in strips and in blocks.

The same requests, handed over at once, through four caches of one size:

    strips of the context      contiguous, each as long as a sequence may ever become
    strips of the request      contiguous, each as long as the request says it may become
    part 03                    blocks, reserved for the whole request; a static batch
    part 04                    blocks, taken as the sequence grows; sequences join and leave

Strips are computed, once in static batches and once joining and leaving; the parts run, and their
traces are counted. Requests either say how long they become (max_tokens, and they become that
long) or say nothing and end early: the case that a cache must be made for. No time is measured.
"""

import argparse
from typing import Any

from common.bench.core.arguments import (
    DEFAULT_MODEL,
    add_output_arguments,
    finish,
    length_range,
    positive,
    progress,
)
from common.bench.core.processes import part_package, run_worker
from common.bench.core.rates import MIXED_OUTPUT, MIXED_PROMPT
from common.bench.core.results import column, make_result
from common.bench.core.workload import draw_lengths
from common.bench.kv.usage import Request, Strips, Usage

COLUMNS = [
    column("cache", "cache"),
    column("batch", "batch"),
    column("said", "max_tokens"),
    column("block_size", "block", "tokens", 0),
    column("most", "most at once", digits=0),
    column("mean", "mean at once", digits=1),
    column("tokens", "holds tokens", "%", 0),
    column("last_block", "rest of last block", "%", 1),
    column("reserved", "reserved", "%", 0),
    column("ended", "of ended", "%", 0),
    column("free", "free", "%", 0),
    column("steps", "steps", digits=0),
    column("for_nothing", "computed for nothing", "%", 0),
]
BATCHES = {3: "static", 4: "joins and leaves"}  # part -> how it batches
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    parser.add_argument("--memory", type=positive, default=64, help="MiB of KV cache (default: 64)")
    parser.add_argument(
        "--max-model-len",
        type=positive,
        help="tokens a sequence may have (default: what model and memory allow)",
    )
    parser.add_argument("--requests", type=positive, default=64, help="default: 64")
    parser.add_argument("--input-range", type=positive, nargs=2, metavar=("MIN", "MAX"))
    parser.add_argument("--output-range", type=positive, nargs=2, metavar=("MIN", "MAX"))
    parser.add_argument("--block-size", type=positive, default=16, help="default: 16")
    parser.add_argument(
        "--other-block-sizes",
        type=positive,
        nargs="*",
        default=[1, 64, 256],
        metavar="TOKENS",
        help="where max_tokens is given, measure these too (default: 1 64 256)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--verbose", action="store_true", help="show what the engines print")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    for part in BATCHES:
        part_package(part)
    given = requests_of(args, given=True)
    unset = requests_of(args, given=False)
    runs = [
        (part, size, requests)
        for size, requests in [
            (args.block_size, given),
            (args.block_size, unset),
            *((size, given) for size in args.other_block_sizes),
        ]
        for part in BATCHES
    ]
    answers = [measured(args, *one) for one in progress(runs, "runs")]
    room = args.memory * MIB // answers[0]["token_bytes"]
    rows: list[dict[str, Any]] = []
    for requests in (given, unset):
        for part, batch in BATCHES.items():
            index = runs.index((part, args.block_size, requests))
            rows += strip_rows(requests, room, batch, answers[: len(BATCHES)])
            rows.append(part_row(runs[index], answers[index], room))
    for one, answer in zip(runs, answers, strict=True):
        if one[1] != args.block_size:
            rows.append(part_row(one, answer, room))
    result = make_result(
        f"What {args.memory} MiB of keys and values hold",
        COLUMNS,
        rows,
        limits={"unmeasured": "no time is measured here"},
        parts=BATCHES,
        notes=notes(args, room, answers[0], rows),
    )
    finish(args, result)
    return 0


def requests_of(args: argparse.Namespace, given: bool) -> list[Request]:
    lengths = draw_lengths(
        args.requests,
        length_range(args.input_range or list(MIXED_PROMPT), None, 0),
        length_range(args.output_range or list(MIXED_OUTPUT), None, 0),
        args.seed,
    )
    pairs = zip(lengths.prompt, lengths.output, strict=True)
    return [Request(prompt, output, output if given else None) for prompt, output in pairs]


def measured(
    args: argparse.Namespace, part: int, block_size: int, requests: list[Request]
) -> dict[str, Any]:
    """Run the requests through a part in a fresh process."""
    settings = {
        "block_size": block_size,
        "kv_cache_memory": args.memory * MIB,
        "max_num_seqs": len(requests),
    }
    if args.max_model_len:
        settings["max_model_len"] = args.max_model_len
    job = {
        "job": "kv",
        "part": part,
        "model": args.model,
        "settings": settings,
        "requests": [vars(request) for request in requests],
        "seed": args.seed,
    }
    return run_worker(job, verbose=args.verbose)


def strip_rows(
    requests: list[Request], room: int, batch: str, answers: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Both kinds of strips; one kind where no request says how long it becomes."""
    kinds = {"strips of the context": True}
    if requests[0].max_tokens is not None:
        kinds["strips of the request"] = False
    rows = []
    for name, whole_context in kinds.items():
        usage = Strips(
            requests,
            room,
            answers[0]["context"],
            whole_context=whole_context,
            static=batch == BATCHES[3],
            max_num_batched_tokens=answers[-1]["max_num_batched_tokens"],
        ).run()
        rows.append(labels(name, batch, requests, None) | usage.row(room, requests))
    return rows


def part_row(
    one: tuple[int, int, list[Request]], answer: dict[str, Any], room: int
) -> dict[str, Any]:
    part, block_size, requests = one
    row = Usage(**answer["usage"]).row(room, requests)
    return labels(f"part {part:02d}", BATCHES[part], requests, block_size) | row


def labels(
    cache: str, batch: str, requests: list[Request], block_size: int | None
) -> dict[str, Any]:
    said = "unset" if requests[0].max_tokens is None else "given"
    return {"cache": cache, "batch": batch, "said": said, "block_size": block_size}


def notes(
    args: argparse.Namespace, room: int, answer: dict[str, Any], rows: list[dict[str, Any]]
) -> list[str]:
    """What the columns say, and what was computed and not run."""
    low, high = args.input_range or MIXED_PROMPT
    least, most = args.output_range or MIXED_OUTPUT
    scattered = [row["scattered"] for row in rows if row["cache"] == "strips of the request"]
    return [
        f"Model {args.model}: {answer['token_bytes']:,} bytes a token, so room for {room:,} tokens;"
        f" a sequence may have {answer['context']:,}. {args.requests} requests of {low} to {high}"
        f" tokens in and {least} to {most} out, all handed over at once, first come, first served.",
        "Parts: run, and counted from the trace. Strips: computed from the same requests by the same"
        " rules, each strip in the first hole that it fits in;"
        f" the strips of the request missed a hole, though enough was free in pieces, in"
        f" {scattered[-1]:.0f}% of the steps when joining and leaving.",
        "max_tokens given: what the request generates. Unset: the engine does not know it, and the"
        " caller aborts the request when it has its tokens, as at a stop string.",
        "Shares of the memory are means over the steps. Reserved: taken beyond the block that holds"
        " the last token. Of ended: taken by those that ended before their batch. Computed for"
        " nothing: tokens of sequences that had ended, or that were computed before.",
    ]
