"""`bench kernels`: its cases run on every implementation that takes them, and its numbers add up."""

from dataclasses import replace

import pytest
import torch

from common.bench.kernels.cases import SHAPES, Maker, Shape
from common.bench.kernels.run import cpu_samples, measure, numbered, row
from common.kernels.cpu.ops import CpuOps
from common.kernels.reference import ReferenceOps

TINY = Shape(
    "tiny", 32, 48, 80, 4, 2, 16, (1, 3), ((2, 1, 40), (1, 9, 20), (2, 5, 7)), (2,), (1, 3)
)


def test_every_case_runs() -> None:
    cases = Maker(TINY, "cpu", torch.float32).all_cases()
    ops = {
        "linear",
        "quantized linear",
        "attention",
        "add_rms_norm",
        "rotary_and_store",
        "silu_and_mul",
        "sample",
    }
    assert {case.op for case in cases} == ops
    implementations = [ReferenceOps(), CpuOps(1)]
    with torch.inference_mode():
        for case in cases:
            first, second = (case.make(ops)(3) for ops in implementations)
            assert first.shape == second.shape
    assert len({(case.op, case.shape) for case in cases}) == len(cases)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_are_whole(shape: Shape) -> None:
    assert shape.num_heads % shape.num_kv_heads == 0
    assert all(queries <= tokens for _, queries, tokens in shape.attentions)


def test_a_case_that_is_not_taken_is_left_out() -> None:
    class Picky(ReferenceOps):
        default_block_size = 32

        def check_kv_cache(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
            assert block_size == 32
            raise ValueError("head_dim")

    case = Maker(TINY, "cpu", torch.float32).attention(2, 1, 40)
    found = measure(case, [ReferenceOps(), Picky()], 1, cpu_samples)
    assert found[0] > 0 and found[1] is None


def test_runs_are_numbered() -> None:
    runs = []
    call = numbered(runs.append)
    call()
    call()
    assert runs == [0, 1]


def test_rates() -> None:
    case = replace(Maker(TINY, "cpu", torch.float32).linear(2, 10, 20), num_bytes=3e9)
    assert case.num_flops == 2 * 2 * 10 * 20
    found = row(replace(case, num_flops=5e9), ReferenceOps(), 0.5, read_gbps=12, peak=40e9)
    assert (found["us"], found["gbps"], found["gflops"]) == (0.5e6, 6, 10)
    assert (found["mbu"], found["mfu"]) == (50, 25)
    assert row(replace(case, num_flops=0), ReferenceOps(), 0.5, 12, 40e9)["mfu"] is None


def test_attention_counts_what_is_seen() -> None:
    maker = Maker(TINY, "cpu", torch.float32)
    # 3 queries at the end of 5 tokens see 3, 4 and 5 of them.
    assert maker.attention(2, 3, 5).num_flops == 4 * 2 * (3 + 4 + 5) * 4 * 16
    assert maker.attention(1, 1, 5).num_bytes == 4 * (5 * 2 * 2 * 16 + 2 * 4 * 16)
