"""A group whose sums a recording repeats: see `common.kernels.recording`."""

from threading import get_ident
from typing import Any

from torch import Tensor

from common.distributed.group import Group
from common.kernels.cpu.jit import LISTENERS


class RecordedGroup(Group):
    """Wraps a group, so that a recording calls its `all_reduce` again at each replay. The other
    collectives return new tensors, and are not recorded."""

    def __init__(self, group: Group) -> None:
        self.group, self.rank, self.size = group, group.rank, group.size

    def all_reduce(self, x: Tensor) -> Tensor:
        listener: Any = LISTENERS.get(get_ident())
        if listener is None:
            return self.group.all_reduce(x)
        listener.__self__.outside(self.group.all_reduce, x)
        return x

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        self.group.broadcast(x, root)

    def gather(self, x: Tensor, shapes: Any) -> list[Tensor] | None:
        return self.group.gather(x, shapes)

    def all_gather(self, x: Tensor, counts: Any) -> Tensor:
        return self.group.all_gather(x, counts)

    def reduce_scatter(self, x: Tensor, counts: Any) -> Tensor:
        return self.group.reduce_scatter(x, counts)

    def all_to_all(self, x: Tensor, sends: Any, receives: Any) -> Tensor:
        return self.group.all_to_all(x, sends, receives)

    def minimum(self, number: int) -> int:
        return self.group.minimum(number)
