"""Part 14's exercises: these fail until you do them. Run with `pytest -m exercise`."""

import ml_dtypes
import numpy as np
import pytest
import torch
from part14.config import EngineConfig
from part14.quantization import FORMATS

from common.kernels.quantized import QuantizedWeight

pytestmark = pytest.mark.exercise


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def squared_error(weight: torch.Tensor, rounded: QuantizedWeight) -> torch.Tensor:
    """Of each group of 32 of a row."""
    return (rounded.dequantize() - weight).square().unflatten(1, (-1, 32)).sum(dim=-1)


# 1. One scale for a row.


def test_int4_channel_has_one_scale_a_row() -> None:
    weight = normal(5, 96)
    weight[2] = 0
    rounded = FORMATS["int4-channel"](weight)
    assert rounded.kind == "int4" and rounded.scales.shape == (5, 1)
    scales = (weight.abs().amax(dim=1, keepdim=True) / 7.5).half().float()
    codes = torch.where(scales == 0, 0, weight / scales).round().clamp(-8, 7)
    assert torch.equal(rounded.dequantize(), codes * scales)


def test_int4_channel_is_the_format_that_gave_int4_its_name() -> None:
    """One large number in a row takes the codes from all others."""
    weight = normal(8, 576)
    weight[:, 3] = 12.0
    by_row, by_group = (squared_error(weight, FORMATS[n](weight)) for n in ("int4-channel", "int4"))
    assert by_row[:, 1:].mean() > 10 * by_group[:, 1:].mean()
    assert EngineConfig(model="smollm2-135m", quantization="int4-channel")


# 2. The largest number need not be said exactly.


@pytest.mark.parametrize("seed", range(3))
def test_int4_search_never_loses_more(seed: int) -> None:
    weight = normal(16, 256, seed)
    plain, searched = (FORMATS[name](weight) for name in ("int4", "int4-search"))
    assert (searched.kind, searched.group, searched.nbytes) == ("int4", 32, plain.nbytes)
    before, after = squared_error(weight, plain), squared_error(weight, searched)
    assert bool((after <= before + 1e-6).all())
    assert after.sum() < 0.9 * before.sum()


def test_int4_search_of_easy_groups() -> None:
    zeros = FORMATS["int4-search"](torch.zeros(2, 32)).dequantize()
    assert torch.equal(zeros, torch.zeros(2, 32))
    exact = torch.arange(32).remainder(15).sub(7).float().expand(2, 32).contiguous()
    assert squared_error(exact, FORMATS["int4-search"](exact)).max() < 1e-4  # a scale of 1 is there


# 3. Six bits.


def test_mxfp6_is_e2m3() -> None:
    """Its values are E4M3's too, so that they are kept, and computed with, as those: the quality of
    6.25 bits a weight in the memory of 8.25."""
    weight = normal(7, 128) * torch.logspace(-3, 3, 7)[:, None]
    weight[1, :32] = 0
    rounded = FORMATS["mxfp6"](weight)
    assert rounded.kind == "fp8_e4m3" and rounded.scales.dtype is torch.float8_e8m0fnu
    groups = weight.unflatten(1, (-1, 32))
    largest = groups.abs().amax(dim=-1)
    exponents = torch.where(largest > 0, largest.log2().floor() - 2, 0)  # 7.5 = 1.875 * 2^2
    scaled = (groups / torch.exp2(exponents).unsqueeze(-1)).clamp(-7.5, 7.5).numpy()
    expected = scaled.astype(ml_dtypes.float6_e2m3fn).astype(np.float32)
    assert np.array_equal(rounded.values().unflatten(1, (-1, 32)).numpy(), expected)


def test_mxfp6_lies_between_its_neighbours() -> None:
    weight = normal(64, 256)
    names = ("mxfp4", "mxfp6")
    four, six = (squared_error(weight, FORMATS[name](weight)).sum() for name in names)
    assert six < four / 8
