"""Part 01's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest
import torch

from common.sampling import SamplingParams
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
PROMPT = [5, 6, 7, 8]


@pytest.fixture
def engine() -> Any:
    config = module_of(1, "config").EngineConfig(model="random:tiny-llama")
    return module_of(1, "engine").LLMEngine(config)


def count_calls(engine: Any) -> list[int]:
    """The number of tokens in each call of the model from now on."""
    sizes: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append((args or (kwargs["input_ids"],))[0].shape[1]),
        with_kwargs=True,
    )
    return sizes


def test_one_prefill_for_many_answers(engine: Any) -> None:
    params = {"temperature": 1.0, "seed": 1, "max_tokens": 12, "ignore_eos": True}
    [alone] = engine.generate([PROMPT], SamplingParams(**params), progress=False)
    sizes = count_calls(engine)
    several = engine.generate([PROMPT], SamplingParams(**params, n=3), progress=False)
    assert sizes.count(len(PROMPT)) == 1, "the prompt is prefilled once"
    assert [completion.index for completion in several] == [0, 1, 2]
    assert several[0].token_ids == alone.token_ids
    assert len({tuple(completion.token_ids) for completion in several}) == 3


def test_prefill_in_pieces(engine: Any) -> None:
    token_ids = list(range(2, 102))
    with torch.inference_mode():
        whole, _ = engine.prefill(token_ids)
        sizes = count_calls(engine)
        pieces, cache = engine.prefill(token_ids, chunk_size=16)
    assert max(sizes) <= 16 and sum(sizes) == 100
    assert cache.get_seq_length() == 100
    assert torch.allclose(whole, pieces, atol=1e-4)
