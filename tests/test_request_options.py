"""What a request may ask beside plain sampling, in every part: biases, least lengths, scored prompts,
and what happens where a model's logits are no numbers."""

import dataclasses
import json
import math
import random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.completions import NOT_FINITE, Completion
from common.kernels.reference import ReferenceOps
from common.models.checkpoint import resolve
from common.requests import Request
from common.sampling import NO_TOKEN, SamplingBatch, SamplingParams
from common.testing.oracle import reference_logits, reference_model
from common.testing.parts import PARTS, distinct_files, engine_of, module_of

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = dataclasses.replace(GREEDY, temperature=1.0, seed=5)
PROMPT = [7, 77, 130, 9, 400, 21]
SCORING = [part for part in PARTS if part >= 4]
# How the latest part may be set up: what draws a token differs.
MODES: list[tuple[int, dict[str, Any]]] = [(part, {}) for part in PARTS] + [
    (8, {"speculative": "ngram"}),
    (8, {"speculative": "self", "draft_layers": 1}),
    (8, {"speculative": "draft", "draft_model": MODEL}),
]
IDS = [f"part{part:02d} {' '.join(map(str, flags.values()))}".strip() for part, flags in MODES]


@pytest.fixture(params=MODES, ids=IDS)
def engine(request: pytest.FixtureRequest) -> Any:
    part, flags = request.param
    return engine_of(part, MODEL, **flags)


def run(engine: Any, prompt: Any, params: SamplingParams) -> list[Completion]:
    return engine.generate(prompt, params, progress=False)


def tokens(engine: Any, params: SamplingParams, prompt: list[int] = PROMPT) -> list[int]:
    [completion] = run(engine, prompt, params)
    return completion.token_ids


