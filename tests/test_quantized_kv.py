"""A KV cache of int8 or E4M3 codes: its rows, attention over them, and everything that moves them."""

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from torch import Tensor

from common import kv_memory
from common.kernels import AttentionMetadata
from common.kernels.cpu import kv_rows
from common.kernels.cpu.ops import CpuOps
from common.kernels.quantized import FP8_MAX
from common.kernels.quantized_kv import (
    MOST,
    SMALLEST,
    dequantize_rows,
    head_size,
    is_quantized,
    quantize_rows,
    row_size,
)
from common.kernels.reference import ReferenceOps
from common.kv_store.block_copies import BlockCopies, Copy
from common.kv_store.disk import DiskStore
from common.kv_store.layout import layout_of
from common.kv_transfer import PrefillRequest, Receiver, Sender, allocate_shared
from common.kv_transfer.layout import Layout
from common.memory import HostMemory
from common.models.checkpoint import resolve
from common.testing.kernels.attention_cases import Lengths, Spec, make_attention
from common.testing.kernels.case import Target
from common.testing.kernels.small_cases import codes_that_differ

REFERENCE = ReferenceOps()
CPU = CpuOps(2)
FLOAT, FP8 = torch.float32, torch.float8_e4m3fn
ON_CPU = Target(CPU, torch.device("cpu"), FLOAT)
every_dtype = pytest.mark.parametrize("dtype", MOST, ids=["int8", "fp8"])
EDGES = [0.0, -0.0, 1e-45, 1e-38, 9e-31, SMALLEST, 3e-38, 1.0, 0.5, 448.0, 3.4e38, -3.4e38]
# At the very end of float32 a code times its scale may round to infinity.
MOST_FLOAT = torch.tensor(3.4e38).item()
FLOATS = st.floats(-MOST_FLOAT, MOST_FLOAT, width=32) | st.sampled_from(EDGES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales_of(rows: Tensor) -> Tensor:
    return rows.view(torch.int8)[..., -4:].clone(memory_format=torch.contiguous_format).view(FLOAT)


# Rows.


@every_dtype
@settings(max_examples=100)
@given(values=st.lists(FLOATS, min_size=4, max_size=12))
def test_a_row_is_read_as_the_nearest_that_its_codes_can_say(
    dtype: torch.dtype, values: list[float]
) -> None:
    x = torch.tensor(values, dtype=FLOAT)
    rows = quantize_rows(x, dtype)
    amax, exact, back = x.abs().max(), x.double(), dequantize_rows(rows).double()
    assert rows.shape == (len(x) + 4,) and rows.dtype is dtype and back.isfinite().all()
    if amax < SMALLEST:
        assert not rows.view(torch.uint8).any(), "zeros, and no code without its scale"
        return
    step = amax.double() / MOST[dtype]
    assert scales_of(rows) == amax / MOST[dtype]
    if dtype is torch.int8:
        allowed = step / 2
    else:  # half of a unit in the last place: 3 bits behind the point, 2^-9 at least
        allowed = (exact.abs() / 16).clamp(min=step * 2**-10)
    # Two roundings of float32 before the one to codes, and one after.
    assert ((back - exact).abs() <= allowed * (1 + 1e-6) + amax * 4e-7).all()
    assert torch.equal(back.sign(), back.sign() * exact.sign().abs())
    largest = x.abs().argmax()
    assert abs(back[largest] - exact[largest]) <= amax * 2e-7


@every_dtype
def test_rows_without_a_number_do_not_touch_their_neighbours(dtype: torch.dtype) -> None:
    x = randn(3, 5, 8)
    alone = dequantize_rows(quantize_rows(x, dtype))
    x[1, 2, 3], x[2, 0, 0] = torch.nan, -torch.inf
    rows = quantize_rows(x, dtype)
    back = dequantize_rows(rows)
    is_lost = torch.zeros(3, 5, dtype=torch.bool)
    is_lost[1, 2] = is_lost[2, 0] = True
    assert back[is_lost].isnan().all()
    assert torch.equal(back[~is_lost], alone[~is_lost])


@every_dtype
def test_ties_go_to_even_and_all_codes_are_kept(dtype: torch.dtype) -> None:
    """A row whose scale is 1 holds every code, and numbers between two of them go to the even one."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite() & (every.abs() <= MOST[dtype])]
    assert torch.equal(dequantize_rows(quantize_rows(every, dtype)), every)
    ordered = every.unique()
    middle = (ordered[1:] + ordered[:-1]) / 2
    row = torch.cat([middle, torch.tensor([MOST[dtype]])])
    codes = quantize_rows(row, dtype)[:-5].view(torch.uint8)
    assert not (codes & 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_caches_have_no_scales(dtype: torch.dtype) -> None:
    assert not is_quantized(dtype) and row_size(64, dtype) == 64
    assert head_size(torch.zeros(1, 1, 2, 1, 1, 64, dtype=dtype)) == 64


# The store.


@every_dtype
@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_store_makes_the_same_bytes(dtype: torch.dtype, num_threads: int) -> None:
    assert codes_that_differ(replace(ON_CPU, ops=CpuOps(num_threads)), dtype) == 0


@every_dtype
@settings(max_examples=40)
@given(values=st.lists(FLOATS, min_size=16, max_size=16))
def test_the_store_makes_the_same_bytes_of_anything(
    dtype: torch.dtype, values: list[float]
) -> None:
    qkv = torch.tensor(values, dtype=FLOAT).repeat(1, 3)
    table = torch.cat([torch.ones(1, 8), torch.zeros(1, 8)], dim=1)
    zero = torch.zeros(1, dtype=torch.int64)
    cache = torch.zeros(1, 1, 2, 1, 1, 20, dtype=dtype)
    CPU.rotary_and_store(qkv.clone(), table, zero, cache, 0, zero)
    expected = quantize_rows(qkv[0, :16], dtype).view(torch.uint8)
    key, value = cache.view(torch.uint8).flatten(2)[0, 0].view(2, 20)
    assert torch.equal(value, expected)
    # 0 - 0 is 0, whose sign E4M3 keeps.
    assert torch.equal(key[16:], expected[16:])
    assert torch.equal(key[:16].view(dtype).float(), expected[:16].view(dtype).float())


@every_dtype
def test_the_store_turns_and_norms_before_it_rounds(dtype: torch.dtype) -> None:
    """Within a code of the float64 reference: rounding of the rotation may move a tie."""
    head_dim, tokens = 64, 30
    qkv, norm = randn(tokens, 5 * head_dim), randn(head_dim, seed=1).abs() + 0.1
    angles = randn(50, head_dim // 2, seed=2)
    table, slots = torch.cat([angles.cos(), angles.sin()], 1), torch.arange(tokens) + 3
    caches, queries = [], []
    for ops, wide in ((REFERENCE, torch.Tensor.double), (CPU, torch.Tensor.clone)):
        cache = torch.zeros(9, 2, 2, 4, 1, row_size(head_dim, dtype), dtype=dtype)
        rest = (torch.arange(tokens), cache, 1, slots, wide(norm), wide(norm))
        queries.append(ops.rotary_and_store(wide(qkv), wide(table), *rest))
        caches.append(cache)
    torch.testing.assert_close(queries[1].double(), queries[0], rtol=0, atol=1e-5)
    expected, actual = (dequantize_rows(cache).double() for cache in caches)
    steps = scales_of(caches[0]).double() * (1 if dtype is torch.int8 else 32)
    assert ((expected - actual).abs() <= steps * 1.001).all()
    is_other = caches[0].view(torch.int8)[..., :-4] != caches[1].view(torch.int8)[..., :-4]
    assert is_other.float().mean() < 0.001
    assert expected.abs().max() > 1 and not expected[:, 0].any(), "a layer that was not asked for"


# Attention.

MIXED: Lengths = ((3, 3), (0, 40), (1, 300), (5, 129), (40, 200), (1, 1))
DECODE: Lengths = ((1, 700), (1, 64), (1, 129))


@every_dtype
@pytest.mark.parametrize(
    "spec",
    [
        Spec(MIXED, 4, 2, 16, 1),
        Spec(MIXED, 9, 3, 64, 16),
        Spec(MIXED, 6, 2, 80, 5, window=20),
        Spec(MIXED, 4, 1, 128, 16),
        Spec(DECODE, 9, 3, 64, 16),
        Spec(DECODE, 8, 1, 80, 5, window=100),
        Spec(DECODE, 71, 1, 64, 16),
        Spec(MIXED, 4, 2, 20, 5),  # not the vectors' multiple: the reference computes it
    ],
    ids=str,
)
def test_attention_is_that_of_what_rows_stand_for(dtype: torch.dtype, spec: Spec) -> None:
    """Unused places are NaN, and tables end in nonsense."""
    query, cache, layer, metadata = make_attention(ON_CPU, replace(spec, kv_dtype=dtype))
    floats = dequantize_rows(cache).double()
    scale = spec.head_dim**-0.5
    rest = (layer, metadata, scale, spec.window)
    expected = REFERENCE.attention(query.double(), floats, *rest)
    torch.testing.assert_close(REFERENCE.attention(query.double(), cache, *rest), expected)
    for ops in (CPU, CpuOps(1)):
        actual = ops.attention(query, cache, *rest)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=3e-6)


def one_sequence(
    keys: Tensor, values: Tensor, dtype: torch.dtype, num_queries: int = 1
) -> tuple[Tensor, AttentionMetadata]:
    """A cache [blocks of 16] with these keys and values, [tokens, 1, head_dim]."""
    rows = torch.stack([keys, values], 1)
    rows = quantize_rows(rows, dtype) if is_quantized(dtype) else rows
    tokens, blocks = len(keys), -(-len(keys) // 16)
    cache = torch.zeros(blocks, 1, 2, 16, 1, rows.shape[-1], dtype=dtype)
    token = torch.arange(tokens)
    cache[token // 16, 0, :, token % 16] = rows
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, num_queries], dtype=torch.int32),
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32)[None],
        slot_mapping=torch.zeros(num_queries, dtype=torch.int64),
        max_query_len=num_queries,
        max_seq_len=tokens,
    )
    return cache, metadata


@every_dtype
@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000), tokens=st.integers(1, 300), loud=st.sampled_from([1.0, 5.0, 30.0])
)
def test_the_error_of_codes_is_bounded(
    dtype: torch.dtype, seed: int, tokens: int, loud: float
) -> None:
    """Codes move a score by at most |q| times the keys' largest errors, which moves each weight by a
    factor; and what is summed by the values' largest error."""
    head_dim = 64
    keys, values = randn(2, tokens, 1, head_dim, seed=seed)
    keys[tokens // 2] *= loud
    query, factor = randn(1, 3, head_dim, seed=seed + 1), head_dim**-0.5
    cache, metadata = one_sequence(keys, values, dtype)
    wide, _ = one_sequence(keys, values, FLOAT)
    actual = CPU.attention(query, cache, 0, metadata, factor).double()
    exact = REFERENCE.attention(query.double(), wide.double(), 0, metadata, factor)
    half = {torch.int8: 0.5, FP8: 16.0}[dtype]  # of a unit in the last place at the largest code
    steps = [x.abs().amax(-1).double() / MOST[dtype] * half for x in (keys, values)]
    moved = query.abs().sum(-1).max() * steps[0].max() * factor
    share = torch.expm1(2 * moved)
    bound = steps[1].max() + share * values.abs().max() + 1e-5
    assert (actual - exact).abs().max() <= bound
    if dtype is torch.int8 and loud == 1.0:
        assert (actual - exact).abs().max() < 0.05


@every_dtype
@pytest.mark.parametrize("num_queries", [1, 40], ids=["decode", "prefill"])
def test_a_needle_in_a_long_context_is_found_as_well_as_in_a_short_one(
    dtype: torch.dtype, num_queries: int
) -> None:
    """The last query asks for one token's key: most of its weight is there, the rest over thousands
    of others whose weights sum up. The sum's error must not grow with their number."""
    head_dim, errors, shares = 64, [], []
    for tokens in (512, 8192):
        keys, values = randn(2, tokens, 1, head_dim, seed=5)
        needle = tokens // 3
        query = randn(num_queries, 1, head_dim, seed=6)
        query[-1, 0] = keys[needle, 0] * (8 + math.log(tokens)) / keys[needle, 0].square().sum()
        values[needle] = 3.0
        cache, metadata = one_sequence(keys, values, dtype, num_queries)
        actual = CPU.attention(query, cache, 0, metadata, 1.0)[-1].double()
        exact = REFERENCE.attention(query.double(), cache, 0, metadata, 1.0)[-1]
        errors.append((actual - exact).abs().max().item())
        shares.append(actual.mean().item() / 3)
    assert max(errors) < 6e-6, errors
    assert all(0.9 < share < 1.0 for share in shares), shares


@every_dtype
def test_a_key_that_is_no_number_is_its_own_sequences_alone(dtype: torch.dtype) -> None:
    query, cache, layer, metadata = make_attention(
        ON_CPU, Spec(((1, 40), (1, 50)), 3, 1, 64, 16, kv_dtype=dtype)
    )
    before = CPU.attention(query, cache, layer, metadata, 0.1)
    lost = metadata.block_tables[0, 1].item()
    cache.view(torch.int8)[lost, layer] = quantize_rows(
        torch.full((2, 16, 1, 64), torch.nan), dtype
    ).view(torch.int8)
    after = CPU.attention(query, cache, layer, metadata, 0.1)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


def test_e4m3_without_float16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way of expanding, which machines without F16C compile: all codes are the same."""
    monkeypatch.setattr(kv_rows, "HAS_HALF", False)

    @numba.njit(types.void(types.int64, types.int64, types.int64, types.float32))
    def run(codes, out, count, factor):
        kv_rows.expand(kv_rows.FP8, codes, out, count, factor)

    codes, out = torch.arange(256, dtype=torch.uint8), torch.zeros(256)
    run(codes.data_ptr(), out.data_ptr(), 256, kv_rows.FP8_UNIT)
    expected = codes.view(FP8).float()
    assert ((out == expected) | expected.isnan()).all()
    assert torch.equal(out.signbit(), codes >= 128)
    assert "fpext" not in str(run.inspect_llvm())


# How much of it there is, and who takes it.

MODEL: Any = SimpleNamespace(num_layers=2, num_kv_heads=3, head_dim=64, max_model_len=512)


@every_dtype
def test_a_cache_has_room_for_scales(dtype: torch.dtype) -> None:
    data = kv_memory.allocate_kv(MODEL, 5, 16, dtype, torch.device("cpu"))
    assert data.shape == (5, 2, 2, 16, 3, 68) and data.dtype is dtype
    assert not data.view(torch.uint8).any()
    config = SimpleNamespace(
        num_blocks=None, block_size=16, kv_cache_memory=data.nbytes, max_num_seqs=9
    )
    count = kv_memory.choose_num_blocks(config, MODEL, dtype, torch.device("cpu"))
    assert count == 5
    config.kv_cache_memory -= 1
    assert kv_memory.choose_num_blocks(config, MODEL, dtype, torch.device("cpu")) == 4


@every_dtype
@pytest.mark.parametrize("ops", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_scales_that_would_not_be_aligned_are_refused(dtype: torch.dtype, ops: Any) -> None:
    ops.check_kv_cache(16, 80, dtype)
    ops.check_kv_cache(16, 82, FLOAT)
    with pytest.raises(ValueError, match=r"head_dim must be a multiple of 4 .* not 82"):
        ops.check_kv_cache(16, 82, dtype)
    with pytest.raises(ValueError, match=r"head_dim must be a multiple of 4 .* not 82"):
        CPU.layout_of(torch.zeros(1, 1, 2, 1, 1, 86, dtype=dtype))


# What moves it. Bytes are compared: a scale may be NaN.

SHAPE = (24, 3, 2, 4, 2, row_size(8, FP8))


def noise(dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, SHAPE, dtype=torch.uint8, generator=generator).view(dtype)


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.001)


@every_dtype
def test_offload_brings_back_what_it_took(dtype: torch.dtype, tmp_path: Path) -> None:
    cache = noise(dtype, 1)
    before = cache.clone()
    store = DiskStore(tmp_path / "kv", 1 << 20, f"{dtype}")
    copies = BlockCopies(6, store)
    try:
        copies.register_kv_caches([cache])
        copies.start_load_kv([Copy(1, "save", [3, 4, 9], [0, 1, 2])])
        copies.wait_until(1)
        copies.start_load_kv([Copy(2, "store", [], [1], [b"key"])])
        copies.wait_until(2)
        cache.view(torch.uint8)[[3, 4, 9]] = 0
        copies.start_load_kv([Copy(3, "load", [3, 9], [0, 2])])
        copies.start_load_kv([Copy(4, "load", [4], [5], [b"key"])])
        copies.wait_until(4)
    finally:
        copies.shutdown()
    assert same(cache, before)


@every_dtype
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_transfers_bring_the_same_bytes(dtype: torch.dtype, transport: str) -> None:
    source, target = noise(dtype, 1), noise(dtype, 2)
    if transport == "shm":
        memory = allocate_shared(SHAPE, dtype)
        memory.view(torch.uint8).copy_(source.view(torch.uint8))
        source = memory
    before, prompts = target.clone(), []
    known: dict[str, Any] = {"fingerprint": {}, "secret": b"sixteen bytes or more"}
    told = {"on_prefill": prompts.append, "on_cancel": print}
    with contextlib.ExitStack() as stack:
        sender = Sender([source], transport=transport, **told, **known)
        stack.callback(sender.close)
        receiver = Receiver([target], **known)
        stack.callback(receiver.close)
        receiver.request(sender.address, "a", [1], "salt", 2)
        until(lambda: prompts == [PrefillRequest("a", [1], "salt", 2)])
        for layer in range(SHAPE[1]):
            sender.ready("a", [11, 3], layer, 2)
        receiver.fetch("a", 0, [8, 0])
        sender.finish("a", 2)
        assert receiver.wait(20)
        [fetched] = receiver.finished()
        assert fetched.error is None
    before[[8, 0]] = source[[11, 3]]
    assert same(target, before)


def test_caches_of_other_dtypes_do_not_go_together() -> None:
    """As many bytes each: only their names tell them apart."""
    described = {Layout([noise(dtype, 1)]).describe() for dtype in (*MOST, torch.uint8)}
    assert len(described) == 3


def test_blocks_on_disk_are_not_found_by_an_engine_that_rounds_otherwise() -> None:
    folder, cache = resolve("random:tiny-llama"), noise(torch.int8, 1)
    configs = [
        SimpleNamespace(),
        SimpleNamespace(quantization="off", activations="none"),
        SimpleNamespace(quantization="int4", activations="none"),
        SimpleNamespace(quantization="int4", activations="int8"),
    ]
    layouts = [layout_of(folder, data, c) for data in (cache, cache.float()) for c in configs]
    assert len(set(layouts)) == 8
    assert layout_of(folder, cache) == layouts[0]


@every_dtype
def test_sleep_brings_it_back(dtype: torch.dtype) -> None:
    cache = kv_memory.allocate_kv(MODEL, 5, 16, dtype, torch.device("cpu"))
    cache.view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
    before, memory = cache.clone(), HostMemory([cache])
    memory.save()
    memory.discard()
    memory.restore()
    assert same(cache, before)


# The GPU's kernels. Their values: tests/test_triton_kernels.py.


def compiled(architecture: str, dtype: str, kv_dtype: str, *head_dims: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "common.testing.kernels.triton_compile_kv"]
    done = subprocess.run(
        [*command, architecture, dtype, kv_dtype, *head_dims],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@every_dtype
@pytest.mark.parametrize("architecture", ["A100", "H100, H200", "B200"])
def test_kernels_of_codes_spill_nothing(architecture: str, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    kernels = compiled(architecture, "bfloat16", name, "64", "128")
    attentions = [kernel for kernel in kernels if kernel["kernel"] == "attention_kernel"]
    assert {kernel["constants"]["DECODE"] for kernel in attentions} == {False, True}
    for kernel in kernels:
        assert kernel["stack"] == 0 and kernel["shared"] <= kernel["allowed"], kernel


def test_most_is_what_the_formats_end_with() -> None:
    assert torch.finfo(FP8).max == FP8_MAX and torch.iinfo(torch.int8).max == MOST[torch.int8]
