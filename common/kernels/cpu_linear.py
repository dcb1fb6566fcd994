"""Linear layers on a CPU, for any number of tokens, from one copy of the weight.

A weight is kept as panels, [num_panels, in_features, PANEL]: what one pass over the depth reads lies
in one piece, so a single token reads memory in order at full speed, and many tokens find a panel
in the cache for every tile of rows.
"""

import numpy as np
from numba import prange

from common.kernels.cpu_jit import float32_array, helper, kernel, next_index
from common.kernels.cpu_vector import MAX_ROWS, PANEL, panel_tile

DEPTH = 1024  # rows of a panel that are used at once: 128 KiB with AVX-512, half of it with AVX2


@helper
def multiply_panel(x, weight, bias, out, panel, num_tokens, depth, num_columns):
    """out[:, the panel's columns] of a product; arguments are addresses and sizes."""
    width = min(PANEL, num_columns - panel * PANEL)
    target, target_stride = out + panel * PANEL * 4, num_columns * 4
    if width < PANEL:
        spare = np.empty((num_tokens, PANEL), np.float32)
        target, target_stride = spare.ctypes.data, PANEL * 4
    num_tiles = (num_tokens + MAX_ROWS - 1) // MAX_ROWS
    for begin in range(0, depth, DEPTH):
        block = weight + (panel * depth + begin) * PANEL * 4
        size = min(DEPTH, depth - begin)
        for tile in range(num_tiles):
            row, end = tile * num_tokens // num_tiles, (tile + 1) * num_tokens // num_tiles
            place = target + row * target_stride
            start, start_stride = bias + panel * PANEL * 4, 0
            if begin > 0:
                start, start_stride = place, target_stride
            panel_tile(
                end - row,
                x + (row * depth + begin) * 4,
                depth * 4,
                block,
                PANEL * 4,
                start,
                start_stride,
                place,
                target_stride,
                size,
                block + size * PANEL * 4 + tile * (size * PANEL * 4 // num_tiles),
                PANEL * 4 // num_tiles,
            )
    if width < PANEL:
        result = float32_array(out, (num_tokens, num_columns))
        for row in range(num_tokens):
            for column in range(width):
                result[row, panel * PANEL + column] = spare[row, column]


@kernel
def linear(x, weight, bias, out, num_tokens, depth, num_columns, num_threads):
    """out = x @ weight.T + bias. x: [num_tokens, depth]; weight: panels; bias: padded to panels."""
    num_panels = (num_columns + PANEL - 1) // PANEL
    chunk = max(1, num_panels // (num_threads * 8))
    counter = np.zeros(1, np.int64)
    for _ in prange(num_threads):
        begin = next_index(counter.ctypes.data) * chunk
        while begin < num_panels:
            for panel in range(begin, min(begin + chunk, num_panels)):
                multiply_panel(x, weight, bias, out, panel, num_tokens, depth, num_columns)
            begin = next_index(counter.ctypes.data) * chunk
