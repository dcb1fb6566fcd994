"""Number formats: how a weight becomes codes and scales, and what they stand for.

Each function is one format, from float32 [out_features, in_features] to a `QuantizedWeight`, whose
`dequantize` is the way back. What they share: numbers that lie side by side share a scale, so that the
largest of them is the largest that a code can say; then each is rounded to the nearest code.

    format     codes                        scale for        scale's own format        bits a weight
    int8       -127 … 127                   a row            float32                   8 + 32 / inputs
    int8-g32   the same                     32 of a row      float16                   8.5
    int4       -8 … 7                       32, 64, 128      float16                   4.5, 4.25, 4.125
    uint4      0 … 15, and a minimum        32               float16, both             5
    fp8        E4M3: 4 bits of exponent,    all              float32                   8
               3 of mantissa, up to 448     a row, or 128 x 128
    mxfp8      E4M3                         32               E8M0: a power of two      8.25
    mxfp4      E2M1: 0 .5 1 1.5 2 3 4 6     32               E8M0                      4.25
    nvfp4      E2M1                         16               E4M3, and one for all     4.5
    nf4        16 quantiles of a normal     64               float32                   4.5

Symmetric formats have no offset: a zero stays a zero. A minimum (asymmetric) spends more bits and uses
all codes where numbers lie to one side.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common.kernels.quantized import E2M1, NF4, QuantizedWeight, pack_nibbles

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_EXPONENT, E2M1_EXPONENT = 8, 2  # of the largest number: 448 = 1.75 * 2^8, 6 = 1.5 * 2^2
E8M0_BIAS = 127


def in_groups(weight: Tensor, group: int) -> Tensor:
    """[out, in] as [out, in / group, group]. Raises ValueError where the group does not divide."""
    if weight.shape[1] % group:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of the group, {group}")
    return weight.float().unflatten(1, (-1, group))


def largest(groups: Tensor) -> Tensor:
    """The largest magnitude of each group, [out, groups]."""
    return groups.abs().amax(dim=-1)


def divide(groups: Tensor, scales: Tensor) -> Tensor:
    """Each number over its group's scale; where the scale is 0, so are the numbers, and 0 comes."""
    scales = scales.float().unsqueeze(-1)
    return torch.where(scales == 0, 0, groups / scales)


def quantize_int8(weight: Tensor, group: int | None = None) -> QuantizedWeight:
    """Symmetric, a scale for each row, or for each group of a row: largest / 127."""
    groups = in_groups(weight, group or weight.shape[1])
    scales = (largest(groups) / 127).to(torch.float32 if group is None else torch.float16)
    codes = divide(groups, scales).round().clamp(-127, 127).to(torch.int8)
    return QuantizedWeight("int8", codes.flatten(1), scales, groups.shape[-1])


def quantize_int4(weight: Tensor, group: int = 32) -> QuantizedWeight:
    """Symmetric, -8 to 7: half of the range over largest, 7.5, so that both ends are used alike."""
    groups = in_groups(weight, group)
    scales = (largest(groups) / 7.5).half()
    codes = divide(groups, scales).round().clamp(-8, 7) + 8
    return QuantizedWeight("int4", pack_nibbles(codes.flatten(1)), scales, group)


def quantize_uint4(weight: Tensor, group: int = 32) -> QuantizedWeight:
    """Asymmetric: 0 to 15 from the smallest number to the largest (llama.cpp's Q4_1)."""
    groups = in_groups(weight, group)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    scales, minimums = ((high - low) / 15).half(), low.half()
    codes = divide(groups - minimums.float().unsqueeze(-1), scales).round().clamp(0, 15)
    return QuantizedWeight("uint4", pack_nibbles(codes.flatten(1)), scales, group, minimums)


def round_e4m3(x: Tensor) -> Tensor:
    """To the nearest E4M3, ties to even; what is too large becomes the largest, and not NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_fp8(weight: Tensor, block: str | int = "tensor") -> QuantizedWeight:
    """E4M3 with a scale for the whole tensor, for each row (`channel`), or for squares of `block`
    numbers a side (DeepSeek-V3, arXiv 2412.19437: 128)."""
    out_features, in_features = weight.shape
    group = block if isinstance(block, int) else in_features
    groups = in_groups(weight, group)
    amax = largest(groups)
    if block == "tensor":
        amax = amax.amax().expand(out_features, 1)
    elif isinstance(block, int):
        squares = [rows.amax(dim=0, keepdim=True).expand_as(rows) for rows in amax.split(block)]
        amax = torch.cat(squares)
    scales = (amax / E4M3_MAX).contiguous()
    codes = round_e4m3(divide(groups, scales))
    return QuantizedWeight("fp8_e4m3", codes.flatten(1), scales, group)


def e8m0_scales(amax: Tensor, exponent: int) -> Tensor:
    """E8M0, the exponent alone: with it, the largest number's exponent becomes `exponent` (OCP
    Microscaling Formats, version 1.0, section 6.3). Mantissas above the format's largest saturate."""
    _, exponents = torch.frexp(amax)  # amax = m * 2^e with m in [0.5, 1)
    shared = (exponents - 1 - exponent).clamp(-E8M0_BIAS, E8M0_BIAS)
    biased = torch.where(amax == 0, 0, shared + E8M0_BIAS).to(torch.uint8)
    return biased.view(torch.float8_e8m0fnu)


