"""Products of integers on a CPU: inputs rounded to int8, weights of 8 or 4 bits.

Codes and scales are those of the reference, so results differ by float32's rounding alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from torch import Tensor

from common.kernels.cpu import integer_tile, integer_weight
from common.kernels.cpu.integer_weight import IntegerWeight
from common.kernels.cpu.ops import CpuOps
from common.kernels.cpu.weight import WeightMemory
from common.kernels.quantized import QuantizedWeight, pack_nibbles
from common.kernels.reference import ReferenceOps, product

CPU = CpuOps(2)
FLOAT, HALF = torch.float32, torch.float16


def make_weight(
    kind: str,
    shape: tuple[int, int],
    group: int,
    scales: torch.dtype = FLOAT,
    minimums: torch.dtype | None = None,
    seed: int = 0,
    **others: Any,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    by_group = shape[0], shape[1] // group
    if kind == "int8":
        codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    else:
        codes = pack_nibbles(torch.randint(0, 16, shape, generator=generator))
    levels = (torch.rand(by_group, generator=generator) + 0.1).to(scales)
    lowest = None
    if minimums is not None:
        lowest = torch.randn(by_group, generator=generator).mul(5).to(minimums)
    return QuantizedWeight(kind, codes, levels, group, lowest, activations="int8", **others)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_product(
    actual: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None
) -> None:
    expected = product(x.double(), weight, None if bias is None else bias.double())
    assert actual.shape == expected.shape and actual.dtype is FLOAT
    # Of the largest sum of a row's magnitudes: what float32's rounding is relative to.
    scale = product(x.double().abs(), weight).abs().max().item() if x.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * max(scale, 1.0))


# Outputs that are no multiple of a panel, inputs of none of 4, 8 or 32.
SHAPES = [
    ((40, 64), 16),
    ((33, 128), 32),
    ((70, 192), 64),
    ((16, 256), 128),
    ((100, 576), 576),
    ((31, 38), 38),
    ((17, 30), 6),
]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
def test_every_group(kind: str, shape: tuple[int, int], group: int, num_threads: int) -> None:
    ops, bias = CpuOps(num_threads), randn(shape[0], seed=1)
    levels = [(FLOAT, None), (HALF, None), (HALF, HALF), (HALF, FLOAT), (torch.bfloat16, FLOAT)]
    for scales, minimums in levels:
        weight = make_weight(kind, shape, group, scales, minimums)
        prepared = ops.prepare_weight(weight, bias)
        assert isinstance(prepared, IntegerWeight)
        for num_tokens in (0, 1, 2, 5, 40):
            x = randn(num_tokens, shape[1], seed=2)
            assert_product(ops.linear(x, prepared), x, weight, bias)


@pytest.mark.parametrize("kind", ["int8", "uint4"])
@pytest.mark.parametrize("group", [32, 576])
def test_every_number_of_rows(kind: str, group: int) -> None:
    weight = make_weight(kind, (48, 576), group, HALF, HALF)
    prepared = CPU.prepare_weight(weight)
    x = randn(600, 576)  # more than are used together, and rounded by both cores
    expected = product(x.double(), weight)
    for num_tokens in (*range(1, 27), 300, 600):
        actual = CPU.linear(x[:num_tokens], prepared)
        torch.testing.assert_close(actual.double(), expected[:num_tokens], rtol=1e-5, atol=2e-2)


@pytest.mark.parametrize("group", [32, 64, 4096])
@pytest.mark.parametrize(
    ("kind", "byte"), [("int8", -128), ("int8", 127), ("uint4", 255), ("int4", 0)]
)
def test_sums_of_the_largest_codes_do_not_overflow(kind: str, byte: int, group: int) -> None:
    weight = make_weight(kind, (16, 4096), group)
    weight.codes.fill_(byte)
    prepared = CPU.prepare_weight(weight)
    for sign in (1, -1):
        x = torch.full((3, 4096), 127.0 * sign)
        assert_product(CPU.linear(x, prepared), x, weight)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_inputs_that_are_nothing_or_huge(kind: str) -> None:
    weight = make_weight(kind, (32, 128), 32, FLOAT, FLOAT)
    prepared = CPU.prepare_weight(weight)
    x = randn(6, 128)
    x[0], x[1, :32], x[2, 5] = 0, 0, 1e30
    x[3], x[4] = x[3] * 1e-30, x[4] * 1e20
    x[5, ::2], x[5, 1::2] = 0.5, -127.0  # halves: rounded to the even one
    for row in range(len(x)):
        part = x[row : row + 1]
        actual, expected = CPU.linear(part, prepared), product(part.double(), weight)
        scale = max(expected.abs().max().item(), 1e-37)
        assert (actual.double() - expected).abs().max().item() <= 2e-6 * scale
    for broken in (float("nan"), float("inf")):
        x = randn(2, 128)
        x[1, 40] = broken
        actual = CPU.linear(x, prepared)
        assert actual[0].isfinite().all() and actual[1].isnan().all()
    tiny = torch.full((1, 128), 1e-39)  # whose reciprocal is no number
    assert torch.equal(CPU.linear(tiny, prepared), torch.zeros(1, 32))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_inputs(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([2, 8, 16, 32, 34, 96]))
    shape = data.draw(st.integers(1, 70)), group * data.draw(st.integers(1, 5))
    kind, seed = (
        data.draw(st.sampled_from(["int8", "int4", "uint4"])),
        data.draw(st.integers(0, 99)),
    )
    minimums = data.draw(st.sampled_from([None, HALF]))
    order = torch.randperm(shape[1]) if data.draw(st.booleans()) else None
    rows = randn(shape[0], seed=3).abs() if data.draw(st.booleans()) else None
    others = {"order": order, "row_scales": rows}
    weight = make_weight(kind, shape, group, HALF, minimums, seed, **others)
    x = randn(data.draw(st.integers(1, 9)), shape[1], seed=seed)
    x *= 10.0 ** data.draw(st.integers(-20, 20))
    prepared = CPU.prepare_weight(weight)
    assert_product(CPU.linear(x, prepared) / x.abs().max(), x / x.abs().max(), weight)


@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
@pytest.mark.parametrize(("shape", "group"), SHAPES)
def test_rows_are_the_dequantised_ones(kind: str, shape: tuple[int, int], group: int) -> None:
    ids = torch.randint(0, shape[0], (2, 9))
    for scales, minimums in ((FLOAT, None), (HALF, HALF), (torch.bfloat16, FLOAT)):
        weight = make_weight(kind, shape, group, scales, minimums)
        prepared = CPU.prepare_weight(weight)
        expected = weight.rows(ids.flatten()).dequantize().view(2, 9, -1)
        assert torch.equal(CPU.embedding(ids, prepared), expected)
    with pytest.raises(IndexError, match=str(shape[0])):
        CPU.embedding(torch.tensor([0, shape[0]]), prepared)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts(kind: str) -> None:
    def pairs(seed: int) -> tuple[QuantizedWeight, QuantizedWeight]:
        return (
            make_weight(kind, (96, 64), 32, seed=seed),
            make_weight(kind, (64, 48), 16, seed=seed + 1),
        )

    sides = [list(side) for side in zip(*(pairs(10 * i) for i in range(3)), strict=True)]
    x, weights = randn(7, 64) / 100, torch.rand(7, 2)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [-1, 1], [0, -1], [2, 1], [-1, -1]])
    ops, reference = CpuOps(2), ReferenceOps()
    prepared, expected = ops.prepare_experts(*sides), reference.prepare_experts(*sides)
    for _ in range(2):
        result = reference.experts(x, ids, weights, expected)
        # Between the two products inputs are rounded again: a last bit may move a code.
        atol = 2e-3 * result.abs().max().item()
        torch.testing.assert_close(
            ops.experts(x, ids, weights, prepared), result, rtol=0, atol=atol
        )
        for one, state in ((ops, prepared), (reference, expected)):
            one.replace_expert(state, 1, *pairs(70))
    with pytest.raises(ValueError, match="ids up to 3"):
        ops.experts(x, ids + 1, weights, prepared)
    with pytest.raises(ValueError, match="expert: "):
        ops.replace_expert(prepared, 0, pairs(0)[1], pairs(0)[0])


def test_sums_that_may_overflow_are_not_of_integers() -> None:
    weight = make_weight("int8", (1, 1 << 18), 1 << 18)
    weight.codes.fill_(-128)
    x = torch.full((1, 1 << 18), 127.0)
    assert_product(CPU.linear(x, CPU.prepare_weight(weight)), x, weight)


def test_scales_that_are_no_numbers_are_refused() -> None:
    weight = make_weight("int4", (16, 64), 32, HALF)
    weight.scales[3, 1] = torch.inf
    with pytest.raises(ValueError, match="1 of its scales are no finite numbers"):
        CPU.prepare_weight(weight)


def test_another_weight_brings_its_own_order() -> None:
    first, second = (
        make_weight("int8", (32, 64), 32, seed=i, order=randn(64, seed=i).argsort()) for i in (1, 2)
    )
    prepared, x = CPU.prepare_weight(first), randn(3, 64)
    prepared.overwrite(second)
    assert_product(CPU.linear(x, prepared), x, second)
    assert torch.equal(first.order, randn(64, seed=1).argsort()), "it was the caller's"


@pytest.mark.parametrize("activations", [None, "int8"])
def test_outputs_are_of_the_inputs_dtype(activations: str | None) -> None:
    weight, down = make_weight("int8", (96, 64), 32), make_weight("int8", (64, 48), 16)
    weight, down = (replace(one, activations=activations) for one in (weight, down))
    experts, ids = CPU.prepare_experts([weight], [down]), torch.zeros(2, 1, dtype=torch.int64)
    for dtype in (torch.bfloat16, HALF):
        x, shares = randn(2, 64).to(dtype) / 100, torch.ones(2, 1)
        wide = CPU.linear(x.float(), CPU.prepare_weight(weight))
        assert torch.equal(CPU.linear(x, CPU.prepare_weight(weight)), wide.to(dtype))
        wide = CPU.experts(x.float(), ids, shares, experts)
        assert torch.equal(CPU.experts(x, ids, shares, experts), wide.to(dtype))


def test_a_wrong_size_is_named() -> None:
    prepared = CPU.prepare_weight(make_weight("int8", (8, 64), 64))
    with pytest.raises(ValueError, match=r"\[2, 32\].* 64 features"):
        CPU.linear(torch.zeros(2, 32), prepared)


def compile_tile(lanes: int, bits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A tile in plain operations, as machines have it that lack the special instructions."""
    monkeypatch.setattr(integer_tile, "ROWS", {bits: rows})
    tile = integer_tile.make_integer_tile(lanes, special=False)

    @numba.njit(types.void(*[types.intp] * 17))
    def run(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q):  # noqa: E741
        tile(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q)

    return run


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lanes", [4, 16])
def test_other_machines(lanes: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of NEON's and of AVX-512's length, and no instruction of x86's."""
    num_rows, columns, num_groups, group = 2, 2 * lanes, 3, 64
    depth = num_groups * group
    run = compile_tile(lanes, bits, num_rows, monkeypatch)
    kind = "int8" if bits == 8 else "int4"
    weight = make_weight(kind, (columns, depth), group, FLOAT, FLOAT)
    monkeypatch.setattr(integer_weight, "PANEL", columns)
    prepared = IntegerWeight.pack(weight, None, WeightMemory())
    _, _, chunks, offset, half, has_minimums, _ = prepared.sizes
    x, start = randn(num_rows, depth), randn(columns, seed=1)
    by_group = x.view(num_rows, num_groups, group)
    amax = by_group.abs().amax(2, keepdim=True)
    codes, scales = (by_group * (127 / amax)).round(), amax / 127
    size = 32 if bits == 4 else group
    sums = codes.view(num_rows, -1, size).sum(2)
    info = torch.empty(num_rows, sums.shape[1], 3)
    info[..., 0] = scales.flatten(1).repeat_interleave(group // size, dim=1)
    info[..., 1] = (sums * offset).to(torch.int32).view(FLOAT)
    info[..., 2] = info[..., 0] * sums
    inputs = codes.flatten(1).to(torch.int8 if bits == 4 else torch.int16).contiguous()
    out = torch.empty(num_rows, columns)
    run(
        bits, num_rows, inputs.data_ptr(), inputs.stride(0) * inputs.element_size(),
        info.data_ptr(), info.stride(0) * 4, prepared.panels_address, num_groups, chunks,
        half, has_minimums, start.data_ptr(), 0, out.data_ptr(), columns * 4,
        prepared.panels_address, 0,
    )  # fmt: skip
    assert_product(out, x, weight, start)
