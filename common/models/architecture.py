"""The shape of a model, read from its config.json and checked against what the parts can run."""

from dataclasses import dataclass
from typing import Any

from common.models.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, under the names of its config.json where they differ little."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    has_qkv_bias: bool
    has_out_bias: bool
    has_mlp_bias: bool
    has_head_norms: bool  # of each query and key
    windows: tuple[int | None, ...]  # of each layer: how far back it sees
    rope: dict[str, Any]

    @classmethod
    def from_transformers(cls, config: Any, max_model_len: int) -> "ModelConfig":
        """From a config that `load_config` has checked. Raises ModelError for what is not supported."""
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
        for name, value, known in (
            ("model_type", config.model_type, FAMILIES),
            ("hidden_act", getattr(config, "hidden_act", None), ("silu",)),
            ("rope_type", rope.get("rope_type"), ("default", "llama3")),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,)),
            ("the number of layer_types", len(kinds), (config.num_hidden_layers,)),
            *(("layer_types", kind, LAYER_TYPES) for kind in kinds),
        ):
            if value not in known:
                supported = ", ".join(map(str, known))
                raise ModelError(f"{name} is {value!r}; supported: {supported}")
        windowed = config.model_type != "llama" and getattr(config, "use_sliding_window", True)
        window = config.sliding_window if windowed else None
        has_bias = config.model_type in ("llama", "qwen3") and config.attention_bias
        head_dim = getattr(config, "head_dim", None)
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            has_qkv_bias=has_bias or config.model_type == "qwen2",
            has_out_bias=has_bias,
            has_mlp_bias=config.model_type == "llama" and config.mlp_bias,
            has_head_norms=config.model_type == "qwen3",
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            rope=rope,
        )
