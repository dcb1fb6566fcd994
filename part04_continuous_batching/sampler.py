"""From logits to the next tokens, for a batch of sequences that each have their own settings.

Sampling is Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax. The
noise depends on a sequence's seed, choice and position alone, so a seeded result does not depend on
what else is in the batch. Filters and noise are one fused operation of `common.kernels`.
"""

from torch import Tensor

from common.completions import TokenLogprobs
from common.kernels import Ops
from common.sampling import SamplingBatch, not_drawn


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


def logprobs_of(
    logits: Tensor, token_ids: list[int], batch: SamplingBatch
) -> list[TokenLogprobs | None]:
    """Log probabilities where they are asked for: the model's own, before penalties and filters."""
    if all(count is None for count in batch.num_logprobs):
        return [None] * len(token_ids)
    return list(map(token_logprobs, logits.float(), token_ids, batch.num_logprobs))


def token_logprobs(logits: Tensor, token_id: int, num_top: int | None) -> TokenLogprobs | None:
    """log_softmax of one row, [vocab], at the token and at the `num_top` most likely ones."""
    if num_top is None:
        return None
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(num_top)
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(token_id, logprobs[token_id].item(), tuple(top))
