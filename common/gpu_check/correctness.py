"""The kernels of a device against the reference, by the cases that the test suite runs too."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.gpu_check.items import Item, attempt

if TYPE_CHECKING:
    from common.testing.kernels.all_cases import CaseResult

KERNELS = {"cuda": "triton", "cpu": "cpu"}


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"device", "dtype", "share": (i, n)} -> an item for every n-th case, from the i-th on.

    Cases lie by operation, so that neighbours compile much the same: dealt out, each process compiles
    about as much as the others.
    """
    import torch

    from common.kernels import select_ops
    from common.testing.kernels.all_cases import all_cases, check
    from common.testing.kernels.case import Target

    kernels = KERNELS[job["device"].partition(":")[0]]
    ops = select_ops(kernels, job["device"])  # by name: "auto" would fall back to the reference
    target = Target(ops, torch.device(job["device"]), getattr(torch, job["dtype"]))
    first, every = job["share"]
    cases = list(all_cases(target))
    assert cases, "there are no cases"
    for case in cases[first::every]:
        results: list[CaseResult | None] = []

        def run(case: Any = case, results: list[Any] = results) -> dict[str, Any]:
            results.append(check(case, target))
            return judged(results[0])

        item = attempt(f"{kernels}, {job['dtype']}, {case.op}, {case.name}", run)
        if results != [None]:  # else these kernels need not take the case
            yield item


def judged(result: "CaseResult | None") -> dict[str, Any]:
    """The error and what was allowed. Raises AssertionError where it is more."""
    if result is None:
        return {}
    assert result.passed, str(result)
    return {"relative_error": result.error, "tolerance": result.tolerance}
