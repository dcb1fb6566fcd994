"""Part 06's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"


def engine_with(**flags: Any) -> Any:
    config = module_of(6, "config").EngineConfig(
        model=MODEL, threads=1, num_blocks=128, block_size=4, **flags
    )
    engine = module_of(6, "engine").LLMEngine(config)
    engine.num_in_flight = 1  # each step reads its own tokens
    return engine


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def step(engine: Any) -> dict[str, int]:
    engine.step()
    engine.check_integrity()
    return dict(engine.trace.last_record.scheduled)


def test_partial_prefills_share_the_budget() -> None:
    """Two prompts in their middle get half each; the third waits until one of them is done."""
    engine = engine_with(max_num_batched_tokens=12, max_partial_prefills=2)
    for name, length in (("a", 12), ("b", 30), ("c", 20)):
        engine.add_request(Request(name, [2] * length, greedy(20)))
    assert step(engine) == {"a": 6, "b": 6}
    assert step(engine) == {"a": 6, "b": 6}
    scheduled = step(engine)
    assert scheduled["a"] == 1 and set(scheduled) == {"a", "b", "c"}
    assert abs(scheduled["b"] - scheduled["c"]) <= 1 and sum(scheduled.values()) == 12


def test_slices_shrink_as_the_context_grows() -> None:
    """With 32 tokens of context as dear as a token, a slice after 96 is a quarter of the first."""
    engine = engine_with(max_num_batched_tokens=64, attention_cost=32)
    engine.add_request(Request("a", [2] * 400, greedy(2)))
    slices = []
    while engine.has_unfinished() and len(slices) < 100:
        slices += step(engine).values()
    assert sum(slices) == 400 + 1
    assert slices[0] > slices[2] > slices[4] > 1
    first, later = slices[0], slices[4]
    assert later < first / 2, "the same cost buys fewer tokens late in a prompt"
