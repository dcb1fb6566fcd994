"""The GPU's quantised products: interpreted on a CPU, compiled for GPUs that are not there, run where
one is. Triton is imported by tests and not by this file, as in test_triton_launches.py."""

import functools
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.kernels.quantized import QuantizedWeight
from common.kernels.quantized_support import emulation
from common.kernels.reference import ReferenceOps
from common.kernels.triton import quantized_weight
from common.testing.kernels.quantized_cases import (
    FORMATS,
    TOLERANCES,
    Spec,
    expert_specs,
    experts_error,
    linear_error,
    linear_specs,
    make_weight,
)
from tests.test_triton_kernels import is_interpreter_broken, run_module

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# Qwen3-8B: qkv, o, gate_up, down.
LARGE_SHAPES = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
# Bits a weight of 4096 inputs, codes and scales.
BITS = {
    "int8": 8 + 32 / 4096,
    "int8-g32": 8.5,
    "int4-g32": 4.5,
    "int4-g128": 4.125,
    "int4-g128 with minimums": 4.25,
    "fp8": 8 + 32 / 4096,
    "fp8-block": 8.25,
    "mxfp8": 8.25,
    "mxfp4": 4.25,
    "nvfp4": 4.5 + 32 / 4096,
    "nf4": 4.5,
}


def test_an_expert_of_another_format_does_not_overwrite_one() -> None:
    weight = make_weight(replace(FORMATS["int4-g32"], out_features=24, in_features=64))
    packed = quantized_weight.stack([weight, weight])
    others = {
        "kind": replace(weight, kind="uint4"),
        "minimums": replace(weight, minimums=weight.scales.half()),
        "scales": replace(weight, scales=weight.scales.bfloat16()),
        "activations": replace(weight, activations="int8"),
        "row_scales": replace(weight, row_scales=torch.ones(weight.shape[0])),
        "order": replace(weight, order=torch.arange(weight.shape[1])),
        "rows": weight.rows(slice(1, None)),
    }
    before = packed.codes.clone(), packed.scales.clone()
    for name, other in others.items():
        with pytest.raises(ValueError, match=r"expert: .* is of another format"):
            quantized_weight.overwrite(packed, 0, other)
        assert torch.equal(packed.codes, before[0]) and torch.equal(packed.scales, before[1]), name
    new = replace(weight, scales=weight.scales * 2)
    quantized_weight.overwrite(packed, 1, new)
    found = quantized_weight.unpack(quantized_weight.element(packed, 1))
    assert torch.equal(found.dequantize(), new.dequantize())


def format_weight(name: str, outs: int, ins: int) -> QuantizedWeight:
    """Of a format, its tensors empty."""
    spec = replace(FORMATS[name], out_features=1, in_features=ins)
    weight = make_weight(replace(spec, group=spec.group or ins))
    tensors = {
        key: torch.empty((outs, *x.shape[1:]), dtype=x.dtype) for key, x in weight.tensors.items()
    }
    return replace(weight, **tensors)


def prepared_weight(name: str, outs: int, ins: int) -> tuple[Any, None]:
    """As `prepare_weight` makes it of a format, without memory."""
    from common.kernels.triton.quantized_weight import PACK_ROWS, TENSORS, pack

    packed = pack(format_weight(name, PACK_ROWS, ins))
    found = {}
    for key in TENSORS:
        if (tensor := getattr(packed, key)) is not None:
            shape = list(tensor.shape)
            place = 0 if key == "codes" else -1
            shape[place] *= outs // PACK_ROWS
            found[key] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return replace(packed, out_features=outs, compiled_for=set(), **found), None


# Against the reference.


@functools.cache
def interpreted() -> list[dict]:
    return run_module("common.testing.kernels.quantized_interpreted")


@needs_triton
@pytest.mark.parametrize("op", ["linear", "unpacked", "large", "scaled", "embedding", "experts"])
def test_interpreted(op: str) -> None:
    if is_interpreter_broken():
        pytest.skip("this triton's interpreter does not work with this numpy")
    own = [result for result in interpreted() if result["op"] == op]
    assert own and not [result for result in own if not result["error"] <= result["tolerance"]]


