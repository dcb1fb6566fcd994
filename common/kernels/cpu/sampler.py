"""Sampling on a CPU: filters without a sort of the vocabulary, noise only where it can matter.

top-k and top-p are both the same question: which is the lowest value v such that what lies above it
weighs less than a target? For top-k each token weighs 1, for top-p its probability. Tokens are
counted into bins by value; the bin that holds the answer is divided again, until few are left.

The draw is the argmax of logits plus Gumbel noise, which is exact in float64 (see common.sampling)
but costs two logarithms a token. So the noise is first computed roughly, in float32 and many tokens
at once, and exactly only for tokens whose rough sum comes near the best one.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from common.kernels.cpu.elementwise import exp32
from common.kernels.cpu.jit import float32_array, helper, int64_array, kernel, next_index
from common.kernels.cpu.pool import spread
from common.kernels.cpu.vector import INT, LANES, VECTOR, highest, store
from common.sampling import _MULTIPLIERS, _WEYL, NO_TOKEN

MASK = np.uint64(0xFFFFFFFF)
MULTIPLIER_0, MULTIPLIER_1 = (np.uint64(m) for m in _MULTIPLIERS)
WEYL_0, WEYL_1 = (np.uint64(w) for w in _WEYL)
SHIFT = np.uint64(32)
NUM_BINS = 2048
FEW = 64  # tokens that are compared one by one rather than divided into bins again
WIDTH = 256  # tokens whose noise is computed together
MOST_NOISE = 17.4  # noise is below this: -log(-log(1 - 2^-25)) is 17.33
ROUGHNESS = 1e-4  # the rough noise is nearer than this to the exact one
GREEDY_BELOW = np.float32(1e-5)
LEAST = np.finfo(np.float32).min  # -inf is below it


@helper(exact=True)
def philox_word(seed, position, choice, token):
    """The first word of Philox4x32-10 for counter (token, position, choice, 0)."""
    k0, k1 = seed & MASK, seed >> SHIFT
    c0, c1, c2, c3 = token, position, choice, np.uint64(0)
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (p1 >> SHIFT) ^ c1 ^ k0, p1 & MASK, (p0 >> SHIFT) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0


@intrinsic
def draw_words(typing_context, seed, position, choice, first, words):
    """The upper 24 bits of the words of LANES tokens from `first` on, as floats, to an address.

    The same arithmetic as philox_word's, in vectors: LLVM would not decide for them by itself.
    """

    def codegen(context, builder, signature, args):
        wide = ir.VectorType(INT, LANES)

        def every(value: int | ir.Value) -> ir.Value:
            if isinstance(value, int):
                return ir.Constant(wide, [value] * LANES)
            zero = ir.Constant(ir.IntType(32), 0)
            first = builder.insert_element(ir.Constant(wide, ir.Undefined), value, zero)
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.shuffle_vector(first, ir.Constant(wide, ir.Undefined), zeros)

        low, half = INT(0xFFFFFFFF), every(32)
        k0, k1 = builder.and_(args[0], low), builder.lshr(args[0], INT(32))
        c0 = builder.add(every(args[3]), ir.Constant(wide, list(range(LANES))))
        c0, c1 = builder.and_(c0, every(0xFFFFFFFF)), every(builder.and_(args[1], low))
        c2, c3 = every(builder.and_(args[2], low)), every(0)
        for _ in range(10):
            p0 = builder.mul(c0, every(_MULTIPLIERS[0]))
            p1 = builder.mul(c2, every(_MULTIPLIERS[1]))
            c0 = builder.xor(builder.xor(builder.lshr(p1, half), c1), every(k0))
            c2 = builder.xor(builder.xor(builder.lshr(p0, half), c3), every(k1))
            c1, c3 = builder.and_(p1, every(0xFFFFFFFF)), builder.and_(p0, every(0xFFFFFFFF))
            k0 = builder.and_(builder.add(k0, INT(_WEYL[0])), low)
            k1 = builder.and_(builder.add(k1, INT(_WEYL[1])), low)
        word = builder.trunc(builder.lshr(c0, every(8)), ir.VectorType(ir.IntType(32), LANES))
        store(builder, builder.sitofp(word, VECTOR), args[4])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64, types.intp, types.intp), codegen


@helper(exact=True)
def exact_noise(seed, position, choice, token):
    x = np.float64(philox_word(seed, position, choice, np.uint64(token)) >> np.uint64(8))
    return -math.log(-math.log((x + 0.5) / 16777216.0))


@helper
def log32(mantissa_minus_1, exponent):
    """log((1 + f) * 2^e) for f in [-0.3, 0.42], to some 1e-6 of f where e is 0."""
    f = mantissa_minus_1
    # log(1 + f) = 2 atanh(s), s = f / (2 + f); |s| < 0.18, so five terms leave 1e-9.
    s = f / (np.float32(2) + f)
    z = s * s
    p = np.float32(1 / 9) * z + np.float32(1 / 7)
    p = (p * z + np.float32(1 / 5)) * z + np.float32(1 / 3)
    return np.float32(2) * (s + s * z * p) + exponent * np.float32(0.6931472)


@helper
def split_float(x):
    """(f, e) with x = (1 + f) * 2^e and 1 + f from sqrt(1/2) to sqrt(2); x positive and normal."""
    bits = np.float32(x).view(np.int32) - np.int32(
        0x3F3504F3
    )  # sqrt(1/2): rounds the exponent at it
    exponent = np.int32(bits >> np.int32(23))
    mantissa = np.int32(bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)
    return np.int32(mantissa).view(np.float32) - np.float32(1), np.float32(exponent)


@helper(exact=True)
def words_to_exponentials(noise):
    """u = (x + 0.5) / 2^24 of each word x, then -log(u), in place."""
    for i in range(len(noise)):
        x = noise[i]
        f, e = split_float((x + np.float32(0.5)) * np.float32(2.0**-24))
        # Near 1 float32 cannot hold u, but it holds u - 1; no faster arithmetic must reorder this.
        below_1 = ((x - np.float32(2.0**24)) + np.float32(0.5)) * np.float32(2.0**-24)
        noise[i] = -log32(below_1 if e == np.float32(0) else f, e)


@helper(exact=True)
def negative_logs(noise):
    for i in range(len(noise)):
        f, e = split_float(noise[i])
        noise[i] = -log32(f, e)


@helper(exact=True)
def rough_noise(seed, position, choice, first, noise):
    """Noise of tokens first, first + 1, … into `noise`, [WIDTH], within ROUGHNESS."""
    for i in range(0, WIDTH, LANES):
        draw_words(seed, position, choice, first + i, noise.ctypes.data + i * 4)
    words_to_exponentials(noise)
    negative_logs(noise)


@helper
def sum_exp(values, largest):
    total = np.float32(0)
    for i in range(len(values)):
        total += exp32(values[i] - largest)
    return np.float64(total)


@helper(exact=True)
def lowest_kept(values, weights, count, target, spare_values, spare_weights):
    """The lowest of values[:count] such that the weights of those above it sum to less than target.

    Values are finite; the spare arrays receive what is left after each division.
    """
    bins, counts = np.empty(NUM_BINS, np.float64), np.empty(NUM_BINS, np.int64)
    above = 0.0
    while count > FEW:
        high = low = np.float64(values[0])
        for i in range(1, count):
            high, low = max(high, values[i]), min(low, values[i])
        if high == low:
            return values[0]
        scale = (NUM_BINS - 1) / (high - low)
        bins[:], counts[:] = 0, 0
        for i in range(count):
            place = np.int64((high - values[i]) * scale)
            bins[place] += weights[i]
            counts[place] += 1
        chosen, before, total = 0, above, above
        for place in range(NUM_BINS):
            if counts[place] > 0:
                if total >= target:
                    break
                chosen, before = place, total
                total += bins[place]
        above, left = before, 0
        for i in range(count):
            if np.int64((high - values[i]) * scale) == chosen:
                spare_values[left], spare_weights[left] = values[i], weights[i]
                left += 1
        values, weights, count = spare_values, spare_weights, left
    result = values[0]
    for i in range(1, count):
        result = max(result, values[i])
    while True:
        following = np.float32(-np.inf)
        for i in range(count):
            if values[i] == result:
                above += weights[i]
            elif values[i] < result:
                following = max(following, values[i])
        if above >= target or following == -np.inf:
            return result
        result = following


@helper(exact=True)
def gather(scaled, lowest, values):
    """Copy those that are at least `lowest`, and possible at all, to `values`; returns how many."""
    found = 0
    lowest = max(lowest, LEAST)
    for begin in range(0, len(scaled), 64):
        block = scaled[begin : begin + 64]
        num_hits = 0
        for i in range(len(block)):
            num_hits += block[i] >= lowest
        if num_hits > 0:
            for i in range(len(block)):
                if block[i] >= lowest:
                    values[found] = block[i]
                    found += 1
    return found


@helper(exact=True)
def threshold(scaled, largest, top_k, top_p, scratch):
    """The smallest logit that top-k, then top-p over what it left, keep.

    Looks near the largest first, where the answer mostly is, and further down if it is not.
    """
    values, weights, spare_values, spare_weights = scratch
    kth = np.float32(-np.inf)
    for reach in (8.0, 24.0, np.inf):
        count = gather(scaled, np.float32(largest - reach), values)
        if 0 < top_k < len(scaled):
            if count >= top_k:
                weights[:count] = 1
                kth = lowest_kept(values, weights, count, top_k, spare_values, spare_weights)
            elif reach < np.inf:
                continue
        if top_p >= 1:
            return kth
        num_kept, num_above, sum_above, total = 0, 0, 0.0, 0.0
        for i in range(count):
            if values[i] >= kth:
                values[num_kept] = values[i]
                num_kept += 1
        for i in range(num_kept):
            weights[i] = exp32(values[i] - largest)
        for i in range(num_kept):
            total += weights[i]
            if values[i] > kth:
                num_above += 1
                sum_above += weights[i]
        found = total
        if kth > -np.inf:  # of those equal to the k-th, only as many count as make it k
            total = sum_above + (top_k - num_above) * np.float64(exp32(kth - largest))
        elif reach < np.inf:
            total = sum_exp(scaled, largest)
        target = np.float64(top_p) * total
        if found >= target or reach == np.inf:
            break
    pth = lowest_kept(values, weights, num_kept, target, spare_values, spare_weights)
    return max(kth, pth)


@helper(exact=True)
def lowest_allowed(scaled, largest, top_k, top_p, log_min_p, scratch):
    """The smallest logit that top-k, then top-p, then min-p keep."""
    smallest = np.float32(largest + log_min_p)
    if 0 < top_k < len(scaled) or top_p < 1:
        smallest = max(smallest, threshold(scaled, largest, top_k, top_p, scratch))
    return smallest


@helper(exact=True)
def find_largest(values):
    """The largest value and its first place."""
    whole = len(values) // LANES * LANES
    largest = highest(values.ctypes.data, whole, np.float32(-np.inf))
    for i in range(whole, len(values)):
        if values[i] > largest:
            largest = values[i]
    for i in range(len(values)):
        if values[i] == largest:
            return largest, i
    return largest, 0


@helper(exact=True)
def has_nan(values):
    """By their bits, which are compared faster than floats: beside the sign those of NaN are above
    those of infinity."""
    bits, found = values.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        found |= np.int32(np.int32(bits[i] & np.int32(0x7FFFFFFF)) + np.int32(0x007FFFFF))
    return found < 0


@helper(exact=True)
def draw(scaled, largest, first, smallest, seed, position, choice, noise):
    """The argmax of logits that are at least `smallest`, plus noise; `first` is the largest's place."""
    token, best = first, np.float64(largest) + exact_noise(seed, position, choice, first)
    for begin in range(0, len(scaled), WIDTH):
        block = scaled[begin : begin + WIDTH]
        worth = max(smallest, np.float32(best - MOST_NOISE), LEAST)
        num_worth = 0
        for i in range(len(block)):
            num_worth += block[i] >= worth
        if num_worth == 0:
            continue
        is_crowded = num_worth > WIDTH // 16
        if is_crowded:
            rough_noise(seed, position, choice, begin, noise)
        for i in range(len(block)):
            if block[i] < worth or (is_crowded and block[i] + noise[i] < best - ROUGHNESS):
                continue
            noisy = block[i] + exact_noise(seed, position, choice, begin + i)
            if noisy > best or (noisy == best and begin + i < token):
                token, best = begin + i, noisy
    return token


