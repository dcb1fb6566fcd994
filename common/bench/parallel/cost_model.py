"""What a step costs on several ranks: bytes, operations, kernels and messages, by layout.

A step runs some tokens of some sequences through all layers. Each group of kernels takes as long as
the slower of reading its bytes and doing its operations, and a fixed time a kernel. Between them
the ranks exchange tensors: with tensor parallelism each layer sums two tensors [tokens, hidden_size]
over the ranks of a replica; with expert parallelism it sends tokens to their experts, and back.
Nothing overlaps, and the slowest rank counts: the one with the largest share of heads, columns and
experts, and of the tokens. With pipeline parallelism as many steps are in flight as there are stages,
each with its part of the sequences: until all have a token, the slowest stage runs all these steps.

Left out: activations, norms, rotary embedding and sampling beyond their kernels' fixed time, and
whatever the host does between two steps, except where a Device says it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from common.bench.costs import ModelShape
from common.bench.parallel.experts import (
    busiest_rank,
    distinct_experts,
    placed,
    popularity,
    ranks_reached,
)
from common.bench.parallel.layouts import Layout, Share
from common.bench.parallel.links import Traffic, all_to_all, ring_all_reduce, ring_gather
from common.bench.parallel.machines import Machine
from common.distributed.group import even_split

KERNELS_A_LAYER = 9  # 4 products, attention, rotary embedding with the cache, 2 norms, activation
KERNELS_OF_ROUTING = 3  # the router, its choice, and sorting tokens by expert


@dataclass(frozen=True)
class Batch:
    """What one step runs, in all replicas together: new_tokens of each of num_sequences, behind
    num_cached tokens whose keys and values are there."""

    num_sequences: int
    new_tokens: int = 1
    num_cached: int = 0


@dataclass(frozen=True)
class Routing:
    """Which experts tokens want. skew: see `experts.popularity`. balanced: experts are dealt out by
    their popularity; else they lie as chance has it."""

    skew: float = 0.0
    balanced: bool = False


@cache
def load(
    num_experts: int, top_k: int, size: int, num_tokens: int, routing: Routing
) -> tuple[float, float]:
    """(distinct experts of the rank that has most of them to read, how far the busiest rank is above
    the mean) for the tokens of a step on experts that lie on `size` ranks."""
    chances = popularity(num_experts, top_k, routing.skew)
    if routing.balanced:
        chances = placed(chances, size)
    else:
        chances = np.random.default_rng(0).permutation(chances)
    touched = max(distinct_experts(part, num_tokens) for part in np.split(chances, size))
    return touched, busiest_rank(chances, size, num_tokens)


EVEN = Routing()


@dataclass(frozen=True)
class Step:
    """A step's seconds, by what it spends them on, of the slowest rank."""

    seconds: dict[str, float]
    num_tokens: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together."""
        return self.num_tokens / self.total

    @property
    def message_share(self) -> float:
        """The part of its time that a rank sends and waits."""
        return sum(self.seconds.get(name, 0.0) for name in MESSAGES) / self.total


MESSAGES = ("sums", "dispatch", "logits", "stages")


def step(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    batch: Batch,
    dtype_bytes: int = 2,
    routing: Routing = EVEN,
) -> Step:
    """A step of all replicas, which all have as many sequences as the fullest.

    Raises ValueError for a layout that the model or the machine cannot have.
    """
    if layout.num_ranks > machine.num_ranks:
        raise ValueError(f"{layout.name}: {machine.name} has {machine.num_ranks} ranks")
    if layout.pp > 1:
        return pipelined(shape, layout, machine, batch, dtype_bytes, routing)
    sequences = math.ceil(batch.num_sequences / layout.dp)
    tokens = sequences * batch.new_tokens
    seconds = kernel_seconds(shape, layout, machine, batch, sequences, dtype_bytes)
    x_bytes = tokens * shape.hidden_size * dtype_bytes
    pool = batch.num_sequences * batch.new_tokens if layout.ep else tokens  # that experts work on
    fabric = machine.fabric
    num_sums = 2 * shape.num_layers + 1  # one more of the embedding
    if shape.num_experts:
        seconds["experts"] = experts_seconds(shape, layout, machine, pool, routing, dtype_bytes)
    if shape.num_experts and layout.ep:
        num_sums = shape.num_layers + 1
        dispatch = dispatch_seconds(shape, layout, machine, x_bytes, pool, routing)
        seconds["dispatch"] = shape.num_layers * dispatch
    seconds["sums"] = num_sums * fabric.all_reduce(x_bytes, layout.tp)
    logit_bytes = sequences * shape.vocab_size * dtype_bytes
    seconds["logits"] = fabric.all_gather(logit_bytes, layout.tp)
    seconds = {name: value for name, value in seconds.items() if value}
    return Step(seconds, batch.num_sequences * batch.new_tokens)


def pipelined(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    batch: Batch,
    dtype_bytes: int,
    routing: Routing,
) -> Step:
    """Steps in flight, one for each stage: each goes through all stages, and in that time the slowest
    stage has run all of them. Where there are fewer sequences than stages, some are empty: the stages
    wait (the bubble), and it takes as long.

    The last stage has the head, and as few layers as any; its logits go to the first stage's first rank.
    """
    fabric, pp = machine.fabric, layout.pp
    sequences = math.ceil(batch.num_sequences / (layout.dp * pp))  # of a replica's step
    part = replace(batch, num_sequences=sequences * layout.dp)
    one = fabric.inside if layout.tp * pp <= fabric.host_size else fabric.between
    x_bytes = sequences * batch.new_tokens * shape.hidden_size * dtype_bytes
    logit_bytes = sequences * shape.vocab_size * dtype_bytes
    layers = even_split(shape.num_layers, pp)
    stages = []
    for own, num_bytes in ((layers[0], x_bytes), (layers[-1], logit_bytes)):
        stage = replace(shape, num_layers=len(own))
        seconds = step(stage, layout.stage, machine, part, dtype_bytes, routing).seconds
        if own is layers[0]:
            seconds = {name: s for name, s in seconds.items() if name not in ("head", "logits")}
        seconds["stages"] = one.seconds(Traffic(1, num_bytes))
        stages.append(seconds)
    slowest = max(stages, key=lambda seconds: sum(seconds.values()))
    total = {name: pp * value for name, value in slowest.items()}
    return Step(total, batch.num_sequences * batch.new_tokens)


def roofline(machine: Machine, num_bytes: float, flops: float) -> float:
    """Seconds of a kernel on one rank that reads and computes at the same time."""
    device = machine.device
    return max(num_bytes / device.read_bytes_per_s, flops / device.flops_per_s)


def kernel_seconds(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    batch: Batch,
    sequences: int,
    dtype_bytes: int,
) -> dict[str, float]:
    """All that a rank computes, but for experts. sequences: of its replica."""
    own, layers = Share.of(shape, layout), shape.num_layers
    tokens = sequences * batch.new_tokens

    def product(params: int, rows: int) -> float:
        return roofline(machine, params * dtype_bytes, 2 * params * rows)

    reach = batch.num_cached + batch.new_tokens
    positions = batch.new_tokens * (batch.num_cached + (batch.new_tokens + 1) / 2)
    attention = roofline(
        machine,
        2 * sequences * reach * own.num_kv_heads * shape.head_dim * dtype_bytes,
        4 * sequences * positions * own.num_heads * shape.head_dim,
    )
    kernels = layers * KERNELS_A_LAYER + 3  # embedding, last norm and head
    seconds = {
        "projections": layers * product(own.projection_params(shape), tokens),
        "attention": layers * attention,
        "head": product(own.vocab_size * shape.hidden_size, sequences),
    }
    if shape.num_experts:
        kernels += layers * KERNELS_OF_ROUTING
    else:
        seconds["feed-forward"] = layers * product(own.network_params(shape), tokens)
    seconds["kernels"] = kernels * machine.device.kernel_s
    seconds["host"] = machine.device.step_s
    return seconds


def experts_seconds(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    pool: int,
    routing: Routing,
    dtype_bytes: int,
) -> float:
    """Of all layers, on the rank whose experts take longest. pool: tokens, of all replicas where
    experts are spread, else of one."""
    own = Share.of(shape, layout)
    size, top_k = layout.num_ranks if layout.ep else 1, shape.num_experts_per_token
    touched, busiest = load(shape.num_experts, top_k, size, pool, routing)
    pairs = busiest * pool * top_k / size
    params = own.network_params(shape)
    router = roofline(machine, shape.hidden_size * shape.num_experts * dtype_bytes, 0)
    networks = roofline(machine, touched * params * dtype_bytes, 2 * pairs * params)
    return shape.num_layers * (networks + router)


def dispatch_seconds(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    x_bytes: float,
    pool: int,
    routing: Routing,
) -> float:
    """Of one layer: tokens to their experts, and what these make of them back. x_bytes: of the
    tokens of a replica, which all of its ranks have: each hands out its part of them. pool: the
    tokens of all replicas."""
    fabric, size = machine.fabric, layout.num_ranks
    if layout.backend == "allgather_reducescatter":
        if layout.dp == 1:
            return fabric.all_reduce(x_bytes, size)
        rows = 2 * fabric.all_gather(x_bytes * layout.dp, size)
    else:
        num_experts, top_k = shape.num_experts, shape.num_experts_per_token
        copies = ranks_reached(num_experts, top_k, size)
        _, busiest = load(num_experts, top_k, size, pool, routing)
        rows = 2 * fabric.all_to_all(busiest * copies * x_bytes / layout.tp, size)
    return rows + fabric.all_gather(x_bytes, layout.tp)


def sent_bytes(
    shape: ModelShape,
    layout: Layout,
    dtype_bytes: int = 2,
    all_reduce: Callable[[float, int], Traffic] = ring_all_reduce,
) -> float:
    """What a rank gives to others for each token of its replica, in each layer.

    all_reduce: the algorithm of sums. To the ranks of its experts a token goes once, with the numbers
    and weights of all of them (4 bytes each), and comes back once; how many ranks these are is a
    mean. The other backend gathers and scatters the tokens of all replicas around a ring.
    """
    row, tp, size = shape.hidden_size * dtype_bytes, layout.tp, layout.num_ranks
    one_sum = all_reduce(row, tp).num_bytes
    if not (layout.ep and shape.num_experts):
        return 2 * one_sum
    top_k = shape.num_experts_per_token
    both_ways = 2 * row + 8 * top_k
    if layout.backend == "all_to_all":
        copies = ranks_reached(shape.num_experts, top_k, size)
        sent = all_to_all(copies * both_ways / tp, size).num_bytes
    else:
        sent = ring_gather(layout.dp * both_ways, size).num_bytes
    return one_sum + sent + ring_gather(row, tp).num_bytes
