"""The kernels of a device against the reference, by the cases that the test suite runs too."""

from collections.abc import Iterator
from typing import Any

from common.gpu_check.items import Item, attempt

KERNELS = {"cuda": "triton", "cpu": "cpu"}
DTYPES = {"cuda": ("float32", "bfloat16", "float16"), "cpu": ("float32",)}


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"device"} -> one item a number format."""
    kind = job["device"].partition(":")[0]
    kernels = KERNELS[kind]
    for name in DTYPES[kind]:
        yield attempt(f"{kernels}, {name}", lambda name=name: check(kernels, job["device"], name))


def check(kernels: str, device: str, dtype: str) -> dict[str, Any]:
    import torch

    from common.kernels import select_ops
    from common.testing.kernel_cases import check_all

    ops = select_ops(kernels, device)  # by name: "auto" would fall back to the reference
    found = check_all(ops, device, [getattr(torch, dtype)])
    return {"found": found}
