"""The KV cache as fixed-size blocks: one tensor, a pool that says who owns which block.

A sequence's keys and values need not lie together. They lie in blocks of `block_size` tokens, taken
from the pool as they are needed and found through the sequence's block table, as pages are by an
operating system (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023). What is wasted is at most the rest of each sequence's last block.
"""

import os
import sys
from collections import OrderedDict
from pathlib import Path

import torch

from .config import EngineConfig
from .model import ModelConfig

GIB = 1 << 30
CPU_LIMIT = 2 * GIB  # of the KV cache on a CPU, unless --kv-cache-memory says otherwise
CPU_SHARE = 0.25  # of the memory that is free


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
    piece across layers, so that later it can be copied in one go.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the cache and write every page of it once. Raises ValueError."""
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, model.num_layers, 2, block_size, model.num_kv_heads, model.head_dim)
        try:
            self.data = torch.empty(shape, dtype=dtype, device=device).zero_()
        except RuntimeError as error:
            total = torch.Size(shape).numel() * dtype.itemsize / GIB
            raise ValueError(
                f"num_blocks is {num_blocks}: no memory for {total:.1f} GiB"
            ) from error
        self.pool = BlockPool(num_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


def choose_num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    reserved: int = 0,
    draft_model: ModelConfig | None = None,
) -> int:
    """How many blocks the cache should have: what was asked for, or what memory and need allow.

    reserved: bytes of a GPU that a step needs for itself. draft_model: its keys and values lie in
    blocks of the same numbers. Raises ValueError.
    """
    if config.num_blocks is not None and config.kv_cache_memory is not None:
        raise ValueError("num_blocks and kv_cache_memory are both given: one decides the other")
    if config.num_blocks is not None:
        return config.num_blocks
    models = [model] if draft_model is None else [model, draft_model]
    token_numbers = sum(m.num_layers * 2 * m.num_kv_heads * m.head_dim for m in models)
    block_bytes = config.block_size * token_numbers * dtype.itemsize
    memory = config.kv_cache_memory
    if memory is None and device.type == "cuda":
        torch.cuda.empty_cache()  # what loading the weights has left over
        free, total = torch.cuda.mem_get_info(device)
        memory = int(free - (1 - config.gpu_memory_utilization) * total) - reserved
    elif memory is None:
        memory = min(CPU_LIMIT, int(CPU_SHARE * free_memory()))
    if memory < block_bytes:
        raise ValueError(
            f"{memory} bytes are there for the KV cache, and a block of {config.block_size} tokens"
            f" takes {block_bytes}: see kv_cache_memory and block_size"
        )
    blocks_each = -(-model.max_model_len // config.block_size)
    return min(memory // block_bytes, config.max_num_seqs * blocks_each)


def longest_sequence(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    """Tokens of the longest sequence that model and cache can hold. Raises ValueError."""
    room = num_blocks * config.block_size
    if config.max_model_len is not None and config.max_model_len > room:
        raise ValueError(
            f"max_model_len is {config.max_model_len}; the KV cache holds {room} tokens"
            f" in {num_blocks} blocks of {config.block_size}"
        )
    if room < 2:
        raise ValueError(f"num_blocks is {num_blocks}: a sequence needs room for 2 tokens")
    if room < model.max_model_len:
        print(f"Context: {room} tokens, which is what the KV cache holds", file=sys.stderr)
    return min(model.max_model_len, room)


def free_memory() -> int:
    """Bytes that this process may still take: the system's, or what its control group leaves."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # where Linux is not
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        [available] = (line for line in lines if line.startswith("MemAvailable:"))
        free = int(available.split()[1]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            numbers = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            reclaimable = {name: int(number) for name, number in numbers}["inactive_file"]
            used = int((group / "memory.current").read_text()) - reclaimable
            free = min(free, int(limit) - used)
    except (OSError, ValueError, KeyError):
        pass
    return free
