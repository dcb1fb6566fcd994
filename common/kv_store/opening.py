"""The host tier that an engine's settings ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.kv_memory import choose_num_host_blocks
from common.kv_store.block_copies import BlockCopies
from common.kv_store.disk import DiskStore
from common.kv_store.layout import layout_of
from common.models.checkpoint import resolve

DISK_BYTES = 4 << 30  # of a folder, unless more is asked for


def open_copies(
    config: Any, cache: torch.Tensor, minimum: Callable[[int], int], num_ranks: int
) -> BlockCopies:
    """This rank's room on the host and on disk, the same number of blocks on every rank.

    config: an engine's. cache: the model's, [num_blocks, …]. minimum: of a number, over all ranks.
    Raises ValueError.
    """
    if config.offload == "off":
        return BlockCopies()
    block_bytes, memory, disk = cache[0].nbytes, config.host_kv_memory, None
    num_blocks = choose_num_host_blocks(memory, block_bytes, len(cache), num_ranks)
    if config.disk_kv is not None:
        layout = layout_of(resolve(config.model), cache, config)
        disk = DiskStore(Path(config.disk_kv), config.disk_kv_memory or DISK_BYTES, layout)
    copies = BlockCopies(minimum(num_blocks), disk)
    copies.register_kv_caches([cache])
    return copies
