"""The rejection sampler: which draft tokens are accepted, and which token follows them.

One forward gives the target's logits after each of the K tokens of a draft and before the first.
The output is distributed as without drafts. There are two ways to it, and a batch may have rows of
both.

Sample and match: the target's token is drawn at each place with its ordinary noise, and draft
tokens are accepted as long as they equal it. The output is token for token what it would be without
drafts. Greedy and seeded requests are verified so.

Rejection (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", arXiv
2211.17192): draft token x, drawn from q, is accepted with probability min(1, p(x) / q(x)). In place
of the first rejected one a token is drawn from max(p - q, 0), normalised. More tokens are accepted
than by matching, and each place still has exactly p: x is emitted as an accepted draft with
probability min(p, q)(x), and after a rejection with (1 - Σ min(p, q)) * max(p - q, 0)(x) / Σ max(p
- q, 0), where 1 - Σ min(p, q) = Σ max(p - q, 0). Temperature and filters are part of p and q: the
operation that filters the logits of ordinary rows filters them here too.

A draft that is accepted whole is followed by one more token from p, the bonus.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels import Ops
from common.sampling import uniforms
from common.weighted_draw import draw

GREEDY_BELOW = 1e-5  # temperatures below this are greedy, as in common.kernels
ACCEPT_STREAM, RESIDUAL_STREAM = 1, 2  # of noise; stream 0 is the ordinary one, which draws drafts


@dataclass(frozen=True)
class Verified:
    """What a step emits. Row i has num_accepted[i] drafts and one token of the target after them."""

    token_ids: Tensor  # [num_seqs, 1 + most drafts] int64; beyond a row's own anything
    num_accepted: Tensor  # [num_seqs] int64


@dataclass(frozen=True)
class RejectionRows:
    """The rows of a batch that accept by rejection, and what is known of them.

    p and q of one row after the other: a row with K drafts has 1 + K rows of p and K of q.
    """

    rows: Tensor  # [num_rows] int64: which of the batch
    target_probs: Tensor  # p, [drafts + num_rows, vocab], after temperature and filters
    draft_probs: Tensor  # q, [drafts, vocab]: what each draft was really drawn from
    seeds: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64: the number of tokens before a row's first draft
    choices: Tensor  # [num_rows] int64


def verify(
    draft_token_ids: Tensor,
    lengths: Tensor,
    target_token_ids: Tensor,
    rejection: RejectionRows | None = None,
) -> Verified:
    """Accept and resample for a batch; nothing here waits for the device.

    draft_token_ids: [num_seqs, most drafts] int64; beyond a row's own anything.
    lengths: [num_seqs] int64, how many drafts each row has; 0 where it only draws a token.
    target_token_ids: [num_seqs + sum of lengths] int64, the target's draws at all places of one row
        after the other, as `ops.sample` gives them. Those of rejection rows are not looked at.
    rejection: the rows that do not match, if any; temperature 0 has no place among them.
    """
    most = draft_token_ids.shape[1]
    begins = (lengths + 1).cumsum(0) - (lengths + 1)
    places = begins.unsqueeze(1) + torch.arange(most + 1, device=lengths.device)
    targets = target_token_ids[places.clamp(max=len(target_token_ids) - 1)]
    verified = sample_and_match(draft_token_ids, targets, lengths)
    if rejection is None:
        return verified
    rows = rejection.rows
    accept, residual = verification_noise(
        rejection.seeds, rejection.positions, rejection.choices, most + 1
    )
    theirs = rejection_sample(
        draft_token_ids[rows],
        lengths[rows],
        rejection.draft_probs,
        rejection.target_probs,
        accept,
        residual,
    )
    return Verified(
        verified.token_ids.index_copy(0, rows, theirs.token_ids),
        verified.num_accepted.index_copy(0, rows, theirs.num_accepted),
    )


def sample_and_match(
    draft_token_ids: Tensor, target_token_ids: Tensor, lengths: Tensor
) -> Verified:
    """Drafts stay as long as they equal the target's draws, so the draws are what is emitted.

    draft_token_ids: [num_seqs, most]; target_token_ids: [num_seqs, most + 1]; lengths: [num_seqs].
    """
    place = torch.arange(draft_token_ids.shape[1], device=lengths.device)
    is_equal = draft_token_ids == target_token_ids[:, :-1]
    stays = is_equal & (place < lengths.unsqueeze(1))
    return Verified(target_token_ids, stays.cumprod(dim=1).sum(dim=1))


def rejection_sample(
    draft_token_ids: Tensor,
    lengths: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    accept_uniforms: Tensor,
    residual_uniforms: Tensor,
) -> Verified:
    """Drafts stay with probability min(1, p / q); then a token from what q leaves of p.

    draft_token_ids: [num_seqs, most]; lengths: [num_seqs]; draft_probs: q, [sum of lengths, vocab];
    target_probs: p, [sum of lengths + num_seqs, vocab]; uniforms: in (0, 1), one a place,
    [num_seqs, most + 1] float64.
    """
    num_seqs, most = draft_token_ids.shape
    if len(draft_probs) == 0:
        draft_probs = target_probs.new_zeros(1, target_probs.shape[1])
    place = torch.arange(most, device=lengths.device)
    is_draft = place < lengths.unsqueeze(1)
    drafts = draft_token_ids.where(is_draft, 0)
    q_begins = lengths.cumsum(0) - lengths
    p_begins = q_begins + torch.arange(num_seqs, device=lengths.device)
    last_q, last_p = len(draft_probs) - 1, len(target_probs) - 1
    q = draft_probs[(q_begins.unsqueeze(1) + place).clamp(max=last_q), drafts].double()
    p = target_probs[(p_begins.unsqueeze(1) + place).clamp(max=last_p), drafts].double()
    # u q < p, not u < p / q: where q is 0 by rounding, the draft stays if the target may draw it.
    stays = (accept_uniforms[:, :most] * q < p) & is_draft
    stop = stays.cumprod(dim=1).sum(dim=1).unsqueeze(1)

    p = target_probs[p_begins + stop[:, 0]]  # [num_seqs, vocab], of one place a row
    q = draft_probs[(q_begins + stop[:, 0]).clamp(max=last_q)]
    residual = torch.sub(p, q, out=q).clamp_(min=0)
    was_rejected = stop < lengths.unsqueeze(1)
    # Where p and q are equal up to rounding, nothing may be left: then p will do, being the same.
    token_ids = draw(p, residual, was_rejected, residual_uniforms.gather(1, stop))
    emitted = torch.cat([drafts, torch.zeros_like(token_ids)], dim=1)
    return Verified(emitted.scatter(1, stop, token_ids), stop[:, 0])


def verification_noise(
    seeds: Tensor, positions: Tensor, choices: Tensor, num_places: int
) -> tuple[Tensor, Tensor]:
    """What decides over drafts, and what draws after them: each [num_seqs, num_places] float64.

    Functions of seed, position and choice, as all noise here; in streams of their own, since drafts
    are drawn with the ordinary one and may not know what decides over them. A position's noise is
    used once: what lies beyond a rejected draft is drafted again, from a text that does not depend
    on it.
    """
    places = positions.unsqueeze(1) + torch.arange(num_places, device=positions.device)
    seeds, choices = seeds.unsqueeze(1), choices.unsqueeze(1)
    zeros = torch.zeros_like(places)
    accept = uniforms(seeds, places, zeros, choices, ACCEPT_STREAM)
    coarse = uniforms(seeds, places, zeros, choices, RESIDUAL_STREAM)
    fine = uniforms(seeds, places, zeros + 1, choices, RESIDUAL_STREAM)
    # 24 bits are too few to find a place among all tokens: a second word has the next 24.
    return accept, coarse + (fine - 0.5) / (1 << 24)


def target_probs(
    ops: Ops, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The distribution that `ops.sample` draws from, after temperature, top-k, top-p and min-p.

    logits: [rows, vocab]; the others [rows], as for `ops.sample`. Returns [rows, vocab] float32. At
    temperature 0 all is on the largest logit.
    """
    limits = torch.finfo(torch.float32)
    scaled = logits / temperature.float().clamp(min=GREEDY_BELOW).unsqueeze(1)  # float32
    scaled.nan_to_num_(limits.min, limits.max, limits.min)
    largest, smallest = scaled.amax(dim=1), ops.smallest_kept(scaled, top_k, top_p, min_p)
    smallest = torch.where(temperature < GREEDY_BELOW, largest, smallest).unsqueeze(1)
    scaled.masked_fill_(scaled < smallest, -torch.inf)
    weights = scaled.sub_(largest.unsqueeze(1)).exp_()
    return weights.div_(weights.sum(dim=1, keepdim=True))
