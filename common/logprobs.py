"""Log probabilities of sampled tokens, on the device until somebody reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.completions import TokenLogprobs
from common.device import to_device


@dataclass(frozen=True)
class SampledLogprobs:
    """Of the rows that asked; as wide as the largest wish."""

    wishes: list[int | None]  # how many most likely tokens each row wants; None: it does not ask
    logprobs: Tensor | None = None  # [rows that asked, 1 + most]: the token's own, then the top
    top_token_ids: Tensor | None = None  # [rows that asked, most] int64

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, wishes: list[int | None]) -> "SampledLogprobs":
        """The model's own: before penalties, temperature and filters. Does not wait for the device.

        logits: [rows, vocab]; token_ids: [rows] int64, what was drawn.
        """
        rows = [row for row, count in enumerate(wishes) if count is not None]
        if not rows:
            return cls(wishes)
        if len(rows) < len(wishes):
            asked = to_device(rows, torch.int64, logits.device)
            logits, token_ids = logits[asked], token_ids[asked]
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        own = logprobs.gather(1, token_ids.clamp(min=0).unsqueeze(1))
        values, ids = logprobs.topk(max(count for count in wishes if count is not None))
        return cls(wishes, torch.cat([own, values], dim=1), ids)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SampledLogprobs":
        """A copy on another device."""
        if self.logprobs is None or self.top_token_ids is None:
            return self
        copies = [
            x.to(device, non_blocking=non_blocking) for x in (self.logprobs, self.top_token_ids)
        ]
        return SampledLogprobs(self.wishes, copies[0], copies[1])

    def lists(self, token_ids: Sequence[int]) -> list[TokenLogprobs | None]:
        """One for each row, on the host; None where it did not ask. token_ids: what was drawn."""
        found: list[TokenLogprobs | None] = [None] * len(self.wishes)
        if self.logprobs is None or self.top_token_ids is None:
            return found
        asked = iter(zip(self.logprobs.tolist(), self.top_token_ids.tolist(), strict=True))
        for row, count in enumerate(self.wishes):
            if count is not None:
                (own, *values), ids = next(asked)
                top = tuple(zip(ids[:count], values[:count], strict=True))
                found[row] = TokenLogprobs(token_ids[row], own, top)
        return found
