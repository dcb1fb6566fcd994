"""Which experts lie on which rank: one slot each, and further copies of those that are chosen most.

Tokens do not choose their experts evenly, and a step lasts as long as its busiest rank. So loads are
counted, and now and then the experts are placed anew: the hottest get copies, and all are packed so
that the ranks have about equally much to do (after DeepSeek's EPLB). Every rank computes the same
placement from the same sums. Outputs do not change, since all copies hold the same weights.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.device import reading_beside
from common.distributed.group import Group


def check_division(num_experts: int, num_redundant: int, num_ranks: int) -> None:
    """Raise ValueError unless the experts and their copies fill equally many slots on each rank."""
    over = -(num_experts + num_redundant) % num_ranks
    if over:
        with_copies = f" with num_redundant_experts {num_redundant}" if num_redundant else ""
        raise ValueError(
            f"num_experts is {num_experts}: does not divide among {num_ranks} ranks{with_copies}; "
            f"num_redundant_experts {num_redundant + over} would fill them"
        )
    most = num_experts * (num_ranks - 1)
    if num_redundant > most:
        raise ValueError(
            f"num_redundant_experts is {num_redundant}: {num_experts} experts on {num_ranks} ranks "
            f"have {most} further copies at most, one a rank"
        )


def num_copies(load: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """Copies of each expert, [num_experts], in so many slots: each further copy goes to the expert
    whose copies have most to do, and none has more copies than there are ranks."""
    copies = np.ones(len(load), np.int64)
    for _ in range(num_slots - len(load)):
        copies[np.where(copies < num_ranks, load / copies, -1.0).argmax()] += 1
    return copies


def place(load: np.ndarray, slots: np.ndarray, num_ranks: int) -> np.ndarray:
    """A placement for these loads, [num_slots], which moves few experts from where they are.

    load: tokens of each expert; slots: the expert in each slot now. Experts with several copies
    come first, each on the ranks with most free slots: so each rank has one copy at most, and there
    is always room. The others follow, the heaviest first, each on the rank that has least to do.
    """
    copies = num_copies(load, len(slots), num_ranks)
    share = load / copies
    per_rank = len(slots) // num_ranks
    experts: list[list[int]] = [[] for _ in range(num_ranks)]
    busy = np.zeros(num_ranks)
    for expert in sorted(range(len(load)), key=lambda e: (copies[e] == 1, -share[e], e)):
        open_ranks = [rank for rank in range(num_ranks) if len(experts[rank]) < per_rank]
        if copies[expert] > 1:
            open_ranks.sort(key=lambda rank: (len(experts[rank]), busy[rank]))
        else:
            open_ranks.sort(key=lambda rank: busy[rank])
        for rank in open_ranks[: copies[expert]]:
            experts[rank].append(expert)
            busy[rank] += share[expert]
    old = slots.reshape(num_ranks, per_rank)
    return np.concatenate([keep(old[rank], experts[rank]) for rank in range(num_ranks)])


def keep(old: np.ndarray, new: Sequence[int]) -> np.ndarray:
    """The experts `new` in as many slots; those that were there stay where they are."""
    coming = iter(sorted(set(new) - set(old.tolist())))
    return np.array([expert if expert in new else next(coming) for expert in old.tolist()])


def busiest(load: np.ndarray, slots: np.ndarray, num_ranks: int) -> float:
    """What the busiest rank has to do, as a multiple of the mean; 1 is even."""
    copies = np.bincount(slots, minlength=len(load))
    ranks = (load / copies)[slots].reshape(num_ranks, -1).sum(1)
    return float(ranks.max() / ranks.mean()) if load.any() else 1.0


class ExpertPlacement:
    """The placement of all layers, the same on every rank."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_redundant: int,
        num_ranks: int,
        device: torch.device,
        first_copy: int = 0,
    ) -> None:
        """first_copy: where this engine begins to go round the copies. Raises ValueError."""
        check_division(num_experts, num_redundant, num_ranks)
        num_slots = num_experts + num_redundant
        self.num_ranks, self.slots_per_rank = num_ranks, num_slots // num_ranks
        self.first_copy, self.num_moves = first_copy, 0
        most = min(num_ranks, 1 + num_redundant)
        # The expert in each slot. So many one after the other on a rank, they are different ones.
        self.slots = np.tile(np.arange(num_slots) % num_experts, (num_layers, 1))
        # The slots of each expert, and how many they are, on the device.
        self.places = torch.zeros(num_layers, num_experts, most, dtype=torch.int64, device=device)
        self.copies = torch.ones(num_layers, num_experts, dtype=torch.int64, device=device)
        for layer in range(num_layers):
            self.set(layer, self.slots[layer])
        # How often this engine's tokens have chosen each expert; and until it was placed last.
        self.load = torch.zeros_like(self.copies)
        self.seen = torch.zeros_like(self.copies)
        self.recent = np.zeros(self.load.shape)  # all engines' tokens, the older the less

    def forget(self) -> None:
        """Count from here on: what came before was no client's."""
        self.load.zero_()
        self.seen.zero_()
        self.recent[:] = 0

    def set(self, layer: int, slots: np.ndarray) -> None:
        self.slots[layer] = slots
        places = np.zeros(self.places.shape[1:], np.int64)
        copies = np.zeros(len(places), np.int64)
        for slot, expert in enumerate(slots):
            places[expert, copies[expert]] = slot
            copies[expert] += 1
        self.places[layer] = torch.from_numpy(places)
        self.copies[layer] = torch.from_numpy(copies)

    def improve(self, layer: int, load: np.ndarray) -> list[tuple[int, int]]:
        """Place a layer's experts anew, by their tokens, [num_experts], if that takes at least 5%
        off the busiest rank. Returns what has changed: (slot, its new expert)."""
        old = self.slots[layer].copy()
        new = place(load, old, self.num_ranks)
        now, then = (busiest(load, slots, self.num_ranks) for slots in (old, new))
        if then > 0.95 * now:
            return []
        self.set(layer, new)
        self.num_moves += int((new != old).sum())
        return [(slot, int(new[slot])) for slot in np.flatnonzero(new != old)]

    def rebalance(self, layer: int, group: Group, num_counting: int) -> list[tuple[int, int]]:
        """Place a layer's experts by what all engines' tokens have chosen lately, as `improve` does.

        Every rank of `group` calls it at the same step. num_counting: how many of them count the
        same tokens. The host waits for the device.
        """
        new = group.all_reduce(self.load[layer] - self.seen[layer])
        self.seen[layer] = self.load[layer]
        self.recent[layer] = self.recent[layer] / 2 + new.cpu().numpy() / num_counting
        return self.improve(layer, self.recent[layer])

    def on_rank(self, layer: int, rank: int) -> list[int]:
        """The experts in a rank's slots."""
        return self.slots[layer].reshape(self.num_ranks, -1)[rank].tolist()

    def choose(self, layer: int, expert_ids: torch.Tensor) -> torch.Tensor:
        """A slot for each choice, [n, k] of both: tokens go round the copies of an expert. The
        choices are counted, without a word to the host."""
        chosen = expert_ids.flatten()
        self.load[layer].scatter_add_(0, chosen, torch.ones_like(chosen))
        if self.places.shape[2] == 1:
            return self.places[layer, :, 0][expert_ids]
        tokens = torch.arange(len(expert_ids), device=expert_ids.device) + self.first_copy
        copy = tokens.unsqueeze(1) % self.copies[layer][expert_ids]
        return self.places[layer][expert_ids, copy]

    def stats(self, layers: list[int]) -> dict[str, Any]:
        """How often each expert of these layers was chosen, and how evenly that fell on the ranks
        as experts lie now: the mean rank over the busiest one, the mean of all layers. May be asked
        in any thread: on a GPU the copy waits for no step."""
        with reading_beside(self.load.device):
            total, before = self.load.to("cpu").numpy(), self.seen.to("cpu").numpy()
        even, copies = [], []
        for layer in layers:
            slots, lately = self.slots[layer], total[layer] - before[layer]
            lately = lately if lately.any() else total[layer]
            even.append(1 / busiest(lately, slots, self.num_ranks))
            copies.append(np.bincount(slots, minlength=len(lately)).tolist())
        return {
            "expert_layers": layers,
            "expert_load": total[layers].tolist(),
            "expert_copies": copies,
            "expert_balancedness": sum(even) / len(even),
            "num_expert_moves": self.num_moves,
        }
