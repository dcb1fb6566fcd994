"""The shape of a model, read from its config.json and checked against what the parts can run."""

from dataclasses import dataclass
from typing import Any

from common.models.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
MOE_FAMILIES = ("qwen3_moe", "mixtral")
# Experts that every token runs beside those it chooses: fields of their configs, of several families.
SHARED_EXPERTS = (
    "n_shared_experts",
    "num_shared_experts",
    "num_shared_expert",
    "shared_expert_intermediate_size",
)
HAVE_BIAS = ("llama", "qwen3", "qwen3_moe")  # where the config says so
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
    # Mixture of experts; a dense model has none of these.
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # of one expert
    norm_topk_prob: bool = True  # whether the weights of a token's experts add up to 1
    sparse_layers: frozenset[int] = frozenset()  # those with experts in the place of the MLP

    @classmethod
    def from_transformers(cls, config: Any, max_model_len: int, moe: bool = False) -> "ModelConfig":
        """From a config that `load_config` has checked. Raises ModelError for what is not supported.

        moe: whether models with experts are.
        """
        check_experts(config, moe)
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
        for name, value, known in (
            ("model_type", config.model_type, FAMILIES + (MOE_FAMILIES if moe else ())),
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
        has_bias = config.model_type in HAVE_BIAS and config.attention_bias
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
            has_head_norms=config.model_type in ("qwen3", "qwen3_moe"),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            rope=rope,
            **(experts_of(config) if config.model_type in MOE_FAMILIES else {}),
        )


def check_experts(config: Any, moe: bool) -> None:
    """Raises ModelError for experts that are not supported, and for any unless `moe` is set."""
    name = config.model_type
    shared = [field for field in SHARED_EXPERTS if getattr(config, field, None)]
    if shared and moe:
        raise ModelError(
            f"model_type is {name!r}, a model with shared experts ({shared[0]} is"
            f" {getattr(config, shared[0])}), which are not supported"
        )
    if name in MOE_FAMILIES and not moe:
        raise ModelError(
            f"model_type is {name!r}; supported: {', '.join(FAMILIES)} (mixtures of experts are"
            " from part 11 on)"
        )


def experts_of(config: Any) -> dict[str, Any]:
    """The fields of a mixture of experts. A layer is sparse by transformers' rule."""
    is_mixtral, num_layers = config.model_type == "mixtral", config.num_hidden_layers
    dense = () if is_mixtral else config.mlp_only_layers
    step = 1 if is_mixtral else config.decoder_sparse_step
    sparse = (i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    return {
        "num_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.intermediate_size
        if is_mixtral
        else config.moe_intermediate_size,
        "norm_topk_prob": is_mixtral or config.norm_topk_prob,
        "sparse_layers": frozenset(sparse),
    }
