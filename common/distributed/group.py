"""What ranks do together: collectives on tensors, under the names that MPI gave them.

Every rank of a group calls the same operations in the same order. A rank that does not come is
noticed: the call raises `RankError` within the group's timeout.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class RankError(RuntimeError):
    """A rank has died, does not answer, or does something else than the others: the group is lost.

    The message is one line for the user, and names the rank.
    """


class Group(ABC):
    """Some ranks, numbered from 0. Tensors are contiguous, on the group's device, of one dtype.

    What is summed is summed in the order of the ranks or of a ring, and every rank gets the same
    bits.
    """

    rank: int
    size: int
    num_bytes_sent: int = 0  # payload that this rank gave to others, by the algorithm that was used

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place; returns x."""

    @abstractmethod
    def broadcast(self, x: Tensor, root: int = 0) -> None:
        """Every rank's x becomes the root's."""

    @abstractmethod
    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """All ranks' tensors on rank 0, in order; None on the others. shapes: of each rank's x."""

    @abstractmethod
    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one rank's after the other's. counts: rows of each rank, some
        perhaps 0. Returns [sum(counts), …]."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Sum all ranks' x, [sum(counts), …], and give each rank its counts[rank] rows."""

    @abstractmethod
    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Give the first sends[0] rows of x to rank 0, the next sends[1] to rank 1, and so on.
        Returns [sum(receives), …]: the receives[0] rows of rank 0 first."""

    def send(self, x: Tensor) -> None:
        """Give x to the other rank of a group of two, which receives it. May return before that; x is
        not to be changed meanwhile."""
        self.broadcast(x, self.rank)

    def receive(self, x: Tensor) -> None:
        """x becomes what the other rank of a group of two sends."""
        self.broadcast(x, 1 - self.rank)

    def minimum(self, number: int) -> int:
        """The smallest of all ranks' numbers, each of them in 0 .. 2**62. Waits for the device."""
        ours = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        ours[self.rank] = number
        return int(self.all_reduce(ours).min())

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def limit_waits(self, seconds: float) -> None:  # noqa: B027
        """From now on a wait raises RankError after so many seconds."""

    def close(self) -> None:  # noqa: B027
        """Give up what the group holds. It is not to be used after."""


class OneRank(Group):
    """A group of one: nothing is sent, and nothing is copied."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        """Nobody else is there."""

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        return [x]

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return x

    def minimum(self, number: int) -> int:
        return number


def even_split(total: int, size: int) -> list[range]:
    """So many things given to so many ranks, one range each, their lengths differing by 1 at most:
    the first ranks have more."""
    base, more = divmod(total, size)
    ends = [base * (i + 1) + min(i + 1, more) for i in range(size)]
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
