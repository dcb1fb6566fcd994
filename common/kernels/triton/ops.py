"""The operations on a GPU: Triton's kernels behind checked wrappers; products are cuBLAS's.

Kernels take bfloat16, float16 and float32 and compute in float32. Nothing waits for the GPU or
depends on numbers that only it knows: every operation can be captured in a CUDA graph, once its
kernels are compiled. That happens when one is first launched, and is kept on disk; `warm_up_lengths`
names batches after which nothing is left to compile. What the kernels do not take (float64, rows
that are not contiguous) goes to the reference, which is slower, and whose attention and sampling do
wait.

With TRITON_INTERPRET=1 set before the import the same kernels run on a CPU, slowly, for tests.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import AttentionMetadata, Ops
from common.kernels.quantized import QuantizedWeight
from common.kernels.quantized_kv import head_size, is_quantized
from common.kernels.reference import ReferenceOps
from common.kernels.triton import (
    attention,
    elementwise,
    experts,
    quantized_experts,
    quantized_linear,
    quantized_weight,
)
from common.kernels.triton.experts import StackedExperts
from common.kernels.triton.quantized_experts import QuantizedExperts
from common.kernels.triton.quantized_weight import PackedWeight
from common.kernels.triton.sampler import sample, smallest_kept

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, contiguous and in that dtype."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def is_matrix(x: Tensor) -> bool:
    """Whether this is a matrix of a dtype that kernels take, each row contiguous."""
    return x.dtype in DTYPES and x.dim() == 2 and x.stride(1) == 1


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, which is where Triton launches."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def is_capturing(x: Tensor) -> bool:
    """Whether work on this tensor's GPU is recorded into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def as_pairs(prepared: Any) -> tuple[Any, Any]:
    """Prepared experts as the reference has them."""
    if isinstance(prepared, StackedExperts):
        return prepared.gate_up, prepared.down
    if isinstance(prepared, QuantizedExperts):
        return quantized_experts.unpacked(prepared)
    return prepared


class Step:
    """What the layers of one step share: its metadata as kernels take it, and what follows.

    It is kept by the metadata object's identity, and holds the object, so that no other one can
    take its place. Tensors made from the metadata are not kept across the border of a CUDA graph:
    a graph computes its own in every replay.
    """

    def __init__(self, metadata: AttentionMetadata) -> None:
        self.given = metadata
        self.metadata = plain_metadata(metadata)
        self.is_given = self.metadata is metadata  # no tensor was made
        self.plans: dict[Any, attention.Plan] = {}
        self.cu_seqlens_k: Tensor | None = None  # as flash-attn wants them


def plain_metadata(metadata: AttentionMetadata) -> AttentionMetadata:
    """The same with int32 tensors; rows of the block tables contiguous."""
    starts, lengths, tables = metadata.cu_seqlens_q, metadata.seq_lens, metadata.block_tables
    is_plain = starts.dtype is lengths.dtype is tables.dtype is torch.int32
    if is_plain and starts.stride(0) == lengths.stride(0) == tables.stride(1) == 1:
        return metadata
    return replace(
        metadata,
        cu_seqlens_q=plain(starts, torch.int32),
        seq_lens=plain(lengths, torch.int32),
        block_tables=plain(tables, torch.int32),
    )


def takes(kv_cache: Tensor, x: Tensor) -> bool:
    """Whether keys and values of x may lie in this cache."""
    return kv_cache.dtype is x.dtype or is_quantized(kv_cache.dtype)


def planned(
    query: Tensor, kv_cache: Tensor, metadata: AttentionMetadata, sliding_window: int | None
) -> attention.Plan:
    """The launches of this step, checked once for all its layers."""
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = kv_cache.shape[3:5]
    cached_dim = head_size(kv_cache)
    num_seqs = len(metadata.seq_lens)
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    assert head_dim == cached_dim <= MAX_HEAD_DIM, (head_dim, cached_dim)
    assert takes(kv_cache, query), (kv_cache.dtype, query.dtype)
    assert sliding_window is None or sliding_window > 0, sliding_window
    assert len(metadata.cu_seqlens_q) == num_seqs + 1, metadata.cu_seqlens_q.shape
    assert len(metadata.block_tables) == num_seqs, metadata.block_tables.shape
    heads = (num_heads, num_kv_heads, head_dim, block_size)
    shape = attention.Shape(
        num_tokens, *heads, sliding_window is not None, query.dtype, query.device
    )
    return attention.plan(metadata, shape)


