"""What keys and values depend on beside the tokens: which model made them, and how they lie."""

import json
from pathlib import Path

import torch

from common.distributed.rendezvous import checkpoint_fingerprint


def layout_of(folder: Path, cache: torch.Tensor) -> str:
    """A text that is the same where a block of one engine can be used by another.

    folder: the model's. cache: [num_blocks, …]. Raises ValueError.
    """
    checkpoint = checkpoint_fingerprint(folder)["checkpoint"]
    return json.dumps([checkpoint, str(cache.dtype), *cache.shape[1:]])
