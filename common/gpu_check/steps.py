"""Decode steps of a part that launches a step before the last one is read: what the device does,
what it waits for, and what the host does to it.

One engine, both loops: with two steps in flight, and in turns. Then, of the same engine: kernels
launched in a step; whether any call made the host wait for the device (PyTorch's own guard raises);
and the same steps with the forward as a CUDA graph, which is the limit that launches stand in the
way of. Last: whether any kernel was compiled after the start, where traffic would have waited.
"""

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

from common.bench.core.workload import random_prompts
from common.gpu_check.engines import engine_of
from common.gpu_check.graphs import Graphs, can_capture, captures_itself
from common.gpu_check.guard import guard_checks, speculation_checks
from common.gpu_check.items import Check, Once
from common.gpu_check.ladder import run
from common.gpu_check.variants import Variants

BATCH_SIZES, QUICK_BATCH_SIZES = (1, 16, 64, 256), (3,)  # 3: a graph's batch is padded to 4
PROMPT_LEN, OUTPUT_LEN, QUICK_OUTPUT_LEN = 32, 128, 12
PROFILED, QUICK_PROFILED = 16, 2  # steps
SETTLED = 8  # steps at either end that are left out
LOOPS = {"two steps in flight": 2, "in turns": 1}


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"name", "part", "model", "device", "quick"} -> the checks of one engine."""
    variants = Variants()
    engine = Once(lambda: started(job, variants))
    on_gpu = job["device"].startswith("cuda")
    sizes = QUICK_BATCH_SIZES if job["quick"] else BATCH_SIZES
    yield f"{job['name']}, start", lambda: {"start_s": engine()[1]}
    for (loop, num_in_flight), size in itertools.product(LOOPS.items(), sizes):
        name = f"{job['name']}, {loop}, batch {size}"
        yield name, lambda n=num_in_flight, size=size: loop_times(engine()[0], job, n, size)
    if not on_gpu:
        return
    if can_capture(job["part"]):
        for size in sizes:
            name = f"{job['name']}, forward as a graph, batch {size}"
            yield name, lambda size=size: captured(engine()[0], job, size)
    if captures_itself(job["part"]):
        for size in sizes:
            name = f"{job['name']}, without graphs, batch {size}"
            yield name, lambda size=size: launched(engine()[0], job, size)
    for size in sizes[::3]:
        name = f"{job['name']}, launches, batch {size}"
        yield name, lambda size=size: launches(engine()[0], job, size)
    yield from guard_checks(job, lambda: engine()[0])
    yield f"{job['name']}, compiled after the start", lambda: compiled_late(engine, variants)
    yield from speculation_checks(job)  # last: these engines compile kernels of their own


def started(job: dict[str, Any], variants: Variants) -> tuple[Any, float]:
    """(an engine, seconds of its start); from then on `variants` notes what is compiled."""
    sizes = QUICK_BATCH_SIZES if job["quick"] else BATCH_SIZES
    rows = 1 << (max(sizes) - 1).bit_length()
    engine, answer = engine_of(job, max_num_seqs=rows, max_model_len=512)
    if job["device"].startswith("cuda"):
        variants.note()
    return engine, answer["construct_s"]


def cold_start(job: dict[str, Any]) -> Iterator[Check]:
    """{"name", "part", "model", "device", "quick"} -> one check: a start where nothing is compiled,
    unless another process has been here. It leaves all kernels of the model on disk."""
    yield f"{job['name']}, cold start", lambda: coldly(job)


def coldly(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the start, and the kernels that were compiled in it."""
    variants = Variants()
    variants.note()
    longest, memory = (512, 1 << 24) if job["quick"] else (4096, 1 << 30)
    # Others are at work on the same GPU.
    engine, answer = engine_of(job, max_model_len=longest, kv_cache_memory=memory)
    decode(engine, 4, 4)
    return {**answer, "num_variants": len(variants.names), "variants": variants.names}


def compiled_late(engine: Once[Any], variants: Variants) -> dict[str, Any]:
    """Raises AssertionError where a kernel was compiled while serving."""
    engine()
    assert not variants.names, "\n".join(["compiled, or fetched from disk:", *variants.names])
    return {"num_variants": 0}


def decode(engine: Any, size: int, output_len: int) -> dict[str, Any]:
    """Generate from `size` short prompts: {"seconds", "outputs"}."""
    prompts = random_prompts([PROMPT_LEN] * size, engine.vocab_size, f"steps {size}")
    return run(engine, {"prompts": prompts, "max_tokens": [output_len] * size})


