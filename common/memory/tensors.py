"""Which tensors an object holds, and their memory as a thing of its own."""

from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from common.memory.device import DeviceMemory
from common.memory.host import HostMemory


class Memory(Protocol):
    """The memory of some tensors, which remain; what they hold is undefined between `discard` and
    `restore`."""

    def save(self) -> None:
        """Copy what is in it to where it costs less. Raises OSError or RuntimeError, and then nothing
        is kept."""

    def discard(self) -> None:
        """Give it back to the system, saved or not."""

    def restore(self) -> None:
        """Have it again: with what was saved, else with zeros. May be tried again after an OSError or
        RuntimeError."""

    def forget(self) -> None:
        """Drop what was saved."""


def find_tensors(root: object, module: str) -> list[Tensor]:
    """The tensors in an object, each once: in its attributes, in tuples, lists and dicts of them, and
    in dataclasses and objects of classes of that module. Others are not looked into: what they hold
    need not be the root's own."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    left: list[Any] = [root]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, tuple | list):
            left += item
        elif not isinstance(item, type) and (is_dataclass(item) or type(item).__module__ == module):
            left += getattr(item, "__dict__", {}).values()
    return list(found.values())


def memory_of(tensors: Iterable[Tensor], device: torch.device) -> Memory:
    """Of tensors that all are on one device."""
    return HostMemory(tensors) if device.type == "cpu" else DeviceMemory(tensors)
