"""The fields of a step's input, and how long they are: one copy to the GPU brings all of them."""

from dataclasses import dataclass

import numpy as np

# name: (number format, which number of the shape is its length)
FIELDS = {
    "cu_seqlens_q": (np.int32, "num_seqs + 1"),
    "seq_lens": (np.int32, "num_seqs"),
    "num_draft_tokens": (np.int64, "num_seqs"),
    "table_rows": (np.int64, "num_seqs"),
    "logits_indices": (np.int64, "num_sampled"),
    "rows": (np.int64, "num_sampled"),
    "sample_positions": (np.int64, "num_sampled"),
    "seeds": (np.int64, "num_sampled"),
    "choices": (np.int64, "num_sampled"),
    "top_k": (np.int64, "num_sampled"),
    "temperature": (np.float32, "num_sampled"),
    "top_p": (np.float32, "num_sampled"),
    "min_p": (np.float32, "num_sampled"),
    "presence_penalty": (np.float32, "num_sampled"),
    "frequency_penalty": (np.float32, "num_sampled"),
    "token_ids": (np.int64, "num_tokens"),
    "positions": (np.int64, "num_tokens"),
    "slot_mapping": (np.int64, "num_tokens"),
    # The last, since its room is large and mostly empty: no more of it is copied than there is.
    "table_changes": (np.int64, "2 * num_changes"),
}
FORMATS = {name: dtype for name, (dtype, _) in FIELDS.items()}
SAMPLING_FIELDS = list(FIELDS)[list(FIELDS).index("seeds") : list(FIELDS).index("token_ids")]


@dataclass(frozen=True)
class BatchShape:
    """How many entries the fields have; of a batch, or at most."""

    num_tokens: int
    num_seqs: int
    num_sampled: int  # tokens after which one is sampled
    num_changes: int  # of the block tables

    def lengths(self) -> dict[str, int]:
        """Entries of each field."""
        numbers = vars(self) | {
            "num_seqs + 1": self.num_seqs + 1,
            "2 * num_changes": 2 * self.num_changes,
        }
        return {name: numbers[length] for name, (_, length) in FIELDS.items()}
