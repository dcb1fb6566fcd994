"""Names that differ between the versions of transformers that the engines work with."""

import inspect
from functools import cache
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def cache_argument(model: Any) -> str:
    """What the model's `forward` calls its KV cache: `model(ids, **{cache_argument(model): kv})`."""
    return _cache_argument(type(model))


@cache
def _cache_argument(kind: type) -> str:
    parameters = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])
