"""What a forward launches, without a GPU: recorded, and neither compiled nor run.

`layer_variants` takes the operations of a model's layer through batches of given lengths; what it
returns is what Triton would compile for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from unittest import mock

import torch

from common.kernels import AttentionMetadata, Ops

Lengths = list[tuple[int, int]]  # (queries, tokens) of each sequence
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Launched:
    kernel: str
    constants: tuple[Any, ...]
    formats: tuple[Any, ...]  # dtype of each tensor; whether it is None, of other arguments
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]
    numbers: tuple[int | float, ...]
    addresses: tuple[int, ...]  # of the tensors

    @property
    def variant(self) -> tuple[Any, ...]:
        """What is compiled."""
        return self.kernel, self.constants, self.formats, self.num_warps, self.num_stages


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Launches go into the list and nowhere else."""
    from common.kernels.triton.launch import Launcher

    launches = []

    def record(self, grid, arguments, constants, num_warps=4, num_stages=3) -> None:
        tensors = [x for x in arguments if torch.is_tensor(x)]
        launches.append(
            Launched(
                self.kernel.__name__,
                constants,
                tuple(x.dtype if torch.is_tensor(x) else x is None for x in arguments),
                num_warps,
                num_stages,
                grid,
                tuple(x for x in arguments if isinstance(x, int | float)),
                tuple(x.data_ptr() for x in tensors),
            )
        )

    with mock.patch.object(Launcher, "__call__", record):
        yield launches


@dataclass(frozen=True)
class Model:
    """One layer's sizes."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    has_head_norms: bool = False
    window: int | None = None
    num_experts: int = 0  # then `intermediate` is an expert's
    num_experts_per_tok: int = 0

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


MODELS = (
    Model("Qwen3-0.6B", 1024, 3072, 16, 8, 128, 151936, has_head_norms=True),
    Model("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152),
    Model("Qwen2.5-0.5B", 896, 4864, 14, 2, 64, 151936),
    Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 152064),
    Model("Mistral-7B-v0.1", 4096, 14336, 32, 8, 128, 32000, window=4096),
)
MOE_MODELS = (
    Model("Qwen3-30B-A3B", 2048, 768, 32, 4, 128, 151936, True, None, 128, 8),
    Model("Mixtral-8x7B-v0.1", 4096, 14336, 32, 8, 128, 32000, False, None, 8, 2),
)


def metadata_of(
    lengths: Lengths,
    max_seq_len: int | None = None,
    decode_queries: int | None = None,
    max_blocks: int = 4,
) -> AttentionMetadata:
    """decode_queries: N of `AttentionMetadata.max_decode_query_len`. Blocks are of no interest."""
    counts = [queries for queries, _ in lengths]
    few, leading = None, 0
    if decode_queries is not None:
        few = max((count for count in counts if count <= decode_queries), default=0)
        leading = len(list(takewhile(lambda count: count <= decode_queries, counts)))
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=torch.tensor([tokens for _, tokens in lengths]).int(),
        block_tables=torch.zeros(len(lengths), max_blocks, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
        max_query_len=max(counts),
        max_seq_len=max_seq_len or max(tokens for _, tokens in lengths),
        max_decode_query_len=few,
        num_leading_decodes=leading,
    )


def run_layer(ops: Ops, model: Model, dtype: torch.dtype, metadata: AttentionMetadata) -> None:
    """What lies between the products, and the norm at the model's end, for tensors without memory."""

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    num_tokens, head_dim = len(metadata.slot_mapping), model.head_dim
    x, residual = zeros(num_tokens, model.hidden), zeros(num_tokens, model.hidden)
    weight, head_norms = zeros(model.hidden), (None, None)
    if model.has_head_norms:
        head_norms = (zeros(head_dim), zeros(head_dim))
    cache = zeros(4, 2, 2, BLOCK_SIZE, model.num_kv_heads, head_dim)
    qkv = zeros(num_tokens, (model.num_heads + 2 * model.num_kv_heads) * head_dim)
    places = torch.zeros(num_tokens, dtype=torch.int64, device="meta")
    rotary = torch.zeros(9, head_dim, device="meta")
    ops.add_rms_norm(x, residual, weight, 1e-6)
    arguments = (qkv, rotary, places, cache, 1, metadata.slot_mapping)
    query = ops.rotary_and_store(*arguments, *head_norms, 1e-6)
    ops.attention(query, cache, 1, metadata, head_dim**-0.5, model.window)
    if model.num_experts:
        run_experts(ops, model, zeros(num_tokens, model.hidden))
    else:
        ops.silu_and_mul(zeros(num_tokens, 2 * model.intermediate))
    ops.rms_norm(x[: len(metadata.seq_lens)], weight, 1e-6)


def run_experts(ops: Ops, model: Model, x: torch.Tensor) -> None:
    """The load of a layer, which compiles what any batch will launch, and a batch."""
    ids = torch.zeros(len(x), model.num_experts_per_tok, dtype=torch.int64, device=x.device)
    ops.experts(x, ids, ids.float(), prepare_experts(ops, model, x.dtype))


def prepare_experts(ops: Ops, model: Model, dtype: torch.dtype) -> Any:
    shapes = (2 * model.intermediate, model.hidden), (model.hidden, model.intermediate)
    gate_up, down = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return ops.prepare_experts([gate_up] * model.num_experts, [down] * model.num_experts)


def layer_variants(
    ops: Ops, model: Model, dtype: torch.dtype, metadata: AttentionMetadata
) -> set[tuple[Any, ...]]:
    with recorded() as launches:
        run_layer(ops, model, dtype, metadata)
    return {launch.variant for launch in launches}
