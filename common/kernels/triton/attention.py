"""How attention is launched on a GPU: tile sizes by head size and dtype, splits, grids.

Everything here follows from shapes and from bounds known on the host. Tiles come from a table and
not from `triton.autotune`, which would measure while requests wait, anew in every process. The
table was chosen so that the compiled kernels (sm_80, sm_89, sm_90) spill no registers, or few, and
read the cache in asynchronous copies of 16 bytes; it has not been tuned by measurement.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from common.kernels import AttentionMetadata
from common.kernels.triton.attention_kernel import attention_kernel, combine_kernel
from common.kernels.triton.kv_rows import as_codes
from common.kernels.triton.launch import Launcher

LOG2_E = math.log2(math.e)
MIN_ROWS = 16  # of a matrix product
FEW_ROWS = 64  # up to here (queries times their heads) a batch is all decode
# Tokens that one program takes at least. Its part of the result, written and read once, is 1.6% of
# the keys and values that it reads (groups of 2); less would fill the GPU sooner and cost more.
MIN_SPLIT = 256
MAX_SPLITS = 64  # of a sequence
MAX_PROGRAMS = 1 << 14  # of a launch that splits: one with nothing to do costs time too
MAX_PARTS = 1 << 16  # of queries and heads: 34 MB, where heads have 128 elements


@dataclass(frozen=True)
class Tile:
    rows: int  # queries times the heads that share a KV head; for decode at least
    tokens: int
    num_warps: int
    num_stages: int


# By the head size, padded to a power of two. Matrix products of float32 run without tensor cores.
PREFILL = {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)}
DECODE = {64: Tile(16, 128, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 32, 4, 3)}
PREFILL_FLOAT32 = {64: Tile(64, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2)}
DECODE_FLOAT32 = {64: Tile(16, 32, 4, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 2)}


@dataclass(frozen=True)
class Device:
    """What the launches depend on."""

    shared_memory: int  # bytes a program may have
    is_hopper: bool  # products read queries from shared memory and keep one more buffer

    @classmethod
    @lru_cache
    def of(cls, device: torch.device) -> "Device":
        if device.type != "cuda":
            return cls(1 << 30, False)
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.shared_memory_per_block_optin, properties.major >= 9)


def head_pad(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@lru_cache
def tile_for(is_decode: bool, rows: int, head_dim: int, dtype: torch.dtype, device: Device) -> Tile:
    """The table's tile with at least `rows` rows, and as many pipeline stages as fit in memory."""
    is_wide = dtype.itemsize > 2
    prefill, decode = (PREFILL_FLOAT32, DECODE_FLOAT32) if is_wide else (PREFILL, DECODE)
    tile = (decode if is_decode else prefill)[max(64, head_pad(head_dim))]
    tile = replace(tile, rows=max(tile.rows, triton.next_power_of_2(rows)))
    while (
        tile.num_stages > 1 and shared_bytes(tile, head_dim, dtype, device) > device.shared_memory
    ):
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def shared_bytes(tile: Tile, head_dim: int, dtype: torch.dtype, device: Device) -> int:
    """At most, for queries, weights, and the keys and values that are on their way."""
    pad = head_pad(head_dim)
    buffers = tile.num_stages - 1 + device.is_hopper
    elements = tile.rows * (pad + tile.tokens) + buffers * 2 * tile.tokens * pad
    return elements * dtype.itemsize + 2048


