"""Every kernel against the reference in float64, over shapes, layouts and mixes of lengths.

The GPU's implementations are tested in files of their own; here are the reference and the CPU's.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from part01.sampler import sample as sample_of_part01
from torch import Tensor

from common.kernels import AttentionMetadata, Ops, select_ops
from common.kernels.cpu.ops import CpuOps
from common.kernels.cpu.vector import LANES
from common.kernels.reference import ReferenceOps
from common.sampling import NO_TOKEN, SamplingBatch, SamplingParams

REFERENCE = ReferenceOps()
CPU = CpuOps(2)
FLOAT = torch.float32


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.long), 2], ids=["1 thread", "2 threads"])
def ops(request: pytest.FixtureRequest) -> Ops:
    """In the short form with two threads: the suite's engines run with one, against the oracle."""
    return CpuOps(request.param)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest expected value; shapes and dtypes as they should be."""
    assert actual.shape == expected.shape and actual.dtype == FLOAT
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * scale)


# The reference itself, against PyTorch's own functions.


def test_reference_norm_and_activation() -> None:
    x, weight = randn(5, 12), randn(12, seed=1)
    torch.testing.assert_close(
        REFERENCE.rms_norm(x, weight, 1e-5), F.rms_norm(x, (12,), weight, 1e-5)
    )
    torch.testing.assert_close(REFERENCE.silu_and_mul(x), F.silu(x[:, :6]) * x[:, 6:])


@pytest.mark.parametrize("window", [None, 3])
def test_reference_attention(window: int | None) -> None:
    case = make_attention([(4, 9)], num_heads=4, num_kv_heads=2, head_dim=8, block_size=4)
    query, kv_cache, layer, metadata = case[:4]
    keys, values = REFERENCE.gather(kv_cache, layer, metadata.block_tables[0], 9)
    position, token = torch.arange(5, 9)[:, None], torch.arange(9)
    mask = (token <= position) & (token > position - (window or 99))
    expected = F.scaled_dot_product_attention(
        query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), mask, enable_gqa=True
    )
    actual = REFERENCE.attention(*case, sliding_window=window)
    torch.testing.assert_close(actual, expected.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reference_keeps_other_dtypes(dtype: torch.dtype) -> None:
    x, weight = randn(3, 16).to(dtype), randn(16, seed=1).to(dtype)
    actual = CPU.rms_norm(x, weight, 1e-5)
    assert actual.dtype == dtype
    expected = F.rms_norm(x.double(), (16,), weight.double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)
    linear = CPU.linear(x, CPU.prepare_weight(weight[None]))
    assert linear.dtype == dtype
    torch.testing.assert_close(
        linear.double(), x.double() @ weight[:, None].double(), rtol=2e-2, atol=0.1
    )


# Small operations.

ROWS = [1, 2, 7, 64, 257]


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", [1, 7, 64, 576, 1000])
def test_norms(ops: Ops, num_rows: int, size: int) -> None:
    x, residual, weight = randn(num_rows, size), randn(num_rows, size, seed=1), randn(size, seed=2)
    expected = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    assert_near(ops.rms_norm(x, weight, 1e-5), expected)
    total = x.double() + residual.double()
    actual = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert_near(actual, F.rms_norm(total, (size,), weight.double(), 1e-5))
    assert_near(residual, total)


def test_norms_of_views(ops: Ops) -> None:
    wide, weight = randn(6, 40), randn(20, seed=1)
    x, residual = wide[::2, 20:], randn(3, 40, seed=2)[:, :20]
    expected = (x + residual).double()
    actual = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert_near(actual, F.rms_norm(expected, (20,), weight.double(), 1e-5))
    assert_near(residual.contiguous(), expected)


def test_norm_of_zeros_uses_eps(ops: Ops) -> None:
    assert_near(ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8).double())


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("size", [1, 7, 64, 1536])
def test_silu_and_mul(ops: Ops, num_rows: int, size: int) -> None:
    gate_up = randn(num_rows, 2 * size) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(ops.silu_and_mul(gate_up), F.silu(gate) * up, 1e-6)


def test_silu_far_from_zero(ops: Ops) -> None:
    gate = torch.tensor([[-1e4, -200.0, -88.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 88.0, 200.0, 1e4]])
    actual = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(actual, F.silu(gate.double()).float(), rtol=1e-6, atol=1e-30)


def test_activation_is_accurate_to_a_few_bits(ops: Ops) -> None:
    """Through the whole range where exp matters, relative to each value."""
    gate = torch.linspace(-80, 80, 100_001)[None]
    actual = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=1))
    torch.testing.assert_close(actual.double(), F.silu(gate.double()), rtol=5e-7, atol=1e-36)


def rotary_case(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> dict:
    num_blocks, num_layers, layer = num_tokens // block_size + 3, 2, 1
    angles = torch.rand(50, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[::5] = -1
    return {
        "qkv": randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "positions": torch.randint(0, 50, (num_tokens,)),
        "kv_cache": randn(num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim),
        "layer": layer,
        "slot_mapping": slots,
    }


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "q and k norms"])
@pytest.mark.parametrize("num_heads, num_kv_heads", [(9, 3), (2, 2), (8, 1)])
@pytest.mark.parametrize("head_dim, block_size", [(2, 1), (16, 3), (64, 16), (80, 17), (256, 64)])
@pytest.mark.parametrize("num_tokens", [1, 6, 70])
def test_rotary_and_store(
    ops: Ops,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    norms: bool,
) -> None:
    case = rotary_case(num_tokens, num_heads, num_kv_heads, head_dim, block_size)
    weights = {"q_norm": randn(head_dim), "k_norm": randn(head_dim, seed=4)} if norms else {}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors(case).items()}
    wide_weights = {k: v.double() for k, v in weights.items()}
    expected = REFERENCE.rotary_and_store(**{**case, **wide}, **wide_weights, eps=1e-5)
    actual = ops.rotary_and_store(**case, **weights, eps=1e-5)
    assert_near(actual, expected)
    assert_near(case["kv_cache"], wide["kv_cache"])


def tensors(case: dict) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in case.items() if isinstance(v, Tensor)}


def test_rotary_of_views(ops: Ops) -> None:
    case = rotary_case(5, 4, 2, 16, 4)
    expected = REFERENCE.rotary_and_store(**{**case, **tensors(case)})
    case["qkv"] = torch.cat([case["qkv"], case["qkv"]], dim=1)[:, : case["qkv"].shape[1]]
    case["positions"] = torch.stack([case["positions"]] * 2, dim=1)[:, 0]
    case["slot_mapping"] = torch.stack([case["slot_mapping"]] * 2, dim=1)[:, 0]
    assert_near(ops.rotary_and_store(**case), expected.double())


# Linear layers.


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 12, 13, 25, 40])
@pytest.mark.parametrize(
    "out_features, in_features", [(1, 1), (32, 3), (70, 48), (33, 1500), (96, 576), (64, 2050)]
)
def test_linear(ops: Ops, num_tokens: int, out_features: int, in_features: int) -> None:
    weight, bias = randn(out_features, in_features), randn(out_features, seed=1)
    x = randn(num_tokens, in_features, seed=2)
    expected = x.double() @ weight.double().T
    assert_near(ops.linear(x, ops.prepare_weight(weight)), expected, 5e-6)
    assert_near(ops.linear(x, ops.prepare_weight(weight, bias)), expected + bias.double(), 5e-6)


def test_linear_of_views(ops: Ops) -> None:
    weight, x = randn(40, 48)[::2, ::3], randn(7, 32, seed=1)[:, ::2]
    prepared = ops.prepare_weight(weight, randn(40, seed=2)[::2])
    expected = x.double() @ weight.double().T + randn(40, seed=2)[::2].double()
    assert_near(ops.linear(x, prepared), expected)


def rotary_with(**changes: Any) -> Tensor:
    """A call of 3 tokens, 4 heads and 2 KV heads of 8, with other arguments."""
    arguments = {
        "qkv": randn(3, 64),
        "cos_sin": randn(10, 8),
        "positions": torch.arange(3),
        "kv_cache": torch.zeros(2, 2, 2, 4, 2, 8),
        "layer": 1,
        "slot_mapping": torch.arange(3),
        "q_norm": torch.ones(8),
        "k_norm": torch.ones(8),
    }
    return CPU.rotary_and_store(**arguments | changes)


def attention_with(**changes: Any) -> Tensor:
    """A call of 3 tokens of one sequence, 4 heads and 2 KV heads of 16, with other arguments."""
    batch = {
        "cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([3], dtype=torch.int32),
        "block_tables": torch.zeros(1, 1, dtype=torch.int32),
    }
    arguments = {
        "query": randn(3, 4, LANES),
        "kv_cache": torch.zeros(2, 2, 2, 4, 2, LANES),
        "layer": 1,
        "scale": 1.0,
        "sliding_window": 2,
    }
    metadata = {name: changes.pop(name, value) for name, value in batch.items()}
    metadata = AttentionMetadata(
        **metadata, slot_mapping=torch.arange(3), max_query_len=3, max_seq_len=3
    )
    return CPU.attention(**arguments | changes, metadata=metadata)


def sample_with(**changes: Any) -> Tensor:
    """A call of 2 rows, with other arguments."""
    floats = {name: torch.ones(2) for name in ("temperature", "top_p", "min_p")}
    integers = {name: torch.zeros(2, dtype=torch.int64) for name in ("top_k", "seeds", "positions")}
    return CPU.sample(randn(2, 9), **floats | integers | changes)


def test_calls_of_the_right_shapes_run() -> None:
    """The control for those that are refused below."""
    assert rotary_with().shape == (3, 4, 8)
    assert attention_with().shape == (3, 4 * LANES)
    assert sample_with().shape == (2,)


# The kernels work on raw addresses: what is let through here is read from somebody else's memory.
WRONG_SHAPES = {
    "norm, weight": lambda: CPU.rms_norm(randn(2, 8), torch.ones(1), 1e-5),
    "norm, residual": lambda: CPU.add_rms_norm(randn(2, 8), randn(1, 8), torch.ones(8), 1e-5),
    "silu": lambda: CPU.silu_and_mul(randn(2, 7)),
    "linear": lambda: CPU.linear(randn(2, 5), CPU.prepare_weight(randn(4, 6))),
    "rotary, q_norm": lambda: rotary_with(q_norm=torch.ones(1)),
    "rotary, k_norm": lambda: rotary_with(k_norm=torch.ones(7)),
    "rotary, table": lambda: rotary_with(cos_sin=randn(10, 4)),
    "rotary, odd": lambda: rotary_with(kv_cache=torch.zeros(2, 2, 2, 4, 2, 7), qkv=randn(3, 56)),
    "rotary, width": lambda: rotary_with(qkv=randn(3, 60)),
    "rotary, no query heads": lambda: rotary_with(qkv=randn(3, 32)),
    "rotary, positions": lambda: rotary_with(positions=torch.arange(2)),
    "rotary, slots": lambda: rotary_with(slot_mapping=torch.arange(2)),
    "rotary, layer": lambda: rotary_with(layer=2),
    "rotary, layer below 0": lambda: rotary_with(layer=-1),
    "attention, heads": lambda: attention_with(query=randn(3, 3, LANES)),
    "attention, head_dim": lambda: attention_with(query=randn(3, 4, LANES // 2)),
    "attention, layer": lambda: attention_with(layer=2),
    "attention, window": lambda: attention_with(sliding_window=0),
    "attention, starts": lambda: attention_with(cu_seqlens_q=torch.tensor([0])),
    "attention, lengths": lambda: attention_with(seq_lens=torch.tensor([3, 3])),
    "attention, tables": lambda: attention_with(block_tables=torch.zeros(0, 1)),
    "sample": lambda: sample_with(seeds=torch.zeros(1, dtype=torch.int64)),
    "sample, columns": lambda: sample_with(temperature=torch.ones(2, 1)),
    "filters": lambda: CPU.smallest_kept(
        randn(2, 9), torch.zeros(1, dtype=torch.int64), torch.ones(2), torch.ones(2)
    ),
}


@pytest.mark.parametrize("call", WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
def test_wrong_shapes_are_refused(call: Callable[[], Tensor]) -> None:
    """Not by an assertion, which `python -O` leaves out."""
    with pytest.raises(ValueError):
        call()


def test_weights_are_kept_once() -> None:
    prepared = CPU.prepare_weight(randn(64, 100))
    held = [v for v in vars(prepared).values() if isinstance(v, Tensor)]
    assert sum(v.numel() for v in held) <= 64 * 100 + 64


def test_weights_share_memory_and_not_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie one after another until a chunk is full; one larger than a chunk has its own."""
    monkeypatch.setattr("common.kernels.cpu.weight.CHUNK", 4 << 20)
    ops, x = CpuOps(2), randn(3, 512)
    weights = [randn(size, 512, seed=size) for size in (992, 544, 4800, 33, 96)]
    prepared = [ops.prepare_weight(weight) for weight in weights]
    first, second, *_ = prepared
    assert second.panels_address == first.panels_address + first.panels.nbytes
    for weight, one in zip(weights, prepared, strict=True):
        assert_near(ops.linear(x, one), x.double() @ weight.double().T, 5e-6)


