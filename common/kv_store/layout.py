"""What keys and values depend on beside the tokens: which model made them, and how they lie."""

import json
from pathlib import Path

import torch

from common.distributed.rendezvous import checkpoint_fingerprint


def layout_of(folders: list[Path], caches: list[torch.Tensor]) -> str:
    """A text that is the same where a block of one engine can be used by another.

    folders: the models'. caches: their tensors, [num_blocks, …]. Raises ValueError.
    """
    return json.dumps(
        {
            "models": [checkpoint_fingerprint(folder)["checkpoint"] for folder in folders],
            "blocks": [[str(cache.dtype), *cache.shape[1:]] for cache in caches],
        }
    )
