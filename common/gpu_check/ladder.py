"""The parts' speed on a GPU: decoding at several batch sizes, and prefill, on Qwen3's shapes
(or what --models names)."""

import time
from collections.abc import Iterator
from typing import Any

from common.bench.core.rates import Point, decode_point, planned_runs, prefill_point, rate, shares
from common.bench.core.worker import generate_job
from common.gpu_check.items import Item, attempt

BATCH_SIZES = (1, 16, 64, 256)
REPEATS = 2


def items(job: dict[str, Any]) -> Iterator[Item]:
    """{"name", "part", "model", "device", "quick", "limits"} -> one item."""
    yield attempt(job["name"], lambda: speeds(job))


def points(quick: bool) -> list[Point]:
    if quick:
        return [decode_point(1, 16, 8), decode_point(4, 16, 8), prefill_point(2, 32)]
    return [*(decode_point(size) for size in BATCH_SIZES), prefill_point(8, 1024)]


def speeds(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, MBU and MFU at each point, and the most GPU memory that was allocated."""
    import torch

    from common.models.checkpoint import read_json, resolve

    vocab_size = read_json(resolve(job["model"]) / "config.json")["vocab_size"]
    chosen = points(job["quick"])
    repeats = 1 if job["quick"] else REPEATS
    plans = [planned_runs(point, vocab_size, 0, repeats) for point in chosen]
    answer = generate_job(
        {
            "part": job["part"],
            "model": job["model"],
            "settings": {
                "device": job["device"],
                "dtype": "bfloat16" if job["device"].startswith("cuda") else "float32",
                "max_num_seqs": max(point.batch_size for point in chosen),
                "max_model_len": max(point.max_model_len for point in chosen) + 1,
            },
            "runs": [run for plan in plans for run in plan],
        }
    )
    runs = iter(answer.pop("runs"))
    rows = []
    for point, plan in zip(chosen, plans, strict=True):
        speed = rate(point, [next(runs) for _ in plan])
        share = shares(point, speed, answer["max_num_seqs"], answer, job["limits"])
        rows.append({"point": point.label, "rate": speed, **share})
    cuda = job["device"].startswith("cuda")
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return {"rows": rows, "construct_s": answer["construct_s"], "peak_mib": peak}


def transformers_items(job: dict[str, Any]) -> Iterator[Item]:
    """{"name", "model", "device", "quick"} -> one item: what users have without an engine."""
    yield attempt(job["name"], lambda: transformers_speeds(job))


def transformers_speeds(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of `generate`, with its defaults, at batch 1 and a larger one."""
    import torch

    from common.models.checkpoint import load_transformers_model, resolve

    cuda = job["device"].startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    model = load_transformers_model(resolve(job["model"]), dtype, job["device"])
    prompt_len, output_len = (16, 8) if job["quick"] else (128, 64)
    rows = []
    for size in (1, 4) if job["quick"] else (1, 64):
        prompts = torch.randint(2, 500, (size, prompt_len), device=job["device"])

        def seconds(count: int, prompts: torch.Tensor = prompts) -> float:
            begin = time.perf_counter()
            model.generate(
                prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
            )
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - begin

        seconds(2)
        first, whole = seconds(1), seconds(output_len)
        speed = size * (output_len - 1) / (whole - first)
        rows.append({"point": f"decode, batch {size}", "rate": speed})
    return {"rows": rows}
