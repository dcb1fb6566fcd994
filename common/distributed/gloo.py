"""Groups on PyTorch's own collectives: gloo between CPUs, NCCL between GPUs.

The backend is made directly, without `torch.distributed.init_process_group`: that keeps one default
group a process, and several engines may live in one.
"""

import contextlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from common.distributed.group import Group, RankError
from common.distributed.health import Health, reason_of

SLICE = timedelta(seconds=0.1)  # of a wait: between two looks at whether a rank has died


class TorchGroup(Group):
    """Ranks joined by gloo (tensors on the CPU) or NCCL (on GPUs).

    Whatever is not summed goes as bytes, so any number format does. With NCCL an operation is
    queued on the device and the host goes on: there a rank that is gone shows when the host next
    waits for the device, once the watcher or NCCL itself has aborted the group.
    """

    def __init__(
        self,
        backend: Any,
        device: torch.device,
        timeout: float,
        health: Health,
        members: Sequence[int] | None = None,
    ) -> None:
        """backend: a ProcessGroupGloo or ProcessGroupNCCL. timeout: seconds, of every wait. members:
        what the ranks are called, where they are some of more."""
        self.rank, self.size = backend.rank(), backend.size()
        self._who = f"rank {self.rank if members is None else members[self.rank]}"
        self._backend, self._device = backend, device
        self._timeout, self._health = timeout, health
        self._sending: deque[tuple[Any, Tensor]] = deque()  # what may not have left yet
        if device.type == "cuda":  # the host waits for the device, not for us
            health.when_lost(self.abort)

    @property
    def device(self) -> torch.device:
        return self._device

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sends 2 (N - 1) / N of the bytes of x: the ring's two rounds."""
        self._run("all_reduce", self._backend.allreduce, [x])
        self.num_bytes_sent += 2 * (self.size - 1) * _num_bytes(x) // self.size
        return x

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        """Sends x to each of this rank's children in a binomial tree; the root has log2(N)."""
        self._run("broadcast", self._backend.broadcast, _as_bytes(x), root)
        place = (self.rank - root) % self.size
        self.num_bytes_sent += num_children(place, self.size) * _num_bytes(x)

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Every rank but 0 sends its x."""
        lengths = [math.prod(shape) for shape in shapes]
        assert x.numel() == lengths[self.rank], f"{tuple(x.shape)} is not {shapes[self.rank]}"
        sends = [x.numel()] + [0] * (self.size - 1)
        receives = lengths if self.rank == 0 else [0] * self.size
        rows = self._exchange("gather", x.reshape(-1), sends, receives)
        if self.rank != 0:
            return None
        return [part.view(*shape) for part, shape in zip(rows.split(lengths), shapes, strict=True)]

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Sends N - 1 times the bytes of the longest rank's rows: others are padded."""
        assert len(x) == counts[self.rank], f"{len(x)} rows, not {counts[self.rank]}"
        most = max(counts)
        ours = x if len(x) == most else _padded(x, most)
        everyone = x.new_empty(self.size * most, *x.shape[1:])
        if everyone.numel():
            into, source = _as_bytes(everyone), _as_bytes(ours)
            self._run("all_gather", self._backend._allgather_base, into, source)
        self.num_bytes_sent += (self.size - 1) * _num_bytes(ours)
        if all(count == most for count in counts):
            return everyone
        parts = everyone.view(self.size, most, *x.shape[1:])
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """All shares padded to the longest: NCCL's ring sends N - 1 of them. gloo has none of its
        own and sums everything everywhere: 2 (N - 1) of them."""
        assert len(x) == sum(counts), f"{len(x)} rows, not {sum(counts)}"
        most = max(counts)
        shares = x
        if any(count != most for count in counts):
            parts = x.split(list(counts))
            shares = torch.cat([_padded(part, most) for part in parts])
        ours = x.new_empty(most, *x.shape[1:])
        if ours.numel():
            self._run("reduce_scatter", self._backend._reduce_scatter_base, ours, shares)
        rounds = 2 if self._device.type == "cpu" else 1
        self.num_bytes_sent += rounds * (self.size - 1) * _num_bytes(ours)
        return ours[: counts[self.rank]]

    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Sends what is meant for others."""
        return self._exchange("all_to_all", x, sends, receives)

    def send(self, x: Tensor) -> None:
        """Returns at once."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        self._health.check()
        try:
            work = self._backend.broadcast(_as_bytes(x), self.rank)
        except RuntimeError as error:
            raise self._lost("send", error) from error
        self._sending.append((work, x))
        self.num_bytes_sent += _num_bytes(x)

    def _exchange(
        self, name: str, x: Tensor, sends: Sequence[int], receives: Sequence[int]
    ) -> Tensor:
        assert len(x) == sum(sends), f"{name}: {len(x)} rows, not {sum(sends)}"
        row = math.prod(x.shape[1:]) * x.element_size()
        out = x.new_empty(sum(receives), *x.shape[1:])
        into, source = _as_bytes(out), _as_bytes(x)
        splits = [row * n for n in receives], [row * n for n in sends]
        self._run(name, self._backend.alltoall_base, into, source, *splits)
        self.num_bytes_sent += row * (sum(sends) - sends[self.rank])
        return out

    def _run(self, name: str, operation: Any, *args: Any) -> None:
        """Start an operation, and wait for it; with NCCL the device does."""
        self._health.check()
        try:
            work = operation(*args)
            if self._device.type == "cuda":
                work.wait()
                return
            wait_for(work, f"{self._who} waited in {name}", self._timeout, self._health)
        except RuntimeError as error:
            raise self._lost(name, error) from error

    def _lost(self, name: str, error: RuntimeError) -> RankError:
        if self._health.problem is not None:
            return self._health.report("")
        message = f"another rank is gone: {name} failed on {self._who} ({reason_of(error)})"
        return self._health.report_after_grace(message)

    def limit_waits(self, seconds: float) -> None:
        self._timeout = seconds
        self._backend._set_default_timeout(timedelta(seconds=seconds))

    def abort(self) -> None:
        """End what waits, in any thread: kernels of NCCL that no rank will answer."""
        with contextlib.suppress(RuntimeError):
            self._backend.abort()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            if self._health.problem is None:
                self._backend.shutdown()
            else:
                self._backend.abort()


