"""Blocks on their way between the device and the host, while the device goes on with its steps.

In the KV cache a block is one contiguous piece across all layers, so one copy moves it. (vLLM's
transfers became about ten times faster by that layout: "KV offloading connector", 2026.) Neighbours
that stay neighbours move in one piece. The copies of a step are one order, and orders are carried out
one after the other by a thread: on a GPU on a stream of their own and between pinned memory and the
device, on a CPU as plain memory copies.

An order begins when the device has done all that it was given before. So a block that is saved has
been written, and one that is loaded is written by no earlier step.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.kv_memory import choose_num_host_blocks
from common.kv_store import DiskStore
from common.kv_store.layout import layout_of

from .config import EngineConfig
from .kv_cache import KVCache


@dataclass(frozen=True)
class Copy:
    """Blocks to copy: from the device to the host, or back; or from the host to disk.

    disk_keys: of host blocks that are written to disk, or read from there before they are loaded;
    None for those that are on the host.
    """

    number: int
    kind: str  # save, load or store
    device_blocks: list[int]
    host_blocks: list[int]
    disk_keys: list[bytes | None] = field(default_factory=list)


@dataclass(frozen=True)
class Copied:
    """What has become of a copy. num_blocks: how many of the first ones are there."""

    number: int
    num_blocks: int
    num_bytes: int
    seconds: float


Orders = queue.SimpleQueue[tuple[Copy, Any] | None]


class NoCopies:
    """The workers' side of an engine that keeps nothing on the host."""

    num_host_blocks = num_bytes = num_copied = 0
    disk: DiskStore | None = None

    def register_kv_caches(self, caches: list[torch.Tensor]) -> None:
        """caches: each [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""

    def start_load_kv(self, copies: list[Copy]) -> None:
        """Begin copies when the device has done what it was given until now."""

    def get_finished(self) -> list[Copied]:
        """Copies that are done since the last time."""
        return []

    def wait(self, seconds: float) -> None:
        """Return when a copy is done, or after some time."""

    def wait_until(self, number: int) -> None:
        """Return when all copies up to this number are done."""

    def shutdown(self) -> None:
        """End what is under way."""


class BlockCopies(NoCopies):
    """A rank's blocks on the host, and the thread that copies."""

    def __init__(self, num_host_blocks: int, disk: DiskStore | None) -> None:
        self.num_host_blocks, self.disk = num_host_blocks, disk
        self.num_copied = 0  # number of the last copy that was seen to be done
        self.orders: Orders = queue.SimpleQueue()
        self.stores: Orders = queue.SimpleQueue()  # which nobody waits for
        self.done: queue.SimpleQueue[Copied] = queue.SimpleQueue()
        self.seen: list[Copied] = []  # by `wait`
        self.threads = [
            threading.Thread(target=self.run, args=(orders,), name="block copies", daemon=True)
            for orders in (self.orders, self.stores)
        ]

    def register_kv_caches(self, caches: list[torch.Tensor]) -> None:
        """Have room on the host for as many blocks as there are to be. Raises ValueError."""
        self.device = caches[0].device
        is_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if is_cuda else None
        try:
            host = [
                torch.zeros(self.num_host_blocks, *cache.shape[1:], dtype=cache.dtype)
                for cache in caches
            ]
            self.host_tensors = [tensor.pin_memory() if is_cuda else tensor for tensor in host]
        except RuntimeError as error:
            raise ValueError(
                f"host_kv_memory: no memory for {self.num_host_blocks} blocks"
            ) from error
        self.num_bytes = sum(tensor.nbytes for tensor in self.host_tensors)
        self.host = [bytes_of(tensor).numpy() for tensor in self.host_tensors]
        self.pairs = [
            (bytes_of(cache), bytes_of(tensor))
            for cache, tensor in zip(caches, self.host_tensors, strict=True)
        ]
        self.block_bytes = sum(block.nbytes for block in (tensor[0] for tensor in self.host))
        for thread in self.threads:
            thread.start()

    def start_load_kv(self, copies: list[Copy]) -> None:
        event = None
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        for copy in copies:
            (self.stores if copy.kind == "store" else self.orders).put((copy, event))

    def get_finished(self) -> list[Copied]:
        while not self.done.empty():
            self.note(self.done.get())
        seen, self.seen = self.seen, []
        return seen

    def wait(self, seconds: float) -> None:
        with suppress(queue.Empty):
            self.note(self.done.get(timeout=seconds))

    def wait_until(self, number: int) -> None:
        while self.num_copied < number:
            self.note(self.done.get())
        self.seen.clear()

    def note(self, copied: Copied) -> None:
        self.seen.append(copied)
        self.num_copied = max(self.num_copied, copied.number)

    def run(self, orders: Orders) -> None:
        """A thread: one order after the other."""
        while order := orders.get():
            copy, event = order
            begin = time.perf_counter()
            try:
                num_blocks = self.carry_out(copy, event)
            except Exception:  # the disk's or the device's: what was to come is computed instead
                num_blocks = 0
            seconds = time.perf_counter() - begin
            self.done.put(Copied(copy.number, num_blocks, num_blocks * self.block_bytes, seconds))

    def carry_out(self, copy: Copy, event: Any) -> int:
        """Returns how many of the first blocks are there."""
        if copy.kind == "store":
            for block, key in zip(copy.host_blocks, copy.disk_keys, strict=True):
                self.disk.write(key, self.rows(block))
            return len(copy.host_blocks)
        count = len(copy.device_blocks)
        if copy.kind == "load":
            reads = enumerate(zip(copy.host_blocks, copy.disk_keys, strict=False))
            lost = (
                i for i, (block, key) in reads if key and not self.disk.read(key, self.rows(block))
            )
            count = next(lost, count)
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            if event is not None:
                self.stream.wait_event(event)
            for first, second, size in runs(copy.device_blocks[:count], copy.host_blocks[:count]):
                for device, host in self.pairs:
                    there, here = device[first : first + size], host[second : second + size]
                    move(there, here) if copy.kind == "load" else move(here, there)
            if self.stream is not None:
                self.stream.synchronize()
        return count

    def rows(self, block: int) -> list[np.ndarray]:
        """A host block's bytes."""
        return [tensor[block] for tensor in self.host]

    def shutdown(self) -> None:
        """Wait for what was begun."""
        for orders, thread in zip((self.orders, self.stores), self.threads, strict=True):
            orders.put(None)
            thread.join()
        if self.disk is not None:
            self.disk.close()


