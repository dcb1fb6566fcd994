"""From logits to the next tokens, for a batch of sequences that each have their own settings.

Sampling is Gumbel-max: the argmax of logits plus Gumbel noise is a draw from their softmax. The
noise depends on a sequence's seed and position alone, so a seeded result does not depend on what
else is in the batch. Filters are thresholds: top-k, top-p and min-p each say which is the smallest
logit that stays, and equal logits stay or go together, so no result depends on the order of a sort.
"""

import torch
from torch import Tensor

from common.completions import TokenLogprobs
from common.sampling import SamplingBatch, gumbel_noise, not_drawn

GREEDY_BELOW = 1e-5  # temperatures below this are greedy
NUM_CANDIDATES = 256  # a row is sorted whole only when its top-p reaches beyond these


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each row of logits, [batch, vocab], and log probabilities if asked for.

    They are the model's own: before penalties, temperature and filters. NO_TOKEN where logits are
    not finite.
    """
    scaled = logits = logits.float()
    if batch.output_counts is not None:
        scaled = scaled - batch.presence_penalty * (batch.output_counts > 0)
        scaled = scaled - batch.frequency_penalty * batch.output_counts
    scaled = batch.biased(scaled)
    tokens = scaled.argmax(dim=-1)
    is_greedy = batch.temperature < GREEDY_BELOW
    if not is_greedy.all():
        scaled = scaled / batch.temperature.clamp(min=GREEDY_BELOW)
        tokens = torch.where(is_greedy.squeeze(1), tokens, draw(scaled, batch))
    token_ids = not_drawn(tokens, logits).tolist()
    return token_ids, list(map(token_logprobs, logits, token_ids, batch.num_logprobs))


def draw(scaled: Tensor, batch: SamplingBatch) -> Tensor:
    """One token a row from the filtered softmax of `scaled`, [batch, vocab]; returns [batch]."""
    smallest = smallest_kept(scaled, batch.top_k, batch.top_p, batch.min_p)
    rows, ids = (scaled >= smallest).nonzero(as_tuple=True)
    noise = gumbel_noise(batch.seeds[rows, 0], batch.positions[rows, 0], ids)
    noisy = torch.full_like(scaled, -torch.inf, dtype=noise.dtype)
    noisy[rows, ids] = scaled[rows, ids] + noise
    return noisy.argmax(dim=-1)


def smallest_kept(
    logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int = NUM_CANDIDATES
) -> Tensor:
    """The smallest logit that stays in each row of [batch, vocab]; the result is [batch, 1].

    top-k first, then top-p over what top-k left, then min-p; each of them is [batch, 1].
    """
    width = min(max(width, int(top_k.max())), logits.shape[1])
    top = logits.topk(width).values  # most likely first
    kth = top.gather(1, (top_k - 1).clamp(min=0)).where(top_k > 0, -torch.inf)
    in_top_k = (torch.arange(width, device=top.device) < top_k) | (top_k == 0)
    kept = top.where(in_top_k, -torch.inf)
    all_kept = kept.logsumexp(-1, True).where(top_k > 0, logits.logsumexp(-1, True))
    probs = (kept - all_kept).exp()
    # A token stays while those before it do not reach top_p: so the one that crosses it stays.
    num_kept = (probs.cumsum(-1) - probs < top_p).sum(-1, keepdim=True).clamp(min=1)
    pth = top.gather(1, num_kept - 1).where(top_p < 1, -torch.inf)
    smallest = torch.maximum(torch.maximum(kth, pth), top[:, :1] + min_p.log())
    beyond = ((num_kept == width) & (top_p < 1) & (top_k == 0)).squeeze(1)
    if width < logits.shape[1] and beyond.any():
        rows = (logits[beyond], top_k[beyond], top_p[beyond], min_p[beyond])
        smallest[beyond] = smallest_kept(*rows, width=logits.shape[1])
    return smallest


def token_logprobs(logits: Tensor, token_id: int, num_top: int | None) -> TokenLogprobs | None:
    """log_softmax of one row, [vocab], at the token and at the `num_top` most likely ones."""
    if num_top is None:
        return None
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(num_top)
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprobs(token_id, logprobs[token_id].item(), tuple(top))