def test_the_reference_passes() -> None:
    for spec, num_tokens in linear_specs():
        error = linear_error(ReferenceOps(), spec, num_tokens, torch.float32)
        assert error < TOLERANCES[torch.float32], spec
    for specs in expert_specs():
        assert experts_error(ReferenceOps(), specs, 9, torch.float32) < 1e-5


class Wrong(ReferenceOps):
    """The reference with one thing wrong at a time."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def prepare_weight(self, weight: QuantizedWeight, bias: Tensor | None = None) -> tuple:
        if self.fault == "nibbles":
            codes = weight.codes
            weight = replace(weight, codes=codes << 4 | codes >> 4)
        if self.fault == "groups":
            weight = replace(weight, scales=weight.scales.roll(1, 1))
        if self.fault == "minimums":
            weight = replace(weight, minimums=None)
        if self.fault == "order":
            weight = replace(weight, order=None)
        if self.fault == "activations":
            weight = replace(weight, activations=None)
        return weight, None if self.fault == "bias" else bias


@pytest.mark.parametrize("fault", ["nibbles", "groups", "minimums", "order", "activations", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cases_find_faults(fault: str, dtype: torch.dtype) -> None:
    spec = Spec("uint4", 70, 160, 32, torch.float16, torch.float32, has_order=True)
    spec = replace(spec, activations="int8")
    assert linear_error(ReferenceOps(), spec, 3, torch.float32) < TOLERANCES[torch.float32]
    assert linear_error(Wrong(fault), spec, 3, dtype) > 2 * TOLERANCES[dtype]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    from common.kernels.triton.ops import TritonOps

    ops = TritonOps()
    for spec, num_tokens in linear_specs():
        error = linear_error(ops, spec, num_tokens, dtype, "cuda")
        assert error < TOLERANCES[dtype], (spec, error)
    for specs in expert_specs():
        assert experts_error(ops, specs, 9, dtype, "cuda") < 2 * TOLERANCES[dtype], specs


# What lies in memory.


@needs_triton
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_packing_loses_nothing(data: st.DataObject) -> None:
    from common.kernels.triton.quantized_weight import can_pack, pack, unpack

    spec, _ = data.draw(st.sampled_from(list(linear_specs())))
    count = data.draw(st.integers(1, 5))
    outs, ins = data.draw(st.integers(1, 140)), spec.group * count
    weight = make_weight(replace(spec, out_features=outs, in_features=ins))
    if can_pack(weight):
        found = unpack(pack(weight))
        assert found.group == weight.group and found.activations == weight.activations
        for name, tensor in weight.tensors.items():
            own = getattr(found, name)
            assert own.dtype is tensor.dtype and torch.equal(own.double(), tensor.double()), name


@needs_triton
@pytest.mark.parametrize("name", BITS)
def test_counted_bytes(name: str) -> None:
    from common.kernels.triton.quantized_weight import pack

    for outs, ins in ((128, 4096), (64, 12288)):
        weight = format_weight(name, outs, ins)
        packed = pack(weight)
        assert packed.nbytes == weight.nbytes
        assert packed.nbytes * 8 / (outs * ins) == pytest.approx(BITS[name], abs=0.006)


# How products are launched.


@needs_triton
@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(list(FORMATS)),
    st.sampled_from(LARGE_SHAPES),
    st.integers(0, 3000),
    st.booleans(),
)
def test_nothing_is_compiled_after_the_first_inputs(
    name: str, shape: tuple[int, int], num_tokens: int, is_float32: bool
) -> None:
    from common.kernels.triton import quantized_linear
    from common.kernels.triton.ops import TritonOps
    from common.testing.kernels.launches import recorded

    ops, dtype = TritonOps(), torch.float32 if is_float32 else torch.bfloat16
    prepared = prepared_weight(name, *shape)
    with recorded() as known, mock.patch.object(quantized_linear, "COMPILED", set()):
        ops.linear(torch.empty(1, shape[1], dtype=dtype, device="meta"), prepared)
    with recorded() as launches:
        out = ops.linear(torch.empty(num_tokens, shape[1], dtype=dtype, device="meta"), prepared)
    assert out.shape == (num_tokens, shape[0]) and out.dtype is dtype
    assert {launch.variant for launch in launches} <= {launch.variant for launch in known}


@needs_triton
@pytest.mark.parametrize("name", FORMATS)
def test_small_batches_fill_the_gpu(name: str) -> None:
    """An H200 has 132 multiprocessors; the depth is covered, and by no program in vain."""
    from common.kernels.triton import quantized_linear
    from common.kernels.triton.ops import TritonOps
    from common.testing.kernels.launches import recorded

    ops = TritonOps()
    for shape in LARGE_SHAPES:
        prepared = prepared_weight(name, *shape)
        for num_tokens in (1, 16, 64):
            x = torch.empty(num_tokens, shape[1], dtype=torch.bfloat16, device="meta")
            with recorded() as launches, mock.patch.object(quantized_linear, "compile_all"):
                ops.linear(x, prepared)
            [product] = [launch for launch in launches if launch.kernel == "product_kernel"]
            rows, tokens, splits = product.grid
            num_steps, steps_each = product.numbers[-2:]
            assert rows * tokens * splits >= (132 if num_tokens <= 16 else 64), (shape, num_tokens)
            assert (splits - 1) * steps_each < num_steps <= splits * steps_each


def products(*arguments: str) -> list[dict]:
    return run_module("common.testing.kernels.quantized_compile", *arguments)


def check_compiled(found: list[dict], architecture: str, most_stack: int) -> None:
    for kernel in found:
        assert kernel["shared"] <= kernel["allowed"], kernel
        assert kernel["stack"] <= most_stack, kernel
        if architecture.startswith(
            "H"
        ):  # codes go from shared memory into registers and are multiplied
            assert kernel["num_warpgroup_products"] > 0, kernel


@needs_triton
def test_compiled() -> None:
    """One format's tile of small batches; the rest is compiled in the long tests."""
    [kernel] = products("H100, H200", "bfloat16", "1", "int4-g32")
    check_compiled([kernel], "H100, H200", 0)
    assert kernel["num_async_copies"] > 0 and kernel["registers"] <= 128