@pytest.mark.parametrize("base", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_bias_chooses_and_forbids(engine: Any, base: SamplingParams) -> None:
    plain = tokens(engine, base)
    chosen = dataclasses.replace(base, logit_bias={300: 100})
    assert tokens(engine, chosen) == [300] * 12
    forbidden = dataclasses.replace(base, logit_bias=dict.fromkeys(plain, -100))
    assert not set(tokens(engine, forbidden)) & set(plain)
    assert tokens(engine, base) == plain, "nothing stays behind"


def test_forbidden_tokens_are_not_drawn_without_a_seed_either(engine: Any) -> None:
    """Where drafts are accepted by rejection, too: 60 tokens of a flat distribution, half forbidden."""
    forbidden = dict.fromkeys(range(0, 512, 2), -100)
    params = SamplingParams(temperature=5.0, max_tokens=30, ignore_eos=True, logit_bias=forbidden)
    got = engine.generate([PROMPT] * 2, params, progress=False)
    drawn = {token_id for completion in got for token_id in completion.token_ids}
    assert len(drawn) > 20 and not drawn & forbidden.keys()


def test_a_bias_is_added_to_the_logit(engine: Any) -> None:
    """The second choice wins as soon as its bias is more than it lies behind."""
    logits = reference_logits(MODEL, PROMPT, [0])[0]
    first, second = logits.topk(2).indices.tolist()
    gap = float(logits[first] - logits[second])
    for share, winner in ((0.9, first), (1.1, second)):
        params = dataclasses.replace(GREEDY, max_tokens=1, logit_bias={second: gap * share})
        assert tokens(engine, params) == [winner]


def test_biases_of_one_request_are_not_anothers(engine: Any) -> None:
    alone = tokens(engine, GREEDY)
    biased = dataclasses.replace(GREEDY, logit_bias={300: 100})
    params = [GREEDY, biased, GREEDY, dataclasses.replace(SEEDED, logit_bias={5: 100})]
    got = [c.token_ids for c in engine.generate([PROMPT] * 4, params, progress=False)]
    assert got == [alone, [300] * 12, alone, [5] * 12]


def test_log_probabilities_are_the_models_own(engine: Any) -> None:
    """Before any bias."""
    params = dataclasses.replace(GREEDY, max_tokens=1, logprobs=3, logit_bias={300: 100})
    [completion] = run(engine, PROMPT, params)
    logprobs = reference_logits(MODEL, PROMPT, [300])[0].log_softmax(-1)
    [item] = completion.logprobs
    assert item.logprob == pytest.approx(float(logprobs[300]), abs=1e-4)
    assert [id for id, _ in item.top] == logprobs.topk(3).indices.tolist()


@pytest.mark.parametrize("least", [1, 5, 12])
def test_nothing_ends_before_min_tokens(engine: Any, least: int) -> None:
    """Every token that would end the output is kept away, and what comes instead is the best of
    the others."""
    eos = min(engine.eos_token_ids)
    ends = dataclasses.replace(
        GREEDY, ignore_eos=False, stop_token_ids=(300,), logit_bias={eos: 100, 300: 90}
    )
    assert tokens(engine, ends) == [eos]
    got = tokens(engine, dataclasses.replace(ends, min_tokens=least))
    others = dict.fromkeys([*engine.eos_token_ids, 300], -100)
    expected = tokens(engine, dataclasses.replace(GREEDY, max_tokens=least, logit_bias=others))
    assert got == [*expected, eos][:12]


def test_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()
    assert SamplingParams(seed=-2).seed == -2


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(ValueError, match="min_tokens is 5, more than max_tokens, 4"):
        SamplingParams(max_tokens=4, min_tokens=5)
    assert SamplingParams(max_tokens=None, min_tokens=5).min_tokens == 5


BROKEN = 300  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder whose model computes NaN for every sequence that has the token BROKEN."""
    folder = tmp_path_factory.mktemp("broken")
    model = reference_model(MODEL)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    state["model.embed_tokens.weight"][BROKEN] = math.nan
    config = model.config.to_dict() | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_text((resolve("smollm2-135m") / file).read_text())
    return str(folder)


@pytest.mark.parametrize(("part", "flags"), MODES, ids=IDS)
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_logits_that_are_no_numbers_end_one_request_only(
    part: int, flags: dict[str, Any], params: SamplingParams, broken_model: str
) -> None:
    """Where other requests' tokens are right all the while, in whatever blocks."""
    blocks = {"num_blocks": 12} if part >= 3 else {}
    engine = engine_of(part, broken_model, **blocks, **flags)
    wanted = dataclasses.replace(params, logprobs=2)
    healthy = run(engine, PROMPT, wanted)[0]
    broken = dataclasses.replace(wanted, logit_bias={BROKEN: 100})
    requests = [PROMPT, [3, 1, 4], PROMPT, [*PROMPT, BROKEN, 5], PROMPT]
    for _ in range(2):
        everything = [wanted, broken, wanted, wanted, wanted]
        got = engine.generate(requests, everything, progress=False)
        assert [got[i].token_ids for i in (0, 2, 4)] == [healthy.token_ids] * 3
        assert [(c.finish_reason, c.error) for c in got].count(("error", NOT_FINITE)) == 2
        assert (got[1].token_ids, got[3].token_ids) == ([BROKEN], [])
        assert all(math.isfinite(item.logprob) for c in got for item in c.logprobs)
        assert got[0].error is None and got[0].finish_reason == "length"
        if part > 1:
            engine.check_integrity()


@pytest.mark.parametrize("part", distinct_files("sampler.py"))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_sampler_draws_nothing_from_a_row_without_numbers(
    part: int, temperature: float, value: float
) -> None:
    logits = torch.randn(4, 100)
    right = drawn(part, logits, temperature)
    for row, place in ((1, 50), (2, slice(None)), (3, 0)):
        logits[row, place] = value
    assert drawn(part, logits, temperature) == [right[0], NO_TOKEN, NO_TOKEN, NO_TOKEN]
    logits[:, :50] = -math.inf  # impossible tokens are no error
    logits[1:] = logits[:1]
    assert all(50 <= token_id < 100 for token_id in drawn(part, logits, temperature))


def drawn(part: int, logits: torch.Tensor, temperature: float) -> list[int]:
    params = [SamplingParams(temperature=temperature, seed=1, top_p=0.9)] * len(logits)
    numbers = list(range(len(logits)))
    batch = SamplingBatch.build(logits, params, numbers, numbers, [[]] * len(logits))
    sample = module_of(part, "sampler").sample
    if part < 3:
        return sample(logits, batch)[0]
    batch = dataclasses.replace(batch, choices=torch.zeros_like(batch.positions))
    return sample(ReferenceOps(), logits, batch).tolist()


def scored(name: str, prompt: list[int]) -> torch.Tensor:
    """The reference's log probabilities before each token of a prompt but the first."""
    return reference_logits(name, prompt[:1], prompt[1:]).log_softmax(-1)


def check_scores(completion: Completion, prompt: list[int], num_top: int) -> None:
    expected = scored(MODEL, prompt)
    assert [item.token_id for item in completion.prompt_logprobs or []] == prompt[1:]
    for item, row in zip(completion.prompt_logprobs or [], expected, strict=True):
        assert item.logprob == pytest.approx(float(row[item.token_id]), abs=1e-3)
        assert [value for _, value in item.top] == pytest.approx(
            row.topk(num_top).values.tolist(), abs=1e-3
        )
        better = int((row > row[item.token_id] + 1e-3).sum())
        worse = int((row < row[item.token_id] - 1e-3).sum())
        assert better < item.rank <= len(row) - worse


def random_prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, 500) for _ in range(length)]


SETTINGS = [{}, {"num_blocks": 24, "max_num_seqs": 4}, {"max_num_batched_tokens": 16}]


@pytest.mark.parametrize("flags", SETTINGS, ids=["roomy", "preempting", "small steps"])
@pytest.mark.parametrize("part", SCORING)
def test_prompts_are_scored(part: int, flags: dict[str, Any]) -> None:
    """Beside others that are not, whole or in slices, before and after a preemption, and where the
    prefix cache has the prompt already."""
    engine = engine_of(part, MODEL, **flags)
    prompts = [random_prompt(length, length) for length in (1, 2, 17, 90, 60, 33)]
    asking = dataclasses.replace(GREEDY, prompt_logprobs=3)
    params = [
        asking,
        asking,
        GREEDY,
        asking,
        asking,
        dataclasses.replace(asking, prompt_logprobs=0),
    ]
    plain = [c.token_ids for c in engine.generate(prompts, GREEDY, progress=False)]
    for _ in range(2):
        got = engine.generate(prompts, params, progress=False)
        assert [c.token_ids for c in got] == plain
        assert got[2].prompt_logprobs is None
        for i in (0, 1, 3, 4, 5):
            if len(prompts[i]) > 1:
                check_scores(got[i], prompts[i], params[i].prompt_logprobs)
    engine.check_integrity()