# Attention.


def make_attention(
    lengths: list[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, int, AttentionMetadata, float]:
    """Sequences of (queries, tokens) in shuffled blocks; what must not be read is NaN or absurd."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-length // block_size) for _, length in lengths]
    blocks = torch.randperm(sum(num_blocks) + 2, generator=generator)
    kv_cache = torch.full((len(blocks), 2, 2, block_size, num_kv_heads, head_dim), torch.nan)
    tables = torch.full((len(lengths), max(num_blocks) + 2), 2**31 - 1, dtype=torch.int32)
    layer, used = 1, 0
    for i, (_, length) in enumerate(lengths):
        own = blocks[used : used + num_blocks[i]]
        tables[i, : num_blocks[i]] = own
        used += num_blocks[i]
        for token in range(0, length, block_size):
            size = min(block_size, length - token)
            shape = (2, size, num_kv_heads, head_dim)
            kv_cache[own[token // block_size], layer, :, :size] = torch.randn(
                shape, generator=generator
            )
    counts = [queries for queries, _ in lengths]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    metadata = AttentionMetadata(
        cu_seqlens_q=starts,
        seq_lens=torch.tensor([length for _, length in lengths]).int(),
        block_tables=tables,
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
        max_query_len=max(counts),
        max_seq_len=max(length for _, length in lengths),
    )
    query = torch.randn(sum(counts), num_heads, head_dim, generator=generator)
    return query, kv_cache, layer, metadata, head_dim**-0.5


def check_attention(
    ops: Ops, case: tuple, window: int | None = None, tolerance: float = 2e-6
) -> None:
    query, kv_cache, *rest = case
    expected = REFERENCE.attention(query.double(), kv_cache.double(), *rest, sliding_window=window)
    assert_near(ops.attention(*case, sliding_window=window), expected, tolerance)


MIXES = {
    "decode": [(1, 1), (1, 2), (1, 63), (1, 130), (1, 17)],
    "one long": [(1, 700)],
    "prefill": [(70, 70), (1, 1), (33, 33)],
    "all": [(3, 3), (0, 40), (1, 300), (5, 129), (0, 1), (40, 200), (1, 64)],
}


@pytest.mark.parametrize("block_size", [1, 3, 16, 17, 64, 256])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_attention(ops: Ops, mix: list, head_dim: int, block_size: int) -> None:
    check_attention(ops, make_attention(mix, 9, 3, head_dim, block_size))


@pytest.mark.parametrize(
    "num_heads, num_kv_heads", [(1, 1), (3, 3), (4, 2), (6, 2), (4, 1), (8, 1), (32, 1)]
)
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_attention_with_other_groups(
    ops: Ops, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    check_attention(ops, make_attention(MIXES["all"], num_heads, num_kv_heads, head_dim, 16))


@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_attention_with_a_sliding_window(ops: Ops, mix: list, window: int) -> None:
    check_attention(ops, make_attention(mix, 6, 2, 32, 16), window)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_attention_of_long_prompts(
    ops: Ops, head_dim: int, block_size: int, window: int | None
) -> None:
    """Several tiles of queries and of keys; a prompt whose first tokens were computed before."""
    mix = [(450, 450), (1, 300), (131, 700)]
    check_attention(ops, make_attention(mix, 9, 3, head_dim, block_size), window)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 130), st.integers(0, 200)), min_size=1, max_size=6),
    st.sampled_from([(1, 1), (2, 1), (9, 3), (8, 2)]),
    st.sampled_from([16, 48, 64]),
    st.integers(1, 40),
    st.none() | st.integers(1, 90),
    st.integers(0, 2**31),
)
def test_attention_of_any_mix(mix, heads, head_dim, block_size, window, seed) -> None:
    lengths = [(queries, max(1, queries + before)) for queries, before in mix]
    lengths.append((1, 5))
    check_attention(CPU, make_attention(lengths, *heads, head_dim, block_size, seed), window)


def test_attention_with_large_scores(ops: Ops) -> None:
    query, *rest = make_attention(MIXES["all"], 6, 2, 32, 16)
    # Scores of some hundreds are rounded by 1e-5, and so are weights.
    check_attention(ops, (query * 100, *rest), tolerance=1e-4)


def test_attention_with_other_head_sizes(ops: Ops) -> None:
    check_attention(ops, make_attention(MIXES["all"], 2, 1, 20, 4))


def test_attention_of_two_caches_in_turn(ops: Ops) -> None:
    shapes = (4, 2, 16, 4), (9, 3, 64, 16)
    for case in [make_attention([(1, 9), (5, 20)], *shape) for shape in shapes] * 2:
        check_attention(ops, case)


def test_attention_takes_views(ops: Ops) -> None:
    query, kv_cache, layer, metadata, scale = make_attention(MIXES["all"], 4, 2, 16, 4)
    tables = torch.cat([metadata.block_tables, metadata.block_tables], dim=1)
    width = metadata.block_tables.shape[1]
    changed = AttentionMetadata(
        metadata.cu_seqlens_q.long(),
        metadata.seq_lens.repeat_interleave(2)[::2],
        tables[:, :width],
        metadata.slot_mapping,
        metadata.max_query_len + 7,
        metadata.max_seq_len + 7,
    )
    strided = torch.cat([query, query], dim=1)[:, :4]
    check_attention(ops, (strided, kv_cache, layer, changed, scale))


# Sampling: token for token what part 01 draws.


def settings_of(index: int) -> SamplingParams:
    """One of many mixes of filters."""
    temperatures = (1.0, 0.0, 0.7, 2.0, 100.0, 0.05, 1e-6)
    top_ps = (1.0, 0.9, 0.5, 1e-30, 0.999, 0.1, 1.0)
    top_ks = (0, 1, 5, 50, 300, 2**24, -1, 2)
    min_ps = (0.0, 0.0, 0.1, 1.0, 0.0)
    return SamplingParams(
        temperature=temperatures[index % 7],
        top_p=top_ps[index // 3 % 7],
        top_k=top_ks[index // 5 % 8],
        min_p=min_ps[index // 2 % 5],
    )


def kernel_sample(ops: Ops, logits: Tensor, batch: SamplingBatch) -> list[int]:
    columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p, batch.seeds)
    return ops.sample(logits, *(c[:, 0] for c in (*columns, batch.positions))).tolist()


def check_sample(ops: Ops, logits: Tensor, first: int = 0) -> None:
    count = len(logits)
    params = [settings_of(first + i) for i in range(count)]
    seeds = [(first + i) * 0x9E3779B97F4A7C15 % 2**64 for i in range(count)]
    batch = SamplingBatch.build(logits, params, seeds, [i % 50 for i in range(count)], [[]] * count)
    expected = sample_of_part01(logits, batch)[0]
    actual = kernel_sample(ops, logits, batch)
    wrong = [
        (i, params[i], expected[i], actual[i]) for i in range(count) if expected[i] != actual[i]
    ]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("vocab", [1, 2, 5, 17, 300, 1000, 4099])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 100.0])
def test_sample(ops: Ops, vocab: int, spread: float) -> None:
    check_sample(ops, randn(280, vocab, seed=vocab) * spread, vocab)


@pytest.mark.parametrize("vocab", [3, 300, 2000])
def test_sample_with_ties(ops: Ops, vocab: int) -> None:
    logits = (randn(280, vocab, seed=vocab) * 2).round()
    logits[::3] = -logits[::3].abs()  # has minus zeros
    check_sample(ops, logits)


@pytest.mark.parametrize("vocab", [3, 300, 2000])
def test_sample_with_impossible_tokens(ops: Ops, vocab: int) -> None:
    logits = randn(280, vocab, seed=vocab) * 3
    logits[randn(280, vocab, seed=1) > 0] = -torch.inf
    logits[:, vocab // 2] = 1.0
    check_sample(ops, logits)


def test_sample_of_a_real_vocabulary() -> None:
    logits = randn(60, 49152) * 3
    logits[:20] *= 2
    logits[40:] = 0.0
    check_sample(CPU, logits)
    check_sample(CPU, logits, 61)


def test_choices_have_noise_of_their_own(ops: Ops) -> None:
    """Rows that differ in their choice index only; choice 0 is what no choices give."""
    logits = torch.zeros(64, 300)
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    row = (logits, ones, zeros, ones, ones * 0, zeros + 7, zeros + 3)
    choices = torch.arange(64) // 2
    tokens = ops.sample(*row, choices)
    assert tokens.tolist() == REFERENCE.sample(*row, choices).tolist()
    assert tokens[::2].tolist() == tokens[1::2].tolist()
    assert len(set(tokens.tolist())) > 20
    assert set(ops.sample(*row).tolist()) == {tokens[0].item()}


@pytest.mark.parametrize("vocab", [1, 16, 17, 300])
def test_embedding(ops: Ops, vocab: int) -> None:
    weight, tokens = randn(vocab, 48), torch.randint(0, vocab, (40,))
    assert torch.equal(ops.embedding(tokens, ops.prepare_weight(weight)), weight[tokens])


def test_reference_samples_as_part01_does() -> None:
    for vocab in (1, 17, 1000):
        check_sample(REFERENCE, randn(280, vocab, seed=vocab) * 2, vocab)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45])
@pytest.mark.parametrize("where", ["all", "some", "one"])
def test_odd_logits(ops: Ops, value: float, where: str) -> None:
    """A token that is possible; none where a logit is NaN or +infinity, or all are -infinity."""
    places = {"all": slice(None), "some": slice(0, 300, 2), "one": slice(7, 8)}[where]
    logits = randn(56, 300)
    logits[:28, places] = value
    params = [settings_of(i) for i in range(56)]
    batch = SamplingBatch.build(logits, params, range(56), [0] * 56, [[]] * 56)
    tokens = kernel_sample(ops, logits, batch)
    assert all(0 <= token < 300 for token in tokens[28:])
    if not math.isfinite(value) and (value != -math.inf or where == "all"):
        assert tokens[:28] == [NO_TOKEN] * 28
    else:
        impossible = set(range(300)[places]) if value == -math.inf else set()
        assert all(0 <= token < 300 and token not in impossible for token in tokens[:28])


def test_a_nan_is_found_wherever_it_is(ops: Ops) -> None:
    """With either sign, in each place of vectors and beyond them, in rows that draw or not."""
    vocab = 2 * LANES + 3
    logits = randn(4 * vocab, vocab)
    nans = torch.tensor([math.nan, -math.nan]).repeat(2 * vocab)
    logits[torch.arange(4 * vocab), torch.arange(4 * vocab) // 4] = nans
    params = [SamplingParams(temperature=float(i // 2 % 2)) for i in range(4 * vocab)]
    batch = SamplingBatch.build(
        logits, params, range(len(params)), [0] * len(params), [[]] * len(params)
    )
    assert kernel_sample(ops, logits, batch) == [NO_TOKEN] * len(params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_taken_in_their_own_format(ops: Ops, dtype: torch.dtype) -> None:
    """And what is drawn is what their float32 values give."""
    logits = (randn(56, 1000) * 4).to(dtype)
    params = [settings_of(i) for i in range(56)]
    batch = SamplingBatch.build(logits, params, range(56), [0] * 56, [[]] * 56)
    for each in (ops, REFERENCE):
        assert kernel_sample(each, logits, batch) == kernel_sample(each, logits.float(), batch)


def test_sample_takes_views_and_other_dtypes(ops: Ops) -> None:
    logits = randn(6, 64).bfloat16()
    ones, zeros = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.int32)
    columns = (ones, zeros, ones, ones * 0, torch.arange(12)[::2], zeros)
    assert torch.equal(ops.sample(logits, *columns), REFERENCE.sample(logits.float(), *columns))


# Choosing an implementation, and the cache of compiled code.


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_select_cpu(name: str) -> None:
    ops = select_ops(name, torch.device("cpu"), 1)
    assert (ops.name, ops.num_threads) == ("cpu", 1)


def test_select_reference() -> None:
    assert select_ops("reference", "cpu").name == "reference"


@pytest.mark.parametrize("name", ["numba", "", "CPU", "triton", "flash"])
def test_select_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=repr(name)):
        select_ops(name, "cpu")


def test_select_without_numba(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "common.kernels.cpu.ops", None)
    assert select_ops("auto", "cpu").name == "reference"
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ValueError, match="'cpu'"):
        select_ops("cpu", "cpu")


@pytest.mark.parametrize("num_threads", [0, -1])
def test_threads_must_be_positive(num_threads: int) -> None:
    with pytest.raises(ValueError, match=str(num_threads)):
        CpuOps(num_threads)
