"""How products with quantised weights are launched: tiles, splits of the depth, and what is unpacked.

Up to MAX_TOKENS tokens codes are unpacked in the product's main loop. With more, parts of the weight
are unpacked into a scratch that stays in the second-level cache, and multiplied by cuBLAS. On an H200
(3.35 TB/s; at best 700 TFLOPS by cuBLAS, 400 in a loop that unpacks) the pass over the weight costs 1.4 ps
for each number of 4.5 bits, and a token 2.1 fs less than in the loop: even at about 640 tokens.
These are sums on paper; nothing here was tuned by measurement.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from common.kernels.quantized import round_activations
from common.kernels.quantized_support import has_fp8
from common.kernels.triton import quantized_weight
from common.kernels.triton.attention import Device
from common.kernels.triton.quantized_kernel import PRODUCT
from common.kernels.triton.quantized_passes import ROUND, SUM_PARTS, UNPACK
from common.kernels.triton.quantized_weight import PACK_ROWS, PackedWeight, table_of

UNIT = 16  # inputs: a row of x is a multiple of it, so that its loads are as long as they can be
MAX_TOKENS = 512
MAX_TOKENS_FLOAT32 = 64
SCRATCH_BYTES = 32 << 20
FEW_TOKENS = 64  # up to here FP8 products of cuBLAS would fill too few multiprocessors
INTEGER_KINDS = ("int8", "int4", "uint4")
MIN_INTEGER_DEPTH = 32  # of a matrix product of int8
MAX_INTEGER_INPUTS = 1 << 17  # sums of so many products of two codes fit into 31 bits
BLOCK = 1024
PROGRAMS_EACH = 4  # of a multiprocessor, wanted
MAX_SPLITS = 16
MIN_STEPS = 4  # of a program that has a part of the depth
FORMATS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
}


@dataclass(frozen=True)
class Tile:
    rows: int  # outputs
    tokens: int
    num_warps: int
    num_stages: int


# By the tokens. Few: the weight is what is read, and many small programs keep memory busy. The sums of
# groups take registers of their own, and the scales of inputs by group do.
TILES = {16: Tile(64, 16, 4, 4), 64: Tile(64, 64, 4, 3), 128: Tile(128, 128, 8, 3)}
WITH_GROUPS = TILES | {128: Tile(128, 64, 8, 3)}
WITH_SCALED_INPUTS = {16: TILES[16], 64: Tile(64, 32, 4, 3), 128: Tile(64, 32, 4, 3)}


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def fitting(tile: Tile, step_bytes: tuple[int, int], device: Device) -> Tile:
    """The tile with as many pipeline stages as fit in memory, and fewer tokens where two do not.

    step_bytes: of an output's codes and of a token's inputs in one step."""

    def size(tile: Tile) -> int:
        buffers = tile.num_stages - 1 + device.is_hopper
        each = tile.rows * step_bytes[0] + tile.tokens * step_bytes[1]
        return buffers * each + tile.tokens * step_bytes[1] + 4096

    while size(tile) > device.shared_memory and tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
    while size(tile) > device.shared_memory and tile.tokens > 16:
        tile = replace(tile, tokens=tile.tokens // 2)
    return tile


@lru_cache
def tile_for(
    num_tokens: int, step_bytes: tuple[int, int], device: Device, has_groups: bool, is_scaled: bool
) -> Tile:
    """has_groups: of inputs. is_scaled: inputs are codes."""
    tiles = TILES if not has_groups else WITH_SCALED_INPUTS if is_scaled else WITH_GROUPS
    tile = tiles[16 if num_tokens <= 16 else 64 if num_tokens <= 64 else 128]
    return fitting(tile, step_bytes, device)


def num_splits(
    num_tokens: int, num_programs: int, num_steps: int, row_bytes: int, cores: int
) -> int:
    """Over how many programs the depth is split, a power of two.

    As many as give each multiprocessor PROGRAMS_EACH, as long as their sums, written and read in
    float32, are no more bytes than the codes. row_bytes: of an output's codes.
    """
    most = min(
        MAX_SPLITS,
        PROGRAMS_EACH * cores // num_programs,
        num_steps // MIN_STEPS,
        row_bytes // (8 * num_tokens),
    )
    return 1 << max(0, most.bit_length() - 1)


def is_integer(weight: PackedWeight) -> bool:
    """Whether products are those of int8 numbers."""
    return (
        weight.activations == "int8"
        and weight.kind in INTEGER_KINDS
        and weight.depth >= MIN_INTEGER_DEPTH
        and weight.in_features <= MAX_INTEGER_INPUTS
    )


def constants(weight: PackedWeight) -> tuple[Any, ...]:
    steps = weight.steps_per_group
    return weight.kind, weight.scale_format, steps, weight.is_packed, PACK_ROWS, weight.depth


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As `Ops.linear`."""
    if weight.order is not None:
        x = x[:, weight.order]
    x = x.contiguous()
    num_tokens = len(x)
    if num_tokens == 0:
        return x.new_empty(0, weight.out_features)
    if can_scale_fp8(weight, x) and num_tokens > FEW_TOKENS:
        return fp8_product(x, weight, bias)
    most = MAX_TOKENS_FLOAT32 if x.dtype is torch.float32 else MAX_TOKENS
    if num_tokens > most and not is_integer(weight):
        return unpacked_product(x, weight, bias)
    inputs, x_scales = as_inputs(x, weight)
    tile = own_tile(num_tokens, inputs, weight)
    programs = triton.cdiv(weight.out_features, tile.rows) * triton.cdiv(num_tokens, tile.tokens)
    num_steps = weight.num_steps
    cores = num_multiprocessors(x.device)
    row_bytes = num_steps * weight.depth * weight.codes.element_size()
    splits = num_splits(num_tokens, programs, num_steps, row_bytes, cores)
    return product(inputs, x_scales, weight, bias, x.dtype, tile, splits)


