"""The sampler's kernels: what each chunk of a row holds, thresholds of each row, the noisy best.

A chunk is a part of the vocabulary. Kernels that read all logits have programs for each row and
chunk, and what they find of a chunk does not depend on the grid, so a row's sums are rounded the
same in any batch.
"""

import triton
import triton.language as tl

from common.kernels.triton.sampler_search import (
    GREEDY_BELOW,
    LARGEST,
    NUM_MARKS,
    finite,
    is_searched,
    marks_below,
    scaled_logits,
    search,
    sum_above,
    top_of,
)

MAX_NOISE = tl.constexpr(17.4)  # -log(-log(1 - 2^-25)) is 17.33
ULP = tl.constexpr(2.0**-24)
NONE = tl.constexpr(2**31 - 1)  # in the place of a token that is not there
NO_TOKEN = tl.constexpr(-1)  # as in common.sampling
FILTERS = ["temperatures", "top_ks", "top_ps"]
NOISE = ["seeds", "positions", "choices"]


@triton.jit
def noise_bits(seed, tokens, position, choice):
    """The top 24 bits of the first word that `common.sampling.philox` gives. tokens: a block."""
    zeros = tl.zeros_like(tokens).to(tl.uint32)
    words = (tokens.to(tl.uint32), zeros + position.to(tl.uint32), zeros + choice.to(tl.uint32))
    word, _, _, _ = tl.philox(seed, words[0], words[1], words[2], zeros)
    return (word >> 8).to(tl.int32)


@triton.jit
def gumbel(bits):
    return -tl.log(-tl.log((bits.to(tl.float64) + 0.5) * ULP))


