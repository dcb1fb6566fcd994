"""Linear layers whose inputs are rounded to int8: weights of 8 or 4 bits, sums of integers.

A call rounds its inputs first, each group of a token by itself, and then multiplies panels as
`linear` does. Few inputs are rounded by the calling core, before it wakes the others.
"""

import numpy as np

from common.kernels.cpu.elementwise import share
from common.kernels.cpu.integer_round import round_rows
from common.kernels.cpu.integer_tile import CHUNK, INFO, PAD, ROWS, integer_tile
from common.kernels.cpu.jit import (
    float32_array,
    helper,
    kernel,
    next_index,
)
from common.kernels.cpu.linear import LINE
from common.kernels.cpu.pool import spread
from common.kernels.cpu.vector import PANEL

BLOCK = 262_144  # bytes of rounded inputs that are used together, in the second-level cache
PARALLEL_ROUND = 16_384  # inputs from which a second core is worth its waking
ROWS_8, ROWS_4 = ROWS[8], ROWS[4]


@helper
def multiply_panel(x, info, weight, bias, out, panel, num_tokens, sizes):
    """out[:, the panel's columns] of a product; arguments are addresses and sizes."""
    bits, num_groups, group_chunks, half, has_minimums, panel_bytes, num_columns = sizes
    width = min(PANEL, num_columns - panel * PANEL)
    target, target_stride = out + panel * PANEL * 4, num_columns * 4
    if width < PANEL:
        spare = np.empty((num_tokens, PANEL), np.float32)
        target, target_stride = spare.ctypes.data, PANEL * 4
    num_chunks = num_groups * group_chunks
    x_stride = num_chunks * (CHUNK if bits == 4 else PAD * 2)
    info_stride = (num_chunks if bits == 4 else num_groups) * INFO
    most = ROWS_4 if bits == 4 else ROWS_8
    num_tiles = (num_tokens + most - 1) // most
    block = weight + panel * panel_bytes
    for tile in range(num_tiles):
        row, end = share(num_tokens, tile, num_tiles), share(num_tokens, tile + 1, num_tiles)
        integer_tile(
            bits,
            end - row,
            x + row * x_stride,
            x_stride,
            info + row * info_stride,
            info_stride,
            block,
            num_groups,
            group_chunks,
            half,
            has_minimums,
            bias + panel * PANEL * 4,
            0,
            target + row * target_stride,
            target_stride,
            block + panel_bytes + share(panel_bytes, tile, num_tiles),
            panel_bytes // (num_chunks * num_tiles),
        )
    if width < PANEL:
        result = float32_array(out, (num_tokens, num_columns))
        for row in range(num_tokens):
            for column in range(width):
                result[row, panel * PANEL + column] = spare[row, column]


@helper
def work(codes, info, weight, bias, out, num_tokens, sizes, counters, thread, num_threads):
    """Units of work, (block of rows, panel), shared out as `linear.work` does."""
    bits, num_groups, group_chunks, _, _, _, num_columns = sizes
    num_chunks = num_groups * group_chunks
    x_stride = num_chunks * (CHUNK if bits == 4 else PAD * 2)
    info_stride = (num_chunks if bits == 4 else num_groups) * INFO
    num_panels = (num_columns + PANEL - 1) // PANEL
    num_blocks = max(1, num_tokens * x_stride // BLOCK)
    num_units = num_blocks * num_panels
    for i in range(num_threads):
        owner = (thread + i) % num_threads
        begin, end = share(num_units, owner, num_threads), share(num_units, owner + 1, num_threads)
        unit = begin + next_index(counters.ctypes.data + owner * LINE)
        while unit < end:
            block, panel = unit // num_panels, unit % num_panels
            row = share(num_tokens, block, num_blocks)
            count = share(num_tokens, block + 1, num_blocks) - row
            rows = codes.ctypes.data + row * x_stride
            facts = info.ctypes.data + row * info_stride
            place = out + row * num_columns * 4
            multiply_panel(rows, facts, weight, bias, place, panel, count, sizes)
            unit = begin + next_index(counters.ctypes.data + owner * LINE)


@kernel
def integer_linear(
    x,
    weight,
    bias,
    out,
    num_tokens,
    depth,
    num_columns,
    bits,
    group,
    group_chunks,
    offset,
    half,
    has_minimums,
    panel_bytes,
    num_threads,
    pool,
):
    """out = round(x) @ weight.T + bias. x: [num_tokens, depth]; weight: panels of an `IntegerWeight`,
    whose fields the sizes are; bias: padded to panels."""
    num_groups = depth // group
    num_chunks = num_groups * group_chunks
    width = num_chunks * (CHUNK if bits == 4 else PAD * 2)
    codes = np.empty(num_tokens * width, np.uint8)
    info = np.empty(num_tokens * (num_chunks if bits == 4 else num_groups) * INFO, np.uint8)
    counters = np.zeros((num_threads, LINE // 8), np.int64)
    rounders = 1 if num_tokens * depth < PARALLEL_ROUND else num_threads
    rounding = (x, bits, codes, info, num_tokens, depth, group, group_chunks, offset)
    spread(round_rows, rounding, rounders, pool)
    sizes = bits, num_groups, group_chunks, half, has_minimums, panel_bytes, num_columns
    products = (codes, info, weight, bias, out, num_tokens, sizes, counters)
    spread(work, products, num_threads, pool)
