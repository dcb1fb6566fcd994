"""Moving KV between processes: a prefill worker's `Sender`, a decode worker's `Receiver`.

No engine is in here: caches are tensors [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
The receiver sends a prompt, learns which blocks are final in which layer, and reads them while the rest is
computed. See `auth` for the greeting, `messages` for what is said, `frames` for how it is framed.

What talks to peers needs msgspec, which a machine that only checks kernels may not have: so the names here are
imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.kv_transfer.fetching import Fetched
    from common.kv_transfer.memory import allocate_shared
    from common.kv_transfer.receiver import Receiver
    from common.kv_transfer.sender import PrefillRequest, Sender

__all__ = ["Fetched", "PrefillRequest", "Receiver", "Sender", "allocate_shared"]
PLACES = {
    "Fetched": "fetching",
    "PrefillRequest": "sender",
    "Receiver": "receiver",
    "Sender": "sender",
    "allocate_shared": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)