def few_queries(max_query_len: int, max_decode_query_len: int | None, group: int) -> int:
    """Up to how many queries a sequence is decoded; 0: none is.

    All of those that decode, as far as their rows fit. Where it is not known how many decode: all
    of a batch in which no sequence has many, and in another as many as fill the smallest product.
    """
    if max_decode_query_len is not None:
        return min(max_query_len, max_decode_query_len, max(1, FEW_ROWS // group))
    if max_query_len * group <= FEW_ROWS:
        return max_query_len
    return max(1, MIN_ROWS // group)


def num_splits(max_seq_len: int, num_programs: int, num_rows: int) -> int:
    """Over how many programs the tokens of each sequence are split, a power of two.

    num_programs, num_rows: without splits; rows are queries times heads. The bound is the longest
    sequence's need: a shorter one leaves the rest of its programs idle. Powers of two, so that
    batches of similar lengths are launched alike.
    """
    splits = triton.next_power_of_2(triton.cdiv(max_seq_len, MIN_SPLIT))
    most = min(MAX_SPLITS, MAX_PROGRAMS // num_programs, MAX_PARTS // num_rows)
    while splits > max(1, most):
        splits //= 2
    return splits


class Launch(NamedTuple):
    """What a launch is given beside its arguments."""

    grid: tuple[int, ...]
    constants: tuple[int, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """A step's launches, the same in each of its layers. They follow from shapes and bounds, and
    not from lengths that only the GPU knows."""

    few: int  # sequences of at most so many queries are decoded
    first_seq: int  # all before it are
    num_splits: int
    parts_size: int  # elements that a split decode needs between its two kernels
    prefill: Launch | None
    decode: Launch | None
    combine: Launch | None  # if there are splits


class Shape(NamedTuple):
    """What the launches depend on beside a step's metadata."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    has_window: bool
    dtype: torch.dtype
    device: torch.device


def plan(metadata: AttentionMetadata, shape: Shape) -> Plan:
    num_seqs, num_kv_heads = len(metadata.seq_lens), shape.num_kv_heads
    num_heads, head_dim, has_window = shape.num_heads, shape.head_dim, shape.has_window
    group, pad = num_heads // num_kv_heads, head_pad(head_dim)
    device = Device.of(shape.device)
    few = few_queries(metadata.max_query_len, metadata.max_decode_query_len, group)

    def launch(tile: Tile, num_tiles: int, splits: int, is_decode: bool) -> Launch:
        flags = (is_decode, splits > 1, has_window)
        sizes = (shape.block_size, num_kv_heads, group, head_dim, pad)
        constants = (*flags, *sizes, tile.rows, tile.tokens, max(MIN_SPLIT, tile.tokens))
        grid = (num_tiles * num_kv_heads, splits)
        return Launch(grid, constants, tile.num_warps, tile.num_stages)

    prefill = decode = combine = None
    first_seq, splits = 0, 1
    if few == metadata.max_decode_query_len:
        first_seq = metadata.num_leading_decodes
    if metadata.max_query_len > few and first_seq < num_seqs:
        tile = tile_for(False, group, head_dim, shape.dtype, device)
        num_tiles = shape.num_tokens // (tile.rows // group) + num_seqs - first_seq
        prefill = launch(tile, num_tiles, 1, False)
    if few:
        tile = tile_for(True, few * group, head_dim, shape.dtype, device)
        num_rows = num_seqs * few * num_heads
        splits = num_splits(metadata.max_seq_len, num_seqs * num_kv_heads, num_rows)
        decode = launch(tile, num_seqs, splits, True)
        if splits > 1:
            constants = (has_window, num_heads, head_dim, pad, tile.tokens, decode.constants[-1])
            num_warps = 8 if pad > 128 else 4
            combine = Launch((num_rows,), (*constants, MAX_SPLITS), num_warps, 3)
    parts_size = num_seqs * few * num_heads * splits * (head_dim + 1)
    return Plan(few, first_seq, splits, parts_size, prefill, decode, combine)


ATTENTION = Launcher(attention_kernel)
COMBINE = Launcher(combine_kernel)


def attention(
    query: Tensor,
    kv_cache: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    plan: Plan,
) -> Tensor:
    """As `Ops.attention`; query and cache are contiguous, and there is at least one query."""
    num_tokens, num_heads, head_dim = query.shape
    device, window = query.device, sliding_window or 0
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=query.dtype, device=device)
    starts, lengths, tables = metadata.cu_seqlens_q, metadata.seq_lens, metadata.block_tables
    first = (query, as_codes(kv_cache), out)
    rest = (
        starts,
        lengths,
        tables,
        tables.stride(0),
        layer,
        kv_cache.shape[1],
        plan.first_seq,
        len(lengths),
        plan.few,
        scale * LOG2_E,
        window,
    )
    if plan.prefill is not None:
        grid, *options = plan.prefill
        ATTENTION(grid, (*first, None, *rest), *options)
    if plan.combine is not None:
        # Not kept for the next layer: memory that a CUDA graph writes to must be the graph's.
        parts = torch.empty(plan.parts_size, dtype=torch.float32, device=device)
        grid, *options = plan.decode
        ATTENTION(grid, (*first, parts, *rest), *options)
        grid, *options = plan.combine
        numbers = (plan.few, plan.num_splits, window)
        COMBINE(grid, (parts, out, starts, lengths, *numbers), *options)
    elif plan.decode is not None:
        grid, *options = plan.decode
        ATTENTION(grid, (*first, None, *rest), *options)
    return out


def warm_up_lengths(
    group: int, max_query_len: int, max_seq_len: int, max_decode_query_len: int | None
) -> list[list[tuple[int, int]]]:
    """As `Ops.warm_up_lengths`: prefill; decode by each size of tile, split and not."""
    most = min(max_query_len, max(1, FEW_ROWS // group))
    if max_decode_query_len is not None:
        most = min(most, max_decode_query_len)
    # By a tile's rows, the largest number of queries that it takes.
    counts = {max(MIN_ROWS, triton.next_power_of_2(n * group)): n for n in range(1, most + 1)}
    splits = {min(max_seq_len, MIN_SPLIT), min(max_seq_len, MIN_SPLIT + 1)}
    batches = [
        [(count, length)]
        for count in counts.values()
        for length in sorted(splits)
        if length >= count
    ]
    if max_query_len > most:
        batches.append([(most + 1, most + 1)])
    return batches
