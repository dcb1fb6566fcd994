"""Attention's inner loops for few queries: decode steps, where reading the keys takes the time.

All KV heads of a sequence are done together, and keys and values are read where they lie, in order,
as memory likes it best; what comes next is asked for ahead.
"""

import numpy as np

from common.kernels.cpu.elementwise import exp32
from common.kernels.cpu.jit import helper
from common.kernels.cpu.kv_rows import FLOAT32, dots_codes, expand, factor_of
from common.kernels.cpu.vector import (
    LANES,
    MAX_DOTS,
    MAX_ROWS,
    PANEL,
    dots,
    highest,
    make_tile,
    prefetch_lines,
)

MAX_FEW_ROWS = 8  # rows of a KV head that count as few
TILE_ROWS = min(MAX_ROWS, MAX_FEW_ROWS)
panel_tile, half_panel_tile = (make_tile(vectors, TILE_ROWS, is_sum=True) for vectors in (2, 1))
KEYS = 128  # keys of a tile
MASKED = np.float32(-1e30)
LOWEST = np.float32(-1e20)  # above MASKED: rows that have seen nothing yet give masked keys nothing


@helper
def key_address(layout, table, token):
    """Where a token's key lies; its value lies layout's value_offset further.

    layout: (address of the keys in block 0, block_stride, token_stride, value_offset, block_size,
    row_size, kind): all but the last and block_size in bytes. A row is one head's key or value.
    """
    cache, block_stride, token_stride, _, block_size = layout[:5]
    return cache + table[token // block_size] * block_stride + token % block_size * token_stride


@helper
def score(queries, heads, rows, head_dim, layout, table, begin, count, scores):
    """scores[row, i] = queries[row] * key of token begin + i; `rows` rows for each KV head."""
    token_stride, value_offset, block_size = layout[2:5]
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
def score_codes(queries, heads, rows, head_dim, layout, table, begin, count, scores):
    """The same for keys that are codes. (A choice in the loop of `score` costs both of them time.)"""
    token_stride, value_offset, block_size, row_size, kind = layout[2:]
    done = 0
    while done < count:
        token = begin + done
        run = min(count - done, block_size - token % block_size)
        keys = key_address(layout, table, token)
        for i in range(done, done + run):
            for head in range(heads):
                key = keys + head * row_size
                prefetch_lines(key + value_offset, row_size)
                for row in range(head * rows, (head + 1) * rows, MAX_DOTS):
                    dots_codes(
                        factor_of(kind, key, head_dim),
                        kind,
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
def expand_rows(kind, codes, stride, count, head_dim, out):
    """`count` rows of codes, `stride` bytes apart, to [count, head_dim] float32. Addresses."""
    for _ in range(count):
        expand(kind, codes, out, head_dim, factor_of(kind, codes, head_dim))
        codes += stride
        out += head_dim * 4


@helper
def add_values(scores, heads, rows, head_dim, layout, table, begin, count, end, expanded, result):
    """result[row] += sum of scores[row, i] * value of token begin + i.

    expanded: room for [count, head_dim] values that are codes.
    """
    token_stride, value_offset, block_size, row_size, kind = layout[2:]
    done = 0
    while done < count:
        token = begin + done
        run = min(count - done, block_size - token % block_size)  # tokens that follow each other
        values = key_address(layout, table, token) + value_offset
        ahead = values  # the keys of the next tile are asked for while values are summed
        if token + KEYS < end:
            ahead = key_address(layout, table, token + KEYS)
        for head in range(heads):
            source, stride, element = values, token_stride, 4
            if kind != FLOAT32:
                source, stride, element = expanded.ctypes.data, head_dim * 4, 1
                expand_rows(kind, values, token_stride, run, head_dim, source)
            for row in range(head * rows, (head + 1) * rows, TILE_ROWS):
                num_rows = min(TILE_ROWS, (head + 1) * rows - row)
                weights = scores.ctypes.data + (row * KEYS + done) * 4
                column = 0
                while column < head_dim:
                    place = result.ctypes.data + (row * head_dim + column) * 4
                    value = (weights, KEYS * 4, 4, source + column * 4, stride)
                    sums = (place, head_dim * 4, place, head_dim * 4, run)
                    arguments = value + sums + (ahead + column * element, token_stride)
                    if head_dim - column >= PANEL:
                        panel_tile(num_rows, *arguments)
                        column += PANEL
                    else:
                        half_panel_tile(num_rows, *arguments)
                        column += LANES
            values += row_size
            ahead += row_size
        done += run


@helper
def attend_few(
    queries, heads, rows, head_dim, layout, table, span, position, group, window, sums, result
):
    """All KV heads' rows over the keys of a span, in tiles. Arrays as in `attention.work`."""
    scores = np.empty((heads * rows, KEYS), np.float32)
    kept = 0 if layout[6] == FLOAT32 else KEYS
    expanded = np.empty((kept, head_dim), np.float32)
    begin, end = span
    while begin < end:
        count = min(KEYS, end - begin)
        if layout[6] == FLOAT32:
            score(queries, heads, rows, head_dim, layout, table, begin, count, scores)
        else:
            score_codes(queries, heads, rows, head_dim, layout, table, begin, count, scores)
        softmax_step(scores, sums, result, heads, rows, count, begin, position, group, window)
        tile = (begin, count, end, expanded)
        add_values(scores, heads, rows, head_dim, layout, table, *tile, result)
        begin += count
