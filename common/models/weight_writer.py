"""Safetensors files written tensor by tensor: no more of a model than one tensor is in memory.

A file's header says where each tensor lies, and is not known before the last one is. So room for it
is left at the file's beginning, and what it does not need is filled with spaces, as the format allows.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from common.models.weight_files import INDEX, WHOLE

HEADER_BYTES = (1 << 20) - 8  # of each file, after the 8 that hold this number
LONGEST_ENTRY = 512  # bytes of it that a tensor takes at most
PADDING = "padding."  # begins the name of what lies between two tensors: the format knows no holes
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
}


class WeightWriter:
    """A model's weights, in files of about `shard_bytes`; one file without an index if they fit.

    A context: the index and the files' final names are there after it has ended without an error.
    alignment: bytes, of where a tensor begins in its file. Raises OSError.
    """

    def __init__(self, folder: Path, shard_bytes: int, alignment: int = 1) -> None:
        self.folder, self.shard_bytes, self.alignment = folder, shard_bytes, alignment
        self.shards: list[list[str]] = []  # the names of each one's tensors
        self.num_bytes = 0
        self.file: BinaryIO | None = None
        self.entries: dict[str, dict[str, object]] = {}  # of the open file
        self.end = 0  # of its data

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor. Names are shorter than 400 bytes."""
        is_full = self.end and self.end + tensor.nbytes > self.shard_bytes
        if is_full or (len(self.entries) + 2) * LONGEST_ENTRY > HEADER_BYTES:
            self.close_shard()
        padding = -self.end % self.alignment
        if padding:
            self.append(f"{PADDING}{self.end}", torch.zeros(padding, dtype=torch.uint8))
        self.append(name, tensor)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor where the last one ended."""
        if self.file is None:
            self.file = self.path(len(self.shards)).open("wb")
            self.file.seek(8 + HEADER_BYTES)
        self.file.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
        self.entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.end, self.end + tensor.nbytes],
        }
        self.end += tensor.nbytes
        self.num_bytes += tensor.nbytes

    def close_shard(self) -> None:
        """Write the open file's header."""
        if self.file is None:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}).encode()
        assert len(header) <= HEADER_BYTES, (len(header), len(self.entries))
        self.file.seek(0)
        self.file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))
        self.file.close()
        self.shards.append(list(self.entries))
        self.file, self.entries, self.end = None, {}, 0

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}.safetensors"

    def __enter__(self) -> "WeightWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            if self.file is not None:
                self.file.close()
            return
        self.close_shard()
        count = len(self.shards)
        if count == 1:
            self.path(0).rename(self.folder / WHOLE)
            return
        files = {}
        for shard, names in enumerate(self.shards):
            name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
            self.path(shard).rename(self.folder / name)
            files |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": files}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))
