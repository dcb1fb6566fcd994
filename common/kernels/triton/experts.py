"""A mixture of experts on a GPU: tokens sorted by expert, and one launch for each of two products.

A router's choice is known to the GPU alone, and nobody waits for it: buffers and grids are for the
worst that so many tokens can choose, and a program finds from the sorted tokens which expert's rows
are its own, or that it has none. So the same launches serve every choice, and a CUDA graph may hold
them. (The scheme of sorted tokens and grouped products is that of MegaBlocks, arXiv 2211.15841, and
of vLLM's fused MoE.)
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.triton.attention import Device
from common.kernels.triton.launch import Launcher

SORT_CHUNK = 1024  # choices that a program of the sort looks at together
SUM_BLOCK = 1024


@dataclass(frozen=True)
class Tile:
    """A program's part of a product: so many of an expert's tokens, so many columns of gate and of up
    (twice as many of the second product), over steps of `depth`."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By the rows. Few tokens for an expert: its weights are what is read.
TILES = {
    16: Tile(16, 32, 128, 4, 4),
    64: Tile(64, 64, 64, 4, 3),
    128: Tile(128, 64, 64, 8, 3),
}


@dataclass(frozen=True)
class StackedExperts:
    """A layer's experts, one after another."""

    gate_up: Tensor  # [num_experts, 2 * size, hidden]
    down: Tensor  # [num_experts, hidden, size]


@lru_cache
def tile_for(num_slots: int, num_experts: int, dtype: torch.dtype, device: Device) -> Tile:
    """For so many choices of tokens, by the number that an expert has on average; with as many
    pipeline stages as fit in memory."""
    mean = num_slots / num_experts
    return fitting(TILES[16 if mean <= 16 else 64 if mean <= 64 else 128], dtype, device)


def fitting(tile: Tile, dtype: torch.dtype, device: Device) -> Tile:
    if dtype.itemsize > 2:  # products of float32 run without tensor cores
        num_warps = 4 if tile.rows == 16 else 8
        tile = replace(tile, columns=32, depth=tile.depth // 2, num_warps=num_warps)
    while tile.num_stages > 1 and shared_bytes(tile, dtype, device) > device.shared_memory:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    return tile


def shared_bytes(tile: Tile, dtype: torch.dtype, device: Device) -> int:
    """At most, for the rows and weights that are on their way."""
    buffers = tile.num_stages - 1 + device.is_hopper
    return buffers * (tile.rows + 2 * tile.columns) * tile.depth * dtype.itemsize + 2048


@triton.jit(do_not_specialize=["num_slots"])
def sort_by_expert_kernel(
    expert_ids, order, starts, num_slots, NUM_EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):
    """One expert: counts the choices before its own, then writes down where its own are.

    order: the number of a choice, token * k + place, of each sorted one. starts: [NUM_EXPERTS + 1].
    """
    expert = tl.program_id(0)
    places = tl.arange(0, CHUNK)
    position = expert * 0
    for first in range(0, num_slots, CHUNK):
        ids = tl.load(expert_ids + first + places, mask=first + places < num_slots, other=-1)
        position += tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), axis=0)
    tl.store(starts + expert, position)
    for first in range(0, num_slots, CHUNK):
        ids = tl.load(expert_ids + first + places, mask=first + places < num_slots, other=-1)
        is_own = (ids == expert).to(tl.int32)
        rank = tl.cumsum(is_own, axis=0) - 1
        tl.store(order + position + rank, first + places, mask=is_own > 0)
        position += tl.sum(is_own, axis=0)
    if expert == NUM_EXPERTS - 1:
        tl.store(starts + NUM_EXPERTS, position)


