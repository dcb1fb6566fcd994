"""The search for a filter's threshold among the logits of one row, without a sort.

Count, or weigh, what lies above three places between two bounds, keep the quarter that holds the
threshold, repeat until that quarter holds one value only. Chunks whose largest logit is too small
are not read again.

NaN and -inf become the smallest float32 and +inf the largest, so that all arithmetic is finite; the
places beyond the vocabulary hold -inf.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # float32
MAX_PASSES = tl.constexpr(100)  # of a search; ordinary logits need about ten


@triton.jit
def finite(x):
    return tl.minimum(tl.maximum(tl.where(x == x, x, -LARGEST), -LARGEST), LARGEST)


@triton.jit
def scaled_logits(row, tokens, VOCAB: tl.constexpr, temperature):
    inside = tokens < VOCAB
    x = tl.load(row + tokens, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, finite(tl.div_rn(finite(x), temperature)), float("-inf"))


@triton.jit
def survey(
    row,
    maxima,
    VOCAB: tl.constexpr,
    temperature,
    top,
    floor,
    low,
    high,
    pivot1,
    pivot2,
    pivot3,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What lies at or above each pivot, and the smallest and largest of low <= logit < high.

    Logits count once each, or WEIGHTED, by exp(logit - top) where they are at least the floor.
    """
    above1 = tl.zeros([CHUNK], dtype=tl.float32)
    above2 = tl.zeros([CHUNK], dtype=tl.float32)
    above3 = tl.zeros([CHUNK], dtype=tl.float32)
    smallest = tl.full([CHUNK], float("inf"), dtype=tl.float32)
    largest = tl.full([CHUNK], float("-inf"), dtype=tl.float32)
    for chunk in range(tl.cdiv(VOCAB, CHUNK)):
        if finite(tl.div_rn(tl.load(maxima + chunk), temperature)) >= low:
            tokens = chunk * CHUNK + tl.arange(0, CHUNK)
            x = scaled_logits(row, tokens, VOCAB, temperature)
            if WEIGHTED:
                weight = tl.where(x >= floor, tl.exp(x - top), 0.0)
            else:
                weight = tl.full([CHUNK], 1.0, dtype=tl.float32)
            above1 += tl.where(x >= pivot1, weight, 0.0)
            above2 += tl.where(x >= pivot2, weight, 0.0)
            above3 += tl.where(x >= pivot3, weight, 0.0)
            is_between = (x >= low) & (x < high)
            smallest = tl.minimum(smallest, tl.where(is_between, x, float("inf")))
            largest = tl.maximum(largest, tl.where(is_between, x, float("-inf")))
    above1, above2, above3 = tl.sum(above1, 0), tl.sum(above2, 0), tl.sum(above3, 0)
    return above1, above2, above3, tl.min(smallest, 0), tl.max(largest, 0)


@triton.jit
def search(
    row,
    maxima,
    VOCAB: tl.constexpr,
    temperature,
    top,
    floor,
    low,
    goal,
    WEIGHTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest logit such that those at or above it count, or weigh, `goal` or more.

    low: so much lies at or above it for certain, but for rounding.
    """
    high = tl.full([], float("inf"), dtype=tl.float32)
    # Where most thresholds are; the later pivots divide what is left evenly.
    pivot1, pivot2, pivot3 = top - 32, top - 16, top - 8
    smallest, largest = low, top
    passes = 0
    while smallest < largest and passes < MAX_PASSES:
        above1, above2, above3, smallest, largest = survey(
            row, maxima, VOCAB, temperature, top, floor, low, high, pivot1, pivot2, pivot3,
            WEIGHTED, CHUNK,
        )  # fmt: skip
        if above3 >= goal:
            low = tl.maximum(low, pivot3)
        elif above2 >= goal:
            low = tl.maximum(low, pivot2)
            high = pivot3
        elif above1 >= goal:
            low = tl.maximum(low, pivot1)
            high = pivot2
        else:
            high = tl.minimum(high, pivot1)
        low = tl.where(smallest <= largest, tl.maximum(low, smallest), low)
        ceiling = tl.minimum(largest, high)
        pivot1 = low * 0.75 + ceiling * 0.25
        pivot2 = low * 0.5 + ceiling * 0.5
        pivot3 = low * 0.25 + ceiling * 0.75
        passes += 1
    return low
