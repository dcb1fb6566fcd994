"""Attention by flash-attn: what it is called with, against a stand-in for the package.

The package needs a GPU. The stand-in has its documented signatures (version 2.5 on), checks what the
package checks, and computes in plain PyTorch.
"""

import importlib
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from common.kernels import Ops
from common.kernels.reference import ReferenceOps
from common.testing.kernels.all_cases import check_all
from common.testing.kernels.attention_cases import DECODE, DRAFTS, Spec, make_attention
from common.testing.kernels.case import Target

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
DTYPES = [torch.float16, torch.bfloat16]


def attend(
    query: Tensor,  # [queries, heads, head_dim]
    k: Tensor,
    v: Tensor,
    table: Tensor,
    length: int,
    scale: float,
    causal: bool,
    window: tuple[int, int],
) -> Tensor:
    """One sequence, from a paged cache. Masks as the package's documentation describes them."""
    num_blocks = -(-length // k.shape[1])
    blocks = table[:num_blocks].long()
    keys, values = (x[blocks].flatten(0, 1)[:length].float() for x in (k, v))
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.float() * scale, keys)
    own = torch.arange(len(query))[:, None] + length - len(query)
    token = torch.arange(length)
    left, right = window
    if causal:
        right = 0
    seen = torch.ones(len(query), length, dtype=torch.bool)
    if left >= 0:
        seen &= token >= own - left
    if right >= 0:
        seen &= token <= own + right
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(query.dtype)


