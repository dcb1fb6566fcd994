"""Weights read by name, whole or in part: a rank reads its own slice of a tensor, and no more.

A slice is read out of the file's range; of the rest not a byte is. Weights that are made up
(`random:<preset>`) are drawn whole, one tensor at a time, and cut.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.kernels.quantized import QuantizedWeight
from common.models.checkpoint import is_random, load_config, random_tensors
from common.models.errors import ModelError
from common.models.weight_files import Header, read_headers
from common.models.weights import weight_headers

Part = tuple[slice, ...]


class WeightSource:
    """A model's weights by the names that a whole model has."""

    def __init__(self, readers: dict[str, Callable[[Part], torch.Tensor]], shapes: dict[str, Any]):
        self.readers, self.shapes = readers, shapes

    @property
    def names(self) -> set[str]:
        return set(self.readers)

    def is_quantized(self, name: str) -> bool:
        """Whether the checkpoint has this weight as codes and scales."""
        return False

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """A whole weight as codes and scales; None where the checkpoint has it in plain numbers."""
        return None

    def read(self, name: str, shape: tuple[int, ...], part: Part = ()) -> torch.Tensor:
        """A tensor, or the part of it, in its own dtype. Raises ModelError unless it is there,
        numbers, and as a whole of that shape."""
        if name not in self.readers:
            raise ModelError(f"the checkpoint lacks {name}")
        found = self.shapes[name]
        if isinstance(found, str):
            raise ModelError(f"the checkpoint has {name} as {found}, not floating-point numbers")
        if tuple(found) != shape:
            raise ModelError(f"the checkpoint has {name} as {list(found)}, not {list(shape)}")
        return self.readers[name](part)


def open_weights(
    folder: Path, device: str | torch.device = "cpu", quantized: bool = False
) -> WeightSource:
    """The weights of a model's folder, to be read to the device. Raises ModelError.

    On the CPU a tensor or a part of one is a view of the mapped file: what is not used is not read.
    """
    if is_random(folder):
        draws = random_tensors(folder, torch.device(device))
        shapes: dict[str, Any] = {name: shape for name, (shape, _) in draws.items()}
        return WeightSource({name: _cut(draw) for name, (_, draw) in draws.items()}, shapes)
    is_tied = getattr(load_config(folder), "tie_word_embeddings", False)
    files = _Files(device)
    chosen = weight_headers(read_headers(folder), is_tied)
    shapes = {n: h.shape if h.is_number else h.dtype for n, (_, h) in chosen.items()}
    readers = {n: files.reader(source, header) for n, (source, header) in chosen.items()}
    return WeightSource(readers, shapes)


def _cut(draw: Callable[[], torch.Tensor]) -> Callable[[Part], torch.Tensor]:
    return lambda part: draw()[part].clone() if part else draw()


def part_of(index: tuple[int | slice, ...], part: Part) -> tuple[int | slice, ...]:
    """The index of a part of what an index gives, whose slices have no end or a step of 1."""
    places = [place for place in index if isinstance(place, slice)]
    number = max(len(part), len(places))
    inner = [*part, *[slice(None)] * (number - len(part))]
    for i, place in enumerate(places):
        begin = place.start or 0
        end = place.stop if inner[i].stop is None else begin + inner[i].stop
        inner[i] = slice(begin + (inner[i].start or 0), end)
    return (*[place for place in index if isinstance(place, int)], *inner)


class _Files:
    """The safetensors files of a model, each opened when it is first read."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = str(device)
        self.open: dict[Path, Any] = {}

    def reader(self, name: str, header: Header) -> Callable[[Part], torch.Tensor]:
        def read(part: Part) -> torch.Tensor:
            from safetensors import SafetensorError, safe_open

            try:
                if header.path not in self.open:
                    file = safe_open(header.path, framework="pt", device=self.device)
                    self.open[header.path] = file.__enter__()
                file, source = self.open[header.path], header.source or name
                index = part_of(header.index, part)
                return file.get_slice(source)[index] if index else file.get_tensor(source)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{header.path} cannot be read: {error}") from error

        return read
