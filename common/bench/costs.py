"""How much work a decoder-only transformer cannot avoid: the bytes and FLOPs behind MBU and MFU.

Counted from the model's config.json, per sequence of p prompt tokens and n generated ones:

- Prefill: every layer's matrices for p tokens, the output head for the last one, and causal
  attention: 2 x params x tokens + 4 x layers x heads x head_dim x (positions attended to).
- Decode: n - 1 forwards, since prefill gives the first token. Forward i attends to p + i tokens.
  FLOPs as above, head included in each; bytes are all matrices once a *step* (sequences decoded
  together share them) plus each sequence's keys and values once.

Biases, norms, the embedding row looked up and activations are left out: well below 1%. MBU and MFU
say how near an engine comes to the machine's limit on this work; work that it does twice, or that
it could share and does not, counts as time and not as work.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What the costs depend on. Sizes in elements."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    num_experts: int = 0  # 0 is a dense model
    num_experts_per_token: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Read a Hugging Face config.json (Llama, Qwen2, Qwen3, Mistral, Mixtral, Qwen3-MoE).

        Raises ValueError naming what is missing.
        """
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            experts = config.get("num_experts") or config.get("num_local_experts") or 0
            return cls(
                num_layers=config["num_hidden_layers"],
                hidden_size=hidden,
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or hidden // heads,
                intermediate_size=config.get("moe_intermediate_size")
                or config["intermediate_size"],
                vocab_size=config["vocab_size"],
                num_experts=experts,
                num_experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
            )
        except KeyError as error:
            raise ValueError(f"the model's config has no {error.args[0]!r}") from None

    @property
    def attention_params(self) -> int:
        """Query, key, value and output matrices of all layers."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads
        return self.num_layers * self.hidden_size * heads * self.head_dim

    @property
    def expert_params(self) -> int:
        """One feed-forward network (gate, up, down) in each layer, over all layers."""
        return self.num_layers * 3 * self.hidden_size * self.intermediate_size

    @property
    def router_params(self) -> int:
        return self.num_layers * self.hidden_size * self.num_experts

    @property
    def head_params(self) -> int:
        """The output matrix, read for every step's logits, tied to the embedding or not."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_params(self) -> int:
        """Parameters that one token is multiplied with, without the output head."""
        active = self.num_experts_per_token or 1
        return self.attention_params + self.router_params + active * self.expert_params

    def params_read(self, batch_size: float) -> float:
        """Parameters that a step of `batch_size` tokens reads, output head included.

        Of E experts with k chosen uniformly by each token, E (1 - (1 - k/E)^batch) are touched.
        """
        experts = 1.0
        if self.num_experts:
            missed = 1 - self.num_experts_per_token / self.num_experts
            experts = self.num_experts * (1 - missed**batch_size)
        shared = self.attention_params + self.router_params + self.head_params
        return shared + experts * self.expert_params

    def attention_flops(self, positions: int) -> int:
        """Scores and weighted values: 2 x 2 FLOPs for each head element and position."""
        return 4 * self.num_layers * self.num_heads * self.head_dim * positions

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values that one token adds."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class DecodeCost:
    """Work of decoding a whole workload, prefill left out."""

    num_steps: int
    num_tokens: int
    num_bytes: float
    flops: float


def prefill_flops(shape: ModelShape, prompt_lengths: list[int]) -> float:
    """FLOPs of computing every prompt once and the logits of its last token."""
    positions = sum(length * (length + 1) // 2 for length in prompt_lengths)
    matrices = shape.layer_params * sum(prompt_lengths) + shape.head_params * len(prompt_lengths)
    return 2 * matrices + shape.attention_flops(positions)


def decode_cost(
    shape: ModelShape,
    prompt_lengths: list[int],
    output_lengths: list[int],
    batch_size: int,
    dtype_bytes: int,
) -> DecodeCost:
    """Work of decoding with at most `batch_size` sequences together, weights and KV in one dtype."""
    forwards = [length - 1 for length in output_lengths]
    num_tokens = sum(forwards)
    num_steps = decode_steps(forwards, batch_size)
    positions = sum(
        prompt * count + count * (count + 1) // 2
        for prompt, count in zip(prompt_lengths, forwards, strict=True)
    )
    mean_batch = num_tokens / num_steps if num_steps else 0
    elements = num_steps * shape.params_read(mean_batch) + shape.kv_elements * positions
    matrices = (shape.layer_params + shape.head_params) * num_tokens
    return DecodeCost(
        num_steps=num_steps,
        num_tokens=num_tokens,
        num_bytes=elements * dtype_bytes,
        flops=2 * matrices + shape.attention_flops(positions),
    )


def decode_steps(forwards: list[int], batch_size: int) -> int:
    """Steps when each sequence, in order, takes the place that is free first."""
    places = [0] * max(1, batch_size)
    for count in forwards:
        heapq.heapreplace(places, places[0] + count)
    return max(places)
