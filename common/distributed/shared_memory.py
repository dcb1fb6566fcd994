"""A group of CPU ranks on one host, over memory that they share: no socket, no name, no port.

The kernels of `common.kernels.cpu.exchange` do the work and explain the memory. Here is what each
collective puts and takes. Large tensors go in chunks of SLOT bytes, one round each. Payload is
counted as it is written: once, whoever and however many read it.
"""

import math
import mmap
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from common.device import usable_cores
from common.distributed.group import Group
from common.distributed.health import Health
from common.kernels.cpu import exchange as kernels
from common.kernels.cpu.compile import compile_kernel

SLOT = 1 << 20  # bytes: smaller ones wait more often, which costs most when cores are scarce
SPINS = 400  # looks at a flag with the interpreter's lock held, some 10 µs: others are about as far
LONG_SPINS = 2000  # without the lock, before sleeping
LONGEST_SLEEP = 0.02  # seconds: then look at whether a rank has died
OPERATIONS = ("all_reduce", "broadcast", "gather", "all_gather", "reduce_scatter", "all_to_all")


def memory_bytes(size: int) -> int:
    """What a group of so many ranks shares."""
    flags = 4096 * -(-size * kernels.FLAG_BYTES // 4096)
    pages = -(-2 * size * (kernels.HEADER + SLOT) // 4096)
    return flags + 4096 * pages


def is_available() -> bool:
    """Whether this system has memory without a name."""
    return hasattr(os, "memfd_create")


def make_memory(*sizes: int) -> int:
    """A descriptor of the memory of groups of so many ranks each, one after the other, all zeros, for
    the ranks to inherit."""
    descriptor = os.memfd_create("group")
    os.ftruncate(descriptor, sum(map(memory_bytes, sizes)))
    return descriptor


def load_kernels() -> None:
    """From the cache; where it has none they are compiled, for some seconds. Better done before
    ranks wait for each other."""
    for name in ("put", "sum", "all_reduce", "wait"):
        compile_kernel(f"exchange_{name}")


class SharedMemoryGroup(Group):
    """Sums float32 (and 16-bit formats in float32) in the order of the ranks, so that every rank
    gets the same bits. Threads of one rank may take turns, but must keep the ranks' common order.
    """

    def __init__(
        self,
        descriptor: int,
        rank: int,
        size: int,
        timeout: float,
        health: Health,
        offset: int = 0,
        members: Sequence[int] | None = None,
        num_ranks: int | None = None,
    ) -> None:
        """descriptor: see `make_memory`; the caller may close it afterwards. offset: where this group's
        memory begins. members: what its ranks are called, where they are some of num_ranks."""
        assert 2 <= size <= kernels.MAX_RANKS, size
        self.rank, self.size, self.names = rank, size, members or range(size)
        self._timeout, self._health = timeout, health
        self._map = mmap.mmap(descriptor, memory_bytes(size), offset=offset)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._round = 0
        self._sender: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # nobody closes the memory while a kernel is in it
        self._memory: int | None = self._bytes.data_ptr()
        # the awaited rank may need this very core
        crowded = (size if num_ranks is None else num_ranks) > usable_cores()
        self._spins, self._long_spins = (1, 0) if crowded else (SPINS, LONG_SPINS)
        self._limit = np.array([0, int(LONGEST_SLEEP * 1e9)], dtype=np.int64)  # a timespec
        load_kernels()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Writes x once."""
        assert x.is_contiguous(), "all_reduce needs a contiguous tensor"
        if x.dtype != torch.float32:
            flat = x.view(-1)
            self._sum("all_reduce", flat, 0, len(flat), flat)
            return x
        total, address = 4 * x.numel(), x.data_ptr()
        with self._lock:
            for begin in range(0, total, SLOT):
                self._all_reduce(address + begin, min(SLOT, total - begin) // 4, total)
        self.num_bytes_sent += total
        return x

    def _all_reduce(self, address: int, count: int, total: int) -> None:
        """One chunk of float32. Mostly one call of a kernel."""
        number = self._next_round()
        place = self._memory, self.size, self.rank, number, SLOT
        while True:
            missing = kernels.exchange_all_reduce(*place, 0, total, address, count, self._spins)
            if missing < 0:
                return
            if missing >= self.size:
                break
            self._wait("all_reduce", number - 1)
        if missing < 2 * self.size:
            self._wait("all_reduce", number)
        self._check_headers("all_reduce", total)
        kernels.exchange_sum(self._memory, self.size, number, SLOT, 0, address, count)

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        """The root writes x once."""
        ours, is_root = _as_bytes(x), self.rank == root
        with self._lock:
            for begin in range(0, len(ours), SLOT):
                part = ours[begin : begin + SLOT]
                self._put("broadcast", len(ours), part if is_root else None)
                if not is_root:
                    self._wait("broadcast", self._round, root)
                    self._check_headers("broadcast", len(ours), root)
                    part.copy_(self._slot(root, len(part)))

    def send(self, x: Tensor) -> None:
        """Returns at once: a thread waits until there is room, which is for two chunks. What goes wrong
        in it is reported to all who wait."""
        self._health.check()
        if self._sender is None:
            self._sender = ThreadPoolExecutor(1, thread_name_prefix="pipe")
        self._sender.submit(self.broadcast, x, self.rank)

    def gather(self, x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Every rank but 0 writes its x once."""
        assert tuple(x.shape) == tuple(shapes[self.rank]), f"{tuple(x.shape)}, not {shapes}"
        ours, is_root = _as_bytes(x), self.rank == 0
        others = [x if r == 0 else x.new_empty(tuple(s)) for r, s in enumerate(shapes)]
        targets = [_as_bytes(other) for other in others] if is_root else []
        most = x.element_size() * max(math.prod(shape) for shape in shapes[1:])
        with self._lock:
            for begin in range(0, most, SLOT):
                self._put("gather", most, None if is_root else ours[begin : begin + SLOT])
                if is_root:
                    self._take_all("gather", most, targets, begin)
        return others if is_root else None

    def all_gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Writes its rows once."""
        assert len(x) == counts[self.rank], f"{len(x)} rows, not {counts[self.rank]}"
        out = x.new_empty(sum(counts), *x.shape[1:])
        ours, targets = _as_bytes(x), [_as_bytes(part) for part in out.split(list(counts))]
        targets[self.rank].copy_(ours)
        most = max(len(target) for target in targets)
        with self._lock:
            for begin in range(0, most, SLOT):
                self._put("all_gather", most, ours[begin : begin + SLOT])
                self._take_all("all_gather", most, targets, begin)
        return out

    def reduce_scatter(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Writes x once."""
        assert len(x) == sum(counts), f"{len(x)} rows, not {sum(counts)}"
        out = x.new_empty(counts[self.rank], *x.shape[1:])
        row = math.prod(x.shape[1:])
        begin = row * sum(counts[: self.rank])
        self._sum("reduce_scatter", x.reshape(-1), begin, begin + out.numel(), out.view(-1))
        return out

    def all_to_all(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Writes all of x once, its own rows too. How much each rank writes for which is in the
        first round's headers: a difference from what is expected raises RankError."""
        assert len(x) == sum(sends), f"{len(x)} rows, not {sum(sends)}"
        row = math.prod(x.shape[1:]) * x.element_size()
        out = x.new_empty(sum(receives), *x.shape[1:])
        ours, targets = _as_bytes(x), [_as_bytes(part) for part in out.split(list(receives))]
        table = np.array([row * n for n in sends], dtype=np.int64)
        with self._lock:
            self._put("all_to_all", len(ours), ours[:SLOT], table)
            self._wait("all_to_all", self._round)
            self._check_headers("all_to_all", None)
            tables = [self._header(r)[2 : 2 + self.size].tolist() for r in range(self.size)]
            for r, target in enumerate(targets):
                if tables[r][self.rank] != len(target):
                    gives = f"{tables[r][self.rank]} bytes for rank {self.names[self.rank]}"
                    problem = f"rank {self.names[r]} has {gives}, which expects {len(target)}"
                    raise self._health.report(problem)
            begins = [sum(tables[r][: self.rank]) for r in range(self.size)]
            for begin in range(0, max(1, *(sum(t) for t in tables)), SLOT):
                if begin > 0:
                    self._put("all_to_all", len(ours), ours[begin : begin + SLOT])
                    self._wait("all_to_all", self._round)
                for r, target in enumerate(targets):
                    first = max(begins[r], begin)
                    last = min(begins[r] + len(target), begin + SLOT)
                    if first < last:
                        source = self._slot(r, last - begin)[first - begin :]
                        target[first - begins[r] : last - begins[r]].copy_(source)
        return out

    def limit_waits(self, seconds: float) -> None:
        self._timeout = seconds

    def close(self) -> None:
        """Waits for a thread that is inside; it has to be told by `health` before."""
        if self._sender is not None:
            self._sender.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._memory is None:
                return
            self._memory = None
            del self._bytes
            self._map.close()

    def _sum(self, name: str, x: Tensor, first: int, last: int, out: Tensor) -> None:
        """out = the sum of all ranks' x[first:last]; x and out are flat, out may be x."""
        step = SLOT // 8  # elements of a chunk: 8 bytes at most
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        ours, width = _as_bytes(x), x.element_size()
        with self._lock:
            for begin in range(0, len(x), step):
                self._put(name, len(ours), ours[width * begin : width * (begin + step)])
                self._wait(name, self._round)
                self._check_headers(name, len(ours))
                low, high = max(first, begin), min(last, begin + step)
                if low >= high:
                    continue
                places = slice(width * (low - begin), width * (high - begin))
                parts = [self._slot(r, places.stop)[places].view(x.dtype) for r in range(self.size)]
                total = parts[0].to(wide, copy=True)
                for part in parts[1:]:
                    total += part
                out[low - first : high - first] = total

    def _take_all(self, name: str, total: int, targets: Sequence[Tensor], begin: int) -> None:
        """Wait for a round, and copy every other rank's chunk to its place."""
        self._wait(name, self._round)
        self._check_headers(name, total)
        for r, target in enumerate(targets):
            part = target[begin : begin + SLOT]
            if r != self.rank and len(part):
                part.copy_(self._slot(r, len(part)))

    def _put(
        self, name: str, total: int, part: Tensor | None, table: np.ndarray | None = None
    ) -> None:
        number = self._next_round()
        address, length = (0, 0) if part is None else (part.data_ptr(), len(part))
        what = OPERATIONS.index(name)
        arguments = what, total, address, length, 0 if table is None else table.ctypes.data
        place = self._memory, self.size, self.rank, number, SLOT
        while kernels.exchange_put(*place, *arguments, self._spins) >= 0:
            self._wait(name, number - 1)
        self.num_bytes_sent += length

    def _next_round(self) -> int:
        self._health.check()
        assert self._memory is not None, "the group is closed"
        self._round += 1
        return self._round

    def _wait(self, name: str, number: int, only: int = -1) -> None:
        """Until every other rank, or one, has put a round. Raises RankError."""
        deadline = None
        place = self._memory, self.size, self.rank, only, number
        limit = self._limit.ctypes.data
        while (missing := kernels.exchange_wait(*place, self._long_spins, limit)) >= 0:
            self._health.check()
            now = time.monotonic()
            deadline = deadline or now + self._timeout
            if now > deadline:
                silent, ours = self.names[missing], self.names[self.rank]
                problem = f"rank {silent} has not answered rank {ours} for {self._timeout:g} s"
                raise self._health.report_silence(silent, f"{problem} in {name}")

    def _check_headers(self, name: str, total: int | None, only: int = -1) -> None:
        """Raises RankError when another rank does something else in this round."""
        ours = OPERATIONS.index(name)
        for r in [only] if only >= 0 else range(self.size):
            what, length = self._header(r)[:2].tolist()
            if what != ours or (total is not None and length != total):
                theirs = f"rank {self.names[r]} is in {OPERATIONS[what]} of {length} bytes"
                problem = f"{theirs}, rank {self.names[self.rank]} in {name}"
                raise self._health.report(problem if total is None else f"{problem} of {total}")

    def _place(self, rank: int) -> int:
        flags = 4096 * -(-self.size * kernels.FLAG_BYTES // 4096)
        return flags + (2 * rank + self._round % 2) * (kernels.HEADER + SLOT)

    def _header(self, rank: int) -> Tensor:
        begin = self._place(rank)
        return self._bytes[begin : begin + kernels.HEADER].view(torch.int64)

    def _slot(self, rank: int, length: int) -> Tensor:
        begin = self._place(rank) + kernels.HEADER
        return self._bytes[begin : begin + length]


def _as_bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)
