"""Memory of a KV cache that another process of this host can read: a memfd, without any name.

A segment under /dev/shm has a name that can be guessed, listed, opened by every process of the user,
and left behind by a process that is killed; mode 0600 mends none of it. A memfd is in no directory.
A peer gets a descriptor, read-only, after it has proved that it knows the secret, and the memory is gone
with the last process that maps it. Seals keep its size: memory that shrinks would kill its readers.
"""

import fcntl
import math
import mmap
import os

import numpy as np
import torch
from torch import Tensor

SEALS = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_SEAL")


def is_available() -> bool:
    """Whether this system has memory without a name."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


def allocate_shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU in a memfd of its own, every page taken at once. `descriptor_of` has
    the descriptor; it lives as long as this tensor object, and views of it keep the memory only.
    Raises ValueError."""
    if not is_available():
        raise ValueError("kv_transfer is shm: this system has no memory without a name (Linux has)")
    size = math.prod(shape) * dtype.itemsize
    descriptor = os.memfd_create("kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(
            descriptor, 0, size
        )  # fails here, not with SIGBUS in the middle of a step
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
        data = mmap.mmap(descriptor, size)
        readable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        gib = size / (1 << 30)
        raise ValueError(f"no shared memory for {gib:.1f} GiB of KV cache: {error}") from error
    finally:
        os.close(descriptor)
    tensor = torch.frombuffer(data, dtype=dtype).view(shape)
    tensor.shared_memory = Descriptor(readable)  # type: ignore[attr-defined]
    return tensor


class Descriptor:
    """Closed when nobody has it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def descriptor_of(tensor: Tensor) -> int:
    """Of the memory of a tensor from `allocate_shared`; read-only, to be handed to a peer. Raises
    ValueError for other tensors."""
    descriptor = getattr(tensor, "shared_memory", None)
    if descriptor is None:
        raise ValueError("kv_transfer is shm: the KV cache does not lie in shared memory")
    return descriptor.number


def map_shared(descriptor: int, size: int) -> np.ndarray:
    """A peer's memory, uint8 [size], read-only. Closes the descriptor. Raises ValueError for memory that
    is smaller or could shrink while it is read, which would end this process with SIGBUS."""
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _seals() != _seals():
            raise ValueError("the peer's memory is not sealed: it could shrink while it is read")
        length = os.fstat(descriptor).st_size
        if size == 0 or length != size:
            raise ValueError(f"the peer's memory has {length} bytes, not {size}")
        return np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype=np.uint8)
    except OSError as error:
        raise ValueError(f"the peer's memory cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)


def _seals() -> int:
    return sum(getattr(fcntl, name) for name in SEALS)