class TritonOps(Ops):
    name = "triton"

    def __init__(self) -> None:
        self.reference = ReferenceOps()
        self.step: Step | None = None  # the last

    def check_kv_cache(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        super().check_kv_cache(block_size, head_dim, dtype)
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"kernels {self.name!r} take a head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
            )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not is_matrix(x):
            return self.reference.rms_norm(x, weight, eps)
        assert weight.numel() == x.shape[1], (weight.shape, x.shape)
        return elementwise.norm(x, None, weight.contiguous(), eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not (is_matrix(x) and is_matrix(residual)):
            return self.reference.add_rms_norm(x, residual, weight, eps)
        shape = x.shape
        assert residual.shape == shape and weight.numel() == shape[1], (residual.shape, shape)
        return elementwise.norm(x, residual, weight.contiguous(), eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if not is_matrix(gate_up):
            return self.reference.silu_and_mul(gate_up)
        assert gate_up.shape[1] % 2 == 0, gate_up.shape
        return elementwise.silu_and_mul(gate_up)

    def rotary_and_store(
        self,
        qkv: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        kv_cache: Tensor,
        layer: int,
        slot_mapping: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        if not is_matrix(qkv) or not kv_cache.is_contiguous() or cos_sin.dtype != torch.float32:
            arguments = (qkv, cos_sin, positions, kv_cache, layer, slot_mapping)
            return self.reference.rotary_and_store(*arguments, q_norm, k_norm, eps)
        _, num_layers, _, _, num_kv_heads, _ = kv_cache.shape
        head_dim = head_size(kv_cache)
        num_tokens, num_columns = qkv.shape
        num_heads, rest = divmod(num_columns - 2 * num_kv_heads * head_dim, head_dim)
        assert num_heads > 0 and rest == 0 and head_dim % 2 == 0, (qkv.shape, kv_cache.shape)
        assert takes(kv_cache, qkv) and 0 <= layer < num_layers, (kv_cache.dtype, layer)
        assert cos_sin.shape[1] == head_dim, cos_sin.shape
        assert len(positions) == len(slot_mapping) == num_tokens, (positions.shape, num_tokens)
        assert q_norm is None or q_norm.numel() == head_dim, q_norm.shape
        assert k_norm is None or k_norm.numel() == head_dim, k_norm.shape
        return elementwise.rotary_and_store(
            qkv,
            cos_sin.contiguous(),
            plain(positions, torch.int64),
            kv_cache,
            layer,
            plain(slot_mapping, torch.int64),
            None if q_norm is None else q_norm.contiguous(),
            None if k_norm is None else k_norm.contiguous(),
            eps,
        )

    def prepare_weight(self, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Any:
        if isinstance(weight, QuantizedWeight) and quantized_weight.can_pack(weight):
            return quantized_weight.pack(weight), bias
        return weight, bias

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """The first inputs of a dtype compile what any number of them will launch."""
        matrix, bias = weight
        if isinstance(matrix, Tensor):
            return F.linear(x, matrix, bias)
        if isinstance(matrix, QuantizedWeight) or not is_matrix(x):
            return self.reference.linear(x, (quantized_weight.unpack(matrix), bias))
        assert x.shape[1] == matrix.in_features, (x.shape, matrix.in_features)
        with device_of(x):
            if x.dtype not in matrix.compiled_for and not is_capturing(x):
                quantized_linear.compile_all(x.dtype, matrix, bias)
            return quantized_linear.linear(x, matrix, bias)

    def embedding(self, token_ids: Tensor, weight: Any) -> Tensor:
        table, bias = weight
        if isinstance(table, PackedWeight):
            return quantized_weight.rows(table, token_ids).dequantize()
        return self.reference.embedding(token_ids, (table, bias))

    def prepare_experts(
        self,
        gate_up: Iterable[Tensor | QuantizedWeight],
        down: Iterable[Tensor | QuantizedWeight],
    ) -> Any:
        """Compiles what `experts` will launch, too: it depends on these shapes alone. Of quantised
        experts it depends on their inputs' dtype, and is compiled with the first ones."""
        sides = self.reference.prepare_experts(gate_up, down)
        if isinstance(sides[0], list):
            if all(quantized_weight.can_stack(side) for side in sides):
                return quantized_experts.QuantizedExperts(*map(quantized_weight.stack, sides))
            return sides
        prepared = experts.StackedExperts(*sides)
        if prepared.down.dtype in DTYPES and experts.EXPERTS.is_compiled:
            x = prepared.down.new_zeros(1, prepared.down.shape[1])
            ids, weights = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
            device = experts.Device.of(x.device)
            for tile in experts.TILES.values():
                tile = experts.fitting(tile, x.dtype, device)
                experts.experts(x, ids.to(x.device), weights.to(x.device), prepared, tile)
        return prepared

    def experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, prepared: Any) -> Tensor:
        is_quantized = isinstance(prepared, QuantizedExperts)
        if x.dtype not in DTYPES or isinstance(prepared, tuple):
            return self.reference.experts(x, expert_ids, weights, as_pairs(prepared))
        hidden = prepared.down.out_features if is_quantized else prepared.down.shape[1]
        assert x.shape[1:] == (hidden,), (x.shape, hidden)
        assert is_quantized or x.dtype is prepared.down.dtype, x.dtype
        shape = expert_ids.shape
        assert weights.shape == shape and shape[:-1] == x.shape[:1], (shape, weights.shape)
        if shape.numel() == 0:
            return torch.zeros_like(x)
        expert_ids, weights = plain(expert_ids, torch.int64), plain(weights, torch.float32)
        arguments = (x.contiguous(), expert_ids, weights, prepared)
        if is_quantized:
            with device_of(x):
                if x.dtype not in prepared.compiled_for and not is_capturing(x):
                    quantized_experts.compile_all(x.dtype, prepared)
                return quantized_experts.experts(*arguments)
        device, num_experts = experts.Device.of(x.device), len(prepared.down)
        tile = experts.tile_for(shape.numel(), num_experts, x.dtype, device)
        return experts.experts(*arguments, tile)

    def replace_expert(
        self,
        prepared: Any,
        index: int,
        gate_up: Tensor | QuantizedWeight,
        down: Tensor | QuantizedWeight,
    ) -> None:
        if isinstance(prepared, QuantizedExperts):
            quantized_weight.overwrite(prepared.gate_up, index, gate_up)
            quantized_weight.overwrite(prepared.down, index, down)
        else:
            self.reference.replace_expert(as_pairs(prepared), index, gate_up, down)

    def attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        layer: int,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        if query.dtype not in DTYPES or not kv_cache.is_contiguous():
            arguments = (query, kv_cache, layer, metadata, scale, sliding_window)
            return self.reference.attention(*arguments)
        shape, cache_shape = query.shape, kv_cache.shape
        if shape[0] == 0 or metadata.max_query_len == 0:
            return query.new_zeros(shape[0], shape[1] * shape[2])
        step = self.step_of(metadata)
        key = (shape, cache_shape, query.dtype, kv_cache.dtype, sliding_window)
        plan = step.plans.get(key)
        if plan is None:
            plan = step.plans[key] = planned(query, kv_cache, step.metadata, sliding_window)
        assert 0 <= layer < cache_shape[1], (layer, cache_shape)
        arguments = (kv_cache, layer, step.metadata, scale, sliding_window, plan)
        return attention.attention(query.contiguous(), *arguments)

    def step_of(self, metadata: AttentionMetadata) -> Step:
        """What is known of this step, from its first layer on."""
        step = self.step
        if step is None or step.given is not metadata:
            step = Step(metadata)
            if step.is_given or not is_capturing(metadata.seq_lens):
                self.step = step
        elif not step.is_given and is_capturing(metadata.seq_lens):
            step = Step(metadata)
        return step

    def warm_up_lengths(
        self,
        group: int,
        max_query_len: int,
        max_seq_len: int,
        max_decode_query_len: int | None = None,
    ) -> list[list[tuple[int, int]]]:
        return attention.warm_up_lengths(group, max_query_len, max_seq_len, max_decode_query_len)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
        choices: Tensor | None = None,
    ) -> Tensor:
        num_rows = len(logits)
        if not is_matrix(logits):
            logits = logits.float().contiguous()
        floats = [plain(x, torch.float32) for x in (temperature, top_p, min_p)]
        numbers = [top_k, seeds, positions, *([] if choices is None else [choices])]
        integers = [plain(x, torch.int64) for x in numbers]
        assert all(x.shape == (num_rows,) for x in floats + integers), num_rows
        if num_rows == 0:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        temperature, top_p, min_p = floats
        top_k, *noise = integers
        noise += [None] * (choices is None)
        with device_of(logits):
            return sample(logits, temperature, top_k, top_p, min_p, *noise)

    def smallest_kept(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        logits, top_k = logits.float().contiguous(), plain(top_k, torch.int64)
        floats = [plain(x, torch.float32) for x in (top_p, min_p)]
        assert all(x.shape == (len(logits),) for x in (top_k, *floats)), len(logits)
        if len(logits) == 0:
            return logits.new_empty(0)
        with device_of(logits):
            return smallest_kept(logits, top_k, *floats)
