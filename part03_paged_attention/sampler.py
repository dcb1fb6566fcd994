"""From logits to the next tokens, for a batch of sequences that each have their own settings.

Sampling is Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax. The
noise depends on a sequence's seed, choice and position alone, so a seeded result does not depend on
what else is in the batch. Filters and noise are one fused operation of `common.kernels`.
"""

from torch import Tensor

from common.kernels import Ops
from common.sampling import SamplingBatch


def sample(ops: Ops, logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The next token of each row of logits, [batch, vocab]; returns [batch] int64, NO_TOKEN where
    logits are not finite."""
    if batch.output_counts is not None:
        logits = logits - batch.presence_penalty * (batch.output_counts > 0)
        logits = logits - batch.frequency_penalty * batch.output_counts
    logits = batch.biased(logits)
    return ops.sample(logits, **batch.columns())
