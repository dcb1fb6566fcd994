"""Many small arrays in one piece of memory.

Each begins at a place of its own, however many entries it has at a time: work that is launched again
and again finds its input where it was.
"""

from typing import Any

import numpy as np
import torch

ALIGNMENT = 8  # words of 8 bytes: 64 bytes, so that any load of a field's begin is aligned
TORCH_DTYPES = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}

Arrays = dict[str, np.ndarray[Any, Any]]
Tensors = dict[str, torch.Tensor]
Lengths = dict[str, int]  # name of a field -> number of entries


class Layout:
    """Where fields begin, with room for so many entries of each."""

    def __init__(self, formats: dict[str, type], capacity: Lengths) -> None:
        self.formats, self.capacity = formats, capacity
        self.begins: dict[str, int] = {}
        self.num_words = 0  # of 8 bytes
        for name in formats:
            self.begins[name] = self.num_words
            words = self.words_of(name, capacity[name])
            self.num_words += -(-words // ALIGNMENT) * ALIGNMENT

    def words_of(self, name: str, length: int) -> int:
        return -(-length * np.dtype(self.formats[name]).itemsize // 8)

    def holds(self, lengths: Lengths) -> bool:
        return all(lengths[name] <= most for name, most in self.capacity.items())


class PackedFields:
    """A piece of memory on one device, and the fields in it."""

    def __init__(
        self,
        formats: dict[str, type],
        capacities: list[Lengths],
        device: torch.device,
        pin_memory: bool = False,
    ) -> None:
        """formats: of each field, a numpy type. capacities: from small to large; fields lie where
        the first that holds them has their places, so that little is in a small piece."""
        self.layouts = [Layout(formats, capacity) for capacity in capacities]
        size = self.layouts[-1].num_words
        self.words = torch.zeros(size, dtype=torch.int64, device=device, pin_memory=pin_memory)
        # For which layout and lengths the views were made.
        self.layout, self.lengths, self.views = self.layouts[-1], Lengths(), Tensors()
        self.array_views: tuple[Lengths, Arrays] = Lengths(), Arrays()

    def tensors(self, lengths: Lengths) -> Tensors:
        """The fields with so many entries each. A view is made anew when its length is another than
        the last time: most steps of decoding have the same. Raises ValueError."""
        if lengths == self.lengths:
            return self.views
        layout = next((layout for layout in self.layouts if layout.holds(lengths)), None)
        if layout is None:
            raise ValueError(f"there is no room for {lengths}")
        known = self.lengths if layout is self.layout else {}
        for name, length in lengths.items():
            if known.get(name) != length:
                field = self.words[layout.begins[name] :].view(TORCH_DTYPES[layout.formats[name]])
                self.views[name] = field[:length]
        self.layout, self.lengths = layout, lengths
        return self.views

    def arrays(self, lengths: Lengths) -> Arrays:
        """The same, of a piece on the host."""
        tensors = self.tensors(lengths)
        if lengths != self.array_views[0]:
            self.array_views = lengths, {name: field.numpy() for name, field in tensors.items()}
        return self.array_views[1]

    def piece(self, lengths: Lengths) -> torch.Tensor:
        """The memory up to the last field's last entry, so that its empty rest is not copied. For
        the lengths that were asked for last."""
        name = list(lengths)[-1]
        return self.words[: self.layout.begins[name] + self.layout.words_of(name, lengths[name])]
