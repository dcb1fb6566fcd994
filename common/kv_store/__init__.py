"""Where KV blocks lie beside the device: in the host's memory, and in a folder on disk.

An engine decides what is kept; here is what carries it out. `HostBlocks` keeps account of the blocks
on the host, `BlockCopies` moves them, `DiskStore` writes them to files, `open_copies` is told an
engine's settings, `Rates` what copies and steps took.

store = DiskStore(Path("/var/cache/kv"), capacity=8 << 30, layout="model, dtype, block size")
store.write(key, [block])  # contiguous uint8 arrays
if key in store and store.read(key, [block]):
    ...
store.close()
"""

from common.kv_store.block_copies import BlockCopies, Copied, Copy, from_numbers, to_numbers
from common.kv_store.disk import DiskStore
from common.kv_store.host_blocks import HostBlocks
from common.kv_store.opening import open_copies
from common.kv_store.rates import Rates

__all__ = [
    "BlockCopies",
    "Copied",
    "Copy",
    "DiskStore",
    "HostBlocks",
    "Rates",
    "from_numbers",
    "open_copies",
    "to_numbers",
]
