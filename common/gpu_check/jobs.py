"""The process of one job.

The job is a line of JSON on standard input. The answer is lines of JSON: the names of all checks
that are to come, and for each of them that it begins, and its item. So their reader knows
what was being done when this process died, and what was never begun.

Standard input stays open for as long as the parent lives: with it this process ends, whatever the
parent died of, and does not go on holding the GPU.
"""

import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from common.gpu_check.items import FAILED, Check, attempt

BROKEN = 86  # exit status: after a failure the GPU refuses this process all further work
KINDS = {  # the job's kind: where its checks come from
    "limits": "common.gpu_check.jobs:limits",
    "kernels": "common.gpu_check.correctness:checks",
    "compile": "common.gpu_check.rooflines:compile_ahead",
    "start": "common.gpu_check.steps:cold_start",
    "speculators": "common.gpu_check.guard:start_checks",
    "oracle": "common.gpu_check.oracle:checks",
    "quantized": "common.gpu_check.quantized:checks",
    "compile_quantized": "common.gpu_check.quantized:compile_ahead",
    "rooflines": "common.gpu_check.rooflines:checks",
    "steps": "common.gpu_check.steps:checks",
    "copies": "common.gpu_check.copies:checks",
    "nano_vllm": "common.gpu_check.nano_vllm:checks",
    "ladder": "common.gpu_check.ladder:checks",
    "transformers": "common.gpu_check.ladder:transformers_checks",
}


def limits(job: dict[str, Any]) -> Iterator[Check]:
    """{"device", "quick"}"""
    from common.bench.core.limits import measure_limits

    yield "limits", lambda: {"limits": measure_limits(job["device"], job["quick"])}


def is_usable(device: str) -> bool:
    """Whether the GPU still does this process's work; after an error in a kernel it does not."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        gc.collect()  # what the failure had held
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    answer_to = os.dup(1)
    os.dup2(2, 1)  # what engines print is no answer
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    if ":" in job["device"]:
        import torch

        torch.cuda.set_device(job["device"])
    module, _, name = KINDS.get(job["kind"], job["kind"]).partition(":")
    checks: Callable[[dict[str, Any]], Iterator[Check]] = getattr(import_module(module), name)
    with os.fdopen(answer_to, "w") as stream:

        def say(message: dict[str, Any]) -> None:
            stream.write(json.dumps(message, allow_nan=False) + "\n")
            stream.flush()

        texts = job.get("only") or [""]
        wanted = [check for check in checks(job) if any(text in check[0] for text in texts)]
        rest = wanted[job.get("skip", 0) :]
        say({"names": [name for name, _ in rest]})
        for name, check in rest:
            say({"begins": name})
            item = attempt(name, check)
            say({"item": item})
            if item["status"] == FAILED and not is_usable(job["device"]):
                stream.flush()
                os._exit(BROKEN)  # an ordinary end would wait for the GPU
        stream.flush()
        os._exit(0)  # freeing the engine piece by piece takes seconds, and may hang


if __name__ == "__main__":
    main()
