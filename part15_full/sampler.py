"""From logits to the next tokens, for a batch of sequences that each have their own settings.

Sampling is Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax. The
noise depends on a sequence's seed, choice and position alone, so a seeded result does not depend on
what else is in the batch. Filters and noise are one fused operation of `common.kernels`.

Nothing here waits for the device: what was drawn stays there as tensors until the host reads it.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.completions import TokenLogprobs
from common.kernels import Ops
from common.logprobs import SampledLogprobs
from common.prompt_logprobs import PromptScores
from common.sampling import SamplingBatch


@dataclass(frozen=True)
class Sampled:
    """What was drawn in one step, a row for each place that was sampled."""

    token_ids: Tensor  # [num_sampled] int64
    logprobs: SampledLogprobs
    prompts: list[PromptScores] = field(default_factory=list)  # of the prompts that were scored
    num_accepted: Tensor | None = None  # [sequences] int64: drafts that stay; None: there were none
    draft_lengths: list[int] = field(default_factory=list)  # a sequence has a row more than drafts

    def to(self, device: torch.device, non_blocking: bool = False) -> "Sampled":
        """A copy on another device."""
        token_ids = self.token_ids.to(device, non_blocking=non_blocking)
        prompts = [scores.to(device, non_blocking) for scores in self.prompts]
        stays = self.num_accepted
        stays = None if stays is None else stays.to(device, non_blocking=non_blocking)
        logprobs = self.logprobs.to(device, non_blocking)
        return Sampled(token_ids, logprobs, prompts, stays, self.draft_lengths)

    def runs(self) -> list[list[int]]:
        """The tokens of each sequence."""
        token_ids = self.token_ids.tolist()
        return [token_ids[run] for run in self.slices()]

    def slices(self) -> list[slice]:
        """The rows of each sequence: those of the drafts that stay, and one more."""
        if self.num_accepted is None:
            return [slice(row, row + 1) for row in range(len(self.token_ids))]
        begins = itertools.accumulate((1 + length for length in self.draft_lengths), initial=0)
        counts = zip(begins, self.num_accepted.tolist(), strict=False)
        return [slice(begin, begin + 1 + count) for begin, count in counts]

    def lists(self) -> tuple[list[list[int]], list[list[TokenLogprobs | None]]]:
        """The tokens of each sequence, and their log probabilities where it asked."""
        token_ids = self.token_ids.tolist()
        logprobs = self.logprobs.lists(token_ids)
        if self.num_accepted is None:
            return [[token_id] for token_id in token_ids], [[logprob] for logprob in logprobs]
        slices = self.slices()
        return [token_ids[run] for run in slices], [logprobs[run] for run in slices]


def sample(ops: Ops, logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The next token of each row of logits, [batch, vocab]; returns [batch] int64, NO_TOKEN where
    logits are not finite."""
    if batch.output_counts is not None:
        logits = logits - batch.presence_penalty * (batch.output_counts > 0)
        logits = logits - batch.frequency_penalty * batch.output_counts
    logits = batch.biased(logits)
    return ops.sample(logits, **batch.columns())
