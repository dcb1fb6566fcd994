"""The transformer: Llama, and its relatives Qwen2, Qwen3 and Mistral.

Written over a flat batch: the tokens of all sequences lie one after another, and only attention
needs to know where one ends. `AttentionMetadata` says so, and where the keys and values lie. The
operations are `common.kernels`'; weights are objects that only `ops.linear` looks into.

Every rank runs this code on its part of the weights; `tensor_parallel.py` says which. Ranks meet in
one sum after attention and one after the MLP, in one for the embedding, and where rank 0 gathers the
logits. A stage of a pipeline has some of the layers (`pipeline_parallel.py`).
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from common.distributed.group import Group, OneRank, even_split
from common.kernels import AttentionMetadata, Ops
from common.kernels.quantized import QuantizedWeight
from common.models.architecture import ModelConfig
from common.models.weights import report_unused

from .expert_parallel import ExpertParallel
from .pipeline_parallel import Stage
from .quantized_layers import QuantizedSource, format_of, side_by_side
from .tensor_parallel import Features, Shard, elements

TOP = 1 << 33  # above every number that a format gets


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
    """A checkpoint's tensors by name; of each a rank reads its own part, once."""

    def __init__(
        self,
        source: QuantizedSource,
        dtype: torch.dtype,
        shard: Shard,
        group: Group,
        experts: ExpertParallel | None,
        stage: Stage,
    ) -> None:
        self.source, self.dtype, self.shard, self.group = source, dtype, shard, group
        self.experts, self.stage = experts, stage
        self.unused = source.names
        self.num_bytes = 0  # of those taken

    def take(self, name: str, *sizes: int | Features) -> torch.Tensor:
        """The tensor of that name, or the rank's part of it. Raises ModelError unless it is there,
        and of that shape."""
        shape = tuple(size if isinstance(size, int) else size.total for size in sizes)
        own = [range(size) if isinstance(size, int) else size.own for size in sizes]
        part = tuple(slice(part.start, part.stop) for part in own)
        is_whole = all(len(part) == size for part, size in zip(own, shape, strict=True))
        tensor = self.source.read(name, shape, () if is_whole else part).to(self.dtype)
        self.unused.discard(name)
        self.num_bytes += tensor.nbytes
        return tensor

    def matrix(
        self, name: str, rows: int | Features, columns: int | Features
    ) -> torch.Tensor | QuantizedWeight:
        """A weight of products, or the rank's part of it: codes and scales where it is quantised.
        Raises ModelError and ValueError."""
        sizes = [
            size if isinstance(size, Features) else Features(size, range(size))
            for size in (rows, columns)
        ]
        weight = self.source.quantized(name, (sizes[0].total, sizes[1].total))
        if weight is None:
            return self.take(name, rows, columns)
        self.unused.discard(name)
        own_rows, own_columns = (slice(size.own.start, size.own.stop) for size in sizes)
        try:
            weight = weight.columns(own_columns).rows(own_rows)
        except ValueError as error:
            given = f"tensor_parallel_size is {self.group.size}"
            raise ValueError(f"{given}: {name}: {error}") from None
        self.num_bytes += weight.nbytes
        return weight

    def linear(
        self,
        ops: Ops,
        prefix: str,
        in_features: int | Features,
        has_bias: bool = False,
        **out_features: int | Features,
    ) -> Any:
        """A weight object for `ops.linear` from projections that share their input.

        out_features: of each projection by its name; they come one after another in the output. A
        weight that is split by its inputs gives a part of a sum, to which rank 0 adds the bias.
        """
        sizes = {f"{prefix}{name}": size for name, size in out_features.items()}.items()
        parts = [self.matrix(f"{name}.weight", size, in_features) for name, size in sizes]
        weight = side_by_side(parts, self.dtype)
        biases = [self.take(f"{name}.bias", size) for name, size in sizes if has_bias]
        adds_bias = has_bias and (isinstance(in_features, int) or self.shard.rank == 0)
        return ops.prepare_weight(weight, torch.cat(biases) if adds_bias else None)


