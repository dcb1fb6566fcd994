"""Attention's cases: mixes of lengths, head and block sizes, windows, bounds that are not tight.

What must not be read is there to be noticed: unused places of the cache hold NaN, and block tables
end in numbers far outside the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from common.kernels import AttentionMetadata
from common.kernels.quantized_kv import quantize_rows
from common.testing.kernels.case import REFERENCE, Case, Target, error_of, wide

Lengths = tuple[tuple[int, int], ...]  # (queries, tokens) of each sequence

DECODE: Lengths = ((1, 1), (1, 2), (1, 63), (1, 130), (1, 17))
PREFILL: Lengths = ((70, 70), (1, 1), (33, 33))
MIXED: Lengths = ((3, 3), (0, 40), (1, 300), (5, 129), (0, 1), (40, 200), (1, 64))
DRAFTS: Lengths = ((5, 40), (5, 129), (3, 3), (0, 7), (1, 90))
LONG: Lengths = ((1, 700), (1, 3))
FEW: Lengths = ((3, 3), (1, 100), (40, 90), (0, 1))
ONE_LONG: Lengths = ((1, 3), (2, 40), (1, 900), (1, 257), (1, 256))


@dataclass(frozen=True)
class Spec:
    lengths: Lengths
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int | None = None
    query_scale: float = 1.0
    is_loose: bool = False  # bounds above the lengths, views, int64 metadata
    num_padding: int = 0  # rows behind the others, as in a batch of fixed size
    decode_queries: int | None = None  # N of `AttentionMetadata.max_decode_query_len`
    kv_dtype: torch.dtype | None = None  # of a quantised cache


SPECS = {
    "decode": Spec(DECODE, 9, 3, 64, 16),
    "decode, no groups": Spec(DECODE, 2, 2, 64, 1),
    "decode, one KV head": Spec(DECODE, 32, 1, 64, 16),
    "decode, group of 71": Spec(DECODE, 71, 1, 64, 16),
    "decode, long": Spec(LONG, 4, 1, 128, 16),
    "decode, block size 256": Spec(LONG, 4, 2, 64, 256),
    "prefill": Spec(PREFILL, 4, 2, 64, 16),
    "prefill, group of 71": Spec(((3, 20), (2, 2)), 71, 1, 64, 16),
    "prefill, head size 128": Spec(PREFILL, 4, 1, 128, 16),
    "mixed": Spec(MIXED, 9, 3, 64, 17),
    "mixed, head size 16": Spec(MIXED, 2, 1, 16, 64),
    "mixed, head size 20": Spec(DRAFTS + PREFILL, 4, 2, 20, 4),
    "mixed, head size 80": Spec(MIXED, 6, 2, 80, 3),
    "mixed, head size 96": Spec(MIXED, 4, 4, 96, 256),
    "mixed, head size 256": Spec(MIXED, 4, 2, 256, 256),
    "drafts": Spec(DRAFTS, 8, 2, 128, 32),
    "drafts, block size 512": Spec(DRAFTS, 8, 2, 128, 512),
    "window of 1": Spec(MIXED, 6, 2, 64, 16, window=1),
    "window of 5": Spec(DRAFTS, 6, 2, 64, 16, window=5),
    "window of 100": Spec(MIXED, 6, 2, 64, 16, window=100),
    "window of 400, long": Spec(LONG, 4, 1, 64, 256, window=400),
    "window of 9, block size 256": Spec(MIXED, 4, 2, 64, 256, window=9),
    "window beyond all": Spec(MIXED, 6, 2, 64, 16, window=1000),
    "large scores": Spec(MIXED, 6, 2, 32, 16, query_scale=8.0),
    "loose bounds": Spec(MIXED, 4, 2, 64, 16, is_loose=True),
    "loose bounds, decode": Spec(LONG, 4, 2, 64, 16, is_loose=True),
    "no queries": Spec(((0, 5), (0, 20)), 4, 2, 64, 16),
    "one long, group of 7": Spec(ONE_LONG, 14, 2, 64, 16, decode_queries=2),
    "decodes and prompts": Spec(MIXED, 8, 1, 64, 16, decode_queries=1),
    "decodes and prompts, window": Spec(MIXED, 4, 2, 64, 16, window=70, decode_queries=1),
    "drafts and prompts": Spec((*MIXED, (5, 333)), 4, 2, 64, 16, decode_queries=5),
    "prompts alone": Spec(((70, 70), (2, 90), (0, 7)), 3, 3, 64, 16, decode_queries=1),
    "padding rows": Spec(LONG, 4, 2, 64, 16, num_padding=3, decode_queries=1),
    "decode, int8 cache": Spec(LONG, 4, 1, 128, 16, kv_dtype=torch.int8),
    "decode, fp8 cache": Spec(DECODE, 6, 2, 64, 16, kv_dtype=torch.float8_e4m3fn),
    "mixed, int8 cache": Spec(FEW, 4, 2, 80, 3, kv_dtype=torch.int8),
    "mixed, fp8 cache, window": Spec(FEW, 2, 1, 64, 16, 9, kv_dtype=torch.float8_e4m3fn),
}
# What these are about does not depend on the number format: they run in float32 alone.
ONCE = (
    "decode, no groups",
    "decode, one KV head",
    "decode, group of 71",
    "prefill, group of 71",
    "mixed, head size 16",
    "mixed, head size 20",
    "window of 1",
    "window of 5",
    "window beyond all",
    "loose bounds",
    "loose bounds, decode",
    "no queries",
    "one long, group of 7",
    "decodes and prompts",
    "decodes and prompts, window",
    "drafts and prompts",
    "prompts alone",
    "padding rows",
)
LARGE_SCORES_TOLERANCE = 8  # times the ordinary: scores are rounded relative to their size


def attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, spec in SPECS.items():
        if dtype == torch.float32 or name not in ONCE:
            yield Case("attention", name, lambda t, spec=spec: attention_error(t, spec))


def attention_error(t: Target, spec: Spec) -> float | None:
    try:
        t.ops.check_kv_cache(spec.block_size, spec.head_dim, spec.kv_dtype or t.dtype)
    except ValueError:
        return None
    query, cache, layer, metadata = make_attention(t, spec)
    scale = spec.head_dim**-0.5
    exact = wide(cache) if spec.kv_dtype is None else cache.cpu()
    expected = REFERENCE.attention(
        wide(query), exact, layer, on(metadata, "cpu"), scale, spec.window
    )
    if spec.is_loose:
        query, metadata = loosened(query, metadata)
    if spec.num_padding:
        query, metadata = padded(query, metadata, spec.num_padding)
    actual = t.ops.attention(query, cache, layer, metadata, scale, spec.window)
    actual = actual[: len(expected)]
    error = error_of(actual, expected, t.dtype)
    return error / LARGE_SCORES_TOLERANCE if spec.query_scale > 1 else error


def make_attention(t: Target, spec: Spec) -> tuple[Tensor, Tensor, int, AttentionMetadata]:
    """Query, cache, layer and metadata; sequences lie in shuffled blocks."""
    generator = torch.Generator().manual_seed(sum(map(sum, spec.lengths)))
    size = spec.block_size
    num_blocks = [-(-length // size) for _, length in spec.lengths]
    blocks = torch.randperm(sum(num_blocks) + 2, generator=generator)
    shape = (len(blocks), 2, 2, size, spec.num_kv_heads, spec.head_dim)
    cache = torch.full(shape, torch.nan)
    tables = torch.full((len(spec.lengths), max(num_blocks) + 2), 2**31 - 1, dtype=torch.int32)
    layer, used = 1, 0
    for i, (_, length) in enumerate(spec.lengths):
        own = blocks[used : used + num_blocks[i]]
        used += num_blocks[i]
        tables[i, : num_blocks[i]] = own
        tokens = torch.arange(length)
        values = torch.randn(length, 2, *shape[4:], generator=generator)
        cache[own[tokens // size], layer, :, tokens % size] = values
    counts = [queries for queries, _ in spec.lengths]
    most = spec.decode_queries
    few = None if most is None else max((n for n in counts if n <= most), default=0)
    leading = 0 if most is None else len(list(takewhile(lambda n: n <= most, counts)))
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=torch.tensor([length for _, length in spec.lengths]).int(),
        block_tables=tables,
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
        max_query_len=max(counts),
        max_seq_len=max(length for _, length in spec.lengths),
        max_decode_query_len=few,
        num_leading_decodes=leading,
    )
    query = torch.randn(sum(counts), spec.num_heads, spec.head_dim, generator=generator)
    if spec.kv_dtype is None:
        cache = t.put(cache)
    else:
        cache = quantize_rows(cache, spec.kv_dtype).to(t.device)
    return t.put(query * spec.query_scale), cache, layer, on(metadata, t.device)


def on(metadata: AttentionMetadata, device: torch.device | str) -> AttentionMetadata:
    moved = {
        name: value.to(device) for name, value in vars(metadata).items() if torch.is_tensor(value)
    }
    return replace(metadata, **moved)


def loosened(query: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, AttentionMetadata]:
    """The same case by other tensors: wider, strided, of another integer type."""
    tables = metadata.block_tables
    changed = replace(
        metadata,
        cu_seqlens_q=metadata.cu_seqlens_q.long(),
        seq_lens=metadata.seq_lens.repeat_interleave(2)[::2],
        block_tables=torch.cat([tables, tables], dim=1)[:, : tables.shape[1]],
        max_query_len=metadata.max_query_len + 7,
        max_seq_len=metadata.max_seq_len + 300,
    )
    return torch.cat([query, query], dim=1)[:, : query.shape[1]], changed


def padded(
    query: Tensor, metadata: AttentionMetadata, count: int
) -> tuple[Tensor, AttentionMetadata]:
    """The same case in a batch of fixed size: behind its rows others, of one query and one token in
    block 0. The tables are the first rows of one that is larger both ways."""
    starts, lengths, tables = metadata.cu_seqlens_q, metadata.seq_lens, metadata.block_tables
    num_seqs, width = tables.shape
    more = torch.arange(1, count + 1, dtype=starts.dtype, device=starts.device)
    large = tables.new_zeros(num_seqs + count + 1, width + 5)
    large[:num_seqs, :width] = tables
    changed = replace(
        metadata,
        cu_seqlens_q=torch.cat([starts, starts[-1] + more]),
        seq_lens=torch.cat([lengths, torch.ones_like(more)]),
        block_tables=large[: num_seqs + count],
        slot_mapping=torch.cat([metadata.slot_mapping, torch.full_like(more.long(), -1)]),
    )
    return torch.cat([query, query[:1].expand(count, -1, -1)]), changed
