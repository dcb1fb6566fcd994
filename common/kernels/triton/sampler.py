"""The sampler's launches on a GPU: six kernels, whatever the rows ask for.

No number goes back to the host and no shape depends on one, so sampling can be captured in a CUDA
graph; rows that need no search or no noise leave the kernels at once. All logits are read by
programs for each row and chunk of the vocabulary: one row is spread over as many as it has chunks.
What is compiled follows from the vocabulary and the logits' format alone, not from the batch: one
`sample` in the model's format and one in float32, which penalties and drafts need, are all of it.
"""

import torch
import triton
from torch import Tensor

from common.kernels.triton.launch import Launcher
from common.kernels.triton.sampler_kernels import (
    extremes_kernel,
    gather_kernel,
    marks_kernel,
    noisy_kernel,
    threshold_kernel,
    winner_kernel,
)
from common.kernels.triton.sampler_search import NUM_MARKS

CHUNK = 4096  # tokens at most
TILE = 1024
NUM_MARKED = 512  # tokens that are compared with all marks at once
MOST_CANDIDATES = 8192  # for a row's threshold; where there are more, all its logits are searched
MAX_PROGRAMS = 1024  # of the launches that most rows leave at once: a program is not free

EXTREMES, MARKS, GATHER, THRESHOLD, NOISY, WINNER = (
    Launcher(kernel)
    for kernel in (
        extremes_kernel,
        marks_kernel,
        gather_kernel,
        threshold_kernel,
        noisy_kernel,
        winner_kernel,
    )
)


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
    choices = torch.zeros_like(seeds) if choices is None else choices
    logits, noise = logits.contiguous(), (seeds, positions, choices)
    maxima, smallest, bounds, best = thresholds(logits, temperature, top_k, top_p, min_p, *noise)
    (num_rows, num_chunks), vocab = maxima.shape, logits.shape[1]
    chunk, chunks = sizes(vocab)
    noisy = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=logits.device)
    tokens = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=logits.device)
    arguments = (logits, maxima, temperature, *noise, smallest, bounds, best, noisy, tokens)
    NOISY((num_rows, num_chunks), arguments, (vocab, chunk, min(TILE, chunk)))
    WINNER((num_rows,), (noisy, tokens, temperature, best), (num_chunks, chunks), num_warps=1)
    return best


def smallest_kept(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `Ops.smallest_kept`; all contiguous, float32 and int64, and there is a row."""
    ones, zeros = torch.ones_like(top_p), torch.zeros_like(top_k)
    return thresholds(logits, ones, top_k, top_p, min_p, zeros, zeros, zeros)[1]


def sizes(vocab: int) -> tuple[int, int]:
    """(tokens of a chunk, chunks of a row), each a power of two; the last chunks may be empty."""
    chunk = min(CHUNK, triton.next_power_of_2(vocab))
    return chunk, triton.next_power_of_2(triton.cdiv(vocab, chunk))


def thresholds(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    choices: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(each chunk's largest logit [batch, num_chunks], the smallest kept, a bound of what wins,
    the greedy token: [batch] each)."""
    num_rows, vocab = logits.shape
    chunk, chunks = sizes(vocab)
    num_chunks = triton.cdiv(vocab, chunk)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    maxima, firsts = new(num_rows, num_chunks), new(num_rows, num_chunks, dtype=torch.int32)
    held, found = new(num_rows, num_chunks, 2, NUM_MARKS.value), new(num_rows, 3)
    candidates = new(num_rows, MOST_CANDIDATES, dtype=logits.dtype)
    smallest, bounds = new(num_rows), new(num_rows, dtype=torch.float64)
    best = new(num_rows, dtype=torch.int64)
    EXTREMES((num_rows, num_chunks), (logits, maxima, firsts), (vocab, chunk), num_warps=8)
    shape = (vocab, chunk, chunks)
    columns = (temperature, top_k, top_p)
    few = (num_rows, min(num_chunks, max(1, MAX_PROGRAMS // num_rows)))
    MARKS(few, (logits, maxima, *columns, held), (*shape, min(NUM_MARKED, chunk)), num_warps=8)
    arguments = (logits, maxima, *columns, held, candidates, found)
    GATHER(few, arguments, (*shape, MOST_CANDIDATES), num_warps=8)
    arguments = (logits, maxima, firsts, candidates, found, *columns, min_p)
    arguments += (seeds, positions, choices, smallest, bounds, best)
    THRESHOLD((num_rows,), arguments, (*shape, MOST_CANDIDATES, CHUNK), num_warps=16)
    return maxima, smallest, bounds, best
