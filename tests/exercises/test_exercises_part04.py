"""Part 04's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"


def engine_with(**flags: Any) -> Any:
    config = module_of(4, "config").EngineConfig(model=MODEL, threads=1, **flags)
    return module_of(4, "engine").LLMEngine(config)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def drain(engine: Any) -> dict[str, list[int]]:
    """Step to the end; tokens by request, in the order in which they ended."""
    tokens: dict[str, list[int]] = {}
    ended: list[str] = []
    for _ in range(2000):
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            ended += [output.request_id] if output.finished else []
        engine.check_integrity()
        if not engine.has_unfinished():
            break
    assert not engine.has_unfinished(), "requests that never end"
    return {name: tokens[name] for name in ended}


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    engine = engine_with(block_size=4, num_blocks=32)
    return engine.generate([prompt], greedy(max_tokens), progress=False)[0].token_ids


def test_priorities() -> None:
    """Lower numbers run first; of equal ones, who came first. Memory is taken from the highest."""
    engine = engine_with(block_size=4, num_blocks=32, max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 5), ("c", 1), ("d", 1)):
        engine.add_request(Request(name, [2, 3, 4], greedy(4), priority=priority))
    assert list(drain(engine)) == ["a", "c", "d", "b"]


@pytest.mark.parametrize("num_blocks", [8, 9])
def test_memory_is_taken_from_the_highest(num_blocks: int) -> None:
    """Once it lacks the block itself, once it is in the step already when the other one does."""
    engine = engine_with(block_size=2, num_blocks=num_blocks, max_num_seqs=4)
    engine.add_request(Request("late", [2, 3, 4], greedy(8), priority=9))
    engine.step()
    engine.add_request(Request("urgent", [5, 6, 7], greedy(8), priority=0))
    outputs = drain(engine)
    preempted = [name for record in engine.trace.records() for name in record.preempted]
    assert preempted and set(preempted) == {"late"}, "though it joined first"
    assert list(outputs) == ["urgent", "late"]
    assert outputs["urgent"] == alone([5, 6, 7], 8)
    assert outputs["late"] == alone([2, 3, 4], 8)[-len(outputs["late"]) :]


def run_crowd(**flags: Any) -> tuple[dict[str, list[int]], int, int]:
    """(tokens of each request, preemptions, tokens run) of twelve requests in little memory."""
    engine = engine_with(block_size=4, num_blocks=16, max_num_seqs=12, **flags)
    for number in range(12):
        engine.add_request(Request(str(number), [number + 2] * 6, greedy(20)))
    outputs = drain(engine)
    num_run = sum(sum(record.scheduled.values()) for record in engine.trace.records())
    return outputs, engine.stats()["num_preemptions"], num_run


def test_a_watermark() -> None:
    """A share of the pool that nobody may join into, unless nobody runs."""
    plain, num_preemptions, num_run = run_crowd()
    careful, fewer, less = run_crowd(watermark=0.4)
    assert careful == plain, "the same tokens"
    assert num_preemptions > fewer and num_run > less
    engine = engine_with(block_size=4, num_blocks=8, watermark=0.9)
    assert len(drain_one(engine, [2] * 20, 6)) == 6, "who is alone may have it all"


def drain_one(engine: Any, prompt: list[int], max_tokens: int) -> list[int]:
    engine.add_request(Request("one", prompt, greedy(max_tokens)))
    return drain(engine)["one"]


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_preempt_the_shortest(length: int) -> None:
    """Who has the fewest tokens is the cheapest to compute again; the newest need not be it."""
    engine = engine_with(block_size=4, num_blocks=12, max_num_seqs=4, preempt="shortest")
    prompts = {"short": [2] * length, "long": [5] * 25}
    for name, prompt in prompts.items():
        engine.add_request(Request(name, prompt, greedy(16)))
        engine.step()
    outputs = drain(engine)
    preempted = [name for record in engine.trace.records() for name in record.preempted]
    assert preempted and set(preempted) == {"short"}, "the older of the two"
    for name, prompt in prompts.items():
        assert outputs[name] == alone(prompt, 16)[-len(outputs[name]) :]


def test_the_policy_does_not_change_the_tokens() -> None:
    cheap, dear = run_crowd(preempt="shortest"), run_crowd(preempt="newest")
    assert cheap[0] == dear[0]
