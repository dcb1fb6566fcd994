"""Rows of a KV cache in registers: float32, or codes that are expanded as they are read.

A row of codes (see `common.kernels.quantized_kv`) is a quarter of the bytes, and turning a vector of
codes into floats costs two instructions (int8) or four (E4M3): so attention that waits for memory
gains, and attention that waits for arithmetic loses little.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import FEATURES, byte_array, float32_array, helper, int32_array
from common.kernels.cpu.vector import (
    FAST,
    FLOAT,
    INT,
    IS_ARM,
    LANES,
    MAX_DOTS,
    VECTOR,
    broadcast,
    emit_dots,
    load,
    store,
)
from common.kernels.quantized import FP8_MAX, INT8_MAX
from common.kernels.quantized_kv import SMALLEST

FLOAT32, INT8, FP8 = 0, 1, 2  # kinds of cache
FP8_UNIT = 256.0  # E4M3's codes are expanded to a 256th of what they stand for
# Whether the machine turns float16 into float32, as `expand_fp8` would have it.
HAS_HALF = IS_ARM or bool(FEATURES.get("f16c"))
WORDS = ir.VectorType(ir.IntType(32), LANES)


def words(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * LANES)


def load_bytes(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    kind = ir.VectorType(ir.IntType(8), LANES)
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def load_int8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """A vector of codes, as floats."""
    return builder.sitofp(builder.sext(load_bytes(builder, address), WORDS), VECTOR)


def load_fp8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """A vector of E4M3 codes, as floats: values / FP8_UNIT."""
    codes = load_bytes(builder, address)
    return expand_fp8(builder, codes) if HAS_HALF else expand_fp8_by_bits(builder, codes)


def expand_fp8(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """E4M3's bits at the place of float16's, whose exponents are 8 lower; subnormals fit, too."""
    shorts = ir.VectorType(ir.IntType(16), LANES)
    wide = builder.shl(builder.sext(codes, shorts), ir.Constant(shorts, [7] * LANES))
    # Sign extension has set the exponent's highest bit with the sign.
    bits = builder.and_(wide, ir.Constant(shorts, [0xBFFF - (1 << 16)] * LANES))
    half = builder.bitcast(bits, ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(half, VECTOR)


def expand_fp8_by_bits(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """The same in float32 alone: subnormals as integers, all others by their bits."""
    wide = builder.zext(codes, WORDS)
    magnitude = builder.and_(wide, words(0x7F))
    sign = builder.shl(builder.and_(wide, words(0x80)), words(24))
    small = builder.fmul(
        builder.sitofp(magnitude, VECTOR), ir.Constant(VECTOR, [2**-9 / FP8_UNIT] * LANES)
    )
    normal = builder.add(builder.shl(magnitude, words(20)), words((127 - 7 - 8) << 23))
    is_small = builder.icmp_signed("<", magnitude, words(8))
    bits = builder.select(is_small, builder.bitcast(small, WORDS), normal)
    return builder.bitcast(builder.or_(bits, sign), VECTOR)


LOADS = {INT8: load_int8, FP8: load_fp8}


@intrinsic
def expand(typing_context, kind, codes, out, depth, factor):
    """out[:depth] = codes[:depth] * factor; codes and out are addresses.

    kind: INT8, or FP8, whose factor is to hold FP8_UNIT. depth: a multiple of LANES.
    """

    def codegen(context, builder, signature, args):
        kind, codes, out, depth, factor = args
        factors = broadcast(builder, factor)
        end = builder.append_basic_block("expand.end")
        switch = builder.switch(kind, end)
        for number, load_codes in LOADS.items():
            block = builder.append_basic_block(f"expand.{number}")
            switch.add_case(INT(number), block)
            builder.position_at_end(block)
            with cgutils.for_range(builder, builder.udiv(depth, INT(LANES)), intp=INT) as loop:
                place = builder.mul(loop.index, INT(LANES))
                value = load_codes(builder, builder.add(codes, place))
                target = builder.add(out, builder.mul(place, INT(4)))
                store(builder, builder.fmul(value, factors, flags=FAST), target)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, types.float32), codegen


@intrinsic
def dots_codes(typing_context, factor, kind, rows, x, x_stride, codes, out, out_stride, depth):
    """out[r] = sum of x[r, :] * codes, times factor: `vector.dots` over a row of codes.

    kind and factor are those of `expand`.
    """

    def codegen(context, builder, signature, args):
        factor, kind, rows, *rest = args
        end = builder.append_basic_block("dots.end")
        switch = builder.switch(builder.add(builder.mul(kind, INT(MAX_DOTS)), rows), end)
        for number, load_codes in LOADS.items():
            for count in range(1, MAX_DOTS + 1):
                block = builder.append_basic_block(f"dots.{number}.{count}")
                switch.add_case(INT(number * MAX_DOTS + count), block)
                builder.position_at_end(block)
                emit_dots(builder, count, rest, load_codes, 1, factor)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.float32, *[types.intp] * 8), codegen


@intrinsic
def scale_of(typing_context, codes, head_dim):
    """The float32 after the codes of a row, at an address."""

    def codegen(context, builder, signature, args):
        return load(builder, FLOAT, builder.add(args[0], args[1]))

    return types.float32(types.intp, types.intp), codegen


@helper
def factor_of(kind, codes, head_dim):
    """What the expanded codes of a row are multiplied with. codes: their address."""
    factor = scale_of(codes, head_dim)
    return factor * np.float32(FP8_UNIT) if kind == FP8 else factor


@helper(exact=True)
def fp8_code(value):
    """The E4M3 code of a float32 of at most 448, rounded half to even."""
    bits = np.float32(value).view(np.int32)
    magnitude = bits & np.int32(0x7FFFFFFF)
    # Subnormals are multiples of 2^-9; of the others the upper 3 bits of the mantissa are kept.
    small = np.int32(np.rint(abs(value) * np.float32(512)))
    is_odd = (magnitude >> np.int32(20)) & np.int32(1)
    large = ((magnitude + np.int32(0x7FFFF) + is_odd) >> np.int32(20)) - np.int32((127 - 7) << 3)
    code = small if magnitude < np.int32((127 - 6) << 23) else large
    return code | ((bits >> np.int32(24)) & np.int32(0x80))


@helper(exact=True)
def quantize_row(row, target, kind):
    """Codes and scale of a row, [head_dim] float32, to an address, as `quantize_rows` has them."""
    head_dim = len(row)
    all_bits, codes = int32_array(row.ctypes.data, (head_dim,)), byte_array(target, (head_dim,))
    top = np.int32(0)  # floats without sign are ordered as their bits are, NaN above all
    for i in range(head_dim):
        top = max(top, all_bits[i] & np.int32(0x7FFFFFFF))
    amax = np.int32(top).view(np.float32)
    most = np.float32(FP8_MAX) if kind == FP8 else np.float32(INT8_MAX)
    scale = float32_array(target + head_dim, (1,))
    if top >= np.int32(0x7F800000) or amax < np.float32(SMALLEST):
        codes[:] = 0
        scale[0] = np.float32(np.nan) if top >= np.int32(0x7F800000) else np.float32(0)
        return
    scale[0], factor = amax / most, most / amax
    if kind == FP8:
        for i in range(head_dim):
            codes[i] = fp8_code(row[i] * factor)
    else:
        for i in range(head_dim):
            codes[i] = np.int32(np.rint(row[i] * factor))
