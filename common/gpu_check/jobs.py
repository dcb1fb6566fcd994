"""The process of one job: JSON on standard input, one line of JSON for each item it is done with."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from common.gpu_check.items import Item, attempt

KINDS = {  # the job's kind: where its items come from
    "limits": f"{__name__}:limits",
    "kernels": "common.gpu_check.correctness:items",
    "oracle": "common.gpu_check.oracle:items",
    "compile": "common.gpu_check.rooflines:compile_ahead",
    "rooflines": "common.gpu_check.rooflines:items",
    "steps": "common.gpu_check.steps:items",
    "nano_vllm": "common.gpu_check.nano_vllm:items",
    "ladder": "common.gpu_check.ladder:items",
    "transformers": "common.gpu_check.ladder:transformers_items",
}


def limits(job: dict[str, Any]) -> Iterator[Item]:
    """{"device", "quick"}"""
    from common.bench.core.limits import measure_limits

    yield attempt("limits", lambda: {"limits": measure_limits(job["device"], job["quick"])})


def main() -> None:
    answer_to = os.dup(1)
    os.dup2(2, 1)  # what engines print is no answer
    job = json.load(sys.stdin)
    module, _, name = KINDS[job["kind"]].partition(":")
    items: Callable[[dict[str, Any]], Iterator[Item]] = getattr(import_module(module), name)
    with os.fdopen(answer_to, "w") as stream:
        for item in items(job):
            stream.write(json.dumps(item, allow_nan=False) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