def make_copies(
    config: EngineConfig,
    folders: list[Path],
    kv: KVCache,
    minimum: Callable[[int], int],
    num_ranks: int,
) -> NoCopies:
    """What `--offload` asks for, on this rank. folders: of the model, and of one that drafts.
    minimum: of a number, over all ranks. Raises ValueError."""
    if config.offload == "off":
        return NoCopies()
    block_bytes = kv.num_bytes // kv.num_blocks
    memory = config.host_kv_memory
    num_blocks = choose_num_host_blocks(memory, block_bytes, kv.num_blocks, num_ranks)
    caches = [cache for cache in (kv.data, kv.draft_data) if cache is not None]
    disk = None
    if config.disk_kv is not None:
        layout = layout_of(folders, caches)
        disk = DiskStore(Path(config.disk_kv), config.disk_kv_memory or 4 << 30, layout)
    copies = BlockCopies(minimum(num_blocks), disk)
    copies.register_kv_caches(caches)
    return copies


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """[blocks, …] as [blocks, bytes of one] uint8, of the same memory."""
    return tensor.view(torch.uint8).view(len(tensor), -1)


def move(to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes; on a CPU without the interpreter's lock, and without torch's threads, which have a
    step to compute."""
    if to.is_cuda or source.is_cuda:
        to.copy_(source, non_blocking=True)
    else:
        np.copyto(to.numpy(), source.numpy())


def runs(first: list[int], second: list[int]) -> Iterator[tuple[int, int, int]]:
    """Pairs of numbers as (first, second, count): those that go on by one in both are one run."""
    begin = 0
    for i in range(1, len(first) + 1):
        ends = i == len(first) or (first[i] - first[i - 1], second[i] - second[i - 1]) != (1, 1)
        if ends:
            yield first[begin], second[begin], i - begin
            begin = i
