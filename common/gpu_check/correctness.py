"""The kernels of a device against the reference, by the cases that the test suite runs too."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common.gpu_check.engines import threads_of
from common.gpu_check.items import Check

if TYPE_CHECKING:
    from common.testing.kernels.all_cases import CaseResult

KERNELS = {"cuda": "triton", "cpu": "cpu"}


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"device", "dtype", "share": (i, n)} -> every n-th case, from the i-th on.

    Cases lie by operation, so that neighbours compile much the same: dealt out, each process
    compiles about as much as the others.
    """
    import torch

    from common.kernels import select_ops
    from common.testing.kernels.all_cases import all_cases, check
    from common.testing.kernels.case import Target

    kernels = KERNELS[job["device"].partition(":")[0]]
    # By name: "auto" would fall back to the reference.
    ops = select_ops(kernels, job["device"], threads_of(job))
    target = Target(ops, torch.device(job["device"]), getattr(torch, job["dtype"]))
    first, every = job["share"]
    # The reference runs on the CPU, and so do the other processes.
    torch.set_num_threads(1)
    for case in list(all_cases(target))[first::every]:
        name = f"{kernels}, {job['dtype']}, {case.op}, {case.name}"
        yield name, lambda case=case: judged(check(case, target))


def judged(result: "CaseResult | None") -> dict[str, Any]:
    """The error and what was allowed. Raises AssertionError where it is more."""
    if result is None:
        return {"note": "these kernels need not take the case"}
    assert result.passed, str(result)
    return {"relative_error": result.error, "tolerance": result.tolerance}
