"""The cases that every implementation of `common.kernels.Ops` must pass, on any device.

Inputs are drawn on the CPU and rounded to the number format; what is expected is the reference's
answer to them in float64. No test framework: `check_all` serves the test suite, Triton's interpreter
in a process of its own, and `common.gpu_check` alike.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from common.kernels import Ops
from common.testing.kernels.attention_cases import attention_cases
from common.testing.kernels.case import Case, CaseResult, Target
from common.testing.kernels.expert_cases import expert_cases
from common.testing.kernels.gpu_cases import gpu_cases
from common.testing.kernels.sampler_cases import sampler_cases
from common.testing.kernels.small_cases import small_cases

__all__ = ["CaseResult", "check_all"]


def check_all(
    ops: Ops,
    device: torch.device | str,
    dtypes: Sequence[torch.dtype],
    only: str = "",
    is_left_out: Callable[[Case, torch.dtype], bool] | None = None,
) -> list[CaseResult]:
    """Run every case in every number format. An exception is a failure with its text.

    only: run only the cases whose operation and name contain this text. is_left_out: run none for
    which this is true, and the others as for a slow target.
    """
    results = []
    for dtype in dtypes:
        target = Target(ops, torch.device(device), dtype, is_left_out is not None)
        for case in all_cases(target):
            if is_left_out is not None and is_left_out(case, dtype):
                continue
            if only in f"{case.op}, {case.name}":
                result = check(case, target)
                results += [] if result is None else [result]
    return results


def check(case: Case, target: Target) -> CaseResult | None:
    message = ""
    try:
        with torch.inference_mode():
            error = case.run(target)
    except Exception as exception:
        error, message = math.inf, f"{type(exception).__name__}: {exception}"[:500]
    if error is None:
        return None
    tolerance = target.tolerance if case.tolerance is None else case.tolerance
    dtype = str(target.dtype).removeprefix("torch.")
    return CaseResult(case.op, case.name, dtype, error, tolerance, message)


def all_cases(target: Target) -> Iterator[Case]:
    yield from small_cases()
    yield from attention_cases(target.dtype)
    yield from expert_cases(target.dtype)
    if target.dtype == torch.float32:  # logits are float32, or become it first of all
        yield from sampler_cases()
    if target.device.type == "cuda" and target.ops.name != "reference":
        yield from gpu_cases()
