"""The fresh process behind `speculative`: an engine decodes batch after batch, one JSON job in, one answer out.

Run as `python -m common.bench.speculative.worker`; the frame is that of `common.bench.core.worker`.
"""

import gc
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from common.bench import BenchError
from common.bench.core.worker import JOBS, engine_facts, main, model_config, start_engine

COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def decode(
    engine: Any,
    prompts: list[list[int]],
    max_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Hand prompts over at once and run them to their ends, greedily.

    Counted from when each has its first token until the last has its last: seconds, num_tokens,
    num_steps, num_turns (of a sequence in a step that gave it tokens), counters, and phases, the
    seconds of each by name. whole_s is from handing over; outputs are all tokens. Raises BenchError.
    """
    from common.requests import Request
    from common.sampling import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    handed_over = clock()
    for name, prompt in zip(outputs, prompts, strict=True):
        engine.add_request(Request(name, prompt, params))
    num_tokens = num_steps = num_turns = 0
    begin, before = None, {}
    while engine.has_unfinished():
        new = [output for output in engine.step() if output.token_ids]
        for output in new:
            outputs[output.request_id] += output.token_ids
        if begin is not None:
            num_steps += 1
            num_turns += len(new)
            num_tokens += sum(len(output.token_ids) for output in new)
        elif all(outputs.values()):
            begin, before = clock(), counts(engine)
    end, after = clock(), counts(engine)
    asked = len(prompts) * max_tokens
    if (given := sum(map(len, outputs.values()))) != asked:
        raise BenchError(f"batch {len(prompts)}: {given} tokens, not {asked}")
    if begin is None or not num_tokens:
        raise BenchError(f"batch {len(prompts)}: nothing is left to decode after the first tokens")
    return {
        "seconds": end - begin,
        "whole_s": end - handed_over,
        "num_tokens": num_tokens,
        "num_steps": num_steps,
        "num_turns": num_turns,
        "counters": {name: after[name] - before[name] for name in after},
        "phases": phases(engine, num_steps),
        "outputs": list(outputs.values()),
    }


def counts(engine: Any) -> dict[str, int]:
    """What an engine that speculates has counted until now; nothing of another."""
    stats = engine.stats()
    return {name: stats[name] for name in COUNTERS if name in stats}


def phases(engine: Any, num_steps: int) -> dict[str, float]:
    """Seconds of each phase of the last steps, added up."""
    seconds: Counter[str] = Counter()
    for record in engine.trace.records()[-num_steps:]:
        seconds.update(record.phase_seconds())
    return dict(seconds)


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches that ran one after the other, as one run."""
    sums = ("seconds", "whole_s", "num_tokens", "num_steps", "num_turns")
    total: dict[str, Any] = {name: sum(run[name] for run in runs) for name in sums}
    for name in ("counters", "phases"):
        added: Counter[str] = Counter()
        for run in runs:
            added.update(run[name])
        total[name] = dict(added)
    return total | {"outputs": [output for run in runs for output in run["outputs"]]}


def speculative_job(job: dict[str, Any]) -> dict[str, Any]:
    """{"part", "model", "settings", "max_tokens", "warm_up": [[token ids]], "points": [{"name",
    "batches": [[[token ids]]]}]} -> "runs": a run by each point's name, and what `engine_facts` says.

    warm_up: batches whose first few tokens are decoded before anything is measured.
    """
    engine, config, answer = start_engine(job)
    for batch in job["warm_up"]:
        decode(engine, batch, min(8, job["max_tokens"]))
    runs: dict[str, Any] = {}
    for point in job["points"]:
        gc.collect()  # here, and not in the midst of what is measured
        runs[point["name"]] = merged(
            [decode(engine, batch, job["max_tokens"]) for batch in point["batches"]]
        )
    engine.check_integrity()
    answer |= {"runs": runs, "shape": model_config(job["model"]), **engine_facts(engine, config)}
    engine.shutdown()
    return answer


if __name__ == "__main__":
    JOBS["speculative"] = speculative_job
    try:
        main()
    except BenchError as error:
        sys.exit(str(error))
