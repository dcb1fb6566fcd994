"""From logits to the next tokens, for a batch of sequences that each have their own settings.

Sampling is Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax. The
noise depends on a sequence's seed, choice and position alone, so a seeded result does not depend on
what else is in the batch. Filters and noise are one fused operation of `common.kernels`.

Nothing here waits for the device: what was drawn stays there as tensors until somebody reads it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.completions import TokenLogprobs
from common.kernels import Ops
from common.prompt_logprobs import PromptScores
from common.sampling import SamplingBatch, not_drawn


@dataclass(frozen=True)
class Sampled:
    """What was drawn in one step, a row for each sampled sequence.

    Log probabilities are there for the rows that asked, and are as wide as the largest wish: the
    token's own first, then those of the most likely tokens.
    """

    token_ids: Tensor  # [num_sampled] int64
    num_logprobs: list[int | None]  # how many most likely tokens each row wants
    logprobs: Tensor | None = None  # [rows that asked, 1 + most]
    top_token_ids: Tensor | None = None  # [rows that asked, most] int64
    prompts: list[PromptScores] = field(default_factory=list)  # of the prompts that were scored

    def to(self, device: torch.device, non_blocking: bool = False) -> "Sampled":
        """A copy on another device."""
        tensors = (self.token_ids, self.logprobs, self.top_token_ids)
        copies = [x if x is None else x.to(device, non_blocking=non_blocking) for x in tensors]
        prompts = [scores.to(device, non_blocking) for scores in self.prompts]
        return Sampled(copies[0], self.num_logprobs, *copies[1:], prompts=prompts)

    def lists(self) -> tuple[list[list[int]], list[list[TokenLogprobs | None]]]:
        """The tokens of each row, and their log probabilities where it asked."""
        token_ids = self.token_ids.tolist()
        found = [] if self.logprobs is None else self.logprobs.tolist()
        tops = [] if self.top_token_ids is None else self.top_token_ids.tolist()
        asked = iter(zip(found, tops, strict=True))
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        for row, count in enumerate(self.num_logprobs):
            if count is not None:
                (own, *values), ids = next(asked)
                top = tuple(zip(ids[:count], values[:count], strict=True))
                logprobs[row] = TokenLogprobs(token_ids[row], own, top)
        return [[token_id] for token_id in token_ids], [[logprob] for logprob in logprobs]


def sample(ops: Ops, logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The next token of each row of logits, [batch, vocab]; returns [batch] int64, NO_TOKEN where
    logits are not finite."""
    raw, logits = logits, logits.float()
    if batch.output_counts is not None:
        logits = logits - batch.presence_penalty * (batch.output_counts > 0)
        logits = logits - batch.frequency_penalty * batch.output_counts
    logits = batch.biased(logits)
    columns = (batch.temperature, batch.top_k, batch.top_p, batch.min_p)
    columns += (batch.seeds, batch.positions, batch.choices)
    return not_drawn(ops.sample(logits, *(column.squeeze(1) for column in columns)), raw)


def with_logprobs(logits: Tensor, token_ids: Tensor, batch: SamplingBatch) -> Sampled:
    """The tokens, with log probabilities where they are asked for: the model's own, before
    penalties and filters."""
    asked = [row for row, count in enumerate(batch.num_logprobs) if count is not None]
    if not asked:
        return Sampled(token_ids, batch.num_logprobs)
    most = max(batch.num_logprobs[row] for row in asked)
    logprobs = logits[asked].float().log_softmax(dim=-1)
    own = logprobs.gather(1, token_ids[asked].clamp(min=0).unsqueeze(1))
    values, ids = logprobs.topk(most)
    return Sampled(token_ids, batch.num_logprobs, torch.cat([own, values], dim=1), ids)
