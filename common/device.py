"""Where the arithmetic happens: device, number format and threads, resolved before anything is built."""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(name: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """A device and a number format from their names.

    `auto` is CUDA where there is one, else the CPU; then float32 on a CPU (bfloat16 products are
    slow there) and bfloat16 on a GPU. A GPU that is named by its number becomes the calling thread's
    current one, so that nothing is put on the first one. Raises ValueError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", name):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16"
    if device.index is not None:
        torch.cuda.set_device(device)
    return device, getattr(torch, dtype)


def to_device(
    values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of these numbers on the device; the host does not wait for the copy.

    The pinned memory that a GPU copies from is dropped here, before the copy is done. PyTorch keeps
    it: a copy that does not block leaves an event on the block, and the allocator of pinned memory
    gives the block to nobody before that event. The copy is on the current stream, and memory is
    pinned by the current device, which should be this one.
    """
    on_host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        on_host = (
            on_host.pin_memory()
        )  # `torch.tensor` pins nothing that is made from numpy's arrays
    return on_host.to(device, non_blocking=True)


@contextlib.contextmanager
def reading_beside(device: torch.device) -> Iterator[None]:
    """Copies to the host in this context do not wait for what the device was given before: what
    they read may be of any moment."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its control group's quota where there is one."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def release_openmp_workers() -> None:
    """End the calling thread's OpenMP workers: another thread will run PyTorch from now on.

    GNU's OpenMP keeps workers for every thread that has run a parallel loop, as loading a model
    does. When there are more workers than cores it puts them to sleep between any two loops. Does
    nothing with another OpenMP.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    for path in {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}:
        release = getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
        if release is not None:
            release(1)  # omp_pause_soft: they come back when the thread runs a loop again
