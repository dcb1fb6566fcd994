"""Part 11's own invariants: where experts lie changes who computes, and never what."""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from part11.device_queue import CpuQueue
from part11.expert_parallel import ExpertParallel
from torch import Tensor

from common.distributed.expert_placement import ExpertPlacement, busiest, check_division, place
from common.distributed.group import Group, RankError, even_split
from common.distributed.health import Health
from common.distributed.lockstep import Lockstep
from common.kernels import select_ops
from common.testing.thread_group import run_ranks

OPS = select_ops("reference", torch.device("cpu"), 1)
CPU = torch.device("cpu")
HIDDEN, SIZE = 8, 6
BACKENDS = ["allgather_reducescatter", "all_to_all"]


def make_experts(num_experts: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(num_experts)
    shapes = (2 * SIZE, HIDDEN), (HIDDEN, SIZE)
    return [
        tuple(torch.randn(*shape, generator=random) for shape in shapes) for _ in range(num_experts)
    ]


def prepare(experts: list[tuple[Tensor, Tensor]], numbers: list[int]) -> Any:
    return OPS.prepare_experts([experts[i][0] for i in numbers], [experts[i][1] for i in numbers])


def tokens_of(
    num_tokens: int, num_experts: int, k: int, seed: int, skew: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, expert_ids and weights; with skew the first experts are chosen more often."""
    random = np.random.default_rng(seed)
    popularity = np.exp(-skew * np.arange(num_experts))
    popularity /= popularity.sum()
    ids = [random.choice(num_experts, k, replace=False, p=popularity) for _ in range(num_tokens)]
    return (
        torch.empty(num_tokens, HIDDEN).copy_(
            torch.from_numpy(random.standard_normal((num_tokens, HIDDEN)))
        ),
        torch.tensor(np.array(ids, np.int64).reshape(num_tokens, k)),
        torch.from_numpy(random.random((num_tokens, k))).float(),
    )


@dataclass(frozen=True)
class Layout:
    """Engines, the ranks of each, what their tokens choose, and how experts lie."""

    tp_size: int
    num_tokens: list[int]  # of each engine
    num_experts: int
    redundant: int
    k: int
    skew: float
    seed: int

    @property
    def num_ranks(self) -> int:
        return self.tp_size * len(self.num_tokens)

    def batch(self, engine: int) -> tuple[Tensor, Tensor, Tensor]:
        seed = self.seed + engine
        return tokens_of(self.num_tokens[engine], self.num_experts, self.k, seed, self.skew)

    def on_ranks(self, work: Callable[[ExpertParallel, Any], Any], backend: str) -> list[Any]:
        """What `work(parallel, prepared)` returns on every rank, each with its own experts."""
        experts = make_experts(self.num_experts)

        def run(group: Group, tp: Group) -> Any:
            engine = group.rank // self.tp_size
            sizes = 1, self.num_experts, self.redundant, self.num_ranks
            placement = ExpertPlacement(*sizes, CPU, engine)
            parallel = ExpertParallel(group, tp, placement, backend, OPS)
            parallel.start_step(self.num_tokens)
            return work(parallel, prepare(experts, placement.on_rank(0, group.rank)))

        return run_ranks(self.num_ranks, run, self.tp_size)


@st.composite
def layouts(draw: Any) -> Layout:
    tp_size, num_engines = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]))
    per_rank = draw(st.integers(1, 3))
    num_slots = per_rank * tp_size * num_engines
    num_experts = draw(st.integers(per_rank, num_slots))
    return Layout(
        tp_size,
        draw(st.lists(st.integers(0, 9), min_size=num_engines, max_size=num_engines)),
        num_experts,
        num_slots - num_experts,
        draw(st.integers(1, num_experts)),
        draw(st.sampled_from([0.0, 1.0, 8.0])),
        draw(st.integers(0, 99)),
    )


# Tokens travel, and results are those of one rank.


@pytest.mark.parametrize("backend", BACKENDS)
@given(layout=layouts())
@settings(max_examples=60)
def test_results_are_those_of_one_rank(backend: str, layout: Layout) -> None:
    def work(parallel: ExpertParallel, prepared: Any) -> Tensor:
        x, ids, weights = layout.batch(parallel.group.rank // layout.tp_size)
        before = x.clone()
        out = parallel.run(0, x, ids, weights, prepared)
        assert torch.equal(x, before)
        return out

    outs = layout.on_ranks(work, backend)
    everything = prepare(make_experts(layout.num_experts), list(range(layout.num_experts)))
    for rank, out in enumerate(outs):
        engine = rank // layout.tp_size
        expected = OPS.experts(*layout.batch(engine), everything)
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
        assert torch.equal(out, outs[engine * layout.tp_size]), "ranks of one engine differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@given(layout=layouts())
@settings(max_examples=30)
def test_bytes_sent_are_those_of_the_formula(
    backend: str, dtype: torch.dtype, layout: Layout
) -> None:
    """The README's: a token costs hidden * itemsize + 8 * k there and hidden * itemsize back, for
    each rank that it goes to."""
    there, back = HIDDEN * dtype.itemsize + 8 * layout.k, HIDDEN * dtype.itemsize
    others, one_engine = layout.num_ranks - 1, len(layout.num_tokens) == 1

    def work(parallel: ExpertParallel, prepared: Any) -> tuple[int, list[set[int]]]:
        """Bytes sent, and which ranks this rank's own tokens go to."""
        x, ids, weights = layout.batch(parallel.group.rank // layout.tp_size)
        experts = tuple(tensor.to(dtype) for tensor in prepared)
        parallel.run(0, x.to(dtype), ids, weights, experts)
        share = even_split(len(x), layout.tp_size)[parallel.tp.rank]
        owners = parallel.placement.choose(0, ids) // parallel.placement.slots_per_rank
        return parallel.group.num_bytes_sent, [set(owners[i].tolist()) for i in share]

    ranks = layout.on_ranks(work, backend)
    total = sum(len(targets) for _, targets in ranks)
    for rank, (num_bytes, targets) in enumerate(ranks):
        if backend == "all_to_all":
            away = sum(len(of - {rank}) for of in targets)
            came = sum(rank in of for _, theirs in ranks for of in theirs)
            came -= sum(rank in of for of in targets)
            expected = 8 * others + there * away + back * came
        elif one_engine:
            expected = 2 * back * total * others // layout.num_ranks
        else:
            expected = there * len(targets) * others + back * (total - len(targets))
        assert num_bytes == expected


# Placement.


@st.composite
def loads(draw: Any) -> tuple[np.ndarray, int, int]:
    """(load of each expert, slots, ranks)"""
    num_ranks = draw(st.integers(1, 8))
    per_rank = draw(st.integers(1, 12))
    num_slots = per_rank * num_ranks
    num_experts = draw(st.integers(per_rank, num_slots))
    some = st.one_of(st.integers(0, 20), st.integers(0, 10**6))
    load = draw(st.lists(some, min_size=num_experts, max_size=num_experts))
    return np.array(load), num_slots, num_ranks


def check_placement(slots: np.ndarray, num_experts: int, num_ranks: int) -> None:
    assert set(slots.tolist()) == set(range(num_experts))
    for rank in slots.reshape(num_ranks, -1):
        assert len(set(rank.tolist())) == len(rank), "two copies of an expert on a rank"


@given(case=loads(), random=st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_a_placement_fills_every_slot(case: tuple[np.ndarray, int, int], random: Any) -> None:
    load, num_slots, num_ranks = case
    first = np.arange(num_slots) % len(load)
    check_placement(first, len(load), num_ranks)
    slots = place(load, first, num_ranks)
    check_placement(slots, len(load), num_ranks)
    other = load.copy()
    random.shuffle(other)
    again = place(other, slots, num_ranks)
    check_placement(again, len(load), num_ranks)
    # An expert that stays on its rank stays in its slot.
    for before, after in zip(
        slots.reshape(num_ranks, -1), again.reshape(num_ranks, -1), strict=True
    ):
        for expert in set(before.tolist()) & set(after.tolist()):
            assert before.tolist().index(expert) == after.tolist().index(expert)
    assert np.array_equal(place(other, again, num_ranks), again), "nothing is to be gained"


@given(case=loads())
@settings(max_examples=300)
def test_a_new_placement_is_balanced_no_worse(case: tuple[np.ndarray, int, int]) -> None:
    load, num_slots, num_ranks = case
    placement = ExpertPlacement(1, len(load), num_slots - len(load), num_ranks, CPU)
    before = placement.slots.copy()
    changed = placement.improve(0, load)
    check_placement(placement.slots[0], len(load), num_ranks)
    differ = np.flatnonzero(before[0] != placement.slots[0])
    assert changed == [(slot, placement.slots[0, slot]) for slot in differ]
    was, now = (busiest(load, slots[0], num_ranks) for slots in (before, placement.slots))
    assert now <= was
    assert not changed or now < was


def test_hot_experts_get_the_copies_and_ranks_even_loads() -> None:
    load = np.array([800, 100, 100, 100, 100, 100, 100, 100])
    first = np.arange(12) % 8
    slots = place(load, first, 4)
    assert np.bincount(slots)[0] == 4, "the hottest is on every rank"
    assert busiest(load, first, 4) > 1.5
    assert busiest(load, slots, 4) < 1.2


@given(layout=layouts())
@settings(max_examples=60)
def test_choices_find_their_expert_and_go_round_its_copies(layout: Layout) -> None:
    sizes = layout.num_experts, layout.redundant, layout.num_ranks
    placement = ExpertPlacement(2, *sizes, CPU, first_copy=layout.seed)
    placement.improve(1, np.random.default_rng(layout.seed).integers(0, 99, layout.num_experts))
    for layer in range(2):
        ids = torch.arange(layout.num_experts).expand(12, -1)
        slots = placement.choose(layer, ids)
        assert np.array_equal(placement.slots[layer][slots.numpy()], ids.numpy())
        copies = np.bincount(placement.slots[layer])
        for expert in range(layout.num_experts):
            counts = np.unique(slots[:, expert].numpy(), return_counts=True)[1]
            assert len(counts) == copies[expert], "a copy without a token"
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (6, 0, 4),
            "num_experts is 6: does not divide among 4 ranks; num_redundant_experts 2 would fill",
        ),
        (
            (8, 3, 4),
            "num_experts is 8: does not divide among 4 ranks with num_redundant_experts 3; num_redu"
            "ndant_experts 4",
        ),
        ((4, 8, 2), "num_redundant_experts is 8: 4 experts on 2 ranks have 4 further copies"),
    ],
)
def test_experts_that_do_not_divide_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_division(*sizes)
    with pytest.raises(ValueError, match=f"^{message}"):
        ExpertPlacement(1, *sizes, CPU)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("redundant", [0, 4])
def test_experts_move_to_where_they_even_loads_and_results_stay(
    redundant: int, backend: str
) -> None:
    """Two engines of two ranks; the first experts are chosen most, then the last ones."""
    num_layers, num_experts, interval = 3, 12, 4
    experts = make_experts(num_experts)
    everything = prepare(experts, list(range(num_experts)))

    def batch(engine: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        x, ids, weights = tokens_of(20 + engine, num_experts, 2, 9 * step + engine, 0.4)
        return x, (ids if step < 12 else num_experts - 1 - ids), weights

    def run(group: Group, tp: Group) -> tuple[list[np.ndarray], int, Tensor]:
        engine = group.rank // 2
        placement = ExpertPlacement(num_layers, num_experts, redundant, 4, CPU, engine)
        parallel = ExpertParallel(group, tp, placement, backend, OPS, interval)
        layers = [prepare(experts, placement.on_rank(i, group.rank)) for i in range(num_layers)]

        def replace(layer: int, index: int, expert: int) -> None:
            OPS.replace_expert(layers[layer], index, *experts[expert])

        parallel.replace = {layer: partial(replace, layer) for layer in range(num_layers)}
        seen = []
        for step in range(24):
            parallel.start_step([20, 21])
            seen.append(placement.slots.copy())
            for layer, prepared in enumerate(layers):
                x, ids, weights = batch(engine, step)
                out = parallel.run(layer, x, ids, weights, prepared)
                expected = OPS.experts(x, ids, weights, everything)
                torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
        return seen, placement.num_moves, placement.load

    ranks = run_ranks(4, run, 2)
    for seen, num_moves, load in ranks:
        assert np.array_equal(seen, ranks[0][0]), "ranks place differently"
        assert num_moves == ranks[0][1] > 0
        assert load.sum(1).tolist() in ([24 * 20 * 2] * 3, [24 * 21 * 2] * 3)
    seen = ranks[0][0]
    changed = [(np.array(after) != before).any(1) for before, after in itertools.pairwise(seen)]
    assert max(layers.sum() for layers in changed) == 1, "more than one layer waits in a step"
    total = ranks[0][2] + ranks[2][2]
    for first, last in ((0, 12), (12, 24)):
        ids = torch.cat(
            [batch(engine, step)[1] for engine in (0, 1) for step in range(first, last)]
        )
        load = np.bincount(ids.flatten(), minlength=num_experts)
        before, after = (busiest(load, seen[step][0], 4) for step in (first, last - 1))
        assert after < 0.8 * before
        total = total - torch.from_numpy(load)
    assert not total.any()


# Engines in step.


class Device:
    """A device queue that only writes down what it was given."""

    def __init__(self) -> None:
        self.queue = CpuQueue()
        self.lockstep: Lockstep | None = None
        self.ran: list[tuple[str, int, list[int]]] = []

    def submit(self, run: Callable[[], Any]) -> Any:
        return self.queue.submit(run)

    def forward(self, name: str, kind: int) -> None:
        self.ran.append((name, kind, self.lockstep.counts))


def lockstep_of(leaders: Group) -> tuple[Lockstep, Device]:
    device, health = Device(), Health()
    device.lockstep = lockstep = Lockstep(
        device, leaders, leaders.size, partial(device.forward, "idle"), health
    )
    lockstep.start()
    return lockstep, device


@given(
    plans=st.integers(2, 4).flatmap(
        lambda engines: st.lists(
            st.lists(st.tuples(st.integers(1, 9), st.integers(0, 1)), max_size=6),
            min_size=engines,
            max_size=engines,
        )
    ),
    random=st.randoms(use_true_random=False),
)
@settings(max_examples=25)
def test_engines_run_every_forward_together(
    plans: list[list[tuple[int, int]]], random: Any
) -> None:
    """plans: of each engine, its forwards' (tokens, kind)."""
    pauses = [[random.choice([0, 0, 0.001, 0.004]) for _ in plan] for plan in plans]
    done = threading.Barrier(len(plans))
    devices: list[Device | None] = [None] * len(plans)

    def run(leaders: Group) -> list[tuple[str, int, list[int]]]:
        lockstep, device = lockstep_of(leaders)
        plan = plans[leaders.rank]
        works = []
        for (num_tokens, kind), pause in zip(plan, pauses[leaders.rank], strict=True):
            time.sleep(pause)
            works.append(lockstep.submit(partial(device.forward, "own", kind), num_tokens, kind))
        for work in works:
            work.result()
        done.wait(20)
        devices[leaders.rank] = device
        deadline = time.monotonic() + 5
        while len({len(of.ran) if of else -1 for of in devices}) > 1:
            assert time.monotonic() < deadline, "the others' last forward was not served"
            time.sleep(0.001)
        done.wait(20)
        lockstep.close()
        assert not lockstep.thread.is_alive()
        device.queue.thread.shutdown()
        return device.ran

    engines = run_ranks(len(plans), run)
    for ran in engines:
        assert [step[1:] for step in ran] == [step[1:] for step in engines[0]], "not in step"
    for rank, (ran, plan) in enumerate(zip(engines, plans, strict=True)):
        own = [(counts[rank], kind) for name, kind, counts in ran if name == "own"]
        assert own == plan
        assert all(counts[rank] == 0 for name, _, counts in ran if name == "idle")
        assert all(any(counts) for _, _, counts in ran), "all were idle"


def keep_submitting(lockstep: Lockstep, device: Device) -> None:
    while True:
        lockstep.submit(partial(device.forward, "own", 0), 1).result()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("it is lost", "rank 0: another rank has ended"),
        ("it shuts down", "engine 1 of 2 has shut down"),
        ("its idle forward fails", "division by zero"),
    ],
)
def test_an_engine_that_ends_ends_the_others(how: str, message: str) -> None:
    def run(leaders: Group) -> None:
        lockstep, device = lockstep_of(leaders)
        if leaders.rank == 1:
            lockstep.submit(partial(device.forward, "own", 0), 1).result()
            if how == "it shuts down":
                lockstep.close()
                assert not lockstep.thread.is_alive()
                assert lockstep.health.problem is None
                return
            if how == "its idle forward fails":
                lockstep.run_idle = lambda kind: 1 / 0
                while lockstep.health.problem is None:
                    time.sleep(0.001)
                with pytest.raises(RankError, match=f"^{message}$"):
                    lockstep.submit(partial(device.forward, "own", 0), 1)
            leaders.meeting.barrier.abort()
        else:
            with pytest.raises(RankError) as error:
                keep_submitting(lockstep, device)
            assert str(error.value) == lockstep.health.problem
            assert message in str(error.value) or how == "its idle forward fails"
            with pytest.raises(RankError, match=str(error.value)):  # and each one that comes later
                lockstep.submit(partial(device.forward, "own", 0), 1)
        lockstep.close()
        assert not lockstep.thread.is_alive()

    run_ranks(2, run)
