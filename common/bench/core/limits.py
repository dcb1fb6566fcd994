"""`limits`: how fast this machine can read memory and multiply matrices, measured, not looked up.

Decoding reads every weight once a step, so memory bandwidth bounds it; prefill multiplies, so the
matrix rate bounds it. MBU and MFU are an engine's share of these two limits, which makes numbers
from different machines comparable.

A limit is the best of several runs, since noise only ever slows a run down; the median is kept
beside it, and how many cores others were using. Reading is measured with the three streaming products that PyTorch has (matrix times
vector, sum, dot product) over a buffer far larger than the last-level cache: which of them comes
nearest to the limit differs from CPU to CPU.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.bench.core.arguments import add_output_arguments, finish
from common.bench.core.machine import last_level_cache_mib, memory_gib, usable_cores
from common.bench.core.noise import OtherWork
from common.bench.core.results import column, make_result

if TYPE_CHECKING:
    import torch

GB = 1e9  # bandwidths are decimal, like the data sheets'


def measure_limits(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Measure `device` ("cpu" or "cuda") in a few seconds; `quick` in about one, and says so.

    Keys: `read_gbps` (GB/s), `fp32_gflops` (GFLOP/s), `bf16_tflops` (TFLOP/s, CUDA only, else
    None), each with a `*_median`, and how it was measured. Uses every core it may.
    Raises ValueError on an unknown device or one that is not there.
    """
    import torch

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch finds no CUDA device here")
    if ":" in device:
        torch.cuda.set_device(device)  # the one that is waited for
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    others = OtherWork()
    try:
        with torch.inference_mode():
            limits = measure(device, kind == "cuda", quick)
        return limits | {"other_cores": others.cores()}
    finally:
        torch.set_num_threads(threads)


def measure(device: str, cuda: bool, quick: bool) -> dict[str, Any]:
    import torch

    size_mib = buffer_mib(cuda, quick)
    repeats = 3 if quick else 8
    read = read_rates(device, size_mib, repeats)
    best = max(read, key=lambda name: max(read[name]))
    size = (8192 if cuda else 2048) // (2 if quick else 1)
    fp32 = matmul_rates(device, torch.float32, size, repeats)
    bf16 = matmul_rates(device, torch.bfloat16, size, repeats) if cuda else None
    return {
        "device": device,
        "cores": usable_cores(),
        "read_gbps": round(max(read[best]), 1),
        "read_gbps_median": round(statistics.median(read[best]), 1),
        "read_method": f"best of {repeats}, {best} over {size_mib} MiB of float32",
        "fp32_gflops": round(max(fp32) / 1e9, 1),
        "fp32_gflops_median": round(statistics.median(fp32) / 1e9, 1),
        "bf16_tflops": round(max(bf16) / 1e12, 1) if bf16 else None,
        "bf16_tflops_median": round(statistics.median(bf16) / 1e12, 1) if bf16 else None,
        "matmul_method": f"best of {repeats}, {size} x {size} x {size}",
        "quick": quick,
    }


def buffer_mib(cuda: bool, quick: bool) -> int:
    """Four times the last-level cache, 512 MiB to 2 GiB, at most a quarter of the memory. MiB."""
    if cuda:
        return 1024 if quick else 4096
    if quick:
        return 256
    cache = last_level_cache_mib() or 64
    size = min(2048, max(512, math.ceil(4 * cache / 64) * 64))
    quarter = int((memory_gib() or 8) * 1024 / 4)
    return max(64, min(size, quarter // 64 * 64))


def read_rates(device: str, size_mib: int, repeats: int) -> dict[str, list[float]]:
    """GB/s of each repetition, for each way of reading `size_mib` MiB once."""
    import torch

    columns = 4096
    data = torch.ones(size_mib * (1 << 18) // columns, columns, device=device)
    vector = torch.ones(columns, device=device)
    flat = data.view(-1)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "matrix-vector product": lambda: torch.mv(data, vector),
        "sum": lambda: flat.sum(),
        "dot product": lambda: torch.dot(flat, flat),
    }
    size = data.numel() * data.element_size()
    return {
        name: [size / GB / seconds for seconds in timings(way, device, repeats)]
        for name, way in ways.items()
    }


def matmul_rates(device: str, dtype: "torch.dtype", size: int, repeats: int) -> list[float]:
    """FLOP/s of each repetition of one square product; TF32 is off, so fp32 is fp32."""
    import torch

    left = torch.rand(size, size, device=device).to(dtype)
    right = torch.rand(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        run = timings(lambda: torch.mm(left, right, out=out), device, repeats)
    finally:
        torch.set_float32_matmul_precision(previous)
    return [2 * size**3 / seconds for seconds in run]


def timings(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of `repeats` runs after two to warm up; waits for the GPU each time."""
    import torch

    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds = []
    for _ in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


COLUMNS = [
    column("limit", "limit"),
    column("best", "best"),
    column("median", "median"),
    column("unit", "unit"),
    column("method", "method"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="in about a second, less exact")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    limits = measure_limits(device, args.quick)
    rows = [
        {
            "limit": name,
            "best": limits[key],
            "median": limits[f"{key}_median"],
            "unit": unit,
            "method": limits[method] if limits[key] is not None else "not measured on a CPU",
        }
        for name, key, unit, method in (
            ("memory read", "read_gbps", "GB/s", "read_method"),
            ("fp32 matrix product", "fp32_gflops", "GFLOP/s", "matmul_method"),
            ("bf16 matrix product", "bf16_tflops", "TFLOP/s", "matmul_method"),
        )
    ]
    title = f"Measured limits, {device}"
    result = make_result(title, COLUMNS, rows, limits=limits)
    facts = result["machine"]
    isa = ", ".join(facts["isa"]) or "none of those that matter here"
    result["notes"] = [
        f"{facts['os']}; {facts['cores']} usable cores; instruction sets: {isa};"
        f" last-level cache {facts['cache_mib'] or 0:g} MiB as the system tells it."
    ]
    finish(args, result)
    return 0
