"""Single operations at the shapes of Qwen3-0.6B and Qwen3-8B, against the machine's limits.

Two times for each: `us` is the GPU's alone, between two events, with the second-level cache
overwritten before; `call_us` is what a call costs when many follow each other, Python and launch
included, inputs cached. Where the second is larger, the CPU is what an engine waits for. On a CPU
there is one clock, and the two are the same but for the cache.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common.bench.offline import matmul_rate
from common.gpu_check.cases import Case, Maker, Shape
from common.gpu_check.correctness import KERNELS
from common.gpu_check.items import Item, attempt

if TYPE_CHECKING:
    import torch

    from common.kernels import Ops

FLUSH_BYTES = 1 << 30  # more than any second-level cache
SHAPES = [
    Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936),
    Shape("qwen3-8b", 4096, 12288, 32, 8, 128, 151936),
]
QUICK_SHAPES = [Shape("tiny", 64, 160, 4, 2, 16, 512)]
# sequences, queries of each, tokens of each
ATTENTIONS = [(64, 1, 4096), (1, 1, 4096), (256, 1, 512), (1, 2048, 2048), (8, 256, 2048)]
QUICK_ATTENTIONS = [(4, 1, 64), (2, 16, 32)]
TOKENS, QUICK_TOKENS = (1, 16, 64, 256, 2048), (1, 4)  # of linear products
SMALL_TOKENS, QUICK_SMALL_TOKENS = (1, 64, 2048), (4,)  # of what lies between them
ROWS, QUICK_ROWS = 64, 4  # of logits to sample from


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"device", "quick", "limits"} -> one item a case, for the device's kernels; linear products
    by the reference too, which is PyTorch's own."""
    import torch

    from common.kernels import select_ops

    device = torch.device(job["device"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, reference = select_ops(KERNELS[device.type], device), select_ops("reference", device)
    for shape in QUICK_SHAPES if job["quick"] else SHAPES:
        maker = Maker(shape, device, dtype)
        linears = QUICK_TOKENS if job["quick"] else TOKENS
        pairs = [(ours, case) for case in our_cases(maker, ours, job["quick"])]
        pairs += [(ops, case) for ops in (ours, reference) for case in maker.linears(ops, linears)]
        for ops, case in pairs:
            name = f"{shape.name}, {ops.name}, {case.name}"
            yield attempt(name, lambda case=case: measure(case, dtype, device, job))


def our_cases(maker: Maker, ops: "Ops", quick: bool) -> list[Case]:
    """All but the linear products."""
    attentions = QUICK_ATTENTIONS if quick else ATTENTIONS
    counts = QUICK_SMALL_TOKENS if quick else SMALL_TOKENS
    return [
        *(maker.attention(ops, *sizes) for sizes in attentions),
        *(case for count in counts for case in maker.small(ops, count)),
        *maker.samplers(ops, QUICK_ROWS if quick else ROWS),
    ]


def measure(
    case: Case, dtype: "torch.dtype", device: "torch.device", job: dict[str, Any]
) -> dict[str, Any]:
    """Medians in microseconds, and shares of the limits in percent."""
    import torch

    with torch.inference_mode():
        return timed(case.make(), case, dtype, device, job)


def timed(
    call: Callable[[], object],
    case: Case,
    dtype: "torch.dtype",
    device: "torch.device",
    job: dict[str, Any],
) -> dict[str, Any]:
    count = 3 if job["quick"] else 20
    for _ in range(3):
        call()
    cuda = device.type == "cuda"
    alone = statistics.median(gpu_seconds(call, count) if cuda else cpu_seconds(call, count))
    gbps, flops = case.num_bytes / alone / 1e9, case.num_flops / alone
    peak = matmul_rate(str(dtype).removeprefix("torch."), job["limits"])
    return {
        "us": alone * 1e6,
        "call_us": call_seconds(call, count, cuda) * 1e6,
        "gbps": gbps,
        "tflops": flops / 1e12,
        "mbu": 100 * gbps / job["limits"]["read_gbps"],
        "mfu": 100 * flops / peak if peak else None,
    }


def gpu_seconds(call: Callable[[], object], count: int) -> list[float]:
    """Seconds of the GPU for each call, between events; the host runs ahead while the cache is
    overwritten, so a slow launch does not count."""
    import torch

    waste = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        waste.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def cpu_seconds(call: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def call_seconds(call: Callable[[], object], count: int, cuda: bool) -> float:
    """Seconds a call, when calls follow each other at once."""
    import torch

    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count
