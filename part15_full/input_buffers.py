"""The model's input in one piece of memory: one copy to the GPU a step, whatever there is to say.

A step's input is many small tensors. Made one by one they cost as many copies, and each copy
to a GPU takes longer than the bytes in it. Here they are views of one buffer: written on the host as
arrays, copied once, read on the device as tensors.
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.packed_fields import Arrays, PackedFields, Tensors

from .device_queue import Work

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
    "table_changes": (np.int32, "2 * num_changes"),
}
PENALTIES = ("presence_penalty", "frequency_penalty")
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


class InputBuffers:
    """Buffers on the host, in turns, since steps in flight may yet read the others; and one on the
    GPU, where one step runs after the other. On a CPU the host's are the device's."""

    def __init__(
        self,
        capacities: list[BatchShape],
        device: torch.device,
        num_hosts: int = 2,
        overlaps: bool = False,
    ) -> None:
        """capacities: from small to large, so that small steps do not copy the room of large ones.
        overlaps: a step may begin on the GPU before another has ended; each has a buffer then."""
        on_gpu, host = device.type == "cuda", torch.device("cpu")
        self.sizes = sizes = FORMATS, [capacity.lengths() for capacity in capacities]
        self.hosts = [PackedFields(*sizes, host, pin_memory=on_gpu) for _ in range(num_hosts)]
        num_devices = (num_hosts if overlaps else 1) if on_gpu else 0
        self.devices = [PackedFields(*sizes, device) for _ in range(num_devices)]
        self.device = self.devices[0] if on_gpu else None
        self.readers: list[Work | None] = [None] * num_hosts  # the last steps that read them
        self.turn = 0

    @property
    def num_bytes(self) -> int:
        """On the host and on the device."""
        return sum(fields.words.nbytes for fields in (*self.hosts, *self.devices))

    def next(self, shape: BatchShape) -> tuple[Arrays, Tensors]:
        """Where the host writes the next batch, and what the device reads, by name.

        Waits for the step that reads the buffer. Raises ValueError where there is no room.
        """
        self.turn = (self.turn + 1) % len(self.hosts)
        if len(self.devices) > 1:
            self.device = self.devices[self.turn]
        if (reader := self.readers[self.turn]) is not None:
            reader.wait()
        host, lengths = self.hosts[self.turn], shape.lengths()
        return host.arrays(lengths), (self.device or host).tensors(lengths)

    def copy_to_device(self, shape: BatchShape) -> None:
        """One copy, and none where the host is the device."""
        if self.device is not None:
            lengths = shape.lengths()
            piece = self.hosts[self.turn].piece(lengths)
            self.device.piece(lengths).copy_(piece, non_blocking=True)

    def packed(self, shape: BatchShape) -> torch.Tensor:
        """The batch that was written last, where the device reads it: all its fields in one piece."""
        return (self.device or self.hosts[self.turn]).piece(shape.lengths())

    def read_by(self, work: Work) -> None:
        """The batch that was written last is read by this work."""
        self.readers[self.turn] = work
