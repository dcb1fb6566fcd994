"""The sampler's launches on a GPU: four kernels, whatever the rows ask for.

No number goes back to the host and no shape depends on one, so sampling can be captured in a CUDA
graph; rows that need no search or no noise leave the kernels at once.
"""

import torch
import triton
from torch import Tensor

from common.kernels.triton.sampler_kernels import (
    extremes_kernel,
    noisy_kernel,
    threshold_kernel,
    winner_kernel,
)

CHUNK = 4096  # tokens at most
TILE = 1024


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor | None,
) -> Tensor:
    """As `Ops.sample`; the columns are contiguous, float32 and int64, and there is a row."""
    num_rows, vocab = logits.shape
    filters, noise = (temperature, top_k, top_p, min_p), (seeds, positions, choices)
    maxima, smallest, bounds, best = extremes(logits, *filters, *noise)
    num_chunks = maxima.shape[-1]
    chunk, chunks = chunk_of(vocab), triton.next_power_of_2(num_chunks)
    noisy = logits.new_empty(num_rows, num_chunks, dtype=torch.float64)
    tokens = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    noisy_kernel[(num_rows, num_chunks)](
        logits,
        maxima,
        temperature,
        *noise,
        smallest,
        bounds,
        noisy,
        tokens,
        logits.stride(0),
        vocab,
        CHUNK=chunk,
        TILE=min(TILE, chunk),
        num_warps=4,
    )
    winner_kernel[(num_rows,)](noisy, tokens, temperature, best, num_chunks, chunks, num_warps=1)
    return best


def smallest_kept(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `Ops.smallest_kept`; all contiguous, float32 and int64, and there is a row."""
    ones, zeros = torch.ones_like(top_p), torch.zeros_like(top_k)
    return extremes(logits, ones, top_k, top_p, min_p, zeros, zeros, None)[1]


def chunk_of(vocab: int) -> int:
    """Tokens of a chunk, a power of two."""
    return min(CHUNK, triton.next_power_of_2(vocab))


def extremes(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(each chunk's largest logit [batch, num_chunks], the smallest kept, a bound of what wins,
    the greedy token: [batch] each)."""
    num_rows, vocab = logits.shape
    chunk = chunk_of(vocab)
    num_chunks = triton.cdiv(vocab, chunk)
    new, stride = logits.new_empty, logits.stride(0)
    maxima, minima = new(2, num_rows, num_chunks, dtype=torch.float32)
    tops = new(num_rows, num_chunks, dtype=torch.int32)
    smallest = new(num_rows, dtype=torch.float32)
    bounds = new(num_rows, dtype=torch.float64)
    best = new(num_rows, dtype=torch.int64)
    grid = (num_rows, num_chunks)
    extremes_kernel[grid](logits, maxima, minima, tops, stride, vocab, CHUNK=chunk, num_warps=8)
    threshold_kernel[(num_rows,)](
        logits,
        maxima,
        minima,
        tops,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        choices,
        smallest,
        bounds,
        best,
        stride,
        vocab,
        CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(num_chunks),
        num_warps=16,
    )
    return maxima, smallest, bounds, best
