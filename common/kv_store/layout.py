"""What keys and values depend on beside the tokens: which model made them, and how they lie."""

import json
from pathlib import Path
from typing import Any

import torch

from common.models.fingerprint import checkpoint_fingerprint

ROUNDING = ("quantization", "quantize_embeddings", "activations")  # settings of an engine


def layout_of(folder: Path, cache: torch.Tensor, config: Any = None) -> str:
    """A text that is the same where a block of one engine can be used by another.

    folder: the model's. cache: [num_blocks, …]. config: an engine's; weights that it rounds make other
    keys and values. Raises ValueError.
    """
    checkpoint = checkpoint_fingerprint(folder)["checkpoint"]
    rounding = [getattr(config, name) for name in ROUNDING if hasattr(config, name)]
    return json.dumps([checkpoint, str(cache.dtype), *cache.shape[1:], *rounding])
