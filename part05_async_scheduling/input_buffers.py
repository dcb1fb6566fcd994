"""The model's input in one piece of memory: one copy to the GPU a step, whatever there is to say.

A step's input is many small tensors. Made one by one they cost as many copies, and each copy
to a GPU takes longer than the bytes in it. Here they are views of one buffer: written on the host as
arrays, copied once, read on the device as tensors. Each lies at one place, whatever the batch: work
that is launched again and again finds its input where it was.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .device_queue import Work

ALIGNMENT = 8  # words of 8 bytes: 64 bytes, so that any load of a field's begin is aligned

# name: (number format, which number of the shape is its length)
FIELDS = {
    "cu_seqlens_q": (np.int32, "num_seqs + 1"),
    "seq_lens": (np.int32, "num_seqs"),
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
    "table_places": (np.int64, "num_changes"),
    "table_blocks": (np.int32, "num_changes"),
    "token_ids": (np.int64, "num_tokens"),
    "positions": (np.int64, "num_tokens"),
    "slot_mapping": (np.int64, "num_tokens"),
}
TORCH_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}
SAMPLING_FIELDS = list(FIELDS)[list(FIELDS).index("seeds") : list(FIELDS).index("table_places")]


@dataclass(frozen=True)
class BatchShape:
    """How many entries the fields have; of a batch, or at most."""

    num_tokens: int
    num_seqs: int
    num_sampled: int  # tokens after which one is sampled
    num_changes: int  # of the block tables

    def holds(self, other: "BatchShape") -> bool:
        """Whether there is room for a batch of the other shape."""
        return all(most >= vars(other)[name] for name, most in vars(self).items())

    def length(self, name: str) -> int:
        """Entries of a field."""
        kind = FIELDS[name][1]
        return self.num_seqs + 1 if kind == "num_seqs + 1" else vars(self)[kind]

    def layout(self) -> tuple[dict[str, int], int]:
        """(name -> first word, words in all), with room for batches up to this shape."""
        places, begin = {}, 0
        for name, (dtype, _) in FIELDS.items():
            places[name] = begin
            words = -(-self.length(name) * np.dtype(dtype).itemsize // 8)
            begin += -(-words // ALIGNMENT) * ALIGNMENT
        return places, begin


class InputBuffers:
    """Two buffers on the host, in turns, since the step in flight may yet read the other; and one on
    the GPU, where steps run one after the other. On a CPU the host's are the device's."""

    def __init__(self, capacities: list[BatchShape], device: torch.device) -> None:
        """capacities: rising. A batch lies where the first that holds it has its places, so that
        small batches need not copy the room for large ones."""
        self.layouts = [(capacity, *capacity.layout()) for capacity in capacities]
        size = self.layouts[-1][2]
        on_gpu = device.type == "cuda"
        self.hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu) for _ in range(2)]
        self.device = torch.zeros(size, dtype=torch.int64, device=device) if on_gpu else None
        self.readers: list[Work | None] = [None, None]  # the last steps that read them
        self.views: list[Any] = [None, None]  # what was handed out last, and for which shape
        self.turn = 0

    @property
    def num_bytes(self) -> int:
        """On the host and on the device."""
        tensors = [*self.hosts, *([] if self.device is None else [self.device])]
        return sum(tensor.nbytes for tensor in tensors)

    def next(
        self, shape: BatchShape
    ) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, torch.Tensor]]:
        """Where the host writes the next batch, of this shape, and what the device reads, by name.

        Waits for the step that reads the buffer. Views are made anew when the shape is another than
        the last one: most decode steps have one.
        """
        self.turn = 1 - self.turn
        reader = self.readers[self.turn]
        if reader is not None:
            reader.wait()
        if self.views[self.turn] is None or self.views[self.turn][0] != shape:
            self.views[self.turn] = shape, *self.make_views(shape)
        return self.views[self.turn][1:3]

    def make_views(
        self, shape: BatchShape
    ) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, torch.Tensor], int]:
        """(arrays, tensors, words to copy) for a batch of this shape."""
        places, size = next(layout[1:] for layout in self.layouts if layout[0].holds(shape))
        host = self.hosts[self.turn]
        words, on_device = host.numpy(), host if self.device is None else self.device
        arrays, tensors = {}, {}
        for name, begin in places.items():
            dtype, length = FIELDS[name][0], shape.length(name)
            arrays[name] = words[begin:].view(dtype)[:length]
            tensors[name] = on_device[begin:].view(TORCH_DTYPES[dtype])[:length]
        return arrays, tensors, size

    def copy_to_device(self) -> None:
        """One copy, and none where the host is the device."""
        if self.device is not None:
            size = self.views[self.turn][3]
            self.device[:size].copy_(self.hosts[self.turn][:size], non_blocking=True)

    def read_by(self, work: Work) -> None:
        """The batch that was written last is read by this work."""
        self.readers[self.turn] = work
