"""Cases that only a GPU can run: a cache of more than 2^31 elements, and capture in a CUDA graph."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from common.kernels import AttentionMetadata
from common.testing.kernels.attention_cases import LONG, MIXED, Spec, make_attention
from common.testing.kernels.case import EPS, Case, Target, error_of, wide
from common.testing.kernels.expert_cases import SPECS, make_choices, make_experts
from common.testing.kernels.sampler_cases import columns, drawn

FAR_BYTES = 6 << 30  # that must be free


def gpu_cases() -> Iterator[Case]:
    yield Case("attention", "beyond 2^31 elements", far_error)
    for name, lengths in (("decode", LONG), ("mixed", MIXED)):
        yield Case("attention", f"CUDA graph, {name}", lambda t, s=lengths: graph_error(t, s))
    yield Case("sample", "CUDA graph", sample_graph_error, 0)
    yield Case("experts", "CUDA graph", experts_graph_error)
    yield Case("rotary_and_store", "CUDA graph", rotary_graph_error)


def spec_for(t: Target, lengths: tuple[tuple[int, int], ...]) -> Spec | None:
    """A case with the implementation's own block size; None where it does not take the format."""
    spec = Spec(lengths, 8, 2, 128, t.ops.default_block_size)
    try:
        t.ops.check_kv_cache(spec.block_size, spec.head_dim, t.dtype)
    except ValueError:
        return None
    return spec


def far_error(t: Target) -> float | None:
    """The same blocks at the end of a huge cache: the answer must be the same, bit for bit."""
    spec = spec_for(t, MIXED)
    if spec is None or t.dtype.itemsize > 2 or torch.cuda.mem_get_info(t.device)[0] < FAR_BYTES:
        return None
    query, cache, layer, metadata = make_attention(t, spec)
    scale = spec.head_dim**-0.5
    expected = t.ops.attention(query, cache, layer, metadata, scale)
    first = 2**31 // cache[0].numel() + 1  # elements before it: more than 2^31
    huge = torch.empty((first + len(cache), *cache.shape[1:]), dtype=t.dtype, device=t.device)
    huge[first:] = cache
    tables = metadata.block_tables
    far = torch.where(tables < len(cache), tables + first, tables)
    actual = t.ops.attention(query, huge, layer, replace(metadata, block_tables=far), scale)
    error = error_of(actual, wide(expected), t.dtype)
    places = torch.tensor([first * spec.block_size, (first + 1) * spec.block_size - 1])
    return max(error, far_store_error(t, huge, places.to(t.device)))


def far_store_error(t: Target, cache: Tensor, slots: Tensor) -> float:
    """Values are stored as they come, so they must be found where their slots are."""
    _, _, _, block_size, num_kv_heads, head_dim = cache.shape
    qkv = t.randn(2, (2 + 2 * num_kv_heads) * head_dim)
    table = torch.ones(4, head_dim, device=t.device)
    t.ops.rotary_and_store(qkv, table, slots % 4, cache, 1, slots)
    stored = cache[slots // block_size, 1, 1, slots % block_size]
    values = qkv[:, -num_kv_heads * head_dim :].reshape(stored.shape)
    return 0.0 if torch.equal(stored, values) else float("inf")


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The call as a graph, and the tensor that holds its result after each replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def graph_error(t: Target, lengths: tuple[tuple[int, int], ...]) -> float | None:
    """Captured on one batch, replayed on another of the same bounds."""
    spec = spec_for(t, lengths)
    if spec is None:
        return None
    query, cache, layer, metadata = make_attention(t, spec)
    scale = spec.head_dim**-0.5

    def call(metadata: AttentionMetadata = metadata) -> Tensor:
        return t.ops.attention(query, cache, layer, metadata, scale)

    graph, result = captured(call)
    query.copy_(t.randn(*query.shape, seed=9))
    shorter = torch.where(metadata.seq_lens > 250, metadata.seq_lens - 9, metadata.seq_lens)
    metadata.seq_lens.copy_(shorter)
    graph.replay()
    replayed = result.clone()
    return error_of(replayed, wide(call()), t.dtype)


def experts_graph_error(t: Target) -> float:
    """Captured on one choice of experts, replayed on one of another load."""
    spec = SPECS["prompt"]
    prepared = t.ops.prepare_experts(*make_experts(t, spec))
    x, (ids, weights) = t.randn(spec.num_tokens, spec.hidden), make_choices(t, spec)
    graph, result = captured(lambda: t.ops.experts(x, ids, weights, prepared))
    x.copy_(t.randn(*x.shape, seed=9))
    ids[:70] = 1  # so that one expert has most, and by each choice of a token
    graph.replay()
    replayed = result.clone()
    return error_of(replayed, wide(t.ops.experts(x, ids, weights, prepared)), t.dtype)


def sample_graph_error(t: Target) -> float | None:
    if t.dtype != torch.float32:
        return None
    logits = (drawn(5003) * 3).to(t.device)
    own = [x.to(t.device) for x in columns(*logits.shape)]
    graph, result = captured(lambda: t.ops.sample(logits, *own))
    logits.copy_(logits.roll(1, 0))
    own[5] += 1
    graph.replay()
    replayed = result.clone()
    return float((replayed != t.ops.sample(logits, *own)).sum())


def rotary_graph_error(t: Target) -> float:
    tokens, heads, head_dim = 5, 4, 64
    cache = t.randn(4, 2, 2, 16, 1, head_dim)
    qkv = t.randn(tokens, (heads + 2) * head_dim)
    table = torch.rand(50, head_dim, device=t.device)
    slots = torch.arange(tokens, device=t.device)
    norm = t.randn(head_dim, seed=1)
    graph, result = captured(
        lambda: t.ops.rotary_and_store(qkv, table, slots, cache, 1, slots, norm, norm, EPS)
    )
    slots += 20
    qkv.copy_(t.randn(*qkv.shape, seed=2))
    graph.replay()
    replayed, stored = result.clone(), cache.clone()
    qkv.copy_(t.randn(*qkv.shape, seed=2))  # it may have been overwritten
    cache.zero_()
    again = t.ops.rotary_and_store(qkv, table, slots, cache, 1, slots, norm, norm, EPS)
    written = cache.view(-1, 2, 2, 16, 1, head_dim)[1, 1, :, 4 : 4 + tokens]
    expected = stored[1, 1, :, 4 : 4 + tokens]
    return max(error_of(replayed, wide(again), t.dtype), error_of(written, wide(expected), t.dtype))
