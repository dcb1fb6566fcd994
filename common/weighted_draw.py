"""Draws by inverting a sum of weights, whose rows are too long to be copied to float64."""

import torch
from torch import Tensor

CHUNK = 1024  # tokens whose weights are summed together


def draw(weights: Tensor, others: Tensor, wants_others: Tensor, uniform: Tensor) -> Tensor:
    """A token of each row by its weights; or by the others in rows that want these, if any of them
    is above 0.

    weights, others: [num_seqs, vocab] of 0 and above, not normalised. wants_others: [num_seqs, 1]
    bool. uniform: [num_seqs, 1] float64 in (0, 1). Returns [num_seqs, 1] int64.

    Weights are summed in float64, but a chunk at a time, and only the chunk that holds the token is
    summed up in it: whole rows in that format would take as much memory again as both.
    """
    vocab = weights.shape[1]
    width = min(CHUNK, vocab)
    sums, other_sums = chunk_sums(weights, width), chunk_sums(others, width)
    is_other = wants_others & (other_sums.sum(dim=1, keepdim=True) > 0)
    sums = torch.where(is_other, other_sums, sums)
    ends = sums.cumsum(dim=1)
    target = uniform * ends[:, -1:]
    chunk = first_above(ends, target, sums)
    begin = ends.gather(1, chunk) - sums.gather(1, chunk)
    token_ids = chunk * width + torch.arange(width, device=weights.device)
    inside = token_ids < vocab
    token_ids = token_ids.clamp(max=vocab - 1)
    own = torch.where(is_other, others.gather(1, token_ids), weights.gather(1, token_ids))
    own = own.double() * inside
    place = first_above(begin + own.cumsum(dim=1), target, own)
    return token_ids.gather(1, place)


def chunk_sums(weights: Tensor, width: int) -> Tensor:
    """[num_seqs, vocab] -> [num_seqs, chunks] float64; the last chunk may be shorter, or empty."""
    whole = weights.shape[1] // width * width
    sums = weights[:, :whole].unflatten(1, (-1, width)).sum(dim=2, dtype=torch.float64)
    return torch.cat([sums, weights[:, whole:].sum(dim=1, keepdim=True, dtype=torch.float64)], 1)


def first_above(ends: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The first place of each row whose end is above the target: [num_seqs, 1].

    None of weight 0: sums in parallel need not rise everywhere. The last that has any, if rounding
    leaves none above. ends, weights: [num_seqs, places]; target: [num_seqs, 1].
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    has_weight = weights > 0
    first = torch.where(has_weight & (ends > target), place, ends.shape[1]).amin(1, keepdim=True)
    last = torch.where(has_weight, place, 0).amax(1, keepdim=True)
    return torch.minimum(first, last)