@triton.jit
def expert_of_tile(
    starts, tile, NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """(expert, first sorted row, end of its rows) of a tile of rows; first is not below end where
    there are not so many tiles."""
    numbers = tl.arange(0, PADDED)
    inside = numbers < NUM_EXPERTS
    begins = tl.load(starts + numbers, mask=inside, other=0)
    counts = tl.load(starts + 1 + numbers, mask=inside, other=0) - begins
    tiles = tl.where(inside, (counts + ROWS - 1) // ROWS, 0)
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((ends <= tile).to(tl.int32) * inside.to(tl.int32), axis=0)
    is_it = numbers == expert
    row = tile - tl.sum(tl.where(is_it, ends - tiles, 0), axis=0)
    begin = tl.sum(tl.where(is_it, begins, 0), axis=0)
    end = begin + tl.sum(tl.where(is_it, counts, 0), axis=0)
    return expert, begin + row * ROWS, end


@triton.jit(do_not_specialize=["k"])
def experts_kernel(
    x,
    weights,
    order,
    starts,
    out,
    k,
    SIZE: tl.constexpr,  # columns of x
    NUM_COLUMNS: tl.constexpr,  # of out
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,  # as a power of two
    IS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of a grouped product.

    The first takes rows of tokens, x[token], and writes silu(gate) * up in the sorted order. The
    second takes those and writes each where its choice is, out[token * k + place].
    """
    expert, first, end = expert_of_tile(starts, tl.program_id(0), NUM_EXPERTS, PADDED, ROWS)
    if first >= end:
        return
    rows = first + tl.arange(0, ROWS)
    has_row = rows < end
    choices = tl.load(order + rows, mask=has_row, other=0)
    sources, targets = (choices // k, rows) if IS_FIRST else (rows, choices)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    has_column = columns < NUM_COLUMNS
    depths = tl.arange(0, DEPTH)
    num_outputs: tl.constexpr = 2 * NUM_COLUMNS if IS_FIRST else NUM_COLUMNS
    own = weights + expert.to(tl.int64) * (num_outputs * SIZE)
    left = x + sources[:, None].to(tl.int64) * SIZE + depths[None, :]
    right = own + columns[None, :] * SIZE + depths[:, None]
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    other = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, SIZE, DEPTH):
        inside = begin + depths < SIZE
        row_values = tl.load(left + begin, mask=has_row[:, None] & inside[None, :], other=0.0)
        is_weight = has_column[None, :] & inside[:, None]
        values = tl.load(right + begin, mask=is_weight, other=0.0)
        product = tl.dot(row_values, values, product, input_precision="ieee")
        if IS_FIRST:
            values = tl.load(right + NUM_COLUMNS * SIZE + begin, mask=is_weight, other=0.0)
            other = tl.dot(row_values, values, other, input_precision="ieee")
    if IS_FIRST:
        product = product / (1 + tl.exp(-product)) * other
    place = out + targets[:, None].to(tl.int64) * NUM_COLUMNS + columns[None, :]
    is_inside = has_row[:, None] & has_column[None, :]
    tl.store(place, product.to(out.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["k", "num_experts"])
def sum_of_experts_kernel(
    results, expert_ids, weights, out, k, num_experts, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """One token: its results, [k, SIZE], times their weights; those of absent experts are not read."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(k):
        choice = token * k + place
        expert = tl.load(expert_ids + choice)
        is_read = columns < tl.where((expert >= 0) & (expert < num_experts), SIZE, 0)
        values = tl.load(results + choice * SIZE + columns, mask=is_read, other=0.0)
        total += tl.where(is_read, tl.load(weights + choice), 0.0) * values.to(tl.float32)
    place = out + token * SIZE + columns
    tl.store(place, total.to(out.dtype.element_ty), mask=columns < SIZE)


SORT_BY_EXPERT = Launcher(sort_by_expert_kernel)
EXPERTS = Launcher(experts_kernel)
SUM_OF_EXPERTS = Launcher(sum_of_experts_kernel)


def experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, prepared: StackedExperts, tile: Tile
) -> Tensor:
    """As `Ops.experts`. Nothing on a GPU can raise: an expert beyond the last adds nothing."""
    (num_tokens, hidden), k = x.shape, expert_ids.shape[1]
    num_experts, _, size = prepared.down.shape
    num_slots = num_tokens * k
    out = torch.empty_like(x)
    order = torch.empty(num_slots, dtype=torch.int32, device=x.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=x.device)
    inner, results = x.new_empty(num_slots, size), x.new_empty(num_slots, hidden)
    arguments = (expert_ids, order, starts, num_slots)
    SORT_BY_EXPERT((num_experts,), arguments, (num_experts, SORT_CHUNK))
    # Every expert may have a tile that is not full.
    num_tiles = num_slots // tile.rows + min(num_experts, num_slots)
    padded = triton.next_power_of_2(num_experts)
    for is_first, source, matrices, target in (
        (True, x, prepared.gate_up, inner),
        (False, inner, prepared.down, results),
    ):
        sizes = (source.shape[1], target.shape[1], num_experts, padded, is_first)
        columns = tile.columns if is_first else 2 * tile.columns
        EXPERTS(
            (num_tiles, triton.cdiv(target.shape[1], columns)),
            (source, matrices, order, starts, target, k),
            (*sizes, tile.rows, columns, tile.depth),
            tile.num_warps,
            tile.num_stages,
        )
    grid = (num_tokens, triton.cdiv(hidden, SUM_BLOCK))
    arguments = (results, expert_ids, weights, out, k, num_experts)
    SUM_OF_EXPERTS(grid, arguments, (hidden, SUM_BLOCK))
    return out
