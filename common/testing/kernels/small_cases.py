"""Cases of the norms, the activation, rotary embedding with the store into the cache, and products."""

from collections.abc import Iterator

import torch

from common.kernels.quantized_kv import row_size
from common.testing.kernels.case import EPS, REFERENCE, Case, Target, error_of, wide


def small_cases() -> Iterator[Case]:
    yield from norm_cases()
    yield from rotary_cases()
    yield from linear_cases()


def norm_cases() -> Iterator[Case]:
    for rows, size in ((1, 1), (2, 7), (3, 576), (5, 1000), (2, 4096)):
        name = f"{rows} x {size}"
        yield Case("rms_norm", name, lambda t, s=(rows, size): norm_error(t, *s))
        yield Case("add_rms_norm", name, lambda t, s=(rows, size): add_norm_error(t, *s))
        yield Case("silu_and_mul", name, lambda t, s=(rows, size): silu_error(t, *s))
    yield Case("add_rms_norm", "views", lambda t: add_norm_error(t, 3, 40, is_view=True))
    yield Case("rms_norm", "zeros", lambda t: norm_error(t, 2, 64, scale=0.0))
    yield Case("silu_and_mul", "far from zero", lambda t: silu_error(t, 2, 50, scale=60.0))


def norm_error(t: Target, rows: int, size: int, scale: float = 1.0) -> float:
    x, weight = t.randn(rows, size) * scale, t.randn(size, seed=1)
    expected = REFERENCE.rms_norm(wide(x), wide(weight), EPS)
    return error_of(t.ops.rms_norm(x, weight, EPS), expected, t.dtype)


def add_norm_error(t: Target, rows: int, size: int, is_view: bool = False) -> float:
    factor = 2 if is_view else 1
    x, residual = (t.randn(rows, factor * size, seed=seed)[:, -size:] for seed in (0, 1))
    weight = t.randn(size, seed=2)
    total = wide(residual)
    expected = REFERENCE.add_rms_norm(wide(x), total, wide(weight), EPS)
    error = error_of(t.ops.add_rms_norm(x, residual, weight, EPS), expected, t.dtype)
    return max(error, error_of(residual, total, t.dtype))


def silu_error(t: Target, rows: int, size: int, scale: float = 3.0) -> float:
    gate_up = t.randn(rows, 2 * size) * scale
    expected = REFERENCE.silu_and_mul(wide(gate_up))
    return error_of(t.ops.silu_and_mul(gate_up), expected, t.dtype)


def rotary_cases() -> Iterator[Case]:
    # tokens, heads, KV heads, head size, block size
    for sizes in ((1, 9, 3, 64, 16), (6, 2, 2, 80, 17), (7, 8, 1, 256, 1), (5, 4, 2, 96, 256)):
        for norms in (False, True):
            name = "x".join(map(str, sizes)) + (", q and k norms" if norms else "")
            yield Case("rotary_and_store", name, lambda t, s=sizes, n=norms: rotary_error(t, *s, n))
    for kv_dtype in (torch.int8, torch.float8_e4m3fn):
        name = f"codes, {kv_dtype}"
        yield Case("rotary_and_store", name, lambda t, d=kv_dtype: codes_that_differ(t, d))


def rotary_error(
    t: Target,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    norms: bool,
) -> float:
    generator = torch.Generator().manual_seed(3)
    num_blocks, layer = tokens // block_size + 3, 1
    angles = torch.rand(50, head_dim // 2, generator=generator) * 6
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
    slots[::5] = -1
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)
    # Inside a wider tensor, since nothing says that rows follow each other.
    qkv = t.randn(tokens, (heads + 2 * kv_heads) * head_dim + 8)[:, :-8]
    cache = t.randn(num_blocks, 2, 2, block_size, kv_heads, head_dim, seed=1)
    weights = [t.randn(head_dim, seed=seed) for seed in (4, 5)] if norms else []
    cached = wide(cache)
    expected = REFERENCE.rotary_and_store(
        wide(qkv), table.double(), positions, cached, layer, slots, *map(wide, weights), eps=EPS
    )
    table, positions, slots = (x.to(t.device) for x in (table, positions, slots))
    actual = t.ops.rotary_and_store(qkv, table, positions, cache, layer, slots, *weights, eps=EPS)
    return max(error_of(actual, expected, t.dtype), error_of(cache, cached, t.dtype))


def codes_that_differ(t: Target, kv_dtype: torch.dtype) -> float | None:
    """How many bytes of a quantised cache are not as they should be. Nothing is turned, so what is
    rounded is the same number everywhere."""
    head_dim, num_tokens = 80, 12
    try:
        t.ops.check_kv_cache(5, head_dim, kv_dtype)
    except ValueError:
        return None
    qkv = t.randn(num_tokens, 8 * head_dim).view(num_tokens, 8, head_dim)
    qkv[1] = 0
    qkv[2] *= 1e4
    qkv[3] *= 1e-4
    qkv[4] = (qkv[4] * 60).round() / 2
    qkv[4, :, 0] = 63.5  # so that the others are half codes: ties, which go to even
    qkv[5, ::2, 7] = torch.nan
    qkv[6, ::2, 9] = torch.inf
    qkv = qkv.flatten(1)
    table = torch.cat([torch.ones(20, head_dim // 2), torch.zeros(20, head_dim // 2)], dim=1)
    slots, positions = torch.arange(num_tokens).flip(0) + 2, torch.arange(num_tokens)
    slots[8:10] = -1
    caches = []
    for ops, device in ((REFERENCE, "cpu"), (t.ops, t.device)):
        cache = torch.full((4, 2, 2, 5, 2, row_size(head_dim, kv_dtype)), 7, dtype=torch.int8)
        arguments = (qkv.clone().to(device), table.to(device), positions.to(device))
        cache = cache.to(device).view(kv_dtype)
        ops.rotary_and_store(*arguments, cache, 1, slots.to(device), eps=EPS)
        caches.append(cache.view(torch.int8).cpu())
    return float((caches[0] != caches[1]).sum())


def linear_cases() -> Iterator[Case]:
    for tokens, outs, ins in ((0, 3, 8), (1, 33, 70), (13, 64, 576)):
        name = f"{tokens} x {outs} x {ins}"
        yield Case("linear", name, lambda t, s=(tokens, outs, ins): linear_error(t, *s))


def linear_error(t: Target, tokens: int, outs: int, ins: int) -> float:
    x, weight, bias = t.randn(tokens, ins), t.randn(outs, ins, seed=1), t.randn(outs, seed=2)
    product = wide(x) @ wide(weight).T
    plain = t.ops.linear(x, t.ops.prepare_weight(weight))
    with_bias = t.ops.linear(x, t.ops.prepare_weight(weight, bias))
    return max(
        error_of(plain, product, t.dtype), error_of(with_bias, product + wide(bias), t.dtype)
    )