class Context(NamedTuple):
    """What a forward tells every layer."""

    positions: torch.Tensor  # [num_tokens] int64
    rotary: torch.Tensor  # cosines and sines by position
    kv_cache: torch.Tensor
    metadata: AttentionMetadata
    on_saved: Callable[[int], None]  # told a layer whose keys and values are in the cache


class Attention:
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.group = ops, weights.group
        self.layer = layer - weights.stage.layers.start  # in this rank's KV cache
        prefix = f"model.layers.{layer}.self_attn."
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size = elements(weights.shard.heads, head_dim, config.num_heads)
        kv_size = elements(weights.shard.kv_heads, head_dim, config.num_kv_heads)
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = weights.linear(ops, prefix, hidden, config.has_qkv_bias, **sizes)
        self.out = weights.linear(ops, prefix, q_size, config.has_out_bias, o_proj=hidden)
        self.norms: dict[str, Any] = {"q_norm": None, "k_norm": None, "eps": config.rms_norm_eps}
        if config.has_head_norms:
            for name in ("q_norm", "k_norm"):
                self.norms[name] = weights.take(f"{prefix}{name}.weight", head_dim)
        self.window = config.windows[layer]
        self.scale = config.head_dim**-0.5

    def __call__(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """x: [num_tokens, hidden]."""
        out = self.attend(self.ops.linear(x, self.qkv), context)
        return self.group.all_reduce(self.ops.linear(out, self.out))

    def attend(self, qkv: torch.Tensor, context: Context) -> torch.Tensor:
        """What lies between the two products."""
        cache, metadata = context.kv_cache, context.metadata
        query = self.ops.rotary_and_store(
            qkv,
            context.rotary,
            context.positions,
            cache,
            self.layer,
            metadata.slot_mapping,
            **self.norms,
        )
        context.on_saved(self.layer)
        return self.ops.attention(query, cache, self.layer, metadata, self.scale, self.window)


class MLP:
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.group = ops, weights.group
        prefix = f"model.layers.{layer}.mlp."
        hidden, has_bias = config.hidden_size, config.has_mlp_bias
        size = Features(config.intermediate_size, weights.shard.intermediate)
        self.gate_up = weights.linear(ops, prefix, hidden, has_bias, gate_proj=size, up_proj=size)
        self.down = weights.linear(ops, prefix, size, has_bias, down_proj=hidden)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.ops.linear(x, self.gate_up)
        return self.group.all_reduce(self.ops.linear(self.ops.silu_and_mul(gate_up), self.down))


class Experts:
    """A rank's part of a layer's experts: some of their features, or some experts whole."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.layer, self.weights, self.group = ops, layer, weights, weights.group
        self.hidden, size = config.hidden_size, config.moe_intermediate_size
        everything = range(config.num_experts)
        self.parallel = weights.experts
        if self.parallel is None:
            numbers = list(everything)
            self.size = Features(size, even_split(size, self.group.size)[self.group.rank])
        else:
            numbers = self.parallel.own_experts(layer, self.replace)
            self.size = Features(size, range(size))
        self.formats: dict[str, set[tuple[object, ...]]] = {"gate_up": set(), "down": set()}
        self.prepared = ops.prepare_experts(
            (self.noted("gate_up", self.gate_up(number)) for number in numbers),
            (self.noted("down", self.down(number)) for number in numbers),
        )
        for expert in everything:  # other ranks read those that are not here
            weights.unused -= {self.name(expert, kind) for kind in ("gate", "up", "down")}

    def name(self, expert: int, kind: str) -> str:
        return f"model.layers.{self.layer}.mlp.experts.{expert}.{kind}_proj.weight"

    def gate_up(self, expert: int) -> torch.Tensor | QuantizedWeight:
        names = (self.name(expert, kind) for kind in ("gate", "up"))
        parts = [self.weights.matrix(name, self.size, self.hidden) for name in names]
        return side_by_side(parts, self.weights.dtype)

    def down(self, expert: int) -> torch.Tensor | QuantizedWeight:
        return self.weights.matrix(self.name(expert, "down"), self.hidden, self.size)

    def noted(
        self, side: str, weight: torch.Tensor | QuantizedWeight
    ) -> torch.Tensor | QuantizedWeight:
        """The weight, its format added to those of the layer. Raises ValueError where some are plain
        numbers and some are not."""
        self.formats[side].add(format_of(weight))
        kinds = {kind for formats in self.formats.values() for kind, *_ in formats}
        if "plain" in kinds and len(kinds) > 1:
            others = ", ".join(sorted(map(str, kinds - {"plain"})))
            raise ValueError(
                f"layer {self.layer}: some experts are in plain numbers, and others in {others}"
            )
        return weight

    def replace(self, index: int, expert: int) -> None:
        """Read another expert's weights in the place of one that is here."""
        self.ops.replace_expert(self.prepared, index, self.gate_up(expert), self.down(expert))

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of what a token's experts make of it. x: [num_tokens, hidden]."""
        if self.parallel is not None:
            return self.parallel.run(self.layer, x, expert_ids, weights, self.prepared)
        return self.group.all_reduce(self.ops.experts(x, expert_ids, weights, self.prepared))


class MoE:
    """A mixture of experts in the place of the MLP: each token runs the few that the router chooses."""

    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.top_k = ops, config.num_experts_per_tok
        self.is_normed = config.norm_topk_prob
        name, shape = (
            f"model.layers.{layer}.mlp.gate.weight",
            (config.num_experts, config.hidden_size),
        )
        # In float32 whatever the model's format: a rounded score may choose another expert.
        self.router = ops.prepare_weight(weights.take(name, *shape).float())
        self.experts = Experts(config, ops, layer, weights)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, hidden]."""
        return self.experts(x, *self.route(x))

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's experts and their weights, [num_tokens, top_k] int64 and float32."""
        probs = self.ops.linear(x.float(), self.router).softmax(dim=-1)
        weights, expert_ids = probs.topk(self.top_k, dim=-1)
        if self.is_normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights


