"""What the adapters in this folder share: a job on standard input, the answer on standard output.

An adapter is run by its path with the Python of the peer's own environment, in which nothing of
this project is installed. So it imports this file, the peer, and nothing else.

    job:    {"model": folder, "gguf": file or null, "device", "dtype", "threads", "max_num_seqs",
             "max_model_len", "runs": [{"prompts": [[token ids]], "max_tokens": [...]}]}
    answer: {"dtype": as the peer runs it, "runs": [{"seconds", "outputs": [[token ids]]}]}

Decoding is greedy and no token ends it. With `--version` the answer is {"version"}, at once.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]  # prompts, max_tokens -> outputs


def main(package: str, start: Callable[[dict[str, Any]], tuple[Generate, str]]) -> None:
    """Answer the job. `start` loads the model of a job and returns (generate, dtype)."""
    if sys.argv[1:] == ["--version"]:
        try:
            print(json.dumps({"version": importlib.metadata.version(package)}))
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{package} is not installed for {sys.executable}")
        return
    answer_to = os.dup(1)
    os.dup2(2, 1)  # what the peer prints must not mix with the answer
    job = json.load(sys.stdin)
    try:
        generate, dtype = start(job)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}".strip().replace("\n", " "))
    runs = []
    for run in job["runs"]:
        begin = time.perf_counter()
        outputs = generate(run["prompts"], run["max_tokens"])
        runs.append({"seconds": time.perf_counter() - begin, "outputs": outputs})
    with os.fdopen(answer_to, "w") as stream:
        json.dump({"dtype": dtype, "runs": runs}, stream)


def has_weights(job: dict[str, Any]) -> bool:
    """Whether the model's folder holds weights; without, it is a shape for random ones."""
    return any(name.endswith(".safetensors") for name in os.listdir(job["model"]))
