"""What a GGUF file says of itself: values and tensors, each checked against the file's end.

The layout is ggml's (docs/gguf.md): magic, version, counts, key-value pairs, a description of each
tensor, and the tensors' data, all little-endian. A file is a stranger's. No number of it is used as a
size before it is seen to fit what is left of the file, so that nothing is read past the end and no list
is longer than the file. Arrays (a tokenizer's words) are walked over and not kept.
"""

import itertools
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.models.errors import ModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
# By number: struct's letter for a value. 8 is text, 9 an array.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
LONGEST_KEY, LONGEST_NAME, LONGEST_TEXT = 1 << 16, 256, 1 << 24  # bytes; a template is text
LARGEST_ALIGNMENT = 1 << 16
# (name, elements in a block, bytes of a block) by number, of the types that are read.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
OTHERS = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
OTHERS |= {15: "Q8_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in the file. shape: as PyTorch has it, the dimension that lies together last."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int  # bytes in the file
    end: int


@dataclass(frozen=True)
class GGUFHeader:
    """values: those that are numbers or text, by key."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Raises ModelError with the file and what is wrong."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read as GGUF: {error}") from error


class _Reader:
    """A place in the file, moved on by what is read."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size, self.place = path, data, len(data), 0

    def fail(self, problem: str) -> ModelError:
        return ModelError(f"{self.path} is no GGUF file that can be read: {problem}")

    def take(self, length: int, what: str) -> bytes:
        self.skip(length, what)
        return self.data[self.place - length : self.place]

    def skip(self, length: int, what: str) -> None:
        if length > self.size - self.place:
            left = self.size - self.place
            raise self.fail(f"{what} is of {length} bytes, with {left} left")
        self.place += length

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q", what)
        if length > longest:
            raise self.fail(f"{what} is of {length} bytes; expected up to {longest}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8") from error

    def count(self, what: str, smallest: int) -> int:
        """A number of things that each take at least so many bytes."""
        found = self.number("Q", what)
        if found > (self.size - self.place) // smallest:
            left = self.size - self.place
            raise self.fail(f"{what} is {found}, with {left} bytes left")
        return found

    def header(self) -> GGUFHeader:
        if self.take(4, "the magic") != MAGIC:
            raise self.fail("it does not begin with GGUF")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            raise self.fail(f"its version is {version}; expected 2 or 3")
        num_tensors = self.count("the number of tensors", 8 + 1 + 4 + 8 + 4 + 8)
        num_values = self.count("the number of values", 8 + 1 + 4 + 1)
        values = self.values(num_values)
        alignment = values.get("general.alignment", 32)
        is_right = type(alignment) is int and 8 <= alignment <= LARGEST_ALIGNMENT
        if not is_right or alignment & (alignment - 1):
            raise self.fail(
                f"general.alignment is {alignment!r:.40}; expected a power of 2 from 8 to"
                f" {LARGEST_ALIGNMENT}"
            )
        found = [self.tensor() for _ in range(num_tensors)]
        begin = -(-self.place // alignment) * alignment
        return GGUFHeader(self.path, values, self.placed(found, begin, alignment))

    def values(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(LONGEST_KEY, "a key")
            if key in values:
                raise self.fail(f"it has {key!r:.120} twice")
            values[key] = self.value(key)
        return {key: value for key, value in values.items() if value is not None}

    def value(self, key: str) -> Any:
        """A number or text; None for an array, which is walked over."""
        key = f"{key!r:.120}"  # for messages
        kind = self.number("I", key)
        if kind == TEXT:
            return self.text(LONGEST_TEXT, key)
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], key)
        if kind != ARRAY:
            raise self.fail(f"{key} is of type {kind}")
        kind = self.number("I", key)
        if kind in NUMBERS:
            size = struct.calcsize(f"<{NUMBERS[kind]}")
            self.skip(self.count(key, size) * size, key)
        elif kind == TEXT:
            for _ in range(self.count(key, 8)):
                self.skip(self.number("Q", key), key)
        else:
            raise self.fail(f"{key} is an array of type {kind}")
        return None

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, dimensions and offset, as they are written."""
        name = self.text(LONGEST_NAME, "a tensor's name")
        what = f"{name!r:.120}"
        rank = self.number("I", what)
        if not 1 <= rank <= 4:
            raise self.fail(f"{what} has {rank} dimensions; expected 1 to 4")
        shape = tuple(self.number("Q", what) for _ in range(rank))
        return name, self.number("I", what), shape, self.number("Q", what)

    def placed(
        self, found: list[tuple[str, int, tuple[int, ...], int]], begin: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        """The tensors by name, each within the file and apart from the others."""
        tensors: dict[str, GGUFTensor] = {}
        for name, number, dimensions, offset in found:
            if name in tensors:
                raise self.fail(f"it has the tensor {name!r:.120} twice")
            size, kind = 1, TYPES.get(number)
            if kind is None:
                kind = (OTHERS.get(number, f"type {number}"), 1, 0)
            for dimension in dimensions:
                size *= dimension
                if not 1 <= size <= self.size * 8:
                    raise self.fail(f"{name!r:.120} is {list(dimensions)}")
            if dimensions[0] % kind[1]:
                raise self.fail(f"{name!r:.120} is {list(dimensions)}, not blocks of {kind[1]}")
            start = begin + offset
            end = start + size // kind[1] * kind[2]
            if offset % alignment or end > self.size:
                raise self.fail(
                    f"{name!r:.120} lies at {offset}, to byte {end} of {self.size}, with an alignment"
                    f" of {alignment}"
                )
            tensors[name] = GGUFTensor(name, kind[0], dimensions[::-1], start, end)
        in_order = sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end))
        for first, second in itertools.pairwise(in_order):
            if second.begin < first.end:
                raise self.fail(f"{first.name!r:.120} and {second.name!r:.120} overlap")
        return tensors
