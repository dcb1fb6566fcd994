"""The CPU's products with quantised weights, against `QuantizedWeight.dequantize` in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.kernels.cpu.ops import CpuOps
from common.kernels.cpu.vector import PANEL
from common.kernels.quantized import (
    BYTES,
    KINDS,
    SCALES,
    QuantizedWeight,
    pack_nibbles,
)
from common.kernels.reference import ReferenceOps

FEATURES = {"minimums", "row_scales", "order"}


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps(2)


@pytest.fixture(scope="module", params=[1, 2])
def any_ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(request.param)


def random_codes(kind: str, out_features: int, in_features: int) -> Tensor:
    if kind not in BYTES:
        return pack_nibbles(torch.randint(16, (out_features, in_features)))
    codes = torch.randint(256, (out_features, in_features)).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] -= 1  # which is NaN in FP8
    return codes.view(BYTES[kind])


def random_weight(
    kind: str,
    out_features: int,
    in_features: int,
    group: int,
    scales: torch.dtype = torch.float32,
    features: set[str] | frozenset[str] = frozenset(),
) -> QuantizedWeight:
    sizes = out_features, in_features // group
    weight = QuantizedWeight(
        kind, random_codes(kind, out_features, in_features),
        (torch.rand(sizes) * 0.1 + 0.01).to(scales), group,
    )  # fmt: skip
    if "minimums" in features:
        dtype = torch.float16 if scales is torch.float16 else torch.float32
        weight = replace(weight, minimums=torch.randn(sizes).to(dtype))
    if "row_scales" in features:
        weight = replace(weight, row_scales=torch.rand(out_features) + 0.5)
    if "order" in features:
        weight = replace(weight, order=torch.randperm(in_features))
    return weight


def check_linear(
    ops: CpuOps,
    weight: QuantizedWeight,
    num_tokens: int,
    bias: Tensor | None = None,
    prepared: object = None,
) -> None:
    """Within what rounding every product and sum of float32 can make."""
    x = torch.randn(num_tokens, weight.shape[1])
    found = ops.linear(x, prepared or ops.prepare_weight(weight, bias))
    exact = weight.dequantize().double()
    expected = x.double() @ exact.T + (0 if bias is None else bias.double())
    # An int4's nibble, 0 to 15, is summed before 8 is taken from it.
    largest = exact.abs() + 16 * (weight.kind == "int4") * weight.scales.double().amax()
    if weight.minimums is not None:
        largest = largest + 2 * weight.minimums.double().abs().amax()
    largest = x.double().abs() @ largest.T + (0 if bias is None else bias.abs())
    bound = 4e-7 * largest * weight.shape[1] ** 0.5 + 1e-30
    assert found.dtype is torch.float32 and found.shape == expected.shape
    assert bool(((found - expected).abs() <= bound).all()), (found - expected).abs().amax()


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_every_scale(ops: CpuOps, kind: str, scales: torch.dtype) -> None:
    for features in (set(), FEATURES):
        weight = random_weight(kind, 45, 96, 32, scales, features)
        bias = torch.randn(45) if features else None
        for num_tokens in (1, 2, 3, 7):
            check_linear(ops, weight, num_tokens, bias)
        rows = torch.tensor([44, 0, 7, 44])
        found = ops.embedding(rows, ops.prepare_weight(weight))
        assert torch.equal(found, weight.rows(rows).dequantize())


@pytest.mark.parametrize("features", [{name} for name in sorted(FEATURES)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_feature_alone(ops: CpuOps, kind: str, features: set[str]) -> None:
    weight = random_weight(kind, 33, 64, 16, torch.float16, features)
    for num_tokens in (1, 9):
        check_linear(ops, weight, num_tokens)


SHAPES = [(1, 64, 64), (16, 48, 16), (33, 160, 32), (50, 192, 64), (17, 256, 128), (40, 1100, 1100)]


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_batches(any_ops: CpuOps, kind: str) -> None:
    for sizes in SHAPES:
        weight = random_weight(kind, *sizes, torch.float16)
        for num_tokens in (1, 5, 13, 40):
            check_linear(any_ops, weight, num_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens(any_ops: CpuOps, kind: str) -> None:
    check_linear(any_ops, random_weight(kind, 33, 1056, 96, torch.float16, FEATURES), 300)


@given(
    kind=st.sampled_from(KINDS),
    scales=st.sampled_from(SCALES),
    features=st.sets(st.sampled_from(sorted(FEATURES))),
    out_features=st.integers(1, 70),
    num_groups=st.integers(1, 5),
    group=st.sampled_from((2, 6, 16, 22, 32, 64)),
    num_tokens=st.integers(0, 45),
)
@settings(max_examples=40, deadline=None)
def test_any_weight(
    ops, kind, scales, features, out_features, num_groups, group, num_tokens
) -> None:
    weight = random_weight(kind, out_features, num_groups * group, group, scales, features)
    check_linear(ops, weight, num_tokens, torch.randn(out_features))


EXTREMES = {
    torch.float32: (0.0, 1e-40, 2.0**-126, 1e30),
    torch.float16: (0.0, 2.0**-24, 2.0**-14, 65504.0),
    torch.bfloat16: (0.0, 2.0**-133, 2.0**-126, 2.0**100),
    torch.float8_e4m3fn: (0.0, 2.0**-9, 2.0**-6, 448.0, -448.0),
    torch.float8_e8m0fnu: (2.0**-127, 2.0**-126, 1.0, 2.0**110),
}


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_with_extreme_scales(ops: CpuOps, kind: str, scales: torch.dtype) -> None:
    """One input is 1 at a time: the product is one weight, to a rounding."""
    weight = random_weight(kind, 16, 256, 256, scales)
    codes = torch.arange(256).repeat(16, 1)
    if kind in BYTES:
        codes[codes & 0x7F == 0x7F] = 0
        codes = codes.to(torch.uint8).view(BYTES[kind])
    else:
        codes = pack_nibbles(codes % 16)
    for scale in EXTREMES[scales]:
        column = torch.full((16, 1), scale).to(scales)
        one = replace(weight, codes=codes, scales=column)
        exact = one.dequantize()
        prepared = ops.prepare_weight(one)
        assert torch.equal(ops.embedding(torch.arange(16), prepared), exact)
        x = torch.eye(256)
        # Batches of each way to multiply, the smallest with all codes of 4 bits.
        parts = x.split([1, 3, 3, 3, 3, 3, 112, 128])
        for inputs in (parts, [x]):
            found = torch.cat([ops.linear(part, prepared) for part in inputs])
            torch.testing.assert_close(found, exact.T, rtol=1e-6, atol=1e-43)


def test_numbers_that_are_none_are_refused(ops: CpuOps) -> None:
    weight = random_weight("fp8_e4m3", 8, 32, 32)
    codes = weight.codes.view(torch.uint8).clone()
    codes[3, 5:7] = 0xFF
    with pytest.raises(ValueError, match="2 of its codes"):
        ops.prepare_weight(replace(weight, codes=codes.view(torch.float8_e4m3fn)))
    with pytest.raises(ValueError, match="8 of its scales"):
        ops.prepare_weight(replace(weight, scales=weight.scales * torch.inf))


@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_code_is_seen(ops: CpuOps, kind: str) -> None:
    """What these tests compare with would find one code that differs by its lowest bit."""
    weight = random_weight(kind, 20, 64, 32, torch.float16)
    bits = weight.codes.view(torch.uint8)
    bits[7, 3] = 0x70  # a large FP8 number: the lowest bit of a small one is lost in rounding
    wrong = bits.clone()
    wrong[7, 3] ^= 1
    other = replace(weight, codes=wrong.view(weight.codes.dtype))
    for num_tokens in (1, 12):
        check_linear(ops, weight, num_tokens)
        with pytest.raises(AssertionError):
            check_linear(ops, weight, num_tokens, prepared=ops.prepare_weight(other))


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("kind", ["fp8_e4m3", "nf4"])
def test_rounded_inputs(ops: CpuOps, kind: str, activations: str) -> None:
    weight = random_weight(kind, 20, 64, 32, torch.float16, {"order"})
    weight = replace(weight, activations=activations)
    x = torch.randn(5, 64)
    found = ops.linear(x, ops.prepare_weight(weight))
    reference = ReferenceOps()
    expected = reference.linear(x, reference.prepare_weight(weight))
    assert (found - expected).abs().amax() <= 1e-5 * expected.abs().amax()


def test_bytes_held(ops: CpuOps) -> None:
    """Those of the format, with outputs padded to whole panels."""
    for kind, bits in (("int8", 8), ("fp4_e2m1", 4)):
        weight = random_weight(kind, 2 * PANEL - 3, 96, 32, torch.float16, {"row_scales"})
        expected = 2 * PANEL * (96 * bits // 8 + 3 * 2 + 4)
        assert ops.prepare_weight(weight).num_bytes == expected
    assert weight.nbytes < expected


def test_wrong_inputs_are_refused(ops: CpuOps) -> None:
    prepared = ops.prepare_weight(random_weight("int4", 20, 64, 32))
    with pytest.raises(ValueError, match="64 features"):
        ops.linear(torch.randn(2, 63), prepared)
    with pytest.raises(ValueError, match="ids up to 20"):
        ops.embedding(torch.tensor([0, 20]), prepared)


def random_experts(
    kinds: tuple[str, str], hidden: int, size: int, features: set[str]
) -> list[tuple[QuantizedWeight, QuantizedWeight]]:
    return [
        (
            random_weight(kinds[0], 2 * size, hidden, 16, torch.float16, features),
            random_weight(kinds[1], hidden, size, size, torch.float16, features),
        )
        for _ in range(5)
    ]


def reference_experts(x, ids, weights, pairs):
    reference = ReferenceOps()
    pairs = [(gate_up.dequantize().double(), down.dequantize().double()) for gate_up, down in pairs]
    prepared = reference.prepare_experts(*zip(*pairs, strict=True))
    return reference.experts(x.double(), ids, weights.double(), prepared)


@pytest.mark.parametrize("kinds", [*zip(KINDS, KINDS, strict=True), ("nf4", "int8")], ids=str)
def test_experts(any_ops: CpuOps, kinds: tuple[str, str]) -> None:
    hidden, size = 48, 22
    for features in (set(), FEATURES):
        pairs = random_experts(kinds, hidden, size, features)
        prepared = any_ops.prepare_experts(*zip(*pairs, strict=True))
        for num_tokens in (1, 40):
            x = torch.randn(num_tokens, hidden) / 8
            ids = torch.rand(num_tokens, 5).argsort(dim=1)[:, :3]
            ids[0, 1] = -1
            weights = torch.rand(num_tokens, 3)
            expected = reference_experts(x, ids, weights, pairs)
            found = any_ops.experts(x, ids, weights, prepared)
            error = (found - expected).abs().amax()
            assert error <= 2e-5 * expected.abs().amax(), (features, num_tokens, error)
    with pytest.raises(ValueError, match="5 of them, ids up to"):
        any_ops.experts(x, ids + 3, weights, prepared)


def test_an_expert_is_replaced_in_place(ops: CpuOps) -> None:
    pairs = random_experts(("uint4", "fp8_e4m3"), 48, 22, FEATURES)
    prepared = ops.prepare_experts(*zip(*pairs, strict=True))
    pairs[3] = random_experts(("uint4", "fp8_e4m3"), 48, 22, FEATURES)[0]
    held = prepared.num_bytes
    ops.replace_expert(prepared, 3, *pairs[3])
    x, ids, weights = torch.randn(6, 48) / 8, torch.tensor([[3], [1]] * 3), torch.rand(6, 1)
    expected = reference_experts(x, ids, weights, pairs)
    found = ops.experts(x, ids, weights, prepared).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().amax()))
    assert prepared.num_bytes == held
    with pytest.raises(ValueError, match="expert"):
        ops.replace_expert(prepared, 3, pairs[0][0].rows(slice(0, 16)), pairs[0][1])
    with pytest.raises(ValueError, match="to replace"):
        ops.replace_expert(prepared, 3, *random_experts(("int4", "nf4"), 48, 22, set())[0])