@helper(exact=True)
def sample_row(
    logits, temperature, top_k, top_p, log_min_p, seed, position, choice, scratch, noise
):
    """The token of one row; an impossible one, -inf, is not drawn. NO_TOKEN where there is no other,
    or NaN or +inf is among them."""
    if has_nan(logits):
        return NO_TOKEN
    if not temperature >= GREEDY_BELOW:
        largest, first = find_largest(logits)
        return first if math.isfinite(largest) else NO_TOKEN
    scaled = scratch[0]
    for i in range(len(logits)):
        scaled[i] = logits[i] / temperature
    largest, first = find_largest(scaled)
    if not math.isfinite(largest):  # finite logits may be too large for a small temperature
        return first if math.isfinite(find_largest(logits)[0]) else NO_TOKEN
    smallest = lowest_allowed(scaled, largest, top_k, top_p, log_min_p, scratch[1:])
    return draw(scaled, largest, first, smallest, seed, position, choice, noise)


@helper(exact=True)
def sample_rows(rows, filters, places, tokens, next, thread, num_threads):
    """Draw for one row after another, until none is left."""
    temperatures, top_ks, top_ps, log_min_ps = filters
    seeds, positions, choices = places
    num_rows, vocab = rows.shape
    scaled = np.empty((5, vocab), np.float32)
    scratch = (scaled[0], scaled[1], scaled[2], scaled[3], scaled[4])
    noise = np.empty(WIDTH, np.float32)
    row = next_index(next.ctypes.data)
    while row < num_rows:
        tokens[row] = sample_row(
            rows[row],
            temperatures[row],
            top_ks[row],
            top_ps[row],
            log_min_ps[row],
            np.uint64(seeds[row]),
            np.uint64(positions[row]),
            np.uint64(choices[row]),
            scratch,
            noise,
        )
        row = next_index(next.ctypes.data)


