"""The CPU's products with quantised weights, against `QuantizedWeight.dequantize` in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.kernels.cpu.ops import CpuOps
from common.kernels.quantized import (
    BYTES,
    KINDS,
    SCALES,
    QuantizedWeight,
    pack_nibbles,
    round_activations,
)
from common.kernels.reference import ReferenceOps

FEATURES = {"minimums", "row_scales", "order", "bias"}


@pytest.fixture(scope="module", params=[1, 2])
def ops(request: pytest.FixtureRequest) -> CpuOps:
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
    ops: CpuOps, weight: QuantizedWeight, num_tokens: int, bias: Tensor | None = None
) -> None:
    """Within what rounding every product and sum of float32 can make."""
    x = torch.randn(num_tokens, weight.shape[1])
    found = ops.linear(x, ops.prepare_weight(weight, bias))
    exact = weight.dequantize().double()
    expected = x.double() @ exact.T + (0 if bias is None else bias.double())
    # An int4's nibble, 0 to 15, is summed before 8 is taken from it.
    largest = exact.abs() + 16 * (weight.kind == "int4") * weight.scales.double().amax()
    if weight.minimums is not None:
        largest = largest + 2 * weight.minimums.double().abs().amax()
    bound = 4e-7 * (x.double().abs() @ largest.T) * weight.shape[1] ** 0.5 + 1e-30
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


SHAPES = [(1, 64, 64), (16, 48, 16), (33, 160, 32), (50, 192, 64), (17, 256, 128), (40, 1100, 1100)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_shapes_and_batches(ops: CpuOps, kind: str, sizes: tuple[int, int, int]) -> None:
    weight = random_weight(kind, *sizes, torch.float16)
    for num_tokens in (1, 3, 5, 13, 40):
        check_linear(ops, weight, num_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens(ops: CpuOps, kind: str) -> None:
    check_linear(ops, random_weight(kind, 33, 1056, 96, torch.float16, FEATURES), 300)
