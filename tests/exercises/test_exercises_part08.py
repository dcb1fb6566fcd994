"""Part 08's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded, reference_logits
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"
PROMPT = [(7 * i) % 500 + 2 for i in range(30)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
# At this temperature the model says hardly anything twice, so its own text is of no help.
SEEDED = SamplingParams(temperature=2.0, seed=5, max_tokens=60, ignore_eos=True)
NGRAM = {"speculative": "ngram", "num_speculative_tokens": 5}
TWIN = {"speculative": "draft", "draft_model": MODEL, "num_speculative_tokens": 4}


def engine_with(**flags: Any) -> Any:
    """Drafts are as long as there is room for."""
    flags = {"num_blocks": 128, "block_size": 4, "max_num_seqs": 8} | flags
    engine = module_of(8, "engine").LLMEngine(
        module_of(8, "config").EngineConfig(model=MODEL, threads=1, **flags)
    )
    engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: list(limits)
    return engine


def run(engine: Any, params: SamplingParams, name: str = "a", **more: Any) -> tuple[Any, int]:
    """(tokens of an answer to PROMPT, steps that made them)."""
    engine.add_request(Request(name, PROMPT, params, **more))
    tokens, num_steps = [], 0
    while engine.has_unfinished():
        outputs = engine.step()
        num_steps += any(output.token_ids for output in outputs)
        tokens += [token for output in outputs for token in output.token_ids]
        engine.check_integrity()
    assert len(tokens) == params.max_tokens
    return tokens, num_steps


# 1. A prediction.


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_right_prediction_takes_few_steps(params: SamplingParams) -> None:
    """The answer is what was predicted: one token of the prompt's step, then six a step, once the
    first tokens have shown where in the prediction the answer is."""
    engine = engine_with(**NGRAM)
    tokens, num_steps = run(engine, params)
    again, num_fewer = run(engine, params, prediction=tokens)
    assert again == tokens
    assert num_fewer <= 2 + -(-60 // 6) + 2 < num_steps


def test_a_prediction_may_be_wrong_in_places() -> None:
    """One token is other, three are missing, two are too many: each costs a few steps."""
    engine = engine_with(**NGRAM)
    tokens, num_steps = run(engine, SEEDED)
    prediction = [*tokens[:10], 1, *tokens[11:25], *tokens[28:40], 1, 1, *tokens[40:]]
    again, num_fewer = run(engine, SEEDED, prediction=prediction)
    assert again == tokens
    assert num_fewer <= 28 < num_steps
    for wrong in ([1] * 60, [], PROMPT):
        again, _ = run(engine, SEEDED, prediction=wrong)
        assert again == tokens
    assert check_seeded(MODEL, [(PROMPT, tokens, SEEDED)]).is_right


def test_a_prediction_belongs_to_its_request() -> None:
    """It is no part of the text, and nobody else drafts from it."""
    engine = engine_with(**NGRAM)
    tokens, num_steps = run(engine, SEEDED)
    engine.add_request(Request("b", [9] * 8, replace(SEEDED, max_tokens=70), prediction=tokens))
    assert list(engine.sequences["b"].prompt_token_ids) == [9] * 8
    engine.step()
    others, most = [], 0
    engine.add_request(Request("a", PROMPT, SEEDED))
    while "a" in engine.sequences:
        outputs = [output for output in engine.step() if output.request_id == "a"]
        others += [token for output in outputs for token in output.token_ids]
        most += bool(outputs)
    engine.abort("b")
    engine.step()
    assert others == tokens and most == num_steps


# 2. A common pool.


def test_what_one_has_said_is_drafted_for_the_next() -> None:
    engine = engine_with(**NGRAM, ngram_pool=1000)
    tokens, num_steps = run(engine, SEEDED)
    again, num_fewer = run(engine, SEEDED)
    assert again == tokens
    assert num_fewer <= 2 + -(-60 // 6) + 2 < num_steps
    tokens, _ = run(engine, GREEDY)
    assert check_greedy(MODEL, [(PROMPT, tokens)]).is_right


def test_a_pool_is_no_larger_than_it_may_be() -> None:
    """Texts of more tokens than it holds have come since: the first is forgotten."""
    engine = engine_with(**NGRAM, ngram_pool=200)
    _, num_steps = run(engine, SEEDED)
    _, num_fewer = run(engine, SEEDED)
    assert num_fewer < num_steps / 2
    for seed in range(100, 105):
        run(engine, replace(SEEDED, seed=seed))
    assert run(engine, SEEDED)[1] == num_steps
    engine = engine_with(**NGRAM)  # and without a pool it is as it was
    assert [run(engine, SEEDED)[1] for _ in range(2)] == [num_steps] * 2


def test_a_pool_is_no_way_to_read_what_others_said() -> None:
    """Who counts his steps could guess at another tenant's text: salts keep them apart."""
    engine = engine_with(**NGRAM, ngram_pool=1000)
    _, num_steps = run(engine, SEEDED, cache_salt="alice")
    for salt in ("bob", None):
        assert run(engine, SEEDED, cache_salt=salt)[1] == num_steps
    for salt in ("alice", "bob", None):
        assert run(engine, SEEDED, cache_salt=salt)[1] < num_steps / 2


