"""Attention's inner loops for many queries: prompts, where arithmetic takes the time.

The queries of a piece, PANEL of them at a time, are the lanes of a panel, and keys are its rows: a
tile of scores is keys times transposed queries, the softmax goes down the columns, and the same
panel, read the other way, is multiplied with the values. So only the queries are ever transposed,
once, and keys and values are copied to where they lie close together, whatever the block size.
"""

import numpy as np

from common.kernels.cpu.attention_few import KEYS, MASKED, expand_rows, key_address
from common.kernels.cpu.jit import helper
from common.kernels.cpu.kv_rows import FLOAT32
from common.kernels.cpu.softmax import softmax_step, transpose
from common.kernels.cpu.vector import LANES, MAX_ROWS, PANEL, make_tile, panel_tile, scale

sum_tile, half_sum_tile = make_tile(2, is_sum=True), make_tile(1, is_sum=True)


@helper
def transpose_queries(queries, panels):
    """Rows [rows, head_dim] to panels [panel, head_dim, PANEL]. The last one is filled, too."""
    num_panels, head_dim = panels.shape[:2]
    for row in range(0, num_panels * PANEL, LANES):
        panel = panels.ctypes.data + (row // PANEL * head_dim * PANEL + row % PANEL) * 4
        source = queries.ctypes.data + row * head_dim * 4
        for e in range(0, head_dim, LANES):
            transpose(source + e * 4, head_dim * 4, panel + e * PANEL * 4, PANEL * 4)


@helper
def gather(layout, table, begin, count, head_dim, keys, values):
    """Copy keys and values of tokens from `begin` on to [count, head_dim] each, two addresses."""
    token_stride, value_offset, block_size, _, kind = layout[2:]
    done = 0
    while done < count:
        token = begin + done
        run = min(count - done, block_size - token % block_size)  # tokens that follow each other
        place = key_address(layout, table, token)
        if kind != FLOAT32:
            offset = done * head_dim * 4
            expand_rows(kind, place, token_stride, run, head_dim, keys + offset)
            place += value_offset
            expand_rows(kind, place, token_stride, run, head_dim, values + offset)
            done += run
            continue
        for i in range(done, done + run):
            scale(place, keys + i * head_dim * 4, head_dim, np.float32(1))
            scale(place + value_offset, values + i * head_dim * 4, head_dim, np.float32(1))
            place += token_stride
        done += run


@helper
def score_panel(queries, keys, head_dim, count, zeros, scores):
    """scores[i, lane] = keys[i] * query of the lane. All arrays are addresses."""
    for key in range(0, count, MAX_ROWS):
        num_keys, rows = min(MAX_ROWS, count - key), keys + key * head_dim * 4
        target = scores + key * PANEL * 4
        strides = (zeros, 0, target, PANEL * 4, head_dim, rows, 0)
        panel_tile(num_keys, rows, head_dim * 4, 4, queries, PANEL * 4, *strides)


@helper
def mask_panel(scores, columns, count, position, row, group, window):
    """Hide what the lanes' queries may not see: keys after them, and those that left the window.

    Lane c is row `row` + c of the piece; positions count from the first key of the tile.
    """
    for column in range(columns):
        last = position + (row + column) // group
        for i in range(max(0, last + 1), count):
            scores[i, column] = MASKED
        if window > 0:
            for i in range(min(count, max(0, last - window + 1))):
                scores[i, column] = MASKED


@helper
def scale_rows(result, factors, first, count):
    """result[row] *= factors[row] for `count` rows from `first` on; most factors are 1."""
    for row in range(first, first + count):
        factor = factors[row]
        if factor < 1:
            place = result.ctypes.data + row * result.shape[1] * 4
            scale(place, place, result.shape[1], factor)


@helper
def add_panel(columns, scores, values, head_dim, count, result):
    """result[lane] += sum of scores[i, lane] * values[i]. All arrays are addresses."""
    for row in range(0, columns, MAX_ROWS):
        num_rows, weights = min(MAX_ROWS, columns - row), scores + row * 4
        column = 0
        while column < head_dim:
            place, value = result + (row * head_dim + column) * 4, values + column * 4
            rest = (place, head_dim * 4, place, head_dim * 4, count, value, 0)
            if head_dim - column >= PANEL:
                sum_tile(num_rows, weights, 4, PANEL * 4, value, head_dim * 4, *rest)
                column += PANEL
            else:
                half_sum_tile(num_rows, weights, 4, PANEL * 4, value, head_dim * 4, *rest)
                column += LANES


@helper
def attend_many(
    queries, rows, head_dim, layout, table, span, position, group, window, sums, result
):
    """One KV head's rows over the keys of a span, in tiles. Arrays as in `attention.work`."""
    panels = np.empty(((rows + PANEL - 1) // PANEL, head_dim, PANEL), np.float32)
    keys, values = np.empty((KEYS, head_dim), np.float32), np.empty((KEYS, head_dim), np.float32)
    scores, zeros = np.empty((KEYS, PANEL), np.float32), np.zeros(PANEL, np.float32)
    transpose_queries(queries, panels)
    begin, end = span
    while begin < end:
        count = min(KEYS, end - begin)
        gather(layout, table, begin, count, head_dim, keys.ctypes.data, values.ctypes.data)
        for row in range(0, rows, PANEL):
            columns = min(PANEL, rows - row)
            # Keys after the last query of the panel are left out; the others' are masked.
            seen = min(count, position + (row + columns - 1) // group + 1 - begin)
            if seen <= 0:
                continue
            panel = panels.ctypes.data + row * head_dim * 4
            place = scores.ctypes.data
            score_panel(panel, keys.ctypes.data, head_dim, seen, zeros.ctypes.data, place)
            if begin + seen > position + 1 or window > 0:
                mask_panel(scores, columns, seen, position - begin, row, group, window)
            address = sums.ctypes.data + row * 4
            stride = sums.shape[1] * 4
            softmax_step(place, seen, address, address + stride, address + 2 * stride)
            scale_rows(result, sums[2], row, columns)
            into = result.ctypes.data + row * head_dim * 4
            add_panel(columns, place, values.ctypes.data, head_dim, seen, into)
        begin += count
