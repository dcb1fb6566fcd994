"""Paged attention on a CPU: any mix of query lengths in one call, in one pass over the keys.

A piece of work is one sequence, one KV head, and up to ROWS rows: the queries of all heads that
share the KV head, for as many tokens as fit. So a key or value is loaded once for the whole group.
(Where that is a few rows, as when a sequence decodes, all its KV heads are one piece.)
Keys come in tiles; a running maximum and sum make the softmax exact in one pass (Milakov and
Gimelshein, 2018; FlashAttention, 2022), so nothing is allocated that grows with the context. Few
long sequences are split over the context too, and the pieces are put together at the end.

Few rows wait for memory and many for arithmetic, so each has inner loops of its own.
"""

import numpy as np

from common.kernels.cpu.attention_few import LOWEST, MAX_FEW_ROWS, attend_few
from common.kernels.cpu.attention_many import attend_many
from common.kernels.cpu.elementwise import exp32
from common.kernels.cpu.jit import float32_array, helper, int32_array, kernel, next_index
from common.kernels.cpu.pool import spread
from common.kernels.cpu.vector import PANEL, scale

ROWS = 12 * PANEL  # most rows of a piece of work: 384 with AVX-512
ROW_PIECES = 6  # pieces of work for each thread, where there are rows for so many
SPLIT_PIECES = 2  # the same where the context has to be split for it
MIN_SPLIT = 32  # keys that are worth a piece of work of their own
MIN_PARALLEL = 60_000  # multiplications that are worth a second core


@helper
def load_queries(query, queries, first, num_queries, kv_head, heads, group, factor):
    """Rows [heads, num_queries, group] of scaled queries, one after another."""
    head_dim = query.shape[2]
    target = queries.ctypes.data
    for head in range(kv_head * group, (kv_head + heads) * group, group):
        for token in range(first, first + num_queries):
            for g in range(group):
                scale(query[token, head + g].ctypes.data, target, head_dim, np.float32(factor))
                target += head_dim * 4


