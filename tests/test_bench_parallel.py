"""`parallel`: the cost model against cases counted by hand, fits on made-up times, and the benches on
tiny engines. No assertion on time."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.bench.costs import ModelShape
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
    assert sent_bytes(shape, Layout(1, 2, ep=True), 1) == pytest.approx(2 * 0.5 * 10)


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
