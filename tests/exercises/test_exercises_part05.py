"""Part 05's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"


def engine_with(**flags: Any) -> Any:
    config = module_of(5, "config").EngineConfig(model=MODEL, threads=1, num_blocks=64, **flags)
    return module_of(5, "engine").LLMEngine(config)


def greedy(max_tokens: int, *stop_token_ids: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stop_token_ids
    )


def test_discarded_tokens_are_counted() -> None:
    """One for an end that nobody could foresee, none for one that was known."""
    engine = engine_with()
    [whole] = engine.generate([[2, 3, 4]], greedy(6), progress=False)
    assert engine.stats()["num_discarded_tokens"] == 0
    stop = whole.token_ids[2]
    engine.generate([[2, 3, 4]], greedy(6, stop), progress=False)
    assert engine.stats()["num_discarded_tokens"] == 1
    engine.add_request(Request("a", [2, 3, 4], greedy(6)))
    engine.step()
    engine.step()
    engine.abort("a")
    while engine.has_unfinished():
        engine.step()
    assert engine.stats()["num_discarded_tokens"] == 2


@pytest.mark.parametrize("count", [1, 3])
def test_three_steps_in_flight(count: int) -> None:
    """As many launches as asked for before the first token is read; the same tokens as ever."""
    expected = engine_with().generate([[2, 3, 4], [5]], greedy(9), progress=False)
    engine = engine_with(steps_in_flight=count)
    engine.add_request(Request("a", [2, 3, 4], greedy(9)))
    for number in range(count - 1):
        assert engine.step() == [], f"step {number} reads too early"
    assert [output.token_ids for output in engine.step()] == [expected[0].token_ids[:1]]
    while engine.has_unfinished():
        engine.step()
        engine.check_integrity()
    outputs = engine.generate([[2, 3, 4], [5]], greedy(9), progress=False)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
