"""Quantised weights as `quantized_linear` reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels.cpu.pool import Threads
from common.kernels.cpu.quantized_codes import (
    FP4,
    FP8,
    HAS_HALF,
    HAS_TABLE,
    HIGH_FACTOR,
    INT4,
    INT8,
    NF4,
    NUM_KINDS,
    SCALE_BYTES,
)
from common.kernels.cpu.quantized_linear import quantized_linear, quantized_rows
from common.kernels.cpu.vector import FEW_ROWS, LANES, PANEL
from common.kernels.cpu.weight import PARALLEL_LINEAR, WeightMemory
from common.kernels.quantized import (
    BYTES,
    TABLES,
    QuantizedWeight,
    round_activations,
    unpack_nibbles,
)

NUMBERS = {
    "int8": INT8,
    "fp8_e4m3": FP8,
    "int4": INT4,
    "uint4": INT4,
    "fp4_e2m1": FP4,
    "nf4": NF4,
}
assert set(NUMBERS.values()) == set(range(NUM_KINDS))
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
)  # as kernels number them
# Up to so many tokens a kind is unpacked again for every tile of them, and above that once.
MOST_TOKENS = {INT8: 64, INT4: 12, FP8: 12, FP4: 6, NF4: FEW_ROWS}
if HAS_TABLE:  # one instruction looks up either
    MOST_TOKENS |= {FP4: 24, NF4: 24}
AT_ONCE = 64  # panels that are packed at once: what it takes besides the result


@dataclass(frozen=True)
class QuantizedPanels:
    """A quantised weight as kernels read it, and its bias, zeros where there is none."""

    kind: str
    tensors: dict[str, Tensor]  # codes, scales, minimums, row_scales, bias by panel
    table: Tensor  # what kernels take: see quantized_linear's fields
    address: int  # the table's
    values: Tensor  # of each code
    out_features: int
    in_features: int
    group: int
    order: Tensor | None
    activations: str | None
    is_large: bool  # worth a second core for one token

    @classmethod
    def pack(
        cls, weight: QuantizedWeight, bias: Tensor | None, memory: WeightMemory
    ) -> "QuantizedPanels":
        """Raises ValueError for codes or scales that are no numbers."""
        check(weight)
        out_features, in_features = weight.shape
        num_panels = -(-out_features // PANEL)
        rows = torch.ones(1, PANEL)
        if weight.row_scales is not None:
            rows = by_panel(weight.row_scales[:, None], num_panels, memory)
        tensors = {
            "codes": pack_codes(weight, num_panels, memory),
            "scales": by_panel(kept(weight.scales), num_panels, memory),
            "row_scales": rows,
            "bias": torch.zeros(num_panels * PANEL),
        }
        if weight.minimums is not None:
            tensors["minimums"] = by_panel(kept(weight.minimums), num_panels, memory)
        if bias is not None:
            tensors["bias"][:out_features] = bias
        table = torch.tensor(fields(weight, tensors))
        return cls(
            weight.kind,
            tensors,
            table,
            table.data_ptr(),
            values_of(weight.kind),
            out_features,
            in_features,
            weight.group,
            None if weight.order is None else weight.order.clone(),
            weight.activations,
            out_features * in_features >= PARALLEL_LINEAR,
        )

    @property
    def num_bytes(self) -> int:
        """Of codes, scales and all that belongs to them; not of the bias."""
        held = sum(x.nbytes for name, x in self.tensors.items() if name != "bias")
        return held + (0 if self.order is None else self.order.nbytes)

    def overwrite(self, weight: QuantizedWeight) -> None:
        """Another weight of the same format in place. Raises ValueError for another format."""
        other = QuantizedPanels.pack(weight, None, WeightMemory())
        if other.format != self.format:
            raise ValueError(f"quantised weight: {other.format}, to replace {self.format}")
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name])
        if self.order is not None:
            self.order.copy_(other.order)

    @property
    def format(self) -> tuple[object, ...]:
        sizes = {name: (x.dtype, *x.shape) for name, x in self.tensors.items()}
        return self.kind, self.group, self.activations, self.order is None, sizes

    def linear(self, x: Tensor, threads: Threads) -> Tensor:
        """x: [num_tokens, in_features] float32, contiguous."""
        if self.order is not None:
            x = x[:, self.order]
        if self.activations is not None:
            x = round_activations(x, self.activations, self.group).contiguous()
        num_tokens = x.shape[0]
        out = torch.empty(num_tokens, self.out_features)
        quantized_linear(x.data_ptr(), self.address, out.data_ptr(), num_tokens, *threads)
        return out

    def rows(self, token_ids: Tensor) -> Tensor:
        """[num_tokens, in_features] float32. token_ids: [num_tokens] int64, contiguous."""
        out = torch.empty(len(token_ids), self.in_features)
        values = self.values.data_ptr()
        places = token_ids.data_ptr(), self.address, values, out.data_ptr()
        if not quantized_rows(*places, len(token_ids)):
            raise ValueError(f"embedding: {self.out_features} rows, ids up to {token_ids.max()}")
        return out if self.order is None else out[:, self.order.argsort()]


def check(weight: QuantizedWeight) -> None:
    """Raise ValueError where a code or a scale is no number."""
    found = {"codes": 0}
    if weight.kind == "fp8_e4m3":
        found["codes"] = int((weight.codes.view(torch.uint8) & 0x7F == 0x7F).sum())
    for name in ("scales", "minimums", "row_scales"):
        tensor = getattr(weight, name)
        found[name] = 0 if tensor is None else int((~tensor.float().isfinite()).sum())
    for name, count in found.items():
        if count:
            raise ValueError(f"quantised weight: {count} of its {name} are no finite numbers")


def kept(scales: Tensor) -> Tensor:
    """Scales in the dtype that they are kept in: their own, if the machine can read it."""
    return scales if HAS_HALF or scales.dtype is not torch.float16 else scales.float()


def by_panel(scales: Tensor, num_panels: int, memory: WeightMemory) -> Tensor:
    """[out, num_groups] as [num_panels, num_groups, PANEL], zeros behind the last output."""
    out_features, num_groups = scales.shape
    packed = memory.take(num_panels, num_groups, PANEL, dtype=scales.dtype)
    raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scales.dtype.itemsize]
    padded = torch.zeros(num_panels * PANEL, num_groups, dtype=raw)
    padded[:out_features] = scales.view(raw)
    packed.view(raw).copy_(padded.view(num_panels, PANEL, num_groups).transpose(1, 2))
    return packed


def pack_codes(weight: QuantizedWeight, num_panels: int, memory: WeightMemory) -> Tensor:
    """[num_panels, in, PANEL] bytes, or half as many with a nibble of each half of a panel."""
    _, in_features = weight.shape
    is_byte = weight.kind in BYTES
    packed = memory.take(num_panels, in_features, PANEL if is_byte else LANES, dtype=torch.uint8)
    for first in range(0, num_panels, AT_ONCE):
        end = min(first + AT_ONCE, num_panels)
        codes = weight.codes[first * PANEL : end * PANEL].view(torch.uint8)
        codes = codes if is_byte else unpack_nibbles(codes)
        padded = torch.zeros((end - first) * PANEL, in_features, dtype=torch.uint8)
        padded[: len(codes)] = codes
        panels = padded.view(-1, PANEL, in_features).transpose(1, 2)
        if not is_byte:
            panels = panels[..., :LANES] | panels[..., LANES:] << 4
        packed[first:end] = panels
    return packed


def fields(weight: QuantizedWeight, tensors: dict[str, Tensor]) -> list[int]:
    """The weight as `quantized_linear` takes it."""
    is_int4 = NUMBERS[weight.kind] == INT4
    scales, minimums = tensors["scales"].dtype, torch.float32
    if "minimums" in tensors:
        minimums = tensors["minimums"].dtype
    minimum_bytes = minimums.itemsize if "minimums" in tensors else 0
    offset = -8 if weight.kind == "int4" else 0
    out_features, in_features = weight.shape
    row_stride = 0 if weight.row_scales is None else PANEL * 4
    assert scales.itemsize == SCALE_BYTES[DTYPES.index(scales)]
    return [
        NUMBERS[weight.kind],
        DTYPES.index(scales),
        DTYPES.index(minimums),
        int(offset != 0 or minimum_bytes > 0),
        offset,
        int(HIGH_FACTOR) if is_int4 else 1,
        weight.group,
        in_features,
        out_features,
        scales.itemsize,
        minimum_bytes,
        PANEL if weight.kind in BYTES else LANES,
        MOST_TOKENS[NUMBERS[weight.kind]],
        tensors["codes"].data_ptr(),
        tensors["scales"].data_ptr(),
        tensors["minimums"].data_ptr() if minimum_bytes else 0,
        tensors["row_scales"].data_ptr(),
        row_stride,
        tensors["bias"].data_ptr(),
    ]


def values_of(kind: str) -> Tensor:
    """What each code stands for, [256] float32."""
    if kind in BYTES:
        return torch.arange(256).to(torch.uint8).view(BYTES[kind]).float()
    values = torch.zeros(256)
    values[:16] = torch.tensor(TABLES[kind])
    return values