def check_arguments(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, *lengths: Tensor) -> None:
    assert q.dtype in DTYPES and k.dtype == v.dtype == q.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.shape == v.shape and k.dim() == 4 and k.shape[1] % 256 == 0
    assert q.shape[-1] == k.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    assert q.shape[-2] % k.shape[2] == 0
    assert block_table.dtype == torch.int32 and block_table.stride(-1) == 1
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lengths)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    check_arguments(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(starts) == len(ends) == len(block_table) + 1 and q.dim() == 3
    out = torch.empty_like(q)
    for i, table in enumerate(block_table):
        rows, length = slice(starts[i], starts[i + 1]), ends[i + 1] - ends[i]
        assert rows.stop - rows.start <= max_seqlen_q and length <= max_seqlen_k
        if rows.stop > rows.start:
            out[rows] = attend(q[rows], k, v, table, length, softmax_scale, causal, window_size)
    return out


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    check_arguments(q, k_cache, v_cache, block_table, cache_seqlens)
    assert q.dim() == 4 and len(q) == len(cache_seqlens) == len(block_table)
    options = (softmax_scale, causal, window_size)
    rows = zip(q, block_table, cache_seqlens.tolist(), strict=True)
    return torch.stack([attend(x, k_cache, v_cache, table, n, *options) for x, table, n in rows])


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in, where `common.kernels.flash` will find it."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.delitem(sys.modules, "common.kernels.flash", raising=False)
    yield module
    sys.modules.pop("common.kernels.flash", None)


def flash_ops() -> Ops:
    return importlib.import_module("common.kernels.flash").FlashOps()


def test_attention(package: ModuleType) -> None:
    results = check_all(flash_ops(), "cpu", DTYPES, only="attention")
    names = [result.case for result in results]
    assert len(names) == 2 * len(set(names)) and len(set(names)) >= 6
    assert all("block size" in name or "head size" in name or "window" in name for name in names)
    assert [str(result) for result in results if not result.passed] == []


@pytest.mark.parametrize("fault", [{"window_size": (8, 1)}, {"causal": False}], ids=str)
def test_attention_would_fail(package: ModuleType, fault: dict) -> None:
    package.flash_attn_varlen_func = lambda *args, block_table, cu_seqlens_q, **named: (
        flash_attn_varlen_func(
            *args, block_table=block_table, cu_seqlens_q=cu_seqlens_q, **{**named, **fault}
        )
    )
    results = check_all(flash_ops(), "cpu", DTYPES, only="attention")
    assert any(not result.passed for result in results)


@pytest.mark.parametrize("lengths, expected", [(DECODE, "kvcache"), (DRAFTS, "varlen")])
def test_function(package: ModuleType, lengths: tuple, expected: str) -> None:
    """Batches in which every sequence has as many queries go to the function that splits KV."""
    called = []

    def record(name: str, function):
        def call(*args, block_table, **named):
            called.append(name)
            return function(*args, block_table=block_table, **named)

        return call

    package.flash_attn_varlen_func = record("varlen", flash_attn_varlen_func)
    package.flash_attn_with_kvcache = record("kvcache", flash_attn_with_kvcache)
    ops = flash_ops()
    case = make_attention(
        Target(ops, torch.device("cpu"), torch.float16), Spec(lengths, 4, 2, 64, 256)
    )
    ops.attention(*case, 0.125)
    assert called == [expected]


@pytest.fixture
def totals(package: ModuleType) -> list[Tensor]:
    """What the package is given as cu_seqlens_k, call by call."""
    given = []

    def record(*args, block_table, cu_seqlens_k, **named):
        given.append(cu_seqlens_k)
        named |= {"block_table": block_table, "cu_seqlens_k": cu_seqlens_k}
        return flash_attn_varlen_func(*args, **named)

    package.flash_attn_varlen_func = record
    return given


def mixed_case(ops: Ops) -> tuple:
    return make_attention(
        Target(ops, torch.device("cpu"), torch.float16), Spec(DRAFTS, 4, 2, 64, 256)
    )


def test_totals_are_summed_once_a_step(totals: list[Tensor]) -> None:
    ops = flash_ops()
    query, cache, layer, metadata = mixed_case(ops)
    for _ in range(3):
        ops.attention(query, cache, layer, metadata, 0.125)
    assert totals[0] is totals[1] is totals[2]
    assert totals[0].tolist() == [0, 40, 169, 172, 179, 269]
    metadata.seq_lens[1] -= 2  # the next step fills the same buffers
    ops.attention(query, cache, layer, replace(metadata), 0.125)
    assert totals[3].tolist() == [0, 40, 167, 170, 177, 267]


def test_a_graph_sums_its_own_totals(totals: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """One from before would be the first step's in every replay, and one of the graph's is filled
    by replays alone."""
    ops = flash_ops()
    query, cache, layer, metadata = mixed_case(ops)
    for is_captured in (False, True, True, False):
        for module in ("common.kernels.flash", "common.kernels.triton.ops"):
            monkeypatch.setattr(
                f"{module}.is_capturing", lambda x, is_captured=is_captured: is_captured
            )
        ops.attention(query, cache, layer, metadata, 0.125)
    eager, first, second, last = totals
    assert last is eager
    assert first is not eager and second is not eager and first is not second
    ops.attention(query, cache, layer, replace(metadata), 0.125)
    assert all(other is not totals[-1] for other in totals[:-1])


def test_other_integers_are_converted_once_a_step(
    totals: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = flash_ops()
    query, cache, layer, metadata = mixed_case(ops)
    metadata = replace(metadata, seq_lens=metadata.seq_lens.long())
    step = ops.step_of(metadata)
    assert ops.step_of(metadata) is step and step.metadata.seq_lens.dtype == torch.int32
    monkeypatch.setattr("common.kernels.triton.ops.is_capturing", lambda x: True)
    assert ops.step_of(metadata) is not step
    fresh = replace(metadata)
    assert ops.step_of(fresh) is not ops.step_of(fresh)
    monkeypatch.setattr("common.kernels.triton.ops.is_capturing", lambda x: False)
    assert ops.step_of(metadata) is step
    ops.attention(query, cache, layer, metadata, 0.125)
    assert totals[0].tolist() == [0, 40, 169, 172, 179, 269]


@pytest.mark.parametrize(
    "block_size, head_dim, dtype, message",
    [
        (16, 128, torch.float16, "block_size.*not 16$"),
        (0, 128, torch.float16, "block_size.*not 0$"),
        (384, 128, torch.float16, "block_size.*not 384$"),
        (256, 84, torch.float16, "head_dim.*not 84$"),
        (256, 264, torch.float16, "head_dim.*not 264$"),
        (256, 128, torch.float32, "dtype.*not torch.float32$"),
    ],
)
def test_refuses(
    package: ModuleType, block_size: int, head_dim: int, dtype: torch.dtype, message: str
) -> None:
    ops = flash_ops()
    with pytest.raises(ValueError, match=message):
        ops.check_kv_cache(block_size, head_dim, dtype)
    assert ops.default_block_size == 256
    ops.check_kv_cache(512, 256, torch.bfloat16)


def test_attention_refuses_the_cache(package: ModuleType) -> None:
    ops = flash_ops()
    case = make_attention(
        Target(ops, torch.device("cpu"), torch.float16), Spec(DECODE, 4, 2, 64, 16)
    )
    with pytest.raises(ValueError, match="block_size"):
        ops.attention(*case, 0.125)


def test_an_old_package_is_refused(package: ModuleType) -> None:
    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        raise AssertionError

    package.flash_attn_varlen_func = old
    with pytest.raises(ImportError, match="block_table"):
        flash_ops()


def test_other_implementations_take_any_cache() -> None:
    from common.kernels.triton.ops import TritonOps

    for ops in (ReferenceOps(), TritonOps()):
        assert ops.default_block_size == 16
        ops.check_kv_cache(17, 80, torch.float32)
    with pytest.raises(ValueError, match=r"head_dim.*not 512"):
        TritonOps().check_kv_cache(16, 512, torch.float16)