def round_e2m1(x: Tensor) -> Tensor:
    """To the nearest E2M1, ties to the code that is even: 0.25 to 0, 0.75 to 1, 2.5 to 2, 5 to 4.
    Returns codes, 0 to 15; 8 is the sign."""
    values = torch.tensor(E2M1, device=x.device)
    middles = (values[1:] + values[:-1]) / 2
    magnitude = x.abs()
    above = torch.bucketize(magnitude, middles)  # a tie goes down …
    is_tie_to_odd = (above < 7) & (above % 2 == 1) & (magnitude == middles[above.clamp(max=6)])
    codes = above + is_tie_to_odd.long()  # … unless that is odd
    return codes + 8 * (x < 0)


def quantize_mxfp8(weight: Tensor) -> QuantizedWeight:
    groups = in_groups(weight, 32)
    scales = e8m0_scales(largest(groups), E4M3_EXPONENT)
    codes = round_e4m3(divide(groups, scales))
    return QuantizedWeight("fp8_e4m3", codes.flatten(1), scales, 32)


def quantize_mxfp4(weight: Tensor) -> QuantizedWeight:
    groups = in_groups(weight, 32)
    scales = e8m0_scales(largest(groups), E2M1_EXPONENT)
    codes = round_e2m1(divide(groups, scales))
    return QuantizedWeight("fp4_e2m1", pack_nibbles(codes.flatten(1)), scales, 32)


def quantize_nvfp4(weight: Tensor) -> QuantizedWeight:
    """Two levels: one multiplier puts the tensor's largest scale at E4M3's largest number, so that
    the scales of 16 numbers each can be E4M3 (NVIDIA, "Introducing NVFP4", 2025)."""
    groups = in_groups(weight, 16)
    amax = largest(groups)
    multiplier = torch.where(amax.amax() > 0, E4M3_MAX * E2M1_MAX / amax.amax(), 1.0)
    scales = round_e4m3(multiplier * amax / E2M1_MAX)
    codes = round_e2m1(divide(groups * multiplier, scales))
    row_scales = (1 / multiplier).expand(len(weight)).contiguous()
    packed = pack_nibbles(codes.flatten(1))
    return QuantizedWeight("fp4_e2m1", packed, scales, 16, row_scales=row_scales)


def dynamic_map() -> Tensor:
    """256 numbers from -1 to 1, dense near 0: seven decades, each with twice the steps of the one
    below (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861)."""
    numbers = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        numbers += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(numbers))


def quantize_twice(scales: Tensor) -> Tensor:
    """Scales as they come back from 8 bits each: less their mean, 256 of them over their largest."""
    mean, table = scales.mean(), dynamic_map().to(scales.device)
    flat = scales.flatten() - mean
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256)
    amax = largest(blocks)
    codes = nearest(divide(blocks, amax), table)
    return ((table[codes] * amax.unsqueeze(1)).flatten()[: len(flat)] + mean).view_as(scales)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest number of a sorted table, int64; ties go down."""
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def quantize_nf4(weight: Tensor) -> QuantizedWeight:
    """Codes that are equally often used where weights are normal (QLoRA, arXiv 2305.14314). Scales are
    rounded to 8 bits, as bitsandbytes does (which keeps 4.127 bits a weight), and kept as float32."""
    groups = in_groups(weight, 64)
    scales = largest(groups)
    codes = nearest(divide(groups, scales), torch.tensor(NF4, device=weight.device))
    return QuantizedWeight("nf4", pack_nibbles(codes.flatten(1)), quantize_twice(scales), 64)


FORMATS: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "int8": quantize_int8,
    "int8-g32": partial(quantize_int8, group=32),
    "int4": quantize_int4,
    "int4-g64": partial(quantize_int4, group=64),
    "int4-g128": partial(quantize_int4, group=128),
    "uint4": quantize_uint4,
    "fp8": quantize_fp8,
    "fp8-channel": partial(quantize_fp8, block="channel"),
    "fp8-block": partial(quantize_fp8, block=128),
    "mxfp8": quantize_mxfp8,
    "mxfp4": quantize_mxfp4,
    "nvfp4": quantize_nvfp4,
    "nf4": quantize_nf4,
}
