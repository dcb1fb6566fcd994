"""What a process holds of the machine's memory, and what of it can be dropped without a word.

Linux counts two kinds of pages as a process's own (its resident set). Anonymous ones hold what exists
nowhere else: without swap they stay until the process lets go of them. Those of files, such as the
code of libraries or a mapped checkpoint, can be read again; the system takes them when it is short.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

MAPS = Path("/proc/self/smaps")
LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)\s*(.*)")
CHECKPOINT = ".safetensors"  # mapped as writable, and never written to

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass
class Mapping:
    """A piece of the address space, as Linux lists it."""

    begin: int
    end: int
    flags: str  # such as `r-xp`: may be read, run; private
    path: str  # of the file; empty for anonymous memory
    anonymous: int = 0  # bytes that the file does not have

    @property
    def is_shared(self) -> bool:
        return self.flags[3] == "s"

    @property
    def is_in_file(self) -> bool:
        """Whether all of it can be read again from a file."""
        is_file = self.path.startswith("/") and not self.path.startswith("/dev/")
        return is_file and not self.is_shared and not self.anonymous

    @property
    def is_constant(self) -> bool:
        """Whether nobody is about to write to it."""
        return "w" not in self.flags or self.path.endswith(CHECKPOINT)


def mappings() -> list[Mapping]:
    """Of this process, in order of their addresses. Empty where Linux is not."""
    found: list[Mapping] = []
    if not MAPS.exists():
        return found
    for line in MAPS.read_text().splitlines():
        if match := LINE.fullmatch(line):
            begin, end, flags, inode, path = match.groups()
            found.append(Mapping(int(begin, 16), int(end, 16), flags, path if int(inode) else ""))
        elif line.startswith("Anonymous:"):
            found[-1].anonymous = int(line.split()[1]) * 1024
    return found


def advise(begin: int, end: int, advice: int) -> None:
    """Tell Linux what becomes of whole pages. Raises OSError."""
    if _libc.madvise(begin, end - begin, advice) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"madvise({begin:#x}, {end - begin}): {os.strerror(number)}")


def release_unused() -> None:
    """Give back what the process holds and does not use: garbage, free pieces of the heap, idle memory
    of a GPU's allocators, and pages that a file has as well.

    The last are read again when they are needed, mostly from the system's cache of files.
    """
    gc.collect()
    if hasattr(_libc, "malloc_trim"):  # of glibc
        _libc.malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    for mapping in mappings():
        # Between the look at a page and its release another thread could write to it: then what it
        # wrote would be lost. So only where nobody can.
        if mapping.is_in_file and mapping.is_constant:
            with contextlib.suppress(OSError):  # it is locked, or gone by now
                advise(mapping.begin, mapping.end, mmap.MADV_DONTNEED)


def held_bytes(device: torch.device) -> int:
    """What this process holds: of a GPU's memory, or of the machine's, 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024
