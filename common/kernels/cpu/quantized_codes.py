"""Codes and scales as floats in vector registers, for all kinds and dtypes and on any machine.

A panel's codes lie step after step in depth, as a float panel's columns do: PANEL bytes a step, or
half as many for codes of 4 bits, the first LANES columns in the low nibbles and the others in the
high ones. So what is loaded is already where it is used, and nothing has to be moved across lanes.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import FEATURES
from common.kernels.cpu.vector import FLOAT, INT, LANES, PANEL, VECTOR, store
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
# How 16 values are looked up: a table of floats with AVX-512, for FP4 one of bytes with AVX2, in the
# highest byte of an int32 and twice too large; or its bits are moved into a float16's.
HAS_TABLE = LANES == 16 and FEATURES.get("avx512f", False)
HAS_BYTE_TABLE = LANES == 8 and FEATURES.get("avx2", False)
FP4_FACTOR = 1.0 if HAS_TABLE else 2.0**-25 if HAS_BYTE_TABLE else 2.0**14 if HAS_HALF else 1.0
FACTORS = {kind: x for kind, x in ((FP8, FP8_FACTOR), (FP4, FP4_FACTOR)) if x != 1}

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
    if HAS_TABLE:  # looks at the lowest 4 bits of the index
        return permute("llvm.x86.avx512.permvar.sf.512", numbers(table), index)
    if HAS_BYTE_TABLE:  # AVX2's looks at the lowest 3
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


def look_up_bytes(builder: ir.IRBuilder, codes: ir.Value) -> list[ir.Value]:
    """Both nibbles of each byte of FP4 as 1 / FP4_FACTOR of their values.

    Twice an FP4 number is a whole one, so a table of 16 bytes will do, which AVX2 looks up faster
    than one of floats. The byte is the highest of its int32, and code 0 is 0 for the others.
    """
    table = [int(2 * value) % 256 for value in TABLES["fp4_e2m1"]]
    wide, none = ir.VectorType(BYTE, 32), 8
    places = [none if i % 4 < 3 else i // 4 for i in range(32)]
    zeros, mask = constant(codes.type, 0), ir.Constant(ir.VectorType(WORD, 32), places)
    words = builder.bitcast(builder.shuffle_vector(codes, zeros, mask), WORDS)
    kind = ir.FunctionType(wide, [wide, wide])
    shuffle = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pshuf.b")
    values = []
    for index in (words, builder.lshr(words, constant(WORDS, 4))):
        index = builder.bitcast(builder.and_(index, constant(WORDS, 0x0F000000)), wide)
        found = builder.call(shuffle, [ir.Constant(wide, table * 2), index])
        values.append(builder.sitofp(builder.bitcast(found, WORDS), VECTOR))
    return values


def emit_half_fp4(builder: ir.IRBuilder, codes: ir.Value, low: int) -> ir.Value:
    """FP4 codes from bit `low` of int16 lanes on, as floats of 1 / FP4_FACTOR of their value."""

    def moved(mask: int, place: int) -> ir.Value:
        bits = builder.and_(codes, constant(codes.type, mask << low))
        return builder.shl(bits, constant(codes.type, place - low))

    bits = builder.or_(moved(8, 12), moved(7, 9))
    return builder.fpext(builder.bitcast(bits, vector_of(HALF)), VECTOR)


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
    if kind == FP4 and HAS_BYTE_TABLE:
        return look_up_bytes(builder, load_bytes(builder, codes, address))
    if kind == FP4 and HAS_HALF and not HAS_TABLE:
        shorts = builder.zext(load_bytes(builder, codes, address), vector_of(SHORT))
        return [emit_half_fp4(builder, shorts, low) for low in (0, 4)]
    table = TABLES["fp4_e2m1" if kind == FP4 else "nf4"]
    return [look_up(builder, table, words, low) for low in (0, 4)]


def step_bytes(kind: int) -> int:
    """Bytes of a panel's codes for one step in depth."""
    return PANEL if kind in (INT8, FP8) else LANES


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
