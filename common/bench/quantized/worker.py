"""The fresh process behind `formats`: loads an engine, and decodes batch after batch.

Run as `python -m common.bench.quantized.worker`; the frame is that of `common.bench.core.worker`.
"""

import gc
import importlib
import sys
import threading
from types import TracebackType
from typing import Any

from common.bench import BenchError
from common.bench.core.memory import process_memory
from common.bench.core.processes import part_package
from common.bench.core.worker import JOBS, engine_facts, main, model_config, start_engine
from common.bench.core.workload import random_prompts
from common.bench.speculative.worker import decode

LOOK_EVERY_S = 0.005
WARM_UP_TOKENS = 4


class PrivateMemory:
    """The most private memory (MiB) that this process has while the context lasts, beyond what it
    has before; looked at from a thread, since the kernel keeps no peak of it."""

    def __init__(self) -> None:
        self.before = self.most = process_memory().get("anon_mib", 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def growth(self) -> float:
        return self.most - self.before

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        self.most = max(self.most, process_memory().get("anon_mib", 0.0))

    def __enter__(self) -> "PrivateMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()


def formats_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings", "prompt_len", "output_len", "batch_sizes", "seed"} -> "runs", by
    batch, as `speculative.worker.decode` gives them without their tokens; what loading took; bytes.
    """
    importlib.import_module(f"{part_package(job['part'])}.engine")  # what it takes is no loading
    resident = process_memory().get("rss_mib", 0.0)
    with PrivateMemory() as private:
        engine, config, answer = start_engine(job)
    memory = process_memory()
    kv = engine.kv
    answer |= {
        "load_peak_mib": memory.get("peak_mib", 0.0) - resident,
        "load_private_mib": private.growth,
        "weight_bytes": engine.stats()["weight_bytes"],
        "token_bytes": kv.data.nbytes // (kv.num_blocks * kv.block_size),
        "runs": {f"batch {size}": decode_batch(engine, size, job) for size in job["batch_sizes"]},
        "rss_mib": process_memory().get("rss_mib"),
        "shape": model_config(job["model"]),
        **engine_facts(engine, config),
    }
    engine.check_integrity()
    engine.shutdown()
    return answer


def decode_batch(engine: Any, size: int, job: dict[str, Any]) -> dict[str, Any]:
    def prompts(name: str) -> list[list[int]]:
        seed = f"{job['seed']} {name} {size}"
        return random_prompts([job["prompt_len"]] * size, engine.vocab_size, seed)

    decode(engine, [prompt[:8] for prompt in prompts("warm-up")], WARM_UP_TOKENS)
    gc.collect()  # here, and not in the midst of what is measured
    run = decode(engine, prompts("timed"), job["output_len"])
    return {key: run[key] for key in ("seconds", "num_tokens", "num_steps", "num_turns")}


if __name__ == "__main__":
    JOBS["formats"] = formats_job
    try:
        main()
    except BenchError as error:
        sys.exit(str(error))
