"""The operations in plain PyTorch, on any device and in any floating dtype: written to be read.

Each computes in float32 (or float64, when given that) and rounds once, at its end. The other
implementations are tested against this one in float64.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import AttentionMetadata, Ops
from common.kernels.quantized import QuantizedWeight, round_activations
from common.kernels.quantized_kv import dequantize_rows, head_size, is_quantized, quantize_rows
from common.sampling import NO_TOKEN, gumbel_noise, not_drawn

GREEDY_BELOW = 1e-5  # temperatures below this are greedy


def wide(x: Tensor) -> Tensor:
    """x in the dtype that is computed in: float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (e, e + head_dim / 2). x: [num_tokens, heads, head_dim]; cos, sin: half."""
    first, second = wide(x).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; a quantised weight is unpacked for it."""
    if isinstance(weight, QuantizedWeight):
        group = weight.group
        if weight.order is not None and weight.activations == "int8":  # its groups are reordered
            ordered = round_activations(x[:, weight.order], weight.activations, group)
            x = ordered[:, weight.order.argsort()]
        else:
            x = round_activations(x, weight.activations, group)
        weight = weight.dequantize().to(x.dtype)
    return F.linear(x, weight, bias)


class ReferenceOps(Ops):
    name = "reference"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        values = wide(x)
        scale = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
        return (values * scale * wide(weight)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

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
        block_size, num_kv_heads = kv_cache.shape[3:5]
        heads = qkv.reshape(len(qkv), -1, head_size(kv_cache))
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if q_norm is not None:
            query = self.rms_norm(query, q_norm, eps)
        if k_norm is not None:
            key = self.rms_norm(key, k_norm, eps)
        cos, sin = cos_sin[positions].chunk(2, dim=-1)
        if is_quantized(kv_cache.dtype):  # rounded once, to codes
            query, key = apply_rotary(query, cos, sin), apply_rotary(wide(key), cos, sin)
            key, value = (quantize_rows(x, kv_cache.dtype).view(torch.int8) for x in (key, value))
            kv_cache = kv_cache.view(torch.int8)  # not every PyTorch indexes float8
        else:
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        stored = slot_mapping >= 0
        slots = slot_mapping[stored]
        blocks, places = slots // block_size, slots % block_size
        kv_cache[blocks, layer, 0, places] = key[stored]
        kv_cache[blocks, layer, 1, places] = value[stored]
        return query

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = wide(gate_up).chunk(2, dim=-1)
        return (F.silu(gate) * up).to(gate_up.dtype)

    def prepare_weight(self, weight: Tensor | QuantizedWeight, bias: Tensor | None = None) -> Any:
        return weight, bias

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        return product(x, *weight)

    def embedding(self, token_ids: Tensor, weight: Any) -> Tensor:
        table = weight[0]
        if isinstance(table, QuantizedWeight):
            return table.rows(token_ids).dequantize()
        return table[token_ids]

    def prepare_experts(
        self,
        gate_up: Iterable[Tensor | QuantizedWeight],
        down: Iterable[Tensor | QuantizedWeight],
    ) -> Any:
        pairs = list(zip(gate_up, down, strict=True))
        sides = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if isinstance(pairs[0][0], QuantizedWeight):
            return sides
        return torch.stack(sides[0]), torch.stack(sides[1])

    def experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, prepared: Any) -> Tensor:
        gate_ups, downs = prepared
        out = torch.zeros_like(wide(x))
        for expert in expert_ids[expert_ids >= 0].unique().tolist():
            tokens, places = (expert_ids == expert).nonzero(as_tuple=True)
            hidden = self.silu_and_mul(product(x[tokens], gate_ups[expert]))
            result = wide(product(hidden, downs[expert]))
            out.index_add_(0, tokens, result * weights[tokens, places].unsqueeze(1))
        return out.to(x.dtype)

    def replace_expert(
        self,
        prepared: Any,
        index: int,
        gate_up: Tensor | QuantizedWeight,
        down: Tensor | QuantizedWeight,
    ) -> None:
        for side, given in zip(prepared, (gate_up, down), strict=True):
            if isinstance(side, list):
                side[index] = given
            else:
                side[index].copy_(given)

    def attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        layer: int,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> Tensor:
        starts, lengths = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
        out = torch.empty_like(query)
        for i, length in enumerate(lengths):
            rows = slice(starts[i], starts[i + 1])
            if rows.start == rows.stop:
                continue
            keys, values = self.gather(kv_cache, layer, metadata.block_tables[i], length)
            out[rows] = self.attend(query[rows], keys, values, scale, sliding_window)
        return out.flatten(1)

    def gather(
        self, kv_cache: Tensor, layer: int, block_table: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, [length, num_kv_heads, head_dim] each."""
        num_blocks, dtype = -(-length // kv_cache.shape[3]), kv_cache.dtype
        if is_quantized(dtype):
            kv_cache = kv_cache.view(torch.int8)
        blocks = kv_cache[block_table[:num_blocks].long(), layer]  # [num_blocks, 2, block_size, …]
        if is_quantized(dtype):
            blocks = dequantize_rows(blocks.view(dtype))
        keys, values = blocks.transpose(0, 1).flatten(1, 2)
        return keys[:length], values[:length]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, sliding_window: int | None
    ) -> Tensor:
        """One sequence: query [num_queries, num_heads, head_dim], its last tokens."""
        group = query.shape[1] // keys.shape[1]
        queries = wide(query) * scale
        keys = keys.to(queries.dtype).repeat_interleave(group, dim=1)
        values = values.to(queries.dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys)
        token = torch.arange(len(keys), device=query.device)
        position = token[len(keys) - len(query) :, None]
        visible = token <= position
        if sliding_window is not None:
            visible &= token > position - sliding_window
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)

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
        is_greedy = temperature < GREEDY_BELOW
        greedy = not_drawn(logits.argmax(dim=-1), logits)
        if bool(is_greedy.all()):
            return greedy
        scaled = logits.float() / temperature.float().clamp(min=GREEDY_BELOW).unsqueeze(1)
        smallest = smallest_kept(scaled, top_k, top_p, min_p)
        rows, tokens = (scaled >= smallest.unsqueeze(1)).nonzero(as_tuple=True)
        choices = torch.zeros_like(positions) if choices is None else choices
        noise = gumbel_noise(seeds[rows], positions[rows], tokens, choices[rows])
        noisy = torch.full_like(scaled, -torch.inf, dtype=noise.dtype)
        noisy[rows, tokens] = scaled[rows, tokens] + noise
        has_token = ~is_greedy & (greedy != NO_TOKEN)
        return torch.where(has_token, noisy.argmax(dim=-1), greedy)

    def smallest_kept(self, logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        return smallest_kept(logits, top_k, top_p, min_p)


def smallest_kept(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit that stays in each row of [batch, vocab]: top-k, then top-p over what it
    left, then min-p. Filters are thresholds, so equal logits stay or go together. [batch]

    Sorts the whole vocabulary where there is a filter; implementations for speed must not.
    """
    vocab = logits.shape[1]
    log_min_p = min_p.float().log()
    if not bool(((top_k > 0) | (top_p < 1)).any()):
        return logits.amax(dim=-1) + log_min_p
    top = logits.sort(dim=-1, descending=True).values
    num_allowed = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).unsqueeze(1)
    kth = top.gather(1, num_allowed - 1)
    in_top_k = torch.arange(vocab, device=top.device) < num_allowed
    probs = top.where(in_top_k, -torch.inf).softmax(dim=-1)
    # A token stays while those before it do not reach top_p: so the one that crosses it stays.
    num_kept = (probs.cumsum(dim=-1) - probs < top_p.unsqueeze(1)).sum(dim=-1, keepdim=True)
    pth = top.gather(1, (num_kept - 1).clamp(min=0)).where(top_p.unsqueeze(1) < 1, -torch.inf)
    return torch.maximum(torch.maximum(kth, pth)[:, 0], top[:, 0] + log_min_p)
