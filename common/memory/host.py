"""Memory of tensors on a CPU: the pages go, the addresses stay.

Weights that kernels know by their addresses need not be told. Only whole pages can go, so what lies
at the edges of a tensor stays where it is.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from common.memory.files import open_unnamed
from common.memory.process import Mapping, advise, mappings

PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Piece:
    """Whole pages in one mapping."""

    begin: int
    end: int
    is_shared: bool
    is_in_file: bool  # which has the same bytes: no copy is needed

    @property
    def array(self) -> np.ndarray:
        memory = (ctypes.c_uint8 * (self.end - self.begin)).from_address(self.begin)
        return np.frombuffer(memory, np.uint8)


class HostMemory:
    """See `Memory`. What is saved goes to a file on disk that has no name."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [
            tensor for tensor in tensors if tensor.is_contiguous()
        ]  # they own the memory
        self.pieces: list[Piece] = []
        self.file: int | None = None

    @property
    def num_bytes(self) -> int:
        """How much can be given back."""
        return sum(piece.end - piece.begin for piece in self.find())

    def find(self) -> list[Piece]:
        """The pieces as they are now: a tensor may have been written to."""
        extents = merged((t.data_ptr(), t.data_ptr() + t.nbytes) for t in self.tensors)
        return list(cut(extents, mappings()))

    def save(self) -> None:
        self.forget()
        pieces = self.find()
        kept = [piece for piece in pieces if not piece.is_in_file]
        file = open_unnamed(sum(piece.end - piece.begin for piece in kept))
        try:
            for piece in kept:
                write_all(file, piece.array)
        except BaseException:
            os.close(file)
            raise
        self.file, self.pieces = file, kept

    def discard(self) -> None:
        for piece in self.find():
            # Memory that processes share stays with the others unless it is freed for all of them.
            advice = mmap.MADV_REMOVE if piece.is_shared else mmap.MADV_DONTNEED
            advise(piece.begin, piece.end, advice)

    def restore(self) -> None:
        """Without a copy there is nothing to do: Linux gives zeros where a page is missing."""
        if self.file is not None:
            place = 0
            for piece in self.pieces:
                place += read_all(self.file, piece.array, place)
            self.forget()

    def forget(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file, self.pieces = None, []


def merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of addresses in order, those that touch or overlap as one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(extents):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def cut(extents: list[tuple[int, int]], known: list[Mapping]) -> Iterable[Piece]:
    """The whole pages of ranges, cut where mappings end. Both are in order of addresses."""
    place = 0
    for begin, end in extents:
        begin, end = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        while place < len(known) and known[place].end <= begin:
            place += 1
        for mapping in known[place:]:
            if mapping.begin >= end:
                break
            first, last = max(begin, mapping.begin), min(end, mapping.end)
            if first < last:
                yield Piece(first, last, mapping.is_shared, mapping.is_in_file)


def write_all(file: int, data: np.ndarray) -> None:
    """Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left[: 1 << 30]) :]


def read_all(file: int, into: np.ndarray, place: int) -> int:
    """Returns how much was read: all that there is room for. Raises OSError."""
    done = 0
    while done < len(into):
        count = os.preadv(file, [memoryview(into)[done : done + (1 << 30)]], place + done)
        if count == 0:
            raise OSError("the file with the weights is shorter than it was")
        done += count
    return done
