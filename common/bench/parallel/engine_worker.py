"""A process with one engine behind `parallel engines`: a job, and then a run a line.

Run as `python -m common.bench.parallel.engine_worker`. The first line of standard input says which
engine: {"part", "model", "settings"}. Each later line is a run, {"prompts", "max_tokens"}: several
such processes begin theirs together, as replicas. Every line is answered by one line.
"""

import gc
import json
import os
import sys
import time
from typing import Any

from common.bench import BenchError
from common.bench.core.memory import descendants, process_memory
from common.bench.core.worker import engine_facts, model_config, start_engine
from common.bench.parallel.watched import Watch
from common.bench.speculative.worker import decode


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(engine, what it says of itself). rank_bytes: of each rank its weights and its KV cache;
    peak_mib: of each rank's process until now."""
    engine, config, answer = start_engine(job)
    stats = engine.stats()
    processes = ["self", *ranks_of(os.getpid())]
    answer |= {
        "shape": model_config(job["model"]),
        "peak_mib": [process_memory(process).get("peak_mib") for process in processes],
        "rank_bytes": stats.get("rank_bytes") or [[stats["weight_bytes"], stats["kv_cache_bytes"]]],
        "kv_tokens": engine.kv.num_blocks * engine.kv.block_size,
        **engine_facts(engine, config),
    }
    return engine, answer


def ranks_of(pid: int) -> list[int]:
    """The processes of the other ranks, in order: they are started one after the other."""
    return sorted(descendants(pid))


def run(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """One token each, as fast as prompts are computed, or max_tokens each, as `decode` counts.

    seconds, num_tokens, outputs; num_computed: tokens of all forwards; sent: by collective, what
    rank 0 did in all of the run."""
    gc.collect()  # here, and not in the midst of what is measured
    group = getattr(getattr(engine.runner, "ranks", None), "group", None)
    watch = Watch(group) if group is not None else None
    try:
        if job["max_tokens"] == 1:
            answer = prefill(engine, job["prompts"])
        else:
            answer = decode(engine, job["prompts"], job["max_tokens"])
    finally:
        if watch is not None:
            watch.stop()
    totals = watch.totals() if watch is not None else {}
    answer["num_computed"] = sum(len(prompt) + job["max_tokens"] - 1 for prompt in job["prompts"])
    return answer | {"sent": {name: vars(total) for name, total in totals.items()}}


def prefill(engine: Any, prompts: list[list[int]]) -> dict[str, Any]:
    from common.sampling import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    begin = time.perf_counter()
    completions = engine.generate(prompts, params, progress=False)
    seconds = time.perf_counter() - begin
    outputs = [list(done.token_ids) for done in completions]
    return {"seconds": seconds, "num_tokens": sum(map(len, prompts)), "outputs": outputs}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    engine = None
    for line in sys.stdin:
        job = json.loads(line)
        if engine is None:
            engine, answer = start(job)
        else:
            answer = run(engine, job)
        print(json.dumps(answer), file=answers, flush=True)
    if engine is not None:
        engine.shutdown()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, BenchError) as error:
        sys.exit(str(error))
