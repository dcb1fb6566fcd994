"""Ranks as threads of one process: a `Group` without sockets, for tests of what ranks do together.

Each operation is the plainest there is: every rank lays its tensor down, waits for the others, and
takes what it needs. What the others rely on is checked: that all ranks call the same operation, and
that what one sends another expects.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.distributed.group import Group, RankError

T = TypeVar("T")
TIMEOUT = 20.0  # seconds that a rank waits for the others


class Meeting:
    """Where the ranks of a group come together."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.brought: list[Any] = [None] * size

    def swap(self, rank: int, thing: Any) -> list[Any]:
        """What all ranks brought, in order. Raises RankError when one does not come."""
        try:
            self.barrier.wait()  # what was brought before has been taken
            self.brought[rank] = thing
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankError(f"rank {rank}: another rank has ended, or did not come") from None
        return list(self.brought)


class ThreadGroup(Group):
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self.meeting = rank, meeting.size, meeting

    def swap(self, name: str, x: Tensor, more: Any = None) -> list[tuple[Tensor, Any]]:
        """Copies of all ranks' tensors, and what else they say."""
        assert x.is_contiguous(), f"{name}: rank {self.rank} gives a view, {x.stride()}"
        brought = self.meeting.swap(self.rank, (name, x.dtype, x.shape[1:], x.clone(), more))
        for rank, (other, dtype, shape, _, _) in enumerate(brought):
            assert (other, dtype, shape) == (name, x.dtype, x.shape[1:]), f"{rank}: {other} {dtype}"
        return [(tensor, said) for *_, tensor, said in brought]

    def all_reduce(self, x: Tensor) -> Tensor:
        tensors = [tensor for tensor, _ in self.swap("all_reduce", x)]
        self.num_bytes_sent += 2 * x.nbytes * (self.size - 1) // self.size  # as in a ring
        return x.copy_(torch.stack(tensors).sum(0))

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        if self.rank == root:
            self.num_bytes_sent += x.nbytes * (self.size - 1)
        x.copy_(self.swap("broadcast", x, root)[root][0])

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        assert list(x.shape) == list(shapes[self.rank]), f"{list(x.shape)} of {shapes}"
        self.num_bytes_sent += x.nbytes if self.rank else 0
        brought = self.meeting.swap(self.rank, x.clone())
        return None if self.rank else brought

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(x) == counts[self.rank], f"rank {self.rank}: {len(x)} rows of {list(counts)}"
        self.num_bytes_sent += x.nbytes * (self.size - 1)
        brought = self.swap("all_gather", x, list(counts))
        assert all(said == list(counts) for _, said in brought), [said for _, said in brought]
        return torch.cat([tensor for tensor, _ in brought])

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(x) == sum(counts), f"rank {self.rank}: {len(x)} rows of {list(counts)}"
        brought = self.swap("reduce_scatter", x, list(counts))
        assert all(said == list(counts) for _, said in brought), [said for _, said in brought]
        begin = sum(counts[: self.rank])
        own = torch.stack([t[begin : begin + counts[self.rank]] for t, _ in brought]).sum(0)
        self.num_bytes_sent += x.nbytes - own.nbytes
        return own

    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        assert len(x) == sum(sends), f"rank {self.rank}: {len(x)} rows, sends {list(sends)}"
        brought = self.swap("all_to_all", x, list(sends))
        pieces = [tensor.split(said)[self.rank] for tensor, said in brought]
        assert [len(piece) for piece in pieces] == list(receives), f"{receives} on {self.rank}"
        row = x.nbytes // len(x) if len(x) else 0
        self.num_bytes_sent += row * (len(x) - sends[self.rank])
        return torch.cat(pieces)


def run_ranks(size: int, work: Callable[..., T], *shapes: int) -> list[T]:
    """What `work` returns on each of `size` ranks, in threads; it is given the rank's group.

    shapes: further groups that divide the ranks, by size: of 4 ranks, 2 makes (0, 1) and (2, 3).
    The first exception of a rank is raised, and the other ranks are told.
    """
    meetings = [
        [Meeting(part) for _ in range(size // part)] for part in (size, *shapes) if part <= size
    ]

    def run(rank: int) -> T:
        parts = (size, *shapes)
        groups = [
            ThreadGroup(rank % part, of[rank // part])
            for part, of in zip(parts, meetings, strict=True)
        ]
        try:
            return work(*groups)
        except BaseException:
            for of in meetings:
                for meeting in of:
                    meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size, thread_name_prefix="rank") as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, RankError):
            raise error
    return [future.result() for future in futures]
