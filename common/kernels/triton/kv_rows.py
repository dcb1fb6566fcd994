"""Codes of a quantised KV cache on a GPU, from and to floats (see `common.kernels.quantized_kv`).

E4M3 goes by its bits, so that kernels take it where the hardware does not know it (before sm_89). A
cache is given to kernels as bytes: int8 as it is, E4M3 as uint8, which tells them which it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.quantized_kv import SMALLEST

SMALLEST_ROW = tl.constexpr(SMALLEST)


def as_codes(kv_cache: Tensor) -> Tensor:
    """A KV cache as kernels take it."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype is torch.float8_e4m3fn else kv_cache


@triton.jit
def expand(codes, dtype: tl.constexpr):
    """int8 codes as floats; E4M3's, in uint8, as a 256th of what they stand for, since float16's
    exponents are 8 lower."""
    if codes.dtype == tl.int8:
        values = codes.to(dtype)
    else:
        wide = codes.to(tl.int16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        values = bits.to(tl.float16, bitcast=True).to(dtype)
    return values


@triton.jit
def round_fraction(number):
    """An int32 with 24 bits behind the point, 0 or more, rounded half to even.

    Adding and subtracting 1.5 * 2^23 would do for floats, but the product before it would become
    part of a fused multiply-add, which does not round.
    """
    return (number + 0x7FFFFF + ((number >> 24) & 1)) >> 24


@triton.jit
def to_codes(x, factor, dtype: tl.constexpr):
    """x * factor, rounded to codes: int8, or E4M3 as uint8."""
    scaled = x * factor
    magnitude = tl.abs(scaled)
    if dtype == tl.int8:
        whole = round_fraction((magnitude * 16777216.0).to(tl.int32))
        codes = tl.where(scaled < 0, -whole, whole)
    else:
        # Below 2^-6 there are multiples of 2^-9; above, the upper 3 bits of the mantissa are kept.
        few = tl.minimum(magnitude, 0.015625)
        small = round_fraction((few * 8589934592.0).to(tl.int32))
        bits = magnitude.to(tl.int32, bitcast=True)
        large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        codes = tl.where(magnitude < 0.015625, small, large)
        codes |= tl.where(scaled.to(tl.int32, bitcast=True) < 0, 0x80, 0)
    return codes.to(dtype)


@triton.jit
def row_scales(first, second, dtype: tl.constexpr):
    """Scales of rows, and what their elements are multiplied with, [rows, 1] each.

    first, second: the rows' halves, [rows, columns] float32, zeros where they have ended.
    """
    # Without their signs floats are ordered as their bits are, NaN above all others.
    low = first.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    high = second.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.maximum(tl.max(low, axis=1), tl.max(high, axis=1))[:, None]
    is_number = top < 0x7F800000
    amax = tl.where(is_number, top, 0).to(tl.float32, bitcast=True)
    is_known = amax >= SMALLEST_ROW
    divisor = tl.where(is_known, amax, 1.0)
    most = 127.0 if dtype == tl.int8 else 448.0
    factor = tl.where(is_known, tl.div_rn(tl.full(amax.shape, most, tl.float32), divisor), 0.0)
    scale = tl.div_rn(amax, tl.full(amax.shape, most, tl.float32))
    scale = tl.where(is_known, scale, tl.where(is_number, 0.0, float("nan")))
    return scale, factor


@triton.jit
def store_row_halves(base, first, second, columns, mask, is_row, HEAD_DIM: tl.constexpr):
    """Quantise rows given as two halves. base: [rows, 1] pointers; is_row: [rows, 1]."""
    scale, factor = row_scales(first, second, base.dtype.element_ty)
    # In a row that holds NaN or an infinity, factor is 0 and a product may be NaN.
    low = to_codes(tl.where(factor > 0, first, 0.0), factor, base.dtype.element_ty)
    high = to_codes(tl.where(factor > 0, second, 0.0), factor, base.dtype.element_ty)
    tl.store(base + columns[None, :], low, mask=mask)
    tl.store(base + HEAD_DIM // 2 + columns[None, :], high, mask=mask)
    place = (base + HEAD_DIM).to(tl.pointer_type(tl.float32))
    tl.store(place, scale, mask=is_row)
