"""Linear layers with quantised weights on a CPU, inputs in float32, for all kinds of codes.

A decode step waits for memory, so fewer bytes a weight are less time, as long as unpacking keeps
up: codes are unpacked in registers, and a group's sum is scaled once (a sum of codes times a scale
is the sum of products). What a minimum adds is the same for all inputs of a group: minimum * the sum
of the inputs. With many tokens a code is unpacked again for every tile of rows. For whole numbers
that costs nothing, since multiply-adds need other units; where it does, a block of a panel is
unpacked once, into the nearest cache, and multiplied as a float panel is.
"""

import numpy as np

from common.kernels.cpu.jit import (
    byte_array,
    float32_array,
    helper,
    int64_array,
    kernel,
    next_index,
)
from common.kernels.cpu.linear import BLOCK, LINE
from common.kernels.cpu.pool import spread
from common.kernels.cpu.quantized_codes import widen
from common.kernels.cpu.quantized_vector import expand, quantized_tile
from common.kernels.cpu.vector import FEW_ROWS, LANES, MAX_ROWS, PANEL, panel_tile

DEPTH = 320  # rows of a panel that are unpacked at once

# What a weight is to a kernel: so many int64.
(
    KIND,
    DTYPE,  # of scales
    MINIMUM_DTYPE,
    HAS_TERMS,  # minimums, or an offset of all codes
    OFFSET,
    HIGH_FACTOR,  # a panel's second half of codes is so many times too large
    GROUP,
    IN_FEATURES,
    OUT_FEATURES,
    SCALE_BYTES,  # of one
    MINIMUM_BYTES,
    CODE_BYTES,  # of a panel, one step in depth
    MOST_TOKENS,  # for which codes are unpacked in registers
    CODES,  # addresses from here on
    SCALES,
    MINIMUMS,
    ROW_SCALES,
    ROW_STRIDE,
    BIAS,
) = range(19)
NUM_FIELDS = 19


@helper
def load_scales(weight, panel, scales, minimums):
    """A panel's scales and terms to add, as floats; both are [num_groups, PANEL]."""
    count = scales.size
    place = weight[SCALES] + panel * count * weight[SCALE_BYTES]
    widen(weight[DTYPE], place, scales.ctypes.data, count)
    row_scales = float32_array(weight[ROW_SCALES] + panel * weight[ROW_STRIDE], PANEL)
    if weight[MINIMUM_BYTES] > 0:
        place = weight[MINIMUMS] + panel * count * weight[MINIMUM_BYTES]
        widen(weight[MINIMUM_DTYPE], place, minimums.ctypes.data, count)
    else:
        minimums[:] = 0
    offset = np.float32(weight[OFFSET])
    high = np.float32(1) / np.float32(weight[HIGH_FACTOR])
    for group in range(len(scales)):
        for i in range(PANEL):
            scale = scales[group, i] * row_scales[i]
            minimums[group, i] += offset * scale
            scales[group, i] = scale * (high if i >= LANES else np.float32(1))


@helper
def multiply_few(x, sums, weight, out, out_stride, panel, num_tokens, scales, minimums):
    """Codes unpacked in registers, for MAX_ROWS tokens at once or up to FEW_ROWS."""
    depth, group = weight[IN_FEATURES], weight[GROUP]
    num_groups = depth // group
    size = depth * weight[CODE_BYTES]
    codes = weight[CODES] + panel * size
    row, end = 0, 0
    while end < num_tokens:
        row, left = end, num_tokens - end
        num_tiles = (left + FEW_ROWS - 1) // FEW_ROWS
        end += MAX_ROWS if left >= MAX_ROWS else (left + num_tiles - 1) // num_tiles
        quantized_tile(
            weight[KIND],
            end - row,
            x + row * depth * 4,
            depth * 4,
            codes,
            scales.ctypes.data,
            minimums.ctypes.data if weight[HAS_TERMS] else 0,
            sums + row * num_groups * 4,
            num_groups * 4,
            weight[BIAS] + panel * PANEL * 4,
            out + row * out_stride,
            out_stride,
            num_groups,
            group,
            codes + size,
        )


