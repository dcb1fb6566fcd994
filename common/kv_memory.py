"""How large a KV cache is: what was asked for, or what the machine's memory allows."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.kernels.quantized_kv import row_size
from common.kv_transfer.memory import allocate_shared
from common.models.architecture import ModelConfig

CPU_LIMIT = 2 << 30  # bytes of the KV cache on a CPU, unless more is asked for
CPU_SHARE = 0.25  # of the memory that is free on a CPU
HOST_TIMES = 4  # blocks on the host for each on the device, unless more are asked for


def choose_num_blocks(
    config: Any,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    reserved: int = 0,
    draft_model: ModelConfig | None = None,
    num_ranks: int = 1,
) -> int:
    """How many blocks the cache should have: what was asked for, or what memory and need allow.

    A GPU's memory is there for the cache, so one that keeps prefixes takes all that it may have; on
    a CPU other programs want it, and no cache is larger than its sequences at their longest.

    config: an engine's. dtype: the cache's. reserved: bytes of a GPU that a step needs for itself.
    draft_model: its keys and values lie in blocks of the same numbers. num_ranks: processes that
    share this machine's memory, when it is a CPU's. Raises ValueError.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    models = [model] if draft_model is None else [model, draft_model]
    rows = [row_size(m.head_dim, dtype) for m in models]
    token_numbers = sum(
        m.num_layers * 2 * m.num_kv_heads * row for m, row in zip(models, rows, strict=True)
    )
    block_bytes = config.block_size * token_numbers * dtype.itemsize
    memory = config.kv_cache_memory
    if memory is None:
        memory = kv_cache_budget(device, config.gpu_memory_utilization, reserved)
        memory //= num_ranks if device.type == "cpu" else 1
    if memory < block_bytes:
        raise ValueError(
            f"{memory} bytes are there for the KV cache, and a block of {config.block_size} tokens"
            f" takes {block_bytes}: see kv_cache_memory and block_size"
        )
    if device.type == "cuda" and getattr(config, "prefix_cache", "off") != "off":
        return memory // block_bytes
    blocks_each = -(-model.max_model_len // config.block_size)
    return min(memory // block_bytes, config.max_num_seqs * blocks_each)


def longest_sequence(config: Any, model: ModelConfig, num_blocks: int) -> int:
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


def allocate_kv(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Keys and values of all layers, [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim],
    or as `quantized_kv` has it; every page written once. Raises ValueError."""
    row = row_size(model.head_dim, dtype)
    shape = (num_blocks, model.num_layers, 2, block_size, model.num_kv_heads, row)
    try:
        return torch.empty(shape, dtype=dtype, device=device).zero_()
    except RuntimeError as error:
        gib = torch.Size(shape).numel() * dtype.itemsize / (1 << 30)
        message = f"num_blocks is {num_blocks}: no memory for {gib:.1f} GiB"
        raise ValueError(message) from error


def share_kv(kv: Any, transport: str) -> None:
    """Put a KV cache that is new, `kv.data`, where this transport can read it: shm in memory that can be
    handed to other processes. Raises ValueError."""
    if transport == "shm" and kv.data.device.type == "cpu":
        shape, dtype, kv.data = tuple(kv.data.shape), kv.data.dtype, None  # both would be too much
        kv.data = allocate_shared(shape, dtype)


def kv_cache_budget(device: torch.device, gpu_memory_utilization: float, reserved: int = 0) -> int:
    """Bytes for a KV cache where nobody has said how many.

    On a GPU what is free of its share; on a CPU a share of what is free. reserved: bytes of a GPU
    that a step needs for itself.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading the weights has left over
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - gpu_memory_utilization) * total) - reserved
    return min(CPU_LIMIT, int(CPU_SHARE * free_memory()))


def largest_counts(num_tokens: int, num_seqs: int, most: int, least: int = 1) -> list[int]:
    """New tokens of each sequence in the largest step: so many in all or as many as may be, the
    first sequences with the most that one may have, all others with the least."""
    counts: list[int] = []
    for i in range(num_seqs):
        counts.append(min(num_tokens - sum(counts) - least * (num_seqs - i - 1), most))
    return counts


def peak_memory(device: torch.device, run: Callable[[], object], num_tokens: int) -> int:
    """Bytes of a GPU that `run`, a step of so many tokens, takes at its peak, beside what is taken
    before; on a CPU nothing is run. Raises ValueError.

    Counted is what the allocator reserves: between the pieces in use some lies idle, and nobody else
    can have it.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    try:
        run()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"no memory on the GPU for a step of {num_tokens} tokens:"
            " see max_num_batched_tokens and max_model_len"
        ) from error
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return peak - before


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


def choose_num_host_blocks(
    memory: int | None, block_bytes: int, num_blocks: int, num_ranks: int = 1
) -> int:
    """How many blocks one rank keeps on the host: what was asked for, or HOST_TIMES the device's, as
    far as a share of the free memory goes.

    memory: bytes for all ranks of this host; None: by default. block_bytes: of one rank's block.
    Raises ValueError.
    """
    if memory is None:
        most = int(CPU_SHARE * free_memory()) // num_ranks // block_bytes
        return max(min(HOST_TIMES * num_blocks, most), 1)
    if memory // num_ranks < block_bytes:
        raise ValueError(
            f"host_kv_memory is {memory}: a block takes {block_bytes} bytes"
            + (f" on each of {num_ranks} ranks" if num_ranks > 1 else "")
        )
    return memory // num_ranks // block_bytes
