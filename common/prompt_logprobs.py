"""How likely the tokens of a prompt are: a token's log probability is read off the position before it.

Evaluations ask for it (`echo` with `logprobs`, `prompt_logprobs`). Every position of the prompt needs
logits, [num_tokens, vocab], which would be gigabytes for a long one: they are made some rows at a
time. A position whose keys and values come out of a cache is not computed, so its token has no
score: requests that ask take nothing from the prefix cache.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.completions import TokenLogprobs
from common.device import to_device

ROWS = 128  # positions whose logits are held at once


@dataclass(frozen=True)
class PromptScores:
    """Log probabilities of some tokens of a prompt, on the device that computed them."""

    piece: "PromptPiece"
    logprobs: Tensor  # [num_tokens, 1 + num_top] float32: the token's own, then the most likely
    top_token_ids: Tensor  # [num_tokens, num_top] int64
    ranks: Tensor  # [num_tokens] int64: 1 for the most likely token

    def to(self, device: torch.device, non_blocking: bool = False) -> "PromptScores":
        """A copy on another device."""
        tensors = self.logprobs, self.top_token_ids, self.ranks
        return PromptScores(self.piece, *(x.to(device, non_blocking=non_blocking) for x in tensors))

    def added_to(self, known: list[TokenLogprobs] | None) -> list[TokenLogprobs]:
        """What is known of the prompt's tokens from the second on, with these scores behind it.

        After a preemption the same tokens are scored again: those that are known stay.
        """
        known = known or []
        columns = self.logprobs, self.top_token_ids, self.ranks
        rows = zip(self.piece.token_ids, *(column.tolist() for column in columns), strict=True)
        found = [
            TokenLogprobs(token_id, own, tuple(zip(ids, top, strict=True)), rank)
            for token_id, (own, *top), ids, rank in rows
        ]
        return known + found[1 + len(known) - self.piece.first :]


@dataclass(frozen=True)
class PromptPiece:
    """Tokens of one prompt that a batch can score: those after its positions in the batch."""

    sequence: int  # which of the batch's sequences they belong to
    place: int  # in the batch, of the position before the first of them
    first: int  # where in the prompt the first of them is
    token_ids: list[int]
    num_top: int  # how many most likely tokens are asked for

    def bring(self, hidden: Tensor, logits_of: Callable[[Tensor], object]) -> None:
        """Ask for the same logits as `score`, on a rank that has only a part of them to give."""
        for rows in hidden[self.place : self.place + len(self.token_ids)].split(ROWS):
            logits_of(rows)

    def score(self, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]) -> PromptScores:
        """hidden: of the whole batch, [num_tokens, hidden]; logits_of: [n, hidden] -> [n, vocab]."""
        hidden = hidden[self.place : self.place + len(self.token_ids)]
        token_ids = to_device(self.token_ids, torch.int64, hidden.device)
        parts = []
        for rows, own in zip(hidden.split(ROWS), token_ids.split(ROWS), strict=True):
            logits = logits_of(rows).float()
            total = logits.logsumexp(dim=1, keepdim=True)
            value = logits.gather(1, own.unsqueeze(1))
            top, top_ids = logits.topk(self.num_top, dim=1)
            rank = (logits > value).sum(dim=1) + 1
            scores = torch.cat([value, top], dim=1) - total
            scores = scores.where(
                total.isfinite(), torch.nan
            )  # infinite logits are no numbers either
            parts.append((scores, top_ids, rank))
        return PromptScores(self, *(torch.cat(part) for part in zip(*parts, strict=True)))


def prompt_pieces(
    sequences: Iterable[Any], starts: Iterable[int], counts: Iterable[int]
) -> list[PromptPiece]:
    """What a batch is to score.

    sequences: anything with `prompt_token_ids` and `params`, in the batch one after the other, each
    with so many tokens from its own start on.
    """
    pieces, place = [], 0
    for i, (sequence, start, count) in enumerate(zip(sequences, starts, counts, strict=True)):
        num_top, prompt = sequence.params.prompt_logprobs, sequence.prompt_token_ids
        if num_top is not None and start + 1 < len(prompt):
            token_ids = prompt[start + 1 : start + count + 1]
            pieces.append(PromptPiece(i, place, int(start) + 1, token_ids, num_top))
        place += int(count)
    return pieces


def add_prompt_logprobs(sequences: Iterable[Any], scores: Sequence[PromptScores]) -> None:
    """Give each sequence of a batch what was found about its prompt."""
    if scores:
        by_place = list(sequences)
        for found in scores:
            sequence = by_place[found.piece.sequence]
            sequence.prompt_logprobs = found.added_to(sequence.prompt_logprobs)
