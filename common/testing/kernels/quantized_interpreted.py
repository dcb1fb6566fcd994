"""`python -m common.testing.kernels.quantized_interpreted`: quantised products in Triton's interpreter.

A process of its own, since the variable must be set before Triton is imported. Prints a line of JSON for
each case: its operation, its name, the error and the tolerance.
"""

import json
import os
import warnings
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from common.kernels.triton import quantized_linear
from common.kernels.triton.ops import TritonOps
from common.testing.kernels.quantized_cases import (
    TOLERANCES,
    Spec,
    expert_specs,
    experts_error,
    linear_error,
    linear_specs,
    make_weight,
)


def told(op: str, name: str, error: float, tolerance: float) -> None:
    print(json.dumps({"op": op, "name": name, "error": error, "tolerance": tolerance}))


def linears(ops: TritonOps) -> None:
    for number, (spec, num_tokens) in enumerate(linear_specs()):
        dtype = (torch.float32, torch.float16)[number % 2]
        error = linear_error(ops, spec, num_tokens, dtype, bias=number % 3 > 0)
        told("linear", f"{spec.name}, {num_tokens} tokens", error, TOLERANCES[dtype])
    spec = Spec("int4", 140, 96, 32)
    with mock.patch.multiple(quantized_linear, MAX_TOKENS=20, SCRATCH_BYTES=70 * 2 * 96):
        error = linear_error(ops, spec, 21, torch.float16)
    told("unpacked", spec.name, error, TOLERANCES[torch.float16])
    other = Spec("int8", 70, 96, 32)
    error = linear_error(ops, other, 130, torch.float16)
    told("large", other.name, error, TOLERANCES[torch.float16])


def scaled(ops: TritonOps) -> None:
    """FP8 products as PyTorch has them, on a CPU too; bfloat16, which the interpreter need not multiply."""
    spec = Spec("fp8_e4m3", 80, 96, 96, torch.float32, activations="fp8")
    with (
        mock.patch.object(quantized_linear, "has_fp8", lambda device: True),
        mock.patch.object(torch, "_scaled_mm", wraps=torch._scaled_mm) as product,
    ):
        error = linear_error(ops, spec, 66, torch.bfloat16)
    assert product.call_count == 1
    told("scaled", spec.name, error, TOLERANCES[torch.bfloat16])


def rows(ops: TritonOps) -> None:
    ids = torch.tensor([0, 69, 3, 64, 63, 3])
    for spec, _ in linear_specs():
        weight = make_weight(spec)
        ids_in = ids % spec.out_features
        found = ops.embedding(ids_in, ops.prepare_weight(weight))
        difference = (found - weight.rows(ids_in).dequantize()).abs().max()
        told("embedding", spec.name, float(difference), 0.0)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    ops = TritonOps()
    linears(ops)
    scaled(ops)
    rows(ops)
    for number, specs in enumerate(expert_specs()):
        dtype = (torch.float32, torch.float16)[number % 2]
        error = experts_error(ops, specs, 9, dtype)
        told("experts", specs[0].name, error, 2 * TOLERANCES[dtype])


if __name__ == "__main__":
    main()
