"""`parallel`: the cost model against cases counted by hand, fits on made-up times, and the benches on
tiny engines. No assertion on time."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.bench import BenchError
from common.bench.__main__ import main
from common.bench.core.results import load_result
from common.bench.costs import ModelShape
from common.bench.parallel import choices, collectives, engine_worker, engines, measure
from common.bench.parallel.cost_model import Batch, Routing, sent_bytes, step
from common.bench.parallel.experts import (
    busiest_rank,
    distinct_experts,
    placed,
    popularity,
    ranks_reached,
)
from common.bench.parallel.fit import fit_alpha_beta
from common.bench.parallel.layouts import Layout, Share, layouts, memory
from common.bench.parallel.links import (
    Fabric,
    Link,
    all_to_all,
    one_shot_all_reduce,
    ring_all_reduce,
    ring_gather,
    shared_all_reduce,
)
from common.bench.parallel.machines import (
    CLUSTER,
    HOST,
    INFINIBAND,
    MODELS,
    NVLINK,
    Device,
    Machine,
)
from common.bench.parallel.points import Point
from common.bench.parallel.prediction import calibrate, machine_of, measured_link, part_of
from common.bench.parallel.replicas import Engines, Variant
from common.bench.parallel.watched import Watch
from common.testing.parts import PARTS

SMOLLM2 = ModelShape(30, 576, 9, 3, 64, 1536, 49152)
SMALL_MOE = ModelShape(2, 8, 4, 2, 4, 6, 32, num_experts=8, num_experts_per_token=2)
SLOW = Link(call_s=1.0, hop_s=0.1, bytes_per_s=10.0)
FAST = Link(call_s=0.0, hop_s=0.0, bytes_per_s=1e30)
ROUND = Device(memory_bytes=1e12, read_bytes_per_s=1000.0, flops_per_s=1e30, kernel_s=0.0)


def machine(device: Device = ROUND, link: Link = FAST, num_ranks: int = 8) -> Machine:
    return Machine("made up", num_ranks, device, Fabric(num_ranks, link, link))


# Messages


def test_bytes_and_hops_of_four_ranks() -> None:
    """100 bytes: a ring passes quarters on, three of them to sum and three to tell."""
    assert ring_all_reduce(100, 4).hops == 6 and ring_all_reduce(100, 4).num_bytes == 150
    assert one_shot_all_reduce(100, 4).hops == 1 and one_shot_all_reduce(100, 4).num_bytes == 300
    assert ring_gather(100, 4).hops == 3 and ring_gather(100, 4).num_bytes == 75
    assert all_to_all(100, 4).hops == 1 and all_to_all(100, 4).num_bytes == 75
    assert SLOW.seconds(ring_all_reduce(100, 4)) == pytest.approx(1 + 0.6 + 15)


def test_one_rank_sends_nothing() -> None:
    fabric = Fabric(8, SLOW, SLOW)
    for collective in (fabric.all_reduce, fabric.all_gather, fabric.all_to_all):
        assert collective(100, 1) == 0


def test_the_quicker_all_reduce_is_taken() -> None:
    """Of few bytes one hop counts, of many bytes how many are sent."""
    fabric = Fabric(8, Link(1.0, 1.0, 1.0), SLOW)
    assert fabric.all_reduce(1e-6, 8) == pytest.approx(2.0, rel=1e-4)
    assert fabric.all_reduce(1e6, 8) == pytest.approx(1 + 14 + 1.75e6)
    assert fabric.all_reduce(5, 2) == pytest.approx(1 + 1 + 5)  # of two ranks both send as much


def test_over_hosts_each_rank_sends_its_share() -> None:
    """16 ranks on two hosts of 8, 80 bytes: inside 70 + 70, between hosts 2 * 1/2 of a tenth of it."""
    fabric = Fabric(8, Link(0.0, 0.0, 1.0), Link(0.0, 0.0, 0.1))
    assert fabric.all_reduce(80, 16) == pytest.approx(70 + 70 + 10 / 0.1)
    assert fabric.all_gather(80, 16) == pytest.approx(70 + 5 / 0.1)
    assert fabric.all_to_all(80, 16) == pytest.approx(max(35, 40 / 0.1))
    with pytest.raises(ValueError, match="12 ranks on hosts of 8: the last is not full"):
        fabric.all_reduce(1, 12)


@pytest.mark.parametrize(
    ("size", "dispatch_us", "combine_us"),
    [(16, 118, 195), (32, 155, 273), (64, 173, 314), (128, 192, 369), (256, 194, 360)],
)
def test_all_to_all_is_near_what_deepep_publishes(
    size: int, dispatch_us: int, combine_us: int
) -> None:
    """docs/legacy.md of DeepEP: 128 tokens a rank, each to 8 experts, 7168 elements, one byte there
    (and a scale of 4 bytes for 128 of them) and two bytes back, on 400 Gb/s adapters."""
    fabric = Fabric(8, NVLINK, INFINIBAND)
    there, back = (
        1e6 * fabric.all_to_all(128 * 8 * row, size) for row in (7168 * (1 + 4 / 128), 2 * 7168)
    )
    assert there == pytest.approx(dispatch_us, rel=0.17)
    assert back == pytest.approx(combine_us, rel=0.06)


# Experts


def test_a_token_chooses_as_many_experts_as_it_should() -> None:
    for skew in (0.0, 0.5, 1.0, 3.0):
        chances = popularity(128, 8, skew)
        assert chances.sum() == pytest.approx(8)
        assert (chances > 0).all() and (chances <= 1).all()
        assert (np.diff(chances) <= 1e-12).all()
    assert popularity(8, 8).tolist() == [1.0] * 8
    assert popularity(4, 1, 1.0) == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    assert popularity(4, 2, 10.0)[0] == 1.0
    with pytest.raises(ValueError, match="top_k 9 of 8 experts"):
        popularity(8, 9)


@pytest.mark.parametrize("num_tokens", [1, 4, 32])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_experts_that_a_batch_touches(num_tokens: int, top_k: int) -> None:
    """As `ModelShape.params_read` counts them, and as drawing shows."""
    expected = distinct_experts(popularity(16, top_k), num_tokens)
    shape = ModelShape(1, 1, 1, 1, 1, 1, 1, num_experts=16, num_experts_per_token=top_k)
    shared = shape.attention_params + shape.router_params + shape.head_params
    assert expected == pytest.approx((shape.params_read(num_tokens) - shared) / 3)
    draw = np.random.default_rng(1)
    seen = [
        len({e for _ in range(num_tokens) for e in draw.choice(16, top_k, replace=False)})
        for _ in range(400)
    ]
    assert expected == pytest.approx(np.mean(seen), abs=4 * np.std(seen) / 20 + 1e-6)


@pytest.mark.parametrize(("num_experts", "top_k", "size"), [(8, 2, 2), (8, 2, 4), (6, 3, 3)])
def test_ranks_that_a_token_is_sent_to(num_experts: int, top_k: int, size: int) -> None:
    """The mean over all choices there are."""
    own = num_experts // size
    choices = list(itertools.combinations(range(num_experts), top_k))
    ranks = [len({expert // own for expert in choice}) for choice in choices]
    assert ranks_reached(num_experts, top_k, size) == pytest.approx(np.mean(ranks))
    assert ranks_reached(num_experts, top_k, 1) == 1
    assert ranks_reached(num_experts, num_experts, size) == size
    assert ranks_reached(num_experts, top_k, num_experts) == pytest.approx(top_k)


@pytest.mark.parametrize("skew", [0.0, 0.7])
@pytest.mark.parametrize("num_tokens", [64, 1024])
def test_the_busiest_rank(skew: float, num_tokens: int) -> None:
    """As drawing shows."""
    chances = popularity(32, 1, skew)
    draw = np.random.default_rng(2).multinomial(num_tokens, chances, size=500)
    most = draw.reshape(500, 8, 4).sum(-1).max(-1).mean() / (num_tokens / 8)
    assert busiest_rank(chances, 8, num_tokens) == pytest.approx(most, rel=0.08)
    assert busiest_rank(chances, 1, num_tokens) == 1
    assert busiest_rank(popularity(8, 8), 4, 100) == pytest.approx(1)  # every token chooses all


def test_placing_by_popularity_evens_the_ranks() -> None:
    chances = popularity(32, 4, 0.4)
    dealt = placed(chances, 8)
    assert sorted(dealt) == pytest.approx(sorted(chances))
    loads = dealt.reshape(8, 4).sum(-1)
    assert loads.max() / loads.mean() < 1.2 < chances.reshape(8, 4).sum(-1).max() / loads.mean()
    many = 10**9  # so that chance does not matter
    assert busiest_rank(dealt, 8, many) == pytest.approx(loads.max() / loads.mean(), rel=1e-3)
    with pytest.raises(ValueError, match="10 experts on 4 ranks"):
        placed(np.ones(10), 4)


# Layouts


def test_heads_of_smollm2_on_one_to_nine_ranks() -> None:
    """Whole groups of three query heads and one of keys and values; nine ranks hold a head each."""
    heads = {tp: Share.of(SMOLLM2, Layout(tp)) for tp in (1, 2, 3, 9)}
    assert [(own.num_heads, own.num_kv_heads) for own in heads.values()] == [
        (9, 3), (6, 2), (3, 1), (1, 1),
    ]  # fmt: skip
    assert [own.intermediate_size for own in heads.values()] == [1536, 768, 512, 171]
    for tp in (4, 6, 10, 18):
        with pytest.raises(ValueError, match=f"tp {tp}: 9 heads with 3 of KV do not divide"):
            Share.of(SMOLLM2, Layout(tp))


def test_experts_are_spread_or_cut() -> None:
    cut = Share.of(SMALL_MOE, Layout(2, 2))
    spread = Share.of(SMALL_MOE, Layout(2, 2, ep=True))
    assert (cut.num_experts, cut.intermediate_size) == (8, 3)
    assert (spread.num_experts, spread.intermediate_size) == (2, 6)
    with pytest.raises(ValueError, match="8 experts on 6 ranks: it does not divide"):
        Share.of(SMALL_MOE, Layout(2, 3, ep=True))
    with pytest.raises(ValueError, match="backend 'magic'"):
        Layout(backend="magic")


def test_memory_of_one_rank_is_the_models() -> None:
    """SmolLM2-135M has 134,515,008 parameters, and 2 * 3 * 64 * 30 elements of KV a token."""
    one = memory(SMOLLM2, Layout(), machine(), context=100, dtype_bytes=4, tied=True)
    assert one.weight_bytes == 4 * 134_515_008
    assert one.kv_bytes_per_token == 4 * 11520
    assert one.num_sequences == int((0.9e12 - one.weight_bytes) // (100 * 4 * 11520))
    two = memory(SMOLLM2, Layout(tp=2), machine(), context=100, dtype_bytes=4, tied=True)
    assert two.kv_bytes_per_token == 4 * 11520 * 2 // 3  # two of three heads
    assert one.weight_bytes / 2 < two.weight_bytes < 0.54 * one.weight_bytes
    other = memory(SMOLLM2, Layout(tp=2), machine(), context=100, dtype_bytes=4, tied=True, rank=1)
    norms = 61 * 576 * 4  # on both ranks
    assert two.weight_bytes + other.weight_bytes == one.weight_bytes + norms
    assert other.kv_bytes_per_token == 4 * 11520 // 3


def test_what_does_not_fit_holds_no_sequence() -> None:
    big = MODELS["Llama-3.1-70B"]
    assert memory(big, Layout(1, 8), HOST, 4096).num_sequences == 0
    assert memory(big, Layout(8, 1), HOST, 4096).num_sequences > 300
    moe = MODELS["Qwen3-235B-A22B"]
    assert memory(moe, Layout(1, 8), HOST, 4096).num_sequences == 0
    assert memory(moe, Layout(1, 8, ep=True), HOST, 4096).num_sequences > 100


def test_layouts_that_use_all_ranks() -> None:
    dense = layouts(MODELS["Qwen3-8B"], HOST)
    assert [(layout.tp, layout.dp) for layout in dense] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert not any(layout.ep for layout in dense)
    wide = layouts(MODELS["Qwen3-235B-A22B"], CLUSTER)
    assert max(layout.tp for layout in wide) == 64  # its query heads
    assert not any(layout.ep for layout in wide)  # 128 experts on 512 ranks do not divide
    assert any(layout.ep for layout in layouts(MODELS["Qwen3-235B-A22B"], CLUSTER, 128))


# Steps


def test_one_rank_reads_the_weights_and_the_cache_once() -> None:
    """At 1000 bytes a second, seconds are bytes; nothing is sent."""
    one = step(SMOLLM2, Layout(), machine(), Batch(3, num_cached=50), dtype_bytes=4)
    weights = sum(one.seconds[name] for name in ("projections", "feed-forward", "head"))
    assert 1000 * weights == pytest.approx(4 * SMOLLM2.params_read(1))
    assert 1000 * one.seconds["attention"] == pytest.approx(4 * SMOLLM2.kv_elements * 3 * 51)
    assert set(one.seconds) == {"projections", "feed-forward", "head", "attention"}
    assert one.message_share == 0 and one.tokens_per_s == pytest.approx(3 / one.total)


def test_operations_of_a_prefill() -> None:
    """A rank that computes one operation a second, and reads at once."""
    device = Device(1e12, read_bytes_per_s=1e30, flops_per_s=1.0, kernel_s=0.0)
    prefill = step(SMOLLM2, Layout(), machine(device), Batch(2, new_tokens=10))
    params = SMOLLM2.attention_params + SMOLLM2.expert_params
    products = prefill.seconds["projections"] + prefill.seconds["feed-forward"]
    assert products == pytest.approx(2 * 20 * params)
    assert prefill.seconds["attention"] == pytest.approx(SMOLLM2.attention_flops(2 * 55))
    assert prefill.seconds["head"] == pytest.approx(2 * 2 * SMOLLM2.head_params)


def test_copied_heads_are_read_again() -> None:
    """Nine ranks have three copies of each head of keys and values. Nine replicas have none."""
    nine, batch = machine(num_ranks=9), Batch(9, 1, 999)
    copied, apart = (step(SMOLLM2, layout, nine, batch) for layout in (Layout(9), Layout(1, 9)))
    assert copied.seconds["attention"] == pytest.approx(3 * apart.seconds["attention"])


def test_kernels_and_the_host_take_their_time() -> None:
    device = Device(1e12, read_bytes_per_s=1e30, flops_per_s=1e30, kernel_s=1.0, step_s=5.0)
    seconds = step(SMOLLM2, Layout(), machine(device), Batch(1)).seconds
    assert seconds["kernels"] == 30 * 9 + 3 and seconds["host"] == 5
    moe = step(SMALL_MOE, Layout(), machine(device), Batch(1)).seconds
    assert moe["kernels"] == 2 * 12 + 3


def test_sums_of_two_ranks() -> None:
    """Two a layer and one of the embedding; then the logits go to the rank that samples."""
    two = step(SMOLLM2, Layout(2), machine(link=SLOW), Batch(4), dtype_bytes=4)
    row = 4 * 576 * 4
    assert two.seconds["sums"] == pytest.approx(61 * (1 + 0.1 + row / 10))
    assert two.seconds["logits"] == pytest.approx(1 + 0.1 + 4 * 49152 * 4 / 2 / 10)
    assert 0 < two.message_share < 1


@given(tp=st.sampled_from([1, 3]), batch=st.integers(1, 64), cached=st.integers(0, 2000))
def test_without_messages_more_ranks_divide_the_reading(tp: int, batch: int, cached: int) -> None:
    one, many = (
        step(SMOLLM2, Layout(size), machine(num_ranks=9), Batch(batch, 1, cached))
        for size in (1, tp)
    )
    assert one.total / tp <= many.total + 1e-9 <= one.total + 2e-9
    halves = step(SMOLLM2, Layout(dp=tp), machine(num_ranks=9), Batch(batch, 1, cached))
    assert halves.total <= one.total + 1e-9  # and of replicas each has its part of the sequences
    assert halves.total >= many.total - 1e-9  # but each reads all weights


@given(
    name=st.sampled_from(sorted(MODELS)),
    tp=st.sampled_from([1, 2, 4, 8]),
    ep=st.booleans(),
    batch=st.integers(1, 500),
    cached=st.integers(0, 5000),
)
def test_more_work_takes_no_less_time(
    name: str, tp: int, ep: bool, batch: int, cached: int
) -> None:
    shape, layout = MODELS[name], Layout(tp, 8 // tp, ep)

    def total(*numbers: int) -> float:
        return step(shape, layout, HOST, Batch(*numbers), routing=Routing(balanced=True)).total

    base = total(batch, 1, cached)
    assert total(batch, 1, cached + 100) >= base
    assert total(batch, 2, cached) >= base
    if not ep:  # with it the busiest rank's lead shrinks while the batch grows
        assert total(batch + 8, 1, cached) >= base
    assert total(4 * batch, 1, cached) >= 0.999 * base


def test_experts_read_what_the_batch_touches() -> None:
    """Two experts of one token, nearly all of many; spread over ranks, each reads its own."""
    network = 3 * 8 * 6 * 2  # bytes
    router = 8 * 8 * 2
    one = step(SMALL_MOE, Layout(), machine(), Batch(1)).seconds["experts"]
    assert 1000 * one == pytest.approx(2 * (2 * network + router))
    many = step(SMALL_MOE, Layout(), machine(), Batch(1000)).seconds["experts"]
    assert 1000 * many == pytest.approx(2 * (8 * network + router))
    spread = step(SMALL_MOE, Layout(1, 4, ep=True), machine(), Batch(1000)).seconds["experts"]
    assert 1000 * spread == pytest.approx(2 * (2 * network + router))
    cut = step(SMALL_MOE, Layout(2), machine(), Batch(1000)).seconds["experts"]
    assert 1000 * cut == pytest.approx(2 * (4 * network + router))


def test_skew_lengthens_a_step_and_placing_shortens_it() -> None:
    shape, layout = MODELS["Qwen3-30B-A3B"], Layout(1, 8, ep=True)
    totals = [
        step(shape, layout, HOST, Batch(4096), routing=routing).total
        for routing in (Routing(), Routing(0.8, balanced=True), Routing(0.8))
    ]
    assert totals[0] < totals[1] < totals[2]


def test_messages_of_experts() -> None:
    """All-to-all hands out each replica's tokens; the other backend shows every rank all of them."""
    shape = MODELS["Qwen3-30B-A3B"]
    seconds = {
        (tp, backend): step(
            shape, Layout(tp, 8 // tp, True, backend), machine(link=SLOW), Batch(8)
        ).seconds
        for tp in (1, 8)
        for backend in ("all_to_all", "allgather_reducescatter")
    }
    row, layers = 2 * 2048, 48
    gathered = 2 * SLOW.seconds(ring_gather(8 * row, 8))
    assert seconds[1, "allgather_reducescatter"]["dispatch"] == pytest.approx(layers * gathered)
    assert "sums" not in seconds[1, "all_to_all"]
    # With one replica all ranks have all tokens: their sums are made as those of any network.
    fabric = Fabric(8, SLOW, SLOW)
    assert seconds[8, "allgather_reducescatter"]["dispatch"] == pytest.approx(
        layers * fabric.all_reduce(8 * row, 8)
    )
    assert seconds[8, "all_to_all"]["sums"] == pytest.approx(49 * fabric.all_reduce(8 * row, 8))


def test_bytes_sent_for_each_token_and_layer() -> None:
    """SmolLM2 in fp32 on two ranks: two sums of 576 numbers, and each rank gives its own once."""
    assert sent_bytes(SMOLLM2, Layout(2), 4) == 2 * 576 * 4
    assert sent_bytes(SMOLLM2, Layout(2), 4, one_shot_all_reduce) == 2 * 576 * 4
    assert sent_bytes(SMOLLM2, Layout(3), 4) == pytest.approx(2 * 4 / 3 * 576 * 4)
    assert sent_bytes(SMOLLM2, Layout(3), 4, one_shot_all_reduce) == 2 * 2 * 576 * 4
    assert sent_bytes(SMOLLM2, Layout(3), 4, shared_all_reduce) == 2 * 576 * 4
    assert sent_bytes(SMOLLM2, Layout(1, 4), 4) == 0
    # One expert of two, on two ranks: half of the tokens go to the other rank and come back.
    shape = ModelShape(1, 10, 2, 2, 5, 7, 9, num_experts=2, num_experts_per_token=1)
    assert sent_bytes(shape, Layout(1, 2, ep=True), 1) == pytest.approx(0.5 * (10 + 8 + 10))
    # The other way each rank gives its tokens to the other, and a part of the other's sum.
    gathered = Layout(1, 2, True, "allgather_reducescatter")
    assert sent_bytes(shape, gathered, 1) == pytest.approx(10 + 8 + 10)
    # With two ranks a replica they share what they send, sum what attention made, and gather.
    both = sent_bytes(MODELS["Qwen3-30B-A3B"], Layout(2, 1, ep=True))
    copies = ranks_reached(128, 8, 2)
    assert both == pytest.approx(4096 + copies / 2 * 0.5 * (2 * 4096 + 64) + 0.5 * 4096)


def test_what_a_machine_cannot_have() -> None:
    with pytest.raises(ValueError, match="TP 8 × DP 2: 8 H200 in one host has 8 ranks"):
        step(SMOLLM2, Layout(8, 2), HOST, Batch(1))


# Fits


@pytest.mark.parametrize(("alpha", "beta"), [(5e-6, 2e-10), (1e-4, 0.0), (0.0, 1e-9)])
def test_a_line_is_found_again(alpha: float, beta: float) -> None:
    sizes = [4 * 8**i for i in range(8)]
    fit = fit_alpha_beta(sizes, [alpha + beta * size for size in sizes])
    assert fit.alpha == pytest.approx(alpha, abs=1e-12) and fit.beta == pytest.approx(
        beta, abs=1e-16
    )
    assert fit.error < 1e-9 and fit.worst < 1e-9
    assert fit.seconds(1000) == pytest.approx(alpha + 1000 * beta)
    assert math.isinf(fit.bytes_per_s) == (beta == 0)


def test_errors_tell_how_far_a_fit_may_be_off() -> None:
    """In 200 made-up measurements with 10% noise, the true line lies within two errors mostly."""
    draw, sizes = np.random.default_rng(3), np.array([4.0 * 4**i for i in range(12)])
    within = []
    for _ in range(200):
        times = (5e-6 + 2e-10 * sizes) * (1 + 0.1 * draw.standard_normal(12))
        fit = fit_alpha_beta(sizes.tolist(), times.tolist())
        within.append(abs(fit.alpha - 5e-6) < 2 * fit.alpha_error)
        assert 0.01 < fit.error < 0.25 and fit.error <= fit.worst
    assert 0.85 < np.mean(within) <= 1


def test_no_negative_alpha_and_no_negative_beta() -> None:
    falling = fit_alpha_beta([1, 10, 100], [3.0, 2.0, 1.0])
    assert falling.beta == 0 and falling.alpha > 0
    steep = fit_alpha_beta([100, 200, 400], [1.0, 4.0, 16.0])
    assert steep.alpha == 0 and steep.beta > 0


@pytest.mark.parametrize(
    ("sizes", "times", "says"),
    [
        ([1, 2], [1.0, 2.0], "a fit needs three points"),
        ([1, 2, 3], [1.0, 2.0], "3 sizes and 2 times"),
        ([1, 2, 3], [1.0, 0.0, 2.0], "times must be positive"),
        ([1, 2, 3], [1.0, math.nan, 2.0], "times must be positive"),
        ([7, 7, 7], [1.0, 1.0, 1.0], "all sizes are the same"),
    ],
)
def test_what_cannot_be_fitted(sizes: list[float], times: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit_alpha_beta(sizes, times)


# Which layout wins


def test_what_messages_cost_decides() -> None:
    """With links that cost nothing all ranks share the model; with bad ones none do."""
    shape, device = MODELS["Qwen3-8B"], HOST.device
    for link, tp in ((FAST, 8), (Link(1.0, 1.0, 1.0), 1)):
        host = Machine("made up", 8, device, Fabric(8, link, link))
        found = choices.choices(shape, host, Batch(8, 1, 1000), context=2000)
        assert found[0].layout.tp == tp
        totals = [choice.step.total for choice in found]
        assert totals == sorted(totals)


def test_only_what_has_room_wins() -> None:
    found = choices.choices(MODELS["Llama-3.1-70B"], HOST, Batch(8, 1, 100), context=4096)
    assert {choice.layout.tp: choice.most for choice in found}[1] == 0
    assert choices.best(found, 8).layout.tp > 1
    assert choices.best(found, max(choice.most for choice in found) + 1) is None


def test_experts_may_span_a_part_of_the_machine() -> None:
    """128 experts do not divide by 512 ranks: four groups of 128 are the widest."""
    found = choices.choices(MODELS["Qwen3-30B-A3B"], CLUSTER, Batch(512), context=4096)
    spans = {choice.layout.num_ranks: choice.copies for choice in found if choice.layout.ep}
    assert max(spans) == 128 and all(span * copies == 512 for span, copies in spans.items())
    assert not any(choice.copies > 1 for choice in found if not choice.layout.ep)
    [wide] = [c for c in found if (c.layout.ep, c.layout.tp, c.copies) == (True, 1, 4)]
    assert wide.name == "TP 1 × DP 128, EP 128, 4 times"


def test_layouts_as_a_table_and_a_picture(tmp_path: Path, capsys: Any) -> None:
    out = f"--json {tmp_path}/l.json --plot {tmp_path}/l.png"
    assert main(f"parallel layouts --models Qwen3-8B Qwen3-30B-A3B {out}".split()) == 0
    rows = load_result(tmp_path / "l.json")["rows"]
    assert len(rows) == 2 * 2 * len(choices.PER_RANK)
    for row in rows:
        ways = [row[way] for way in ("tp1", "tp2", "tp4", "tp8", "tp16", "ep") if row[way]]
        assert row["step_ms"] is None or row["step_ms"] == min(ways)
    host = rows[: len(choices.PER_RANK)]
    assert host[0]["best"] == "TP 8 × DP 1" and host[0]["sure"]
    assert host[0]["rate"] == pytest.approx(1000 / host[0]["step_ms"])
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    assert "| 8 H200 in one host | Qwen3-8B | 1 | TP 8 × DP 1 | yes |" in capsys.readouterr().out


def test_skewed_experts_make_spreading_worth_less(capsys: Any, tmp_path: Path) -> None:
    name, steps = "Qwen3-30B-A3B", []
    for routing in (Routing(), Routing(0.8, balanced=True), Routing(0.8)):
        found = choices.choices(MODELS[name], HOST, Batch(1024, 1, 2048), 4096, routing=routing)
        steps.append(next(choice.step.total for choice in found if choice.layout.ep))
    assert steps[0] < steps[1] < steps[2]
    command = f"parallel layouts --models {name} --skew 0.8 --json {tmp_path}/l.json"
    assert main(command.split()) == 0
    assert "as the i-th is to i ** -0.8, placed by chance" in capsys.readouterr().out
    rows = load_result(tmp_path / "l.json")["rows"]
    assert rows[4]["ep"] == pytest.approx(
        1000 * steps[2], rel=0.5
    )  # with half of 4096 in the cache


def test_a_prefill_is_shared_by_a_replicas_ranks() -> None:
    found = choices.first_token(HOST, "Qwen3-8B", 2048)
    totals = [found[tp].total for tp in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
    assert found[1].message_share == 0 < found[8].message_share


# Collectives of this machine


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_ranks_make_the_same_calls(transport: str) -> None:
    """Real ranks: all operations at three sizes; what rank 0 gave is what the algorithm says."""
    threads, sizes = torch.get_num_threads(), [256, 4096, 65536]
    job = {
        "job": "collectives", "transport": transport, "ranks": 2, "sizes": sizes, "repeats": 1,
        "operations": list(measure.OPERATIONS),
    }  # fmt: skip
    try:
        answer = measure.collectives_job(job)
    finally:
        torch.set_num_threads(threads)
    for name, points in answer["operations"].items():
        assert [point["num_bytes"] for point in points] == sizes
        assert all(point["seconds"] > 0 for point in points)
        if name == "all_reduce":  # of two ranks a ring sends as much as memory that is written once
            assert [point["sent_bytes"] for point in points] == sizes
        if name == "gather":
            assert [point["sent_bytes"] for point in points] == [0, 0, 0]
    assert list(answer["operations"]) == list(measure.OPERATIONS)


def made_up_answer(job: dict[str, Any], verbose: bool = False) -> dict[str, Any]:
    alpha = {"gloo": 1e-4, "shared_memory": 1e-5}[job["transport"]]
    points = [
        {"num_bytes": size, "seconds": alpha + size * 1e-9, "sent_bytes": size}
        for size in job["sizes"]
    ]
    operations = dict.fromkeys(job["operations"], points)
    return {"operations": operations, "wall_s": 1.0, "wall_other_cores": 1.5}


LIMITS = {"device": "cpu", "read_gbps": 10.0, "fp32_gflops": 100.0, "bf16_tflops": None}


def test_collectives_as_a_table_and_a_picture(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "run_job", made_up_answer)
    monkeypatch.setattr(collectives, "run_worker", lambda job: LIMITS)
    flags = "parallel collectives --ranks 3 2 --operations all_reduce gather"
    assert (
        main([*flags.split(), "--json", f"{tmp_path}/c.json", "--plot", f"{tmp_path}/c.svg"]) == 0
    )
    rows = load_result(tmp_path / "c.json")["rows"]
    assert [(row["ranks"], row["transport"]) for row in rows[::2]] == [
        (2, "gloo"), (2, "shared memory"), (3, "gloo"), (3, "shared memory"),
    ]  # fmt: skip
    assert rows[0]["operation"] == "all-reduce"
    assert rows[0]["alpha_us"] == pytest.approx(100) and rows[0]["gbps"] == pytest.approx(1.0)
    assert rows[2]["alpha_us"] == pytest.approx(10) and rows[2]["error"] < 1e-6
    assert rows[2]["small_us"] == pytest.approx(10 + 2.048) and rows[2]["sent"] == 1
    output = capsys.readouterr().out
    assert "gloo, 3 ranks: other processes kept 1.5" in output
    assert "<svg" in (tmp_path / "c.svg").read_text()
    link = measured_link(rows, "shared memory", 3)
    assert link.seconds(ring_all_reduce(3000, 3)) == pytest.approx(1e-5 + 3000e-9)
    with pytest.raises(ValueError, match="no all-reduce of 5 ranks by gloo"):
        measured_link(rows, "gloo", 5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "the following arguments are required: ACTION"),
        ("nothing", "invalid choice: 'nothing'"),
        ("collectives --ranks 1", "--ranks 1: must be between 2 and 16"),
        ("collectives --sizes 64 128", "--sizes 64 128: must be three or more multiples of 64"),
        ("collectives --sizes 64 100 128", "--sizes 100: must be three or more multiples of 64"),
        ("collectives --transports mpi", "invalid choice: 'mpi'"),
        ("collectives --plot x.gif", "--plot must name a .png or an .svg, not 'x.gif'"),
        ("layouts --models GPT-4", "invalid choice: 'GPT-4'"),
        ("engines --part 98", "there is no part 98 here"),
        ("engines --part 8 --sizes 1", "--sizes 1: must be between 2 and this machine's"),
        ("engines --part 8 --output-len 1", "--output-len 1: the first token is not counted"),
        ("engines --part 8 --collectives /nowhere.json", "/nowhere.json: No such file"),
    ],
)
def test_bad_flags_give_one_line(flags: str, says: str, capsys: Any) -> None:
    try:
        status = main(["parallel", *flags.split()])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and "error: " in error and says in error


# Engines


def test_how_fast_a_lone_thread_reads() -> None:
    threads = torch.get_num_threads()
    try:
        share = measure.lone_read_job({"threads": 1, "all_threads": 1})["share"]
    finally:
        torch.set_num_threads(threads)
    assert share == 1.0


def test_a_watched_group_is_what_it_was() -> None:
    class Group:
        num_bytes_sent = 0

        def all_reduce(self, x: int) -> int:
            self.num_bytes_sent += 10 * x
            return x + 1

        broadcast = gather = all_gather = reduce_scatter = all_to_all = all_reduce

    group, times = Group(), itertools.count()
    watch = Watch(group, lambda: float(next(times)))
    assert [group.all_reduce(1), group.all_reduce(2), group.gather(5)] == [2, 3, 6]
    totals = watch.totals()
    assert (totals["all_reduce"].count, totals["all_reduce"].num_bytes) == (2, 30)
    assert totals["all_reduce"].seconds == 2 and totals["gather"].num_bytes == 50
    assert [call.name for call in watch.calls] == ["all_reduce", "all_reduce", "gather"]
    watch.stop()
    group.all_reduce(1)
    assert len(watch.calls) == 3 and group.num_bytes_sent == 90


def test_a_machine_is_found_again() -> None:
    """Calibrated on times that the model has made, it predicts the model's other times."""
    truth = Device(1e12, read_bytes_per_s=2.3e10, flops_per_s=1.4e11, kernel_s=0.0, step_s=0.003)
    host = machine_of(truth, 1)
    works = [[Batch(size, 1, 150)] for size in (1, 4, 16, 32)] + [[Batch(1, 256)] * 2]

    def seconds(work: list[Batch]) -> float:
        return sum(step(SMOLLM2, Layout(), host, batch, 4).total for batch in work)

    found = calibrate(SMOLLM2, [(work, seconds(work)) for work in works])
    assert found.read_bytes_per_s == pytest.approx(truth.read_bytes_per_s, rel=0.05)
    assert found.flops_per_s == pytest.approx(truth.flops_per_s, rel=0.05)
    assert found.step_s == pytest.approx(truth.step_s, rel=0.1)
    half = part_of(found, 2)
    assert half.read_bytes_per_s == found.read_bytes_per_s / 2 and half.step_s == found.step_s
    alone, hurried = (part_of(found, 4, 1, share) for share in (0.6, 0.1))
    assert alone.read_bytes_per_s == pytest.approx(0.6 * found.read_bytes_per_s)
    assert hurried.read_bytes_per_s == found.read_bytes_per_s / 4  # at least its even part
    two = part_of(found, 4, 2, 0.6)  # two of four share the memory
    assert two.read_bytes_per_s == found.read_bytes_per_s / 2
    assert alone.flops_per_s == two.flops_per_s == found.flops_per_s / 4
    with pytest.raises(ValueError, match="3 measurements: to calibrate takes four"):
        calibrate(SMOLLM2, [([Batch(1)], 1.0)] * 3)


SMOLLM2_CONFIG = {
    "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_the_steps_of_a_prefill() -> None:
    """At most 256 tokens a step: a long prompt in pieces, of short ones several together."""
    long, short = Point("", 1, 600, 1), Point("", 8, 128, 1)
    assert long.steps() == [Batch(1, 256, 0), Batch(1, 256, 256), Batch(1, 88, 512)]
    assert long.steps(dp=2) == long.steps()  # one replica has it, the other nothing
    assert short.steps() == [Batch(2, 128)] * 4
    assert short.steps(dp=2) == [Batch(4, 128)] * 2
    assert Point("", 4, 128, 48).steps(dp=2) == [Batch(4, 1, 152)]


class MadeUpEngines:
    """Speaks as `Engines` does. Times come from the cost model, so its predictions must be right."""

    truth = Device(1e12, read_bytes_per_s=2e10, flops_per_s=1e11, kernel_s=0.0, step_s=0.002)

    def __init__(self, part: int, model: str, variant: Variant, verbose: bool) -> None:
        if "breaks" in variant.settings and variant.layout.tp > 1:
            raise BenchError("bad luck")
        self.variant, layout = variant, variant.layout
        ranks = [
            memory(SMOLLM2, Layout(layout.tp), HOST, 1, 4, True, rank) for rank in range(layout.tp)
        ]
        self.facts = {
            "dtype": "float32", "device": "cpu", "shape": SMOLLM2_CONFIG, "max_num_seqs": 32,
            "rank_bytes": [[own.weight_bytes, 100 * own.kv_bytes_per_token] for own in ranks],
            "kv_tokens": 100, "peak_mib": [500.0] * layout.tp,
        }  # fmt: skip
        link = Link(1e-5, 0.0, 1e9)
        self.fabric = Fabric(8, link, link)

    def __enter__(self) -> "MadeUpEngines":
        return self

    def __exit__(self, *details: object) -> None:
        """Nothing is held."""

    def run(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        layout, count = self.variant.layout, len(prompts)
        point = Point("", count, len(prompts[0]), max_tokens)
        work = point.steps(layout.dp)
        device = part_of(self.truth, layout.num_ranks, layout.tp * min(layout.dp, count), 0.7)
        machine = Machine("true", layout.num_ranks, device, self.fabric)
        took = sum(step(SMOLLM2, layout, machine, batch, 4).total for batch in work)
        computed = sum(len(prompt) + max_tokens - 1 for prompt in prompts)
        sent = {"all_reduce": {"count": 1, "seconds": 0.0, "num_bytes": 61 * 576 * 4 * computed}}
        return {
            "seconds": took * (max_tokens - 1 or 1),
            "whole_s": 2 * took * max_tokens,
            "num_tokens": count * (max_tokens - 1) or sum(map(len, prompts)),
            "num_computed": computed,
            "outputs": [[len(prompt)] * max_tokens for prompt in prompts],
            "sent": sent if layout.tp > 1 else {},
        }


def run_made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> int:
    monkeypatch.setattr(collectives, "run_job", made_up_answer)
    for module in (collectives, engines):
        monkeypatch.setattr(module, "run_worker", lambda job: LIMITS)
    monkeypatch.setattr(engines, "Engines", MadeUpEngines)
    monkeypatch.setattr(engines, "run_job", lambda job: {"share": 0.7})
    monkeypatch.setattr(engines, "usable_cores", lambda: 4)
    monkeypatch.setattr(engines, "part_package", lambda part: f"part{part:02d}")
    assert main(f"parallel collectives --json {tmp_path}/c.json --quick-limits".split()) == 0
    return main([*["parallel", "engines", "--pairs", "5", "--vocab-size", "500"], *flags.split()])


def test_engines_as_tables_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = f"--json {tmp_path}/e.json --memory-json {tmp_path}/m.json --plot {tmp_path}/e.png"
    assert run_made_up(monkeypatch, tmp_path, f"--collectives {tmp_path}/c.json {out}") == 0
    rows = load_result(tmp_path / "e.json")["rows"]
    assert len(rows) == 6 * 3
    for row in rows:
        assert row["predicted_ms"] == pytest.approx(row["time_ms"], rel=0.03), row
        assert abs(row["error"]) < 3
        assert (row["ratio"] is None) == (row["engine"] == "one engine")
        assert (row["same"] is None) == (row["engine"] == "one engine")
        if row["ratio"] is not None:
            assert row["same"] == 100 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    by_name = {(row["point"], row["engine"]): row for row in rows}
    # Two replicas read all weights twice, so at batch 4 they are slower; ranks share the weights.
    four = {name: by_name["decode, batch 4", name]["ratio"] for name in ("TP 2", "DP 2")}
    assert four["DP 2"] < 0.7 < 0.8 < four["TP 2"] < 1
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    ranks = load_result(tmp_path / "m.json")["rows"]
    assert [(row["engine"], row["rank"]) for row in ranks] == [
        ("one engine", 0), ("TP 2", 0), ("TP 2", 1),
    ]  # fmt: skip
    for row in ranks:
        assert row["weights"] == row["weights_formula"] and row["kv"] == row["kv_formula"]
    assert ranks[1]["sent"] == pytest.approx(ranks[1]["sent_formula"]) == 2 * 576 * 4
    assert "| decode, batch 4 | DP 2 |" in capsys.readouterr().out


def test_a_variant_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    flags = f"--batches 1 2 --no-prefill --set breaks=1 --json {tmp_path}/e.json"
    assert run_made_up(monkeypatch, tmp_path, flags) == 1
    result = load_result(tmp_path / "e.json")
    assert {row["engine"] for row in result["rows"]} == {"one engine", "DP 2"}
    assert all(row["predicted_ms"] is None for row in result["rows"])
    assert "TP 2 failed: bad luck" in result["notes"]


@pytest.mark.skipif(max(PARTS) < 9, reason="part 09 is not there")
def test_real_ranks_hold_and_send_what_the_formulas_say() -> None:
    """Two ranks of a tiny model, in processes, beside an engine in this one."""
    job = {"part": 9, "model": "random:tiny-llama", "settings": {"threads": 1, "num_blocks": 64}}
    prompts = [[(7 * i + j) % 400 + 2 for j in range(9)] for i in range(3)]
    engine, _ = engine_worker.start(job)
    try:
        here = engine_worker.run(engine, {"prompts": prompts, "max_tokens": 6})
        first = engine_worker.run(engine, {"prompts": prompts, "max_tokens": 1})
    finally:
        engine.shutdown()
    assert all(not total["num_bytes"] for total in here["sent"].values())
    assert [output[:1] for output in here["outputs"]] == first["outputs"]
    layout = Layout(2)
    variant = Variant("", layout, job["settings"] | {"tensor_parallel_size": 2})
    with Engines(9, job["model"], variant) as processes:
        facts = processes.facts
        there = processes.run(prompts, 6)
    assert there["outputs"] == here["outputs"]
    assert there["num_tokens"] == here["num_tokens"] == 3 * 5
    assert len(facts["peak_mib"]) == len(facts["rank_bytes"]) == 2
    shape = ModelShape.from_config(facts["shape"])
    for rank, (weights, kv) in enumerate(facts["rank_bytes"]):
        formula = memory(shape, layout, HOST, 1, 4, tied=False, rank=rank)
        assert weights == formula.weight_bytes
        assert kv == facts["kv_tokens"] * formula.kv_bytes_per_token
    assert there["num_computed"] == 3 * (9 + 5)
    per_layer = sent_bytes(shape, layout, 4, shared_all_reduce)
    of_a_token = shape.num_layers * per_layer + 64 * 4  # and the embedding's sum
    assert there["sent"]["all_reduce"]["num_bytes"] == there["num_computed"] * of_a_token


def test_replicas_get_even_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are dealt out in turns, and come back in their order; the longest time counts."""
    asked: list[list[dict[str, Any]]] = []

    def ask(self: Engines, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked.append(jobs)
        return [
            {
                "seconds": float(number),
                "num_tokens": len(job["prompts"]),
                "num_computed": 10 * len(job["prompts"]),
                "outputs": job["prompts"],
                "sent": {},
            }
            for number, job in enumerate(jobs)
        ]

    monkeypatch.setattr(Engines, "ask", ask)
    two = Engines(9, "", Variant("", Layout(1, 2), {}))
    two.children = [None, None]
    answer = two.run([[1], [2], [3]], 4)
    assert [job["prompts"] for job in asked[0]] == [[[1], [3]], [[2]]]
    assert answer["outputs"] == [[1], [2], [3]] and answer["seconds"] == 1.0
    assert answer["num_tokens"] == 3 and answer["num_computed"] == 30
    assert len(two.run([[1]], 4)["outputs"]) == 1 and len(asked[1]) == 1  # the other is idle


def test_an_engine_that_cannot_start_is_told() -> None:
    variant = Variant("", Layout(), {"threads": 1})
    with (
        pytest.raises(BenchError, match=r"engine 0 failed: .*nothing"),
        Engines(max(PARTS), "random:nothing", variant),
    ):
        pass
