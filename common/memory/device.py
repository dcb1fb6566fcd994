"""Memory of tensors on a GPU: their storages become empty, and get memory again, at other addresses."""

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage


class DeviceMemory:
    """See `Memory`. What is saved goes to pinned memory of the host, from which a copy is fastest."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = (tensor.untyped_storage() for tensor in tensors)
        self.storages: dict[UntypedStorage, int] = {}  # with their bytes
        known: set[int] = set()
        for storage in storages:  # tensors may share one
            if storage._cdata not in known and storage.nbytes():
                known.add(storage._cdata)
                self.storages[storage] = storage.nbytes()
        self.copies: list[Tensor] | None = None
        self.is_there = True

    @property
    def num_bytes(self) -> int:
        """How much can be given back."""
        return sum(self.storages.values())

    def save(self) -> None:
        self.forget()
        copies = []
        for storage, size in self.storages.items():
            is_pinned = storage.device.type == "cuda"
            copies.append(torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned))
            copies[-1].copy_(as_bytes(storage), non_blocking=is_pinned)
        synchronize()
        self.copies = copies

    def discard(self) -> None:
        synchronize()  # nothing that was launched reads it any more
        self.is_there = False
        for storage in self.storages:
            storage.resize_(0)

    def restore(self) -> None:
        if self.is_there:
            return
        for storage, size in self.storages.items():
            if storage.nbytes() != size:
                storage.resize_(size)
        for i, storage in enumerate(self.storages):
            if self.copies is None:
                as_bytes(storage).zero_()
            else:
                as_bytes(storage).copy_(self.copies[i], non_blocking=True)
        synchronize()
        self.is_there = True
        self.forget()

    def forget(self) -> None:
        self.copies = None


def as_bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
