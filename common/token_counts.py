"""How often each running sequence has generated each token: kept on the device, for penalties."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.device import to_device


@dataclass(frozen=True)
class JoiningOutputs:
    """What sequences that join have generated before: nothing, or all up to a preemption."""

    rows: torch.Tensor  # [num_sequences] int64: rows of the counts
    places: torch.Tensor  # [num_tokens] int64: of each token, through all rows of the counts

    @classmethod
    def build(
        cls,
        rows: Sequence[int],
        outputs: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> "JoiningOutputs | None":
        """From the row of each sequence and its output; None where there is no sequence."""
        if not rows:
            return None
        tokens = [np.array(output, np.int64) for output in outputs]
        places = [row * vocab_size + ids for row, ids in zip(rows, tokens, strict=True)]
        return cls(
            to_device(rows, torch.int64, device),
            to_device(np.concatenate(places), torch.int64, device),
        )

    def write_to(self, counts: torch.Tensor) -> None:
        """Begin the counts, [num_rows, vocab] int32, of these sequences; the host does not wait."""
        counts.index_fill_(0, self.rows, 0)
        ones = torch.ones_like(self.places, dtype=torch.int32)
        counts.view(-1).index_add_(0, self.places, ones)
