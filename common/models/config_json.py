"""The numbers of a config.json, checked before anything is built from them.

transformers checks their types. A number that is wrong all the same is found late: when a list of
10^9 layers fills the memory, when a request divides by zero, or never, in tokens that are noise.
What a number must be for the weights is not said here: loading compares each tensor's shape.
"""

import math
from typing import Any

from common.models.errors import ModelError

# The largest that is believed, well above any published model. The tensors say the rest.
LARGEST = {
    "vocab_size": 1 << 40,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 9,
    "num_labels": 1 << 16,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 24,
    "decoder_sparse_step": 1 << 12,
}


def check_sizes(values: dict[str, Any], where: str) -> None:
    """Check sizes in config.json as it was read: transformers makes a list of so many layers, and
    a dictionary of so many labels.

    where: the file, for the message. Raises ModelError.
    """
    for level in (values, values.get("text_config")):
        sizes = level if isinstance(level, dict) else {}
        renames = sizes.get("attribute_map")  # transformers would read other fields for these
        expect(not renames, where, "attribute_map", renames, "none")
        for name, largest in LARGEST.items():
            value = sizes.get(name)
            if isinstance(value, int | float):  # transformers refuses text, and knows of lists
                is_right = is_whole(value) and 1 <= value <= largest
                expect(is_right, where, name, value, f"a whole number from 1 to {largest}")


def check_config(config: Any, where: str) -> None:
    """Check how the numbers of transformers' config go together. Raises ModelError."""
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    if is_whole(heads) and is_whole(kv_heads):
        divides = kv_heads > 0 and heads % kv_heads == 0
        expected = f"a number that divides num_attention_heads, {heads}"
        expect(divides, where, "num_key_value_heads", kv_heads, expected)
    eps = getattr(config, "rms_norm_eps", None)
    is_small = eps is None or (is_number(eps) and 0 < eps < 1)
    expect(is_small, where, "rms_norm_eps", eps, "a number between 0 and 1")
    window = getattr(config, "sliding_window", None)
    is_right = window is None or (is_whole(window) and 1 <= window < 1 << 31)
    expect(is_right, where, "sliding_window", window, "null or a whole number from 1 to 2^31 - 1")
    chosen, experts = getattr(config, "num_experts_per_tok", None), number_of_experts(config)
    if is_whole(chosen) and is_whole(experts):
        expected = f"a number up to that of experts, {experts}"
        expect(1 <= chosen <= experts, where, "num_experts_per_tok", chosen, expected)
    rope = getattr(config, "rope_parameters", None)
    if rope and "rope_theta" in rope:
        check_rope(rope, where)
        if is_whole(heads) and heads > 0 and rope.get("partial_rotary_factor", 1) == 1:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            is_even = head_dim > 0 and head_dim % 2 == 0
            expect(is_even, where, "head_dim", head_dim, "an even number: elements turn in pairs")


def number_of_experts(config: Any) -> Any:
    """Whatever the family calls it; None in a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next(filter(None, (getattr(config, name, None) for name in names)), None)


def check_rope(rope: dict[str, Any], where: str) -> None:
    """Check the numbers of a rotary embedding. Raises ModelError."""
    bounds = {"rope_theta": (1, 1e12)}
    if rope.get("rope_type") == "llama3":
        bounds |= {
            "factor": (1, 1e6),
            "low_freq_factor": (1e-6, 1e6),
            "high_freq_factor": (1e-6, 1e6),
            "original_max_position_embeddings": (1, 1e12),
        }
    for name, (low, high) in bounds.items():
        value = rope.get(name)
        is_right = is_number(value) and low <= value <= high
        expect(is_right, where, name, value, f"a number from {low:g} to {high:g}")
    if rope.get("rope_type") == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        expect(low < high, where, "high_freq_factor", high, f"more than low_freq_factor, {low}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is one that can be computed with: JSON as Python reads it has NaN and Infinity."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def expect(is_right: bool, where: str, name: str, value: Any, expected: str) -> None:
    """Raises ModelError with file, field and value unless the value is right."""
    if not is_right:
        raise ModelError(f"{where} has {name} {value!r:.60}; expected {expected}")