# 3. Where a drafter is unsure.


def draft_lengths(engine: Any, params: SamplingParams) -> list[int]:
    """Verified tokens of each draft."""
    engine.add_request(Request("a", PROMPT, params))
    sequence, lengths = engine.sequences["a"], []
    while engine.has_unfinished():
        engine.step()
        lengths.append(len(sequence.draft_token_ids))
        engine.check_integrity()
    return [length for length in lengths if length]


def change_drafter(engine: Any, scale: float, bias: torch.Tensor | float = 0.0) -> None:
    """Change the logits of the model that drafts."""
    model = engine.runner.drafter.model
    logits = type(model).logits
    model.logits = lambda hidden: scale * logits(model, hidden) + bias


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=1.0)])
def test_a_draft_ends_behind_the_first_token_that_is_unsure(params: SamplingParams) -> None:
    """The token itself stays in the draft: the next test says why."""
    engine = engine_with(**TWIN, draft_confidence=0.5, block_size=16)
    change_drafter(engine, 1000.0)
    assert set(draft_lengths(engine, params)[:5]) == {4}
    change_drafter(engine, 0.0)
    assert set(draft_lengths(engine, params)[:5]) == {1}
    engine = engine_with(**TWIN, block_size=16)
    change_drafter(engine, 0.0)
    assert set(draft_lengths(engine, params)[:5]) == {4}, "by default drafts do not end"


def test_the_distribution_is_the_models_all_the_same() -> None:
    """A drafter that drops the tokens it is unsure of draws from another q than it says: with this
    one, that makes the answers others than the model's."""
    engine = engine_with(**TWIN, draft_confidence=0.4)
    change_drafter(engine, 1.0, torch.randn(512, generator=torch.Generator().manual_seed(9)))
    params = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True, n=128)
    outputs = [c for _ in range(16) for c in engine.generate([PROMPT[:9]], params, progress=False)]
    assert sum(c.num_draft_tokens for c in outputs) > 500
    counts = Counter(tuple(c.token_ids) for c in outputs)
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for head, probability in exact.items():
            values, ids = reference_logits(MODEL, PROMPT[:9], [*head, 0])[-1].topk(3)
            for token, share in zip(ids.tolist(), values.softmax(0).tolist(), strict=True):
                longer[(*head, token)] = probability * share
        exact = longer
    assert set(counts) <= set(exact)
    got = np.array([counts[key] for key in exact])
    expected = np.array(list(exact.values())) * len(outputs)
    assert stats.chisquare(got, expected).pvalue > 1e-4
