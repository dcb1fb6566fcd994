"""Tensors of a quantised module, checked before a kernel sees them.

A file's header says types and shapes, and each is compared with what the layout asks for before the
tensor is read. Then come the values: a scale that is not finite, or a group that does not exist, would
be found late, in tokens that are noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.kernels.quantized import E2M1, TABLES, QuantizedWeight
from common.models.errors import ModelError
from common.models.weight_files import Header

FLOATS = ("F16", "BF16", "F32")
PIECE = 1 << 22  # codes that are looked at at a time
LARGEST_CODE = {"int8": 128.0, "fp8_e4m3": 448.0, "fp4_e2m1": E2M1[-1]} | {
    kind: max(map(abs, TABLES[kind])) for kind in ("int4", "uint4", "nf4")
}


@dataclass(frozen=True)
class Module:
    """The tensors of a quantised module by their last word, read when asked for."""

    name: str  # in its files
    headers: dict[str, Header]
    read: Callable[[str, Header], Tensor]  # by the name in the file

    def has(self, word: str) -> bool:
        return word in self.headers

    def header(self, word: str) -> Header:
        """Raises ModelError where there is none."""
        if word not in self.headers:
            raise ModelError(f"the checkpoint lacks {self.name}.{word}")
        return self.headers[word]

    def take(self, word: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Tensor:
        """A tensor of one of the types, as safetensors names them, and one of the shapes.

        Raises ModelError.
        """
        header = self.header(word)
        if header.dtype not in dtypes or header.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise self.fail(
                word,
                f"is {header.dtype} {list(header.shape)!s:.60}, not {' or '.join(dtypes)} {expected}",
            )
        return self.read(f"{self.name}.{word}", header)

    def fail(self, word: str, problem: str) -> ModelError:
        return ModelError(f"{self.header(word).path}: {self.name:.120}.{word} {problem}")

    def finite(self, word: str, scales: Tensor) -> Tensor:
        """Scales that are numbers. Zero is one (of a group of zeros), and so are negative ones."""
        values = scales.float()
        if not values.isfinite().all():
            bad = values[~values.isfinite()].flatten()[0].item()
            raise self.fail(word, f"has the scale {bad}")
        return scales

    def fp8(self, word: str, codes: Tensor) -> Tensor:
        """E4M3 codes without its NaN, 0x7F and 0xFF."""
        flat = codes.view(torch.uint8).flatten()
        if any(((piece & 0x7F) == 0x7F).any() for piece in flat.split(PIECE)):
            raise self.fail(word, "has an E4M3 code that is not a number")
        return codes

    def order(self, word: str, groups: int, in_features: int) -> Tensor | None:
        """The inputs group by group, from the group of each; None where they are so already."""
        index = self.take(word, ("I32", "I64"), (in_features,)).long()
        size = in_features // groups
        low, high = index.min().item(), index.max().item()
        if low < 0 or high >= groups:
            bad = low if low < 0 else high
            raise self.fail(word, f"has the group {bad}, of {groups}")
        counts = index.bincount(minlength=groups)
        if not (counts == size).all():
            group = (counts != size).nonzero()[0].item()
            found = counts[group].item()
            raise self.fail(word, f"has {found} inputs in group {group}, not {size}")
        if torch.equal(index, torch.arange(in_features) // size):
            return None
        return index.argsort(stable=True)


def build(module: Module, word: str, weight: Callable[[], QuantizedWeight]) -> QuantizedWeight:
    """The weight, none of whose values overflows. Raises ModelError, naming the tensor `word`."""
    try:
        built = weight()
    except ValueError as error:
        raise module.fail(word, f"cannot be read: {error}") from error
    largest = built.scales.float().abs().amax() * LARGEST_CODE[built.kind]
    if built.row_scales is not None:
        largest = largest * built.row_scales.abs().amax()
    if built.minimums is not None:
        largest = largest + built.minimums.float().abs().amax()
    if not largest.isfinite():
        raise module.fail(word, "has scales whose products are not finite numbers")
    return built