def make_backend(
    store: Store, name: str, rank: int, size: int, device: torch.device, timeout: float, host: str
) -> Any:
    """A backend whose ranks meet in `store` under `name`; returns when all are connected.

    host: the address that gloo listens on, in reach of the other ranks.
    """
    store = PrefixStore(name, store)
    limit = timedelta(seconds=timeout)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL  # CPU builds of torch have none

        options = ProcessGroupNCCL.Options()
        options._timeout = limit
        # NCCL's watchdog shall abort the group, not the process (it is the server's).
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        return ProcessGroupNCCL(store, rank, size, options)
    options = ProcessGroupGloo._Options()
    options._timeout = limit + timedelta(seconds=30)  # we are first, and have better words
    options._threads = 1
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    where = {"interface": interface} if interface else {"hostname": host}
    options._devices = [ProcessGroupGloo.create_device(**where)]
    return ProcessGroupGloo(store, rank, size, options)


def own_address(host: str) -> str:
    """This machine's address on the way to a host: loopback when that is this machine by name."""
    family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


def wait_for(work: Any, what: str, timeout: float, health: Health) -> None:
    """Wait for an operation of gloo. Raises RankError after `timeout` seconds or when a rank is
    known to have died, RuntimeError when the connection has failed."""
    deadline = time.monotonic() + timeout
    while not is_done(work):
        health.check()
        if time.monotonic() > deadline:
            raise health.report(f"another rank does not answer: {what} for {timeout:g} s")


def is_done(work: Any) -> bool:
    """Wait for an operation of gloo for a while. Raises RuntimeError when it has failed."""
    try:
        work.wait(SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it may have ended after that wait had been given up: only this one knows how
    return True


def num_children(place: int, size: int) -> int:
    """How many ranks the one at `place` (0: the root) sends to in a binomial tree."""
    lowest = place & -place if place else 1 << (size - 1).bit_length()
    return sum(place + (1 << bit) < size for bit in range(lowest.bit_length() - 1))


def _num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _padded(x: Tensor, rows: int) -> Tensor:
    """x, [n, …], with rows of zeros below: [rows, …]."""
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
