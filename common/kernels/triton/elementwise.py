"""Norms, activation and rotary embedding on a GPU: every input is read once and every output written
once, since such operations take as long as their bytes do.

Each computes in float32 and rounds at its end. Rows lie `stride` elements apart, so that views of
wider tensors need no copy; addresses are 64 bits wide, since a prefill's activations are large.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.quantized_kv import head_size
from common.kernels.triton.kv_rows import as_codes, store_row_halves
from common.kernels.triton.launch import Launcher

HEADS_PER_PROGRAM = 8  # of rotary_and_store
SILU_BLOCK = 1024


def warps_for(size: int) -> int:
    """Warps for a program that holds `size` elements: some 16 a thread."""
    return min(16, max(1, size // 512))


@triton.jit
def norm_kernel(
    x,
    residual,  # added to x and overwritten by the sum, or None
    weight,
    out,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    values = tl.load(x + row * X_STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + row * RESIDUAL_STRIDE + columns
        values += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (values * scale * weights).to(out.dtype.element_ty)
    tl.store(out + row * SIZE + columns, normed, mask=inside)


@triton.jit
def silu_and_mul_kernel(
    gate_up, out, STRIDE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * STRIDE + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * STRIDE + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def head_norm(first, second, weight, columns, inside, eps, HEAD_DIM: tl.constexpr):
    """The RMS norm of each head, given as two halves, [heads, HALF] each."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    low = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(weight + HEAD_DIM // 2 + columns, mask=inside, other=0.0).to(tl.float32)
    return first * scale * low[None, :], second * scale * high[None, :]


@triton.jit
def store_halves(base, first, second, columns, mask, HEAD_DIM: tl.constexpr):
    """base: [heads, 1] pointers to heads."""
    tl.store(base + columns[None, :], first.to(base.dtype.element_ty), mask=mask)
    places = base + HEAD_DIM // 2 + columns[None, :]
    tl.store(places, second.to(base.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["num_positions", "num_slots", "layer", "num_layers"],
    do_not_specialize_on_alignment=["positions", "slots"],
)
def rotary_and_store_kernel(
    qkv,
    cos_sin,
    positions,
    slots,
    kv_cache,
    q_norm,
    k_norm,
    out,
    num_positions,
    num_slots,
    layer,
    num_layers,
    eps,
    QKV_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_SIZE: tl.constexpr,  # above HEAD_DIM: codes and a scale
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2, as a power of two
):
    """One token, HEADS of its heads: queries, then keys, then values."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    in_half = columns < HEAD_DIM // 2
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    base = qkv + token * QKV_STRIDE + heads[:, None] * HEAD_DIM + columns[None, :]
    first = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(base + HEAD_DIM // 2, mask=inside, other=0.0).to(tl.float32)
    is_query = (heads < NUM_HEADS)[:, None]
    is_value = (heads >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    is_key = (heads >= NUM_HEADS)[:, None] & (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    if q_norm is not None:
        low, high = head_norm(first, second, q_norm, columns, in_half, eps, HEAD_DIM)
        first, second = tl.where(is_query, low, first), tl.where(is_query, high, second)
    if k_norm is not None:
        low, high = head_norm(first, second, k_norm, columns, in_half, eps, HEAD_DIM)
        first, second = tl.where(is_key, low, first), tl.where(is_key, high, second)
    position = tl.load(positions + token)
    in_table = columns < tl.where((position >= 0) & (position < num_positions), HEAD_DIM // 2, 0)
    angles = cos_sin + position * HEAD_DIM + columns
    cos = tl.load(angles, mask=in_table, other=0.0)[None, :]
    sin = tl.load(angles + HEAD_DIM // 2, mask=in_table, other=0.0)[None, :]
    rotated = tl.where(is_value, first, first * cos - second * sin)
    second = tl.where(is_value, second, second * cos + first * sin)
    query = out + token * (NUM_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM
    store_halves(query, rotated, second, columns, inside & is_query, HEAD_DIM)
    slot = tl.load(slots + token)
    first_cached = tl.where(
        (slot >= 0) & (slot < num_slots), NUM_HEADS, NUM_HEADS + 2 * NUM_KV_HEADS
    )
    is_cached = inside & (heads >= first_cached)[:, None]
    half = BLOCK_SIZE * NUM_KV_HEADS * ROW_SIZE  # the keys of a block and layer
    block_stride = num_layers.to(tl.int64) * (2 * half)
    place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * (NUM_KV_HEADS * ROW_SIZE)
    kv_head = heads - tl.where(
        heads < NUM_HEADS + NUM_KV_HEADS, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS
    )
    # A product, and not tl.where, after which Triton sees no alignment and stores single elements.
    offset = is_value.to(tl.int32) * half + kv_head[:, None] * ROW_SIZE
    cached = kv_cache + place + layer.to(tl.int64) * (2 * half) + offset
    if ROW_SIZE > HEAD_DIM:
        is_row = (heads < NUM_HEADS + 2 * NUM_KV_HEADS) & (heads >= first_cached)
        store_row_halves(cached, rotated, second, columns, is_cached, is_row[:, None], HEAD_DIM)
    else:
        store_halves(cached, rotated, second, columns, is_cached, HEAD_DIM)


NORM = Launcher(norm_kernel)
SILU_AND_MUL = Launcher(silu_and_mul_kernel)
ROTARY_AND_STORE = Launcher(rotary_and_store_kernel)


@lru_cache
def norm_block(size: int) -> tuple[int, int]:
    """(columns, warps) of a program that norms a row of that size."""
    block = triton.next_power_of_2(size)
    return block, warps_for(block)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x: [num_tokens, size]; as `Ops.add_rms_norm` where there is a residual."""
    num_rows, size = x.shape
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    block, num_warps = norm_block(size)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    if num_rows:
        NORM((num_rows,), (x, residual, weight, out, eps), (*strides, size, block), num_warps)
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, -(-size // SILU_BLOCK))
    if num_rows:
        SILU_AND_MUL(grid, (gate_up, out), (gate_up.stride(0), size, SILU_BLOCK))
    return out


def rotary_and_store(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_cache: Tensor,
    layer: int,
    slot_mapping: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Nothing on a GPU can raise: slots outside the cache are not written, and a position outside
    the table gives zeros."""
    num_blocks, num_layers, _, block_size, num_kv_heads, row_size = kv_cache.shape
    head_dim = head_size(kv_cache)
    num_tokens, num_columns = qkv.shape
    num_heads = num_columns // head_dim - 2 * num_kv_heads
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    half = 1 << (head_dim // 2 - 1).bit_length()  # as a power of two
    numbers = (len(cos_sin), num_blocks * block_size, layer, num_layers, eps)
    tensors = (qkv, cos_sin, positions, slot_mapping, as_codes(kv_cache), q_norm, k_norm, out)
    shape = (num_heads, num_kv_heads, head_dim, row_size, block_size, HEADS_PER_PROGRAM, half)
    grid = (num_tokens, -(-(num_heads + 2 * num_kv_heads) // HEADS_PER_PROGRAM))
    if num_tokens:
        ROTARY_AND_STORE(grid, (*tensors, *numbers), (qkv.stride(0), *shape))
    return out
