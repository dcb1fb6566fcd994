"""The operations a transformer is made of, each in three implementations behind one interface.

`reference` is plain PyTorch, written to be read, and the oracle of the others; `triton` is the GPU's;
`cpu` is numba's, which needs no compiler on the user's machine. Models call an `Ops` object and never
know which one it is.

Tokens of all sequences lie flat in one row-major batch: [num_tokens, …], no padding. Attention has
one signature for every mix of prefill, decode, chunks and drafts: lengths differ, nothing else.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from common.kernels.quantized import QuantizedWeight
from common.kernels.quantized_kv import check_rows


@dataclass(frozen=True)
class AttentionMetadata:
    """Which tokens of the flat batch belong to which sequence, and where keys and values lie.

    Sequence i has queries `cu_seqlens_q[i] : cu_seqlens_q[i + 1]` of the batch; they are the last
    ones of its `seq_lens[i]` tokens, and each sees the tokens up to itself. Token t of sequence i
    lies in block `block_tables[i, t // block_size]` at place `t % block_size`. A sequence may have
    no queries, and entries of a block table beyond its length may hold anything. The tables may be
    a view: wider than any sequence needs, rows any distance apart, elements of a row side by side.

    One object describes one step. What an implementation derives from it may be kept for as long as
    it is the same object; if the tensors are filled for another step, that step needs a new object.
    """

    cu_seqlens_q: torch.Tensor  # [num_seqs + 1] int32
    seq_lens: torch.Tensor  # [num_seqs] int32, with the new tokens
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int32
    slot_mapping: (
        torch.Tensor
    )  # [num_tokens] int64: block * block_size + place; below 0: do not store
    max_query_len: int  # upper bounds, known on the host
    max_seq_len: int
    # The largest number of queries among the sequences that have at most N, 0 if none has so few.
    # N is the caller's and the same in every step: the most queries of a sequence that decodes, 1 or
    # 1 + its drafts. A bound, as above; grids and buffers follow from it, and results do not.
    # None: not known.
    max_decode_query_len: int | None = None
    # So many sequences at the front have at most N queries, if N is known. Fewer are right, too: the
    # launch for those with more queries passes them over.
    num_leading_decodes: int = 0


class Ops(ABC):
    """One implementation of the operations. Every tensor is on one device, in one floating dtype,
    unless said otherwise; accumulation is in float32.

    kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], keys then values; a
    block is one contiguous piece of memory. In int8 or float8_e4m3fn, whatever the others are in, its
    rows are codes and a scale, head_dim + 4 elements (see `quantized_kv`).

    Tensors other than metadata should begin at multiples of 16 bytes, as allocators give them. A view
    that does not is computed right, but may be slower and compile a kernel of its own.
    """

    name: str
    default_block_size = 16  # of the KV cache, where the user leaves it open

    def check_kv_cache(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """Raise ValueError, naming the field and the value, on a cache that this one cannot take."""
        check_rows(head_dim, dtype)

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension. x: [num_tokens, hidden]."""

    @abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add x to `residual` in place and return the norm of the sum; both [num_tokens, hidden]."""

    @abstractmethod
    def rotary_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        slot_mapping: torch.Tensor,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor:
        """Rotate queries and keys, write keys and values into the cache, return the queries.

        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], may be overwritten.
        cos_sin: [max_positions, head_dim] float32: head_dim / 2 cosines, then as many sines.
        positions: [num_tokens] int64. The rotation pairs element e with e + head_dim / 2.
        q_norm, k_norm: [head_dim], RMS norms of each head before the rotation (Qwen3).
        Returns [num_tokens, num_heads, head_dim].
        """

    @abstractmethod
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up; gate_up: [num_tokens, 2 * size], gate first. Returns [num_tokens, size]."""

    @abstractmethod
    def prepare_weight(
        self, weight: torch.Tensor | QuantizedWeight, bias: torch.Tensor | None = None
    ) -> Any:
        """A weight object for `linear` from [out_features, in_features], made once at load.

        The object keeps the only copy of the weight: callers drop theirs. A quantised weight stays
        quantised; products are those of `QuantizedWeight.dequantize` with inputs that are rounded as
        `round_activations` does, up to float32's rounding of sums.
        """

    @abstractmethod
    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """x @ weight.T + bias. x: [num_tokens, in_features]; returns [num_tokens, out_features]."""

    def embedding(self, token_ids: torch.Tensor, weight: Any) -> torch.Tensor:
        """Rows of a weight that `prepare_weight` made, [num_tokens, in_features].

        So a table that is tied to the output's weight is held once. token_ids: [num_tokens] int64.
        """
        return weight[0][token_ids]

    @abstractmethod
    def prepare_experts(
        self,
        gate_up: Iterable[torch.Tensor | QuantizedWeight],
        down: Iterable[torch.Tensor | QuantizedWeight],
    ) -> Any:
        """A weights object for `experts`, made once at load.

        gate_up: of each expert [2 * size, hidden], gate first; down: [hidden, size]. Both are gone
        through once and side by side, so that they may be read as they are asked for. The object
        keeps the only copy.
        """

    @abstractmethod
    def experts(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, prepared: Any
    ) -> torch.Tensor:
        """The weighted sum of what each token's experts make of it.

        x: [num_tokens, hidden]. expert_ids: [num_tokens, k] int64, which of `prepared`; below 0: an
        expert that is not here, which adds nothing. weights: [num_tokens, k] float32. Expert e of
        `prepared` makes down_e @ (silu(gate) * up) of a token, gate and up being the halves of
        gate_up_e @ x. Returns [num_tokens, hidden].
        """

    @abstractmethod
    def replace_expert(
        self,
        prepared: Any,
        index: int,
        gate_up: torch.Tensor | QuantizedWeight,
        down: torch.Tensor | QuantizedWeight,
    ) -> None:
        """Overwrite one expert's weights in place. gate_up, down: as in `prepare_experts`."""

    @abstractmethod
    def attention(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of every query over its sequence's cached keys and values.

        query: [num_tokens, num_heads, head_dim]; num_heads is a multiple of num_kv_heads, and head h
        reads KV head h // (num_heads / num_kv_heads). With a sliding window a token at position p sees
        positions p - sliding_window + 1 to p. Returns [num_tokens, num_heads * head_dim].
        """

    def warm_up_lengths(
        self,
        group: int,
        max_query_len: int,
        max_seq_len: int,
        max_decode_query_len: int | None = None,
    ) -> list[list[tuple[int, int]]]:
        """Batches that between them launch every kernel that any batch can launch.

        An implementation that compiles a kernel when it is first launched would otherwise do so in
        the middle of traffic. A forward of each batch, with bounds that are its lengths, compiles
        all that depends on lengths; nothing depends on how many sequences there are. Empty where
        nothing is compiled.

        group: query heads of a KV head. max_query_len, max_seq_len: of any sequence, ever.
        max_decode_query_len: N of `AttentionMetadata`, if the batches' metadata has that bound.
        Returns for each batch the (queries, tokens) of its sequences.
        """
        return []

    @abstractmethod
    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        choices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The next token of each row: greedy, or drawn as part 01's sampler draws.

        logits: [batch, vocab] after penalties, in any floating dtype; the result is that of their
        float32 values. The others are [batch] (top_k, seeds, positions and choices int64). choices:
        which of several completions of one prompt a row belongs to, all 0 unless given; with seed,
        position and token it is the noise's counter. Temperatures below 1e-5 are greedy.

        The result is the argmax of filtered logits plus `common.sampling.gumbel_noise`, token for
        token what part 01's `sample` gives, up to the rounding of logits that are equal within it.
        NO_TOKEN in rows that have NaN or +infinity, or only -infinity. Returns [batch] int64.
        """

    @abstractmethod
    def smallest_kept(
        self,
        logits: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> torch.Tensor:
        """The filters of `sample` alone: the smallest logit that stays in each row.

        logits: [batch, vocab] float32, finite, divided by their temperatures; the others are [batch]
        (top_k int64). Returns [batch] float32; below all logits where no filter is set.
        """


KERNELS = ("auto", "reference", "cpu", "triton", "flash")


def select_ops(
    name: str = "auto", device: torch.device | str = "cpu", num_threads: int | None = None
) -> Ops:
    """The implementation of that name for that device.

    auto: numba's on a CPU, Triton's on a GPU, the reference where those cannot be imported.
    num_threads: cores for numba's; all usable ones unless given.
    Raises ValueError where the name is unknown, or cannot be had on this device or machine.
    """
    kind = torch.device(device).type
    if name not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, not {name!r}")
    if name in ("triton", "flash") and kind != "cuda":
        raise ValueError(f"kernels {name!r} need a CUDA device, not {kind!r}")
    if name == "cpu" and kind != "cpu":
        raise ValueError(f"kernels 'cpu' need the device 'cpu', not {kind!r}")
    wanted = {"cpu": "cpu", "cuda": "triton"}.get(kind, "reference") if name == "auto" else name
    try:
        if wanted == "cpu":
            return import_module("common.kernels.cpu.ops").CpuOps(num_threads)
        if wanted == "triton":
            return import_module("common.kernels.triton.ops").TritonOps()
        if wanted == "flash":
            return import_module("common.kernels.flash").FlashOps()
    except ImportError as error:
        if name != "auto":
            raise ValueError(f"kernels {name!r} cannot be used here: {error}") from None
        print(
            f"Kernels: the slow reference, since {wanted} has no use here: {error}", file=sys.stderr
        )
    return import_module("common.kernels.reference").ReferenceOps()
