"""A mixture of quantised experts: `experts.py` with codes unpacked in the products' main loop."""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.quantized import QuantizedWeight
from common.kernels.triton import quantized_weight
from common.kernels.triton.elementwise import silu_and_mul
from common.kernels.triton.experts import (
    SORT_BY_EXPERT,
    SORT_CHUNK,
    SUM_BLOCK,
    SUM_OF_EXPERTS,
    expert_of_tile,
)
from common.kernels.triton.launch import Launcher
from common.kernels.triton.quantized_kernel import code_places, weighted_sums
from common.kernels.triton.quantized_linear import (
    FORMATS,
    TILES,
    UNIT,
    Tile,
    as_inputs,
    constants,
    own_tile,
)
from common.kernels.triton.quantized_weight import PackedWeight, table_of


@dataclass(frozen=True)
class QuantizedExperts:
    """A layer's experts, every tensor with a first dimension for them (`quantized_weight.stack`)."""

    gate_up: PackedWeight
    down: PackedWeight
    compiled_for: set[torch.dtype] = field(default_factory=set)  # inputs

    @property
    def num_experts(self) -> int:
        return len(self.down.codes)


NUMBERS = ["k", "out_features", "num_padded", "weight_groups", "num_groups", "units", "num_steps"]


@triton.jit(do_not_specialize=NUMBERS)
def grouped_kernel(
    x,
    x_scales,
    codes,
    scales,
    row_scales,
    minimums,
    table,
    order,
    starts,
    out,
    k,
    out_features,
    num_padded,
    weight_groups,
    num_groups,  # of inputs that share a scale
    units,
    num_steps,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,  # as a power of two
    IS_FIRST: tl.constexpr,
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
    """A tile of a grouped product, `product_kernel` with an expert's weight and tokens.

    The first takes rows of tokens, x[token], and writes gate and up in the sorted order. The second
    takes rows in the sorted order and writes each where its choice is, out[token * k + place].
    """
    expert, first, end = expert_of_tile(starts, tl.program_id(0), NUM_EXPERTS, PADDED, TOKENS)
    if first >= end:
        return
    places = first + tl.arange(0, TOKENS)
    has_token = places < end
    choices = tl.load(order + places, mask=has_token, other=0)
    sources, targets = (choices // k, places) if IS_FIRST else (places, choices)
    outputs = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(outputs, num_padded - 1)
    in_features = units * 16
    expert = expert.to(tl.int64)
    own = expert * num_padded * (num_steps * DEPTH)
    own_scales = expert * num_padded * weight_groups
    HAS_X_SCALES: tl.constexpr = x_scales is not None
    HAS_ROW_SCALES: tl.constexpr = row_scales is not None
    HAS_MINIMUMS: tl.constexpr = minimums is not None
    sums = weighted_sums(
        x + sources.to(tl.int64) * in_features,
        has_token,
        x_scales + sources * num_groups if HAS_X_SCALES else x,
        codes + own + code_places(rows, num_steps * DEPTH, IS_PACKED, PACK_ROWS, DEPTH),
        scales + own_scales,
        row_scales + expert * num_padded if HAS_ROW_SCALES else x,
        minimums + own_scales if HAS_MINIMUMS else x,
        table,
        rows, num_padded, num_groups, in_features, 0, num_steps,
        KIND, DTYPE, FORMAT, HAS_X_SCALES, HAS_ROW_SCALES, HAS_MINIMUMS,
        STEPS_PER_GROUP, DEPTH * PACK_ROWS if IS_PACKED else DEPTH, DEPTH, ROWS, TOKENS,
    )  # fmt: skip
    target = out + targets[None, :].to(tl.int64) * out_features + outputs[:, None]
    is_inside = (outputs < out_features)[:, None] & has_token[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=is_inside)


GROUPED = Launcher(grouped_kernel)


def experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    prepared: QuantizedExperts,
    mean: int | None = None,
) -> Tensor:
    """As `Ops.experts`. mean: tokens of an expert that tiles are chosen for; the average unless given."""
    (num_tokens, hidden), k = x.shape, expert_ids.shape[1]
    num_experts, num_slots = prepared.num_experts, num_tokens * k
    mean = mean or triton.cdiv(num_slots, num_experts)
    out = torch.empty_like(x)
    order = torch.empty(num_slots, dtype=torch.int32, device=x.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=x.device)
    arguments = (expert_ids, order, starts, num_slots)
    SORT_BY_EXPERT((num_experts,), arguments, (num_experts, SORT_CHUNK))
    gate_up = grouped(x, prepared.gate_up, (order, starts), k, True, mean)
    results = grouped(silu_and_mul(gate_up), prepared.down, (order, starts), k, False, mean)
    arguments = (results, expert_ids, weights, out, k, num_experts)
    SUM_OF_EXPERTS((num_tokens, triton.cdiv(hidden, SUM_BLOCK)), arguments, (hidden, SUM_BLOCK))
    return out


def grouped(
    x: Tensor, weight: PackedWeight, plan: tuple[Tensor, Tensor], k: int, is_first: bool, mean: int
) -> Tensor:
    """[choices, out_features]. plan: choices by expert, and where each expert's begin."""
    order, starts = plan
    inputs, x_scales = as_inputs(x, weight)
    tile: Tile = own_tile(mean, inputs, weight)
    num_experts, outs = len(weight.codes), weight.out_features
    out = x.new_empty(len(order), outs)
    # Every expert may have a tile that is not full.
    num_tiles = len(order) // tile.tokens + min(num_experts, len(order))
    kind, *others = constants(weight)
    num_groups = 0 if x_scales is None else x_scales.shape[1]
    numbers = (k, outs, weight.num_rows, weight.num_groups, num_groups, inputs.shape[1] // UNIT)
    table = table_of(kind, inputs.dtype, x.device)
    GROUPED(
        (num_tiles, triton.cdiv(outs, tile.rows)),
        (inputs, x_scales, weight.codes, weight.scales, weight.row_scales, weight.minimums,
         table, order, starts, out, *numbers, weight.num_steps),
        (num_experts, triton.next_power_of_2(num_experts), is_first, kind, FORMATS[inputs.dtype],
         *others, tile.rows, tile.tokens),
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    return out


def compile_all(dtype: torch.dtype, prepared: QuantizedExperts) -> None:
    """Launches all that `experts` would launch for inputs of that dtype, by any number of tokens."""
    prepared.compiled_for.add(dtype)
    if GROUPED.is_compiled:
        device = prepared.down.codes.device
        x = torch.zeros(1, prepared.down.out_features, dtype=dtype, device=device)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for mean in TILES:
            experts(x, ids, ids.float(), prepared, mean)


def unpacked(prepared: QuantizedExperts) -> tuple[list[QuantizedWeight], list[QuantizedWeight]]:
    """gate_up and down of each expert, as they were given."""

    def each(weight: PackedWeight) -> list[QuantizedWeight]:
        numbers = range(len(weight.codes))
        return [quantized_weight.unpack(quantized_weight.element(weight, n)) for n in numbers]

    return each(prepared.gate_up), each(prepared.down)