def own_tile(num_tokens: int, inputs: Tensor, weight: PackedWeight) -> Tile:
    size = inputs.element_size()
    if size > 2:  # products of float32 take more registers
        num_tokens = 16
    step_bytes = (weight.depth * weight.codes.element_size(), weight.step_inputs * size)
    is_scaled = weight.activations is not None
    return tile_for(
        num_tokens, step_bytes, Device.of(inputs.device), weight.num_groups > 1, is_scaled
    )


def compile_all(dtype: torch.dtype, weight: PackedWeight, bias: Tensor | None) -> None:
    """Launches all that `linear` would launch for inputs of that dtype, by any number of tokens.

    What is compiled depends on the format and on none of the sizes, so that a model has a few
    variants. A weight of a format that was seen before launches nothing.
    """
    device = weight.codes.device
    optional = (weight.minimums, weight.row_scales, bias)
    formats = [None if tensor is None else tensor.dtype for tensor in optional]
    key = (dtype, device, weight.scales.dtype, weight.activations, *constants(weight), *formats)
    weight.compiled_for.add(dtype)
    if key in COMPILED or not PRODUCT.is_compiled:
        return
    COMPILED.add(key)
    x = torch.zeros(1, weight.in_features, dtype=dtype, device=device)
    inputs, x_scales = as_inputs(x, weight)
    for tile in {own_tile(count, inputs, weight) for count in TILES}:
        product(inputs, x_scales, weight, bias, dtype, tile, 2)
    if not is_integer(weight):
        unpacked(weight, dtype, 0, min(weight.out_features, PACK_ROWS))


COMPILED: set[tuple[Any, ...]] = set()


def as_inputs(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor | None]:
    """x as the product takes it: [num_tokens, a multiple of UNIT]; with the scales of its codes,
    [num_tokens, groups], where it is rounded."""
    if spare := -x.shape[1] % UNIT:
        x = F.pad(x, (0, spare))
    if weight.activations is None:
        return x, None
    is_whole = weight.activations == "fp8" or weight.num_groups == 1
    group = x.shape[1] if is_whole else weight.group
    return as_codes(x, group, torch.int8 if is_integer(weight) else x.dtype, weight.activations)