@pytest.mark.parametrize("flags", [flags for part, flags in MODES if part == 8], ids=str)
def test_prompts_are_scored_beside_drafts(flags: dict[str, Any]) -> None:
    engine = engine_of(8, MODEL, **flags)
    prompt = random_prompt(20) * 3
    params = [dataclasses.replace(GREEDY, prompt_logprobs=2), GREEDY]
    scoring, plain = engine.generate([prompt, prompt], params, progress=False)
    assert scoring.token_ids == plain.token_ids
    check_scores(scoring, prompt, 2)


@pytest.mark.parametrize("part", SCORING)
def test_a_prompt_is_scored_for_the_first_of_its_choices(part: int) -> None:
    engine = engine_of(part, MODEL)
    params = dataclasses.replace(SEEDED, n=3, prompt_logprobs=1)
    first, *others = run(engine, PROMPT, params)
    check_scores(first, PROMPT, 1)
    assert [other.prompt_logprobs for other in others] == [None, None]


@pytest.mark.parametrize("part", [part for part in PARTS if part < 4])
def test_parts_that_do_not_score_say_so(part: int) -> None:
    engine = engine_of(part, MODEL)
    with pytest.raises(ValueError, match="prompt_logprobs is not supported by this part"):
        run(engine, PROMPT, dataclasses.replace(GREEDY, prompt_logprobs=0))


@pytest.mark.parametrize("part", PARTS[1:])
def test_add_request_refuses_what_its_part_has_not(part: int) -> None:
    """Several completions are several requests in every part; scores come with part 04. What is
    refused leaves nothing behind, and its id is free."""
    engine = engine_of(part, MODEL)
    several = dataclasses.replace(SEEDED, n=2)
    with pytest.raises(
        ValueError, match=r"^n is 2; a request is for one completion: send n of them"
    ):
        engine.add_request(Request("a", PROMPT, several))
    scored = dataclasses.replace(GREEDY, prompt_logprobs=0, max_tokens=2)
    if part in SCORING:
        engine.add_request(Request("a", PROMPT, scored))
    else:
        with pytest.raises(ValueError, match=r"^prompt_logprobs is not supported by this part"):
            engine.add_request(Request("a", PROMPT, scored))
        assert not engine.has_unfinished() and engine.stats()["num_waiting"] == 0
        engine.add_request(Request("a", PROMPT, dataclasses.replace(scored, prompt_logprobs=None)))
    engine.check_integrity()
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert [output.request_id for output in outputs] == ["a", "a"] and outputs[-1].finished
    scored = [output for output in outputs if output.prompt_logprobs is not None]
    assert bool(scored) == (part in SCORING)  # part 15 sends them once, with the first token


@pytest.mark.parametrize("part", PARTS)
def test_generate_refuses_n_where_its_part_has_it_not(part: int) -> None:
    params = dataclasses.replace(SEEDED, n=3, max_tokens=2)
    if part in SCORING:
        assert len(run(engine_of(part, MODEL), PROMPT, params)) == 3
    else:
        with pytest.raises(ValueError, match="n must be at most 1 in this part, not 3"):
            run(engine_of(part, MODEL), PROMPT, params)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("part", SCORING)
def test_scores_that_are_no_numbers_are_an_error(
    part: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(part, MODEL)
    healthy = tokens(engine, GREEDY)
    logits = engine.runner.model.logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        if len(found) == len(PROMPT) - 1:  # the scored places, and nothing else here
            found[2, 9] = value
        return found

    monkeypatch.setattr(engine.runner.model, "logits", broken)
    params = [dataclasses.replace(GREEDY, prompt_logprobs=2), GREEDY]
    bad, good = engine.generate([PROMPT, PROMPT], params, progress=False)
    assert (bad.finish_reason, bad.error) == ("error", NOT_FINITE)
    assert good.token_ids == healthy
    engine.check_integrity()


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 3])
def test_what_a_block_held_before_does_not_matter(part: int) -> None:
    """NaN of a request that failed must not reach the next one that gets its blocks."""
    engine = engine_of(part, MODEL)
    prompts = [random_prompt(length, length) for length in (1, 15, 16, 17, 40)]
    params = dataclasses.replace(GREEDY, max_tokens=20)
    right = [c.token_ids for c in engine.generate(prompts, params, progress=False)]
    fresh = module_engine(part)
    fresh.kv.data.fill_(math.nan)
    got = [c.token_ids for c in fresh.generate(prompts, params, progress=False)]
    assert got == right


def module_engine(part: int) -> Any:
    """An engine of this module alone, whose cache may be spoilt."""
    return engine_of(part, MODEL, num_blocks=40)
