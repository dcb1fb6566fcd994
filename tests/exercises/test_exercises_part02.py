"""Part 02's exercises: these fail until you do them. Run with `pytest -m exercise`."""

import asyncio
from typing import Any

import pytest

from common.requests import Request, fan_out
from common.sampling import SamplingParams
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture
def engine() -> Any:
    config = module_of(2, "config").EngineConfig(model="random:tiny-llama")
    return module_of(2, "engine").LLMEngine(config)


def test_take_turns(engine: Any) -> None:
    prompts = {"a": [2, 3], "b": [4, 5, 6], "c": [7]}
    expected = {
        name: engine.generate([prompt], GREEDY, progress=False)[0].token_ids
        for name, prompt in prompts.items()
    }
    for name, prompt in prompts.items():
        engine.add_request(Request(name, prompt, GREEDY))
    got: dict[str, list[int]] = {name: [] for name in prompts}
    for _ in range(15):
        for output in engine.step():
            got[output.request_id] += output.token_ids
    assert {name: len(tokens) for name, tokens in got.items()} == {"a": 5, "b": 5, "c": 5}
    while engine.has_unfinished():
        for output in engine.step():
            got[output.request_id] += output.token_ids
    assert got == expected


def test_a_deadline(engine: Any) -> None:
    async def main() -> tuple[str | None, int]:
        async_engine = module_of(2, "async_engine").AsyncEngine(engine)
        async with async_engine.lifespan():
            params = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True)
            requests = fan_out([([2, 3], params)])
            async for _, output, _ in async_engine.generate(requests, timeout=0.3):
                last = output
        return last.finish_reason, len(last.token_ids)

    reason, count = asyncio.run(main())
    assert reason == "abort" and 0 < count < 1000
