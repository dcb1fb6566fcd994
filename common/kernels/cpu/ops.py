"""The operations on a CPU: numba's kernels behind checked wrappers, in float32.

What the kernels do not take (other dtypes, head sizes that are no multiple of the vector width) goes
to the reference, which is slower and right; only products with quantised weights take inputs of other
dtypes, and round what they give to these. Kernels work on raw addresses, so each wrapper checks
its tensors: float32, contiguous, shapes that fit.

An object serves one thread at a time.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numba
import torch
from torch import Tensor

from common.device import usable_cores
from common.kernels import AttentionMetadata, Ops
from common.kernels.cpu import elementwise
from common.kernels.cpu.attention import attention
from common.kernels.cpu.compile import compile_missing
from common.kernels.cpu.experts import PanelExperts, experts
from common.kernels.cpu.integer_weight import IntegerWeight, is_integer
from common.kernels.cpu.kv_rows import FLOAT32, FP8, INT8
from common.kernels.cpu.linear import linear
from common.kernels.cpu.pool import ALONE, Threads, threads_of_pool
from common.kernels.cpu.quantized_experts import QuantizedExperts, quantized_experts
from common.kernels.cpu.quantized_weight import QuantizedPanels
from common.kernels.cpu.sampler import sample, smallest_kept
from common.kernels.cpu.vector import LANES, PANEL
from common.kernels.cpu.weight import PanelWeight, WeightMemory
from common.kernels.quantized import QuantizedWeight
from common.kernels.quantized_kv import check_rows, head_size
from common.kernels.reference import ReferenceOps

FLOAT = torch.float32
CACHE_KINDS = {FLOAT: FLOAT32, torch.int8: INT8, torch.float8_e4m3fn: FP8}
QUANTIZED_WEIGHTS = IntegerWeight, QuantizedPanels
OWN_WEIGHTS = PanelWeight, *QUANTIZED_WEIGHTS
# Elements from which a second core is worth telling.
PARALLEL_NORM = 100_000
PARALLEL_SILU = 12_000
PARALLEL_ROTARY = 30_000
PARALLEL_EXPERTS = 20_000

_compile_lock = threading.Lock()


@dataclass(frozen=True)
class CacheLayout:
    """What the kernels need to know of a KV cache, asked once and not 60 times a step."""

    cache: weakref.ref[Tensor]
    kind: int | None  # of `kv_rows`; None: not one that kernels take
    address: int
    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    row_size: int  # bytes of one head's key or value
    half: int  # bytes of the keys, or values, of a block and layer

    @classmethod
    def of(cls, kv_cache: Tensor) -> "CacheLayout":
        _, num_layers, _, block_size, num_kv_heads, row = kv_cache.shape
        kind = CACHE_KINDS.get(kv_cache.dtype) if kv_cache.is_contiguous() else None
        known = weakref.ref(kv_cache), kind, kv_cache.data_ptr()
        sizes, row_bytes = (num_layers, block_size, num_kv_heads), row * kv_cache.itemsize
        head_dim, half = head_size(kv_cache), block_size * num_kv_heads * row_bytes
        check_rows(head_dim, kv_cache.dtype)
        return cls(*known, *sizes, head_dim, row_bytes, half)


@dataclass(frozen=True)
class AttentionPlaces:
    """What the kernel needs to know of a step, asked once and not in each layer."""

    metadata: AttentionMetadata
    tensors: tuple[Tensor, ...]  # that the addresses are of
    arguments: tuple[int, ...]  # addresses of starts, lengths and tables; the tables' width
    num_seqs: int

    @classmethod
    def of(cls, metadata: AttentionMetadata) -> "AttentionPlaces":
        starts = plain(metadata.cu_seqlens_q, torch.int32)
        lengths = plain(metadata.seq_lens, torch.int32)
        tables = plain(metadata.block_tables, torch.int32)
        if not len(starts) - 1 == len(lengths) == len(tables):
            raise ValueError(f"attention: {starts.shape}, {lengths.shape}, tables {tables.shape}")
        tensors = starts, lengths, tables
        addresses = (tensor.data_ptr() for tensor in tensors)
        return cls(metadata, tensors, (*addresses, tables.shape[1]), len(lengths))


def is_plain(x: Tensor) -> bool:
    return x.dtype is FLOAT and x.is_contiguous()


def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, contiguous and in that dtype."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


class CpuOps(Ops):
    """float32 on a CPU, on `num_threads` cores: all usable ones unless told, and not more.

    Compiles, or loads from the cache, every kernel when it is made. ValueError if num_threads < 1.
    """

    name = "cpu"

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        self.num_threads = min(num_threads or usable_cores(), numba.config.NUMBA_NUM_THREADS)
        self.reference = ReferenceOps()
        self.memory = WeightMemory()
        self._layout: CacheLayout | None = None
        self._places: AttentionPlaces | None = None
        self.threads = ALONE
        self.warm_up()
        self.threads = threads_of_pool(self.num_threads)

    def threads_for(self, is_large: bool = True) -> Threads:
        """Which cores work on the next kernel."""
        return self.threads if is_large else ALONE

    def layout_of(self, kv_cache: Tensor) -> CacheLayout:
        if self._layout is None or self._layout.cache() is not kv_cache:
            self._layout = CacheLayout.of(kv_cache)
        return self._layout

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not (is_plain(x) and is_plain(weight) and x.dim() == 2):
            return self.reference.rms_norm(x, weight, eps)
        return self._norm(x, x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        is_simple = is_plain(x) and is_plain(residual) and is_plain(weight) and x.dim() == 2
        if not is_simple or x.data_ptr() == residual.data_ptr():
            return self.reference.add_rms_norm(x, residual, weight, eps)
        return self._norm(x, residual, weight, eps)

    def _norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_rows, size = shape = x.shape
        if residual.shape != shape or weight.shape != (size,):
            raise ValueError(f"norm: x {shape}, residual {residual.shape}, weight {weight.shape}")
        out = torch.empty(num_rows, size)
        elementwise.norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            eps,
            num_rows,
            size,
            *self.threads_for(num_rows * size >= PARALLEL_NORM),
        )
        return out

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
        layout = self.layout_of(kv_cache)
        is_simple = layout.kind is not None and is_plain(qkv) and is_plain(cos_sin)
        is_simple = is_simple and (q_norm is None or is_plain(q_norm))
        if not (is_simple and (k_norm is None or is_plain(k_norm))):
            arguments = (qkv, cos_sin, positions, kv_cache, layer, slot_mapping)
            return self.reference.rotary_and_store(*arguments, q_norm, k_norm, eps)
        positions, slots = plain(positions, torch.int64), plain(slot_mapping, torch.int64)
        num_kv_heads, head_dim = layout.num_kv_heads, layout.head_dim
        num_tokens, width = qkv.shape
        num_heads = width // head_dim - 2 * num_kv_heads
        if not 0 <= layer < layout.num_layers or head_dim % 2 or cos_sin.shape[1:] != (head_dim,):
            raise ValueError(f"rotary: layer {layer}, head_dim {head_dim}, table {cos_sin.shape}")
        if num_heads < 1 or width != (num_heads + 2 * num_kv_heads) * head_dim:
            raise ValueError(f"rotary: qkv {qkv.shape}, {num_kv_heads} KV heads of {head_dim}")
        if not positions.shape == slots.shape == (num_tokens,):
            raise ValueError(f"rotary: qkv {qkv.shape}, positions {positions.shape}, {slots.shape}")
        for norm in (q_norm, k_norm):
            if norm is not None and norm.shape != (head_dim,):
                raise ValueError(f"rotary: head_dim {head_dim}, norm {norm.shape}")
        out = torch.empty(num_tokens, num_heads, head_dim)
        half = layout.half
        elementwise.rotary_and_store(
            qkv.data_ptr(),
            cos_sin.data_ptr(),
            positions.data_ptr(),
            layout.address + layer * 2 * half,
            slots.data_ptr(),
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            out.data_ptr(),
            eps,
            num_tokens,
            cos_sin.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            layout.num_layers * 2 * half,
            half,
            layout.block_size,
            layout.row_size,
            layout.kind,
            *self.threads_for(num_tokens * width >= PARALLEL_ROTARY),
        )
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        if not (is_plain(gate_up) and gate_up.dim() == 2):
            return self.reference.silu_and_mul(gate_up)
        num_rows, width = gate_up.shape
        if width % 2:
            raise ValueError(f"silu_and_mul: gate_up {gate_up.shape} has no halves")
        size = width // 2
        out = torch.empty(num_rows, size)
        threads = self.threads_for(num_rows * size >= PARALLEL_SILU)
        elementwise.silu_and_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, size, *threads)
        return out

    def prepare_weight(self, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Any:
        if isinstance(weight, QuantizedWeight):
            kind = IntegerWeight if is_integer(weight) else QuantizedPanels
            return kind.pack(weight, bias, self.memory)
        if weight.dtype is not FLOAT:
            return self.reference.prepare_weight(weight, bias)
        return PanelWeight.pack(weight, bias, self.memory)

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        if not isinstance(weight, OWN_WEIGHTS):
            return self.reference.linear(x, weight)
        dtype, x = x.dtype, plain(x, FLOAT)
        num_tokens, in_features = x.shape
        if in_features != weight.in_features:
            raise ValueError(f"linear: x {x.shape}, weight takes {weight.in_features} features")
        threads = self.threads if weight.is_large or num_tokens > 4 else ALONE
        if isinstance(weight, QUANTIZED_WEIGHTS):
            out = weight.linear(x, threads)
            return out if dtype is FLOAT else out.to(dtype)
        out = torch.empty(num_tokens, weight.out_features)
        linear(
            x.data_ptr(),
            weight.panels_address,
            weight.bias_address,
            out.data_ptr(),
            num_tokens,
            in_features,
            weight.out_features,
            *threads,
        )
        return out if dtype is FLOAT else out.to(dtype)

    def embedding(self, token_ids: Tensor, weight: Any) -> Tensor:
        if isinstance(weight, QUANTIZED_WEIGHTS):
            return weight.rows(plain(token_ids, torch.int64))
        if not isinstance(weight, PanelWeight):
            return self.reference.embedding(token_ids, weight)
        return weight.panels[token_ids // PANEL, :, token_ids % PANEL]

    def prepare_experts(
        self,
        gate_up: Iterable[Tensor | QuantizedWeight],
        down: Iterable[Tensor | QuantizedWeight],
    ) -> Any:
        pairs = zip(gate_up, down, strict=True)
        first = [next(pairs)]
        is_quantized = isinstance(first[0][0], QuantizedWeight)
        if not is_quantized and first[0][0].dtype is not FLOAT:
            return self.reference.prepare_experts(*zip(*first, *pairs, strict=True))

        def each() -> Iterator[tuple[Any, Any]]:
            yield first.pop()  # so that it is held no longer than the others
            yield from pairs

        if is_quantized:
            return QuantizedExperts.pack(each(), self.prepare_weight)
        return PanelExperts.pack(each(), self.memory)

    def experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, prepared: Any) -> Tensor:
        if not isinstance(prepared, PanelExperts | QuantizedExperts):
            return self.reference.experts(x, expert_ids, weights, prepared)
        dtype, x, expert_ids = x.dtype, plain(x, FLOAT), plain(expert_ids, torch.int64)
        weights, shape = plain(weights, FLOAT), expert_ids.shape
        num_tokens, hidden = x.shape
        if hidden != prepared.hidden or weights.shape != shape or shape[:-1] != (num_tokens,):
            raise ValueError(f"experts: x {x.shape}, ids {shape}, weights {weights.shape}")
        if isinstance(prepared, QuantizedExperts) and prepared.tables is None:
            return self._experts_in_turns(x, expert_ids, weights, prepared).to(dtype)
        out = torch.empty(num_tokens, hidden)
        if isinstance(prepared, QuantizedExperts):
            run, addresses = quantized_experts, [prepared.tables.data_ptr()]
        else:
            run, addresses = experts, [prepared.addresses.data_ptr(), prepared.zeros.data_ptr()]
        is_known = run(
            x.data_ptr(),
            expert_ids.data_ptr(),
            weights.data_ptr(),
            *addresses,
            out.data_ptr(),
            num_tokens,
            shape[1],
            len(prepared.downs),
            hidden,
            prepared.size,
            *self.threads_for(shape.numel() * hidden * prepared.size >= PARALLEL_EXPERTS),
        )
        if not is_known:
            raise ValueError(
                f"experts: {len(prepared.downs)} of them, ids up to {expert_ids.max()}"
            )
        return out if dtype is FLOAT else out.to(dtype)

    def _experts_in_turns(
        self, x: Tensor, expert_ids: Tensor, weights: Tensor, prepared: QuantizedExperts
    ) -> Tensor:
        """One expert after another, each with all of its tokens."""
        out = torch.zeros_like(x)
        if len(x) and expert_ids.max() >= len(prepared.downs):
            raise ValueError(
                f"experts: {len(prepared.downs)} of them, ids up to {expert_ids.max()}"
            )
        for expert in expert_ids[expert_ids >= 0].unique().tolist():
            tokens, places = (expert_ids == expert).nonzero(as_tuple=True)
            parts = [self.linear(x[tokens], part) for part in prepared.gate_ups[expert]]
            hidden = self.silu_and_mul(torch.cat(parts, dim=1))
            result = self.linear(hidden, prepared.downs[expert])
            out.index_add_(0, tokens, result * weights[tokens, places].unsqueeze(1))
        return out

    def replace_expert(
        self,
        prepared: Any,
        index: int,
        gate_up: Tensor | QuantizedWeight,
        down: Tensor | QuantizedWeight,
    ) -> None:
        if isinstance(prepared, PanelExperts | QuantizedExperts):
            prepared.replace(index, gate_up, down)
        else:
            self.reference.replace_expert(prepared, index, gate_up, down)

    def attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        layer: int,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        layout = self.layout_of(kv_cache)
        num_kv_heads, head_dim = layout.num_kv_heads, layout.head_dim
        if query.dtype is not FLOAT or layout.kind is None or head_dim % LANES:
            arguments = (query, kv_cache, layer, metadata, scale, sliding_window)
            return self.reference.attention(*arguments)
        query = plain(query, FLOAT)
        places = self._places
        if places is None or places.metadata is not metadata:
            places = self._places = AttentionPlaces.of(metadata)
        num_tokens, num_heads, size = query.shape
        if num_heads % num_kv_heads or size != head_dim:
            raise ValueError(
                f"attention: query {query.shape}, {num_kv_heads} KV heads of {head_dim}"
            )
        if not 0 <= layer < layout.num_layers or not (sliding_window is None or sliding_window > 0):
            raise ValueError(f"attention: layer {layer}, sliding window {sliding_window}")
        out = torch.empty(num_tokens, num_heads * head_dim)
        if num_tokens == 0:
            return out
        half = layout.half
        attention(
            query.data_ptr(),
            out.data_ptr(),
            layout.address + layer * 2 * half,
            layout.num_layers * 2 * half,
            half,
            layout.block_size,
            layout.row_size,
            layout.kind,
            *places.arguments,
            num_tokens,
            places.num_seqs,
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
            sliding_window or 0,
            metadata.max_query_len,
            *self.threads_for(),
        )
        return out

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
        logits = plain(logits, FLOAT)
        num_rows, vocab = logits.shape
        floats = [plain(x, FLOAT) for x in (temperature, top_p, min_p.float().log())]
        choices = torch.zeros_like(positions) if choices is None else choices
        integers = [plain(x, torch.int64) for x in (top_k, seeds, positions, choices)]
        out = torch.empty(num_rows, dtype=torch.int64)
        if any(x.shape != (num_rows,) for x in floats + integers):
            raise ValueError(f"sample: {num_rows} rows, {[x.shape for x in floats + integers]}")
        temperature, top_p, log_min_p = (x.data_ptr() for x in floats)
        top_k, seeds, positions, choices = (x.data_ptr() for x in integers)
        sample(
            logits.data_ptr(),
            temperature,
            top_k,
            top_p,
            log_min_p,
            seeds,
            positions,
            choices,
            out.data_ptr(),
            num_rows,
            vocab,
            *self.threads_for(),
        )
        return out

    def smallest_kept(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        logits, top_k = plain(logits, FLOAT), plain(top_k, torch.int64)
        num_rows, vocab = logits.shape
        floats = [plain(x, FLOAT) for x in (top_p, min_p.float().log())]
        if any(x.shape != (num_rows,) for x in (top_k, *floats)):
            shapes = [x.shape for x in (top_k, *floats)]
            raise ValueError(f"smallest_kept: {num_rows} rows, {shapes}")
        out = torch.empty(num_rows)
        columns = [x.data_ptr() for x in (logits, top_k, *floats, out)]
        smallest_kept(*columns, num_rows, vocab, *self.threads_for())
        return out

    def warm_up(self) -> None:
        """Compile every kernel, or load it from the cache, so that no request waits for it."""
        with _compile_lock:
            compile_missing()
            self._run_each()

    def _run_each(self) -> None:
        """Every kernel once, on a token."""
        token, column = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        x, kv_cache = torch.zeros(1, LANES), torch.zeros(1, 1, 2, 1, 1, LANES)
        self.add_rms_norm(x, x.clone(), x[0], 1e-6)
        self.silu_and_mul(torch.zeros(1, 2))
        self.linear(x, self.prepare_weight(x))
        codes = torch.zeros(1, LANES, dtype=torch.int8)
        quantized = self.prepare_weight(QuantizedWeight("int8", codes, column[None], LANES))
        self.linear(x, quantized)
        self.embedding(token, quantized)
        down = QuantizedWeight("int8", codes[:, :1].repeat(LANES, 1), column.repeat(LANES, 1), 1)
        gate_up = QuantizedWeight("int8", codes.repeat(2, 1), column.repeat(2, 1), LANES)
        prepared = self.prepare_experts([gate_up], [down])
        self.experts(x, token[None], column[None], prepared)
        query = self.rotary_and_store(x.repeat(1, 3), x, token, kv_cache, 0, token)
        integer = QuantizedWeight("int8", x.to(torch.int8), x[:, :1], LANES, activations="int8")
        integer = self.prepare_weight(integer)
        self.linear(x, integer)
        self.embedding(token, integer)
        starts, one = torch.tensor([0, 1], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        metadata = AttentionMetadata(starts, one, token[None].int(), token, 1, 1)
        self.attention(query, kv_cache, 0, metadata, 1.0)
        self.sample(x, column, token, column, column, token, token)
        self.smallest_kept(x, token, column, column)
        prepared = self.prepare_experts([x.repeat(2, 1)], [x.T[:, :1]])
        self.experts(x, token[None], column[None], prepared)
