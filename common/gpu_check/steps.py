"""Decode steps of a part that launches a step before the last one is read: what the device does,
what it waits for, and what the host does to it.

One engine, both loops: with two steps in flight, and in turns. Then, of the same engine: kernels
launched in a step, kernels compiled after the warm-up (there should be none), whether any call
made the host wait for the device (PyTorch's own guard raises), and the same forward captured as a
CUDA graph, which is the limit that launches stand in the way of.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from common.bench.core.worker import start_engine
from common.bench.core.workload import random_prompts
from common.gpu_check.items import Item, attempt

BATCH_SIZES, QUICK_BATCH_SIZES = (1, 16, 64, 256), (2,)
OUTPUT_LEN, QUICK_OUTPUT_LEN = 128, 12
SETTLED = 8  # steps at either end that are left out
REPLAYS = 20


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"name", "part", "model", "device", "quick"} -> an item for each loop, and the others."""
    engine: Any = None

    def start() -> dict[str, Any]:
        nonlocal engine
        engine, answer = started(job)
        return answer

    yield attempt(f"{job['name']}, start", start)
    if engine is None:
        return
    for is_async in (True, False):
        loop = "two steps in flight" if is_async else "in turns"
        yield attempt(
            f"{job['name']}, {loop}", lambda is_async=is_async: loop_times(engine, job, is_async)
        )
    if job["device"].startswith("cuda"):
        yield attempt(f"{job['name']}, launches", lambda: launches(engine, job))
        yield attempt(f"{job['name']}, no waiting", lambda: guarded(engine, job))
        yield attempt(f"{job['name']}, captured", lambda: captured(engine, job))


def started(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(an engine, seconds of its start)."""
    sizes = QUICK_BATCH_SIZES if job["quick"] else BATCH_SIZES
    settings = {
        "device": job["device"],
        "dtype": "bfloat16" if job["device"].startswith("cuda") else "float32",
        "max_num_seqs": max(sizes),
        "max_model_len": 512,
    }
    engine, _, answer = start_engine(
        {"part": job["part"], "model": job["model"], "settings": settings}
    )
    return engine, answer


def decode(engine: Any, size: int, output_len: int) -> float:
    """Seconds of generating from `size` short prompts."""
    from common.sampling import SamplingParams

    prompts = random_prompts([32] * size, engine.vocab_size, f"steps {size}")
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    begin = time.perf_counter()
    engine.generate(prompts, params, progress=False)
    return time.perf_counter() - begin


def loop_times(engine: Any, job: dict[str, Any], is_async: bool) -> dict[str, Any]:
    """For each batch size: microseconds between the device's steps and of a step, the share of the
    time in which it was busy (%), tokens a second; and how many kernels were compiled meanwhile."""
    engine.num_in_flight = 2 if is_async else 1
    output_len = QUICK_OUTPUT_LEN if job["quick"] else OUTPUT_LEN
    found: dict[str, Any] = {}
    for size in QUICK_BATCH_SIZES if job["quick"] else BATCH_SIZES:
        decode(engine, size, 4)
        start = engine.trace.last_record.step
        with compilations(job) as compiled:
            seconds = decode(engine, size, output_len)
        records = [record for record in engine.trace.records() if record.step > start]
        spans = [span for record in records for span in record.device][1:]
        skip = min(SETTLED, len(spans) // 4)
        spans = spans[skip : len(spans) - skip]
        gaps = [after[1] - before[2] for before, after in itertools.pairwise(spans)]
        busy = sum(end - begin for _, begin, end in spans)
        found[f"gap us at {size}"] = 1e6 * statistics.median(gaps)
        found[f"step us at {size}"] = 1e6 * statistics.median(
            end - begin for _, begin, end in spans
        )
        found[f"busy % at {size}"] = 100 * busy / (spans[-1][2] - spans[0][1])
        found[f"tok/s at {size}"] = size * output_len / seconds
        found[f"compiled at {size}"] = len(compiled)
    assert not any(value for name, value in found.items() if name.startswith("compiled")), found
    return found


@contextlib.contextmanager
def compilations(job: dict[str, Any]) -> Iterator[list[str]]:
    """The names of the kernels that Triton compiles meanwhile, or fetches from its folder."""
    names: list[str] = []
    if not job["device"].startswith("cuda"):
        yield names
        return
    from triton import knobs

    def note(*_: Any, **about: Any) -> None:
        names.append(str(about.get("repr") or about.get("fn")))

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_cache_hook = before


def launches(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Kernels that a step launches, and copies, by PyTorch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    engine.num_in_flight = 2
    found: dict[str, Any] = {}
    for size in BATCH_SIZES[::3]:
        decode(engine, size, 4)
        start = engine.trace.last_record.step
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            decode(engine, size, 32)
            torch.cuda.synchronize()
        num_steps = engine.trace.last_record.step - start
        counts = {event.key: event.count for event in profiler.key_averages()}
        for name, calls in (
            ("launches", ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")),
            ("copies", ("cudaMemcpyAsync", "cudaMemsetAsync")),
            ("waits", ("cudaStreamSynchronize", "cudaDeviceSynchronize")),
        ):
            found[f"{name} a step at {size}"] = sum(counts.get(call, 0) for call in calls) / num_steps
    return found


def guarded(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Steps of all kinds of requests under PyTorch's guard against waiting for the device."""
    import torch

    from common.sampling import SamplingParams

    engine.num_in_flight = 2
    kinds = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
        {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0, "logprobs": 5},
        {"temperature": 0, "logit_bias": {5: 1.0}},
    ]
    params = [SamplingParams(max_tokens=24, ignore_eos=True, **kind) for kind in kinds]
    prompts = random_prompts([32] * len(kinds), engine.vocab_size, "guarded")
    launch = engine.launch

    def watched(batch: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.launch = watched
    try:
        engine.generate(prompts, params, progress=False)
    finally:
        engine.launch = launch
    return {"num_requests": len(kinds)}


def captured(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Microseconds of a decode step's forward and sampling, launched and as one CUDA graph."""
    import torch

    engine.num_in_flight = 1
    runner, found = engine.runner, {}
    for size in BATCH_SIZES:
        batches: list[Any] = []
        run = runner.run

        def noting(batch: Any, run: Callable = run, batches: list[Any] = batches) -> Any:
            batches.append(batch)
            return run(batch)

        runner.run = noting
        try:
            decode(engine, size, 4)
        finally:
            runner.run = run
        batch = batches[-1]  # its tensors lie in the input buffers still

        def step(batch: Any = batch) -> Any:
            logits, _ = runner.forward(batch)
            return runner.sample(batch, logits)

        with torch.inference_mode():
            found[f"launched us at {size}"] = microseconds(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            found[f"captured us at {size}"] = microseconds(graph.replay)
    return found


def microseconds(call: Callable[[], object]) -> float:
    """Of a call, when calls follow each other at once."""
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(REPLAYS):
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / REPLAYS
