"""The parts' speed on a GPU: decoding at several batch sizes, and prefill, on Qwen3's shapes
(or what --models names)."""

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
