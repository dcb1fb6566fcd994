"""Linear layers on a CPU, for any number of tokens, from one copy of the weight.

A weight is kept as panels, [num_panels, in_features, PANEL]: what one pass over the depth reads lies
in one piece, so a single token reads memory in order at full speed, and many tokens find a panel
in the cache for every tile of rows. While a panel is multiplied, the next is asked for.
"""

import numpy as np

from common.kernels.cpu.jit import float32_array, helper, kernel, next_index
from common.kernels.cpu.pool import spread
from common.kernels.cpu.vector import FEW_ROWS, MAX_ROWS, PANEL, panel_tile

DEPTH = 640  # rows of a panel that are used at once: 80 KiB with AVX-512, half of it with AVX2
BLOCK = 131_072  # floats of x that are used together: 512 KiB, to stay in the second-level cache
LINE = 64  # bytes between counters, so that no two lie in one line of the cache


@helper
def multiply_panel(x, weight, bias, out, panel, num_tokens, depth, num_columns):
    """out[:, the panel's columns] of a product; arguments are addresses and sizes."""
    width = min(PANEL, num_columns - panel * PANEL)
    target, target_stride = out + panel * PANEL * 4, num_columns * 4
    if width < PANEL:
        spare = np.empty((num_tokens, PANEL), np.float32)
        target, target_stride = spare.ctypes.data, PANEL * 4
    # A tile of many rows asks for half of the next panel at most: then there are two at least.
    num_tiles = max((num_tokens + MAX_ROWS - 1) // MAX_ROWS, 1 + (num_tokens > FEW_ROWS))
    num_blocks = max(1, (depth + DEPTH - 1) // DEPTH)
    for i in range(num_blocks):
        begin = i * depth // num_blocks
        size = (i + 1) * depth // num_blocks - begin
        block = weight + (panel * depth + begin) * PANEL * 4
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
                4,
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


@helper
def work(x, weight, bias, out, num_tokens, depth, num_columns, counters, thread, num_threads):
    """Units of work, (block of rows, panel): a thread's own share in order, then what is left of
    the others', since one slowed by another process gets less done."""
    num_panels = (num_columns + PANEL - 1) // PANEL
    num_blocks = max(1, num_tokens * depth // BLOCK)
    num_units = num_blocks * num_panels
    for i in range(num_threads):
        owner = (thread + i) % num_threads
        begin, end = owner * num_units // num_threads, (owner + 1) * num_units // num_threads
        unit = begin + next_index(counters.ctypes.data + owner * LINE)
        while unit < end:
            block, panel = unit // num_panels, unit % num_panels
            row = block * num_tokens // num_blocks
            count = (block + 1) * num_tokens // num_blocks - row
            place = out + row * num_columns * 4
            rows = x + row * depth * 4
            multiply_panel(rows, weight, bias, place, panel, count, depth, num_columns)
            unit = begin + next_index(counters.ctypes.data + owner * LINE)


@kernel
def linear(x, weight, bias, out, num_tokens, depth, num_columns, num_threads, pool):
    """out = x @ weight.T + bias. x: [num_tokens, depth]; weight: panels; bias: padded to panels."""
    counters = np.zeros((num_threads, LINE // 8), np.int64)
    arguments = x, weight, bias, out, num_tokens, depth, num_columns, counters
    spread(work, arguments, num_threads, pool)
