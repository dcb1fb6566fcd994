"""`offload restart`: conversations that go on in a new process: what the disk tier saves.

One process has the first turns and ends. A fresh one has the second turns: it computes all anew, or
reads blocks from the disk tier. Two rows for the disk: files as the system has them in memory after
they were written, and after they were dropped from it (posix_fadvise), so that they come from the
disk. Start: seconds to build the second engine, which looks through the folder.
"""

import argparse
import os
import tempfile
from pathlib import Path
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
    remarks,
    same_as,
    take_turns,
    times_less,
)
from common.bench.prefix.requests import Request

DISK_BYTES = 4 << 30
COLUMNS = [
    column("engine", "after the restart"),
    column("cached", "found", "%", 0),
    column("start_s", "start", "s", 2),
    column("again_ms", "TTFT, second turn", "ms", 0),
    column("ratio", "times shorter", digits=1),
    column("disk_mb", "in the folder", "MB", 0),
    column("same", "same tokens", "%", 0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conversations", type=positive, default=3, help="default: 3")
    parser.add_argument("--length", type=positive, default=800, help="tokens (default: 800)")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    blocks = conversations.num_blocks(args.length, args.conversations + 1)
    contenders = [
        Contender("computed anew", lambda n: without(args, n, blocks)),
        Contender("disk tier, files in memory", lambda n: with_disk(args, n, blocks, False)),
        Contender("disk tier, files on the disk", lambda n: with_disk(args, n, blocks, True)),
    ]
    take_turns(contenders, args.pairs)
    rows = [row(one, contenders[0]) for one in contenders if one.answers]
    notes = [
        f"Model {args.model}, greedy: {args.conversations} conversations of {args.length} tokens in"
        f" one process; in the next one a second turn of each, with {conversations.QUESTION} more"
        f" tokens. Blocks of {BLOCK_SIZE}; the KV cache holds all. Fresh processes, in turns,"
        f" {args.pairs} rounds, medians.",
        *remarks(contenders),
    ]
    limits = limits_of(args, contenders)
    title = "Conversations after a restart"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, parts=[PART], notes=notes))
    return 1 if any(one.failure for one in contenders) else 0


def without(args: argparse.Namespace, number: int, blocks: int) -> Answer:
    """Both processes, no host tier."""
    first = turns(args, number)
    before = engine_job(args, PART, first, num_blocks=blocks, offload="off")
    return engine_job(args, PART, seconds_of(args, first, before, number), num_blocks=blocks)


def with_disk(args: argparse.Namespace, number: int, blocks: int, cold: bool) -> Answer:
    """Both processes, with a folder that is made for them and removed."""
    with tempfile.TemporaryDirectory(prefix="bench-kv-") as name:
        folder = Path(name) / "kv"
        tier = {
            "offload": "prefix",
            "host_kv_memory": HOST_BYTES,
            "disk_kv": str(folder),
            "disk_kv_memory": DISK_BYTES,
        }
        first = turns(args, number)
        before = engine_job(args, PART, first, num_blocks=blocks, **tier)
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if cold:
            forget_files(folder)
        second = seconds_of(args, first, before, number)
        answer = engine_job(args, PART, second, num_blocks=blocks, **tier)
    return answer | {"disk_bytes": held}


def turns(args: argparse.Namespace, number: int) -> list[Request]:
    seed = f"restart {args.seed} {number}"
    vocab_size = known_vocab_size(args.model)
    return conversations.first_turns(args.conversations, args.length, vocab_size, seed)


def seconds_of(
    args: argparse.Namespace, first: list[Request], before: Answer, number: int
) -> list[Request]:
    """The second turns as whole prompts: in the new process nobody knows the first."""
    seed, vocab_size = f"restart {args.seed} {number}", known_vocab_size(args.model)
    requests: list[Request] = []
    for old, new in zip(first, conversations.second_turns(first, vocab_size, seed), strict=True):
        prompt = old.prompt_token_ids + before["records"][old.request_id]["token_ids"]
        depends_on = requests[-1].request_id if requests else None
        prompt = prompt + new.prompt_token_ids
        requests.append(
            Request(new.request_id, len(requests), depends_on, None, prompt, new.max_tokens)
        )
    return requests


def forget_files(folder: Path) -> None:
    """Drop what the system holds of them in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row(one: Contender, first: Contender) -> dict[str, Any]:
    def again(answer: Answer) -> float | None:
        return conversations.ttft_ms(answer, "again")

    return {
        "engine": one.name,
        "cached": one.median(lambda answer: conversations.cached_percent(answer, "again")),
        "start_s": one.median(lambda answer: answer["construct_s"]),
        "again_ms": one.median(again),
        "ratio": times_less(one, first, again),
        "disk_mb": one.median(lambda answer: answer.get("disk_bytes", 0) / 1e6),
        "same": same_as(one, first),
        "again_runs_ms": list(one.each(again).values()),
        "counters": {number: answer["counters"] for number, answer in one.answers.items()},
    }
