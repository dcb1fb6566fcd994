"""Part 06's own invariants: prompts in slices, one budget for all that a step runs."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import engine_of, module_of

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


Make = Callable[..., Any]


@pytest.fixture
def engine_with(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an engine; unless it is to be asynchronous, each step reads its own tokens."""

    def make(is_async: bool = False, **flags: Any) -> Any:
        flags = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8} | flags
        engine = engine_of(6, MODEL, threads=1, **flags)
        assert engine.num_in_flight == 2 and not engine.has_unfinished()
        monkeypatch.setattr(engine, "num_in_flight", 2 if is_async else 1)
        return engine

    return make


def step(engine: Any) -> dict[str, int]:
    """One step; request id -> tokens it ran."""
    engine.step()
    engine.check_integrity()
    return dict(engine.trace.last_record.scheduled)


def finish(engine: Any) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = tokens.get(output.request_id, []) + output.token_ids
        engine.check_integrity()
    assert engine.kv.pool.num_free == engine.kv.num_blocks
    return tokens


def test_a_prompt_runs_in_slices_beside_those_who_decode(engine_with: Make) -> None:
    engine = engine_with(max_num_batched_tokens=8)
    engine.add_request(Request("a", [2, 3, 4], GREEDY))
    assert step(engine) == {"a": 3}
    engine.add_request(Request("b", list(range(5, 25)), GREEDY))
    assert step(engine) == {"a": 1, "b": 7}
    assert engine.sequences["b"].output_token_ids == [], "nothing is drawn before its last slice"
    assert step(engine) == {"a": 1, "b": 7}
    assert step(engine) == {"a": 1, "b": 6}
    assert len(engine.sequences["b"].output_token_ids) == 1
    engine.add_request(Request("c", [9] * 4, GREEDY))
    engine.add_request(Request("d", [9] * 4, GREEDY))
    assert step(engine) == {"a": 1, "b": 1, "c": 4, "d": 2}
    assert step(engine) == {"a": 1, "b": 1, "c": 1, "d": 2}
    prompts = {"a": [2, 3, 4], "b": list(range(5, 25)), "c": [9] * 4, "d": [9] * 4}
    heads = {name: list(engine.sequences[name].output_token_ids) for name in prompts}
    pairs = [(prompts[n], heads[n] + tokens) for n, tokens in finish(engine).items()]
    assert [len(output) for _, output in pairs] == [8] * 4
    assert check_greedy(MODEL, pairs).is_right


def test_who_decodes_comes_before_prompts(engine_with: Make) -> None:
    """With no budget left for it a prompt waits; nobody's turn is taken for it."""
    engine = engine_with(max_num_batched_tokens=2)
    for name in ("a", "b"):
        engine.add_request(Request(name, [2], GREEDY))
    assert step(engine) == {"a": 1, "b": 1}
    engine.add_request(Request("c", [3] * 5, GREEDY))
    for _ in range(7):
        assert step(engine) == {"a": 1, "b": 1}
    assert step(engine) == {"c": 2}
    finish(engine)


def test_a_threshold_leaves_room_beside_a_long_prompt(engine_with: Make) -> None:
    engine = engine_with(max_num_batched_tokens=16, long_prefill_threshold=6)
    engine.add_request(Request("long", [2] * 20, GREEDY))
    engine.add_request(Request("short", [3] * 5, GREEDY))
    assert step(engine) == {"long": 6, "short": 5}
    assert step(engine) == {"long": 6, "short": 1}
    finish(engine)


def test_who_joins_takes_the_blocks_of_its_whole_prompt(engine_with: Make) -> None:
    """Two prompts of 20 tokens and 7 blocks: the second waits, though its first slice would fit."""
    engine = engine_with(num_blocks=7, max_num_batched_tokens=4)
    engine.add_request(Request("a", [2] * 20, replace(GREEDY, max_tokens=2)))
    engine.add_request(Request("b", [3] * 20, replace(GREEDY, max_tokens=2)))
    assert step(engine) == {"a": 4}
    assert engine.stats()["num_used_blocks"] == 5
    for _ in range(4):
        assert step(engine) == {"a": 4}
    before = engine.stats()["num_preemptions"]
    finish(engine)
    assert engine.stats()["num_preemptions"] == before