@triton.jit
def extremes_kernel(logits, maxima, firsts, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """Of each row and chunk: the largest logit and its first token. NaN counts as +inf."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < VOCAB
    x = tl.load(logits + row * VOCAB + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    largest = tl.max(x, axis=0)
    place = row * tl.num_programs(1) + chunk
    tl.store(maxima + place, largest)
    tl.store(firsts + place, tl.min(tl.where((x == largest) & inside, tokens, NONE), axis=0))


@triton.jit(do_not_specialize_on_alignment=FILTERS)
def marks_kernel(
    logits,
    maxima,
    temperatures,
    top_ks,
    top_ps,
    held,  # [batch, num_chunks, 2, NUM_MARKS] float32: tokens at or above each mark, their weights
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # num_chunks or more, a power of two
    TILE: tl.constexpr,
):
    """Of each row that is searched and each chunk: how many tokens lie above some places, and what
    they weigh, by exp(logit - top)."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    top = top_of(maxima, row, VOCAB, CHUNK, CHUNKS)
    if is_searched(top, temperature, tl.load(top_ks + row), tl.load(top_ps + row), VOCAB):
        num_chunks = tl.cdiv(VOCAB, CHUNK)
        top = finite(tl.div_rn(top, temperature))
        marks = marks_below(top)
        for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
            count = tl.zeros([NUM_MARKS, TILE], dtype=tl.float32)
            weight = tl.zeros([NUM_MARKS, TILE], dtype=tl.float32)
            for start in tl.static_range(0, CHUNK, TILE):
                tokens = chunk * CHUNK + start + tl.arange(0, TILE)
                x = scaled_logits(logits + row * VOCAB, tokens, VOCAB, temperature)
                is_above = x[None, :] >= marks[:, None]
                count += is_above.to(tl.float32)
                weight += tl.where(is_above, tl.exp(x - top)[None, :], 0.0)
            own = held + (row * num_chunks + chunk) * (2 * NUM_MARKS) + tl.arange(0, NUM_MARKS)
            tl.store(own, tl.sum(count, axis=1))
            tl.store(own + NUM_MARKS, tl.sum(weight, axis=1))


@triton.jit(do_not_specialize_on_alignment=FILTERS)
def gather_kernel(
    logits,
    maxima,
    temperatures,
    top_ks,
    top_ps,
    held,
    candidates,  # [batch, MOST] like logits
    found,  # [batch, 3] float32: how many, the mark that they are above, what the whole row weighs
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MOST: tl.constexpr,
):
    """The logits among which a row's threshold is, one after the other: those above the highest
    mark that has enough above it. If they are more than MOST, none is written.

    Those of a chunk begin where those of the chunk before it end."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    top = top_of(maxima, row, VOCAB, CHUNK, CHUNKS)
    if is_searched(top, temperature, top_k, top_p, VOCAB):
        num_chunks = tl.cdiv(VOCAB, CHUNK)
        top = finite(tl.div_rn(top, temperature))
        chunks, mark = tl.arange(0, CHUNKS), tl.arange(0, NUM_MARKS)
        inside = (chunks < num_chunks)[:, None]
        own = held + (row * num_chunks + chunks)[:, None] * (2 * NUM_MARKS) + mark[None, :]
        counts = tl.load(own, mask=inside, other=0.0)
        count = tl.sum(counts, axis=0)
        weight = tl.sum(tl.load(own + NUM_MARKS, mask=inside, other=0.0), axis=0)
        total = tl.sum(tl.where(mark == NUM_MARKS - 1, weight, 0.0), axis=0)
        # With both filters top-k's threshold is among them, and top-p's is not lower.
        is_enough = weight >= top_p * total
        if (top_k > 0) & (top_k < VOCAB):
            is_enough = count >= top_k
        chosen = tl.min(tl.where(is_enough, mark, NUM_MARKS - 1), axis=0)
        low = tl.min(tl.where(mark == chosen, marks_below(top), float("inf")), axis=0)
        length = tl.sum(tl.where(mark == chosen, count, 0.0), axis=0)
        if tl.program_id(1) == 0:
            tl.store(found + row * 3, length)
            tl.store(found + row * 3 + 1, low)
            tl.store(found + row * 3 + 2, total)
        if length <= MOST:
            chosen_counts = tl.where((mark == chosen)[None, :], counts, 0.0)
            own_counts = tl.sum(chosen_counts, axis=1).to(tl.int32)
            for chunk in range(tl.program_id(1), num_chunks, tl.num_programs(1)):
                if tl.sum(tl.where(chunks == chunk, own_counts, 0), axis=0) > 0:
                    begin = tl.sum(tl.where(chunks < chunk, own_counts, 0), axis=0)
                    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
                    x = scaled_logits(logits + row * VOCAB, tokens, VOCAB, temperature)
                    is_kept = x >= low
                    place = row * MOST + begin + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
                    raw = tl.load(logits + row * VOCAB + tokens, mask=is_kept, other=0.0)
                    tl.store(candidates + place, raw, mask=is_kept)


@triton.jit(do_not_specialize_on_alignment=[*FILTERS, "min_ps", *NOISE])
def threshold_kernel(
    logits,
    maxima,
    firsts,
    candidates,
    found,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    choices,
    smallest,  # [batch] float32: the smallest logit kept
    bounds,  # [batch] float64: some kept token's logit with its noise
    best,  # [batch] int64: the greedy token, or NO_TOKEN
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program for each row. Logits that were too many to be gathered are all read, in each pass
    of the search."""
    row = tl.program_id(0).to(tl.int64)
    top = top_of(maxima, row, VOCAB, CHUNK, CHUNKS)
    if tl.abs(top) > LARGEST:  # NaN, +inf, or nothing but -inf
        tl.store(best + row, tl.full([], NO_TOKEN, dtype=tl.int64))
        return
    chunks, num_chunks = tl.arange(0, CHUNKS), tl.cdiv(VOCAB, CHUNK)
    places, inside = row * num_chunks + chunks, chunks < num_chunks
    is_top = tl.load(maxima + places, mask=inside, other=float("-inf")) == top
    token = tl.load(firsts + places, mask=inside, other=NONE)
    token = tl.min(tl.where(is_top, token, NONE), axis=0)
    tl.store(best + row, token.to(tl.int64))
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    is_row_searched = is_searched(top, temperature, top_k, top_p, VOCAB)
    top = finite(tl.div_rn(top, temperature))
    floor = tl.full([], -LARGEST, dtype=tl.float32)
    if is_row_searched:
        source, length = candidates + row * MOST, tl.load(found + row * 3).to(tl.int32)
        floor, total = tl.load(found + row * 3 + 1), tl.load(found + row * 3 + 2)
        if length > MOST:
            source, length = logits + row * VOCAB, tl.full([], VOCAB, dtype=tl.int32)
        if (top_k > 0) & (top_k < VOCAB):
            goal = top_k.to(tl.float32)
            floor = search(source, length, temperature, top, floor, goal, False, TILE)
            # Of those equal to the k-th, only as many weigh as make it k.
            count, weight = sum_above(source, length, temperature, top, floor, TILE)
            total = weight + (goal - count) * tl.exp(floor - top)
        if top_p < 1:
            floor = search(source, length, temperature, top, floor, top_p * total, True, TILE)
    floor = tl.maximum(floor, top + tl.log(tl.load(min_ps + row)))
    tl.store(smallest + row, floor)
    tokens = token + tl.zeros([1], dtype=tl.int32)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    bits = noise_bits(seed, tokens, position, tl.load(choices + row))
    tl.store(bounds + row, top + tl.sum(gumbel(bits), axis=0))


@triton.jit(do_not_specialize_on_alignment=["temperatures", *NOISE])
def noisy_kernel(
    logits,
    maxima,
    temperatures,
    seeds,
    positions,
    choices,
    smallest,
    bounds,
    best,
    noisy,  # [batch, num_chunks] float64: the chunk's largest logit with noise
    tokens_out,  # [batch, num_chunks] int32: its token
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The noise's logarithms are taken in float64 only where a bound in float32 says that a token
    may yet win: -log(u) is at least 1 - u, so the noise is at most -log(1 - u)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + chunk
    temperature = tl.load(temperatures + row)
    if (temperature < GREEDY_BELOW) | (tl.load(best + row) < 0):
        return
    floor, bound = tl.load(smallest + row), tl.load(bounds + row)
    largest = finite(tl.div_rn(tl.load(maxima + place), temperature))
    top = tl.full([], float("-inf"), dtype=tl.float64)
    token = tl.full([], NONE, dtype=tl.int32)
    if largest >= floor and largest + MAX_NOISE + tl.abs(largest) * 1e-6 >= bound:
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        choice = tl.load(choices + row)
        for start in range(0, CHUNK, TILE):
            tokens = chunk * CHUNK + start + tl.arange(0, TILE)
            x = scaled_logits(logits + row * VOCAB, tokens, VOCAB, temperature)
            x = tl.where(x >= floor, x, float("-inf"))
            bits = noise_bits(seed, tokens, position, choice)
            rest = ((16777215 - bits).to(tl.float32) + 0.5) * ULP  # 1 - u
            most = x - tl.log(rest) + 1e-3 + tl.where(x >= floor, tl.abs(x), 0.0) * 1e-6
            if tl.max(most, axis=0) >= bound:
                exact = x.to(tl.float64) + gumbel(bits)
                tile_best = tl.max(exact, axis=0)
                if tile_best > top:
                    top = tile_best
                    token = tl.min(tl.where(exact == tile_best, tokens, NONE), axis=0)
                    bound = tl.maximum(bound, top)
    tl.store(noisy + place, top)
    tl.store(tokens_out + place, token)


@triton.jit(do_not_specialize_on_alignment=["temperatures"])
def winner_kernel(
    noisy, tokens, temperatures, best, NUM_CHUNKS: tl.constexpr, CHUNKS: tl.constexpr
):
    """Into `best`, where a row draws: its token of the largest noisy logit."""
    row = tl.program_id(0).to(tl.int64)
    if (tl.load(temperatures + row) < GREEDY_BELOW) | (tl.load(best + row) < 0):
        return
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < NUM_CHUNKS
    places = row * NUM_CHUNKS + chunks
    values = tl.load(noisy + places, mask=inside, other=float("-inf"))
    found = tl.load(tokens + places, mask=inside, other=NONE)
    is_best = values == tl.max(values, axis=0)
    tl.store(best + row, tl.min(tl.where(is_best, found, NONE), axis=0).to(tl.int64))
