"""How a quantised weight lies in a GPU's memory.

A step of a product takes `depth` elements of each output. With 8 bits an element is a code: a group's, or
a power of two of them that divides it. With 4 bits it is a word of 16 bits, and a step is four such
runs: the first run's codes in the lowest bits of the words, the next run's above them, and so on. So a
thread gets 32 codes by a load of 16 bytes, and two words side by side in a register become two
numbers side by side without being taken apart.

Where a step is short, the outputs' parts of one step lie next to each other, by 64 outputs, so that
memory is read in long pieces. Else outputs lie as they are, in rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.quantized import (
    BYTES,
    TABLES,
    QuantizedWeight,
    can_join,
    pack_nibbles,
    unpack_nibbles,
)

PACK_ROWS = 64
LINE = 128  # bytes of an output's step, at most: a line of the cache
MIN_DEPTH = 16  # of a matrix product
RUNS = dict.fromkeys(BYTES, 1) | dict.fromkeys(TABLES, 4)  # codes of an element
FORMATS = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e8m0fnu: "e8m0",
}  # of scales that come as bytes


@dataclass(frozen=True)
class PackedWeight:
    """[out_features, in_features], both padded: codes and scales of 0.

    codes: [tiles, steps, PACK_ROWS, depth] uint8 or int16, in any order of memory. scales, minimums:
    [groups, tiles * PACK_ROWS]. order: as in `QuantizedWeight`.
    """

    kind: str
    out_features: int
    in_features: int
    group: int  # in_features: one
    codes: Tensor
    scales: Tensor  # float32, float16, bfloat16 or, as `scale_format` says, uint8
    scale_format: str
    minimums: Tensor | None
    row_scales: Tensor | None  # [tiles * PACK_ROWS] float32
    order: Tensor | None
    activations: str | None
    compiled_for: set[torch.dtype] = field(default_factory=set)  # inputs

    @property
    def depth(self) -> int:
        return self.codes.shape[-1]

    @property
    def is_packed(self) -> bool:
        return self.depth * self.codes.element_size() < LINE

    @property
    def num_rows(self) -> int:
        return self.codes.shape[-4] * PACK_ROWS

    @property
    def num_groups(self) -> int:
        return self.scales.shape[-2]

    @property
    def num_steps(self) -> int:
        return self.codes.shape[-3]

    @property
    def step_inputs(self) -> int:
        return self.depth * RUNS[self.kind]

    @property
    def steps_per_group(self) -> int:
        """Runs of `depth` codes that share a scale; 0: all of them."""
        return 0 if self.num_groups == 1 else self.group // self.depth

    @property
    def nbytes(self) -> int:
        names = ("codes", "scales", "minimums", "row_scales", "order")
        tensors = [getattr(self, name) for name in names]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@lru_cache
def table_of(kind: str, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What NF4's codes stand for, [16], in the product's format: in 16 bits, since Triton would copy
    numbers of 32 bits, each alone, into shared memory."""
    return torch.tensor(TABLES[kind], dtype=dtype, device=device) if kind == "nf4" else None


def depth_of(weight: QuantizedWeight) -> int:
    """Elements of a step; 0 where groups are too short or odd for a product."""
    most = LINE if weight.kind in BYTES else LINE // 2
    if weight.group == weight.shape[1]:
        return most
    depth = min(most, weight.group & -weight.group)
    return depth if depth >= MIN_DEPTH else 0


