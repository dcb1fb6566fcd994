"""Products with quantised weights: codes become numbers in the main loop, on their way to the product.

The weight is the left matrix, so that a tile of it goes from memory through shared memory into
registers, is unpacked there, and is multiplied where it lies (Hopper's products take their left matrix
from registers). Codes are multiplied as they are, which is exact in every format; scales are applied in
float32 to the sum of a group. How codes lie: `quantized_weight.py`.
"""

import triton
import triton.language as tl

from common.kernels.triton.launch import Launcher


@triton.jit
def scale_values(raw, FORMAT: tl.constexpr):
    """Scales in float32; E4M3 and E8M0 come as bytes."""
    if FORMAT == "e8m0":
        bits = raw.to(tl.int32)
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    elif FORMAT == "e4m3":
        bits = raw.to(tl.int32)
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return (
            bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        )  # 2**120, between the biases
    else:
        return raw.to(tl.float32)


@triton.jit
def codes_of_run(packed, run: tl.constexpr, RUNS: tl.constexpr):
    """One run's codes of a step."""
    if RUNS == 1:
        return packed
    else:
        return (packed >> (4 * run)) & 15


@triton.jit
def half_values(codes, table, KIND: tl.constexpr, HALF: tl.constexpr):
    """What codes stand for, exactly, in a format of 16 bits. codes: uint8, or int16 with a nibble.

    Their bits are put where those of the result are, which is faster than a conversion: an integer
    into the mantissa of a number that is then subtracted, an exponent and a mantissa into theirs,
    with a factor for the difference of the biases. NF4 has a table, rounded to the format.
    """
    IS_BF16: tl.constexpr = tl.bfloat16 == HALF
    if KIND == "int8":
        return codes.to(tl.int8, bitcast=True).to(HALF)
    elif KIND == "int4" or KIND == "uint4":
        LARGE: tl.constexpr = 128.0 if IS_BF16 else 1024.0  # its last bit is 1
        BITS: tl.constexpr = 0x4300 if IS_BF16 else 0x6400
        numbers = (codes | BITS).to(HALF, bitcast=True)
        return numbers - tl.full([], LARGE + (8.0 if KIND == "int4" else 0.0), HALF)
    elif KIND == "fp8_e4m3":
        wide = codes.to(tl.int8, bitcast=True).to(tl.int16)  # the sign in all upper bits
        bits = (wide << 4) & -30736 if IS_BF16 else (wide << 7) & -16512  # 0x87f0, 0xbf80
        bias: tl.constexpr = 1.329227995784916e36 if IS_BF16 else 256.0  # 2**120, 2**8
        return bits.to(HALF, bitcast=True) * tl.full([], bias, HALF)
    elif KIND == "fp4_e2m1":
        shift: tl.constexpr = 6 if IS_BF16 else 9
        bits = ((codes & 8) << 12) | ((codes & 7) << shift)
        bias: tl.constexpr = 8.507059173023462e37 if IS_BF16 else 16384.0  # 2**126, 2**14
        return bits.to(HALF, bitcast=True) * tl.full([], bias, HALF)
    else:
        return tl.load(table + codes.to(tl.int32)).to(HALF)