class DecoderLayer:
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, weights: Weights) -> None:
        self.ops, self.eps = ops, config.rms_norm_eps
        prefix = f"model.layers.{layer}"
        hidden = config.hidden_size
        self.input_norm = weights.take(f"{prefix}.input_layernorm.weight", hidden)
        self.post_attention_norm = weights.take(f"{prefix}.post_attention_layernorm.weight", hidden)
        self.attention = Attention(config, ops, layer, weights)
        feed_forward = MoE if layer in config.sparse_layers else MLP
        self.mlp = feed_forward(config, ops, layer, weights)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor, context: Context) -> torch.Tensor:
        """x: what the layer before adds to the residual, which is updated in place."""
        x = self.ops.add_rms_norm(x, residual, self.input_norm, self.eps)
        x = self.attention(x, context)
        x = self.ops.add_rms_norm(x, residual, self.post_attention_norm, self.eps)
        return self.mlp(x)


class CausalLM:
    """The whole model, or one rank's part of it, on one device."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        source: QuantizedSource,
        dtype: torch.dtype,
        device: torch.device,
        group: Group | None = None,
        experts: ExpertParallel | None = None,
        stage: Stage | None = None,
    ) -> None:
        """Take the weights of a checkpoint. Raises ModelError when they are not this model's, and
        ValueError when they cannot be divided among so many ranks."""
        self.config, self.ops, self.group = config, ops, group or OneRank()
        self.dtype = dtype
        self.shard = Shard.of(config, self.group.rank, self.group.size)
        self.stage = stage = stage or Stage.of(config)
        # as the KV cache and the kernels see it
        self.local = stage.local(self.shard.local(config))
        weights = Weights(source, dtype, self.shard, self.group, experts, stage)
        self.experts = experts
        vocab = Features(config.vocab_size, self.shard.vocabulary)
        hidden = config.hidden_size
        is_tied = config.tie_word_embeddings and "lm_head.weight" not in source.names
        if stage.is_first or (stage.is_last and is_tied):
            self.embedding = weights.linear(ops, "model.", hidden, embed_tokens=vocab)
        if stage.is_last:
            self.norm = weights.take("model.norm.weight", hidden)
            if is_tied:
                self.lm_head = self.embedding
            else:
                self.lm_head = weights.linear(ops, "", hidden, lm_head=vocab)
        self.layers = [DecoderLayer(config, ops, layer, weights) for layer in stage.layers]
        self.num_bytes = weights.num_bytes
        self.on_saved: Callable[[int], None] = lambda layer: None
        report_unused({name for name in weights.unused if not stage.is_elsewhere(name)})
        self.rotary = rotary_table(config, device)

    def forward(
        self,
        token_ids: torch.Tensor,  # [num_tokens] int64
        positions: torch.Tensor,  # [num_tokens] int64
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        layers: Iterable[int] | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of every token, [num_tokens, hidden].

        layers: which to run, all by default; the others are stepped over. hidden: what the stage
        before has made of the tokens; it is written to.
        """
        residual = self.embed(token_ids) if hidden is None else hidden
        x = torch.zeros_like(residual)
        context = Context(positions, self.rotary, kv_cache, metadata, self.on_saved)
        for layer in self.layers if layers is None else [self.layers[i] for i in layers]:
            x = layer(x, residual, context)
        if not self.stage.is_last:
            return residual.add_(x)
        return self.ops.add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)

    def check_experts(self, group: Group) -> None:
        """Any expert of a layer can take another's place, on all ranks of `group`, which call this
        together. Raises ValueError."""
        for number, layer in zip(self.stage.layers, self.layers, strict=True):
            if not isinstance(layer.mlp, MoE):
                continue
            formats = [layer.mlp.experts.formats[side] for side in ("gate_up", "down")]
            own = zlib.crc32(repr(formats).encode()) + 1 if all(len(f) == 1 for f in formats) else 0
            lowest, highest = group.minimum(own), TOP - group.minimum(TOP - own)
            if lowest != highest or lowest == 0:
                raise ValueError(f"eplb is on: layer {number} has experts of different formats")

    def start_step(self, num_tokens: list[int]) -> None:
        """num_tokens: of each engine that shares the experts, in the forward that comes."""
        if self.experts is not None:
            self.experts.start_step(num_tokens)

    def serve(self, layers: Iterable[int] | None = None) -> None:
        """Take part in a forward of other engines, for the sake of the experts that are here."""
        x = self.rotary.new_zeros(0, self.config.hidden_size, dtype=self.dtype)
        choices = x.new_zeros(0, self.config.num_experts_per_tok, dtype=torch.int64)
        for layer in self.layers if layers is None else [self.layers[i] for i in layers]:
            if isinstance(layer.mlp, MoE):
                layer.mlp.experts(x, choices, choices.float())

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n] -> [n, hidden]: each rank looks up its tokens, and has zeros for the others'."""
        if self.shard.size == 1:
            return self.ops.embedding(token_ids, self.embedding).to(self.dtype)
        places = token_ids - self.shard.vocabulary.start
        is_other = (places < 0) | (places >= len(self.shard.vocabulary))
        rows = self.ops.embedding(places.masked_fill(is_other, 0), self.embedding).to(self.dtype)
        return self.group.all_reduce(rows.masked_fill_(is_other.unsqueeze(1), 0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[n, hidden] -> [n, vocab] on rank 0, which gathers them; None on the others."""
        shapes = [(len(hidden), len(vocabulary)) for vocabulary in self.shard.vocabularies]
        parts = self.group.gather(self.ops.linear(hidden, self.lm_head), shapes)
        if parts is None:
            return None
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
