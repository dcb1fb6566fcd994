"""Softmax over the columns of a panel, in vectors: a lane is a query, and steps are its keys.

Nothing is summed across a vector, and sums and maxima stay in registers, so it costs little more
than the exponentials. Written instruction by instruction, like the tiles of `vector`.
"""

import math
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.vector import INT, LANES, PANEL, VECTOR, load, multiply_add, store

SMALLEST = -80.0  # weights are exp(SMALLEST) or more: so they, times a value, are normal numbers
IN_ORDER = ("contract",)  # sums must not be rearranged where rounding is the point
INTS = ir.VectorType(ir.IntType(32), LANES)


def constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def larger(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def exponential(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp of a vector of x <= 0, to about 2e-7 relative; exp(SMALLEST) below that.

    exp(x) = 2^n exp(r) with n = round(x / ln 2), r in [-0.35, 0.35], and exp(r) by its Taylor
    polynomial of degree 6. Adding 1.5 * 2^23 rounds: it leaves n in the lowest bits of the sum.
    """
    x = larger(builder, x, constant(SMALLEST))
    shift = constant(1.5 * 2**23)
    shifted = multiply_add(builder, x, constant(1 / math.log(2)), shift, IN_ORDER)
    n = builder.fsub(shifted, shift, flags=IN_ORDER)
    # ln 2 in two pieces: the first has so few bits that n times it is exact.
    r = multiply_add(builder, n, constant(-0.693359375), x, IN_ORDER)
    r = multiply_add(builder, n, constant(2.12194440e-4), r, IN_ORDER)
    p = constant(1 / math.factorial(6))
    for degree in range(5, -1, -1):
        p = multiply_add(builder, p, r, constant(1 / math.factorial(degree)), IN_ORDER)
    exponent = builder.shl(builder.bitcast(shifted, INTS), ir.Constant(INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(p, INTS), exponent), VECTOR)


@intrinsic
def softmax_step(typing_context, scores, count, highest, total, factor):
    """One step of an online softmax, down the columns of scores[count, PANEL].

    The running maximum and the sum of weights, [PANEL] each, are brought up to date; scores become
    weights, exp(score - maximum), and factor[column] is what sums of earlier weights are to be
    scaled by. All but count are addresses.
    """

    def codegen(context, builder, signature, args):
        emit_softmax_step(builder, *args)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


def emit_softmax_step(
    builder: ir.IRBuilder,
    scores: ir.Value,
    count: ir.Value,
    highest: ir.Value,
    total: ir.Value,
    factor: ir.Value,
) -> None:
    offsets = [INT(0), INT(LANES * 4)]
    places = [cgutils.alloca_once(builder, VECTOR) for _ in offsets]  # running values, per vector

    def for_each_key(visit: Callable[[ir.Value, ir.Value], None]) -> None:
        """visit(address of a vector of scores, its place)."""
        with cgutils.for_range(builder, count, intp=INT) as loop:
            line = builder.add(scores, builder.mul(loop.index, INT(PANEL * 4)))
            for offset, place in zip(offsets, places, strict=True):
                visit(builder.add(line, offset), place)

    def update_highest(address: ir.Value, place: ir.Value) -> None:
        value = load(builder, VECTOR, address)
        builder.store(larger(builder, value, builder.load(place)), place)

    for offset, place in zip(offsets, places, strict=True):
        builder.store(load(builder, VECTOR, builder.add(highest, offset)), place)
    for_each_key(update_highest)

    new = {}
    for offset, place in zip(offsets, places, strict=True):
        address = builder.add(highest, offset)
        new[place] = builder.load(place)
        change = exponential(builder, builder.fsub(load(builder, VECTOR, address), new[place]))
        store(builder, new[place], address)
        store(builder, change, builder.add(factor, offset))
        before = load(builder, VECTOR, builder.add(total, offset))
        store(builder, builder.fmul(before, change), builder.add(total, offset))
        builder.store(constant(0.0), place)

    def weigh(address: ir.Value, place: ir.Value) -> None:
        weight = exponential(builder, builder.fsub(load(builder, VECTOR, address), new[place]))
        store(builder, weight, address)
        builder.store(builder.fadd(builder.load(place), weight), place)

    for_each_key(weigh)
    for offset, place in zip(offsets, places, strict=True):  # to a sum of many, once
        address = builder.add(total, offset)
        before = load(builder, VECTOR, address)
        store(builder, builder.fadd(before, builder.load(place)), address)


@intrinsic
def transpose(typing_context, x, x_stride, out, out_stride):
    """out[j, i] = x[i, j] for a block of LANES * LANES floats; addresses and strides in bytes."""

    def codegen(context, builder, signature, args):
        x, x_stride, out, out_stride = args
        rows = [
            load(builder, VECTOR, builder.add(x, builder.mul(x_stride, INT(i))))
            for i in range(LANES)
        ]
        half = LANES // 2
        low = [i // 2 + i % 2 * LANES for i in range(LANES)]
        # Rows i and i + half are shuffled together like cards: after log2(LANES) times, rows are
        # columns.
        for _ in range(int(math.log2(LANES))):
            pairs = [(rows[i], rows[i + half]) for i in range(half)]
            rows = [
                builder.shuffle_vector(a, b, ir.Constant(INTS, [first + place for place in low]))
                for a, b in pairs
                for first in (0, half)
            ]
        for j in range(LANES):
            store(builder, rows[j], builder.add(out, builder.mul(out_stride, INT(j))))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen
