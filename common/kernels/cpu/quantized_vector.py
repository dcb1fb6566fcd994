"""The inner loops of products with quantised weights; see `quantized_codes` for where codes lie.

`quantized_tile` unpacks codes in registers and uses each at once. `expand` writes a piece of a panel
as floats, for `panel_tile` to multiply.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.quantized_codes import (
    FACTORS,
    NUM_KINDS,
    constant,
    emit_codes,
    step_bytes,
)
from common.kernels.cpu.vector import (
    FAST,
    FEW_ROWS,
    FLOAT,
    INT,
    LANES,
    MAX_ROWS,
    PANEL,
    VECTOR,
    broadcast,
    load,
    multiply_add,
    prefetch,
    store,
)

# Of products with scales: a constant factor joined to a scale could leave the range of floats.
IN_ORDER = ("contract", "nsz")


def emit_steps(
    builder: ir.IRBuilder,
    kind: int,
    depth: ir.Value,
    ahead: ir.Value,
    one_step: Callable[[ir.Value, int], None],
    most: int = 8,
) -> None:
    """one_step(k, turn) for every k < depth, and ask for as many bytes at `ahead`."""
    unroll = max(4, min(most, 64 // step_bytes(kind)))
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
        most = 8 if rows <= FEW_ROWS else 4
        emit_steps(builder, kind, group, next_block, one_step, most)
        offset = builder.mul(loop.index, INT(PANEL * 4))
        own_scales = builder.add(scales, offset)
        for row, vector in tile:
            total = builder.load(group_sums[0, row, vector])
            for turn in range(1, num_sums):
                total = builder.fadd(total, builder.load(group_sums[turn, row, vector]), flags=FAST)
            if kind in FACTORS:
                total = builder.fmul(total, constant(VECTOR, FACTORS[kind]))
            scale = load(builder, VECTOR, part(own_scales, vector))
            place = totals[row, vector]
            total = multiply_add(builder, total, scale, builder.load(place), IN_ORDER)
            builder.store(total, place)
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
    """out[r, :] = start + x[r, :] @ a panel of codes, for r < rows: up to FEW_ROWS, or MAX_ROWS.

    scales, minimums: [num_groups, PANEL] float32; minimums 0 where there are none. sums: of each
    row's inputs of each group. All but kind, rows and numbers of groups and in a group are addresses
    and strides in bytes. ahead: what is asked for meanwhile.
    """

    def codegen(context, builder, signature, args):
        end = builder.append_basic_block("product.end")
        choice = builder.add(builder.mul(args[0], INT(MAX_ROWS + 1)), args[1])
        switch = builder.switch(choice, end)
        for number in range(NUM_KINDS):
            for count in (*range(1, FEW_ROWS + 1), MAX_ROWS):
                block = builder.append_basic_block(f"product.{number}.{count}")
                switch.add_case(INT(number * (MAX_ROWS + 1) + count), block)
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
            if kind in FACTORS:
                value = builder.fmul(value, constant(VECTOR, FACTORS[kind]))
            value = multiply_add(builder, value, factor, term, IN_ORDER)
            store(builder, value, builder.add(place, vector))

    emit_steps(builder, kind, depth, ahead, one_step)


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
