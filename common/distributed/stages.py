"""Ranks as stages of a pipeline: rank = stage * ranks of a stage + place in it.

    rank 0 --pipe--> rank 2     stage 0: ranks 0 and 1, a group
    rank 1 --pipe--> rank 3     stage 1: ranks 2 and 3, a group
      0 <----back---- 2         results: the last stage's first rank to rank 0

A pipe is a group of two ranks, the sender first. Each group works by itself: a stage that is some
steps ahead of another does not wait in a collective of all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from common.distributed.group import Group, OneRank

GroupMaker = Callable[[str, list[int]], Group]  # a name, and the engine's ranks that are members


@dataclass(frozen=True)
class Stages:
    """One rank's place in the pipeline. Without a pipeline there is one stage, of all ranks."""

    number: int
    size: int
    group: Group  # this stage's ranks
    before: Group | None = None  # from the stage before
    after: Group | None = None  # to the next
    back: Group | None = None  # on the last stage's first rank, and on rank 0

    @property
    def num_bytes_sent(self) -> int:
        groups = (self.group, self.before, self.after, self.back)
        return sum(group.num_bytes_sent for group in groups if group is not None)


def members_of(num_stages: int, size: int) -> dict[str, list[int]]:
    """The ranks of each group, by name, for `size` ranks in `num_stages` stages. All ranks join their
    groups in this order."""
    width = size // num_stages
    if num_stages == 1:
        return {}
    stages = [list(range(stage * width, (stage + 1) * width)) for stage in range(num_stages)]
    found = {f"stage {i}": ranks for i, ranks in enumerate(stages) if width > 1}
    for stage, (ours, theirs) in enumerate(pairwise(stages)):
        for sender, receiver in zip(ours, theirs, strict=True):
            found[f"pipe {stage} {sender}"] = [sender, receiver]
    return found | {"back": [stages[-1][0], 0]}


def join_stages(num_stages: int, rank: int, everyone: Group, make: GroupMaker) -> Stages:
    """Form the groups; every rank calls it. make: called for each group that this rank is in."""
    if num_stages == 1:
        return Stages(0, 1, everyone)
    members = members_of(num_stages, everyone.size)
    made = {name: make(name, ranks) for name, ranks in members.items() if rank in ranks}
    width = everyone.size // num_stages
    stage = rank // width
    stages = Stages(
        stage,
        num_stages,
        made.get(f"stage {stage}") or OneRank(),
        made.get(f"pipe {stage - 1} {rank - width}"),
        made.get(f"pipe {stage} {rank}"),
        made.get("back"),
    )
    first_word(stages, everyone.device)
    return stages


def first_word(stages: Stages, device: torch.device) -> None:
    """Send one number through every pipe and group, because NCCL connects two ranks only at their first
    transfer, and needs the store for that."""
    word, is_first = torch.zeros(1, device=device), stages.number == 0
    if stages.group.size > 1:
        stages.group.all_reduce(word)
    if stages.before is not None:
        stages.before.receive(word)
    for pipe in (stages.after, None if is_first else stages.back):
        if pipe is not None:
            pipe.send(word)
    if is_first and stages.back is not None:
        stages.back.receive(word)