@needs_triton
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("architecture", ["A100", "RTX 4090", "H100, H200", "B200"])
def test_all_compiled(architecture: str, dtype: str) -> None:
    found = products(architecture, dtype, "0")
    assert {kernel["format"] for kernel in found} == set(FORMATS)
    check_compiled(found, architecture, 256)
    few = [kernel for kernel in found if kernel["constants"]["TOKENS"] == 16]
    check_compiled(few, architecture, 0 if dtype != "float32" else 256)


# What is emulated.


@pytest.mark.parametrize(
    "capability, kind, activations, is_emulated",
    [
        ((8, 0), "int8", "int8", False),
        ((8, 0), "fp8_e4m3", None, False),  # only the weight is FP8: unpacked on every GPU
        ((8, 0), "fp8_e4m3", "fp8", True),
        ((8, 9), "fp8_e4m3", "fp8", False),
        ((9, 0), "fp4_e2m1", None, True),
        ((9, 0), "nf4", None, True),
        ((9, 0), "int4", None, False),
        ((9, 0), "int4", "int8", False),
        (None, "int8", "int8", False),
        (None, "int4", None, False),
        (None, "fp8_e4m3", None, True),
        (None, "nf4", None, True),
    ],
)
def test_emulation(
    capability: tuple[int, int] | None, kind: str, activations: str | None, is_emulated: bool
) -> None:
    with mock.patch("torch.cuda.get_device_capability", lambda device: capability):
        found = emulation(kind, activations, "cpu" if capability is None else "cuda")
    assert (found is not None) == is_emulated
    if capability is None and is_emulated:
        assert found == "computed in float32 after unpacking"