@triton.jit
def values(codes, table, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """What codes stand for, in the product's format."""
    if tl.int8 == DTYPE:
        if KIND == "int8":
            return codes.to(tl.int8, bitcast=True)
        else:
            return (codes - (8 if KIND == "int4" else 0)).to(tl.int8)
    elif tl.float32 == DTYPE:
        if KIND == "nf4":
            return tl.load(table + codes.to(tl.int32))
        else:
            return half_values(codes, table, KIND, tl.float16).to(tl.float32)
    else:
        return half_values(codes, table, KIND, DTYPE)


@triton.jit
def group_scales(
    scales, row_scales, minimums, group, outputs, num_padded,
    FORMAT: tl.constexpr, HAS_ROW_SCALES: tl.constexpr, HAS_MINIMUMS: tl.constexpr,
):  # fmt: skip
    """(scales, minimums) of one group, float32, of each output."""
    place = group * num_padded + outputs
    found = scale_values(tl.load(scales + place), FORMAT)
    if HAS_ROW_SCALES:
        found *= tl.load(row_scales + outputs)
    if HAS_MINIMUMS:
        return found, tl.load(minimums + place).to(tl.float32)
    else:
        return found, found


@triton.jit
def add_group(
    sums, product, scale, minimum, x_scale, x_sum,
    HAS_X_SCALES: tl.constexpr, HAS_MINIMUMS: tl.constexpr,
):  # fmt: skip
    """sums + a group's product times its scales, and its inputs' sum times its minimums."""
    part = product.to(tl.float32) * scale[:, None]
    if HAS_MINIMUMS:
        part += x_sum.to(tl.float32)[None, :] * minimum[:, None]
    if HAS_X_SCALES:
        part *= x_scale[None, :]
    return sums + part


@triton.jit
def weighted_sums(
    x,  # [TOKENS] pointers to the inputs of each token
    has_token,
    x_scales,  # [TOKENS] pointers to the scales of each token
    codes,  # [ROWS] pointers to the first codes of each output
    scales, row_scales, minimums, table,
    outputs, num_padded, num_groups, in_features, first_step, end_step,
    KIND: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, HAS_X_SCALES: tl.constexpr,
    HAS_ROW_SCALES: tl.constexpr, HAS_MINIMUMS: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,  # 0: one group
    STEP_SIZE: tl.constexpr,  # from one step's codes of an output to the next's
    DEPTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] float32: a tile of the weight times inputs, over some steps of the depth.

    A step is DEPTH elements of each output: as many codes of 8 bits, or four runs of as many codes of
    4 bits.
    """
    RUNS: tl.constexpr = 1 if KIND == "int8" or KIND == "fp8_e4m3" else 4
    TOTAL: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    ONE_GROUP: tl.constexpr = STEPS_PER_GROUP == 0
    depths = tl.arange(0, DEPTH)
    left = codes[:, None] + depths[None, :]
    right = x[:, None] + depths[None, :]
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    whole = tl.zeros((ROWS, TOKENS), TOTAL)
    x_total = tl.zeros((TOKENS,), TOTAL)
    x_scale = tl.zeros((TOKENS,), tl.float32)
    for step in range(first_step, end_step):
        packed = tl.load(left + step * STEP_SIZE)
        for run in tl.static_range(RUNS):
            part = step * RUNS + run
            inside = has_token[:, None] & (part * DEPTH + depths < in_features)[None, :]
            inputs = tl.load(right + part * DEPTH, mask=inside, other=0)
            numbers = values(codes_of_run(packed, run, RUNS), table, KIND, DTYPE)
            if ONE_GROUP:
                whole = tl.dot(
                    numbers, tl.trans(inputs), whole, input_precision="tf32x3", out_dtype=TOTAL
                )
                if HAS_MINIMUMS:
                    x_total += tl.sum(inputs.to(TOTAL), axis=1)
            else:
                group = part // STEPS_PER_GROUP
                scale, minimum = group_scales(
                    scales, row_scales, minimums, group, outputs, num_padded,
                    FORMAT, HAS_ROW_SCALES, HAS_MINIMUMS,
                )  # fmt: skip
                product = tl.dot(
                    numbers, tl.trans(inputs), input_precision="tf32x3", out_dtype=TOTAL
                )
                if HAS_MINIMUMS:
                    x_total = tl.sum(inputs.to(TOTAL), axis=1)
                if HAS_X_SCALES:
                    own_group = tl.minimum(group, num_groups - 1)  # a token may have one scale
                    x_scale = tl.load(x_scales + own_group, mask=has_token, other=0.0)
                sums = add_group(
                    sums, product, scale, minimum, x_scale, x_total, HAS_X_SCALES, HAS_MINIMUMS
                )
    if ONE_GROUP:
        scale, minimum = group_scales(
            scales, row_scales, minimums, 0, outputs, num_padded,
            FORMAT, HAS_ROW_SCALES, HAS_MINIMUMS,
        )  # fmt: skip
        if HAS_X_SCALES:
            x_scale = tl.load(x_scales, mask=has_token, other=0.0)
        sums = add_group(sums, whole, scale, minimum, x_scale, x_total, HAS_X_SCALES, HAS_MINIMUMS)
    return sums


@triton.jit
def code_places(
    rows, row_size, IS_PACKED: tl.constexpr, PACK_ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """Where the codes of outputs begin."""
    if IS_PACKED:
        places = (rows // PACK_ROWS).to(tl.int64) * (row_size * PACK_ROWS)
        return places + rows % PACK_ROWS * DEPTH
    else:
        return rows.to(tl.int64) * row_size


NUMBERS = ["num_tokens", "out_features", "num_padded", "num_groups"]
NUMBERS += ["units", "num_steps", "steps_each"]


@triton.jit(do_not_specialize=NUMBERS)
def product_kernel(
    x,  # [num_tokens, 16 * units]
    x_scales,  # [num_tokens, num_groups] float32
    codes,
    scales,  # [groups, num_padded]
    row_scales,  # [num_padded]
    minimums,  # [groups, num_padded]
    table,
    bias,
    out,  # [num_tokens, out_features]
    parts,  # [splits, num_tokens, out_features] float32, if there are several
    num_tokens,
    out_features,
    num_padded,
    num_groups,
    units,
    num_steps,
    steps_each,  # of a program
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    STEPS_PER_GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    PACK_ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A tile of x @ weight.T, over a split of the depth."""
    in_features = units * 16
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    outputs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(2)
    has_token = tokens < num_tokens
    rows = tl.minimum(outputs, num_padded - 1)
    places = code_places(rows, num_steps * DEPTH, IS_PACKED, PACK_ROWS, DEPTH)
    HAS_X_SCALES: tl.constexpr = x_scales is not None
    sums = weighted_sums(
        x + tokens.to(tl.int64) * in_features,
        has_token,
        x_scales + tokens * num_groups if HAS_X_SCALES else x,
        codes + places,
        scales, row_scales, minimums, table,
        rows, num_padded, num_groups, in_features,
        split * steps_each, tl.minimum(split * steps_each + steps_each, num_steps),
        KIND, DTYPE, FORMAT, HAS_X_SCALES, row_scales is not None, minimums is not None,
        STEPS_PER_GROUP, DEPTH * PACK_ROWS if IS_PACKED else DEPTH, DEPTH, ROWS, TOKENS,
    )  # fmt: skip
    place = (split * num_tokens + tokens).to(tl.int64) * out_features
    places = place[None, :] + outputs[:, None]
    is_inside = (outputs < out_features)[:, None] & has_token[None, :]
    if tl.num_programs(2) > 1:
        tl.store(parts + places, sums, mask=is_inside)
    else:
        if bias is not None:
            own = tl.load(bias + outputs, mask=outputs < out_features, other=0.0)
            sums += own.to(tl.float32)[:, None]
        tl.store(out + places, sums.to(out.dtype.element_ty), mask=is_inside)


PRODUCT = Launcher(product_kernel)
