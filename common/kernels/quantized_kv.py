"""A KV cache of a byte an element: what its rows are, the same for all implementations.

A row is one token's key, or value, of one KV head: head_dim codes, then the float32 that they are
multiplied with, four bytes at the end. So a row costs head_dim + 4 bytes, a scale is read with the
codes that it belongs to, and a block is still one piece of memory that can be copied unread.
"""

import torch
from torch import Tensor

from common.kernels.quantized import FP8_MAX, INT8_MAX

MOST = {torch.int8: INT8_MAX, torch.float8_e4m3fn: FP8_MAX}  # the largest code
SCALE_BYTES = 4
SMALLEST = 1e-30  # rows whose elements are all smaller are zeros: 448 / amax stays finite


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether a KV cache of this dtype holds codes and scales."""
    return dtype in MOST


def row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row in a KV cache of this dtype."""
    return head_dim + SCALE_BYTES * is_quantized(dtype)


def head_size(kv_cache: Tensor) -> int:
    """head_dim of a KV cache: the inverse of `row_size`."""
    return kv_cache.shape[-1] - SCALE_BYTES * is_quantized(kv_cache.dtype)


def check_rows(head_dim: int, dtype: torch.dtype) -> None:
    """Raise ValueError where scales would not lie at multiples of their size."""
    if is_quantized(dtype) and head_dim % SCALE_BYTES:
        raise ValueError(
            f"head_dim must be a multiple of {SCALE_BYTES} for a KV cache of {dtype},"
            f" not {head_dim}"
        )


def quantize_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[…, head_dim] in any floating dtype to rows, […, head_dim + 4] of `dtype`.

    In float32: the scale is amax / most, a code is x times the reciprocal (most / amax), rounded half
    to even; most is 127 or 448. A row of elements below SMALLEST has codes and scale 0; one that
    holds an infinity or NaN has codes 0 and the scale NaN, so that all of it is read as NaN.
    """
    values, most = x.float(), MOST[dtype]
    amax = values.abs().amax(dim=-1, keepdim=True)
    divisor = torch.full_like(amax, most)  # a GPU divides by a number as by its reciprocal
    is_known = (amax >= SMALLEST) & (amax < torch.inf)
    codes = values * torch.where(is_known, divisor / amax, 0.0)
    codes = torch.where(is_known, codes, 0.0).clamp(-most, most)
    scales = torch.where(is_known, amax / divisor, torch.where(amax < SMALLEST, 0.0, torch.nan))
    codes = (codes.round() if dtype is torch.int8 else codes).to(dtype)
    return torch.cat([codes.view(torch.int8), scales.view(torch.int8)], dim=-1).view(dtype)


def dequantize_rows(rows: Tensor) -> Tensor:
    """Rows of a KV cache, […, head_dim + 4], to what they stand for, […, head_dim] float32."""
    scales = rows.view(torch.int8)[..., -SCALE_BYTES:]
    scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float32)
    return rows[..., :-SCALE_BYTES].float() * scales
