"""AWQ and SmoothQuant: scale the inputs of a product down and its weight's columns up, or the reverse.

(x / s) (W s)^T is x W^T for every s, but not when W or x is rounded. AWQ (Lin et al., "AWQ:
Activation-aware Weight Quantization", arXiv 2306.00978) makes the columns that see large inputs larger,
so that they lose less. SmoothQuant (Xiao et al., arXiv 2211.10438) makes the outliers of the inputs
smaller, so that inputs can be rounded to INT8. Neither costs a step anything: 1 / s goes into whatever
made the inputs, a norm's weights or the rows of the projection before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gptq import output_error

RATIOS = 20  # exponents that AWQ tries, from 0 (nothing is scaled) to 0.95
SMOOTHING = 0.5  # SmoothQuant's exponent: how much of the difficulty goes to the weights


@dataclass
class Inputs:
    """What is kept of the inputs that a product has seen, in float32."""

    hessian: Tensor  # [in, in]: X^T X
    mean: Tensor  # [in], of magnitudes
    largest: Tensor  # [in], of magnitudes
    num_tokens: int = 0

    @classmethod
    def of(cls, in_features: int) -> "Inputs":
        zeros = torch.zeros(in_features)
        return cls(torch.zeros(in_features, in_features), zeros, zeros.clone())

    def add(self, x: Tensor) -> None:
        """x: [num_tokens, in]."""
        magnitude = x.float().abs()
        self.hessian.addmm_(x.float().T, x.float())
        self.num_tokens += len(x)
        self.mean += (magnitude.mean(dim=0) - self.mean) * len(x) / self.num_tokens
        self.largest = torch.maximum(self.largest, magnitude.amax(dim=0))

    def divided(self, scales: Tensor) -> "Inputs":
        """Of x / scales, [in]."""
        hessian = self.hessian / torch.outer(scales, scales)
        return Inputs(hessian, self.mean / scales, self.largest / scales, self.num_tokens)


def normalized(scales: Tensor) -> Tensor:
    """Around 1, and never 0."""
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def awq_scales(
    weight: Tensor,
    inputs: Inputs,
    rounded: Callable[[Tensor], Tensor],
    shared: tuple[int, int, int] | None = None,
) -> Tensor:
    """s = mean|x|^a, [in], with the exponent a whose rounding changes the outputs least.

    weight: [out, in], of all products that have these inputs. rounded: what a weight is after it has
    been quantised. shared: see `share`.
    """
    mean = share(inputs.mean, shared)
    best, chosen = None, torch.ones_like(mean)
    for step in range(RATIOS):
        scales = normalized(mean.pow(step / RATIOS))
        error = output_error(rounded(weight * scales) / scales - weight, inputs.hessian)
        if best is None or error < best:
            best, chosen = error, scales
    return chosen


def smooth_scales(weight: Tensor, inputs: Inputs, exponent: float = SMOOTHING) -> Tensor:
    """s = max|x|^a / max|w|^(1 - a), [in]. Inputs that were always 0 are let alone."""
    by_input = inputs.largest.pow(exponent)
    scales = by_input / weight.abs().amax(dim=0).clamp(min=1e-5).pow(1 - exponent)
    return torch.where(inputs.largest == 0, 1.0, scales.clamp(min=1e-4))


def share(values: Tensor, size: tuple[int, int, int] | None) -> Tensor:
    """[heads * head_dim] with the mean over query heads that read the same values.

    size: (KV heads, query heads to each, head_dim): a row of `v_proj` is the input of as many columns
    of `o_proj` as there are query heads to a KV head, so these have one scale. None: each has its own.
    """
    if size is None:
        return values
    groups = values.view(size)
    return groups.mean(dim=1, keepdim=True).expand(size).flatten()
