"""Where KV blocks outlive the engine: a folder on disk.

store = DiskStore(Path("/var/cache/kv"), capacity=8 << 30, layout="model, dtype, block size")
store.write(key, [block])  # contiguous uint8 arrays
if key in store and store.read(key, [block]):
    ...
store.close()
"""

from common.kv_store.disk import DiskStore

__all__ = ["DiskStore"]
