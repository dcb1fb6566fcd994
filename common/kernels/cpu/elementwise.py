"""The small operations between matrix products: norms, rotary embedding, activation.

Each passes over its rows once or twice. A few rows stay on the calling core, since waking another
costs more than they do; many are shared out.
"""

import math

import numpy as np

from common.kernels.cpu.jit import float32_array, helper, int64_array, kernel
from common.kernels.cpu.kv_rows import FLOAT32, quantize_row
from common.kernels.cpu.pool import spread


@helper
def exp32(x):
    """exp in float32 to about 1e-7 relative, without a branch, so that LLVM vectorises it.

    exp(x) = 2^n exp(r) with n = round(x / ln 2), r in [-0.35, 0.35], and exp(r) by its Taylor
    polynomial of degree 7. Below -87 the result stays at exp(-87), 1.6e-38; above 88 at exp(88).
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(np.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    # ln 2 in two pieces: the first has so few bits that n times it is exact.
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r * r + r + np.float32(1)
    exponent = np.int32(np.int32(n) + np.int32(127)) << np.int32(23)
    return p * np.int32(exponent).view(np.float32)


@helper
def share(count, piece, num_pieces):
    """First of `count` items of a piece, when they are split evenly."""
    return piece * count // num_pieces


@helper
def norm_rows(x, residual, weight, out, eps, piece, num_pieces):
    """Norms of a piece of the rows; `residual` gets x added first, unless it is x itself."""
    num_rows, size = x.shape
    for row in range(share(num_rows, piece, num_pieces), share(num_rows, piece + 1, num_pieces)):
        total = np.float32(0)
        if residual.ctypes.data != x.ctypes.data:
            for i in range(size):
                value = residual[row, i] + x[row, i]
                residual[row, i] = value
                total += value * value
        else:
            for i in range(size):
                total += x[row, i] * x[row, i]
        factor = np.float32(1 / math.sqrt(total / size + eps))
        for i in range(size):
            out[row, i] = residual[row, i] * factor * weight[i]


@kernel(floats=("eps",))
def norm(x, residual, weight, out, eps, num_rows, size, num_threads, pool):
    xs = float32_array(x, (num_rows, size))
    residuals = float32_array(residual, (num_rows, size))
    weights = float32_array(weight, (size,))
    outs = float32_array(out, (num_rows, size))
    spread(norm_rows, (xs, residuals, weights, outs, eps), num_threads, pool)


@helper
def silu_rows(gate_up, out, piece, num_pieces):
    num_rows, size = out.shape
    for row in range(share(num_rows, piece, num_pieces), share(num_rows, piece + 1, num_pieces)):
        for i in range(size):
            gate = gate_up[row, i]
            sigmoid = np.float32(1) / (np.float32(1) + exp32(-gate))
            out[row, i] = gate * sigmoid * gate_up[row, size + i]


@kernel
def silu_and_mul(gate_up, out, num_rows, size, num_threads, pool):
    gate_ups = float32_array(gate_up, (num_rows, 2 * size))
    outs = float32_array(out, (num_rows, size))
    spread(silu_rows, (gate_ups, outs), num_threads, pool)


@helper
def rotate(head, cos_sin, norm_weight, eps, out):
    """One head of one token: norm where `norm_weight` is not empty, then the rotation, to `out`."""
    half = len(head) // 2
    if len(norm_weight) > 0:
        total = np.float32(0)
        for i in range(2 * half):
            total += head[i] * head[i]
        factor = np.float32(1 / math.sqrt(total / (2 * half) + eps))
        for i in range(2 * half):
            head[i] = head[i] * factor * norm_weight[i]
    for i in range(half):
        first, second = head[i], head[half + i]
        cos, sin = cos_sin[i], cos_sin[half + i]
        out[i] = first * cos - second * sin
        out[half + i] = second * cos + first * sin


@helper
def rotary_rows(
    qkv,
    cos_sin,
    positions,
    cache,
    slots,
    q_norm,
    k_norm,
    eps,
    out,
    block_stride,
    value_offset,
    block_size,
    row_size,
    kind,
    piece,
    num_pieces,
):
    """A piece of the tokens. `cache` is an address; strides, offsets, sizes are in bytes."""
    num_heads, head_dim = out.shape[1], out.shape[2]
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    rotated = np.empty(head_dim, np.float32)
    num_tokens = len(out)
    begin, end = share(num_tokens, piece, num_pieces), share(num_tokens, piece + 1, num_pieces)
    for token in range(begin, end):
        table = cos_sin[positions[token]]
        for head in range(num_heads):
            rotate(qkv[token, head], table, q_norm, eps, out[token, head])
        slot = slots[token]
        if slot < 0:
            continue
        place = cache + slot // block_size * block_stride
        place += slot % block_size * num_kv_heads * row_size
        for head in range(num_heads, num_heads + num_kv_heads):
            key, value = qkv[token, head], qkv[token, num_kv_heads + head]
            if kind == FLOAT32:
                rotate(key, table, k_norm, eps, float32_array(place, (head_dim,)))
                copied = float32_array(place + value_offset, (head_dim,))
                for i in range(head_dim):
                    copied[i] = value[i]
            else:
                rotate(key, table, k_norm, eps, rotated)
                quantize_row(rotated, place, kind)
                quantize_row(value, place + value_offset, kind)
            place += row_size


@kernel(floats=("eps",))
def rotary_and_store(
    qkv,
    cos_sin,
    positions,
    cache,
    slots,
    q_norm,
    k_norm,
    out,
    eps,
    num_tokens,
    max_positions,
    num_heads,
    num_kv_heads,
    head_dim,
    block_stride,
    value_offset,
    block_size,
    row_size,
    kind,
    num_threads,
    pool,
):
    """q_norm and k_norm are 0 where there are none; `cache` is the layer's place in block 0; strides,
    and the size of a head's row, in bytes; kind: of `kv_rows`."""
    qkvs = float32_array(qkv, (num_tokens, num_heads + 2 * num_kv_heads, head_dim))
    tables = float32_array(cos_sin, (max_positions, head_dim))
    positions_of = int64_array(positions, (num_tokens,))
    slots_of = int64_array(slots, (num_tokens,))
    q_weights = float32_array(q_norm, (head_dim if q_norm != 0 else 0,))
    k_weights = float32_array(k_norm, (head_dim if k_norm != 0 else 0,))
    outs = float32_array(out, (num_tokens, num_heads, head_dim))
    places = (qkvs, tables, positions_of, cache, slots_of, q_weights, k_weights, eps, outs)
    sizes = (block_stride, value_offset, block_size, row_size, kind)
    spread(rotary_rows, (*places, *sizes), num_threads, pool)
