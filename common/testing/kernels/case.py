"""What a kernel case is made of: the target under test, its error against the reference, its result."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels import Ops
from common.kernels.reference import ReferenceOps

REFERENCE = ReferenceOps()
EPS = 1e-5  # of norms
# Of the largest value expected: some roundings of the result's format.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class CaseResult:
    """What one case found. The error is relative to the largest value expected, or a count."""

    op: str
    case: str
    dtype: str
    error: float
    tolerance: float
    message: str = ""  # of an exception

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    def __str__(self) -> str:
        found = self.message or f"error {self.error:.3g}, allowed {self.tolerance:.3g}"
        return f"{self.op}, {self.case}, {self.dtype}: {found}"


@dataclass(frozen=True)
class Target:
    """What is tested: an implementation, where, and in which number format.

    is_slow: it takes milliseconds for each program of a launch, so cases may use fewer rows.
    """

    ops: Ops
    device: torch.device
    dtype: torch.dtype
    is_slow: bool = False

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]

    def put(self, x: Tensor) -> Tensor:
        """Floating tensors in the target's format; all on its device."""
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.put(torch.randn(*shape, generator=generator))


@dataclass(frozen=True)
class Case:
    """`run` returns the error, or None where the implementation need not take the case."""

    op: str
    name: str
    run: Callable[[Target], float | None]
    tolerance: float | None = None  # None: that of the number format


def wide(x: Tensor) -> Tensor:
    """A copy on the CPU, in float64 where it is floating."""
    x = x.detach().cpu()
    return x.double() if x.is_floating_point() else x.clone()


def error_of(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """The largest difference, relative to the largest value expected, or to 1 if that is less."""
    if actual.shape != expected.shape or actual.dtype != dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    error = (wide(actual) - expected).abs().max() / expected.abs().max().clamp(min=1)
    return error.item() if error.isfinite() else math.inf
