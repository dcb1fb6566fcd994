"""Part 08's own invariants: drafts change how many tokens a step makes, and never which."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded, reference_logits
from common.testing.parts import engine_of, module_of, wrap_model
from common.testing.schedules import MODELS, Drive, Event

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(seed=3, temperature=0.8, top_p=0.95, max_tokens=20, ignore_eos=True)
PROMPT = [(7 * i) % 500 + 2 for i in range(30)]
# How drafts are made: from the text; by another model, which knows nothing; by the same one; by
# half of the model's layers.
PROPOSERS: dict[str, dict[str, Any]] = {
    "ngram": {"speculative": "ngram", "prompt_lookup_min": 1},
    "stranger": {"speculative": "draft", "draft_model": "random:tiny-qwen3"},
    "twin": {"speculative": "draft", "draft_model": MODEL},
    "self": {"speculative": "self", "draft_layers": 1},
}
POOLS: list[dict[str, Any]] = [
    {"num_blocks": 17, "block_size": 4, "max_num_seqs": 8},
    {"num_blocks": 70, "block_size": 1, "max_num_seqs": 3},
    {"num_blocks": 5, "block_size": 16, "max_num_seqs": 4},
    {"num_blocks": 40, "block_size": 4, "max_num_seqs": 16},
]


def engine_with(proposer: str | None, always: bool = True, **flags: Any) -> Any:
    """An engine whose proposer is always asked, for as much as there is room."""
    flags = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8} | flags
    drafting = PROPOSERS[proposer] if proposer else {}
    engine = engine_of(8, MODEL, threads=1, **drafting, **flags)
    assert not engine.has_unfinished()
    if proposer:
        vars(engine.speculator.lengths).pop("choose", None)
    if proposer and always:
        engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: list(limits)
    return engine


def run(engine: Any, prompts: list[list[int]], params: SamplingParams, **more: Any) -> list[Any]:
    completions = engine.generate(prompts, params, progress=False, **more)
    engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 0
    return completions


def finish(engine: Any) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = tokens.get(output.request_id, []) + output.token_ids
        engine.check_integrity()
        for sequence in engine.scheduler.running:
            final = min(sequence.num_computed_tokens, sequence.num_known_tokens)
            published = sequence.num_published_blocks * engine.kv.block_size
            assert published <= final, "drafts that may not stay can be found by others"
    return tokens


# The same tokens.


@pytest.mark.parametrize("budget", [1, 7, 256])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_outputs_are_those_without_drafts(proposer: str, budget: int) -> None:
    prompts = [PROMPT[:length] for length in (1, 5, 12, 30)] + [[3, 4, 5] * 6, [9] * 17]
    engine = engine_with(proposer, max_num_batched_tokens=budget)
    plain = engine_with(None)
    for params in (GREEDY, SEEDED, replace(GREEDY, logprobs=2)):
        with_drafts, without = (run(e, prompts, params) for e in (engine, plain))
        assert [c.token_ids for c in with_drafts] == [c.token_ids for c in without]
        if params.logprobs:
            for one, other in zip(with_drafts, without, strict=True):
                pairs = zip(one.logprobs, other.logprobs, strict=True)
                assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in pairs)
    outputs = [c.token_ids for c in run(engine, prompts, GREEDY)]
    assert check_greedy(MODEL, list(zip(prompts, outputs, strict=True))).is_right
    outputs = [c.token_ids for c in run(engine, prompts, SEEDED)]
    rows = [(p, o, SEEDED) for p, o in zip(prompts, outputs, strict=True)]
    assert check_seeded(MODEL, rows).is_right


@pytest.mark.parametrize("pool", range(len(POOLS)))
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_small_pools_and_stops(proposer: str, pool: int) -> None:
    """Preemptions, stops inside of drafts, aborts, drafts across the borders of blocks."""
    engine = engine_with(proposer, **POOLS[pool])
    for stop_at in (None, 0, 1, 2, 3, 5, 8, 13):
        schedule = [Event(i % 12, 24, stop_at, i - 5 if i == 9 else None, i % 4) for i in range(14)]
        Drive(engine, MODELS[0]).run(schedule)


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_every_length_of_answer(proposer: str) -> None:
    """Drafts never lead beyond the last token that a request may have."""
    engine = engine_with(proposer, num_blocks=10)
    expected = run(engine_with(None), [PROMPT[:16]], replace(GREEDY, max_tokens=24))[0].token_ids
    for count in range(1, 25):
        [c] = run(engine, [PROMPT[:16]], replace(GREEDY, max_tokens=count))
        assert (c.token_ids, c.finish_reason) == (expected[:count], "length")


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_preempted_sequence_drafts_again(proposer: str) -> None:
    engine = engine_with(proposer, prefix_cache="off")
    engine.add_request("a", PROMPT, GREEDY)
    tokens = [t for _ in range(3) for output in engine.step() for t in output.token_ids]
    engine.scheduler.preempt(engine.sequences["a"])
    engine.check_integrity()
    tokens += finish(engine)["a"]
    assert check_greedy(MODEL, [(PROMPT, tokens)]).is_right and len(tokens) == 20


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_failed_step_takes_its_own(proposer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(proposer)

    def fail(token_ids: list[int], num_rows: int, real: Any) -> Any:
        if num_rows > 1:
            raise RuntimeError("the model failed")
        return real()

    with monkeypatch.context() as patch:
        wrap_model(engine, patch, fail)
        engine.add_request("a", [3, 4, 5] * 4, GREEDY)
        with pytest.raises(RuntimeError):
            for _ in range(20):
                engine.step()
        engine.fail_step()
        finish(engine)
    assert check_greedy(MODEL, [(PROMPT, run(engine, [PROMPT], GREEDY)[0].token_ids)]).is_right


# What drafts are worth.


def test_a_twin_is_always_right() -> None:
    """With a draft model that is the model all drafts stay, and a step makes 1 + K tokens."""
    engine = engine_with("twin", num_speculative_tokens=3)
    [c] = run(engine, [PROMPT], replace(GREEDY, max_tokens=25))
    assert c.num_accepted_tokens == c.num_draft_tokens == 18
    [c] = run(engine, [PROMPT], replace(SEEDED, max_tokens=25))
    assert c.num_accepted_tokens == c.num_draft_tokens, "the same noise, the same draws"
    unseeded = replace(SEEDED, seed=None, max_tokens=25)
    [c] = run(engine, [PROMPT], unseeded)
    assert c.num_accepted_tokens == c.num_draft_tokens, "p = q: every draft stays"


def test_all_layers_draft_what_they_would_say() -> None:
    num_layers = engine_with(None).runner.model.config.num_layers
    flags = {"speculative": "self", "draft_layers": num_layers, "num_speculative_tokens": 3}
    engine = engine_of(8, MODEL, threads=1, num_blocks=64, block_size=4, **flags)
    engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: list(limits)
    [c] = run(engine, [PROMPT], replace(GREEDY, max_tokens=25))
    assert c.num_accepted_tokens == c.num_draft_tokens == 18


def test_a_stranger_is_mostly_wrong_and_is_asked_no_more() -> None:
    engine = engine_with("stranger", always=False)
    before = engine.stats()["num_draft_tokens"]
    [c] = run(engine, [PROMPT], replace(GREEDY, max_tokens=200))
    assert c.num_draft_tokens == engine.stats()["num_draft_tokens"] - before
    assert c.num_accepted_tokens < 20 and c.num_draft_tokens < 60


def test_a_text_that_repeats_itself_takes_few_steps() -> None:
    """A sequence that the model continues by repeating: tiny models do, at last."""
    engine = engine_with("ngram")
    start = engine.trace.last_record.step if engine.trace.last_record else -1
    [c] = run(engine, [PROMPT[:4]], replace(GREEDY, max_tokens=200))
    num_steps = engine.trace.last_record.step - start
    assert c.num_accepted_tokens == 200 - num_steps, "a step makes a token, and what has stayed"
    assert c.num_accepted_tokens > 0


def test_who_has_penalties_or_does_not_want_drafts_has_none() -> None:
    engine = engine_with("ngram")
    prompt = [3, 4, 5] * 6
    assert run(engine, [prompt], GREEDY)[0].num_draft_tokens > 0
    assert run(engine, [prompt], GREEDY, may_draft=False)[0].num_draft_tokens == 0
    params = replace(SEEDED, presence_penalty=1.0, frequency_penalty=0.5)
    [c] = run(engine, [prompt], params)
    assert c.num_draft_tokens == 0
    assert check_seeded(MODEL, [(prompt, c.token_ids, params)]).is_right


@pytest.mark.parametrize("proposer", ["stranger", "twin", "self"])
def test_unseeded_tokens_have_the_models_distribution(proposer: str) -> None:
    """Rejection in the engine, against exact probabilities: 3,000 answers of three tokens."""
    params = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True, n=128)
    engine = engine_with(proposer, max_num_seqs=32, num_blocks=400, num_speculative_tokens=2)
    num_drafts = engine.stats()["num_draft_tokens"]
    outputs = [c.token_ids for _ in range(24) for c in run(engine, [PROMPT[:9]], params)]
    assert engine.stats()["num_draft_tokens"] - num_drafts > 3000
    counts: dict[tuple[int, ...], int] = {}
    for output in outputs:
        counts[tuple(output)] = counts.get(tuple(output), 0) + 1
    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for head, probability in exact.items():
            logits = reference_logits(MODEL, PROMPT[:9], [*head, 0])[-1]
            values, ids = logits.topk(3)
            for token, share in zip(ids.tolist(), values.softmax(0).tolist(), strict=True):
                longer[(*head, token)] = probability * share
        exact = longer
    assert set(counts) <= set(exact)
    keys = sorted(exact, key=lambda key: -exact[key])
    expected = np.array([exact[key] for key in keys]) * len(outputs)
    got = np.array([counts.get(key, 0) for key in keys])
    large = expected >= 5
    pooled = [*got[large], got[~large].sum()], [*expected[large], expected[~large].sum()]
    if pooled[1][-1] == 0:
        pooled = pooled[0][:-1], pooled[1][:-1]
    assert stats.chisquare(*pooled).pvalue > 1e-4


# What is refused.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"speculative": "medusa"}, "speculative"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens is 3"),
        ({"speculative": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"speculative": "ngram", "draft_model": MODEL}, "draft_model"),
        ({"speculative": "self", "prompt_lookup_min": 2}, "prompt_lookup_min"),
        ({"speculative": "draft"}, "draft_model must name"),
        ({"speculative": "draft", "draft_model": "random:qwen3-0.6b"}, "vocabulary"),
        ({"speculative": "self", "draft_layers": 99}, "draft_layers is 99"),
        ({"speculative": "ngram", "prompt_lookup_min": 5}, "min"),
    ],
)
def test_settings_that_make_no_sense(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config = module_of(8, "config").EngineConfig(model=MODEL, num_blocks=8, threads=1, **flags)
        module_of(8, "engine").LLMEngine(config)
