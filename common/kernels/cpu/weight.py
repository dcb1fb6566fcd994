"""Weights as `linear` reads them, and the memory they lie in.

A decode step reads every weight once, so what counts is how fast memory can be read in order. In
pages of 4 KiB, one line in 64 needs another address translated. Linux has pages of 2 MiB for those
who ask; many weights are no larger than that, so they share pages, one after another. The linear
layers of SmolLM2-135M run 5 % faster for it.
"""

import contextlib
import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels.cpu.vector import PANEL

HUGE_PAGE = 2 << 20
LINE = 64  # bytes
CHUNK = 64 << 20  # bytes asked for at once; those never written take no memory
PARALLEL_LINEAR = 50_000  # elements from which a second core is worth its waking for one token


class WeightMemory:
    """Gives out memory, one piece after another. A chunk is freed when none of its pieces is held."""

    def __init__(self) -> None:
        self.rest = torch.empty(0)  # of the newest chunk

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor. What is smaller than a float32 begins at a line of the cache."""
        size = math.prod(shape)
        num_floats = size if dtype.itemsize == 4 else -(-size * dtype.itemsize // LINE) * LINE // 4
        if num_floats > len(self.rest):
            self.rest = new_chunk(max(CHUNK, num_floats * 4))
        taken, self.rest = self.rest[:num_floats], self.rest[num_floats:]
        return taken.view(dtype)[:size].view(shape)


def new_chunk(num_bytes: int) -> Tensor:
    """Memory for so many bytes of floats, or more; in huge pages, where there are such."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes // 4)
    num_bytes = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


@dataclass(frozen=True)
class PanelWeight:
    """A weight as `linear` reads it, and its bias, zeros where there is none."""

    panels: Tensor  # [num_panels, in_features, PANEL]
    bias: Tensor  # [num_panels * PANEL]
    out_features: int
    in_features: int
    panels_address: int
    bias_address: int
    is_large: bool  # worth a second core for one token

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, memory: WeightMemory) -> "PanelWeight":
        out_features, in_features = weight.shape
        num_panels = -(-out_features // PANEL)
        padded_bias = torch.zeros(num_panels * PANEL)
        if bias is not None:
            padded_bias[:out_features] = bias
        panels = memory.take(num_panels, in_features, PANEL)
        fill_panels(panels, weight)
        addresses = panels.data_ptr(), padded_bias.data_ptr()
        is_large = weight.numel() >= PARALLEL_LINEAR
        return cls(panels, padded_bias, out_features, in_features, *addresses, is_large)


def fill_panels(panels: Tensor, weight: Tensor) -> None:
    """Write [out_features, in_features] into its panels, zeros where the last one is wider."""
    out_features, in_features = weight.shape
    whole = out_features // PANEL
    by_panel = weight[: whole * PANEL].reshape(whole, PANEL, in_features)
    panels[:whole] = by_panel.transpose(1, 2)
    if whole < len(panels):
        panels[whole] = 0
        panels[whole, :, : out_features - whole * PANEL] = weight[whole * PANEL :].T
