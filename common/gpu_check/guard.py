"""Steps under PyTorch's guard against calls that make the host wait for the GPU.

Such a call in a step that was to be launched while another one runs takes all that asynchronous
scheduling gains. The guard raises where one is made, so the traceback says which it was. Waiting
for an event, as the engine does for a step's tokens, is not meant by it.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from common.bench.core.workload import random_prompts
from common.gpu_check.engines import engine_of
from common.gpu_check.items import Check
from common.gpu_check.plan import FIRST_SPECULATIVE_PART, QUICK_MODEL, SPECULATIVE

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampling": {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 1},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logprobs": {"temperature": 0, "logprobs": 5},
    "prompt logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "biases": {"temperature": 0, "logit_bias": {5: 1.0}, "min_tokens": 4},
}
ECHO = {"temperature": 0, "logit_bias": {7: 100.0}}  # an output in which n-grams are found
NUM_SEQS, OUTPUT_LEN, QUICK_OUTPUT_LEN = 4, 24, 8


def guard_checks(job: dict[str, Any], engine: Callable[[], Any]) -> Iterator[Check]:
    """A check for each kind of request."""
    for kind, params in KINDS.items():
        name = f"{job['name']}, no waiting, {kind}"
        yield name, lambda params=params: guarded(engine(), job, [params])
    name = f"{job['name']}, no waiting, all together"
    yield name, lambda: guarded(engine(), job, list(KINDS.values()))


def speculation_checks(job: dict[str, Any]) -> Iterator[Check]:
    """A check for each way to speculate."""
    if job["part"] < FIRST_SPECULATIVE_PART:
        return
    for method in SPECULATIVE:
        name = f"part {job['part']:02d}, {QUICK_MODEL}, no waiting, speculative {method}"
        yield name, lambda method=method: speculating(job, method)


def start_checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"part", "device", "dtype", "quick", "methods"} -> the start of an engine for each way to
    speculate, which leaves its kernels on disk."""
    for method in job["methods"]:
        name = f"part {job['part']:02d}, {QUICK_MODEL}, cold start, speculative {method}"
        yield name, lambda method=method: speculator(job, method)[1]


def speculator(job: dict[str, Any], method: str) -> tuple[Any, dict[str, Any]]:
    """An engine that speculates, on a tiny model, and seconds of its start."""
    sizes = {"max_num_seqs": 16, "max_model_len": 512, "num_blocks": 1024}
    tiny = job | {"model": QUICK_MODEL}
    return engine_of(tiny, speculative=method, **sizes, **SPECULATIVE[method])


def guarded(engine: Any, job: dict[str, Any], kinds: list[dict[str, Any]]) -> dict[str, Any]:
    """Run requests of these kinds, first freely, then with every step under the guard."""
    import torch

    from common.sampling import SamplingParams

    # Texts that repeat themselves, so that there is something to draft.
    starts = random_prompts([8] * NUM_SEQS * len(kinds), engine.vocab_size, "guarded")
    most = QUICK_OUTPUT_LEN if job["quick"] else OUTPUT_LEN
    params = [SamplingParams(max_tokens=most, ignore_eos=True, **kind) for kind in kinds]
    arguments = ([start * 4 for start in starts], params * NUM_SEQS)
    step, num_steps = engine.step, 0

    def watched() -> Any:
        nonlocal num_steps
        num_steps += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    try:
        engine.generate(*arguments, progress=False)
        with mock.patch.object(engine, "step", watched):
            engine.generate(*arguments, progress=False)
    finally:
        engine.drop_requests()
    return {"num_steps": num_steps, "num_requests": len(params) * NUM_SEQS}


def speculating(job: dict[str, Any], method: str) -> dict[str, Any]:
    """Speculation, with seeds and without. Raises AssertionError where nothing is drafted."""
    engine, _ = speculator(job, method)
    try:
        found = guarded(engine, job, [ECHO, {"temperature": 0.5}, KINDS["sampling"]])
        num_drafts = engine.stats()["num_draft_tokens"]
    finally:
        engine.shutdown()
    assert num_drafts, "nothing was drafted"
    return {**found, "num_draft_tokens": num_drafts}
