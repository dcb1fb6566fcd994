"""The fresh process behind all that measures a part, and behind `limits`: one JSON job in, one JSON answer out.

Run as `python -m common.bench.core.worker` with the job on standard input. Whatever engines print goes
to standard error, so that standard output holds the answer alone.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

from common.bench.core.machine import last_level_cache_mib
from common.bench.core.memory import process_memory
from common.bench.core.noise import OtherWork
from common.bench.core.processes import part_package
from common.bench.core.workload import Lengths, random_prompts
from common.bench.costs import DTYPE_BYTES


def limits_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"device", "quick"} -> `measure_limits`."""
    from common.bench.core.limits import measure_limits

    return measure_limits(job["device"], job["quick"])


def startup_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings"} -> seconds of importing and of building the engine."""
    return start_engine(job)[2]


def start_engine(job: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(engine, its EngineConfig, {"import_s", "construct_s"})."""
    start = time.perf_counter()
    package = part_package(job["part"])
    engine_module = importlib.import_module(f"{package}.engine")
    config_module = importlib.import_module(f"{package}.config")
    imported = time.perf_counter()
    try:
        config = config_module.EngineConfig(model=job["model"], **job["settings"])
    except TypeError as error:
        raise ValueError(str(error).replace("EngineConfig.__init__() ", "")) from None
    engine = engine_module.LLMEngine(config)
    built = time.perf_counter()
    return engine, config, {"import_s": imported - start, "construct_s": built - imported}


def offline_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time generation, twice each repetition: for one token, and for all tokens.

    job: part, model, settings, lengths {"prompt", "output"}, repeats, seed, vocab_size or None.
    Each run has new prompts of the same lengths, so that no prefix cache answers for the engine.
    """
    engine, config, answer = start_engine(job)
    from common.sampling import SamplingParams  # not before: its imports are the part's

    shape = model_config(job["model"])
    vocab_size = job["vocab_size"] or (shape or {}).get("vocab_size") or 1000
    lengths = Lengths(**job["lengths"])

    def timed(run: str, most: int) -> dict[str, Any]:
        """Seconds and token counts of generating at most `most` tokens from each prompt."""
        prompts = random_prompts(lengths.prompt, vocab_size, f"{job['seed']} {run}")
        params = [
            SamplingParams(
                temperature=0, max_tokens=min(most, n), ignore_eos=True, seed=job["seed"]
            )
            for n in lengths.output
        ]
        start = time.perf_counter()
        completions = engine.generate(prompts, params, progress=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "output": [len(done.token_ids) for done in completions]}

    timed("warm-up", 4)
    longest = max(lengths.output)
    runs: list[dict[str, Any]] = []
    others = OtherWork()
    for number in range(job["repeats"]):
        first = timed(f"first {number}", 1)
        whole = timed(f"whole {number}", longest) if longest > 1 else first
        runs.append({"first": first, "whole": whole})
    answer |= {
        "runs": runs,
        "other_cores": others.cores(),
        "shape": shape,
        "memory": process_memory(),
        "vocab_size": vocab_size,
        **engine_facts(engine, config),
    }
    if hasattr(engine, "shutdown"):
        engine.shutdown()
    return answer


def arrival_job(job: dict[str, Any]) -> dict[str, Any]:
    """A long prompt among streams: see `common.bench.serving.arrival.measure`."""
    from common.bench.serving.arrival import measure

    engine, _, answer = start_engine(job)
    answer |= measure(engine, job)
    engine.shutdown()
    return answer


def captured_job(job: dict[str, Any]) -> dict[str, Any]:
    """Steps replayed and launched by one engine: see `common.bench.captured.measure`."""
    from common.bench.captured import measure

    engine, _, answer = start_engine(job)
    answer |= measure(engine, job)
    engine.shutdown()
    return answer


def generate_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings", "runs": [{"prompts", "max_tokens"}]} -> seconds and token ids of
    each run: greedy, and no token ends it."""
    engine, config, answer = start_engine(job)
    from common.sampling import SamplingParams

    runs: list[dict[str, Any]] = []
    for run in job["runs"]:
        params = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            for count in run["max_tokens"]
        ]
        start = time.perf_counter()
        completions = engine.generate(run["prompts"], params, progress=False)
        seconds = time.perf_counter() - start
        runs.append({"seconds": seconds, "outputs": [list(done.token_ids) for done in completions]})
    answer |= {"runs": runs, "shape": model_config(job["model"]), **engine_facts(engine, config)}
    if hasattr(engine, "shutdown"):
        engine.shutdown()
    return answer


def host_job(job: dict[str, Any]) -> dict[str, Any]:
    """A decode step without its device: see `common.bench.host.measure`."""
    from common.bench.host import measure

    return measure(job)


def kv_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings", "requests", "seed"} -> sums of `Usage` over the steps of a run,
    bytes of a token's keys and values, and the limits that the engine set itself."""
    engine, _, answer = start_engine(job)
    from common.bench.kv.usage import Request, run_requests

    requests = [Request(**values) for values in job["requests"]]
    lengths = [request.prompt for request in requests]
    usage = run_requests(engine, random_prompts(lengths, engine.vocab_size, job["seed"]), requests)
    kv = engine.kv
    answer |= {
        "usage": vars(usage),
        "token_bytes": kv.data.nbytes // (kv.num_blocks * kv.block_size),
        "context": engine.max_model_len,
        "max_num_batched_tokens": getattr(engine.config, "max_num_batched_tokens", None),
    }
    engine.shutdown()
    return answer


def model_config(model: str) -> dict[str, Any] | None:
    """The model's config.json, or None for a name that `common.models.checkpoint` does not know."""
    from common.models.checkpoint import read_json, resolve

    try:
        return read_json(resolve(model) / "config.json")
    except ValueError:
        return None


def engine_facts(engine: Any, config: Any) -> dict[str, Any]:
    """Device and dtype that the engine runs with, how many sequences it decodes together, and the
    last-level cache (MiB) that could hold the weights of a small model."""
    holders = (engine, getattr(engine, "model", None), config)

    def resolved(name: str) -> str:
        values = [str(getattr(holder, name, None) or "auto") for holder in holders]
        return next((value for value in values if value != "auto"), "auto").removeprefix("torch.")

    device, dtype = resolved("device"), resolved("dtype")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPE_BYTES:
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return {
        "device": device,
        "dtype": dtype,
        "max_num_seqs": getattr(config, "max_num_seqs", None) or 1,
        "cache_mib": None if device.startswith("cuda") else last_level_cache_mib(),
    }


JOBS = {
    "arrival": arrival_job,
    "captured": captured_job,
    "generate": generate_job,
    "host": host_job,
    "kv": kv_job,
    "limits": limits_job,
    "offline": offline_job,
    "startup": startup_job,
}


def main() -> None:
    answer_to = os.dup(1)
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    try:
        answer = JOBS[job["job"]](job)
    except (ValueError, ImportError) as error:
        sys.exit(f"{error}")
    with os.fdopen(answer_to, "w") as stream:
        json.dump(answer, stream)


if __name__ == "__main__":
    main()
