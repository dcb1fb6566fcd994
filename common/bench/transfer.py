"""`transfer`: KV from one process to another, each transport beside a plain copy of as many bytes.

A sender in a process of its own has a prompt's blocks ready; a receiver here asks for them and fetches
them, into blocks that lie in another order. `copying` is the time in which bytes are moved (for tcp and
nixl what the receiver's side of it takes), `transfer` all from the request to the end, messages included.
The copy is numpy's, of one piece of memory, which both sides have written before. Copy and transfer take
turns; medians.
"""

import argparse
import statistics
import time
from contextlib import closing
from typing import Any

import numpy as np

from common.bench.core.arguments import add_output_arguments, finish, positive, progress
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.processes import run_worker
from common.bench.core.results import Result, column, make_result

TRANSPORTS = ("shm", "tcp", "nixl")
NUM_LAYERS = 30  # SmolLM2-135M's; its block of 16 tokens has 737,280 bytes
COLUMNS = [
    column("transport", "transport"),
    column("block_kib", "a block", "KiB", 0),
    column("num_blocks", "blocks", digits=0),
    column("mib", "in all", "MiB", 1),
    column("copy_gbps", "plain copy", "GB/s", 2),
    column("moving_gbps", "copying", "GB/s", 2),
    column("transfer_gbps", "transfer", "GB/s", 2),
    column("share", "of the plain copy", "%", 0),
    column("ms", "transfer", "ms", 2),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--transports", nargs="+", default=["shm", "tcp"], choices=TRANSPORTS, metavar="NAME",
        help=f"of {', '.join(TRANSPORTS)}; default: shm tcp",
    )  # fmt: skip
    parser.add_argument(
        "--block-sizes", type=positive, nargs="+", default=[16, 128], metavar="TOKENS",
        help="a token has 46,080 bytes (default: 16 128)",
    )  # fmt: skip
    parser.add_argument(
        "--num-tokens", type=positive, nargs="+", default=[128, 1024, 4096], metavar="TOKENS",
        help="of a prompt (default: 128 1024 4096)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=15, help="default: 15")
    parser.add_argument("--quick-limits", action="store_true", help="measure limits in a second")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    kinds = [(t, size) for t in dict.fromkeys(args.transports) for size in args.block_sizes]
    rows: list[dict[str, Any]] = []
    others = OtherWork()
    from common.testing.kv_worker import Nursery  # needs msgspec, which other benches do not

    with closing(Nursery()) as nursery:
        for transport, block_size in progress(kinds, "transports"):
            rows += measure(nursery, transport, block_size, args.num_tokens, args.repeats)
    limits = run_worker({"job": "limits", "device": "cpu", "quick": args.quick_limits})
    finish(args, transfer_result(args, rows, limits, others.cores()))
    return 0


def measure(
    nursery: Any, transport: str, block_size: int, num_tokens: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Rows of one kind of block, each of another number of blocks."""
    from common.kv_transfer import Receiver
    from common.testing.kv_worker import SECRET, Worker, contents

    counts = sorted({-(-n // block_size) for n in num_tokens})
    shape = [max(counts) + 8, NUM_LAYERS, 2, block_size, 3, 64]
    order = np.random.default_rng(0)
    theirs, ours = (order.permutation(shape[0]).tolist() for _ in range(2))
    job = {"role": "sender", "shape": shape, "seed": 1, "transport": transport, "auto": theirs}
    target = contents(shape, None)
    target.fill_(1.0)
    known: dict[str, Any] = {"fingerprint": {"model": "test"}, "secret": SECRET, "timeout": 60.0}
    rows = []
    with (
        closing(Worker(nursery, **job)) as worker,
        closing(Receiver([target], **known)) as receiver,
    ):
        for count in counts:
            blocks = ours[:count]
            num_bytes = count * target[0].numel() * 4
            source, copy = (np.ones(num_bytes, dtype=np.uint8) for _ in range(2))
            samples: list[tuple[float, float, float]] = []
            for i in range(repeats + 2):
                begin = time.perf_counter()
                np.copyto(copy, source)
                copying = time.perf_counter() - begin
                sample = fetch(worker.address, receiver, f"{count} {i}", blocks)
                samples.append((copying, *sample))
            expected = contents(shape, 1)[theirs[:count]].numpy().view(np.int32)
            if not np.array_equal(target[blocks].numpy().view(np.int32), expected):
                raise ValueError("the blocks that have come are not those that were sent")
            rows.append(row_of(transport, block_size, count, num_bytes, samples[2:]))
    return rows


def fetch(address: str, receiver: Any, name: str, blocks: list[int]) -> tuple[float, float]:
    """Seconds of one transfer: that bytes are moved, and in all."""
    begin = time.perf_counter()
    receiver.request(address, name, [1], None, len(blocks))
    receiver.fetch(name, 0, blocks)
    if not receiver.wait(60):
        raise ValueError(f"a transfer of {len(blocks)} blocks does not end")
    (fetched,) = receiver.finished()
    if fetched.error is not None:
        raise ValueError(fetched.error)
    return fetched.times["copying"], time.perf_counter() - begin


def row_of(
    transport: str,
    block_size: int,
    num_blocks: int,
    num_bytes: int,
    samples: list[tuple[float, float, float]],
) -> dict[str, Any]:
    """samples: seconds of the plain copy, of moving, of the transfer."""
    copy, moving, whole = (statistics.median(column) for column in zip(*samples, strict=True))
    return {
        "transport": transport,
        "block_kib": num_bytes / num_blocks / 1024,
        "num_blocks": num_blocks,
        "mib": num_bytes / (1 << 20),
        "copy_gbps": num_bytes / copy / 1e9,
        "moving_gbps": num_bytes / moving / 1e9,
        "transfer_gbps": num_bytes / whole / 1e9,
        "share": 100 * statistics.median(a / c for a, _, c in samples),
        "ms": 1000 * whole,
        "block_size": block_size,
        "samples_s": [list(sample) for sample in samples],
    }


def transfer_result(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    limits: dict[str, Any],
    other_cores: float | None,
) -> Result:
    notes = [
        f"{NUM_LAYERS} layers of 3 heads of 64, float32; blocks in another order on each side. Medians of"
        f" {args.repeats}. Of the plain copy: its time to the whole transfer's, of each pair."
    ]
    if remark := disturbance(other_cores):
        notes.append(f"Disturbed: {remark}.")
    title = "KV between processes, beside a plain copy"
    return make_result(title, COLUMNS, rows, limits=limits, notes=notes)
