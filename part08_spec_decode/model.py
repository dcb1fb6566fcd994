"""The transformer: Llama, and its relatives Qwen2, Qwen3 and Mistral.

Written over a flat batch: the tokens of all sequences lie one after another, and only attention
needs to know where one ends. `AttentionMetadata` says so, and where the keys and values lie. The
operations are `common.kernels`'; weights are objects that only `ops.linear` looks into.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from common.checkpoint import ModelError
from common.kernels import AttentionMetadata, Ops

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, under the names of its config.json where they differ little."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]  # of each layer: how far back it sees
    rope: dict[str, Any]

    @classmethod
    def from_transformers(cls, config: Any, max_model_len: int) -> "ModelConfig":
        """From transformers' config. Raises ModelError for what is not supported."""
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ModelError(f"model_type is {config.model_type!r}; supported are {known}")
        if config.hidden_act != "silu":
            raise ModelError(f"hidden_act is {config.hidden_act!r}; supported is silu")
        rope = config.rope_parameters
        if rope["rope_type"] not in ("default", "llama3"):
            raise ModelError(f"rope_type is {rope['rope_type']!r}; supported are default, llama3")
        windowed = getattr(config, "use_sliding_window", True)
        window = getattr(config, "sliding_window", None) if windowed else None
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None)
        return cls(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            rope=rope,
        )


def rotary_table(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Cosines and sines of every position, [max_model_len, head_dim] float32, cosines first.

    With Llama 3.1's scaling, wavelengths beyond the original context are stretched by `factor`,
    short ones stay, and those in between are interpolated.
    """
    half = config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    frequencies = config.rope["rope_theta"] ** -exponents
    if config.rope["rope_type"] == "llama3":
        rope = config.rope
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / rope["factor"])
    angles = torch.outer(torch.arange(config.max_model_len, dtype=torch.float64), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)


class Weights:
    """A checkpoint's tensors by name; each is taken once, and none may be left."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
        self.tensors = {name: tensor.to(dtype) for name, tensor in tensors}
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, *names: str) -> torch.Tensor:
        """The tensors of these names as one, row under row. Raises ModelError."""
        for name in names:
            if name not in self.tensors:
                raise ModelError(f"the checkpoint lacks {name}")
        parts = [self.tensors.pop(name) for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def linear(self, ops: Ops, *names: str) -> Any:
        """A weight object for `ops.linear` from projections that share their input."""
        weight = self.take(*(f"{name}.weight" for name in names))
        has_bias = f"{names[0]}.bias" in self.tensors
        bias = self.take(*(f"{name}.bias" for name in names)) if has_bias else None
        return ops.prepare_weight(weight, bias)

    def check_empty(self) -> None:
        """Raises ModelError when a tensor was not used: the model is another than it seems."""
        if self.tensors:
            raise ModelError(f"the checkpoint has {next(iter(self.tensors))}, which has no place")


class Attention:
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.layer = ops, layer
        prefix = f"model.layers.{layer}.self_attn"
        self.qkv = weights.linear(ops, *(f"{prefix}.{name}_proj" for name in "qkv"))
        self.out = weights.linear(ops, f"{prefix}.o_proj")
        has_norms = f"{prefix}.q_norm.weight" in weights.tensors
        self.q_norm = weights.take(f"{prefix}.q_norm.weight") if has_norms else None
        self.k_norm = weights.take(f"{prefix}.k_norm.weight") if has_norms else None
        self.eps, self.window = config.rms_norm_eps, config.windows[layer]
        self.scale = config.head_dim**-0.5

    def __call__(
        self,
        x: torch.Tensor,  # [num_tokens, hidden]
        positions: torch.Tensor,
        rotary: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        qkv = self.ops.linear(x, self.qkv)
        slots = metadata.slot_mapping
        norms = (self.q_norm, self.k_norm, self.eps)
        query = self.ops.rotary_and_store(
            qkv, rotary, positions, kv_cache, self.layer, slots, *norms
        )
        out = self.ops.attention(query, kv_cache, self.layer, metadata, self.scale, self.window)
        return self.ops.linear(out, self.out)


class MLP:
    def __init__(self, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops = ops
        prefix = f"model.layers.{layer}.mlp"
        self.gate_up = weights.linear(ops, f"{prefix}.gate_proj", f"{prefix}.up_proj")
        self.down = weights.linear(ops, f"{prefix}.down_proj")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.ops.linear(x, self.gate_up)
        return self.ops.linear(self.ops.silu_and_mul(gate_up), self.down)


class DecoderLayer:
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.eps = ops, config.rms_norm_eps
        prefix = f"model.layers.{layer}"
        self.input_norm = weights.take(f"{prefix}.input_layernorm.weight")
        self.post_attention_norm = weights.take(f"{prefix}.post_attention_layernorm.weight")
        self.attention = Attention(config, ops, layer, weights)
        self.mlp = MLP(ops, layer, weights)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, *context: Any) -> torch.Tensor:
        """x: what the layer before adds to the residual, which is updated in place."""
        x = self.ops.add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(x, *context)
        x = self.ops.add_rms_norm(x, residual, self.post_attention_norm, self.eps)
        return self.mlp(x)


class CausalLM:
    """The whole model, on one device."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        tensors: Iterable[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take the weights of a checkpoint. Raises ModelError when they are not this model's."""
        self.config, self.ops = config, ops
        weights = Weights(tensors, dtype)
        self.num_bytes = weights.num_bytes
        self.embedding = weights.linear(ops, "model.embed_tokens")
        self.norm = weights.take("model.norm.weight")
        if config.tie_word_embeddings:
            weights.tensors.pop("lm_head.weight", None)
            self.lm_head = self.embedding
        else:
            self.lm_head = weights.linear(ops, "lm_head")
        layers = range(config.num_layers)
        self.layers = [DecoderLayer(config, ops, layer, weights) for layer in layers]
        weights.check_empty()
        self.rotary = rotary_table(config, device)

    def forward(
        self,
        token_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        layers: Iterable[int] | None = None,
    ) -> torch.Tensor:
        """Hidden states of every token, [num_tokens, hidden].

        layers: those to run, all by default; the others are stepped over.
        """
        residual = self.ops.embedding(token_ids, self.embedding)
        x = torch.zeros_like(residual)
        for layer in self.layers if layers is None else [self.layers[i] for i in layers]:
            x = layer(x, residual, positions, self.rotary, kv_cache, metadata)
        return self.ops.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab]."""
        return self.ops.linear(hidden, self.lm_head)
