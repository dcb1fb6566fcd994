"""How attention is launched on a GPU: tile sizes by head size and dtype, splits, grids.

Everything here follows from shapes and from bounds known on the host. Tiles come from a table and
not from `triton.autotune`, which would measure while requests wait, anew in every process. The
table was chosen so that the compiled kernels (sm_80, sm_89, sm_90) spill no registers, or few, and
read the cache in asynchronous copies of 16 bytes; it has not been tuned by measurement.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from common.kernels import AttentionMetadata
from common.kernels.triton.attention_kernel import attention_kernel, combine_kernel

MIN_ROWS = 16  # of a matrix product
FEW_ROWS = 64  # up to here (queries times their heads) a batch is all decode
# Tokens that one program takes at least. Its part of the result, written and read once, is 1.6% of
# the keys and values that it reads (groups of 2); less would fill the GPU sooner and cost more.
MIN_SPLIT = 256
MAX_SPLITS = 64  # of a sequence
MAX_PROGRAMS = 1 << 15  # of a launch, if sequences are split: one with nothing to do costs time too


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


def few_queries(max_query_len: int, group: int) -> int:
    """Up to how many queries a sequence is decoded.

    All of them where no sequence has many; in a mixed batch as many as fill the smallest product.
    """
    if max_query_len * group <= FEW_ROWS:
        return max_query_len
    return max(1, MIN_ROWS // group)


def num_splits(max_seq_len: int, num_programs: int) -> int:
    """Over how many programs the tokens of each sequence are split, a power of two.

    num_programs: without splits. The bound is the longest sequence's need: a shorter one leaves the
    rest of its programs idle. Powers of two, so that batches of similar lengths are launched alike.
    """
    splits = triton.next_power_of_2(triton.cdiv(max_seq_len, MIN_SPLIT))
    most = min(MAX_SPLITS, MAX_PROGRAMS // num_programs)
    while splits > max(1, most):
        splits //= 2
    return splits


def attention(
    query: Tensor,
    kv_cache: Tensor,
    layer: int,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """As `Ops.attention`; the tensors are checked, and there is at least one query."""
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = kv_cache.shape[3:5]
    group, num_seqs = num_heads // num_kv_heads, len(metadata.seq_lens)
    device = Device.of(query.device)
    out = torch.empty(num_tokens, num_heads * head_dim, dtype=query.dtype, device=query.device)
    few = few_queries(metadata.max_query_len, group)
    decode = tile_for(True, few * group, head_dim, query.dtype, device)
    prefill = tile_for(False, group, head_dim, query.dtype, device)
    splits = num_splits(metadata.max_seq_len, num_seqs * num_kv_heads)
    partial_out = partial_norm = None
    if splits > 1:
        shape = (num_seqs, few, num_heads, splits)
        partial_norm = torch.empty(shape, dtype=torch.float32, device=query.device)
        partial_out = partial_norm.new_empty((*shape, head_dim))

    def launch(tile: Tile, num_tiles: int, num_splits: int, is_decode: bool) -> None:
        attention_kernel[(num_tiles * num_kv_heads, num_splits)](
            query,
            kv_cache,
            out,
            partial_out if is_decode else None,
            partial_norm if is_decode else None,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            metadata.block_tables,
            query.stride(0),
            metadata.block_tables.stride(0),
            kv_cache.stride(0),
            layer,
            num_seqs,
            few,
            scale * math.log2(math.e),
            sliding_window or 0,
            DECODE=is_decode,
            SPLIT=num_splits > 1,
            HAS_WINDOW=sliding_window is not None,
            BLOCK_SIZE=block_size,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            ROWS=tile.rows,
            TILE=tile.tokens,
            MIN_SPLIT=max(MIN_SPLIT, tile.tokens),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    if metadata.max_query_len > few:
        launch(prefill, num_tokens // (prefill.rows // group) + num_seqs, 1, False)
    launch(decode, num_seqs, splits, True)
    if splits > 1:
        combine_kernel[(num_seqs * few * num_heads,)](
            partial_out,
            partial_norm,
            out,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            few,
            splits,
            sliding_window or 0,
            HAS_WINDOW=sliding_window is not None,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            TILE=decode.tokens,
            MIN_SPLIT=max(MIN_SPLIT, decode.tokens),
            SPLITS=MAX_SPLITS,
            num_warps=8 if head_dim > 128 else 4,
        )
    return out