def can_pack(weight: QuantizedWeight) -> bool:
    return depth_of(weight) > 0


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Ask `can_pack` first."""
    out_features, in_features = weight.shape
    scales, row_scales = weight.scales, weight.row_scales
    scale_format = FORMATS.get(scales.dtype, "float")
    if scale_format != "float":
        scales = scales.view(torch.uint8)
    codes = packed_codes(weight)
    spare = codes.shape[0] * PACK_ROWS - out_features
    return PackedWeight(
        weight.kind,
        out_features,
        in_features,
        weight.group,
        codes,
        by_group(scales, codes, weight),
        scale_format,
        None if weight.minimums is None else by_group(weight.minimums, codes, weight),
        None if row_scales is None else F.pad(row_scales.float(), (0, spare)),
        weight.order,
        weight.activations,
    )


def packed_codes(weight: QuantizedWeight) -> Tensor:
    """[tiles, steps, PACK_ROWS, depth] uint8 or int16."""
    out_features, in_features = weight.shape
    depth, runs = depth_of(weight), RUNS[weight.kind]
    codes = weight.codes.view(torch.uint8)
    spare = -in_features % (runs * depth) * codes.shape[1] // in_features, -out_features % PACK_ROWS
    codes = F.pad(codes, (0, spare[0], 0, spare[1])) if any(spare) else codes
    if runs > 1:
        a, b, c, d = unpack_nibbles(codes).unflatten(1, (-1, runs, depth)).unbind(2)
        codes = torch.stack([a | b << 4, c | d << 4], dim=3).flatten(1).view(torch.int16)
    codes = codes.unflatten(1, (-1, depth)).unflatten(0, (-1, PACK_ROWS))
    if depth * codes.element_size() < LINE:
        return codes.transpose(1, 2).contiguous()
    # A view of rows; of 8 bits these are the codes that were given, if nothing had to be added.
    return codes.contiguous().transpose(1, 2)


def by_group(scales: Tensor, codes: Tensor, weight: QuantizedWeight) -> Tensor:
    """[out, groups] as [groups, outputs], for all places that there are codes for."""
    tiles, steps, _, depth = codes.shape
    inputs = steps * depth * RUNS[weight.kind]
    groups = -(-inputs // weight.group) if scales.shape[1] > 1 else 1
    spare = (0, groups - scales.shape[1], 0, tiles * PACK_ROWS - len(scales))
    return F.pad(scales, spare).T.contiguous()


def matrix(packed: PackedWeight) -> Tensor:
    """The codes of 8 bits that lie in rows, [out_features, in_features], as a view."""
    rows = packed.codes.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows[: packed.out_features, : packed.in_features]


def rows(packed: PackedWeight, indices: Tensor) -> QuantizedWeight:
    """Some outputs, [n] int64, as they were given."""
    codes = packed.codes[indices // PACK_ROWS, :, indices % PACK_ROWS]  # [n, steps, depth]
    if packed.kind not in BYTES:
        nibbles = unpack_nibbles(codes.contiguous().view(torch.uint8)).unflatten(2, (-1, 4))
        codes = pack_nibbles(nibbles.transpose(2, 3).flatten(1))
    width = packed.in_features // (1 if packed.kind in BYTES else 2)
    codes = codes.flatten(1)[:, :width]
    num_groups = packed.in_features // packed.group

    def of_rows(by_group: Tensor) -> Tensor:
        return by_group[:num_groups, indices].T

    scales = of_rows(packed.scales)
    if packed.scale_format != "float":
        formats = {name: dtype for dtype, name in FORMATS.items()}
        scales = scales.contiguous().view(formats[packed.scale_format])
    return QuantizedWeight(
        packed.kind,
        codes.contiguous().view(BYTES.get(packed.kind, torch.uint8)),
        scales,
        packed.group,
        None if packed.minimums is None else of_rows(packed.minimums),
        None if packed.row_scales is None else packed.row_scales[indices],
        packed.order,
        packed.activations,
    )


def unpack(weight: PackedWeight | QuantizedWeight) -> QuantizedWeight:
    """The whole weight as it was given."""
    if isinstance(weight, QuantizedWeight):
        return weight
    return rows(weight, torch.arange(weight.out_features, device=weight.codes.device))


TENSORS = ("codes", "scales", "minimums", "row_scales")


def can_stack(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether they are of one format and can be packed, their inputs in their own order."""
    sizes = {weight.shape for weight in weights}
    return (
        len(sizes) == 1 and can_join(weights) and can_pack(weights[0]) and weights[0].order is None
    )


def stack(weights: Sequence[QuantizedWeight]) -> PackedWeight:
    """One after another: every tensor of `TENSORS` gets a first dimension. Ask `can_stack` first."""
    packed = [pack(weight) for weight in weights]

    def stacked(name: str) -> Tensor | None:
        tensors = [getattr(one, name) for one in packed]
        if tensors[0] is None:
            return None
        if name == "codes" and not packed[0].is_packed:  # in rows, as they are
            return torch.stack([codes.transpose(1, 2) for codes in tensors]).transpose(2, 3)
        return torch.stack(tensors)

    return replace(packed[0], **{name: stacked(name) for name in TENSORS})


def format_of(packed: PackedWeight) -> tuple[object, ...]:
    """What weights that lie in one tensor have in common."""
    tensors = [getattr(packed, name) for name in (*TENSORS, "order")]
    dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    sizes = packed.out_features, packed.in_features, packed.group
    return packed.kind, *sizes, packed.scale_format, packed.activations, *dtypes


def overwrite(stacked: PackedWeight, index: int, weight: QuantizedWeight) -> None:
    """Another weight in the place of one, in place. Raises ValueError for another size or format."""
    if not can_pack(weight) or format_of(new := pack(weight)) != format_of(stacked):
        found = f"{weight.kind} {list(weight.shape)} in groups of {weight.group}"
        raise ValueError(f"expert: {found} is of another format than those beside it")
    for name in TENSORS:
        if (own := getattr(stacked, name)) is not None:
            own[index].copy_(getattr(new, name))


def element(stacked: PackedWeight, index: int) -> PackedWeight:
    found = {name: getattr(stacked, name) for name in TENSORS}
    return replace(stacked, **{n: t if t is None else t[index] for n, t in found.items()})
