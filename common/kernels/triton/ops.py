"""The operations on a GPU: Triton's kernels behind checked wrappers; products are cuBLAS's.

Kernels take bfloat16, float16 and float32 and compute in float32. Nothing waits for the GPU or
depends on numbers that only it knows: every operation can be captured in a CUDA graph, once its
kernels are compiled, which happens at the first call with new shapes and is kept on disk. What the
kernels do not take (float64, rows that are not contiguous) goes to the reference, which is slower,
and whose attention and sampling do wait.

With TRITON_INTERPRET=1 set before the import the same kernels run on a CPU, slowly, for tests.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import AttentionMetadata, Ops
from common.kernels.reference import ReferenceOps
from common.kernels.triton import attention, elementwise
from common.kernels.triton.sampler import sample, smallest_kept

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256


def is_rows(*tensors: Tensor) -> bool:
    """Whether these are matrices of a dtype that kernels take, each row contiguous."""
    return all(x.dtype in DTYPES and x.dim() == 2 and x.stride(1) == 1 for x in tensors)


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, contiguous and in that dtype."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's GPU the current one, which is where Triton launches."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


class TritonOps(Ops):
    name = "triton"

    def __init__(self) -> None:
        self.reference = ReferenceOps()

    def check_kv_cache(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"kernels {self.name!r} take a head_dim up to {MAX_HEAD_DIM}, not {head_dim}"
            )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not is_rows(x):
            return self.reference.rms_norm(x, weight, eps)
        return self._norm(x, None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not is_rows(x, residual):
            return self.reference.add_rms_norm(x, residual, weight, eps)
        assert residual.shape == x.shape, (residual.shape, x.shape)
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        assert weight.shape == x.shape[1:], (weight.shape, x.shape)
        with device_of(x):
            return elementwise.norm(x, residual, weight.contiguous(), eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if not is_rows(gate_up):
            return self.reference.silu_and_mul(gate_up)
        assert gate_up.shape[1] % 2 == 0, gate_up.shape
        with device_of(gate_up):
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
        norms = [weight for weight in (q_norm, k_norm) if weight is not None]
        if not is_rows(qkv) or not kv_cache.is_contiguous() or cos_sin.dtype != torch.float32:
            arguments = (qkv, cos_sin, positions, kv_cache, layer, slot_mapping)
            return self.reference.rotary_and_store(*arguments, q_norm, k_norm, eps)
        _, num_layers, _, _, num_kv_heads, head_dim = kv_cache.shape
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim, qkv.shape
        assert num_heads > 0 and head_dim % 2 == 0 and 0 <= layer < num_layers, (head_dim, layer)
        assert kv_cache.dtype == qkv.dtype and cos_sin.shape[1] == head_dim, cos_sin.shape
        assert len(positions) == len(slot_mapping) == len(qkv), (positions.shape, qkv.shape)
        assert all(weight.shape == (head_dim,) for weight in norms), norms[0].shape
        with device_of(qkv):
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

    def prepare_weight(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        return weight, bias

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return F.linear(x, *weight)

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
        num_tokens, num_heads, head_dim = query.shape
        num_layers, (num_kv_heads, cached_dim) = kv_cache.shape[1], kv_cache.shape[4:]
        num_seqs = len(metadata.seq_lens)
        assert num_heads % num_kv_heads == 0 and 0 <= layer < num_layers, (num_heads, layer)
        assert head_dim == cached_dim <= MAX_HEAD_DIM, (head_dim, cached_dim)
        assert kv_cache.dtype == query.dtype, (kv_cache.dtype, query.dtype)
        assert sliding_window is None or sliding_window > 0, sliding_window
        assert len(metadata.cu_seqlens_q) == num_seqs + 1, metadata.cu_seqlens_q.shape
        assert len(metadata.block_tables) == num_seqs, metadata.block_tables.shape
        if num_tokens == 0 or metadata.max_query_len == 0:
            return query.new_zeros(num_tokens, num_heads * head_dim)
        is_plain = query.stride(2) == 1 and query.stride(1) == head_dim
        metadata = plain_metadata(metadata)
        with device_of(query):
            return attention.attention(
                query if is_plain else query.contiguous(),
                kv_cache,
                layer,
                metadata,
                scale,
                sliding_window,
            )

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
        if not is_rows(logits):
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


def plain_metadata(metadata: AttentionMetadata) -> AttentionMetadata:
    """The same with int32 tensors; rows of the block tables contiguous."""
    starts, lengths, tables = metadata.cu_seqlens_q, metadata.seq_lens, metadata.block_tables
    is_plain = starts.dtype is lengths.dtype is tables.dtype is torch.int32
    if is_plain and starts.stride(0) == lengths.stride(0) == tables.stride(1) == 1:
        return metadata
    return AttentionMetadata(
        plain(starts, torch.int32),
        plain(lengths, torch.int32),
        plain(tables, torch.int32),
        metadata.slot_mapping,
        metadata.max_query_len,
        metadata.max_seq_len,
    )
