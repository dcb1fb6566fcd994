"""`parallel clients`: replicas, tensor-parallel ranks and stages under many clients, played.

Each client sends a prompt when it has its last answer. A replica runs as many sequences as its keys
and values have room for, the others wait; prompts are computed first, some at a time. How long a step
takes is the cost model's, so nothing is measured. What shows is where the time to the first token goes:
while there is room, into the prefill; beyond, into the wait for room, which a layout with more of it
has later. A replica in every rank holds all weights in each, and has least; ranks and stages of one
replica hold them once.
"""

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.bench.core.arguments import add_output_arguments, finish, positive
from common.bench.core.results import Result, column, make_result
from common.bench.costs import ModelShape
from common.bench.parallel.cost_model import Batch, step
from common.bench.parallel.layouts import Layout, memory
from common.bench.parallel.links import Fabric, Link
from common.bench.parallel.machines import (
    H200,
    MODELS,
    NVLINK,
    REACHED_BANDWIDTH,
    REACHED_FLOPS,
    Device,
    Machine,
)

BUDGET = 8192  # tokens of prompts in a step
L4 = Device(
    memory_bytes=24e9,
    read_bytes_per_s=REACHED_BANDWIDTH * 300e9,
    flops_per_s=REACHED_FLOPS * 121e12,
    kernel_s=2e-6,
)
"""NVIDIA's data sheet of the L4: 24 GB, 300 GB/s, 121 TFLOP/s in bf16 without sparsity."""
PCIE = Link(call_s=15e-6, hop_s=3e-6, bytes_per_s=0.8 * 32e9)
"""PCIe 4 x16, 32 GB/s in each direction; the latencies are round assumptions."""
MACHINES = {
    "l4": Machine("2 L4 on PCIe", 2, L4, Fabric(2, PCIE, PCIE)),
    "h200": Machine("2 H200 on NVLink", 2, H200, Fabric(2, NVLINK, NVLINK)),
}
COLUMNS = [
    column("machine", "machine"),
    column("clients", "clients", digits=0),
    column("layout", "layout"),
    column("room", "fit at most", digits=0),
    column("ttft_p50_s", "TTFT p50", "s", 2),
    column("ttft_p99_s", "p99", "s", 2),
    column("itl_ms", "between tokens", "ms", 1),
    column("rate", "speed", "tok/s", 0),
]


@dataclass
class Replica:
    """One replica and its clients. room: sequences that it holds at most."""

    room: int
    num_left: dict[int, int] = field(default_factory=dict)  # tokens to come, by client that runs
    waiting: deque[int] = field(default_factory=deque)


@dataclass(frozen=True)
class Played:
    """Of all requests: seconds to the first token. Of all steps that decode: seconds. And the rate."""

    ttfts: list[float]
    steps: list[float]
    rate: float


def play(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    num_clients: int,
    prompt_len: int,
    output_len: int,
    num_requests: int,
) -> Played:
    """Until so many requests of one replica's clients have their answer. All replicas are alike and
    one is played. Raises ValueError where not one sequence has room."""
    context = prompt_len + output_len
    clients = -(-num_clients // layout.dp)
    room = memory(shape, layout, machine, context).num_sequences // layout.dp
    if room < 1:
        raise ValueError(f"{layout.name}: no room for {context} tokens")
    replica, now, num_done = Replica(room), 0.0, 0
    arrived = dict.fromkeys(range(clients), 0.0)
    replica.waiting.extend(arrived)
    ttfts: list[float] = []
    steps: list[float] = []
    while num_done < num_requests:
        most = min(replica.room - len(replica.num_left), max(1, BUDGET // prompt_len))
        joining = [replica.waiting.popleft() for _ in range(min(most, len(replica.waiting)))]
        took = 0.0
        if joining:
            took += seconds(shape, layout, machine, Batch(len(joining), prompt_len))
        if replica.num_left:
            cached = prompt_len + output_len // 2
            took += seconds(shape, layout, machine, Batch(len(replica.num_left), 1, cached))
            steps.append(took)
        now += took
        for client in list(replica.num_left):
            replica.num_left[client] -= 1
            if replica.num_left[client] == 0:
                del replica.num_left[client]
                num_done += 1
                arrived[client] = now
                replica.waiting.append(client)
        for client in joining:
            ttfts.append(now - arrived[client])
            replica.num_left[client] = output_len - 1
    return Played(ttfts, steps, layout.dp * num_done * output_len / now)


def seconds(shape: ModelShape, layout: Layout, machine: Machine, batch: Batch) -> float:
    """Of a step of one replica; others do the same at that time."""
    whole = Batch(batch.num_sequences * layout.dp, batch.new_tokens, batch.num_cached)
    return step(shape, layout, machine, whole).total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="Qwen3-8B", choices=MODELS)
    parser.add_argument("--machines", nargs="+", default=list(MACHINES), choices=MACHINES)
    parser.add_argument(
        "--clients", type=positive, nargs="+", default=[4, 16, 64, 128], help="default: 4 16 64 128"
    )
    parser.add_argument("--prompt-len", type=positive, default=1024, help="default: 1024")
    parser.add_argument("--output-len", type=positive, default=256, help="default: 256")
    parser.add_argument(
        "--rounds", type=positive, default=6, help="requests of each client (default: 6)"
    )
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.output_len < 2:
        raise ValueError(f"--output-len {args.output_len}: the first token is not counted")
    finish(args, clients_result(args))
    return 0


def clients_result(args: argparse.Namespace) -> Result:
    rows = [
        row
        for name in args.machines
        for num_clients in args.clients
        for row in rows_of(MACHINES[name], num_clients, args)
    ]
    notes = [
        f"{args.model} in bf16, prompts of {args.prompt_len} tokens, answers of {args.output_len};"
        f" each client {args.rounds} times. Calculated from data sheets."
    ]
    limits = {"unmeasured": "calculated from data sheets"}
    title = "Replicas, ranks and stages under many clients"
    return make_result(title, COLUMNS, rows, limits=limits, notes=notes)


def rows_of(
    machine: Machine, num_clients: int, args: argparse.Namespace
) -> Sequence[dict[str, Any]]:
    shape, size, rows = MODELS[args.model], machine.num_ranks, []
    for layout in (Layout(dp=size), Layout(size), Layout(pp=size)):
        num_requests = args.rounds * -(-num_clients // layout.dp)
        lengths = args.prompt_len, args.output_len
        row: dict[str, Any] = {"machine": machine.name, "clients": num_clients}
        row |= {
            "layout": layout.name,
            "room": memory(shape, layout, machine, sum(lengths)).num_sequences,
        }
        try:
            played = play(shape, layout, machine, num_clients, *lengths, num_requests)
        except ValueError:
            played = Played([], [], 0.0)
        for percent in (50, 99):
            ttft = float(np.percentile(played.ttfts, percent)) if played.ttfts else None
            row[f"ttft_p{percent}_s"] = ttft
        row["itl_ms"] = 1000 * float(np.median(played.steps)) if played.steps else None
        row["rate"] = played.rate or None
        rows.append(row)
    return rows