@pytest.mark.parametrize("is_async", [False, True])
def test_a_prompt_preempted_in_its_middle_begins_again(engine_with: Make, is_async: bool) -> None:
    engine = engine_with(num_blocks=9, max_num_batched_tokens=4, is_async=is_async)
    prompts = {"a": [2, 3], "b": list(range(5, 24))}
    engine.add_request(Request("a", prompts["a"], replace(GREEDY, max_tokens=30)))
    step(engine)
    engine.add_request(Request("b", prompts["b"], GREEDY))
    step(engine)
    preempted = engine.sequences["b"]
    assert 0 < preempted.num_computed_tokens < 19
    engine.scheduler.preempt(preempted)
    assert preempted.num_computed_tokens == 0 and preempted.num_placeholders == 0
    heads = {name: list(engine.sequences[name].output_token_ids) for name in prompts}
    pairs = [(prompts[n], heads[n] + tokens) for n, tokens in finish(engine).items()]
    assert sorted(len(output) for _, output in pairs) == [8, 30]
    assert check_greedy(MODEL, pairs).is_right


def test_an_abort_in_the_middle_of_a_prompt(engine_with: Make) -> None:
    engine = engine_with(max_num_batched_tokens=4, is_async=True)
    engine.add_request(Request("a", [2] * 30, GREEDY))
    step(engine)
    step(engine)
    engine.abort("a")
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    finish(engine)


def test_penalties_and_seeds_count_from_the_first_token_drawn(engine_with: Make) -> None:
    """A slice that ends in the middle of a prompt draws nothing and counts nothing."""
    params = SamplingParams(
        seed=5, presence_penalty=1.5, frequency_penalty=1.5, max_tokens=20, ignore_eos=True
    )
    prompts = [[i + 2] * (3 * i + 1) for i in range(6)]
    engine = engine_with(max_num_batched_tokens=5, is_async=True)
    outputs = [c.token_ids for c in engine.generate(prompts, params, progress=False)]
    rows = [(p, o, params) for p, o in zip(prompts, outputs, strict=True)]
    assert check_seeded(MODEL, rows).is_right
    assert not check_seeded(MODEL, [(p[:-1] or [7], o, params) for p, o, _ in rows]).is_right


@pytest.mark.parametrize("budget", [1, 2, 7, 16])
def test_no_step_exceeds_its_budget(engine_with: Make, budget: int) -> None:
    """And each uses all of it while somebody could run more."""
    engine = engine_with(max_num_batched_tokens=budget, is_async=True)
    rng = random.Random(budget)
    prompts = [[rng.randrange(2, 500)] * rng.randint(1, 40) for _ in range(8)]
    last = engine.trace.last_record
    start = -1 if last is None else last.step
    engine.generate(prompts, replace(GREEDY, max_tokens=4), progress=False)
    records = [record for record in engine.trace.records() if record.step > start]
    sizes = [sum(record.scheduled.values()) for record in records]
    assert max(sizes) == budget
    left = sum(map(len, prompts))
    for size in sizes:
        if left <= 0:
            break
        assert size == budget or left < budget
        left -= size


def test_the_budget_depends_on_the_device() -> None:
    engine = engine_of(6, MODEL, threads=1, num_blocks=64, block_size=4)
    assert engine.config.max_num_batched_tokens == 256
    on_gpu = module_of(6, "config").EngineConfig().resolved(torch.device("cuda"), 16)
    assert on_gpu.max_num_batched_tokens == 8192
    runner = engine_of(
        6, MODEL, threads=1, max_num_batched_tokens=30, max_num_seqs=40, num_blocks=40
    ).runner
    batch = runner.prepare(runner.largest_step(12))
    assert batch.metadata.seq_lens.tolist() == [1] * 30
