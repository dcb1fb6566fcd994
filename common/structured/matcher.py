"""The position of one output in its grammar, and the tokens that may come next."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from common.sampling import NO_TOKEN

NO_TOKEN_LEFT = "the grammar admits no token after this output"


def num_words(vocab_size: int) -> int:
    """Words of 32 bits in a mask, which has a bit for each token."""
    return -(-vocab_size // 32)


class Matcher:
    """Follows one output. For one thread at a time.

    error: why no token may come next; None while the output can go on or end.
    """

    def __init__(self, state: Any, eos_token_ids: Collection[int], ignore_eos: bool) -> None:
        """state: llguidance's matcher, at the start of the grammar. ignore_eos: the output ends only
        where the grammar admits no other token."""
        self.state, self.eos_token_ids, self.ignore_eos = (
            state,
            frozenset(eos_token_ids),
            ignore_eos,
        )
        self.error: str | None = None

    def advance(self, token_ids: Sequence[int]) -> None:
        """Advance by new tokens of the output, up to its end token."""
        for token_id in token_ids:
            if token_id == NO_TOKEN or token_id in self.eos_token_ids:
                return
            if not self.state.consume_token(token_id):
                self.error = self.error or "an output that the grammar does not admit"
                return

    def fill(self, masks: np.ndarray, draft_token_ids: Sequence[int] = ()) -> None:
        """Write which tokens may come next, and which may come after each draft token.

        masks: [1 + drafts, num_words] int32, bit i % 32 of word i // 32 for token i. After a draft
        token that is forbidden or ends the output all bits are set, because nothing is drawn there.
        """
        masks[:] = -1
        num_consumed = 0
        for mask, token_id in zip(masks, [*draft_token_ids, NO_TOKEN], strict=True):
            self._fill_one(mask)
            if token_id == NO_TOKEN or token_id in self.eos_token_ids:
                break
            if not mask[token_id // 32] >> (token_id % 32) & 1:
                break
            if not self.state.consume_token(token_id):
                break
            num_consumed += 1
        if num_consumed:
            self.state.rollback(num_consumed)

    def _fill_one(self, mask: np.ndarray) -> None:
        self.state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self.state.is_error():
            self.error = f"the grammar cannot be followed further: {first_line(self.state)}"
            mask[:] = 0
        elif not mask.any():
            self.error = NO_TOKEN_LEFT
        elif self.ignore_eos:
            others = mask.view(np.uint32).copy()
            for token_id in self.eos_token_ids:
                others[token_id // 32] &= np.uint32(0xFFFFFFFF ^ 1 << token_id % 32)
            if others.any():
                mask.view(np.uint32)[:] = others


def first_line(state: Any) -> str:
    """The first line of llguidance's error, at most 200 characters."""
    text = state.get_error().strip() or state.stop_reason()
    return text.splitlines()[0][:200]
