"""Blocks on their way between the device and the host, while the device goes on with its steps.

In the KV cache a block is one contiguous piece across all layers, so one copy moves it. (vLLM's
transfers became about ten times faster by that layout: "KV offloading connector", 2026.) Neighbours
that stay neighbours move in one piece. The copies of a step are one order, and orders are carried out
one after the other by a thread: on a GPU on a stream of their own and between pinned memory and the
device, on a CPU as plain memory copies.

An order begins when the device has done all that it was given before. So a block that is saved has
been written, and one that is loaded is written by no earlier step.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from common.kv_store.disk import DiskStore

logger = logging.getLogger(__name__)


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


def to_numbers(copies: list[Copy]) -> list[int]:
    """Copies between device and host as plain numbers, for other ranks."""
    numbers = []
    for copy in copies:
        numbers += [copy.number, copy.kind == "load", len(copy.host_blocks)]
        numbers += [*copy.device_blocks, *copy.host_blocks]
    return numbers


def from_numbers(numbers: list[int]) -> list[Copy]:
    """The reverse."""
    copies = []
    while numbers:
        number, is_load, count, *blocks = numbers
        device, host, numbers = blocks[:count], blocks[count : 2 * count], blocks[2 * count :]
        copies.append(Copy(number, "load" if is_load else "save", device, host))
    return copies


@dataclass(frozen=True)
class Copied:
    """What has become of a copy. num_blocks: how many of the first ones are there."""

    number: int
    num_blocks: int
    num_bytes: int
    seconds: float
    is_whole: bool = True


Orders = queue.SimpleQueue[tuple[Copy, Any] | None]


class BlockCopies:
    """A rank's blocks on the host, and the thread that copies."""

    def __init__(self, num_host_blocks: int = 0, disk: DiskStore | None = None) -> None:
        """num_host_blocks: 0 where nothing will ever be copied."""
        self.num_host_blocks, self.disk = num_host_blocks, disk
        self.num_bytes = 0  # on the host
        self.num_copied = 0  # number of the last copy that was seen to be done
        self.orders: Orders = queue.SimpleQueue()
        self.stores: Orders = queue.SimpleQueue()  # which nobody waits for
        self.done: queue.SimpleQueue[Copied] = queue.SimpleQueue()
        self.seen: list[Copied] = []  # by `wait`
        self.threads: list[threading.Thread] = []
        self.spoiled: set[int] = set()  # host blocks whose save has failed; for loads behind it
        # bytes of a cache, and on the host
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def register_kv_caches(self, caches: list[torch.Tensor]) -> None:
        """Have room on the host for as many blocks as there are to be.

        caches: each [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]. Raises ValueError.
        """
        if not self.num_host_blocks:
            return
        self.device = caches[0].device
        is_cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if is_cuda else None
        try:
            shapes = [(self.num_host_blocks, *cache.shape[1:]) for cache in caches]
            host = [
                torch.zeros(shape, dtype=cache.dtype, pin_memory=is_cuda)
                for shape, cache in zip(shapes, caches, strict=True)
            ]
        except RuntimeError as error:
            number = self.num_host_blocks
            raise ValueError(f"host_kv_memory: no memory for {number} blocks") from error
        self.num_bytes = sum(tensor.nbytes for tensor in host)
        self.block_bytes = self.num_bytes // self.num_host_blocks
        self.host = [bytes_of(tensor).numpy() for tensor in host]
        self.pairs = [(bytes_of(a), bytes_of(b)) for a, b in zip(caches, host, strict=True)]
        for orders in (self.orders, self.stores):
            thread = threading.Thread(target=self.run, args=(orders,), name="copies", daemon=True)
            self.threads.append(thread)
            thread.start()

    def start_load_kv(self, copies: list[Copy]) -> None:
        """Begin copies when the device has done what it was given until now."""
        event = None
        if self.stream is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        for copy in copies:
            (self.stores if copy.kind == "store" else self.orders).put((copy, event))

    def save_kv_layer(self, layer: int) -> None:
        """A step has written a layer's keys and values. Here blocks are copied whole."""

    def get_finished(self) -> list[Copied]:
        """Copies that are done since the last time."""
        while not self.done.empty():
            self.note(self.done.get())
        seen, self.seen = self.seen, []
        return seen

    def wait(self, seconds: float) -> None:
        """Return when a copy is done, or after some time; at once where there are no copies."""
        if not self.threads:
            return
        with suppress(queue.Empty):
            self.note(self.done.get(timeout=seconds))

    def wait_until(self, number: int) -> None:
        """Return when all copies up to this number are done. Nobody else asks then what is finished.
        Raises RuntimeError where one has failed: rank 0 does not know of it."""
        while self.num_copied < number:
            self.note(self.done.get())
        if not all(copied.is_whole for copied in self.seen):
            raise RuntimeError("a copy between device and host has failed")
        self.seen.clear()

    def note(self, copied: Copied) -> None:
        self.seen.append(copied)
        self.num_copied = max(self.num_copied, copied.number)

    def run(self, orders: Orders) -> None:
        """A thread: one order after the other."""
        while order := orders.get():
            self.done.put(self.attempt(*order))

    def attempt(self, copy: Copy, event: Any) -> Copied:
        """Do it, or as much of it as can be done."""
        begin, num_blocks, wanted = time.perf_counter(), 0, len(copy.host_blocks)
        try:
            num_blocks = self.carry_out(copy, event)
        except Exception as error:  # what was to come is computed instead
            logger.warning("a copy of %d KV blocks (%s) has failed: %s", wanted, copy.kind, error)
        if copy.kind == "save":
            if num_blocks < wanted:
                self.spoiled.update(copy.host_blocks)
            else:
                self.spoiled.difference_update(copy.host_blocks)
        seconds, num_bytes = time.perf_counter() - begin, num_blocks * self.block_bytes
        return Copied(copy.number, num_blocks, num_bytes, seconds, num_blocks == wanted)

    def carry_out(self, copy: Copy, event: Any) -> int:
        """Returns how many of the first blocks are there. Raises what the device and the disk do."""
        if copy.kind == "store":
            for block, key in zip(copy.host_blocks, copy.disk_keys, strict=True):
                self.disk.write(key, self.rows(block))
            return len(copy.host_blocks)
        count = len(copy.device_blocks)
        if copy.kind == "load":
            count = self.count_ready(copy)
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

    def count_ready(self, copy: Copy) -> int:
        """How many of the first blocks are on the host, once what lies on disk has been read."""
        keys = copy.disk_keys or [None] * len(copy.host_blocks)
        for i, (block, key) in enumerate(zip(copy.host_blocks, keys, strict=True)):
            if key is not None and self.disk.read(key, self.rows(block)):
                self.spoiled.discard(block)
            elif key is not None or block in self.spoiled:
                return i
        return len(copy.host_blocks)

    def rows(self, block: int) -> list[np.ndarray]:
        """A host block's bytes."""
        return [tensor[block] for tensor in self.host]

    def shutdown(self) -> None:
        """Wait for what was begun."""
        for orders, thread in zip((self.orders, self.stores), self.threads, strict=False):
            orders.put(None)
            thread.join()
        if self.disk is not None:
            self.disk.close()


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
