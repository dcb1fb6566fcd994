"""The inner loop of matrix products: a tile of the result kept in vector registers.

LLVM vectorises simple loops by itself, but it does not keep a tile of sums in registers. So this
one loop is written for it instruction by instruction, in vectors of the machine's width: `rows`
rows of x times a panel of two vectors' columns, rows * 2 sums in registers, and for every step in
depth two vector loads, `rows` broadcasts and rows * 2 multiply-adds. (The scheme is that of
Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.)
"""

import platform
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import FEATURES

IS_ARM = platform.machine().lower() in ("arm64", "aarch64")
LANES = 16 if FEATURES.get("avx512f") else 4 if IS_ARM else 8  # floats in a vector register
PANEL = 2 * LANES  # columns of a panel
# Rows of a tile: sums in 24 of the 32 registers of AVX-512 and NEON, in 12 of the 16 of AVX2.
MAX_ROWS = 12 if LANES != 8 else 6
FEW_ROWS = MAX_ROWS // 2  # up to so many rows a tile waits for memory, and not memory for it
STREAMS = 4  # places at once that memory is asked for: more lines are under way than with one

FLOAT = ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)
INT = ir.IntType(64)
FAST = ("reassoc", "contract", "nsz")


def load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value) -> ir.Value:
    """A float or a vector from a byte address that is aligned to floats only."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, undefined, zeros)


def multiply_add(
    builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value, flags: tuple[str, ...] = FAST
) -> ir.Value:
    """a * b + c; one instruction where the machine has it."""
    return builder.fadd(builder.fmul(a, b, flags=flags), c, flags=flags)


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a line of memory to be brought into the second-level cache; never faults."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    arguments = [builder.inttoptr(address, byte), word(0), word(2), word(1)]
    builder.call(function, arguments)


def emit_tile(
    builder: ir.IRBuilder, rows: int, vectors: int, args: list[ir.Value], is_sum: bool
) -> None:
    """The code of one tile of fixed size."""
    x, x_stride, x_step, w, w_stride, start, start_stride, out, out_stride, *rest = args
    depth, ahead, ahead_step = rest

    def at(base: ir.Value, stride: ir.Value, index: int) -> ir.Value:
        return builder.add(base, builder.mul(stride, INT(index)))

    tile = [(row, vector) for row in range(rows) for vector in range(vectors)]
    # Few rows leave the multiply-add units waiting for one sum: then several steps in depth at
    # once, each with sums of its own.
    num_sums = max(1, min(STREAMS, 8 // len(tile)))
    sums = {}
    for step in range(num_sums):
        for row, vector in tile:
            sums[step, row, vector] = place = cgutils.alloca_once(builder, VECTOR)
            first = ir.Constant(VECTOR, None)
            if step == 0 and not is_sum:
                address = at(start, start_stride, row)
                first = load(builder, VECTOR, builder.add(address, INT(vector * LANES * 4)))
            builder.store(first, place)

    def one_step(k: ir.Value, step: int) -> None:
        base = builder.add(w, builder.mul(k, w_stride))
        weights = [
            load(builder, VECTOR, builder.add(base, INT(v * LANES * 4))) for v in range(vectors)
        ]
        for row in range(rows):
            address = builder.add(at(x, x_stride, row), builder.mul(k, x_step))
            value = broadcast(builder, load(builder, FLOAT, address))
            for vector in range(vectors):
                place = sums[step, row, vector]
                total = multiply_add(builder, value, weights[vector], builder.load(place))
                builder.store(total, place)

    whole = builder.udiv(depth, INT(STREAMS))
    num_lines = -(-vectors * LANES * 4 // 64) if rows <= FEW_ROWS else 1
    with cgutils.for_range(builder, whole, intp=INT) as loop:
        for step in range(STREAMS):
            place = builder.add(builder.mul(whole, INT(step)), loop.index)
            place = builder.add(ahead, builder.mul(place, ahead_step))
            for line in range(num_lines):
                prefetch(builder, builder.add(place, INT(line * 64)))
            k = builder.add(builder.mul(loop.index, INT(STREAMS)), INT(step))
            one_step(k, step % num_sums)
    done = builder.mul(whole, INT(STREAMS))
    with cgutils.for_range(builder, builder.sub(depth, done), intp=INT) as loop:
        one_step(builder.add(done, loop.index), 0)
    for row, vector in tile:
        total = builder.load(sums[0, row, vector])
        for step in range(1, num_sums):
            total = builder.fadd(total, builder.load(sums[step, row, vector]), flags=FAST)
        if is_sum:
            address = builder.add(at(start, start_stride, row), INT(vector * LANES * 4))
            total = builder.fadd(load(builder, VECTOR, address), total)
        address = builder.add(at(out, out_stride, row), INT(vector * LANES * 4))
        store(builder, total, address)


def make_tile(vectors: int, max_rows: int = MAX_ROWS, is_sum: bool = False) -> Callable:
    """A tile of so many vectors' columns, with code for each number of rows up to max_rows.

    is_sum: `start` holds the sum of many tiles so far, and is added to this one's sum at its end. Were
    the products added to it one by one, those too small for its last place would all be lost.
    """

    @intrinsic
    def tile(
        typing_context,
        rows,
        x,
        x_stride,
        x_step,
        w,
        w_stride,
        start,
        start_stride,
        out,
        out_stride,
        depth,
        ahead,
        ahead_step,
    ):
        def codegen(context, builder, signature, args):
            end = builder.append_basic_block("tile.end")
            switch = builder.switch(args[0], end)
            for count in range(1, max_rows + 1):
                block = builder.append_basic_block(f"tile.{count}")
                switch.add_case(INT(count), block)
                builder.position_at_end(block)
                emit_tile(builder, count, vectors, args[1:], is_sum)
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 13), codegen

    return tile


# tile(rows, x, x_stride, x_step, w, w_stride, start, start_stride, out, out_stride,
#      depth, ahead, ahead_step):
#     out[r, :] = start[r, :] + sum over k of x[r, k] * w[k, :]     for r < rows <= MAX_ROWS
# over one panel's columns (PANEL, or LANES). All but rows and depth are addresses and strides in
# bytes. x[r, k] lies at r * x_stride + k * x_step; start_stride 0 gives all rows one start (a bias).
panel_tile = make_tile(2)
half_panel_tile = make_tile(1)


def load_floats(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(builder, VECTOR, address)


def emit_dots(
    builder: ir.IRBuilder,
    rows: int,
    args: list[ir.Value],
    load_y: Callable[[ir.IRBuilder, ir.Value], ir.Value] = load_floats,
    y_bytes: int = 4,
    factor: ir.Value | None = None,
) -> None:
    """The code of `dots` for so many rows. load_y: reads a vector of y, y_bytes an element, as
    floats. factor: what the sums are multiplied with."""
    x, x_stride, y, out, out_stride, depth = args
    sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(rows)]
    for place in sums:
        builder.store(ir.Constant(VECTOR, None), place)
    with cgutils.for_range(builder, builder.udiv(depth, INT(LANES)), intp=INT) as loop:
        offset = builder.mul(loop.index, INT(LANES * 4))
        right = load_y(builder, builder.add(y, builder.mul(loop.index, INT(LANES * y_bytes))))
        for row in range(rows):
            address = builder.add(builder.add(x, builder.mul(x_stride, INT(row))), offset)
            left = load(builder, VECTOR, address)
            total = multiply_add(builder, left, right, builder.load(sums[row]))
            builder.store(total, sums[row])
    kind = ir.FunctionType(FLOAT, [FLOAT, VECTOR])
    name = f"llvm.vector.reduce.fadd.v{LANES}f32"
    reduce = cgutils.get_or_insert_function(builder.module, kind, name)
    for row in range(rows):
        arguments = [ir.Constant(FLOAT, 0.0), builder.load(sums[row])]
        total = builder.call(reduce, arguments, fastmath=FAST)
        if factor is not None:
            total = builder.fmul(total, factor, flags=FAST)
        store(builder, total, builder.add(out, builder.mul(out_stride, INT(row))))


@intrinsic
def prefetch_lines(typing_context, address, size):
    """Ask for `size` bytes of memory, a multiple of 64."""

    def codegen(context, builder, signature, args):
        with cgutils.for_range(builder, builder.udiv(args[1], INT(64)), intp=INT) as loop:
            prefetch(builder, builder.add(args[0], builder.mul(loop.index, INT(64))))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


MAX_DOTS = 4


@intrinsic
def dots(typing_context, rows, x, x_stride, y, out, out_stride, depth):
    """out[r] = sum of x[r, :] * y for r < rows <= MAX_DOTS; addresses and strides in bytes.

    depth is a multiple of LANES.
    """

    def codegen(context, builder, signature, args):
        end = builder.append_basic_block("dots.end")
        switch = builder.switch(args[0], end)
        for count in range(1, MAX_DOTS + 1):
            block = builder.append_basic_block(f"dots.{count}")
            switch.add_case(INT(count), block)
            builder.position_at_end(block)
            emit_dots(builder, count, args[1:])
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


@intrinsic
def highest(typing_context, x, depth, start):
    """The largest of `start` and x[:depth]; x an address, depth a multiple of LANES."""

    def codegen(context, builder, signature, args):
        place = cgutils.alloca_once(builder, VECTOR)
        builder.store(broadcast(builder, args[2]), place)
        with cgutils.for_range(builder, builder.udiv(args[1], INT(LANES)), intp=INT) as loop:
            address = builder.add(args[0], builder.mul(loop.index, INT(LANES * 4)))
            value, largest = load(builder, VECTOR, address), builder.load(place)
            is_larger = builder.fcmp_ordered(">", value, largest)
            builder.store(builder.select(is_larger, value, largest), place)
        kind = ir.FunctionType(FLOAT, [VECTOR])
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(reduce, [builder.load(place)])

    return types.float32(types.intp, types.intp, types.float32), codegen


@intrinsic
def scale(typing_context, x, out, depth, factor):
    """out[:depth] = x[:depth] * factor; x and out addresses, depth a multiple of LANES."""

    def codegen(context, builder, signature, args):
        x, out, depth, factor = args
        factors = broadcast(builder, factor)
        with cgutils.for_range(builder, builder.udiv(depth, INT(LANES)), intp=INT) as loop:
            offset = builder.mul(loop.index, INT(LANES * 4))
            value = load(builder, VECTOR, builder.add(x, offset))
            store(builder, builder.fmul(value, factors), builder.add(out, offset))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.float32), codegen
