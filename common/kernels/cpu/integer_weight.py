"""Weights of 8 or 4 bits as `integer_linear` reads them.

A panel is what one pass over the depth reads, in order: for each group its codes, its scales and its
minimums, all of PANEL outputs. Codes of 8 bits lie in pairs of depth steps, [group / 2, PANEL, 2], those
of 4 bits in twice four, [group / 8, PANEL, 4]: the first four steps in the low halves of the bytes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.cpu.integer_embedding import integer_embedding
from common.kernels.cpu.integer_linear import integer_linear
from common.kernels.cpu.integer_tile import CHUNK, HALF_SCALES, PAD
from common.kernels.cpu.pool import Threads
from common.kernels.cpu.quantized_weight import check
from common.kernels.cpu.vector import PANEL
from common.kernels.cpu.weight import WeightMemory
from common.kernels.quantized import QuantizedWeight, unpack_nibbles

BITS = {"int8": 8, "int4": 4, "uint4": 4}
HALF = (torch.float16, torch.float8_e4m3fn)  # of scales and minimums that float16 holds exactly
PARALLEL_INTEGER = 100_000  # elements from which a second core is worth its waking for one token
LONGEST_GROUP = 1 << 17  # inputs: 2^17 * 128 * 127 is the most below 2^31, where sums of int32 end
PANELS_AT_ONCE = 256  # that are filled at once: what is unpacked for it stays small


def is_integer(weight: QuantizedWeight) -> bool:
    """Whether its products are sums of integers: both sides are rounded to few bits."""
    is_rounded = weight.activations == "int8" and weight.kind in BITS
    return is_rounded and weight.group <= LONGEST_GROUP


@dataclass(frozen=True)
class IntegerWeight:
    """A weight, and its bias, zeros where there is none."""

    panels: Tensor  # [num_panels, panel_bytes] uint8
    bias: Tensor  # [num_panels * PANEL]
    order: Tensor | None  # of the inputs
    out_features: int
    in_features: int
    is_large: bool  # worth a second core for one token
    panels_address: int
    bias_address: int
    # What the kernels are told: bits, group, chunks of a group, what codes are too large by (negative),
    # whether scales and minimums are float16, whether there are minimums, bytes of a panel.
    sizes: tuple[int, ...]

    @classmethod
    def pack(
        cls, weight: QuantizedWeight, bias: Tensor | None, memory: WeightMemory
    ) -> "IntegerWeight":
        """Raises ValueError for scales that are no numbers."""
        check(weight)
        out_features, in_features = weight.shape
        bits, num_panels = BITS[weight.kind], -(-out_features // PANEL)
        num_groups = in_features // weight.group
        group_chunks = -(-weight.group // (CHUNK if bits == 4 else PAD))
        code_bytes = group_chunks * PANEL * (CHUNK // 2 if bits == 4 else PAD)
        levels = [level for level in (weight.scales, weight.minimums) if level is not None]
        half = HALF_SCALES and weight.row_scales is None
        half = half and all(level.dtype in HALF for level in levels)
        record = code_bytes + len(levels) * PANEL * (2 if half else 4)
        panel_bytes = num_groups * record
        taken = memory.take(num_panels, panel_bytes // 4).view(torch.uint8)
        for first in range(0, num_panels, PANELS_AT_ONCE):
            part = taken[first : first + PANELS_AT_ONCE]
            some = weight.rows(slice(first * PANEL, (first + len(part)) * PANEL))
            fill_panels(part.view(len(part), num_groups, record), some, code_bytes, half)
        padded_bias = torch.zeros(num_panels * PANEL)
        if bias is not None:
            padded_bias[:out_features] = bias
        return cls(
            taken,
            padded_bias,
            None if weight.order is None else weight.order.clone(),
            out_features,
            in_features,
            out_features * in_features >= PARALLEL_INTEGER,
            taken.data_ptr(),
            padded_bias.data_ptr(),
            (
                bits,
                weight.group,
                group_chunks,
                -8 if weight.kind == "int4" else 0,
                int(half),
                len(levels) - 1,
                panel_bytes,
            ),
        )

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes

    def overwrite(self, weight: QuantizedWeight) -> None:
        """Put another weight of the same form in its place. Raises ValueError."""
        new = self.pack(weight, None, WeightMemory()) if is_integer(weight) else None
        same = new is not None and (new.sizes, new.in_features) == (self.sizes, self.in_features)
        if not same or (new.order is None) != (self.order is None):
            raise ValueError(f"weight: {weight.kind} {weight.shape} {weight.activations}")
        self.panels.copy_(new.panels)
        if self.order is not None:
            self.order.copy_(new.order)

    def linear(self, x: Tensor, threads: Threads) -> Tensor:
        """x: [num_tokens, in_features] float32, contiguous."""
        num_tokens = x.shape[0]
        if self.order is not None:
            x = x[:, self.order]
        out = torch.empty(num_tokens, self.out_features)
        integer_linear(
            x.data_ptr(),
            self.panels_address,
            self.bias_address,
            out.data_ptr(),
            num_tokens,
            self.in_features,
            self.out_features,
            *self.sizes,
            *threads,
        )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """[num_tokens, in_features] of ids int64. Raises IndexError where there is no such row."""
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(*ids.shape, self.in_features)
        addresses = ids.data_ptr(), self.panels_address, out.data_ptr()
        sizes = ids.numel(), self.in_features, self.out_features
        if not integer_embedding(*addresses, *sizes, *self.sizes):
            raise IndexError(f"embedding: ids {ids.min()} to {ids.max()} of {self.out_features}")
        return out if self.order is None else out[..., self.order.argsort()]


def scales_of(weight: QuantizedWeight) -> Tensor:
    scales = weight.scales.float()
    return scales if weight.row_scales is None else scales * weight.row_scales.unsqueeze(1)


def fill_panels(panels: Tensor, weight: QuantizedWeight, code_bytes: int, half: bool) -> None:
    """Write [out_features, in_features] into panels, [num_panels, num_groups, bytes of a group]."""
    num_panels, num_groups, _ = panels.shape
    bits = BITS[weight.kind]
    missing_rows = num_panels * PANEL - weight.shape[0]
    codes = weight.codes.view(torch.uint8) if bits == 8 else unpack_nibbles(weight.codes)
    codes = codes.unflatten(1, (num_groups, weight.group))
    step = CHUNK if bits == 4 else PAD
    codes = F.pad(codes, (0, -weight.group % step, 0, 0, 0, missing_rows))
    codes = codes.unflatten(0, (num_panels, PANEL))
    if bits == 8:
        codes = codes.unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4)
    else:
        low, high = codes.unflatten(3, (-1, 2, 4)).permute(4, 0, 2, 3, 1, 5)
        codes = low | high << 4
    panels[..., :code_bytes] = codes.flatten(2)
    levels = (scales_of(weight), weight.minimums)
    place = code_bytes
    for level in levels:
        if level is not None:
            level = F.pad(level.float(), (0, 0, 0, missing_rows)).unflatten(0, (num_panels, PANEL))
            values = level.to(torch.float16 if half else torch.float32).transpose(1, 2).contiguous()
            values = values.view(torch.uint8)
            panels[..., place : place + values.shape[2]] = values
            place += values.shape[2]
