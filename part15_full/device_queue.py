"""Work given to the device, in order, by a host that does not wait for it.

A GPU works that way by itself: launching a kernel returns at once, and kernels run one after the
other on a stream. Copies to pinned memory are part of that order, and an event tells when all
before it is done. On a CPU a thread plays the device.
"""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch

from .sampler import Sampled


class Work(Protocol):
    """What the device was given at one time."""

    def wait(self) -> None:
        """Until it is done, or has failed."""

    def result(self) -> Sampled:
        """What it gave, on the host, as soon as it is done. Raises what it raised."""

    def times(self) -> tuple[float, float]:
        """When the device began and ended it, in seconds of `time.perf_counter`. After `result`."""


class DeviceQueue(Protocol):
    def submit(self, run: Callable[[], Sampled], after: Work | None = None) -> Work:
        """Give the device what `run` does, after all that it was given before. after: the first half
        of it, which another queue has."""


class CpuWork:
    def __init__(self, future: Future[tuple[Sampled, float, float]]) -> None:
        self.future = future

    def wait(self) -> None:
        wait([self.future])

    def result(self) -> Sampled:
        return self.future.result()[0]

    def times(self) -> tuple[float, float]:
        return self.future.result()[1:]


class CpuQueue:
    """One thread, which runs what it is given in order, and ends with this object."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="device")

    def submit(self, run: Callable[[], Sampled], after: CpuWork | None = None) -> CpuWork:
        return CpuWork(self.thread.submit(self.timed, run, after))

    def timed(
        self, run: Callable[[], Sampled], after: CpuWork | None
    ) -> tuple[Sampled, float, float]:
        begin = time.perf_counter()
        if after is not None:
            after.result()
            begin, _ = after.times()
        return run(), begin, time.perf_counter()


class GpuWork:
    def __init__(
        self, queue: "GpuQueue", run: Callable[[], Sampled], after: "GpuWork | None" = None
    ) -> None:
        self.clock = queue.clock
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.kept = None if after is None else run  # with what other streams have made for it
        if after is None:
            self.begin.record()
        else:
            self.begin = after.begin
            after.end.wait()
        # Copies go to pinned memory, which they do not leave before the event.
        self.sampled = run().to(torch.device("cpu"), non_blocking=True)
        self.end.record()

    def wait(self) -> None:
        self.end.synchronize()

    def result(self) -> Sampled:
        self.wait()
        return self.sampled

    def times(self) -> tuple[float, float]:
        return self.clock.seconds(self.begin), self.clock.seconds(self.end)


class GpuClock:
    """The GPU's clock, read through events, in seconds of `time.perf_counter`.

    The time between two events is told in float32: from one to the next that is exact enough, from
    the start of an engine it is not. So it is added up.
    """

    def __init__(self) -> None:
        self.last = torch.cuda.Event(enable_timing=True)
        self.last.record()
        self.last.synchronize()
        self.last_seconds = time.perf_counter()

    def seconds(self, event: torch.cuda.Event) -> float:
        """When an event that is done was reached."""
        self.last_seconds += self.last.elapsed_time(event) / 1000
        self.last = event
        return self.last_seconds


class GpuQueue:
    """The current stream of a GPU, or one of its own."""

    def __init__(self, device: torch.device, has_stream: bool = False) -> None:
        self.device, self.context = device, contextlib.nullcontext()
        with torch.cuda.device(device):
            self.clock = GpuClock()
            if has_stream:
                self.context = torch.cuda.stream(torch.cuda.Stream())

    def submit(self, run: Callable[[], Sampled], after: GpuWork | None = None) -> GpuWork:
        # The device is the calling thread's, and may be another.
        with torch.cuda.device(self.device), self.context:
            try:
                return GpuWork(self, run, after)
            except Exception:
                torch.cuda.synchronize()  # what was launched before may read the step's input yet
                raise


def device_queue(device: torch.device, has_stream: bool = False) -> DeviceQueue:
    """has_stream: it is one more queue, beside the first."""
    return GpuQueue(device, has_stream) if device.type == "cuda" else CpuQueue()
