"""The model's input in one piece of memory: one copy to the GPU a step, whatever there is to say.

A step's input is many small tensors. Made one by one they cost as many copies, and each copy
to a GPU takes longer than the bytes in it. Here they are views of one buffer: written on the host as
arrays, copied once, read on the device as tensors. Where each view begins depends on the shape of
the batch alone, so batches of one shape lie at the same addresses.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .device_queue import Work

ALIGNMENT = 8  # words of 8 bytes: 64 bytes, so that any load of a field's begin is aligned

# name: (number format, which number of the shape is its length)
FIELDS = {
    "token_ids": (np.int64, "num_tokens"),
    "positions": (np.int64, "num_tokens"),
    "slot_mapping": (np.int64, "num_tokens"),
    "cu_seqlens_q": (np.int32, "num_seqs + 1"),
    "seq_lens": (np.int32, "num_seqs"),
    "block_tables": (np.int32, "num_seqs * table_width"),
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
}
TORCH_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}
SAMPLING_FIELDS = list(FIELDS)[list(FIELDS).index("seeds") :]


@dataclass(frozen=True)
class BatchShape:
    """All that decides where things lie in the buffer."""

    num_tokens: int
    num_seqs: int
    num_sampled: int  # tokens after which one is sampled
    table_width: int  # blocks in the longest table

    def lengths(self) -> dict[str, int]:
        return vars(self) | {
            "num_seqs + 1": self.num_seqs + 1,
            "num_seqs * table_width": self.num_seqs * self.table_width,
        }

    def layout(self) -> tuple[dict[str, tuple[int, int]], int]:
        """(name -> first word and number of elements, words in all)."""
        lengths, places, begin = self.lengths(), {}, 0
        for name, (dtype, length) in FIELDS.items():
            places[name] = begin, lengths[length]
            words = -(-lengths[length] * np.dtype(dtype).itemsize // 8)
            begin += -(-words // ALIGNMENT) * ALIGNMENT
        return places, begin


class InputBuffers:
    """The buffer on the host and, where there is another device, there."""

    def __init__(self, largest: BatchShape, device: torch.device) -> None:
        self.shape: BatchShape | None = None  # of the last views
        _, size = largest.layout()
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu)
        self.device = torch.zeros_like(self.host, device=device) if on_gpu else self.host
        self.reader: Work | None = None  # the last step that reads them

    def wait(self) -> None:
        """Wait for the step that reads them: they may be written then."""
        if self.reader is not None:
            self.reader.wait()

    def views(
        self, shape: BatchShape
    ) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, torch.Tensor]]:
        """Where the host writes a batch of this shape, and what the device reads, by name. They are
        made anew when the shape is another than the last one: most decode steps have one."""
        if shape != self.shape:
            words, self.shape = self.host.numpy(), shape
            arrays, tensors = self.last_views = {}, {}
            for name, (begin, length) in shape.layout()[0].items():
                dtype, _ = FIELDS[name]
                arrays[name] = words[begin:].view(dtype)[:length]
                tensors[name] = self.device[begin:].view(TORCH_DTYPES[dtype])[:length]
        return self.last_views

    def copy_to_device(self, shape: BatchShape) -> None:
        """One copy, and none where the host is the device."""
        if self.device is not self.host:
            _, size = shape.layout()
            self.device[:size].copy_(self.host[:size], non_blocking=True)
