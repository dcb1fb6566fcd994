"""Many small arrays in one piece of memory, which reaches a GPU in one copy.

Made one by one, the tensors of a step's input cost as many copies, and each copy to a GPU takes
longer than the bytes in it. Here they are views of one buffer: written on the host as arrays, copied
once, read on the device as tensors. A field lies at one place, however many entries it has at a
time: work that is launched again and again finds its input where it was.
"""

from typing import Any, Protocol

import numpy as np
import torch

ALIGNMENT = 8  # words of 8 bytes: 64 bytes, so that any load of a field's begin is aligned
TORCH_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}

Arrays = dict[str, np.ndarray[Any, Any]]
Tensors = dict[str, torch.Tensor]
Lengths = dict[str, int]  # name of a field -> number of entries


class Reader(Protocol):
    def wait(self) -> None:
        """Until it has read."""


class Layout:
    """Where fields begin, with room for so many entries of each."""

    def __init__(self, formats: dict[str, type], capacity: Lengths) -> None:
        self.formats, self.capacity = formats, capacity
        self.begins: dict[str, int] = {}
        self.num_words = 0  # of 8 bytes
        for name, dtype in formats.items():
            self.begins[name] = self.num_words
            words = -(-capacity[name] * np.dtype(dtype).itemsize // 8)
            self.num_words += -(-words // ALIGNMENT) * ALIGNMENT

    def holds(self, lengths: Lengths) -> bool:
        return all(lengths[name] <= most for name, most in self.capacity.items())

    def num_words_of(self, lengths: Lengths) -> int:
        """Up to the last entry of the last field."""
        name, begin = list(self.begins.items())[-1]
        return begin + -(-lengths[name] * np.dtype(self.formats[name]).itemsize // 8)


class PackedBuffers:
    """Buffers on the host, in turns, since work in flight may yet read the others; and one on the
    GPU, where one piece of work runs after the other. On a CPU the host's are the device's.
    """

    def __init__(
        self,
        formats: dict[str, type],
        capacities: list[Lengths],
        device: torch.device,
        num_hosts: int = 2,
    ) -> None:
        """formats: of each field, a numpy type. capacities: from small to large; fields lie where
        the first that holds them has their places, so that small ones do not copy the room of large
        ones. Nor is the empty rest of the last field copied."""
        self.formats = formats
        self.layouts = [Layout(formats, capacity) for capacity in capacities]
        size, on_gpu = self.layouts[-1].num_words, device.type == "cuda"
        self.hosts = [
            torch.zeros(size, dtype=torch.int64, pin_memory=on_gpu) for _ in range(num_hosts)
        ]
        self.device = torch.zeros(size, dtype=torch.int64, device=device) if on_gpu else None
        self.readers: list[Reader | None] = [None] * num_hosts
        self.last: list[Any] = [None] * num_hosts  # (layout, lengths, arrays, tensors)
        self.turn = 0

    @property
    def num_bytes(self) -> int:
        """On the host and on the device."""
        tensors = [*self.hosts, *([] if self.device is None else [self.device])]
        return sum(tensor.nbytes for tensor in tensors)

    def next(self, lengths: Lengths) -> tuple[Arrays, Tensors]:
        """Where the host writes so many entries of each field, and what the device reads, by name.

        Waits for the work that reads the buffer. A view is made anew when its length is another
        than the last time: most steps of decoding have the same. Raises ValueError.
        """
        self.turn = (self.turn + 1) % len(self.hosts)
        if (reader := self.readers[self.turn]) is not None:
            reader.wait()
        layout = next((layout for layout in self.layouts if layout.holds(lengths)), None)
        if layout is None:
            raise ValueError(f"no buffer has room for {lengths}")
        arrays, tensors, before = {}, {}, {}
        if (last := self.last[self.turn]) is not None and last[0] is layout:
            _, before, arrays, tensors = last
        for name, length in lengths.items():
            if before.get(name) != length:
                arrays[name], tensors[name] = self.views(name, layout.begins[name], length)
        self.last[self.turn] = layout, lengths, arrays, tensors
        return arrays, tensors

    def views(
        self, name: str, begin: int, length: int
    ) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        """A field on the host and on the device."""
        dtype, host = self.formats[name], self.hosts[self.turn]
        device = host if self.device is None else self.device
        tensor = device[begin:].view(TORCH_DTYPES[dtype])[:length]
        return host.numpy()[begin:].view(dtype)[:length], tensor

    def copy_to_device(self) -> None:
        """One copy, and none where the host is the device."""
        if self.device is not None:
            layout, lengths, *_ = self.last[self.turn]
            size = layout.num_words_of(lengths)
            self.device[:size].copy_(self.hosts[self.turn][:size], non_blocking=True)

    def read_by(self, work: Reader) -> None:
        """What was written last is read by this work."""
        self.readers[self.turn] = work
