"""GPTQ: round a weight so that a layer's outputs change least, not the weight itself.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323). A layer's squared output error is tr(D H D^T), where D is the error of the weight
and H = X^T X of the layer's inputs. Columns are rounded one after another, and what each loses is made
good, as far as H allows, by the columns that are not rounded yet.
"""

import torch
from torch import Tensor

BLOCK = 128  # columns after which the rest is brought up to date
DAMPING = 0.01  # of H's mean diagonal, added to it: inputs that were not seen still count
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the largest weight, tried as a group's range


def output_error(error: Tensor, hessian: Tensor) -> float:
    """The sum of squared differences in the outputs: tr(D H D^T). error: [out, in]."""
    return ((error @ hessian) * error).sum().item()


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper Cholesky factor U of H's inverse, [in, in] float32: row i of it says what column i's
    error costs the columns after it. Inputs that are always 0 are let alone. Raises ValueError."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()  # a view
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True).float()
    except torch.linalg.LinAlgError as error:
        raise ValueError("what it is given has an H without an inverse") from error


def fit_scales(weight: Tensor, importance: Tensor, group: int, limits: tuple[int, int]) -> Tensor:
    """A scale for each row and group, [out, in / group] float16 values: of some ranges the one whose
    rounding loses least, each column's square weighted by its importance (H's diagonal, [in]).

    limits: of the codes, such as -8 and 7. The scale's sign lets the largest weight, positive or
    negative, have the code that is further from 0.
    """
    columns = weight.unflatten(1, (-1, group))
    weights = importance.clamp(min=1e-12).unflatten(0, (-1, group))
    place = columns.abs().argmax(dim=2, keepdim=True)
    largest = columns.gather(2, place).squeeze(2)  # with its sign
    low, high = limits
    best = scales = None
    for limit in (low, high):
        for shrink in SHRINKS:
            tried = (largest * shrink / limit).half().float()
            rounded = round_to(columns, tried.unsqueeze(2), limits) * tried.unsqueeze(2)
            loss = ((rounded - columns).square() * weights).sum(dim=2)
            if best is None:
                best, scales = loss, tried
            scales = torch.where(loss < best, tried, scales)
            best = torch.minimum(loss, best)
    return scales


def round_to(values: Tensor, scales: Tensor, limits: tuple[int, int]) -> Tensor:
    """The codes nearest to values / scales; 0 where a scale is 0."""
    codes = values * torch.where(scales == 0, 0.0, 1.0 / scales)
    return codes.round().clamp(*limits)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scales: Tensor,
    group: int,
    limits: tuple[int, int],
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Tensor:
    """Codes of a weight [out, in] for scales [out, in / group], float32.

    Columns are taken in the order of how strong their inputs are (`act-order`): those that matter most
    are rounded while there are many left to make good for them. Scales are fixed before, so that
    groups stay those of neighbours, and no kernel needs to know of the order.
    """
    order = hessian.diagonal().argsort(descending=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    # [in, out] from here: a column of the weight is then a row, which lies in one piece.
    rest = weight.T[order].contiguous()  # brought up to date with the errors so far
    own_scales = scales.T.repeat_interleave(group, dim=0)[order]
    codes = torch.empty_like(rest)
    for begin in range(0, len(rest), block):
        end = min(begin + block, len(rest))
        errors = torch.empty_like(rest[begin:end])
        for i in range(begin, end):
            codes[i] = round_to(rest[i], own_scales[i], limits)
            errors[i - begin] = (rest[i] - codes[i] * own_scales[i]) / factor[i, i]
            rest[i:end].addr_(factor[i, i:end], errors[i - begin], alpha=-1)
        rest[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return codes[order.argsort()].T.contiguous()
