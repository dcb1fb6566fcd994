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
        self.width, self.padding_row = width, num_rows
        self.host = np.zeros((num_rows + 1, width), np.int32)
        # Of what has changed, through all rows. Each once: a GPU may write two blocks of one place
        # in any order.
        self.places: set[int] = set()
        # What follows belongs to the device: only work in the queue touches it.
        self.device = torch.zeros(num_rows + 1, width, dtype=torch.int32, device=device)
        self.of_batch = torch.zeros_like(self.device)  # where every batch finds its tables

    @property
    def num_bytes(self) -> int:
        """On the host and on the device."""
        return self.host.nbytes + self.device.nbytes + self.of_batch.nbytes

    def write(self, row: int, begin: int, blocks: list[int]) -> None:
        """Write a row's entries from `begin` on."""
        self.host[row, begin : begin + len(blocks)] = blocks
        first = row * self.width + begin
        self.places.update(range(first, first + len(blocks)))

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Places in the tables that were written since the last time, and the blocks there."""
        places = np.array(sorted(self.places), np.int32)
        self.places.clear()
        return places, self.host.reshape(-1)[places]

    def update(self, changes: torch.Tensor, rows: torch.Tensor) -> None:
        """On the device: write what has changed, and put rows where attention reads them.

        changes: [2, num_changes] int32, places and blocks; rows: [num_seqs] int64, of the batch.
        """
        if changes.numel():
            self.device.view(-1).index_copy_(0, changes[0].long(), changes[1])
        torch.index_select(self.device, 0, rows, out=self.of_batch[: len(rows)])