@helper
def work(
    query, out, layout, places, shape, factor, window, splits, partial, next, thread, num_threads
):
    """Take pieces of work, (query tile, KV heads, split), until none is left."""
    starts, lengths, tables, tiles, pieces = places
    num_kv_heads, group, head_dim, tile_queries = shape
    most_rows = max(tile_queries * group, num_kv_heads * MAX_FEW_ROWS)
    num_rows = (most_rows + PANEL - 1) // PANEL * PANEL
    queries = np.zeros((num_rows, head_dim), np.float32)
    result = np.empty((num_rows, head_dim), np.float32)
    sums = np.empty((3, num_rows), np.float32)  # maximum, sum of weights, last scale factor
    # The last tiles of a long prompt see the most keys: they go first.
    last = len(pieces) * splits - 1
    left = last - next_index(next.ctypes.data)
    while left >= 0:
        piece, split = pieces[left // splits], left % splits
        tile, kv_head, heads = piece[0], piece[1], piece[2]
        seq, first = tiles[tile, 0], tiles[tile, 1]
        num_queries = min(tile_queries, starts[seq + 1] - first)
        rows = num_queries * group
        position = lengths[seq] - (starts[seq + 1] - first)
        load_queries(query, queries, first, num_queries, kv_head, heads, group, factor)
        low, high = 0, position + num_queries
        if window > 0:
            low = max(0, position - window + 1)
        begin = low + (high - low) * split // splits
        end = low + (high - low) * (split + 1) // splits
        sums[0], sums[1], result[:] = LOWEST, 0, 0
        own = (layout[0] + kv_head * layout[5], *layout[1:])
        table = tables[seq]
        where = (own, table, (begin, end), position, group, window)
        if rows <= MAX_FEW_ROWS:
            attend_few(queries, heads, rows, head_dim, *where, sums, result)
        else:
            attend_many(queries, rows, head_dim, *where, sums, result)
        if splits > 1:
            kept = partial[tile, kv_head * rows : (kv_head + heads) * rows, split]
            for row in range(heads * rows):
                kept[row, head_dim], kept[row, head_dim + 1] = sums[0, row], sums[1, row]
                for e in range(head_dim):
                    kept[row, e] = result[row, e]
        else:
            for row in range(heads * rows):
                share = np.float32(1) / sums[1, row]
                head = (kv_head + row // rows) * group + row % group
                target = out[first + row % rows // group, head]
                scale(result[row].ctypes.data, target.ctypes.data, head_dim, share)
        left = last - next_index(next.ctypes.data)


@helper
def merge(out, starts, tiles, shape, splits, partial):
    """The weighted mean of the splits of each row. partial: [tiles, rows, splits, head_dim + 2]."""
    num_kv_heads, group, head_dim, tile_queries = shape
    for tile in range(len(tiles)):
        seq, first = tiles[tile, 0], tiles[tile, 1]
        rows = min(tile_queries, starts[seq + 1] - first) * group
        for row in range(num_kv_heads * rows):
            pieces = partial[tile, row]
            largest = LOWEST
            for split in range(splits):
                largest = max(largest, pieces[split, head_dim])
            total = np.float32(0)
            for split in range(splits):
                factor = exp32(pieces[split, head_dim] - largest)
                pieces[split, head_dim] = factor
                total += factor * pieces[split, head_dim + 1]
            target = out[first + row % rows // group, row // rows * group + row % group]
            target[:] = 0
            for split in range(splits):
                factor = pieces[split, head_dim] / total
                for e in range(head_dim):
                    target[e] += pieces[split, e] * factor


@helper
def choose_tile(num_rows, group, max_query_len):
    """Queries of a tile: about num_rows rows, in whole panels, and equal parts of the longest."""
    rows = min(num_rows // PANEL * PANEL + PANEL, ROWS)
    num_queries = max(1, rows // group)
    num_tiles = max(1, (max_query_len + num_queries - 1) // num_queries)
    return max(1, (max_query_len + num_tiles - 1) // num_tiles)


@helper
def heads_at_once(num_queries, group, num_kv_heads):
    """KV heads of a piece of work: all for few rows, else one."""
    return num_kv_heads if num_queries * group <= MAX_FEW_ROWS else 1


@kernel(floats=("factor",))
def attention(
    query,
    out,
    cache,
    block_stride,
    value_offset,
    block_size,
    row_size,
    kind,
    starts,
    lengths,
    tables,
    table_stride,
    num_tokens,
    num_seqs,
    num_heads,
    num_kv_heads,
    head_dim,
    factor,
    window,
    max_query_len,
    num_threads,
    pool,
):
    """`cache` is the address of the layer's keys in block 0; strides, and the size of a head's row, in
    bytes; kind: of `kv_rows`; window 0: none."""
    queries = float32_array(query, (num_tokens, num_heads, head_dim))
    outs = float32_array(out, (num_tokens, num_heads, head_dim))
    starts_of = int32_array(starts, (num_seqs + 1,))
    lengths_of = int32_array(lengths, (num_seqs,))
    tables_of = int32_array(tables, (num_seqs, table_stride))
    group, token_stride = num_heads // num_kv_heads, num_kv_heads * row_size
    num_rows = num_tokens * num_heads // (ROW_PIECES * num_threads)
    tile_queries = choose_tile(num_rows, group, max_query_len)
    num_tiles, products = 0, 0
    for seq in range(num_seqs):
        num_queries = starts_of[seq + 1] - starts_of[seq]
        num_tiles += (num_queries + tile_queries - 1) // tile_queries
        products += num_queries * lengths_of[seq] * num_heads * head_dim
    tiles = np.empty((num_tiles, 2), np.int64)  # sequence, first token
    all_pieces = np.empty((num_tiles * num_kv_heads, 3), np.int64)  # tile, first KV head, KV heads
    tile, num_pieces = 0, 0
    for seq in range(num_seqs):
        for first in range(starts_of[seq], starts_of[seq + 1], tile_queries):
            tiles[tile, 0], tiles[tile, 1] = seq, first
            num_queries = min(tile_queries, starts_of[seq + 1] - first)
            heads = heads_at_once(num_queries, group, num_kv_heads)
            for kv_head in range(0, num_kv_heads, heads):
                piece = all_pieces[num_pieces]
                piece[0], piece[1], piece[2] = tile, kv_head, heads
                num_pieces += 1
            tile += 1
    pieces = all_pieces[:num_pieces]
    if products < MIN_PARALLEL:
        num_threads = 1
    splits, longest = 1, 0
    if 0 < num_pieces < SPLIT_PIECES * num_threads and num_threads > 1:
        for seq in range(num_seqs):
            longest = max(longest, lengths_of[seq])
        splits = (SPLIT_PIECES * num_threads) // num_pieces
        splits = max(1, min(splits, longest // MIN_SPLIT))
    rows = tile_queries * num_heads if splits > 1 else 0
    partial = np.empty((num_tiles, rows, splits, head_dim + 2), np.float32)
    next = np.zeros(1, np.int64)
    layout = (cache, block_stride, token_stride, value_offset, block_size, row_size, kind)
    shape = (num_kv_heads, group, head_dim, tile_queries)
    places = (starts_of, lengths_of, tables_of, tiles, pieces)
    arguments = (queries, outs, layout, places, shape, factor, window, splits, partial, next)
    spread(work, arguments, num_threads, pool)
    if splits > 1:
        merge(outs, starts_of, tiles, shape, splits, partial)
