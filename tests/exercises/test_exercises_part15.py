"""Part 15's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest
from part15.config import EngineConfig

from common.requests import Request
from common.sampling import SamplingParams
from common.structured.grammar import Grammar
from common.testing.parts import make_engine
from common.testing.rank_threads import engine_in_threads
from common.testing.structured import write_model

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"  # 3 layers
PROMPTS = [[(7 * i + n) % 500 + 2 for i in range(n)] for n in (1, 12, 30, 16)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def answers(engine: Any, prompts: list[Any], params: Any = GREEDY, **options: Any) -> list[Any]:
    """Tokens of each prompt, and what was asked to be known of the prompt."""
    completions = engine.generate(prompts, params, progress=False, **options)
    engine.check_integrity()
    return [(done.token_ids, repr(done.prompt_logprobs)) for done in completions]


# 1. Stages of unequal size.


@pytest.mark.parametrize("layers", ["1,2", "2,1", "1,1,1"])
def test_stages_have_the_layers_that_are_given(layers: str) -> None:
    counts = [int(word) for word in layers.split(",")]
    flags = {"pipeline_parallel_size": len(counts), "pipeline_layers": layers, "num_blocks": 40}
    engine, ranks = engine_in_threads(15, MODEL, 1, kernels="reference", block_size=4, **flags)
    try:
        runners = [engine.runner, *(ranks.runners[rank] for rank in range(1, len(counts)))]
        assert [len(runner.model.layers) for runner in runners] == counts
        assert [runner.kv.data.shape[1] for runner in runners] == counts
        tokens = answers(engine, PROMPTS)
    finally:
        engine.shutdown()
    assert tokens == answers(make_engine(15, MODEL, kernels="reference"), PROMPTS)


@pytest.mark.parametrize(
    "flags",
    [
        {"pipeline_layers": "1,2"},  # of one stage
        {"pipeline_parallel_size": 2, "pipeline_layers": "3"},
        {"pipeline_parallel_size": 2, "pipeline_layers": "3,0"},
        {"pipeline_parallel_size": 2, "pipeline_layers": "one,two"},
    ],
    ids=str,
)
def test_counts_that_cannot_be_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pipeline_layers"):
        EngineConfig(model=MODEL, **flags)


def test_counts_that_are_not_the_models_are_refused() -> None:
    flags = {"pipeline_parallel_size": 2, "pipeline_layers": "2,2", "kernels": "reference"}
    with pytest.raises(ValueError, match=r"pipeline_layers .*num_layers is 3"):
        engine_in_threads(15, MODEL, 1, **flags)


# 2. Drafts that the grammar makes.

READING = {
    "type": "object",
    "properties": {
        "temperature_in_celsius": {"type": "integer", "minimum": 0, "maximum": 99},
        "relative_humidity": {"type": "integer", "minimum": 0, "maximum": 99},
        "sky": {"enum": ["clear", "overcast"]},
    },
    "required": ["temperature_in_celsius", "relative_humidity", "sky"],
    "additionalProperties": False,
}
KINDS = [
    SamplingParams(temperature=0.0, max_tokens=128),
    SamplingParams(temperature=1.0, seed=5, max_tokens=128),
    SamplingParams(temperature=1.2, seed=6, top_k=40, max_tokens=128),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose tokens are bytes and some words."""
    return write_model(tmp_path_factory.mktemp("models") / "target")


def test_a_grammar_drafts_what_it_forces(folder: str) -> None:
    """Where one token alone may come, it needs no model. All drafts stay, and no token changes."""
    prompts, grammar = [[40 + i] * 9 for i in range(len(KINDS))], Grammar.of_schema(READING)
    expected = answers(make_engine(15, folder), prompts, KINDS, grammar=grammar)
    engine = make_engine(15, folder, speculative="grammar")
    for _ in range(3):  # a draft's worth is measured first
        assert answers(engine, prompts, KINDS, grammar=grammar) == expected
    stats = engine.stats()
    assert stats["num_accepted_tokens"] == stats["num_draft_tokens"] > 0, stats


def test_without_a_grammar_nothing_is_drafted(folder: str) -> None:
    """Requests with a grammar and without one, side by side, some of which are aborted."""
    engine = make_engine(15, folder, speculative="grammar")
    grammar = Grammar.of_schema(READING)
    for number in range(6):
        constrained = {"grammar": grammar} if number % 3 == 0 else {}
        engine.add_request(Request(str(number), [50 + number] * 5, KINDS[0], **constrained))
    ends, num_steps = {}, 0
    while engine.has_unfinished():
        for output in engine.step():
            ends[output.request_id] = output
        num_steps += 1
        if num_steps == 9:
            engine.abort("3")
        engine.check_integrity()
    assert ends["3"].finish_reason == "abort"
    assert all(ends[str(n)].draft_counts.num_draft_tokens == 0 for n in (1, 2, 4, 5))


# 3. Slices of prompts are replayed, too.

SLICE = 16


def prompt_of(length: int, seed: int) -> list[int]:
    return [(13 * i + 31 * seed) % 500 + 2 for i in range(length)]


def test_full_slices_are_replayed() -> None:
    """On a CPU: a step in which one prompt runs a slice of the whole budget, and nothing else runs.
    Other prompts, other lengths, the last slice among them, and slices whose logits are asked for."""
    flags = {"max_num_batched_tokens": SLICE, "block_size": 4, "prefix_cache": "off"}
    eager = make_engine(15, MODEL, enforce_eager=True, **flags)
    engine = make_engine(15, MODEL, **flags)
    one = SamplingParams(temperature=0.0, max_tokens=1)
    scored = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=1)
    for seed, (length, params) in enumerate(
        [(101, one), (96, one), (90, scored), (16, GREEDY), (15, GREEDY), (133, GREEDY)]
    ):
        before = engine.stats()["num_graph_replays"]
        prompts = [prompt_of(length, seed)]
        assert answers(engine, prompts, params) == answers(eager, prompts, params), length
        replays = engine.stats()["num_graph_replays"] - before
        if params is one:  # nothing but slices; the first of all is noted
            assert replays >= length // SLICE - (not seed), f"{replays} of {length // SLICE}"


def test_crowded_slices_give_the_same_tokens() -> None:
    flags = {"max_num_batched_tokens": SLICE, "block_size": 4, "num_blocks": 24}
    prompts = [prompt_of(length, seed) for seed, length in enumerate((40, 3, 64, 16, 48, 32))]
    engine = make_engine(15, MODEL, **flags)
    expected = answers(make_engine(15, MODEL, enforce_eager=True), prompts)
    assert answers(engine, prompts) == expected == answers(engine, prompts)
    before = engine.stats()
    assert before["num_preemptions"]
    alone = SamplingParams(temperature=0.0, max_tokens=1)
    answers(engine, [prompt_of(64, 9)], alone)
    assert engine.stats()["num_graph_replays"] >= before["num_graph_replays"] + 3