@helper
def multiply_many(x, weight, out, out_stride, panel, num_tokens, scales, minimums, block):
    """A block of the panel unpacked, then multiplied as floats."""
    depth, group, width = weight[IN_FEATURES], weight[GROUP], weight[CODE_BYTES]
    codes = weight[CODES] + panel * depth * width
    num_tiles = (num_tokens + MAX_ROWS - 1) // MAX_ROWS
    num_blocks = max(1, (depth + DEPTH - 1) // DEPTH)
    unpacked = block.ctypes.data
    for i in range(num_blocks):
        begin, end = i * depth // num_blocks, (i + 1) * depth // num_blocks
        k = begin
        while k < end:
            number = k // group
            stop = min((number + 1) * group, end)
            place = codes + k * width
            own = number * PANEL * 4
            expand(
                weight[KIND],
                place,
                scales.ctypes.data + own,
                minimums.ctypes.data + own,
                unpacked + (k - begin) * PANEL * 4,
                stop - k,
                place + depth * width,
            )
            k = stop
        for tile in range(num_tiles):
            row, last = tile * num_tokens // num_tiles, (tile + 1) * num_tokens // num_tiles
            place = out + row * out_stride
            start, start_stride = weight[BIAS] + panel * PANEL * 4, 0
            if begin > 0:
                start, start_stride = place, out_stride
            panel_tile(
                last - row,
                x + (row * depth + begin) * 4,
                depth * 4,
                4,
                unpacked,
                PANEL * 4,
                start,
                start_stride,
                place,
                out_stride,
                end - begin,
                unpacked,
                0,
            )


@helper
def multiply_quantized(
    x, sums, weight, out, out_stride, panel, num_tokens, scales, minimums, block
):
    """out[:, PANEL] = x @ one panel + its bias; addresses, the stride in bytes."""
    load_scales(weight, panel, scales, minimums)
    if num_tokens <= weight[MOST_TOKENS]:
        multiply_few(x, sums, weight, out, out_stride, panel, num_tokens, scales, minimums)
    else:
        multiply_many(x, weight, out, out_stride, panel, num_tokens, scales, minimums, block)


@helper
def scratch(weight, most_tokens):
    """What a thread needs: scales and minimums of a panel, and a block of it as floats."""
    num_groups = weight[IN_FEATURES] // weight[GROUP]
    scales = np.empty((num_groups, PANEL), np.float32)
    minimums = np.empty((num_groups, PANEL), np.float32)
    block = np.empty((DEPTH if most_tokens > weight[MOST_TOKENS] else 0) * PANEL, np.float32)
    return scales, minimums, block


@helper
def write_panel(x, sums, weight, out, num_tokens, panel, spaces):
    """The panel's columns of out, [num_tokens, out_features]; the last panel may be wider."""
    num_columns = weight[OUT_FEATURES]
    place, width = out + panel * PANEL * 4, min(PANEL, num_columns - panel * PANEL)
    target, stride = place, num_columns * 4
    spare = np.empty((num_tokens if width < PANEL else 0, PANEL), np.float32)
    if width < PANEL:
        target, stride = spare.ctypes.data, PANEL * 4
    multiply_quantized(x, sums, weight, target, stride, panel, num_tokens, *spaces)
    for row in range(len(spare)):
        result = float32_array(place + row * num_columns * 4, width)
        for column in range(width):
            result[column] = spare[row, column]


@helper
def work(x, sums, weight, out, num_tokens, counters, thread, num_threads):
    """Units of work, (block of rows, panel): see `linear.work`."""
    depth, num_columns = weight[IN_FEATURES], weight[OUT_FEATURES]
    num_panels = (num_columns + PANEL - 1) // PANEL
    num_blocks = max(1, num_tokens * depth // BLOCK)
    num_units = num_blocks * num_panels
    spaces = scratch(weight, num_tokens)
    for i in range(num_threads):
        owner = (thread + i) % num_threads
        begin, end = owner * num_units // num_threads, (owner + 1) * num_units // num_threads
        unit = begin + next_index(counters.ctypes.data + owner * LINE)
        while unit < end:
            block, panel = unit // num_panels, unit % num_panels
            row = block * num_tokens // num_blocks
            count = (block + 1) * num_tokens // num_blocks - row
            place = out + row * num_columns * 4
            own_sums = sums.ctypes.data + row * len(spaces[0]) * 4
            write_panel(x + row * depth * 4, own_sums, weight, place, count, panel, spaces)
            unit = begin + next_index(counters.ctypes.data + owner * LINE)


@helper
def sum_groups(x, num_tokens, num_groups, group):
    """The sum of each row's inputs of each group, [num_tokens, num_groups]."""
    values = float32_array(x, (num_tokens, num_groups, group))
    sums = np.empty((num_tokens, num_groups), np.float32)
    for token in range(num_tokens):
        for i in range(num_groups):
            total = np.float32(0)
            for k in range(group):
                total += values[token, i, k]
            sums[token, i] = total
    return sums


@kernel
def quantized_linear(x, table, out, num_tokens, num_threads, pool):
    """out = x @ weight.T + bias. x: [num_tokens, depth] float32. table: the weight's fields."""
    weight = int64_array(table, NUM_FIELDS)
    num_sums = num_tokens if weight[HAS_TERMS] else 0
    group = weight[GROUP]
    sums = sum_groups(x, num_sums, weight[IN_FEATURES] // group, group)
    counters = np.zeros((num_threads, LINE // 8), np.int64)
    arguments = x, sums, weight, out, num_tokens, counters
    spread(work, arguments, num_threads, pool)


@helper(exact=True)
def unpack_row(weight, values, panel, column, scales, minimums, row_scale, out):
    """One row of a panel, in the order of operations that QuantizedWeight has."""
    depth, group, width = weight[IN_FEATURES], weight[GROUP], weight[CODE_BYTES]
    codes = byte_array(weight[CODES] + panel * depth * width, (depth, width))
    byte, shift, mask = column, 0, 255
    if width == LANES:
        byte, shift, mask = column % LANES, 4 * (column // LANES), 15
    for k in range(depth):
        number = k // group
        value = values[(codes[k, byte] >> shift) & mask] * scales[number, column] * row_scale
        out[k] = value + minimums[number, column]


@kernel(exact=True)
def quantized_rows(token_ids, table, values, out, num_tokens):
    """out[i] = row token_ids[i] of the weight; its inputs in the order of the codes. values: of each
    code, 256 or 16 floats."""
    weight = int64_array(table, NUM_FIELDS)
    depth, num_groups = weight[IN_FEATURES], weight[IN_FEATURES] // weight[GROUP]
    rows = int64_array(token_ids, num_tokens)
    result = float32_array(out, (num_tokens, depth))
    numbers = float32_array(values, 256)
    scales = np.empty((num_groups, PANEL), np.float32)
    minimums = np.zeros((num_groups, PANEL), np.float32)
    count = num_groups * PANEL
    for i in range(num_tokens):
        row = rows[i]
        if row < 0 or row >= weight[OUT_FEATURES]:
            return False
        panel, column = row // PANEL, row % PANEL
        place = weight[SCALES] + panel * count * weight[SCALE_BYTES]
        widen(weight[DTYPE], place, scales.ctypes.data, count)
        if weight[MINIMUM_BYTES] > 0:
            place = weight[MINIMUMS] + panel * count * weight[MINIMUM_BYTES]
            widen(weight[MINIMUM_DTYPE], place, minimums.ctypes.data, count)
        row_scale = float32_array(weight[ROW_SCALES] + panel * weight[ROW_STRIDE], PANEL)[column]
        unpack_row(weight, numbers, panel, column, scales, minimums, row_scale, result[i])
    return True
