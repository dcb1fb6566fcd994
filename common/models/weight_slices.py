"""Weights read by name, whole or in part: a rank reads its own slice of a tensor, and no more.

A slice is read out of the file's range; of the rest not a byte is. Weights that are made up
(`random:<preset>`) are drawn whole, one tensor at a time, and cut.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.kernels.quantized import QuantizedWeight
from common.models.checkpoint import is_random, load_config, random_tensors
from common.models.errors import ModelError
from common.models.quantized_config import read_quantization
from common.models.quantized_readers import Reader, quantized_modules
from common.models.quantized_stored import stored_weights
from common.models.weight_files import Header, read_headers
from common.models.weights import weight_headers

Part = tuple[slice, ...]


class WeightSource:
    """A model's weights by the names that a whole model has."""

    def __init__(
        self,
        readers: dict[str, Callable[[Part], torch.Tensor]],
        shapes: dict[str, Any],
        quantized: dict[str, Reader] | None = None,
        device: str | torch.device = "cpu",
        notes: tuple[str, ...] = (),
    ):
        """quantized: what reads the weights that are codes and scales, by the same names. notes:
        what is not done as the checkpoint's config has it, in words."""
        self.readers, self.shapes = readers, shapes
        self.quantized_readers, self.device, self.notes = quantized or {}, device, notes

    @property
    def names(self) -> set[str]:
        return self.readers.keys() | self.quantized_readers.keys()

    def read(self, name: str, shape: tuple[int, ...], part: Part = ()) -> torch.Tensor:
        """A tensor, or the part of it, in its own dtype. Raises ModelError unless it is there,
        numbers, and as a whole of that shape."""
        if name in self.quantized_readers:
            raise ModelError(f"the checkpoint has {name} quantised, not as floating-point numbers")
        if name not in self.readers:
            raise ModelError(f"the checkpoint lacks {name}")
        found = self.shapes[name]
        if isinstance(found, str):
            raise ModelError(f"the checkpoint has {name} as {found}, not floating-point numbers")
        if tuple(found) != shape:
            raise ModelError(f"the checkpoint has {name} as {list(found)}, not {list(shape)}")
        return self.readers[name](part)

    def is_quantized(self, name: str) -> bool:
        """Whether the checkpoint has this weight as codes and scales."""
        return name in self.quantized_readers

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """The whole weight, [out_features, in_features], on the device; None where the checkpoint
        has it in plain numbers. Raises ModelError unless it is there, of that shape, and sound."""
        if name in self.quantized_readers:
            weight = self.quantized_readers[name](shape)
            moved = {field: tensor.to(self.device) for field, tensor in weight.tensors.items()}
            return replace(weight, **moved)
        if name not in self.readers:
            raise ModelError(f"the checkpoint lacks {name}")
        return None


def open_weights(
    folder: Path, device: str | torch.device = "cpu", quantized: bool = False
) -> WeightSource:
    """The weights of a model's folder, to be read to the device. Raises ModelError.

    On the CPU a tensor or a part of one is a view of the mapped file: what is not used is not read.
    quantized: whether weights may be codes and scales; else such a checkpoint is refused.
    """
    if is_random(folder):
        draws = random_tensors(folder, torch.device(device))
        shapes: dict[str, Any] = {name: shape for name, (shape, _) in draws.items()}
        return WeightSource({name: _cut(draw) for name, (_, draw) in draws.items()}, shapes)
    is_tied = getattr(load_config(folder, quantized), "tie_word_embeddings", False)
    quantization = read_quantization(folder) if quantized else None
    headers, files = read_headers(folder), Files(device)
    coded: dict[str, Reader] = {}
    if quantization is not None:
        read = Files("cpu").read  # values are looked at there
        if quantization.method == "gguf":
            coded, headers = stored_weights(folder, headers, read)
        else:
            coded, headers = quantized_modules(headers, quantization, read)
    chosen = weight_headers(headers, is_tied)
    twice = sorted(chosen.keys() & coded.keys())
    if twice:
        raise ModelError(f"the checkpoint has {twice[0]!r:.120} twice")
    shapes = {n: h.shape if h.is_number else h.dtype for n, (_, h) in chosen.items()}
    readers = {n: files.reader(source, header) for n, (source, header) in chosen.items()}
    notes = quantization.notes if quantization else ()
    return WeightSource(readers, shapes, coded, device, notes)


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


class Files:
    """The safetensors files of a model, each opened when it is first read."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = str(device)
        self.open: dict[Path, Any] = {}

    def reader(self, name: str, header: Header) -> Callable[[Part], torch.Tensor]:
        return lambda part: self.read(name, header, part)

    def read(self, name: str, header: Header, part: Part = ()) -> torch.Tensor:
        """A tensor, or the part of it, by its name in the file. Raises ModelError."""
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
