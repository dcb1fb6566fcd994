"""Paged attention on a GPU: one kernel body for prefill, chunks, drafts and decode.

A program computes a tile of queries of one sequence for one KV head. Its rows are (query, head)
pairs: the query heads that share the KV head stand side by side, so that keys and values are read
once for all of them and even a single new token fills a matrix product. The softmax is computed as
the tokens go by (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et
al., "FlashAttention", 2022), in base 2, in float32.

Sequences with few queries are decoded: one tile each, their tokens split over several programs
whose results a second kernel combines (Dao et al., "Flash-Decoding", 2023). The number of programs
follows from bounds that the host knows, what each reads from lengths that only the GPU knows: no
launch waits for a number to come back. A sequence that is too short for all of its programs leaves
the others nothing to do, and they end at once; one that is short enough for one program needs no
second kernel.

A cache of codes (see `kv_rows`) is turned into the queries' format in registers. Products are of that
format and summed in float32, and scales are applied outside of them: to the scores of keys, and to
the weights of values. (FP8 products are summed in 14 bits on Hopper, which costs long contexts: "FP8
KV cache", vLLM, 2026.)
"""

import triton
import triton.language as tl

from common.kernels.triton.kv_rows import expand

FP8_UNIT = tl.constexpr(256.0)  # E4M3's codes are expanded to a 256th of what they stand for


