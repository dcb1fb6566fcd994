"""A text on its way through a model, one layer at a time, and what the layer's products are given."""

from typing import Any

import torch
from torch import Tensor

from common.distributed.group import OneRank
from common.kernels import AttentionMetadata, Ops, select_ops
from common.kernels.quantized import QuantizedWeight
from common.models.architecture import ModelConfig
from common.models.errors import ModelError

from .model import Context, DecoderLayer, Weights, rotary_table
from .scaling import Inputs
from .tensor_parallel import Shard

Tensors = dict[str, Tensor | QuantizedWeight]  # of one layer, by their names in it

BLOCK_SIZE = 16  # tokens in a block of the KV cache
SEQUENCES = 8  # that run at a time


class Recorder:
    """Operations that note what their products are given."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.inputs: dict[int, Inputs] = {}  # by the weight object's id

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        self.inputs.setdefault(id(weight), Inputs.of(x.shape[1])).add(x)
        return self.ops.linear(x, weight)


class LayerSource:
    """One layer's weights, as `Weights` asks for them; quantised ones as what they stand for."""

    def __init__(self, prefix: str, tensors: Tensors) -> None:
        self.tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        self.names = set(self.tensors)

    def quantized(self, name: str, shape: tuple[int, int]) -> None:
        return None

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...] = ()) -> Tensor:
        tensor = self.tensors[name]
        tensor = tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor
        if tensor.shape != shape:
            raise ModelError(f"the checkpoint has {name} as {list(tensor.shape)}, not {shape}")
        return tensor


class TextInLayers:
    """The hidden states of a text, between two layers."""

    def __init__(self, shape: ModelConfig, token_ids: Tensor, embedding: Tensor) -> None:
        """token_ids: [sequences, length] int64; embedding: [vocab, hidden]. Raises ValueError for a
        longer text than the model can take, and for tokens that it does not know."""
        if token_ids.shape[1] > shape.max_model_len:
            length, most = token_ids.shape[1], shape.max_model_len
            raise ValueError(f"length is {length}: the model's context is {most}")
        if token_ids.min() < 0 or token_ids.max() >= len(embedding):
            largest, most = token_ids.max().item(), len(embedding)
            raise ValueError(f"the text has the token {largest}: the model knows {most} of them")
        self.shape, self.ops = shape, select_ops("auto", "cpu", torch.get_num_threads())
        self.rotary = rotary_table(shape, torch.device("cpu"))
        self.shard = Shard.of(shape, 0, 1)
        length, self.batches = token_ids.shape[1], token_ids.split(SEQUENCES)
        # What the last layer adds, and the sum of those before: [num_tokens, hidden] of each batch.
        self.residuals = [embedding[ids.flatten()].float() for ids in self.batches]
        self.added = [torch.zeros_like(residual) for residual in self.residuals]
        blocks = -(-length // BLOCK_SIZE)
        self.tables = torch.arange(SEQUENCES * blocks, dtype=torch.int32).view(-1, blocks)
        size = (len(self.tables) * blocks, 1, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        self.kv_cache, self.length = torch.zeros(size), length

    def context(self, num: int) -> Context:
        """Of `num` sequences that are all new."""
        length = self.length
        positions = torch.arange(length).repeat(num)
        blocks = self.tables[:num].long().repeat_interleave(length, dim=0)
        slots = blocks.gather(1, (positions // BLOCK_SIZE).unsqueeze(1))[:, 0] * BLOCK_SIZE
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.arange(num + 1, dtype=torch.int32) * length,
            seq_lens=torch.full((num,), length, dtype=torch.int32),
            block_tables=self.tables[:num],
            slot_mapping=slots + positions % BLOCK_SIZE,
            max_query_len=length,
            max_seq_len=length,
        )
        return Context(positions, self.rotary, self.kv_cache, metadata, lambda layer: None)

    def layer(self, number: int, tensors: Tensors, ops: Any) -> DecoderLayer:
        source: Any = LayerSource(f"model.layers.{number}.", tensors)
        weights = Weights(source, torch.float32, self.shard, OneRank(), None)
        layer = DecoderLayer(self.shape, ops, number, weights)
        layer.attention.layer = 0  # the cache here has only one
        return layer

    def observe(self, number: int, tensors: Tensors) -> list[Inputs]:
        """What the products of a layer are given, in the order in which the layer has them.

        Raises ModelError.
        """
        recorder = Recorder(self.ops)
        layer = self.layer(number, tensors, recorder)
        for ids, added, residual in zip(self.batches, self.added, self.residuals, strict=True):
            layer(added.clone(), residual.clone(), self.context(len(ids)))
        attention, mlp = layer.attention, layer.mlp
        products = (attention.qkv, attention.out, mlp.gate_up, mlp.down)
        return [recorder.inputs[id(product)] for product in products]

    def advance(self, number: int, tensors: Tensors) -> None:
        """Run the text through a layer."""
        layer = self.layer(number, tensors, self.ops)
        for i, ids in enumerate(self.batches):
            self.added[i] = layer(self.added[i], self.residuals[i], self.context(len(ids)))
