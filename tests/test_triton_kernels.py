"""The GPU's kernels: interpreted on a CPU, compiled for GPUs that are not there, run where one is."""

import functools
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.kernels import Ops
from common.kernels.cpu.ops import CpuOps
from common.kernels.reference import ReferenceOps
from common.testing.kernels.all_cases import CaseResult, check_all

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OPERATIONS = (
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
    "rotary_and_store",
    "linear",
    "attention",
    "experts",
    "sample",
)
KERNELS = {
    "norm_kernel",
    "silu_and_mul_kernel",
    "rotary_and_store_kernel",
    "attention_kernel",
    "combine_kernel",
    "sort_by_expert_kernel",
    "experts_kernel",
    "sum_of_experts_kernel",
    "extremes_kernel",  # the sampler's first
}


def run_module(name: str, *arguments: str) -> list:
    """The lines of JSON that a module prints, in a process that no other test has touched."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@functools.cache
def interpreted(*flags: str) -> list[CaseResult]:
    [results] = run_module("common.testing.kernels.triton_interpreted", *flags)
    return [CaseResult(**result) for result in results]


def failures(results: list[CaseResult]) -> list[str]:
    return [str(result) for result in results if not result.passed]


def is_interpreter_broken() -> bool:
    """Triton before 3.9 turns arrays of one element into integers as numpy 2.4 no longer does."""
    import numpy
    import triton

    def version(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:2])

    return version(triton.__version__) < (3, 9) and version(numpy.__version__) >= (2, 4)


@needs_triton
@pytest.mark.parametrize("op", OPERATIONS)
def test_interpreted(op: str) -> None:
    if is_interpreter_broken():
        pytest.skip("this triton's interpreter does not work with this numpy")
    own = [result for result in interpreted() if result.op == op]
    assert {result.dtype for result in own} >= {"float32"}
    assert not failures(own)


@needs_triton
@pytest.mark.long
def test_every_case_interpreted() -> None:
    if is_interpreter_broken():
        pytest.skip("this triton's interpreter does not work with this numpy")
    assert len(interpreted("--all")) > len(interpreted()) > 100
    assert not failures(interpreted("--all"))


def check_compiled(architecture: str, dtype: str, *head_dims: int) -> None:
    kernels = run_module(
        "common.testing.kernels.triton_compile", architecture, dtype, *map(str, head_dims)
    )
    assert {kernel["kernel"] for kernel in kernels} >= KERNELS
    assert all(kernel["shared"] <= kernel["allowed"] for kernel in kernels)
    if architecture.startswith("H"):  # no registers are spilled; elsewhere, few
        assert all(kernel["stack"] == 0 for kernel in kernels)
    products = [kernel for kernel in kernels if kernel["kernel"] == "experts_kernel"]
    aligned = [kernel for kernel in products if kernel["constants"]["SIZE"] in (1024, 512)]
    assert len(aligned) == 6  # three tiles, two products
    assert all(kernel["num_async_copies"] > 0 for kernel in aligned)
    attentions = [kernel for kernel in kernels if kernel["kernel"] == "attention_kernel"]
    # Keys and values of the next tiles are on their way while a tile is computed.
    assert all(kernel["num_async_copies"] > 0 for kernel in attentions)
    is_hopper = architecture.startswith("H") and dtype != "float32"
    for kernel in attentions:
        if not kernel["constants"]["DECODE"]:
            assert (kernel["num_warpgroup_products"] > 0) == is_hopper
    for kernel in aligned:
        is_large = kernel["constants"]["ROWS"] > 16
        assert (kernel["num_warpgroup_products"] > 0) == (is_hopper and is_large)


@needs_triton
@pytest.mark.parametrize(
    "architecture, dtype, head_dim", [("H100, H200", "bfloat16", 128), ("RTX 4090", "float32", 256)]
)
def test_compiled(architecture: str, dtype: str, head_dim: int) -> None:
    check_compiled(architecture, dtype, head_dim)


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("architecture", ["A100", "RTX 4090", "H100, H200"])
def test_all_compiled(architecture: str, dtype: str) -> None:
    check_compiled(architecture, dtype)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    from common.kernels.triton.ops import TritonOps

    assert not failures(check_all(TritonOps(), "cuda", [dtype]))


# How attention is launched.


@needs_triton
@given(st.integers(1, 200_000), st.integers(1, 5000), st.integers(1, 128))
def test_splits(max_seq_len: int, num_programs: int, rows_each: int) -> None:
    from common.kernels.triton import attention

    num_rows = num_programs * rows_each
    splits = attention.num_splits(max_seq_len, num_programs, num_rows)
    needed = math.ceil(max_seq_len / attention.MIN_SPLIT)

    def is_allowed(splits: int) -> bool:
        return (
            splits <= attention.MAX_SPLITS
            and splits * num_programs <= attention.MAX_PROGRAMS
            and splits * num_rows <= attention.MAX_PARTS
        )

    assert splits.bit_count() == 1
    assert splits == 1 or (is_allowed(splits) and splits < 2 * needed)
    assert splits >= needed or not is_allowed(2 * splits)  # as many as are of use


@needs_triton
def test_splits_of_known_batches() -> None:
    from common.kernels.triton.attention import num_splits

    assert num_splits(200, 8, 16) == 1  # too short
    assert num_splits(4096, 8, 16) == 16  # 256 tokens a program
    assert num_splits(4096, 64 * 8, 64 * 16) == 16  # whatever the batch
    assert num_splits(32768, 64 * 8, 64 * 16) == 32  # but not without bound
    assert num_splits(4096, 256 * 8, 256 * 16) == 8
    assert num_splits(4096, 256 * 8, 256 * 5 * 16) == 2  # drafts need more memory
    assert num_splits(4096, 1 << 15, 1 << 16) == 1


@needs_triton
@given(st.integers(1, 600), st.none() | st.integers(0, 20), st.integers(1, 128))
def test_few_queries(max_query_len: int, max_decode_query_len: int | None, group: int) -> None:
    from common.kernels.triton.attention import few_queries

    few = few_queries(max_query_len, max_decode_query_len, group)
    assert 0 <= few <= max_query_len
    assert few <= 1 or few * group <= 64
    if max_decode_query_len is None:
        assert few >= 1
    else:
        assert few <= max_decode_query_len
        assert few == min(max_query_len, max_decode_query_len) or (few + 1) * group > 64


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("kibibytes", [48, 64, 99, 163, 227])
def test_tiles_fit(kibibytes: int, head_dim: int, dtype: torch.dtype) -> None:
    from common.kernels.triton.attention import Device, shared_bytes, tile_for

    device = Device(kibibytes << 10, kibibytes == 227)
    for is_decode, rows in ((True, 1), (True, 60), (False, 4), (False, 71)):
        tile = tile_for(is_decode, rows, head_dim, dtype, device)
        assert tile.rows >= rows and tile.num_stages >= 1
        if tile.num_stages > 1:
            assert shared_bytes(tile, head_dim, dtype, device) <= device.shared_memory


# The cases themselves: right implementations pass, wrong ones do not.


@pytest.mark.parametrize("ops", [ReferenceOps(), CpuOps(2)], ids=["reference", "cpu"])
def test_cases_pass(ops: Ops) -> None:
    results = check_all(ops, "cpu", [torch.float32])
    assert {result.op for result in results} == set(OPERATIONS)
    assert not failures(results)


class Wrong(ReferenceOps):
    """The reference with one thing wrong at a time."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = super().rms_norm(x, weight, eps * (3 if self.fault == "eps" else 1))
        return out if self.fault != "last column" else out.index_fill(1, tensor_of(-1), 0)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        if self.fault == "residual kept":
            residual = residual.clone()
        return super().add_rms_norm(x, residual, weight, eps)

    def rotary_and_store(self, qkv, cos_sin, positions, kv_cache, layer, slot_mapping, *rest, eps):
        if self.fault == "positions":
            positions = positions.roll(1)
        if self.fault == "slots below 0":
            slot_mapping = slot_mapping.clamp(min=0)
        arguments = (qkv, cos_sin, positions, kv_cache, layer, slot_mapping)
        return super().rotary_and_store(*arguments, *rest, eps=eps)

    def attend(self, query, keys, values, scale, sliding_window):
        if self.fault == "window" and sliding_window is not None:
            sliding_window += 1
        if self.fault == "first token" and len(keys) > len(query):
            keys, values = keys[1:], values[1:]
        if self.fault == "groups":
            query = query.flip(1)
        return super().attend(query, keys, values, scale, sliding_window)

    def experts(self, x, expert_ids, weights, prepared):
        if self.fault == "gate and up":
            prepared = (prepared[0].roll(prepared[0].shape[1] // 2, dims=1), prepared[1])
        if self.fault == "weights":
            weights = weights / weights.sum(dim=1, keepdim=True)
        if self.fault == "absent experts":
            expert_ids = expert_ids.clamp(min=0)
        if self.fault == "expert's number":
            expert_ids = torch.where(expert_ids > 0, expert_ids - 1, expert_ids)
        return super().experts(x, expert_ids, weights, prepared)

    def replace_expert(self, prepared, index, gate_up, down):
        if self.fault == "all replaced":
            index = slice(None)
        if self.fault != "none replaced":
            super().replace_expert(prepared, index, gate_up, down)

    def sample(self, logits, temperature, top_k, top_p, min_p, seeds, positions, choices=None):
        if self.fault == "seeds":
            seeds = seeds & 0xFFFFFFFF
        if self.fault == "top_k":
            top_k = torch.where(top_k > 0, top_k + 1, top_k)
        if self.fault == "top_p":
            top_p = torch.where(top_p < 1, (top_p + 0.1).clamp(max=1), top_p)
        if self.fault == "min_p":
            min_p = min_p * 0.5
        if self.fault == "choices":
            choices = None
        return super().sample(logits, temperature, top_k, top_p, min_p, seeds, positions, choices)


def tensor_of(value: int) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(
    "op, fault",
    [
        ("rms_norm", "eps"),
        ("rms_norm", "last column"),
        ("add_rms_norm", "residual kept"),
        ("rotary_and_store", "positions"),
        ("rotary_and_store", "slots below 0"),
        ("attention", "window"),
        ("attention", "first token"),
        ("attention", "groups"),
        ("experts", "gate and up"),
        ("experts", "weights"),
        ("experts", "absent experts"),
        ("experts", "expert's number"),
        ("experts", "all replaced"),
        ("experts", "none replaced"),
        ("sample", "seeds"),
        ("sample", "top_k"),
        ("sample", "top_p"),
        ("sample", "min_p"),
        ("sample", "choices"),
    ],
)
def test_cases_find_faults(op: str, fault: str) -> None:
    results = check_all(Wrong(fault), "cpu", [torch.float32], only=op)
    assert any(result.op == op and not result.passed for result in results)


def test_an_exception_is_a_failure() -> None:
    class Raises(ReferenceOps):
        def silu_and_mul(self, gate_up: Tensor) -> Tensor:
            raise RuntimeError("no such kernel")

    results = check_all(Raises(), "cpu", [torch.float32], only="silu")
    assert results and all("no such kernel" in text for text in failures(results))
    assert len(failures(results)) == len(results)
