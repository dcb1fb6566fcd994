"""What stands in the place of `torch.cuda` and of Triton's kernels: see `cuda_on_cpu`."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.testing.cuda_on_cpu import GPU, is_cuda, mark_of, marked, tensors_in

NUM_GPUS = 2
TOTAL_MEMORY = 256 << 20  # bytes; they are the host's
OPERATIONS = (
    "rms_norm", "add_rms_norm", "rotary_and_store", "silu_and_mul", "linear", "embedding",
    "attention", "sample", "smallest_kept",
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """What runs while a graph is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []
        self.is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.is_paused:
            self.calls.append(lambda: again(func, args, kwargs, list(tensors_in(out))))
        return out


def again(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
    """Run an operation again; its results lie where they lay."""
    for old, new in zip(outputs, tensors_in(func(*args, **kwargs)), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            for call in self.calls:
                call()


@contextlib.contextmanager
def capture(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    GPU.recorder = Recorder()
    try:
        with GPU.recorder as recorder:
            yield
        graph.calls = recorder.calls
    finally:
        GPU.recorder = None


class Event:
    """In the place of torch.cuda.Event. What it marks the end of is done when it is recorded."""

    def __init__(self, enable_timing: bool = False, **options: Any) -> None:
        self.seconds: float | None = None

    def record(self, stream: Any = None) -> None:
        GPU.touch()
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        assert self.seconds is not None, "the event was not recorded"

    def query(self) -> bool:
        return self.seconds is not None

    def wait(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return float(torch.tensor((other.seconds - self.seconds) * 1e3, dtype=torch.float32))


class Stream:
    def __init__(self, device: Any = None, **options: Any) -> None:
        GPU.touch(device)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        assert event.query(), "the event was not recorded"

    def synchronize(self) -> None:
        GPU.wait("a stream's synchronize")


class Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu" if is_cuda(device) else device)


@contextlib.contextmanager
def current_device(device: Any) -> Iterator[None]:
    before, GPU.current = GPU.current, GPU.touch(device)
    try:
        yield
    finally:
        GPU.current = before


def set_device(device: Any) -> None:
    GPU.current = GPU.touch(device)


def set_guard(mode: str) -> None:
    GPU.guard = str(mode)


def properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        name="no GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=227 << 10,
        total_memory=TOTAL_MEMORY,
    )


def touching(answer: Any) -> Callable[..., Any]:
    """A function of torch.cuda that takes a device and always answers the same."""

    def call(device: Any = None, *args: Any, **kwargs: Any) -> Any:
        GPU.touch(device)
        return answer

    return call


REPLACED = {
    "is_available": lambda: True,
    "device_count": lambda: NUM_GPUS,
    "current_device": lambda: GPU.touch(),
    "set_device": set_device,
    "device": current_device,
    "Event": Event,
    "Stream": Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: Stream(device),
    "CUDAGraph": Graph,
    "graph": capture,
    "graph_pool_handle": touching((0, 1)),
    "is_current_stream_capturing": lambda: GPU.recorder is not None,
    "synchronize": touching(None),
    "empty_cache": touching(None),
    "mem_get_info": touching((TOTAL_MEMORY, TOTAL_MEMORY)),
    "reset_peak_memory_stats": touching(None),
    "get_device_properties": properties,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "no GPU",
    "set_sync_debug_mode": set_guard,
    **{
        name: touching(0)
        for name in (
            "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved",
        )
    },
}  # fmt: skip


def ops_class() -> type:
    """The CPU's operations under the name of the GPU's."""
    from common.kernels.cpu.ops import CpuOps

    class OnCpuOps(CpuOps):
        name = "triton"

        def __init__(self) -> None:
            super().__init__(1)

    for name in OPERATIONS:
        setattr(OnCpuOps, name, as_kernel(getattr(CpuOps, name)))
    return OnCpuOps


def as_kernel(method: Callable[..., Any]) -> Callable[..., Any]:
    """An operation as one launch: a graph holds it as a whole."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        given = list(tensors_in([*args, *kwargs.values()]))
        index = next((mark_of(x) for x in given if mark_of(x) is not None), None)

        def run() -> Any:
            with torch._C.DisableTorchFunction():
                return method(*args, **kwargs)

        recorder = GPU.recorder
        if recorder is None:
            out = run()
        else:
            recorder.is_paused = True
            try:
                out = run()
            finally:
                recorder.is_paused = False
            recorder.calls.append(lambda: again(run, (), {}, list(tensors_in(out))))
        for x in tensors_in(out):
            marked(x, index)
        return out

    return launch
