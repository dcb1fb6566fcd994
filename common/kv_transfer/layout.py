"""Where the pieces of a KV cache lie: one piece is one block's keys and values in one layer.

A cache is [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], contiguous: a block is one
piece of memory across its layers, and a layer's share of it is one piece too. The layers of several
caches (a draft model's behind the model's) are counted on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.kernels.cpu.compile import compile_kernel
from common.kernels.cpu.copies import copy_pieces


class Layout:
    """Shapes of caches, and their bytes where they lie on a CPU."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        """Raises ValueError for caches that are not contiguous or differ in their blocks."""
        if not caches or any(not c.is_contiguous() or c.dim() < 3 for c in caches):
            raise ValueError("caches must be contiguous tensors [num_blocks, num_layers, ...]")
        self.num_blocks = len(caches[0])
        if any(len(c) != self.num_blocks for c in caches):
            counts = ", ".join(str(len(c)) for c in caches)
            raise ValueError(f"caches must have as many blocks each, not {counts}")
        self.caches = list(caches)
        self.device = caches[0].device
        self.layers = [(i, layer) for i, c in enumerate(caches) for layer in range(c.shape[1])]
        self.piece_bytes = [c[0, 0].numel() * c.element_size() for c in caches]
        self.num_layers = len(self.layers)
        if self.device.type == "cpu":
            compile_kernel("copy_pieces")  # or from the cache: not when the first pieces wait
        self.block_bytes = sum(self.piece_bytes[cache] for cache, _ in self.layers)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each cache."""
        return [c.numel() * c.element_size() for c in self.caches]

    def describe(self) -> str:
        """What a peer's caches must have in common with these: all but the number of blocks."""
        shapes = ("x".join(map(str, c.shape[1:])) for c in self.caches)
        names = (str(c.dtype).removeprefix("torch.") for c in self.caches)
        return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))

    @property
    def addresses(self) -> list[int]:
        """Where each cache begins."""
        return [c.data_ptr() for c in self.caches]

    def record(self) -> Any:
        """A GPU's event on the current stream; None on a CPU, where what is written is there."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def places(self, base: int, cache: int, layer: int, blocks: Sequence[int]) -> np.ndarray:
        """Addresses of these blocks' pieces in one layer of a cache, int64 [len(blocks)]. base: where the
        cache begins, ours or a peer's."""
        piece = self.piece_bytes[cache]
        block = self.caches[cache].shape[1] * piece
        return base + layer * piece + block * np.array(blocks, dtype=np.int64)


def copy(sources: np.ndarray, targets: np.ndarray, num_bytes: int) -> None:
    """From each address to the one at the same place of `targets`, int64 [count], without the
    interpreter's lock."""
    assert sources.dtype == targets.dtype == np.int64 and len(sources) == len(targets)
    if len(sources):
        copy_pieces(sources.ctypes.data, targets.ctypes.data, len(sources), num_bytes)
