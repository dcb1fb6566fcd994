"""Where the pieces of a KV cache lie: one piece is one block's keys and values in one layer.

A cache is [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], contiguous: a block is one
piece of memory across its layers, and a layer's share of it is one piece too. The layers of several
caches (a draft model's behind the model's) are counted on.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


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

    def views(self) -> list[np.ndarray]:
        """The caches' bytes, uint8 [num_blocks, num_layers, piece_bytes], on a CPU."""
        flat = [c.view(*c.shape[:2], -1).view(torch.uint8).numpy() for c in self.caches]
        return [view.reshape(*view.shape[:2], -1) for view in flat]

    def views_of(self, memories: Sequence[np.ndarray], num_blocks: int) -> list[np.ndarray]:
        """The same of a peer's memory, uint8 [bytes] each, whose pool has another size."""
        shapes = [
            (num_blocks, c.shape[1], n) for c, n in zip(self.caches, self.piece_bytes, strict=True)
        ]
        return [m.reshape(shape) for m, shape in zip(memories, shapes, strict=True)]


def runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Blocks that follow each other on both sides, as (source, target, count): each is one copy."""
    begin = 0
    for i in range(1, len(sources) + 1):
        whole = i < len(sources)
        if whole and sources[i] == sources[i - 1] + 1 and targets[i] == targets[i - 1] + 1:
            continue
        yield sources[begin], targets[begin], i - begin
        begin = i
