"""The inner loops of products with quantised weights: codes become floats in vector registers.

A panel's codes lie step after step in depth, as a float panel's columns do: PANEL bytes a step, or
half as many for codes of 4 bits, the first LANES columns in the low nibbles and the others in the
high ones. So what is loaded is already where it is used, and nothing has to be moved across lanes.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import FEATURES
from common.kernels.cpu.vector import (
    FAST,
    FEW_ROWS,
    FLOAT,
    INT,
    LANES,
    PANEL,
    VECTOR,
    broadcast,
    load,
    multiply_add,
    prefetch,
    store,
)
from common.kernels.quantized import TABLES

# Kinds as kernels number them. uint4 and int4 have the same values here: 8 is subtracted with the
# minimums.
INT8, FP8, INT4, FP4, NF4 = range(5)
NUM_KINDS = 5
# float8_e4m3fn's bits, moved into a float16, are 2**-8 of the number.
FP8_FACTOR = 256.0
# The second half of int4's nibbles stays where it is in the byte, as 16 times the number.
HIGH_FACTOR = 16.0
FLOAT32, FLOAT16, BFLOAT16, E4M3, E8M0 = range(5)  # dtypes of scales
SCALE_BYTES = (4, 2, 2, 1, 1)
# Whether float16 becomes float32 in one instruction: NEON always does, x86 with F16C.
HAS_HALF = LANES == 4 or FEATURES.get("f16c", False)

HALF, BYTE, SHORT, WORD = ir.HalfType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
WORDS = ir.VectorType(WORD, LANES)


def constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def vector_of(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def load_bytes(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def look_up(builder: ir.IRBuilder, table: tuple[float, ...], byte: ir.Value, low: int) -> ir.Value:
    """table[the nibble of each lane that begins with bit `low`]. byte: a byte in each int32."""

    def numbers(values: tuple[float, ...]) -> ir.Constant:
        return ir.Constant(vector_of(FLOAT), list(values))

    def permute(name: str, *args: ir.Value) -> ir.Value:
        kind = ir.FunctionType(VECTOR, [arg.type for arg in args])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    def has_bit(bit: int) -> ir.Value:
        moved = builder.shl(byte, constant(WORDS, 31 - low - bit))
        return builder.icmp_signed("<", moved, constant(WORDS, 0))

    index = builder.lshr(byte, constant(WORDS, low)) if low else byte
    if LANES == 16 and FEATURES.get("avx512f"):  # looks at the lowest 4 bits of the index
        return permute("llvm.x86.avx512.permvar.sf.512", numbers(table), index)
    if LANES == 8 and FEATURES.get("avx2"):  # and this at the lowest 3
        halves = [
            permute("llvm.x86.avx2.permps", numbers(half), index) for half in (table[:8], table[8:])
        ]
        return builder.select(has_bit(3), halves[1], halves[0])
    found = [constant(VECTOR, value) for value in table]
    for bit in range(4):
        is_set = has_bit(bit)
        found = [
            builder.select(is_set, odd, even)
            for even, odd in zip(found[::2], found[1::2], strict=True)
        ]
    return found[0]


def emit_half(builder: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """float8_e4m3fn codes, a byte a lane, as floats of 1 / FP8_FACTOR of their value."""
    if HAS_HALF:
        shorts = vector_of(SHORT)
        bits = builder.shl(builder.sext(codes, shorts), constant(shorts, 7))
        bits = builder.and_(bits, constant(shorts, 0xBFFF))  # the sign was doubled
        return builder.fpext(builder.bitcast(bits, vector_of(HALF)), VECTOR)
    # A normal number's bits are those of a float32 with another exponent; others are whole numbers.
    words = builder.zext(codes, WORDS)
    exponent = builder.and_(words, constant(WORDS, 0x78))
    bits = builder.shl(builder.and_(words, constant(WORDS, 0x7F)), constant(WORDS, 20))
    normal = builder.bitcast(builder.add(bits, constant(WORDS, 112 << 23)), VECTOR)
    small = builder.sitofp(builder.and_(words, constant(WORDS, 7)), VECTOR)
    small = builder.fmul(small, constant(VECTOR, 2.0**-17))
    is_small = builder.icmp_signed("==", exponent, constant(WORDS, 0))
    magnitude = builder.bitcast(builder.select(is_small, small, normal), WORDS)
    sign = builder.shl(builder.and_(words, constant(WORDS, 0x80)), constant(WORDS, 24))
    return builder.bitcast(builder.or_(magnitude, sign), VECTOR)


def emit_codes(builder: ir.IRBuilder, kind: int, address: ir.Value) -> list[ir.Value]:
    """One step's codes as two vectors of floats, before any scale or factor."""
    codes = vector_of(BYTE)
    if kind in (INT8, FP8):
        halves = [
            load_bytes(builder, codes, builder.add(address, INT(offset))) for offset in (0, LANES)
        ]
        if kind == FP8:
            return [emit_half(builder, half) for half in halves]
        return [builder.sitofp(builder.sext(half, WORDS), VECTOR) for half in halves]
    words = builder.zext(load_bytes(builder, codes, address), WORDS)
    if kind == INT4:
        nibbles = [builder.and_(words, constant(WORDS, mask)) for mask in (0x0F, 0xF0)]
        return [builder.sitofp(nibble, VECTOR) for nibble in nibbles]
    table = TABLES["fp4_e2m1" if kind == FP4 else "nf4"]
    return [look_up(builder, table, words, low) for low in (0, 4)]


