"""The KV cache as fixed-size blocks: one tensor, and a pool that counts each block's owners.

A sequence's keys and values lie in blocks of `block_size` tokens, taken from anywhere in the pool and
found through the sequence's block table, as pages are by an operating system (Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023). No gap is left
between sequences.
"""

from collections import OrderedDict

import torch

from common.kv_memory import allocate_kv
from common.models.architecture import ModelConfig


class BlockPool:
    """Which blocks are free, and how many owners each of the others has.

    Free blocks are handed out in the order in which they became free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self.free_blocks)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. Ask `can_allocate` first."""
        assert self.can_allocate(count), f"{count} blocks wanted, {self.num_free} free"
        blocks = [self.free_blocks.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Become one more owner of each block; one that is free is free no longer."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self.free_blocks[block]
            self.ref_counts[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Give up one ownership of each block; the last block of a sequence is free first."""
        for block in reversed(blocks):
            assert self.ref_counts[block] > 0, f"block {block} is free already"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks[block] = None

    def hand_out_first(self, block: int) -> None:
        """Put a free block before the other free ones."""
        self.free_blocks.move_to_end(block, last=False)

    def check_integrity(self, owners: list[list[int]]) -> None:
        """Assert that these block tables own every block that is not free, and no other."""
        counts = [0] * self.num_blocks
        for table in owners:
            for block in table:
                counts[block] += 1
        for block, (count, known) in enumerate(zip(counts, self.ref_counts, strict=True)):
            assert count == known, f"block {block} has {count} owners, the pool says {known}"
            is_free = block in self.free_blocks
            assert is_free == (count == 0), f"block {block} has {count} owners, free: {is_free}"


class KVCache:
    """The keys and values of all layers.

    data: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]. A block is one contiguous
    piece across layers.
    draft_data: the same of a model that drafts, in blocks of the same numbers.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        draft_model: ModelConfig | None = None,
    ) -> None:
        """Allocate the cache. Raises ValueError."""
        self.num_blocks, self.block_size = num_blocks, block_size
        self.data = allocate_kv(model, num_blocks, block_size, dtype, device)
        self.draft_data, self.num_bytes = None, self.data.nbytes
        if draft_model is not None:
            self.draft_data = allocate_kv(draft_model, num_blocks, block_size, dtype, device)
            self.num_bytes += self.draft_data.nbytes
        self.pool = BlockPool(num_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
