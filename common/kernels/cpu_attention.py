"""Paged attention on a CPU: any mix of query lengths in one call, in one pass over the keys.

A piece of work is one sequence, one KV head, and up to ROWS rows: the queries of all heads that
share the KV head, for as many tokens as fit. So a key or value is loaded once for the whole group.
Keys come in tiles; a running maximum and sum make the softmax exact in one pass (Milakov and
Gimelshein, 2018; FlashAttention, 2022), so nothing is allocated that grows with the context. Few
long sequences are split over the context too, and the pieces are put together at the end.
"""

import numpy as np
from numba import prange

from common.kernels.cpu_elementwise import exp32
from common.kernels.cpu_jit import float32_array, helper, int32_array, kernel, next_index
from common.kernels.cpu_vector import (
    LANES,
    MAX_DOTS,
    MAX_ROWS,
    PANEL,
    dots,
    half_panel_tile,
    highest,
    panel_tile,
    prefetch_lines,
)

ROWS = 8 * MAX_ROWS  # rows of a piece of work: 96, or 48 with AVX2
KEYS = 128  # keys of a tile
DIRECT_ROWS = 8  # up to so many rows, keys are not worth transposing
AHEAD = 48  # keys between the one in use and the one asked for
MIN_SPLIT = 32  # keys that are worth a piece of work of their own
MIN_PARALLEL = 60_000  # multiplications that are worth a second core
MASKED = np.float32(-1e30)
LOWEST = np.float32(-1e20)  # above MASKED: rows that have seen nothing yet give masked keys nothing


