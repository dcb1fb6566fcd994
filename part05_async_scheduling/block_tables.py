"""Block tables as the device has them: kept there from step to step, and told what has changed.

Written out for every step they would be most of its input: 256 sequences of 40,000 tokens have
640,000 entries. A step of decoding changes one entry in each sixteenth sequence.
"""

import numpy as np
import torch


class BlockTables:
    """A row of block numbers for each running sequence, on the host and on the device.

    One row more than there are sequences: whatever fills a batch up reads the last one, whose
    entries are 0.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        """width: blocks of the longest sequence."""
        self.width = width
        self.host = np.zeros((num_rows + 1, width), np.int32)
        self.changes: list[tuple[np.ndarray, np.ndarray]] = []  # places and blocks, not taken yet
        # What follows belongs to the device: only work in the queue touches it.
        self.device = torch.zeros(num_rows + 1, width, dtype=torch.int32, device=device)
        self.of_batch = torch.zeros_like(self.device)  # where every batch finds its tables

    @property
    def num_bytes(self) -> int:
        return self.host.nbytes + self.device.nbytes + self.of_batch.nbytes

    def write(self, row: int, begin: int, blocks: list[int]) -> None:
        """Write a row's entries from `begin` on."""
        self.host[row, begin : begin + len(blocks)] = blocks
        first = row * self.width + begin
        self.changes.append((np.arange(first, first + len(blocks)), np.array(blocks, np.int32)))

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Places in the table, counted through all rows, and the blocks written there."""
        changes, self.changes = self.changes, []
        none = np.zeros(0, np.int64), np.zeros(0, np.int32)
        places, blocks = zip(none, *changes, strict=True)
        return np.concatenate(places), np.concatenate(blocks)

    def update(self, places: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write what has changed, on the device."""
        self.device.view(-1).index_copy_(0, places, blocks)

    def gather(self, rows: torch.Tensor) -> None:
        """Put these rows where attention reads them."""
        torch.index_select(self.device, 0, rows, out=self.of_batch[: len(rows)])