@kernel(exact=True)
def sample(
    logits,
    temperature,
    top_k,
    top_p,
    log_min_p,
    seeds,
    positions,
    choices,
    out,
    num_rows,
    vocab,
    num_threads,
    pool,
):
    rows = float32_array(logits, (num_rows, vocab))
    temperatures = float32_array(temperature, (num_rows,))
    top_ks, top_ps = int64_array(top_k, (num_rows,)), float32_array(top_p, (num_rows,))
    log_min_ps = float32_array(log_min_p, (num_rows,))
    seeds_of, positions_of = int64_array(seeds, (num_rows,)), int64_array(positions, (num_rows,))
    choices_of = int64_array(choices, (num_rows,))
    tokens = int64_array(out, (num_rows,))
    filters = (temperatures, top_ks, top_ps, log_min_ps)
    places = (seeds_of, positions_of, choices_of)
    spread(sample_rows, (rows, filters, places, tokens, np.zeros(1, np.int64)), num_threads, pool)


@helper(exact=True)
def filter_rows(rows, top_ks, top_ps, log_min_ps, smallest, next, thread, num_threads):
    num_rows, vocab = rows.shape
    spare = np.empty((4, vocab), np.float32)
    scratch = (spare[0], spare[1], spare[2], spare[3])
    row = next_index(next.ctypes.data)
    while row < num_rows:
        largest = find_largest(rows[row])[0]
        smallest[row] = lowest_allowed(
            rows[row], largest, top_ks[row], top_ps[row], log_min_ps[row], scratch
        )
        row = next_index(next.ctypes.data)


@kernel(exact=True)
def smallest_kept(logits, top_k, top_p, log_min_p, out, num_rows, vocab, num_threads, pool):
    rows = float32_array(logits, (num_rows, vocab))
    top_ks, top_ps = int64_array(top_k, (num_rows,)), float32_array(top_p, (num_rows,))
    log_min_ps = float32_array(log_min_p, (num_rows,))
    smallest = float32_array(out, (num_rows,))
    arguments = (rows, top_ks, top_ps, log_min_ps, smallest, np.zeros(1, np.int64))
    spread(filter_rows, arguments, num_threads, pool)
