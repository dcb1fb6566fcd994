"""Experts spread over the ranks: tokens travel to the experts they chose, and results travel back.

A layer's experts lie in numbered slots, equally many on each rank: slot s is on rank
s // slots_per_rank. The ranks are those of all engines that share the experts (tensor parallel ranks
times engines), and there are two ways to bring tokens and experts together:

    all_to_all                a token goes to the ranks that have its experts, and to no other
    allgather_reducescatter   every rank gets all tokens, and computes what its own experts add

The second sends more and needs no counting beforehand. Neither drops a token, however many choose
the same expert.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.distributed.expert_placement import ExpertPlacement
from common.distributed.group import Group, even_split
from common.kernels import Ops

# What a rank's own experts add: (x [n, hidden], slots [n, k], weights [n, k]) -> [n, hidden]
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]


def pack(x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Tokens and their choices as one message, [n, hidden * itemsize / 4 + 2 * k] int32."""
    return torch.cat([x.view(torch.int32), slots.int(), weights.view(torch.int32)], dim=1)


def unpack(message: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, slots, weights = message.split([message.shape[1] - 2 * k, k, k], dim=1)
    return x.contiguous().view(dtype), slots.long(), weights.contiguous().view(torch.float32)


def all_to_all(
    x: Tensor,  # [n, hidden], of this rank
    slots: Tensor,  # [n, k] int64
    weights: Tensor,  # [n, k] float32
    run: RunExperts,
    group: Group,
    slots_per_rank: int,
) -> Tensor:
    """Send each token to the ranks of its experts, run them there, and add up what comes back.

    A token goes to a rank once, though it may have chosen several experts there; they are weighted
    and summed before one row returns. Sums are in float32 and in the order of the ranks. The host
    waits for the device once a layer: it must know how many rows come.
    Returns [n, hidden].
    """
    num_tokens, k = slots.shape
    goes = torch.zeros(num_tokens, group.size, dtype=torch.bool, device=x.device)
    goes.scatter_(1, slots // slots_per_rank, True)
    counts = goes.sum(0)
    ones = [1] * group.size
    sends, receives = torch.stack([counts, group.all_to_all(counts, ones, ones)]).tolist()
    tokens = goes.T.nonzero()[:, 1]  # those for rank 0, then those for rank 1, …

    message = pack(x[tokens], slots[tokens], weights[tokens])
    arrived = group.all_to_all(message, sends, receives)
    results = run(*unpack(arrived, k, x.dtype))
    returned = group.all_to_all(results, receives, sends)

    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for rows, places in zip(returned.split(sends), tokens.split(sends), strict=True):
        out.index_add_(0, places, rows.float())  # a place occurs once in a rank's rows
    return out.to(x.dtype)


def allgather_reducescatter(
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    run: RunExperts,
    group: Group,
    counts: Sequence[int],  # tokens of each rank
) -> Tensor:
    """Give every rank all tokens, run its own experts, and sum for each rank what its tokens get.
    Shapes as in `all_to_all`."""
    arrived = group.all_gather(pack(x, slots, weights), counts)
    results = run(*unpack(arrived, slots.shape[1], x.dtype))
    return group.reduce_scatter(results, counts)


class ExpertParallel:
    """One rank's part in the experts of all layers."""

    def __init__(
        self,
        group: Group,
        tp: Group,
        placement: ExpertPlacement,
        backend: str,
        ops: Ops,
        interval: int | None = None,
    ) -> None:
        """group: all ranks that share the experts; tp: those of this engine, which hold the same
        tokens, and are neighbours in `group`. interval: steps after which a layer's experts are
        placed anew; None: never."""
        self.group, self.tp, self.placement, self.backend = group, tp, placement, backend
        self.ops, self.interval = ops, interval
        self.counts: list[int] = []  # tokens of each rank of `group`, in this step
        self.num_steps = 0
        self.replace: dict[int, Callable[[int, int], None]] = {}  # by layer

    def own_experts(self, layer: int, replace: Callable[[int, int], None]) -> list[int]:
        """The experts that this rank is to load, in order. replace: puts another one, its second
        argument, in the place of one of these, by its index."""
        self.replace[layer] = replace
        return self.placement.on_rank(layer, self.group.rank)

    def forget(self) -> None:
        """Count from here on: what came before was no client's."""
        self.num_steps = 0
        self.placement.forget()

    def start_step(self, num_tokens: Sequence[int]) -> None:
        """num_tokens: of each engine, in the forward that begins. Every rank counts the same steps,
        and a layer's turn comes at the same one."""
        self.counts = [len(share) for n in num_tokens for share in even_split(n, self.tp.size)]
        self.num_steps += 1
        if self.interval is not None and self.num_steps >= self.interval:
            for number, layer in enumerate(self.replace):
                if (self.num_steps - number) % self.interval == 0:
                    self.rebalance(layer)

    def rebalance(self, layer: int) -> None:
        """Place a layer's experts anew, and load those that come to this rank."""
        for slot, expert in self.placement.rebalance(layer, self.group, self.tp.size):
            rank, index = divmod(slot, self.placement.slots_per_rank)
            if rank == self.group.rank:
                self.replace[layer](index, expert)

    def run(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, prepared: Any
    ) -> Tensor:
        """What the chosen experts make of each token, weighted and summed.

        x: [n, hidden]; expert_ids: [n, k] int64; weights: [n, k] float32, the same on all ranks of
        the engine, and so is what is returned, [n, hidden]. prepared: this rank's experts.
        """
        slots = self.placement.choose(layer, expert_ids)
        run = partial(self.run_own, prepared)
        if self.backend == "allgather_reducescatter" and self.tp.size == self.group.size:
            return self.group.all_reduce(run(x, slots, weights))  # all ranks have all tokens
        shares = even_split(len(x), self.tp.size)
        own = slice(shares[self.tp.rank].start, shares[self.tp.rank].stop)
        own_tokens = x[own], slots[own], weights[own], run, self.group
        if self.backend == "all_to_all":
            out = all_to_all(*own_tokens, self.placement.slots_per_rank)
        else:
            out = allgather_reducescatter(*own_tokens, self.counts)
        return self.tp.all_gather(out, [len(share) for share in shares])

    def run_own(self, prepared: Any, x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """What this rank's experts add; slots of other ranks add nothing."""
        local = slots - self.group.rank * self.placement.slots_per_rank
        is_here = (local >= 0) & (local < self.placement.slots_per_rank)
        ids = local.where(is_here, -1)
        return self.ops.experts(x, ids, weights, prepared) if len(x) else x