@triton.jit
def load_scales(
    keys, places, inside, MASKED: tl.constexpr, VALUES: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Scales of the keys and values at these places, which are multiples of 4; values lie VALUES on."""
    place = (keys + places + HEAD_DIM).to(tl.pointer_type(tl.float32))
    if MASKED:
        key_scales = tl.load(place, mask=inside, other=0.0)
        value_scales = tl.load(place + VALUES // 4, mask=inside, other=0.0)
    else:
        key_scales, value_scales = tl.load(place), tl.load(place + VALUES // 4)
    if keys.dtype.element_ty != tl.int8:
        key_scales, value_scales = key_scales * FP8_UNIT, value_scales * FP8_UNIT
    return key_scales, value_scales


@triton.jit
def attend(
    query,  # [rows, HEAD_PAD]
    acc,
    top,
    total,
    keys,  # of this layer and KV head
    table,
    begin,
    end,  # tokens, begin is a multiple of TILE
    positions,  # [rows]; -1: nothing is seen
    block_stride,
    scale,  # with log2(e)
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Take the tokens from begin to end into the running softmax: acc, its maximum, its total."""
    HAS_CODES: tl.constexpr = keys.dtype.element_ty.is_int()
    columns = tl.arange(0, HEAD_PAD)
    # A tile's blocks are looked up one tile ahead: keys and values then need no load before theirs,
    # and all of Triton's pipeline stages hold keys and values.
    ahead = begin + tl.arange(0, TILE)
    blocks = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        places = blocks.to(tl.int64) * block_stride + tokens % BLOCK_SIZE * TOKEN_STRIDE
        key_places = keys + places[None, :] + columns[:, None]
        value_places = keys + BLOCK_SIZE * TOKEN_STRIDE + places[:, None] + columns[None, :]
        ahead = tokens + TILE
        blocks = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        if MASKED:
            inside = (tokens < end)[:, None] & (columns < HEAD_DIM)[None, :]
            key = tl.load(key_places, mask=tl.trans(inside), other=0)
            value = tl.load(value_places, mask=inside, other=0)
        elif HEAD_PAD > HEAD_DIM:
            key = tl.load(key_places, mask=(columns < HEAD_DIM)[:, None], other=0)
            value = tl.load(value_places, mask=(columns < HEAD_DIM)[None, :], other=0)
        else:
            key = tl.load(key_places)
            value = tl.load(value_places)
        if HAS_CODES:
            key, value = expand(key, query.dtype), expand(value, query.dtype)
            key_scales, value_scales = load_scales(
                keys, places, tokens < end, MASKED, BLOCK_SIZE * TOKEN_STRIDE, HEAD_DIM
            )
            scores = tl.dot(query, key, input_precision="ieee") * (key_scales * scale)[None, :]
        else:
            scores = tl.dot(query, key, input_precision="ieee") * scale
        if MASKED:
            is_seen = tokens[None, :] <= positions[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(is_seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is no number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None]
        if HAS_CODES and query.dtype == tl.float16:
            # A weight times a scale may be too small for float16: relative to the largest it is not.
            most = tl.max(value_scales, axis=0)
            shares = value_scales / tl.where(most > 0, most, 1.0)
            weights *= shares[None, :]
            acc += tl.dot(weights.to(value.dtype), value, input_precision="ieee") * most
        else:
            if HAS_CODES:
                weights *= value_scales[None, :]
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def split_share(span, num_splits, TILE: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """Tokens that each program takes of a sequence's `span` tokens, a multiple of TILE."""
    share = tl.cdiv(tl.cdiv(span, num_splits), TILE) * TILE
    return tl.maximum(share, MIN_SPLIT)


@triton.jit
def first_token(before, window, HAS_WINDOW: tl.constexpr, TILE: tl.constexpr):
    """The tile's first token that a query at position `before` sees, or some before it."""
    begin = tl.zeros([], tl.int32)
    if HAS_WINDOW:
        begin = tl.maximum(before - window + 1, 0) // TILE * TILE
    return begin


@triton.jit
def find_sequence(starts, tile, first_seq, num_seqs, QUERIES: tl.constexpr):
    """The sequence of a tile, and the tile's number within it; below 0: it is no sequence's.

    From first_seq on, sequence i may use the tiles from starts[i] // QUERIES + i - first_seq on;
    there is room for all of them before the next one's, and the last place may stay empty.
    """
    tile += first_seq
    low, high = first_seq, num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(starts + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low, tile - (tl.load(starts + low) // QUERIES + low)


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "layer",
        "num_layers",
        "first_seq",
        "num_seqs",
        "few",
        "window",
    ],
    do_not_specialize_on_alignment=["starts", "lengths", "tables"],
)
def attention_kernel(
    query,  # contiguous, as the cache is: all strides but the table's follow from constants
    kv_cache,
    out,
    parts,  # [num_seqs, few, num_heads, splits, HEAD_DIM] float32, then as many norms
    starts,
    lengths,
    tables,
    table_stride,
    layer,
    num_layers,
    first_seq,  # the first that may not be decoded
    num_seqs,
    few,  # sequences of at most so many queries are decoded, and the others are not
    scale,
    window,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # tokens taken at once
    MIN_SPLIT: tl.constexpr,  # tokens, a multiple of TILE
):
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP
    if DECODE:
        sequence, first = tile, 0
    else:
        # The tiles of a prompt's end see most tokens: they begin first, or they would end last.
        tile = tl.num_programs(0) // NUM_KV_HEADS - 1 - tile
        sequence, number = find_sequence(starts, tile, first_seq, num_seqs, QUERIES)
        first = number * QUERIES
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    if DECODE:
        is_elsewhere = num_queries > few
    else:
        is_elsewhere = num_queries <= few
    if is_elsewhere or first < 0 or first >= num_queries:
        return
    length = tl.load(lengths + sequence)
    before = length - num_queries  # the position of the sequence's first query
    # The tokens that some row of the tile sees, then the program's share of them.
    end = tl.minimum(length, before + tl.minimum(first + QUERIES, num_queries))
    begin = first_token(before + first, window, HAS_WINDOW, TILE)
    if SPLIT:
        span = end - begin
        share = split_share(span, tl.num_programs(1), TILE, MIN_SPLIT)
        num_elsewhere = tl.where(share < span, num_queries, 0)  # queries of which this is a part
        begin += tl.program_id(1) * share
        if begin >= end:
            return
        end = tl.minimum(end, begin + share)
    rows = tl.arange(0, ROWS)
    numbers = first + rows // GROUP
    is_row = (rows < QUERIES * GROUP) & (numbers < num_queries)
    positions = tl.where(is_row, before + numbers, -1)
    heads = kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, HEAD_PAD)
    inside = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    tokens = (start + numbers).to(tl.int64)
    places = (tokens[:, None] * (NUM_KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM
    places += columns[None, :]
    queries = tl.load(query + places, mask=inside, other=0.0)

    # Every row of a prompt's tile sees all tokens of the tiles up to here, unless there is a window:
    # they need no mask. Decoding waits for memory and not for masks, and two loops would have the
    # second begin with nothing on its way.
    whole = begin
    if not (DECODE or HAS_WINDOW):
        whole = tl.maximum(begin, tl.minimum(end, before + first + 1) // TILE * TILE)

    ROW_SIZE: tl.constexpr = HEAD_DIM + 4 if kv_cache.dtype.element_ty.is_int() else HEAD_DIM
    TOKEN_STRIDE: tl.constexpr = NUM_KV_HEADS * ROW_SIZE
    LAYER_STRIDE: tl.constexpr = 2 * BLOCK_SIZE * TOKEN_STRIDE
    block_stride = num_layers.to(tl.int64) * LAYER_STRIDE
    keys = kv_cache + layer.to(tl.int64) * LAYER_STRIDE + kv_head * ROW_SIZE
    table = tables + sequence.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, HEAD_PAD], dtype=tl.float32)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if not (DECODE or HAS_WINDOW):
        acc, top, total = attend(
            queries, acc, top, total, keys, table, begin, whole, positions, block_stride,
            scale, window, False, HAS_WINDOW, BLOCK_SIZE, TOKEN_STRIDE, HEAD_DIM, HEAD_PAD, TILE,
        )  # fmt: skip
    acc, top, total = attend(
        queries, acc, top, total, keys, table, whole, end, positions, block_stride,
        scale, window, True, HAS_WINDOW, BLOCK_SIZE, TOKEN_STRIDE, HEAD_DIM, HEAD_PAD, TILE,
    )  # fmt: skip
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SPLIT:
        slots = (sequence * few + numbers) * (NUM_KV_HEADS * GROUP) + heads
        slots = slots.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        part = parts + slots[:, None] * HEAD_DIM + columns[None, :]
        num_parts = num_seqs.to(tl.int64) * few * (NUM_KV_HEADS * GROUP) * tl.num_programs(1)
        norms = parts + num_parts * HEAD_DIM + slots
        is_part = is_row & (numbers < num_elsewhere)
        tl.store(part, result, mask=inside & is_part[:, None])
        tl.store(norms, top + tl.log2(total), mask=is_part)
        inside = inside & (numbers >= num_elsewhere)[:, None]
    tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["few", "num_splits", "window"],
    do_not_specialize_on_alignment=["starts", "lengths"],
)
def combine_kernel(
    parts,
    out,
    starts,
    lengths,
    few,
    num_splits,
    window,
    HAS_WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,  # the most there are, a power of two
):
    """The parts of one query and head, each weighted by its share of the softmax's total."""
    head = tl.program_id(0) % NUM_HEADS
    sequence = tl.program_id(0) // NUM_HEADS // few
    number = tl.program_id(0) // NUM_HEADS % few
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    if number >= num_queries or num_queries > few:
        return
    length = tl.load(lengths + sequence)
    span = length - first_token(length - num_queries, window, HAS_WINDOW, TILE)
    share = split_share(span, num_splits, TILE, MIN_SPLIT)
    if share >= span:
        return  # one program has done it all
    splits, columns = tl.arange(0, SPLITS), tl.arange(0, HEAD_PAD)
    is_split = splits < tl.cdiv(span, share)
    first = tl.program_id(0).to(tl.int64) * num_splits
    num_parts = tl.num_programs(0).to(tl.int64) * num_splits
    places = parts + num_parts * HEAD_DIM + first + splits
    norms = tl.load(places, mask=is_split, other=float("-inf"))  # and where a program saw nothing
    top = tl.max(norms, axis=0)
    shares = tl.exp2(norms - tl.where(top == float("-inf"), 0.0, top))
    inside = (norms > float("-inf"))[:, None] & (columns < HEAD_DIM)[None, :]
    places = parts + (first + splits)[:, None] * HEAD_DIM + columns[None, :]
    results = tl.load(places, mask=inside, other=0.0)
    total = tl.sum(shares, axis=0)
    result = tl.sum(results * shares[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    place = out + ((start + number).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM + columns
    tl.store(place, result.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
