"""Rounding inputs to int8, as `quantized.round_activations` does it: the same codes and scales.

So no fast arithmetic here. The largest magnitude is found among the bits of floats, taken as integers:
in their order NaN is the largest, and no input that is none gets lost.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.elementwise import share
from common.kernels.cpu.integer_tile import CHUNK, INFO, PAD
from common.kernels.cpu.jit import byte_array, float32_array, helper, int32_array
from common.kernels.cpu.vector import FLOAT, INT, load

MAGNITUDE = 0x7FFFFFFF
SMALLEST = np.float32(1e-36)  # 127 divided by less is no number any more
BYTE, SHORT, WORD = ir.IntType(8), ir.IntType(16), ir.IntType(32)
WORDS, FLOATS = ir.VectorType(WORD, CHUNK), ir.VectorType(FLOAT, CHUNK)


def reduce(builder: ir.IRBuilder, operation: str, values: ir.Value) -> ir.Value:
    kind = ir.FunctionType(WORD, [WORDS])
    name = f"llvm.vector.reduce.{operation}.v{CHUNK}i32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [values])


@intrinsic
def largest_of_chunks(typing_context, x, num_chunks):
    """The largest magnitude of num_chunks * CHUNK floats, as its bits."""

    def codegen(context, builder, signature, args):
        place = cgutils.alloca_once(builder, WORDS)
        builder.store(ir.Constant(WORDS, None), place)
        with cgutils.for_range(builder, args[1], intp=INT) as loop:
            address = builder.add(args[0], builder.mul(loop.index, INT(CHUNK * 4)))
            mask = ir.Constant(WORDS, [MAGNITUDE] * CHUNK)
            bits, most = builder.and_(load(builder, WORDS, address), mask), builder.load(place)
            is_larger = builder.icmp_signed(">", bits, most)
            builder.store(builder.select(is_larger, bits, most), place)
        return reduce(builder, "smax", builder.load(place))

    return types.int32(types.intp, types.intp), codegen


@intrinsic
def round_chunk(typing_context, x, factor, is_wide, codes):
    """Round CHUNK floats times factor, half to even, to int16 where is_wide, else int8; their sum."""

    def codegen(context, builder, signature, args):
        x, factor, is_wide, codes = args
        undefined = ir.Constant(FLOATS, ir.Undefined)
        first = builder.insert_element(undefined, factor, WORD(0))
        factors = builder.shuffle_vector(first, undefined, ir.Constant(WORDS, [0] * CHUNK))
        kind = ir.FunctionType(FLOATS, [FLOATS])
        rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{CHUNK}f32")
        rounded = builder.call(rint, [builder.fmul(load(builder, FLOATS, x), factors)])
        words = builder.fptosi(rounded, WORDS)
        with builder.if_else(builder.icmp_signed("!=", is_wide, INT(0))) as (then, otherwise):
            for branch, element in ((then, SHORT), (otherwise, BYTE)):
                with branch:
                    narrow = builder.trunc(words, ir.VectorType(element, CHUNK))
                    address = builder.inttoptr(codes, narrow.type.as_pointer())
                    builder.store(narrow, address, align=1)
        return reduce(builder, "add", words)

    return types.int32(types.intp, types.float32, types.intp, types.intp), codegen


@helper(exact=True)
def largest(x, size):
    """The largest magnitude of floats at an address; NaN if one of them is."""
    most = np.int32(0)
    if size % CHUNK == 0:
        most = largest_of_chunks(x, size // CHUNK)
    else:
        values = int32_array(x, (size,))
        for i in range(size):
            most = max(most, np.int32(values[i] & np.int32(MAGNITUDE)))
    return np.int32(most).view(np.float32)


@helper(exact=True)
def round_some(x, size, factor, is_wide, codes):
    """Codes of up to CHUNK floats, at addresses; their sum."""
    if size == CHUNK:
        return round_chunk(x, factor, is_wide, codes)
    values, total = float32_array(x, (size,)), np.int32(0)
    for i in range(size):
        code = np.int32(np.rint(values[i] * factor))
        if is_wide:
            byte_array(codes + i * 2, (2,)).view(np.int16)[0] = code
        else:
            byte_array(codes, (size,))[i] = code
        total += code
    return np.int32(total)


@helper(exact=True)
def round_rows(
    x, bits, all_codes, all_info, num_tokens, depth, group, group_chunks, offset, piece, num_pieces
):
    """Round a piece of the rows of x, [num_tokens, depth]. x is an address.

    bits: of the weight. all_codes, as bytes: [tokens, groups, padded group], int8 for 4 bits and int16 for 8.
    all_info: [tokens, chunks of 4 bits or groups of 8, 3]: scale; offset times the sum of codes (int32);
    scale times that sum. offset is what a weight's codes are too large by.
    """
    width, step = (1, CHUNK) if bits == 4 else (2, group)  # bytes of a code, codes of an info
    padded = group_chunks * (CHUNK if bits == 4 else PAD)
    begin, end = share(num_tokens, piece, num_pieces), share(num_tokens, piece + 1, num_pieces)
    codes, info = all_codes.ctypes.data, all_info.ctypes.data
    info += begin * (depth // group) * ((group + step - 1) // step) * INFO
    for row in range(begin, end):
        for g in range(depth // group):
            values = x + (row * depth + g * group) * 4
            target = codes + (row * (depth // group) + g) * padded * width
            amax = largest(values, group)
            scale, factor = amax / np.float32(127), np.float32(0)
            if amax < SMALLEST:
                scale = np.float32(0)
            elif amax < np.inf:
                factor = np.float32(1) / amax * np.float32(127)  # as PyTorch divides
            else:
                scale = np.float32(np.nan)
            for start in range(0, group, step):
                stop, total = min(start + step, group), np.int32(0)
                for i in range(start, stop, CHUNK):
                    size = min(CHUNK, stop - i)
                    place = target + i * width
                    if factor > 0:
                        total += round_some(values + i * 4, size, factor, bits == 8, place)
                    else:
                        byte_array(place, (size * width,))[:] = 0
                floats, integers = float32_array(info, (3,)), int32_array(info, (3,))
                floats[0] = scale
                integers[1] = total * offset
                floats[2] = scale * np.float32(total)
                info += INFO
            byte_array(target + group * width, ((padded - group) * width,))[:] = 0
