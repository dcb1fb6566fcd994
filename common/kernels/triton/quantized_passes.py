"""What goes beside a quantised product: inputs as codes, parts of a split summed, weights unpacked."""

import triton
import triton.language as tl

from common.kernels.triton.launch import Launcher
from common.kernels.triton.quantized_kernel import codes_of_run, scale_values, values


@triton.jit
def rounded(numbers, IS_FP8: tl.constexpr):
    """Numbers, at most 127 or 448, rounded half to even to integers or to E4M3, in float32.

    A number plus another whose last bit is worth what the result's is. The compiler must not make a
    product and this sum one operation: between them the caller limits the numbers.
    """
    if IS_FP8:
        exponents = tl.maximum((numbers.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # 2**-6
        magic = (((exponents + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        return (numbers + magic) - magic
    else:
        return (numbers + 12582912.0) - 12582912.0  # 1.5 * 2**23


@triton.jit(do_not_specialize=["num_rows", "size"])
def round_kernel(
    x, codes, scales, num_rows, size,
    IS_FP8: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `round_activations`. x: [num_rows, size]: a row is a token's, or a group's of a token.

    codes: in their own format or any that holds them. scales: [num_rows] float32.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, CHUNK)
    places = rows.to(tl.int64)[:, None] * size + columns[None, :]
    most: tl.constexpr = 448.0 if IS_FP8 else 127.0
    amax = tl.zeros((ROWS,), tl.float32)
    for first in range(0, size, CHUNK):
        inside = (rows < num_rows)[:, None] & (first + columns < size)[None, :]
        numbers = tl.load(x + places + first, mask=inside, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(numbers), axis=1))
    is_some = amax > 0
    factor = tl.where(is_some, tl.div_rn(1.0, tl.where(is_some, amax, 1.0)) * most, 0.0)
    tl.store(scales + rows, tl.div_rn(amax, most), mask=rows < num_rows)
    for first in range(0, size, CHUNK):
        inside = (rows < num_rows)[:, None] & (first + columns < size)[None, :]
        numbers = tl.load(x + places + first, mask=inside, other=0.0).to(tl.float32)
        numbers = tl.minimum(tl.maximum(numbers * factor[:, None], -most), most)
        tl.store(
            codes + places + first, rounded(numbers, IS_FP8).to(codes.dtype.element_ty), inside
        )


@triton.jit(do_not_specialize=["num_parts", "size", "out_features"])
def sum_parts_kernel(parts, bias, out, num_parts, size, out_features, BLOCK: tl.constexpr):
    """parts: [num_parts, size] float32, size being tokens times out_features."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * size + places, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + places % out_features, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_padded", "in_features", "first_tile", "last_output", "num_steps"]
)
def unpack_kernel(
    codes, scales, row_scales, minimums, table,
    out,  # [outputs, in_features], from the first tile's first output on
    num_padded, in_features, first_tile, last_output, num_steps,
    KIND: tl.constexpr, FORMAT: tl.constexpr, STEPS_PER_GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr, PACK_ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One step's codes of a tile's outputs, as the numbers that they stand for."""
    RUNS: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8_e4m3" else 4
    tile, step = first_tile + tl.program_id(0), tl.program_id(1)
    inner, depths = tl.arange(0, PACK_ROWS), tl.arange(0, DEPTH)
    base = tile.to(tl.int64) * PACK_ROWS * num_steps * DEPTH
    if IS_PACKED:
        base += step * PACK_ROWS * DEPTH
        places = inner[:, None] * DEPTH + depths[None, :]
    else:
        base += step * DEPTH
        places = inner[:, None] * (num_steps * DEPTH) + depths[None, :]
    packed = tl.load(codes + base + places)
    outputs = tile * PACK_ROWS + inner
    target = out + (tl.program_id(0).to(tl.int64) * PACK_ROWS + inner)[:, None] * in_features
    for run in tl.static_range(RUNS):
        part = step * RUNS + run
        group = part // STEPS_PER_GROUP if STEPS_PER_GROUP > 0 else 0
        scale = scale_values(tl.load(scales + group * num_padded + outputs), FORMAT)
        numbers = values(codes_of_run(packed, run, RUNS), table, KIND, tl.float32) * scale[:, None]
        if row_scales is not None:
            numbers *= tl.load(row_scales + outputs)[:, None]
        if minimums is not None:
            minimum = tl.load(minimums + group * num_padded + outputs)
            numbers += minimum.to(tl.float32)[:, None]
        columns = part * DEPTH + depths
        inside = (outputs < last_output)[:, None] & (columns < in_features)[None, :]
        tl.store(target + columns[None, :], numbers.to(out.dtype.element_ty), mask=inside)


ROUND = Launcher(round_kernel)
SUM_PARTS = Launcher(sum_parts_kernel)
UNPACK = Launcher(unpack_kernel)
