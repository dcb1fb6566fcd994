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
    chunk = min(CHUNK, triton.next_power_of_2(vocab))
    num_chunks = triton.cdiv(vocab, chunk)
    chunks = triton.next_power_of_2(num_chunks)
    new, stride = logits.new_empty, logits.stride(0)
    maxima, minima = new(2, num_rows, num_chunks, dtype=torch.float32)
    tops, tokens = new(2, num_rows, num_chunks, dtype=torch.int32)
    noisy = new(num_rows, num_chunks, dtype=torch.float64)
    smallest = new(num_rows, dtype=torch.float32)
    bounds = new(num_rows, dtype=torch.float64)
    best = new(num_rows, dtype=torch.int64)
    grid = (num_rows, num_chunks)
    noise = (seeds, positions, choices, smallest, bounds)
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
        *noise,
        best,
        stride,
        vocab,
        CHUNK=chunk,
        CHUNKS=chunks,
        num_warps=16,
    )
    noisy_kernel[grid](
        logits,
        maxima,
        temperature,
        *noise,
        noisy,
        tokens,
        stride,
        vocab,
        CHUNK=chunk,
        TILE=min(TILE, chunk),
        num_warps=4,
    )
    winner_kernel[(num_rows,)](noisy, tokens, temperature, best, num_chunks, chunks, num_warps=1)
    return best
