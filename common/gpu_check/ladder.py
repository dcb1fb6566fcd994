"""The parts' speed: decoding at several batch sizes, and prefill; and transformers' `generate`."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from common.bench import BenchError
from common.bench.core.rates import Point, decode_point, planned_runs, prefill_point, rate, shares
from common.gpu_check.engines import engine_of, threads_of
from common.gpu_check.items import Check, Once

BATCH_SIZES, QUICK_BATCH_SIZES = (1, 16, 64, 256), (1, 4)
THEIR_BATCH_SIZES = (1, 64)  # transformers'
REPEATS = 2


HELD = ("weight_bytes", "kv_cache_bytes", "buffer_bytes")  # in the stats


def points(quick: bool) -> list[Point]:
    if quick:
        return [*(decode_point(size, 16, 8) for size in QUICK_BATCH_SIZES), prefill_point(2, 32)]
    return [*(decode_point(size) for size in BATCH_SIZES), prefill_point(8, 1024)]


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"name", "part", "model", "device", "quick", "limits"} -> a check for each point."""
    engine = Once(lambda: started(job))
    for point in points(job["quick"]):
        name = f"{job['name']}, {point.label}"
        yield name, lambda point=point: measured(engine(), point, job)
    if job["device"].startswith("cuda"):
        yield f"{job['name']}, memory", lambda: memory(engine(), job)


def started(job: dict[str, Any]) -> Any:
    """An engine that has room for every point."""
    chosen = points(job["quick"])
    return engine_of(
        job,
        max_num_seqs=max(point.batch_size for point in chosen),
        max_model_len=max(point.max_model_len for point in chosen) + 1,
    )[0]


def measured(engine: Any, point: Point, job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, MBU and MFU."""
    repeats = 1 if job["quick"] else REPEATS
    plan = planned_runs(point, engine.vocab_size, 0, repeats)
    runs = [run(engine, requests) for requests in plan]
    return rated(point, lambda: rate(point, runs), job)


def run(engine: Any, requests: dict[str, Any]) -> dict[str, Any]:
    """{"prompts", "max_tokens"} -> seconds and token ids: greedy, and no token ends it."""
    from common.sampling import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        for count in requests["max_tokens"]
    ]
    begin = time.perf_counter()
    completions = engine.generate(requests["prompts"], params, progress=False)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "outputs": [list(done.token_ids) for done in completions]}


def rated(point: Point, measure: Callable[[], float], job: dict[str, Any]) -> dict[str, Any]:
    """A point's speed, and its shares of the limits. Tiny shapes may have none: what they take to
    decode is less than two runs differ by."""
    from common.models.checkpoint import read_json, resolve

    try:
        speed = measure()
    except BenchError as error:
        if job["quick"]:
            return {"note": str(error)}
        raise
    facts = {"shape": read_json(resolve(job["model"]) / "config.json"), "dtype": job["dtype"]}
    return {"tok/s": speed, **shares(point, speed, point.batch_size, facts, job["limits"])}


def memory(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """What the engine holds, and the most that PyTorch had allocated and reserved; MiB."""
    import torch

    held = {name: value / 2**20 for name, value in engine.stats().items() if name in HELD}
    return {name.replace("bytes", "mib"): value for name, value in held.items()} | {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(job["device"]) / 2**20,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(job["device"]) / 2**20,
    }


def transformers_checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"name", "model", "device", "quick", "limits"} -> a check for each batch size: what users
    have without an engine."""
    model = Once(lambda: transformers_model(job))
    for size in QUICK_BATCH_SIZES if job["quick"] else THEIR_BATCH_SIZES:
        point = decode_point(size, 16, 8) if job["quick"] else decode_point(size)
        name = f"{job['name']}, {point.label}"
        yield name, lambda point=point: transformers_speed(model(), point, job)


def transformers_model(job: dict[str, Any]) -> Any:
    import torch

    from common.models.checkpoint import load_transformers_model, resolve

    torch.set_num_threads(threads_of(job) or torch.get_num_threads())
    return load_transformers_model(
        resolve(job["model"]), getattr(torch, job["dtype"]), job["device"]
    )


def transformers_speed(model: Any, point: Point, job: dict[str, Any]) -> dict[str, Any]:
    return rated(point, lambda: generate_speed(model, point, job), job)


def generate_speed(model: Any, point: Point, job: dict[str, Any]) -> float:
    """Tokens a second of `generate`, with its defaults, after the first token."""
    import torch

    shape = (point.batch_size, point.prompt[0])
    prompts = torch.randint(2, 500, shape, device=job["device"])

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        made = model.generate(
            prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        assert made.cpu().shape == (shape[0], shape[1] + count), made.shape
        return time.perf_counter() - begin

    seconds(2)
    spent = seconds(point.output[0]) - seconds(1)
    if spent <= 0:
        raise BenchError(f"{point.label}: the time to decode is within the noise of the prefill's")
    return point.batch_size * (point.output[0] - 1) / spent
