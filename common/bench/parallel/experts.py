"""How a batch falls on a mixture of experts: how many it touches, and how uneven that is.

A step reads each expert that some token has chosen, once. Few tokens touch few experts, so a small
batch reads a small part of the model; a large batch reads all. The ranks of a layer wait for the one
with most tokens, so what counts is the busiest rank's load, not the mean.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch


def popularity(num_experts: int, top_k: int, skew: float = 0.0) -> np.ndarray:
    """[num_experts]: how probable it is that a token chooses each expert; they add up to top_k.

    skew: 0 is even; else the i-th is wanted in proportion to i ** -skew (Zipf), at most surely.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k {top_k} of {num_experts} experts")
    wanted = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    chosen = np.zeros(num_experts)
    sure = 0  # the first so many are chosen by every token
    while True:
        chosen[sure:] = wanted[sure:] * (top_k - sure) / wanted[sure:].sum()
        if sure == num_experts or chosen[sure] < 1:
            return chosen
        chosen[sure] = 1.0
        sure += 1


def distinct_experts(chances: Sequence[float] | np.ndarray, num_tokens: float) -> float:
    """How many of these experts at least one of the tokens chooses, on average."""
    return float(np.sum(1 - (1 - np.asarray(chances, dtype=np.float64)) ** num_tokens))


def ranks_reached(num_experts: int, top_k: int, size: int) -> float:
    """On how many ranks a token's experts lie, on average, if all are equally probable and each rank
    has as many: so often a token is sent, if it is sent once a rank."""
    own = num_experts / size
    none = math.prod((num_experts - own - i) / (num_experts - i) for i in range(top_k))
    return size * (1 - max(0.0, none))


def busiest_rank(chances: Sequence[float] | np.ndarray, size: int, num_tokens: float) -> float:
    """The load of the rank with most (token, expert) pairs, to the mean of all ranks; at least 1.

    Experts lie on the ranks in order. Two things add up: that some experts are wanted more, and
    chance, which weighs most in small batches. A rank's load is taken for normally distributed and
    independent of the others'; the mean of the greatest is the integral of 1 - P(all are below x).
    """
    chances = np.asarray(chances, dtype=np.float64)
    if size == 1:
        return 1.0
    shares = np.array_split(chances, size)
    means = np.array([part.sum() for part in shares]) * num_tokens
    deviations = np.sqrt([(part * (1 - part)).sum() * num_tokens for part in shares]) + 1e-9
    x = np.linspace(means.max(), (means + 6 * deviations).max(), 300)
    below = torch.special.ndtr(torch.from_numpy((x - means[:, None]) / deviations[:, None]))
    most = x[0] + np.trapezoid(1 - below.prod(dim=0).numpy(), x)
    return min(float(most / means.mean()), float(size))


def placed(chances: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    """The experts dealt out so that ranks are about even, the most wanted first, each to the rank
    with least: what balancing by measured load does, without copies. Returns the chances in the new
    order, rank after rank. Each rank gets as many experts; raises ValueError where they cannot."""
    if len(chances) % size:
        raise ValueError(f"{len(chances)} experts on {size} ranks: it does not divide")
    chances = np.sort(np.asarray(chances, dtype=np.float64))[::-1]
    room = len(chances) // size
    ranks: list[list[float]] = [[] for _ in range(size)]
    for chance in chances:
        free = [rank for rank in ranks if len(rank) < room]
        min(free, key=sum).append(float(chance))
    return np.concatenate([np.array(rank) for rank in ranks])