def as_codes(x: Tensor, group: int, dtype: torch.dtype, activations: str) -> tuple[Tensor, Tensor]:
    """(codes in that dtype, scales [num_tokens, groups])"""
    codes = torch.empty_like(x, dtype=dtype)
    num_rows = x.numel() // group
    scales = x.new_empty(len(x), x.shape[1] // group, dtype=torch.float32)
    chunk = min(BLOCK, triton.next_power_of_2(group))
    rows = BLOCK // chunk
    arguments = (x, codes, scales, num_rows, group)
    ROUND((triton.cdiv(num_rows, rows),), arguments, (activations == "fp8", rows, chunk))
    return codes, scales


def product(
    x: Tensor, x_scales: Tensor | None, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype,
    tile: Tile, splits: int,
) -> Tensor:  # fmt: skip
    """[num_tokens, out_features]. x: [num_tokens, a multiple of UNIT], of int8 numbers with x_scales."""
    num_tokens, outs = len(x), weight.out_features
    num_steps = weight.num_steps
    out = x.new_empty(num_tokens, outs, dtype=dtype)
    parts = x.new_empty((splits, num_tokens, outs) if splits > 1 else 0, dtype=torch.float32)
    grid = triton.cdiv(outs, tile.rows), triton.cdiv(num_tokens, tile.tokens), splits
    kind, *others = constants(weight)
    numbers = (num_tokens, outs, weight.num_rows)
    num_groups = 0 if x_scales is None else x_scales.shape[1]
    numbers += (num_groups, x.shape[1] // UNIT, num_steps)
    table = table_of(kind, x.dtype, x.device)
    PRODUCT(
        grid,
        (x, x_scales, weight.codes, weight.scales, weight.row_scales, weight.minimums, table,
         bias, out, parts, *numbers, triton.cdiv(num_steps, splits)),
        (kind, FORMATS[x.dtype], *others, tile.rows, tile.tokens),
        tile.num_warps,
        tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        arguments = (parts, bias, out, splits, out.numel(), outs)
        SUM_PARTS((triton.cdiv(out.numel(), BLOCK),), arguments, (BLOCK,))
    return out


def unpacked(weight: PackedWeight, dtype: torch.dtype, begin: int, end: int) -> Tensor:
    """Outputs `begin` to `end` as numbers, [end - begin, in_features]; begin: a multiple of PACK_ROWS."""
    out = torch.empty(end - begin, weight.in_features, dtype=dtype, device=weight.codes.device)
    num_steps = weight.num_steps
    table = table_of(weight.kind, torch.float32, weight.codes.device)
    UNPACK(
        (triton.cdiv(end - begin, PACK_ROWS), num_steps),
        (weight.codes, weight.scales, weight.row_scales, weight.minimums, table, out,
         weight.num_rows, weight.in_features, begin // PACK_ROWS, end, num_steps),
        constants(weight),
    )  # fmt: skip
    return out


def unpacked_product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Some outputs after others, so that their numbers stay in the cache until they are read."""
    x = round_activations(x, weight.activations, weight.group)
    out = x.new_empty(len(x), weight.out_features)
    each = SCRATCH_BYTES // (weight.in_features * x.element_size())
    each = max(1, each // PACK_ROWS) * PACK_ROWS
    for begin in range(0, weight.out_features, each):
        end = min(begin + each, weight.out_features)
        part = unpacked(weight, x.dtype, begin, end)
        if bias is None:
            torch.mm(x, part.T, out=out[:, begin:end])
        else:
            torch.addmm(bias[begin:end], x, part.T, out=out[:, begin:end])
    return out


def can_scale_fp8(weight: PackedWeight, x: Tensor) -> bool:
    """Whether the GPU's FP8 products take it: inputs by token, outputs by row."""
    return (
        weight.activations == "fp8"
        and weight.kind == "fp8_e4m3"
        and weight.num_groups == 1
        and weight.minimums is None
        and weight.row_scales is None
        and weight.scales.dtype is torch.float32
        and x.dtype is torch.bfloat16  # of what cuBLAS can write with such scales
        and weight.in_features % 16 == weight.out_features % 16 == 0
        and has_fp8(x.device)
    )


def fp8_product(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    codes, scales = as_codes(x, x.shape[1], torch.float8_e4m3fn, "fp8")
    matrix = quantized_weight.matrix(weight).view(torch.float8_e4m3fn)
    row_scales = weight.scales[:, : weight.out_features]
    out = torch._scaled_mm(codes, matrix.T, scale_a=scales, scale_b=row_scales, out_dtype=x.dtype)
    return out if bias is None else out + bias
