"""Attention by the `flash-attn` package (version 2), everything else by Triton's kernels.

The package reads paged caches whose blocks have a multiple of 256 tokens. A layer's keys and values
are views with a large stride from block to block, which it takes: only heads must be contiguous.
"""

import inspect

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from common.kernels import AttentionMetadata
from common.kernels.quantized_kv import is_quantized
from common.kernels.triton.ops import Step, TritonOps, is_capturing

DTYPES = (torch.float16, torch.bfloat16)
BLOCK_MULTIPLE = 256  # tokens


class FlashOps(TritonOps):
    """Raises ImportError where the package is too old, ValueError where the GPU is."""

    name = "flash"
    default_block_size = 256

    def __init__(self) -> None:
        super().__init__()
        for function in (flash_attn_varlen_func, flash_attn_with_kvcache):
            if "block_table" not in inspect.signature(function).parameters:
                raise ImportError(f"{function.__name__} of this flash-attn has no block_table")
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            major, minor = torch.cuda.get_device_capability()
            raise ValueError(
                f"kernels 'flash' need a GPU of compute capability 8.0, not {major}.{minor}"
            )

    def check_kv_cache(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        super().check_kv_cache(block_size, head_dim, dtype)
        if block_size < 1 or block_size % BLOCK_MULTIPLE:
            raise ValueError(
                f"block_size must be a multiple of {BLOCK_MULTIPLE} for kernels 'flash',"
                f" not {block_size}"
            )
        if head_dim % 8:
            raise ValueError(
                f"head_dim must be a multiple of 8 for kernels 'flash', not {head_dim}"
            )
        if is_quantized(dtype):
            raise ValueError(
                f"kernels 'flash' take no quantised KV cache: kv_cache_dtype is {dtype}"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be float16 or bfloat16 for kernels 'flash', not {dtype}")

    def attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        layer: int,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        num_tokens, num_heads, head_dim = query.shape
        self.check_kv_cache(kv_cache.shape[3], head_dim, kv_cache.dtype)
        assert kv_cache.dtype == query.dtype, (kv_cache.dtype, query.dtype)
        assert num_heads % kv_cache.shape[4] == 0, (num_heads, kv_cache.shape)
        num_queries, num_seqs = metadata.max_query_len, len(metadata.seq_lens)
        if num_tokens == 0 or num_queries == 0:
            return query.new_zeros(num_tokens, num_heads * head_dim)
        step = self.step_of(metadata)
        metadata = step.metadata
        keys, values = kv_cache[:, layer, 0], kv_cache[:, layer, 1]
        options = {
            "block_table": metadata.block_tables,
            "softmax_scale": scale,
            "causal": True,  # aligned at the end: the queries are the last tokens
            # Tokens to the left and to the right that are seen beside its own; -1: all.
            "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        }
        if num_tokens == num_seqs * num_queries:  # so that each sequence has as many
            by_sequence = query.reshape(num_seqs, num_queries, num_heads, head_dim)
            out = flash_attn_with_kvcache(
                by_sequence, keys, values, cache_seqlens=metadata.seq_lens, **options
            )
            return out.reshape(num_tokens, num_heads * head_dim)
        out = flash_attn_varlen_func(
            query,
            keys,
            values,
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k(step),
            max_seqlen_q=num_queries,
            max_seqlen_k=metadata.max_seq_len,
            **options,
        )
        return out.reshape(num_tokens, num_heads * head_dim)


def cu_seqlens_k(step: Step) -> Tensor:
    """The tokens of all sequences before each, [num_seqs + 1] int32: once a step, not once a layer.

    The sequences' tokens lie in blocks; the running total only says how many there are. In a CUDA
    graph every layer computes it anew. A total kept from before would be that of the step in which
    the graph was captured; one kept for afterwards would be written only when the graph is replayed.
    """
    if step.cu_seqlens_k is not None and not is_capturing(step.cu_seqlens_k):
        return step.cu_seqlens_k
    ends = step.metadata.seq_lens.cumsum(0, dtype=torch.int32)
    totals = F.pad(ends, (1, 0))
    if not is_capturing(totals):
        step.cu_seqlens_k = totals
    return totals
