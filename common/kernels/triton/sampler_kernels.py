"""The sampler's kernels: extremes of each chunk, thresholds of each row, the noisy best, the winner."""

import triton
import triton.language as tl

from common.kernels.triton.sampler_search import LARGEST, finite, scaled_logits, search, survey

GREEDY_BELOW = tl.constexpr(1e-5)
MAX_NOISE = tl.constexpr(17.4)  # -log(-log(1 - 2^-25)) is 17.33
ULP = tl.constexpr(2.0**-24)
NO_TOKEN = tl.constexpr(2**31 - 1)


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
def extremes_kernel(
    logits, maxima, minima, tops, logits_stride, VOCAB: tl.constexpr, CHUNK: tl.constexpr
):
    """Of each row and chunk: the largest logit, its first token, and the smallest logit."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = tokens < VOCAB
    x = tl.load(logits + row * logits_stride + tokens, mask=inside, other=0.0)
    x = tl.where(inside, finite(x.to(tl.float32)), float("-inf"))
    largest = tl.max(x, axis=0)
    place = row * tl.num_programs(1) + chunk
    tl.store(maxima + place, largest)
    tl.store(tops + place, tl.min(tl.where(x == largest, tokens, NO_TOKEN), axis=0))
    tl.store(minima + place, tl.min(tl.where(inside, x, LARGEST), axis=0))


@triton.jit
def threshold_kernel(
    logits,
    maxima,
    minima,
    tops,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    positions,
    choices,
    smallest,  # [batch] float32: the smallest logit kept
    bounds,  # [batch] float64: some kept token's logit with its noise
    best,  # [batch] int64: the greedy token
    logits_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two
):
    row = tl.program_id(0).to(tl.int64)
    num_chunks = tl.cdiv(VOCAB, CHUNK)
    chunks = tl.arange(0, CHUNKS)
    maxima += row * num_chunks
    places = row * num_chunks + chunks
    largest = tl.load(maxima + chunks, mask=chunks < num_chunks, other=float("-inf"))
    top = tl.max(largest, axis=0)
    firsts = tl.load(tops + places, mask=chunks < num_chunks, other=NO_TOKEN)
    token = tl.min(tl.where(largest == top, firsts, NO_TOKEN), axis=0)
    tl.store(best + row, token.to(tl.int64))
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    top = finite(tl.div_rn(top, temperature))
    bottom = tl.load(minima + places, mask=chunks < num_chunks, other=LARGEST)
    bottom = finite(tl.div_rn(tl.min(bottom, axis=0), temperature))
    row_logits = logits + row * logits_stride
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    floor = bottom
    if top_k > 0 and top_k < VOCAB:
        goal = top_k.to(tl.float32)
        floor = search(
            row_logits, maxima, VOCAB, temperature, top, bottom, bottom, goal, False, CHUNK
        )
    if top_p < 1:
        total, _, _, _, _ = survey(
            row_logits, maxima, VOCAB, temperature, top, floor, floor, top, floor, top, top,
            True, CHUNK,
        )  # fmt: skip
        # Whatever lies lower weighs nothing beside the top: exp(-32) is 1e-14.
        low = tl.maximum(floor, top - 32)
        floor = search(
            row_logits, maxima, VOCAB, temperature, top, floor, low, top_p * total, True, CHUNK
        )
    floor = tl.maximum(floor, top + tl.log(tl.load(min_ps + row)))
    tl.store(smallest + row, floor)
    choice = tl.zeros([], dtype=tl.int64)
    if choices is not None:
        choice = tl.load(choices + row)
    tokens = token + tl.zeros([1], dtype=tl.int32)
    bits = noise_bits(tl.load(seeds + row), tokens, tl.load(positions + row), choice)
    tl.store(bounds + row, top + tl.sum(gumbel(bits), axis=0))


@triton.jit
def noisy_kernel(
    logits,
    maxima,
    temperatures,
    seeds,
    positions,
    choices,
    smallest,
    bounds,
    noisy,  # [batch, num_chunks] float64: the chunk's largest logit with noise
    tokens_out,  # [batch, num_chunks] int32: its token
    logits_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The noise's logarithms are taken in float64 only where a bound in float32 says that a token
    may yet win: -log(u) is at least 1 - u, so the noise is at most -log(1 - u)."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = row * tl.num_programs(1) + chunk
    temperature = tl.load(temperatures + row)
    if temperature < GREEDY_BELOW:
        return
    floor, bound = tl.load(smallest + row), tl.load(bounds + row)
    largest = finite(tl.div_rn(tl.load(maxima + place), temperature))
    best = tl.full([], float("-inf"), dtype=tl.float64)
    token = tl.full([], NO_TOKEN, dtype=tl.int32)
    if largest >= floor and largest + MAX_NOISE + tl.abs(largest) * 1e-6 >= bound:
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        choice = tl.zeros([], dtype=tl.int64)
        if choices is not None:
            choice = tl.load(choices + row)
        for start in range(0, CHUNK, TILE):
            tokens = chunk * CHUNK + start + tl.arange(0, TILE)
            x = scaled_logits(logits + row * logits_stride, tokens, VOCAB, temperature)
            x = tl.where(x >= floor, x, float("-inf"))
            bits = noise_bits(seed, tokens, position, choice)
            rest = ((16777215 - bits).to(tl.float32) + 0.5) * ULP  # 1 - u
            most = x - tl.log(rest) + 1e-3 + tl.where(x >= floor, tl.abs(x), 0.0) * 1e-6
            if tl.max(most, axis=0) >= bound:
                exact = x.to(tl.float64) + gumbel(bits)
                tile_best = tl.max(exact, axis=0)
                if tile_best > best:
                    best = tile_best
                    token = tl.min(tl.where(exact == tile_best, tokens, NO_TOKEN), axis=0)
                    bound = tl.maximum(bound, best)
    tl.store(noisy + place, best)
    tl.store(tokens_out + place, token)


@triton.jit
def winner_kernel(
    noisy, tokens, temperatures, best, num_chunks: tl.constexpr, CHUNKS: tl.constexpr
):
    """Into `best`, where a row is not greedy: its token of the largest noisy logit."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(temperatures + row) < GREEDY_BELOW:
        return
    chunks = tl.arange(0, CHUNKS)
    inside = chunks < num_chunks
    places = row * num_chunks + chunks
    values = tl.load(noisy + places, mask=inside, other=float("-inf"))
    found = tl.load(tokens + places, mask=inside, other=NO_TOKEN)
    is_best = values == tl.max(values, axis=0)
    tl.store(best + row, tl.min(tl.where(is_best, found, NO_TOKEN), axis=0).to(tl.int64))