@helper
def key_address(layout, table, token):
    """Where a token's key lies; its value lies layout's value_offset further."""
    cache, block_stride, token_stride, _, block_size = layout
    return cache + table[token // block_size] * block_stride + token % block_size * token_stride


@helper
def score_directly(queries, heads, rows, head_dim, layout, table, begin, count, scores):
    """Row by row, for few rows, but for all KV heads: memory is read in order, as it likes best."""
    token_stride, value_offset, block_size = layout[2:]
    done = 0
    while done < count:
        token = begin + done
        run = min(count - done, block_size - token % block_size)  # tokens that follow each other
        keys = key_address(layout, table, token)
        for i in range(done, done + run):
            for head in range(heads):
                key = keys + head * head_dim * 4
                prefetch_lines(key + value_offset, head_dim * 4)
                for row in range(head * rows, (head + 1) * rows, MAX_DOTS):
                    dots(
                        min(MAX_DOTS, (head + 1) * rows - row),
                        queries.ctypes.data + row * head_dim * 4,
                        head_dim * 4,
                        key,
                        scores.ctypes.data + (row * KEYS + i) * 4,
                        KEYS * 4,
                        head_dim,
                    )
            keys += token_stride
        done += run


@helper
def score(queries, rows, head_dim, layout, table, begin, count, scores, keys):
    """scores[row, i] = queries[row] * key of token begin + i: a product with transposed keys."""
    score_stride = KEYS * 4
    for i in range(count):
        key = float32_array(key_address(layout, table, begin + i), (head_dim,))
        panel, column = i // PANEL, i % PANEL
        for e in range(head_dim):
            keys[panel, e, column] = key[e]
    zeros = np.zeros(PANEL, np.float32)
    for panel in range((count + PANEL - 1) // PANEL):
        place = keys.ctypes.data + panel * head_dim * PANEL * 4
        for row in range(0, rows, MAX_ROWS):
            panel_tile(
                min(MAX_ROWS, rows - row),
                queries.ctypes.data + row * head_dim * 4,
                head_dim * 4,
                place,
                PANEL * 4,
                zeros.ctypes.data,
                0,
                scores.ctypes.data + row * score_stride + panel * PANEL * 4,
                score_stride,
                head_dim,
                place,
                PANEL * 4,
            )


@helper
def softmax_step(scores, sums, result, heads, rows, count, begin, position, group, window):
    """Scores of a tile to weights; what the rows have summed so far is scaled to the new maximum.

    `sums` is [2, heads * rows]: the running maximum, and the sum of weights. Row r of a head is a
    query at position + r // group, which sees tokens up to itself.
    """
    width = (count + LANES - 1) // LANES * LANES
    for row in range(heads * rows):
        line = scores[row]
        last = (
            position + row % rows // group - begin
        )  # place in this tile of the last visible token
        for i in range(max(0, min(last + 1, count)), width):
            line[i] = MASKED
        if window > 0:
            for i in range(min(count, max(0, last - window + 1))):
                line[i] = MASKED
        largest = highest(line.ctypes.data, width, sums[0, row])
        factor = exp32(sums[0, row] - largest)
        total = np.float32(0)
        for i in range(width):
            weight = exp32(line[i] - largest)
            line[i] = weight
            total += weight
        sums[0, row] = largest
        sums[1, row] = sums[1, row] * factor + total
        if factor < 1:
            sum_row = result[row]
            for e in range(len(sum_row)):
                sum_row[e] *= factor


@helper
def add_values(scores, heads, rows, head_dim, layout, table, begin, count, end, result):
    """result[row] += sum of scores[row, i] * value of token begin + i."""
    token_stride, value_offset, block_size = layout[2:]
    done = 0
    while done < count:
        token = begin + done
        run = min(count - done, block_size - token % block_size)  # tokens that follow each other
        values = key_address(layout, table, token) + value_offset
        ahead = values  # the keys of the next tile are asked for while values are summed
        if token + KEYS < end:
            ahead = key_address(layout, table, token + KEYS)
        for head in range(heads):
            for row in range(head * rows, (head + 1) * rows, MAX_ROWS):
                num_rows = min(MAX_ROWS, (head + 1) * rows - row)
                weights = scores.ctypes.data + (row * KEYS + done) * 4
                column = 0
                while column < head_dim:
                    place = result.ctypes.data + (row * head_dim + column) * 4
                    value = values + (head * head_dim + column) * 4
                    strides = (place, head_dim * 4, place, head_dim * 4)
                    if head_dim - column >= PANEL:
                        panel_tile(
                            num_rows,
                            weights,
                            KEYS * 4,
                            value,
                            token_stride,
                            *strides,
                            run,
                            ahead + (head * head_dim + column) * 4,
                            token_stride,
                        )
                        column += PANEL
                    else:
                        half_panel_tile(
                            num_rows,
                            weights,
                            KEYS * 4,
                            value,
                            token_stride,
                            *strides,
                            run,
                            ahead + (head * head_dim + column) * 4,
                            token_stride,
                        )
                        column += LANES
        done += run


@helper
def load_queries(query, queries, first, num_queries, kv_head, heads, group, scale):
    """Rows [heads, num_queries, group] of scaled queries, one after another."""
    row = 0
    for head in range(kv_head * group, (kv_head + heads) * group, group):
        for token in range(first, first + num_queries):
            for g in range(group):
                source, target = query[token, head + g], queries[row]
                for e in range(len(source)):
                    target[e] = source[e] * np.float32(scale)
                row += 1


@helper
def work(query, out, layout, places, shape, scale, window, splits, partial, next):
    """Take pieces of work, (query tile, KV heads, split), until none is left."""
    starts, lengths, tables, tiles = places
    num_kv_heads, heads, group, head_dim, tile_queries = shape
    num_rows = heads * tile_queries * group
    queries = np.empty((num_rows, head_dim), np.float32)
    result = np.empty((num_rows, head_dim), np.float32)
    scores, sums = np.empty((num_rows, KEYS), np.float32), np.empty((2, num_rows), np.float32)
    keys = np.empty((KEYS // PANEL, head_dim, PANEL), np.float32)
    parts = num_kv_heads // heads
    num_pieces = len(tiles) * parts * splits
    piece = next_index(next.ctypes.data)
    while piece < num_pieces:
        # The last tiles of a long prompt see the most keys: they go first.
        tile = len(tiles) - 1 - piece // (parts * splits)
        kv_head, split = piece // splits % parts * heads, piece % splits
        seq, first = tiles[tile, 0], tiles[tile, 1]
        num_queries = min(tile_queries, starts[seq + 1] - first)
        rows = num_queries * group
        position = lengths[seq] - (starts[seq + 1] - first)
        load_queries(query, queries, first, num_queries, kv_head, heads, group, scale)
        low, high = 0, position + num_queries
        if window > 0:
            low = max(0, position - window + 1)
        begin = low + (high - low) * split // splits
        end = low + (high - low) * (split + 1) // splits
        sums[0], sums[1], result[:] = LOWEST, 0, 0
        own = (layout[0] + kv_head * head_dim * 4, *layout[1:])
        table = tables[seq]
        while begin < end:
            count = min(KEYS, end - begin)
            if rows <= DIRECT_ROWS:
                score_directly(queries, heads, rows, head_dim, own, table, begin, count, scores)
            else:
                score(queries, rows, head_dim, own, table, begin, count, scores, keys)
            softmax_step(scores, sums, result, heads, rows, count, begin, position, group, window)
            add_values(scores, heads, rows, head_dim, own, table, begin, count, end, result)
            begin += count
        if splits > 1:
            kept = partial[tile, kv_head * rows : (kv_head + heads) * rows, split]
            for row in range(heads * rows):
                kept[row, head_dim], kept[row, head_dim + 1] = sums[0, row], sums[1, row]
                for e in range(head_dim):
                    kept[row, e] = result[row, e]
        else:
            for row in range(heads * rows):
                factor = np.float32(1) / sums[1, row]
                head = (kv_head + row // rows) * group + row % group
                target = out[first + row % rows // group, head]
                for e in range(head_dim):
                    target[e] = result[row, e] * factor
        piece = next_index(next.ctypes.data)


@helper
def merge(out, starts, tiles, shape, splits, partial):
    """The weighted mean of the splits of each row. partial: [tiles, rows, splits, head_dim + 2]."""
    num_kv_heads, _, group, head_dim, tile_queries = shape
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


@kernel
def attention(
    query,
    out,
    cache,
    block_stride,
    value_offset,
    block_size,
    starts,
    lengths,
    tables,
    table_stride,
    num_tokens,
    num_seqs,
    num_heads,
    num_kv_heads,
    head_dim,
    scale,
    window,
    max_query_len,
    num_threads,
):
    """`cache` is the address of the layer's keys in block 0; strides in bytes; window 0: none."""
    queries = float32_array(query, (num_tokens, num_heads, head_dim))
    outs = float32_array(out, (num_tokens, num_heads, head_dim))
    starts_of = int32_array(starts, (num_seqs + 1,))
    lengths_of = int32_array(lengths, (num_seqs,))
    tables_of = int32_array(tables, (num_seqs, table_stride))
    group = num_heads // num_kv_heads
    tile_queries = min(max(1, ROWS // group), max_query_len)
    heads = num_kv_heads if max_query_len * group <= DIRECT_ROWS else 1
    parts = num_kv_heads // heads
    num_tiles, products = 0, 0
    for seq in range(num_seqs):
        num_queries = starts_of[seq + 1] - starts_of[seq]
        num_tiles += (num_queries + tile_queries - 1) // tile_queries
        products += num_queries * lengths_of[seq] * num_heads * head_dim
    tiles = np.empty((num_tiles, 2), np.int64)  # sequence, first token
    tile = 0
    for seq in range(num_seqs):
        for first in range(starts_of[seq], starts_of[seq + 1], tile_queries):
            tiles[tile, 0], tiles[tile, 1] = seq, first
            tile += 1
    if products < MIN_PARALLEL:
        num_threads = 1
    splits, longest = 1, 0
    if 0 < num_tiles * parts < 4 * num_threads and num_threads > 1:
        for seq in range(num_seqs):
            longest = max(longest, lengths_of[seq])
        splits = (4 * num_threads) // (num_tiles * parts)
        splits = max(1, min(splits, longest // MIN_SPLIT))
    rows = tile_queries * num_heads if splits > 1 else 0
    partial = np.empty((num_tiles, rows, splits, head_dim + 2), np.float32)
    next = np.zeros(1, np.int64)
    # Tuples are made within the parallel loop: it cannot take them from outside.
    if num_threads == 1:
        layout = (cache, block_stride, num_kv_heads * head_dim * 4, value_offset, block_size)
        shape = (num_kv_heads, heads, group, head_dim, tile_queries)
        places = (starts_of, lengths_of, tables_of, tiles)
        work(queries, outs, layout, places, shape, scale, window, splits, partial, next)
    else:
        for _ in prange(num_threads):
            layout = (cache, block_stride, num_kv_heads * head_dim * 4, value_offset, block_size)
            shape = (num_kv_heads, heads, group, head_dim, tile_queries)
            places = (starts_of, lengths_of, tables_of, tiles)
            work(queries, outs, layout, places, shape, scale, window, splits, partial, next)
    if splits > 1:
        merge(
            outs,
            starts_of,
            tiles,
            (num_kv_heads, heads, group, head_dim, tile_queries),
            splits,
            partial,
        )
