"""Rows of a weight of integers, as floats: an embedding that shares its table with the output layer."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from common.kernels.cpu.integer_tile import CHUNK, PAD
from common.kernels.cpu.jit import byte_array, float32_array, helper, int64_array, kernel
from common.kernels.cpu.vector import PANEL


@intrinsic
def float16_at(typing_context, address):
    """The float16 at an address, as a float32."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.HalfType().as_pointer())
        return builder.fpext(builder.load(place, align=1), ir.FloatType())

    return types.float32(types.intp), codegen


@helper
def read_scale(address, column, half):
    if half:
        return float16_at(address + column * 2)
    return float32_array(address, (PANEL,))[column]


@helper(exact=True)
def unpack_group(codes, column, bits, offset, scale, minimum, out):
    for i in range(len(out)):
        if bits == 4:
            both = np.int32(codes[(i // 8 * PANEL + column) * 4 + i % 4])
            code = (both >> 4 if i % 8 >= 4 else both & 15) + offset
        else:
            code = np.int32(np.int8(codes[(i // 2 * PANEL + column) * 2 + i % 2]))
        out[i] = np.float32(code) * scale + minimum


@kernel(exact=True)
def integer_embedding(
    ids,
    weight,
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
):
    """out[token] = row ids[token] of a weight. Returns whether all ids are rows; otherwise some of
    `out` is not written."""
    rows = int64_array(ids, (num_tokens,))
    outs = float32_array(out, (num_tokens, depth))
    code_bytes = group_chunks * PANEL * (CHUNK // 2 if bits == 4 else PAD)
    scale_bytes = PANEL * (2 if half else 4)
    record = code_bytes + scale_bytes * (1 + has_minimums)
    for token in range(num_tokens):
        row = rows[token]
        if row < 0 or row >= num_columns:
            return False
        column = row % PANEL
        for g in range(depth // group):
            place = weight + row // PANEL * panel_bytes + g * record
            scale, minimum = read_scale(place + code_bytes, column, half), np.float32(0)
            if has_minimums:
                minimum = read_scale(place + code_bytes + scale_bytes, column, half)
            codes = byte_array(place, (code_bytes,))
            values = outs[token, g * group : (g + 1) * group]
            unpack_group(codes, column, bits, offset, scale, minimum, values)
    return True
