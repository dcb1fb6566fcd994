"""The search for a filter's threshold among the logits of one row, without a sort.

Marks say where to look: a threshold is between two of them, and mostly few logits are. Among those:
count, or weigh, what lies above three places between two bounds, keep the quarter that holds the
threshold, repeat until that quarter holds one value only.

-inf becomes the smallest float32, so that all arithmetic is finite; places beyond the end hold -inf.
Rows with NaN or +inf do not come here.
"""

import triton
import triton.language as tl

GREEDY_BELOW = tl.constexpr(1e-5)
NUM_MARKS = tl.constexpr(16)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32
MAX_PASSES = tl.constexpr(100)  # of a search; ordinary logits need about ten
WIDE = tl.constexpr(64.0)  # bounds whose distances from the top have such a ratio are far apart


@triton.jit
def finite(x):
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def scaled_logits(source, places, length, temperature):
    inside = places < length
    x = tl.load(source + places, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, finite(tl.div_rn(x, temperature)), float("-inf"))


@triton.jit
def top_of(maxima, row, VOCAB: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A row's largest logit."""
    chunks, num_chunks = tl.arange(0, CHUNKS), tl.cdiv(VOCAB, CHUNK)
    inside = chunks < num_chunks
    found = tl.load(maxima + row * num_chunks + chunks, mask=inside, other=float("-inf"))
    return tl.max(found, axis=0)


@triton.jit
def is_searched(top, temperature, top_k, top_p, VOCAB: tl.constexpr):
    """Whether a row has a threshold to search: it draws, and has top-k or top-p."""
    has_filter = ((top_k > 0) & (top_k < VOCAB)) | (top_p < 1)
    return (tl.abs(top) <= LARGEST) & (temperature >= GREEDY_BELOW) & has_filter


@triton.jit
def marks_below(top):
    """Places between which a threshold is looked for first: dense close to the top, the last but one
    28 below it, where a token weighs nothing (exp(-28) is 7e-13), and the last below all logits.

    Their distances are exact, so two kernels find the same places however each rounds products.
    """
    mark = tl.arange(0, NUM_MARKS)
    distance = ((mark + 1) * (mark + 1)).to(tl.float32) * 0.125
    return tl.where(mark < NUM_MARKS - 1, tl.maximum(top - distance, -LARGEST), -LARGEST)


@triton.jit
def survey(
    source,
    length,
    temperature,
    top,
    low,
    high,
    pivot1,
    pivot2,
    pivot3,
    WEIGHTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """What lies at or above each pivot, and the smallest and largest of low <= logit < high.

    Logits count once each, or WEIGHTED, by exp(logit - top).
    """
    above1 = tl.zeros([TILE], dtype=tl.float32)
    above2 = tl.zeros([TILE], dtype=tl.float32)
    above3 = tl.zeros([TILE], dtype=tl.float32)
    smallest = tl.full([TILE], float("inf"), dtype=tl.float32)
    largest = tl.full([TILE], float("-inf"), dtype=tl.float32)
    for start in range(0, length, TILE):
        x = scaled_logits(source, start + tl.arange(0, TILE), length, temperature)
        if WEIGHTED:
            weight = tl.exp(x - top)
        else:
            weight = tl.full([TILE], 1.0, dtype=tl.float32)
        above1 += tl.where(x >= pivot1, weight, 0.0)
        above2 += tl.where(x >= pivot2, weight, 0.0)
        above3 += tl.where(x >= pivot3, weight, 0.0)
        is_between = (x >= low) & (x < high)
        smallest = tl.minimum(smallest, tl.where(is_between, x, float("inf")))
        largest = tl.maximum(largest, tl.where(is_between, x, float("-inf")))
    above1, above2, above3 = tl.sum(above1, 0), tl.sum(above2, 0), tl.sum(above3, 0)
    return above1, above2, above3, tl.min(smallest, 0), tl.max(largest, 0)


@triton.jit
def pivots_between(low, high, top):
    """Three places that divide what lies between evenly; or, far from the top, evenly in the
    logarithm of the distance from it."""
    far, near = finite(top - low) + 1, finite(top - high) + 1
    pivot1 = low * 0.75 + high * 0.25
    pivot2 = low * 0.5 + high * 0.5
    pivot3 = low * 0.25 + high * 0.75
    if far > near * WIDE:
        middle = tl.sqrt(far) * tl.sqrt(near)
        pivot1 = top + 1 - tl.sqrt(far) * tl.sqrt(middle)
        pivot2 = top + 1 - middle
        pivot3 = top + 1 - tl.sqrt(middle) * tl.sqrt(near)
    return pivot1, pivot2, pivot3


@triton.jit
def search(source, length, temperature, top, low, goal, WEIGHTED: tl.constexpr, TILE: tl.constexpr):
    """The largest logit such that those at or above it count, or weigh, `goal` or more.

    low: so much lies at or above it for certain, but for rounding.
    """
    high = tl.full([], float("inf"), dtype=tl.float32)
    smallest, largest = low, top
    passes = 0
    while smallest < largest and passes < MAX_PASSES:
        pivot1, pivot2, pivot3 = pivots_between(low, tl.minimum(largest, high), top)
        above1, above2, above3, smallest, largest = survey(
            source, length, temperature, top, low, high, pivot1, pivot2, pivot3, WEIGHTED, TILE
        )
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
        passes += 1
    return low


@triton.jit
def sum_above(source, length, temperature, top, floor, TILE: tl.constexpr):
    """How many logits lie above the floor, and what they weigh."""
    count = tl.zeros([TILE], dtype=tl.float32)
    weight = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, length, TILE):
        x = scaled_logits(source, start + tl.arange(0, TILE), length, temperature)
        count += (x > floor).to(tl.float32)
        weight += tl.where(x > floor, tl.exp(x - top), 0.0)
    return tl.sum(count, 0), tl.sum(weight, 0)