def step_bytes(kind: int) -> int:
    """Bytes of a panel's codes for one step in depth."""
    return PANEL if kind in (INT8, FP8) else LANES


def emit_steps(builder: ir.IRBuilder, kind: int, codes, depth, ahead, one_step) -> None:
    """one_step(k, turn) for every k < depth, and ask for as many bytes at `ahead`."""
    unroll = max(4, min(8, 64 // step_bytes(kind)))
    num_lines = -(-unroll * step_bytes(kind) // 64)
    whole = builder.udiv(depth, INT(unroll))
    with cgutils.for_range(builder, whole, intp=INT) as loop:
        first = builder.mul(loop.index, INT(unroll))
        place = builder.add(ahead, builder.mul(first, INT(step_bytes(kind))))
        for line in range(num_lines):
            prefetch(builder, builder.add(place, INT(line * 64)))
        for turn in range(unroll):
            one_step(builder.add(first, INT(turn)), turn)
    done = builder.mul(whole, INT(unroll))
    with cgutils.for_range(builder, builder.sub(depth, done), intp=INT) as loop:
        one_step(builder.add(done, loop.index), 0)


def emit_product(builder: ir.IRBuilder, kind: int, rows: int, args: list[ir.Value]) -> None:
    """The code of a product of few rows: the sums of a group stay in registers, and join the totals
    times the group's scales."""
    x, x_stride, codes, scales, minimums, sums, sums_stride, *rest = args
    start, out, out_stride, num_groups, group, ahead = rest

    def at(base: ir.Value, stride: ir.Value, index: int) -> ir.Value:
        return builder.add(base, builder.mul(stride, INT(index)))

    def part(base: ir.Value, vector: int) -> ir.Value:
        return builder.add(base, INT(vector * LANES * 4))

    tile = [(row, vector) for row in range(rows) for vector in range(2)]
    totals = {place: cgutils.alloca_once(builder, VECTOR) for place in tile}
    for row, vector in tile:
        builder.store(load(builder, VECTOR, part(start, vector)), totals[row, vector])
    num_sums = max(1, min(4, 8 // len(tile)))
    group_sums = {
        (turn, *place): cgutils.alloca_once(builder, VECTOR)
        for turn in range(num_sums)
        for place in tile
    }
    group_bytes = builder.mul(group, INT(step_bytes(kind)))
    with cgutils.for_range(builder, num_groups, intp=INT) as loop:
        for place in group_sums.values():
            builder.store(constant(VECTOR, 0.0), place)
        block = builder.add(codes, builder.mul(loop.index, group_bytes))
        values = builder.add(x, builder.mul(loop.index, builder.mul(group, INT(4))))

        def one_step(k: ir.Value, turn: int, block=block, values=values) -> None:
            weights = emit_codes(
                builder, kind, builder.add(block, builder.mul(k, INT(step_bytes(kind))))
            )
            for row in range(rows):
                address = builder.add(at(values, x_stride, row), builder.mul(k, INT(4)))
                value = broadcast(builder, load(builder, FLOAT, address))
                for vector in range(2):
                    place = group_sums[turn % num_sums, row, vector]
                    total = multiply_add(builder, value, weights[vector], builder.load(place))
                    builder.store(total, place)

        next_block = builder.add(ahead, builder.mul(loop.index, group_bytes))
        emit_steps(builder, kind, block, group, next_block, one_step)
        offset = builder.mul(loop.index, INT(PANEL * 4))
        own_scales = builder.add(scales, offset)
        for row, vector in tile:
            total = builder.load(group_sums[0, row, vector])
            for turn in range(1, num_sums):
                total = builder.fadd(total, builder.load(group_sums[turn, row, vector]), flags=FAST)
            if kind == FP8:
                total = builder.fmul(total, constant(VECTOR, FP8_FACTOR))
            scale = load(builder, VECTOR, part(own_scales, vector))
            place = totals[row, vector]
            builder.store(multiply_add(builder, total, scale, builder.load(place)), place)
        has_minimums = builder.icmp_unsigned("!=", minimums, INT(0))
        with builder.if_then(has_minimums):
            own_minimums = builder.add(minimums, offset)
            for row, vector in tile:
                address = at(sums, sums_stride, row)
                address = builder.add(address, builder.mul(loop.index, INT(4)))
                value = broadcast(builder, load(builder, FLOAT, address))
                minimum = load(builder, VECTOR, part(own_minimums, vector))
                place = totals[row, vector]
                builder.store(multiply_add(builder, value, minimum, builder.load(place)), place)
    for row, vector in tile:
        store(builder, builder.load(totals[row, vector]), part(at(out, out_stride, row), vector))


@intrinsic
def quantized_tile(
    typing_context,
    kind,
    rows,
    x,
    x_stride,
    codes,
    scales,
    minimums,
    sums,
    sums_stride,
    start,
    out,
    out_stride,
    num_groups,
    group,
    ahead,
):
    """out[r, :] = start + x[r, :] @ a panel of codes, for r < rows <= FEW_ROWS.

    scales, minimums: [num_groups, PANEL] float32; minimums 0 where there are none. sums: of each
    row's inputs of each group. All but kind, rows and numbers of groups and in a group are addresses
    and strides in bytes. ahead: what is asked for meanwhile.
    """

    def codegen(context, builder, signature, args):
        end = builder.append_basic_block("product.end")
        choice = builder.add(builder.mul(args[0], INT(FEW_ROWS + 1)), args[1])
        switch = builder.switch(choice, end)
        for number in range(NUM_KINDS):
            for count in range(1, FEW_ROWS + 1):
                block = builder.append_basic_block(f"product.{number}.{count}")
                switch.add_case(INT(number * (FEW_ROWS + 1) + count), block)
                builder.position_at_end(block)
                emit_product(builder, number, count, args[2:])
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 15), codegen


def emit_expand(builder: ir.IRBuilder, kind: int, args: list[ir.Value]) -> None:
    codes, scales, minimums, out, depth, ahead = args
    vectors = [INT(0), INT(LANES * 4)]
    factors = [load(builder, VECTOR, builder.add(scales, vector)) for vector in vectors]
    terms = [load(builder, VECTOR, builder.add(minimums, vector)) for vector in vectors]

    def one_step(k: ir.Value, turn: int) -> None:
        values = emit_codes(
            builder, kind, builder.add(codes, builder.mul(k, INT(step_bytes(kind))))
        )
        place = builder.add(out, builder.mul(k, INT(PANEL * 4)))
        for vector, value, factor, term in zip(vectors, values, factors, terms, strict=True):
            if kind == FP8:
                value = builder.fmul(value, constant(VECTOR, FP8_FACTOR))
            value = multiply_add(builder, value, factor, term)
            store(builder, value, builder.add(place, vector))

    emit_steps(builder, kind, codes, depth, ahead, one_step)


@intrinsic
def expand(typing_context, kind, codes, scales, minimums, out, depth, ahead):
    """out[:depth, PANEL] = a panel's codes * scales + minimums, all of one group."""

    def codegen(context, builder, signature, args):
        end = builder.append_basic_block("expand.end")
        switch = builder.switch(args[0], end)
        for number in range(NUM_KINDS):
            block = builder.append_basic_block(f"expand.{number}")
            switch.add_case(INT(number), block)
            builder.position_at_end(block)
            emit_expand(builder, number, args[1:])
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


def emit_widen(builder: ir.IRBuilder, dtype: int, address: ir.Value) -> ir.Value:
    """LANES scales of a dtype as floats."""
    if dtype == FLOAT32:
        return load_bytes(builder, VECTOR, address)
    if dtype == FLOAT16:
        return builder.fpext(load_bytes(builder, vector_of(HALF), address), VECTOR)
    if dtype == BFLOAT16:
        words = builder.zext(load_bytes(builder, vector_of(SHORT), address), WORDS)
        return builder.bitcast(builder.shl(words, constant(WORDS, 16)), VECTOR)
    codes = load_bytes(builder, vector_of(BYTE), address)
    if dtype == E4M3:
        return builder.fmul(emit_half(builder, codes), constant(VECTOR, FP8_FACTOR))
    words = builder.zext(codes, WORDS)
    bits = builder.shl(words, constant(WORDS, 23))
    is_lowest = builder.icmp_signed("==", words, constant(WORDS, 0))
    bits = builder.select(is_lowest, constant(WORDS, 1 << 22), bits)  # 2**-127 has no such exponent
    return builder.bitcast(bits, VECTOR)


@intrinsic
def widen(typing_context, dtype, source, out, count):
    """out[:count] = source[:count], a dtype of scales, as float32; count a multiple of LANES."""

    def codegen(context, builder, signature, args):
        number, source, out, count = args
        end = builder.append_basic_block("widen.end")
        switch = builder.switch(number, end)
        for dtype, size in enumerate(SCALE_BYTES):
            if dtype == FLOAT16 and not HAS_HALF:
                continue  # such are kept as float32
            block = builder.append_basic_block(f"widen.{dtype}")
            switch.add_case(INT(dtype), block)
            builder.position_at_end(block)
            vectors = builder.udiv(count, INT(LANES))
            with cgutils.for_range(builder, vectors, intp=INT) as loop:
                place = builder.add(source, builder.mul(loop.index, INT(LANES * size)))
                target = builder.add(out, builder.mul(loop.index, INT(LANES * 4)))
                store(builder, emit_widen(builder, dtype, place), target)
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen
