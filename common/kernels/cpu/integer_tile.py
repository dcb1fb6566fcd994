"""The inner loop of products of integers: a tile of sums in vector registers, 8 or 4 bits a weight.

It stands to `vector.panel_tile` as integers to floats: the same tile of rows times two vectors of
columns, but an instruction multiplies two depth steps of 16 bits, or four of 8 bits, and adds them up.
Sums of integers are exact. At the end of a group (or of CHUNK steps, for 4 bits) they become floats and
are multiplied by the scales of weight and inputs.

8 bits: weights and inputs are widened to 16 bits; `vpmaddwd` multiplies pairs into sums of 32 bits.
4 bits: weights are codes 0 to 15, inputs are of 8 bits; `vpmaddubsw` multiplies and adds pairs into
16 bits, where 8 such sums fit: 8 * 2 * 15 * 127 = 30,480. That is why CHUNK is 32.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import FEATURES
from common.kernels.cpu.vector import (
    FAST,
    FLOAT,
    INT,
    IS_ARM,
    LANES,
    MAX_ROWS,
    multiply_add,
    prefetch,
    store,
)

CHUNK = 32  # depth steps of 4 bits that are summed up in 16 bits
PAD = 8  # a group of 8 bits is a multiple of so many steps
ROWS = {8: MAX_ROWS, 4: 8 if LANES != 8 else 4}  # of a tile
VECTORS = 2
INFO = 12  # bytes that a tile reads of a row and group of inputs: scale, integer start, sum
HALF_SCALES = bool(FEATURES.get("f16c")) or IS_ARM  # whether float16 is widened by one instruction

BYTE, SHORT, WORD, HALF = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType()


class Instructions:
    """Vectors of `lanes` columns, and the two products; `special`: by the machine's own instruction."""

    def __init__(self, lanes: int, special: bool) -> None:
        self.lanes = lanes
        self.bytes = ir.VectorType(BYTE, lanes * 4)
        self.shorts = ir.VectorType(SHORT, lanes * 2)
        self.words = ir.VectorType(WORD, lanes)
        self.names = None
        if special and lanes == 8 and FEATURES.get("avx2"):
            self.names = "llvm.x86.avx2.pmadd.wd", "llvm.x86.avx2.pmadd.ub.sw"
        elif special and lanes == 16 and FEATURES.get("avx512bw"):
            self.names = "llvm.x86.avx512.pmaddw.d.512", "llvm.x86.avx512.pmaddubs.w.512"

    def constant(self, kind: ir.VectorType, value: int) -> ir.Constant:
        return ir.Constant(kind, [value] * kind.count)

    def spread(self, builder: ir.IRBuilder, word: ir.Value, kind: ir.VectorType) -> ir.Value:
        """32 bits in every column, as a vector of that kind."""
        undefined = ir.Constant(self.words, ir.Undefined)
        first = builder.insert_element(undefined, word, WORD(0))
        whole = builder.shuffle_vector(first, undefined, self.constant(self.words, 0))
        return whole if kind == self.words else builder.bitcast(whole, kind)

    def add_pairs(self, builder: ir.IRBuilder, products: ir.Value) -> ir.Value:
        count = products.type.count // 2
        index = ir.VectorType(WORD, count)
        even = ir.Constant(index, [2 * i for i in range(count)])
        odd = ir.Constant(index, [2 * i + 1 for i in range(count)])
        left = builder.shuffle_vector(products, products, even)
        return builder.add(left, builder.shuffle_vector(products, products, odd))

    def call(self, builder: ir.IRBuilder, name: str, kind: ir.Type, *args: ir.Value) -> ir.Value:
        function = ir.FunctionType(kind, [arg.type for arg in args])
        function = cgutils.get_or_insert_function(builder.module, function, name)
        return builder.call(function, args)

    def multiply_pairs(self, builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
        """Words: the sums of two neighbours' products, of shorts."""
        if self.names:
            return self.call(builder, self.names[0], self.words, a, b)
        wide = ir.VectorType(WORD, self.lanes * 2)
        return self.add_pairs(builder, builder.mul(builder.sext(a, wide), builder.sext(b, wide)))

    def multiply_codes(self, builder: ir.IRBuilder, codes: ir.Value, x: ir.Value) -> ir.Value:
        """Shorts: the sums of two neighbours' products, of bytes: codes unsigned, x signed."""
        if self.names:
            return self.call(builder, self.names[1], self.shorts, codes, x)
        wide = ir.VectorType(SHORT, self.lanes * 4)
        return self.add_pairs(
            builder, builder.mul(builder.zext(codes, wide), builder.sext(x, wide))
        )


class Tile:
    """Writes the code of one tile. The arguments are those of `integer_tile` from x on."""

    def __init__(
        self, builder: ir.IRBuilder, use: Instructions, bits: int, rows: int, args: list[ir.Value]
    ) -> None:
        self.builder, self.use, self.bits, self.rows = builder, use, bits, rows
        self.x, self.x_stride, self.info, self.info_stride, self.w, *rest = args
        self.num_groups, self.group_chunks, self.half, self.has_minimums, *rest = rest
        self.start, self.start_stride, self.out, self.out_stride, self.ahead, self.ahead_step = rest
        self.floats = ir.VectorType(FLOAT, use.lanes)
        self.columns = VECTORS * use.lanes
        self.chunk_bytes = CHUNK // 2 * self.columns if bits == 4 else PAD * self.columns
        self.places = [(row, vector) for row in range(rows) for vector in range(VECTORS)]
        self.sums = {place: cgutils.alloca_once(builder, self.floats) for place in self.places}
        self.integers = {place: cgutils.alloca_once(builder, use.words) for place in self.places}

    def at(self, base: ir.Value, stride: ir.Value, index: int, offset: int = 0) -> ir.Value:
        place = self.builder.add(base, self.builder.mul(stride, INT(index)))
        return self.builder.add(place, INT(offset)) if offset else place

    def load(self, kind: ir.Type, address: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def emit(self) -> None:
        builder, lanes = self.builder, self.use.lanes
        for row, vector in self.places:
            address = self.at(self.start, self.start_stride, row, vector * lanes * 4)
            builder.store(self.load(self.floats, address), self.sums[row, vector])
        codes = builder.mul(self.group_chunks, INT(self.chunk_bytes))
        scale_bytes = builder.select(self.half, INT(self.columns * 2), INT(self.columns * 4))
        record = builder.add(codes, scale_bytes)
        record = builder.select(self.has_minimums, builder.add(record, scale_bytes), record)
        with cgutils.for_range(builder, self.num_groups, intp=INT) as loop:
            group = builder.add(self.w, builder.mul(loop.index, record))
            scales = builder.add(group, codes)
            minimums = builder.add(scales, scale_bytes)
            first = builder.mul(loop.index, self.group_chunks)
            if self.bits == 8:
                for place in self.places:
                    builder.store(ir.Constant(self.use.words, None), self.integers[place])
            with cgutils.for_range(builder, self.group_chunks, intp=INT) as inner:
                w = builder.add(group, builder.mul(inner.index, INT(self.chunk_bytes)))
                chunk = builder.add(first, inner.index)
                self.fetch(chunk)
                if self.bits == 4:
                    self.multiply_4(w, builder.add(self.x, builder.mul(chunk, INT(CHUNK))), chunk)
                    self.add_up(chunk, scales, minimums)
                else:
                    self.multiply_8(w, builder.add(self.x, builder.mul(chunk, INT(PAD * 2))))
            if self.bits == 8:
                self.add_up(loop.index, scales, minimums)
        for row, vector in self.places:
            address = self.at(self.out, self.out_stride, row, vector * lanes * 4)
            store(builder, builder.load(self.sums[row, vector]), address)

    def fetch(self, chunk: ir.Value) -> None:
        """Ask for the memory that is to be multiplied later."""
        place = self.builder.add(self.ahead, self.builder.mul(chunk, self.ahead_step))
        for line in range(-(-self.chunk_bytes // 64)):
            prefetch(self.builder, self.builder.add(place, INT(line * 64)))

    def multiply_8(self, w: ir.Value, x: ir.Value) -> None:
        """PAD steps in depth, two at a time, into `integers`."""
        builder, use = self.builder, self.use
        narrow = ir.VectorType(BYTE, use.lanes * 2)
        for pair in range(PAD // 2):
            weights = []
            for vector in range(VECTORS):
                offset = INT((pair * VECTORS + vector) * use.lanes * 2)
                codes = self.load(narrow, builder.add(w, offset))
                weights.append(builder.sext(codes, use.shorts))
            for row in range(self.rows):
                word = self.load(WORD, self.at(x, self.x_stride, row, pair * 4))
                value = use.spread(builder, word, use.shorts)
                for vector in range(VECTORS):
                    place = self.integers[row, vector]
                    product = use.multiply_pairs(builder, value, weights[vector])
                    builder.store(builder.add(builder.load(place), product), place)

    def multiply_4(self, w: ir.Value, x: ir.Value, chunk: ir.Value) -> None:
        """CHUNK steps in depth, four at a time, summed up in 16 bits and set as `integers`."""
        builder, use = self.builder, self.use
        shorts: dict[tuple[int, int], ir.Value] = {}
        for pair in range(CHUNK // 8):
            weights = []
            for vector in range(VECTORS):
                offset = INT((pair * VECTORS + vector) * use.lanes * 4)
                both = self.load(use.bytes, builder.add(w, offset))
                low = builder.and_(both, use.constant(use.bytes, 15))
                weights.append((low, builder.lshr(both, use.constant(use.bytes, 4))))
            for half in range(2):
                for row in range(self.rows):
                    word = self.load(WORD, self.at(x, self.x_stride, row, (pair * 2 + half) * 4))
                    value = use.spread(builder, word, use.bytes)
                    for vector in range(VECTORS):
                        product = use.multiply_codes(builder, weights[vector][half], value)
                        place = row, vector
                        if place in shorts:
                            product = builder.add(shorts[place], product)
                        shorts[place] = product
        ones = use.constant(use.shorts, 1)
        for row in range(self.rows):
            info = self.at(self.info, self.info_stride, row)
            info = builder.add(info, builder.mul(chunk, INT(INFO)))
            start = use.spread(builder, self.load(WORD, builder.add(info, INT(4))), use.words)
            for vector in range(VECTORS):
                product = use.multiply_pairs(builder, shorts[row, vector], ones)
                builder.store(builder.add(product, start), self.integers[row, vector])

    def factors(self, address: ir.Value) -> list[ir.Value]:
        """Scales or minimums of the columns, from float16 or float32."""
        builder, lanes = self.builder, self.use.lanes
        found = [cgutils.alloca_once(builder, self.floats) for _ in range(VECTORS)]
        with builder.if_else(self.half) as (then, otherwise):
            for branch, kind in ((then, HALF), (otherwise, FLOAT)):
                with branch:
                    for vector, place in enumerate(found):
                        offset = INT(vector * lanes * (2 if kind == HALF else 4))
                        value = self.load(ir.VectorType(kind, lanes), builder.add(address, offset))
                        if kind == HALF:
                            value = builder.fpext(value, self.floats)
                        builder.store(value, place)
        return [builder.load(place) for place in found]

    def add_up(self, index: ir.Value, scales: ir.Value, minimums: ir.Value) -> None:
        """Add `integers`, scaled, to the sums: those of a group, or of a chunk of it."""
        builder = self.builder

        def info(row: int, offset: int) -> ir.Value:
            address = self.at(self.info, self.info_stride, row, offset)
            word = self.load(WORD, builder.add(address, builder.mul(index, INT(INFO))))
            return builder.bitcast(self.use.spread(builder, word, self.use.words), self.floats)

        factors = self.factors(scales)
        for row in range(self.rows):
            scale = info(row, 0)
            for vector in range(VECTORS):
                place = self.sums[row, vector]
                factor = builder.fmul(factors[vector], scale, flags=FAST)
                value = builder.sitofp(builder.load(self.integers[row, vector]), self.floats)
                total = multiply_add(builder, value, factor, builder.load(place))
                builder.store(total, place)
        with builder.if_then(self.has_minimums):
            factors = self.factors(minimums)
            for row in range(self.rows):
                value = info(row, 8)
                for vector in range(VECTORS):
                    place = self.sums[row, vector]
                    total = multiply_add(builder, value, factors[vector], builder.load(place))
                    builder.store(total, place)


def make_integer_tile(lanes: int = LANES, special: bool = True) -> Callable:
    """A tile of 2 * lanes columns, with code for each number of rows up to ROWS."""
    use = Instructions(lanes, special)

    @intrinsic
    def tile(
        typing_context,
        bits,
        rows,
        x,
        x_stride,
        info,
        info_stride,
        w,
        num_groups,
        group_chunks,
        half,
        has_minimums,
        start,
        start_stride,
        out,
        out_stride,
        ahead,
        ahead_step,
    ):
        def codegen(context, builder, signature, args):
            bits, rows, *rest = args
            for i in (7, 8):  # the flags
                rest[i] = builder.icmp_signed("!=", rest[i], INT(0))
            end = builder.append_basic_block("tile.end")
            key = builder.add(builder.mul(bits, INT(256)), rows)
            switch = builder.switch(key, end)
            for size, most in ROWS.items():
                for count in range(1, most + 1):
                    block = builder.append_basic_block(f"tile.{size}.{count}")
                    switch.add_case(INT(size * 256 + count), block)
                    builder.position_at_end(block)
                    Tile(builder, use, size, count, rest).emit()
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 17), codegen

    return tile


# integer_tile(bits, rows, x, x_stride, info, info_stride, w, num_groups, group_chunks, half,
#              has_minimums, start, start_stride, out, out_stride, ahead, ahead_step):
#     out[r, :] = start[r, :] + sum over groups g of
#         (x[r, g] . w[g, :]) * x_scale[r, g] * scales[g, :] + x_sum[r, g] * minimums[g, :]
# over one panel's columns, r < rows <= ROWS[bits]. All but bits, rows, num_groups, group_chunks (of
# PAD or CHUNK steps) and the two flags are addresses and strides in bytes. `IntegerWeight` and
# `quantize_rows` say how the weight, x and info lie.
integer_tile = make_integer_tile()