def loop_times(engine: Any, job: dict[str, Any], num_in_flight: int, size: int) -> dict[str, Any]:
    """Microseconds of a step, of the device's time between two, and of the host's phases; the
    share of the time in which the device had a step to work on (%); tokens a second."""
    engine.num_in_flight = num_in_flight
    output_len = QUICK_OUTPUT_LEN if job["quick"] else OUTPUT_LEN
    decode(engine, size, 4)
    with engine.trace.follow(backlog=10_000) as records:
        seconds = decode(engine, size, output_len)["seconds"]
    records = list(records)
    spans = settled([span for record in records for span in record.device][1:])
    gaps = [after[1] - before[2] for before, after in itertools.pairwise(spans)]
    found = {
        "tok/s": size * output_len / seconds,
        "step us": 1e6 * statistics.median(end - begin for _, begin, end in spans),
        "gap us": 1e6 * statistics.median(gaps),
        "busy %": 100 * sum(end - begin for _, begin, end in spans) / (spans[-1][2] - spans[0][1]),
    }
    phases = [record.phase_seconds() for record in settled(records)]
    for name in phases[0]:
        found[f"{name} us"] = 1e6 * statistics.median(phase.get(name, 0.0) for phase in phases)
    return found


def settled(of_steps: list[Any]) -> list[Any]:
    """Without the first and the last few."""
    skip = min(SETTLED, len(of_steps) // 4)
    return of_steps[skip : len(of_steps) - skip]


def captured(engine: Any, job: dict[str, Any], size: int) -> dict[str, Any]:
    """As `loop_times`, with the forward of each decode step as one launch; and microseconds of
    that alone. Raises AssertionError where the tokens are not those of ordinary steps."""
    from common.bench.core.rates import same_tokens

    engine.num_in_flight = 2
    count = QUICK_OUTPUT_LEN if job["quick"] else 24
    expected = decode(engine, size, count)["outputs"]
    with Graphs(engine.runner) as graphs:
        outputs = decode(engine, size, count)["outputs"]
        same = same_tokens(outputs, expected)
        # Attention is split in other places, and the last bit may decide between two tokens.
        assert same > 50, f"{same:.0f}% of the tokens are those of ordinary steps"
        times = loop_times(engine, job, 2, size)
        return {**times, "forward us": graphs.microseconds(), "same tokens %": same}


def launched(engine: Any, job: dict[str, Any], size: int) -> dict[str, Any]:
    """As `loop_times`, without the engine's own graphs. Raises AssertionError where the tokens are not
    those of steps with graphs."""
    from common.bench.core.rates import same_tokens

    graphs, count = engine.runner.graphs, QUICK_OUTPUT_LEN if job["quick"] else 24
    before = graphs.num_replays
    expected = decode(engine, size, count)["outputs"]
    assert graphs.num_replays > before, "no step was replayed"
    graphs.reason = "they are measured without"
    try:
        same = same_tokens(decode(engine, size, count)["outputs"], expected)
        assert same > 50, f"{same:.0f}% of the tokens are those of steps with graphs"
        return {**loop_times(engine, job, 2, size), "same tokens %": same}
    finally:
        graphs.reason = None


def launches(engine: Any, job: dict[str, Any], size: int) -> dict[str, Any]:
    """What a decode step launches, copies and waits for, by PyTorch's profiler; microseconds of
    its kernels, and the share of the time in which one of them ran (%)."""
    engine.num_in_flight = 2
    num_steps = QUICK_PROFILED if job["quick"] else PROFILED
    decode(engine, size, 4)
    few, many = (decode(engine, size, 4 + count)["seconds"] for count in (0, num_steps))
    step_us = 1e6 * (many - few) / num_steps
    before, after = (profiled(engine, size, 4 + count) for count in (0, num_steps))
    kernels = {}
    for name, (count, us) in after.items():
        earlier = before.get(name, (0, 0.0))
        kernels[name] = ((count - earlier[0]) / num_steps, (us - earlier[1]) / num_steps)

    def total(*names: str) -> float:
        return sum(kernels.get(name, (0.0, 0.0))[0] for name in names)

    kernel_us = sum(us for _, us in kernels.values())
    slowest = sorted(kernels.items(), key=lambda entry: -entry[1][1])[:12]
    return {
        "launches a step": total("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel",
                                 "cuLaunchKernelEx"),
        "copies a step": total("cudaMemcpyAsync", "cudaMemsetAsync"),
        "waits a step": total("cudaStreamSynchronize", "cudaDeviceSynchronize",
                              "cudaEventSynchronize"),
        "step us": step_us,
        "kernels us": kernel_us,
        "kernels % of a step": 100 * kernel_us / step_us,
        "slowest": [
            {"kernel": name, "a step": count, "us": us} for name, (count, us) in slowest if us
        ],
    }  # fmt: skip


def profiled(engine: Any, size: int, output_len: int) -> dict[str, tuple[int, float]]:
    """Name of each call and kernel -> how many, and microseconds on the device."""
    import torch
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        decode(engine, size, output_len)
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.key_averages():
        on_device = event.device_type == DeviceType.CUDA
        us = event.self_device_time_total if on_device else 0.0
        count, earlier = found.get(event.key, (0, 0.0))
        found[event.key] = (count + event.count, earlier + us)
    return found
