"""`kernels`: each operation of `common.kernels`, implementations side by side, against the limits.

Implementations take turns within every round, so that a slow moment of the machine hits all of them;
times are medians over the rounds. Weights and KV are drawn from many copies in turn, as a model's
layers are, so they come from memory and not from the cache. On a GPU a time is the GPU's alone,
between two events, with its second-level cache overwritten before; an implementation that waits for
the GPU in between pays for that. Launches from Python are not in it.

GB/s counts what must be read and written once, GFLOP/s multiplications and additions; of the two
shares of the measured limits the larger one says what the operation is bound by.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common.bench.core.arguments import add_output_arguments, finish, positive, progress
from common.bench.core.limits import measure_limits
from common.bench.core.noise import OtherWork, disturbance
from common.bench.core.results import column, make_result
from common.bench.kernels.cases import SHAPES, Case, Maker
from common.bench.offline import matmul_rate

if TYPE_CHECKING:
    from common.kernels import Ops

ROUND_SECONDS = 0.02  # of one implementation in one round
GPU_CALLS = 10  # of one implementation in one round, on a GPU

COLUMNS = [
    column("op", "operation"),
    column("shape", "shape"),
    column("kernels", "kernels"),
    column("us", "median", "µs", 1),
    column("gbps", "memory", "GB/s", 1),
    column("gflops", "arithmetic", "GFLOP/s", 1),
    column("mbu", "of read limit", "%", 0),
    column("mfu", "of matmul limit", "%", 0),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--kernels", nargs="+", help="default: the reference and the device's own")
    parser.add_argument("--ops", nargs="+", help="only these operations, such as linear")
    parser.add_argument("--threads", type=positive, help="CPU threads (all usable cores)")
    parser.add_argument("--rounds", type=positive, default=7, help="default: 7")
    parser.add_argument("--quick-limits", action="store_true", help="measure limits in a second")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from common.device import resolve_device, usable_cores
    from common.kernels import select_ops

    resolved, dtype = resolve_device(args.device)
    device, dtype_name = resolved.type, str(dtype).removeprefix("torch.")
    torch.set_num_threads(args.threads or usable_cores())
    names = args.kernels or ["reference", "cpu" if device == "cpu" else "triton"]
    implementations = [select_ops(name, device, args.threads) for name in names]
    shape = SHAPES[device]
    cases = Maker(shape, device, dtype).all_cases()
    if args.ops:
        unknown = set(args.ops) - {case.op for case in cases}
        if unknown:
            raise ValueError(f"no operation is called {sorted(unknown)[0]!r}")
        cases = [case for case in cases if case.op in args.ops]
    others = OtherWork()
    sample = gpu_samples if device == "cuda" else cpu_samples
    with torch.inference_mode():
        measured = [
            measure(case, implementations, args.rounds, sample) for case in progress(cases, "ops")
        ]
    remark = disturbance(others.cores())
    limits = measure_limits(device, args.quick_limits)
    peak = matmul_rate(dtype_name, limits)
    rows = [
        row(case, ops, seconds, limits["read_gbps"], peak)
        for case, medians in zip(cases, measured, strict=True)
        for ops, seconds in zip(implementations, medians, strict=True)
        if seconds is not None
    ]
    notes = [
        f"{shape.name}, {dtype_name}, {device}; medians of {args.rounds} rounds in which the"
        " implementations take turns. Attention: sequences x queries of tokens."
    ]
    if remark:
        notes.append(f"Disturbed: {remark}.")
    title = f"Kernels, {device}"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, notes=notes))
    return 0


def measure(
    case: Case,
    implementations: Sequence["Ops"],
    rounds: int,
    sample: Callable[[Callable[[], object]], list[float]],
) -> list[float | None]:
    """Median seconds of one call for each implementation; None where it does not take the case."""
    calls = [numbered(case.make(ops)) for ops in implementations]
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        if call is not None:
            call()  # compiles
            call()
    for _ in range(rounds):
        for call, own in zip(calls, samples, strict=True):
            own += [] if call is None else sample(call)
    return [statistics.median(own) if own else None for own in samples]


def numbered(call: Callable[[int], object] | None) -> Callable[[], object] | None:
    """The call with the number of each run filled in."""
    if call is None:
        return None
    runs = itertools.count()
    return lambda: call(next(runs))


def cpu_samples(call: Callable[[], object]) -> list[float]:
    """Seconds a call, once, over as many calls as fill a round."""
    count = max(3, min(2000, int(ROUND_SECONDS / max(timed(call, 2), 1e-7))))
    return [timed(call, count)]


def timed(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def gpu_samples(call: Callable[[], object]) -> list[float]:
    from common.gpu_check.rooflines import FLUSH_BYTES, gpu_seconds

    return gpu_seconds(call, GPU_CALLS, FLUSH_BYTES)


def row(
    case: Case, ops: "Ops", seconds: float, read_gbps: float, peak: float | None
) -> dict[str, Any]:
    gbps, gflops = case.num_bytes / seconds / 1e9, case.num_flops / seconds / 1e9
    return {
        "op": case.op,
        "shape": case.shape,
        "kernels": ops.name,
        "us": seconds * 1e6,
        "gbps": gbps,
        "gflops": gflops if gflops else None,
        "mbu": 100 * gbps / read_gbps,
        "mfu": 100e9 * gflops / peak if gflops and peak else None,
    }
