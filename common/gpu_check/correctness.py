"""The kernels of a device against the reference, by the cases that the test suite runs too."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.gpu_check.items import Item, attempt, failed

if TYPE_CHECKING:
    from common.testing.kernels.all_cases import CaseResult

KERNELS = {"cuda": "triton", "cpu": "cpu"}
DTYPES = {"cuda": ("float32", "bfloat16", "float16"), "cpu": ("float32",)}


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"device"} -> one item a number format, and one for each case that failed."""
    kind = job["device"].partition(":")[0]
    for dtype in DTYPES[kind]:
        results: list[CaseResult] = []

        def check(dtype: str = dtype, results: list["CaseResult"] = results) -> dict[str, Any]:
            results += run_cases(KERNELS[kind], job["device"], dtype)
            assert results, "there are no cases"
            return overview(results)

        yield attempt(f"{KERNELS[kind]}, {dtype}", check)
        for result in results:
            if not result.passed:
                yield failed(f"{KERNELS[kind]}, {result.op}, {result.case}", str(result))


def run_cases(kernels: str, device: str, dtype: str) -> list["CaseResult"]:
    import torch

    from common.kernels import select_ops
    from common.testing.kernels.all_cases import check_all

    ops = select_ops(kernels, device)  # by name: "auto" would fall back to the reference
    return check_all(ops, device, [getattr(torch, dtype)])


def overview(results: list["CaseResult"]) -> dict[str, Any]:
    """How many, which comes nearest to its tolerance or beyond, and the error of each."""
    worst = max(results, key=lambda result: (not result.passed, share(result)))
    return {
        "num_cases": len(results),
        "num_failed": sum(not result.passed for result in results),
        "worst": str(worst),
        "cases": [
            {
                "op": result.op,
                "case": result.case,
                "error": result.error if math.isfinite(result.error) else None,
                "tolerance": result.tolerance,
            }
            for result in results
        ],
    }


def share(result: "CaseResult") -> float:
    """The error as a share of what is allowed."""
    return result.error / result.tolerance if result.tolerance else result.error
