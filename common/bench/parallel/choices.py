"""`parallel layouts`: which layout is quickest for which model and batch, as the cost model says.

Two machines: 8 H200 in one host, and 64 such hosts. All ranks are used. For each model and number of
running sequences the layout with the shortest decode step wins, among those whose memory holds that
many sequences; the same number of sequences in a shorter step is both more tokens a second in all
and fewer milliseconds a token for each. `sure` says whether it also wins when memory bandwidth, the
rate of operations, the links' bandwidth and their latencies are 1.5 times as high or as low. The
prefill is of one prompt on one replica, the rest idle. With --stages layers may be divided, too: stages
send least, and leave as much memory for keys and values as any division of a replica does.

Nothing is measured: see `parallel engines` for how far the model is off where it can be checked.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from common.bench.core.arguments import add_output_arguments, finish, positive, positive_number
from common.bench.core.results import Result, column, make_result
from common.bench.costs import ModelShape
from common.bench.parallel.cost_model import EVEN, Batch, Routing, Step, step
from common.bench.parallel.layouts import Layout, Share, layouts, memory
from common.bench.parallel.links import Fabric, Link
from common.bench.parallel.machines import CLUSTER, HOST, MODELS, Machine
from common.bench.prefix.plot import check_plot

PER_RANK = (0.125, 1, 8, 32, 128)  # sequences for each rank of the machine
WITHIN = 1.5  # how far the machine's numbers may be off
COLUMNS = [
    column("machine", "machine"),
    column("model", "model"),
    column("num_sequences", "sequences", digits=0),
    column("best", "quickest layout"),
    column("sure", "sure"),
    column("step_ms", "step", "ms", 2),
    column("rate", "speed", "tok/s", 0),
    column("messages", "in messages", "%", 0),
    column("tp1", "1 rank a replica", "ms", 2),
    column("tp2", "2", "ms", 2),
    column("tp4", "4", "ms", 2),
    column("tp8", "8", "ms", 2),
    column("tp16", "16", "ms", 2),
    column("ep", "with experts spread", "ms", 2),
    column("most", "fit at most", digits=0),
]


@dataclass(frozen=True)
class Choice:
    """A layout of some of a machine's ranks, and as many copies of it as fill the machine.

    most: sequences that all copies hold together."""

    layout: Layout
    copies: int
    step: Step
    most: int

    @property
    def name(self) -> str:
        dp = self.layout.dp * (1 if self.layout.ep else self.copies)
        name = replace(self.layout, dp=dp, ep=False).name
        if self.layout.ep:
            name += f", EP {self.layout.num_ranks}"
        return name + (f", {self.copies} times" if self.layout.ep and self.copies > 1 else "")


def choices(
    shape: ModelShape,
    machine: Machine,
    batch: Batch,
    context: int,
    dtype_bytes: int = 2,
    routing: Routing = EVEN,
    num_stages: Sequence[int] = (1,),
) -> list[Choice]:
    """All layouts of all ranks, the quickest first; those that do not fit are among them.

    batch: of the whole machine. context: tokens for which a sequence needs room. Expert parallelism
    may span a part of the machine: then there are several copies, which share nothing.
    """
    found = []
    for copies in (n for n in range(1, machine.num_ranks + 1) if machine.num_ranks % n == 0):
        part = replace(batch, num_sequences=-(-batch.num_sequences // copies))
        ranks = machine.num_ranks // copies
        sizes = (size for size in num_stages if not ranks % size and size <= shape.num_layers)
        for layout in chain(*(layouts(shape, machine, ranks, size) for size in sizes)):
            if copies > 1 and (not layout.ep or layout.num_ranks == layout.pp):
                continue  # more replicas say the same
            took = step(shape, layout, machine, part, dtype_bytes, routing)
            most = copies * memory(shape, layout, machine, context, dtype_bytes).num_sequences
            found.append(Choice(layout, copies, took, most))
    return sorted(found, key=lambda choice: choice.step.total)


def best(found: Sequence[Choice], num_sequences: int) -> Choice | None:
    """The quickest that holds so many sequences."""
    return next((choice for choice in found if choice.most >= num_sequences), None)


def varied(machine: Machine) -> Iterator[Machine]:
    """The machine with each of its numbers higher and lower."""
    device, fabric = machine.device, machine.fabric

    def with_links(change: str, factor: float) -> Fabric:
        def changed(link: Link) -> Link:
            names = ("call_s", "hop_s") if change == "latency" else ("bytes_per_s",)
            return replace(link, **{name: factor * getattr(link, name) for name in names})

        return replace(fabric, inside=changed(fabric.inside), between=changed(fabric.between))

    for factor in (WITHIN, 1 / WITHIN):
        for name in ("read_bytes_per_s", "flops_per_s", "kernel_s"):
            other = replace(device, **{name: factor * getattr(device, name)})
            yield replace(machine, device=other)
        for change in ("latency", "bandwidth"):
            yield replace(machine, fabric=with_links(change, factor))


def row(
    machine: Machine,
    model: str,
    num_sequences: int,
    context: int,
    routing: Routing = EVEN,
    num_stages: Sequence[int] = (1,),
) -> dict[str, Any]:
    """num_sequences with half of their context in the cache."""
    shape, batch = MODELS[model], Batch(num_sequences, 1, context // 2)
    more = {"routing": routing, "num_stages": num_stages}
    found, *others = (
        choices(shape, one, batch, context, **more) for one in (machine, *varied(machine))
    )
    winner = best(found, num_sequences)
    names = {other and other.name for other in (best(found, num_sequences) for found in others)}
    fastest: dict[str, float] = {}
    for choice in found:
        if choice.most >= num_sequences:
            name = "ep" if choice.layout.ep else f"tp{choice.layout.tp}"
            name = "pp" if choice.layout.pp > 1 else name
            fastest.setdefault(name, 1000 * choice.step.total)
    ways = ("tp1", "tp2", "tp4", "tp8", "tp16", "ep", *(["pp"] if max(num_stages) > 1 else []))
    return {
        "machine": machine.name,
        "model": model,
        "num_sequences": num_sequences,
        "best": winner.name if winner else "none has room",
        "sure": winner and names == {winner.name},
        "step_ms": winner and 1000 * winner.step.total,
        "rate": winner and winner.step.tokens_per_s * copies_of(winner, num_sequences),
        "messages": winner and 100 * winner.step.message_share,
        **{way: fastest.get(way) for way in ways},
        "most": max(choice.most for choice in found),
        "tp": winner and winner.layout.tp,
        "ep_size": winner and (winner.layout.num_ranks if winner.layout.ep else 0),
        "seconds": winner and winner.step.seconds,
    }


def copies_of(choice: Choice, num_sequences: int) -> float:
    """Tokens of the machine to those of one copy."""
    return num_sequences / choice.step.num_tokens


def first_token(machine: Machine, model: str, num_tokens: int) -> dict[int, Step]:
    """By tensor-parallel size: the prefill of one prompt on one replica."""
    shape = MODELS[model]
    found = {}
    for tp in (1, 2, 4, 8, 16, 32):
        try:
            Share.of(shape, Layout(tp))
            found[tp] = step(shape, Layout(tp), machine, Batch(1, num_tokens))
        except ValueError:
            continue
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME")
    parser.add_argument("--context", type=positive, default=4096, help="tokens (default: 4096)")
    parser.add_argument(
        "--skew",
        type=positive_number,
        default=0.0,
        help="the i-th expert is wanted in proportion to i ** -SKEW (default: all alike)",
    )
    parser.add_argument(
        "--balanced", action="store_true", help="deal experts out by how much they are wanted"
    )
    parser.add_argument(
        "--stages", type=positive, nargs="+", default=[1], help="of a replica (default: 1)"
    )
    add_output_arguments(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png or .svg)")


def run(args: argparse.Namespace) -> int:
    if args.plot:
        check_plot(args.plot)
    result = layouts_result(args)
    if args.plot:
        from common.bench.parallel.plot import plot_layouts

        plot_layouts(result, args.plot)
    finish(args, result)
    return 0


def layouts_result(args: argparse.Namespace) -> Result:
    num_stages = sorted({1, *args.stages})
    more = args.context, Routing(args.skew, args.balanced), num_stages
    rows = [
        row(machine, model, max(1, int(share * machine.num_ranks)), *more)
        for machine in (HOST, CLUSTER)
        for model in args.models
        for share in PER_RANK
    ]
    placed = "dealt out by that" if args.balanced else "placed by chance"
    wanted = f"as the i-th is to i ** -{args.skew:g}, {placed}" if args.skew else "alike"
    notes = [
        f"bf16; room for {args.context} tokens of each sequence, half of them there. sure: it wins"
        f" too when any of the machine's numbers is {WITHIN} times as high or as low. Experts are"
        f" wanted {wanted}. Numbers without a layout that has room are left out."
    ]
    columns = list(COLUMNS)
    if max(num_stages) > 1:
        columns.insert(-1, column("pp", "with stages", "ms", 2))
    limits = {"unmeasured": "calculated from data sheets"}
    return make_result("Which layout is quickest", columns, rows, limits=limits, notes=notes)
