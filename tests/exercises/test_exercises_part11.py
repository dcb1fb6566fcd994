"""Part 11's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import numpy as np
import pytest
import torch
from part11.expert_parallel import ExpertParallel
from torch import Tensor

from common.distributed.expert_placement import ExpertPlacement, busiest
from common.distributed.group import Group
from common.kernels import select_ops
from common.testing.thread_group import run_ranks

pytestmark = pytest.mark.exercise
CPU = torch.device("cpu")
OPS = select_ops("reference", CPU, 1)
HIDDEN, SIZE, NUM_EXPERTS, NUM_TOKENS = 32, 16, 4, 24


def experts() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    shapes = (2 * SIZE, HIDDEN), (HIDDEN, SIZE)
    return [tuple(torch.randn(*s, generator=random) for s in shapes) for _ in range(NUM_EXPERTS)]


def prepare(numbers: list[int]) -> Any:
    weights = experts()
    return OPS.prepare_experts([weights[i][0] for i in numbers], [weights[i][1] for i in numbers])


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=random)
    scores = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=random)
    weights, ids = scores.topk(2)
    return x, ids, weights


def two_engines(redundant: int, **options: Any) -> list[tuple[Tensor, int]]:
    """(results, bytes sent) on each of two ranks, by all-to-all."""

    def run(group: Group, tp: Group) -> tuple[Tensor, int]:
        placement = ExpertPlacement(1, NUM_EXPERTS, redundant, 2, CPU, group.rank)
        parallel = ExpertParallel(group, tp, placement, "all_to_all", OPS, **options)
        parallel.start_step([NUM_TOKENS, NUM_TOKENS])
        own = prepare(placement.on_rank(0, group.rank))
        return parallel.run(0, *batch(group.rank), own), group.num_bytes_sent

    return run_ranks(2, run, 1)


# 1. The nearest copy.


def test_no_token_travels_when_every_rank_has_every_expert() -> None:
    for rank, (out, num_bytes) in enumerate(two_engines(NUM_EXPERTS)):
        torch.testing.assert_close(out, OPS.experts(*batch(rank), prepare([0, 1, 2, 3])))
        assert num_bytes == 8, "the number of rows that come, none, and nothing else"


# 2. Few at a time.


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_a_turn_changes_few_slots_and_helps(most: int) -> None:
    random = np.random.default_rng(most)
    for _ in range(20):
        load = random.permutation(1000 / np.arange(1, 25))
        placement = ExpertPlacement(1, 24, 8, 4, CPU)
        before = placement.slots[0].copy()
        turns = 0
        while changed := placement.improve(0, load, most=most):
            assert len(changed) <= most
            assert busiest(load, placement.slots[0], 4) < busiest(load, before, 4)
            assert set(placement.slots[0].tolist()) == set(range(24)), "an expert is lost"
            for rank in placement.slots[0].reshape(4, -1):
                assert len(set(rank.tolist())) == len(rank), "two copies on a rank"
            before, turns = placement.slots[0].copy(), turns + 1
        assert turns > 0 if most > 1 else turns == 0 or most == 1


# 3. Eight bits on the way.


def test_rows_travel_in_eight_bits() -> None:
    plain, packed = two_engines(0), two_engines(0, wire=torch.int8)
    for (exact, num_bytes), (out, num_fewer) in zip(plain, packed, strict=True):
        assert num_fewer < 0.75 * num_bytes, "the way there has a quarter of the bytes"
        error = (out - exact).norm() / exact.norm()
        assert 0 < error < 0.02
