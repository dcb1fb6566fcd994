"""Part 04's own invariants: who joins and who is preempted, statuses, a step's input, n completions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import PARTS, distinct_files, engine_of, folder_of, module_of, wrap_model

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def engine_with(**flags: Any) -> Any:
    return engine_of(4, MODEL, threads=1, **flags)


def step(engine: Any) -> dict[str, int]:
    """One step; request id -> tokens it ran."""
    engine.step()
    engine.check_integrity()
    return dict(engine.trace.records()[-1].scheduled)


def finish(engine: Any) -> None:
    while engine.has_unfinished():
        step(engine)
    assert engine.kv.pool.num_free == engine.kv.num_blocks


def test_sequences_join_and_leave_at_every_step() -> None:
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    engine.add_request(Request("a", [2] * 5, replace(GREEDY, max_tokens=3)))
    assert step(engine) == {"a": 5}
    engine.add_request(Request("b", [3] * 7, GREEDY))
    engine.add_request(Request("c", [4] * 2, GREEDY))
    assert step(engine) == {"b": 7, "c": 2}, "a prefill step whenever somebody can join"
    assert step(engine) == {"a": 1, "b": 1, "c": 1}
    assert step(engine) == {"a": 1, "b": 1, "c": 1}
    assert step(engine) == {"b": 1, "c": 1}, "a has left"
    engine.abort("b")
    assert step(engine) == {"c": 1}
    finish(engine)


def test_prompts_of_a_step_stay_in_the_budget_but_for_the_first() -> None:
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=20)
    for name, length in (("a", 30), ("b", 12), ("c", 8), ("d", 1)):
        engine.add_request(Request(name, [2] * length, GREEDY))
    assert step(engine) == {"a": 30}
    assert step(engine) == {"b": 12, "c": 8}
    assert step(engine) == {"d": 1}
    finish(engine)


def test_nobody_overtakes() -> None:
    """The head of the queue needs more than is free; the small one behind it waits all the same."""
    engine = engine_with(num_blocks=10, block_size=4, max_num_seqs=8)
    engine.add_request(Request("a", [2] * 20, replace(GREEDY, max_tokens=4)))
    engine.add_request(Request("big", [2] * 20, GREEDY))
    engine.add_request(Request("small", [2], GREEDY))
    assert step(engine) == {"a": 20}
    for _ in range(3):
        assert step(engine) == {"a": 1}
    assert step(engine) == {"big": 20, "small": 1}
    finish(engine)


def test_who_joins_leaves_each_of_the_others_a_block_to_grow_into() -> None:
    engine = engine_with(num_blocks=6, block_size=4, max_num_seqs=8)
    engine.add_request(Request("a", [2] * 8, GREEDY))
    engine.add_request(Request("b", [2] * 16, GREEDY))
    assert step(engine) == {"a": 8}, "4 blocks are free and b needs 4, but a will want one"
    assert step(engine) == {"a": 1}
    finish(engine)


def test_the_newest_is_preempted_keeps_its_output_and_comes_back_first() -> None:
    engine = engine_with(num_blocks=6, block_size=2, max_num_seqs=8)
    long = replace(GREEDY, max_tokens=7)
    for name in ("a", "b"):
        engine.add_request(Request(name, [2, 3, 4], long))
        step(engine)
    tokens: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    seen: list[dict[str, int]] = []
    preempted: list[str] = []
    engine.add_request(Request("c", [5], long))
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
        record = engine.trace.records()[-1]
        seen.append(dict(record.scheduled))
        if record.preempted and not preempted:
            assert list(record.scheduled) == ["a"], "nobody joins in that step"
        preempted += record.preempted
    assert preempted[0] == "b", "the newest that ran, not the oldest"
    back = next(scheduled for scheduled in seen if scheduled.get("b", 0) > 1)
    assert back["b"] > 3, "prompt and output run again as one"
    order = [name for scheduled in seen for name in scheduled if scheduled[name] > 1 or name == "c"]
    assert order.index("b") < order.index("c"), "it waits before those who have not run yet"
    known = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    alone = known.generate([[2, 3, 4]], long, progress=False)[0].token_ids
    assert tokens["b"] == alone[len(alone) - len(tokens["b"]) :]


def test_penalties_count_on_after_a_preemption() -> None:
    """What counts is the whole output of a sequence, also that from before it gave up its blocks."""
    params = SamplingParams(seed=5, presence_penalty=1.5, frequency_penalty=1.5, ignore_eos=True)
    params = replace(params, max_tokens=30, temperature=0.3)
    prompts = [[i + 2] * 3 for i in range(6)]
    engine = engine_with(num_blocks=17, block_size=4, max_num_seqs=4)
    before = engine.stats()["num_preemptions"]
    outputs = [c.token_ids for c in engine.generate(prompts, params, progress=False)]
    assert engine.stats()["num_preemptions"] > before
    rows = [(p, o, params) for p, o in zip(prompts, outputs, strict=True)]
    verdict = check_seeded(MODEL, rows)
    assert verdict.num_tokens == 180 and verdict.is_right, verdict
    free = replace(params, presence_penalty=0.0, frequency_penalty=0.0)
    assert not check_seeded(MODEL, [(p, o, free) for p, o, _ in rows]).is_right


def test_a_failing_prompt_leaves_the_running_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    expected = engine.generate([[2, 3, 4]], GREEDY, progress=False)[0].token_ids

    def fail(token_ids: list[int], num_rows: int, real: Any) -> Any:
        if 13 in token_ids:
            raise RuntimeError("the model failed")
        return real()

    wrap_model(engine, monkeypatch, fail)
    got: list[int] = []
    reasons: dict[str, str] = {}
    engine.add_request(Request("good", [2, 3, 4], GREEDY))
    for number in range(20):
        if number == 3:
            engine.add_request(Request("bad", [13], GREEDY))
            engine.add_request(Request("beside", [5], GREEDY))
        try:
            outputs = engine.step()
        except RuntimeError:
            engine.fail_step()
            outputs = []
        engine.check_integrity()
        for output in outputs:
            got += output.token_ids if output.request_id == "good" else []
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    assert reasons == {"good": "length", "bad": "error", "beside": "error"}
    assert got == expected
    assert engine.kv.pool.num_free == 64 and not engine.has_unfinished()


def test_n_completions_of_one_prompt() -> None:
    """One noise for each: they differ from each other, repeat, and the first is what n=1 gives."""
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    params = SamplingParams(seed=3, max_tokens=8, ignore_eos=True, n=4)
    outputs = engine.generate([[5, 6], [7]], params, progress=False)
    assert [output.index for output in outputs] == list(range(8))
    tokens = [output.token_ids for output in outputs]
    assert len(set(map(tuple, tokens))) == 8
    assert tokens == [o.token_ids for o in engine.generate([[5, 6], [7]], params, progress=False)]
    single = engine.generate([[5, 6], [7]], replace(params, n=1), progress=False)
    assert [o.token_ids for o in single] == [tokens[0], tokens[4]]
    greedy = engine.generate([[5, 6]], replace(GREEDY, n=2), progress=False)
    assert greedy[0].token_ids == greedy[1].token_ids
    assert check_greedy(MODEL, [([5, 6], greedy[1].token_ids)]).is_right


def test_the_batch_says_what_is_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt beside a decode row, as tensors and held against plain arithmetic."""
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    sequence_class = module_of(4, "sequence").Sequence
    no_end = frozenset({1})
    old = sequence_class(Request("old", [7] * 6, GREEDY), 9, no_end, 20, num_computed_tokens=6)
    old.output_token_ids, old.block_table = [42], [9, 3]
    params = SamplingParams(top_k=5, min_tokens=2)
    new = sequence_class(Request("new", [11, 12, 13], params, choice=2), 2**64 - 1, no_end, 20)
    new.block_table = [5]
    output = module_of(4, "scheduler").SchedulerOutput()
    output.run(new, 3)
    output.run(old, 1)
    assert output.num_tokens == 4 and output.sampled == [new, old]
    batch = engine.runner.prepare(output)
    assert batch.token_ids.tolist() == [11, 12, 13, 42]
    assert batch.positions.tolist() == [0, 1, 2, 6]
    assert batch.metadata.cu_seqlens_q.tolist() == [0, 3, 4]
    assert batch.metadata.seq_lens.tolist() == [3, 7]
    assert batch.metadata.slot_mapping.tolist() == [20, 21, 22, 14]
    assert batch.metadata.block_tables.tolist() == [[5, 0], [9, 3]]
    assert (batch.metadata.max_query_len, batch.metadata.max_seq_len) == (3, 7)
    assert batch.logits_indices.tolist() == [2, 3]
    drawn: list[Any] = []

    def sample(ops: Any, logits: torch.Tensor, sampling: Any) -> torch.Tensor:
        drawn.append(sampling)
        return torch.tensor([300, 301])

    monkeypatch.setattr(module_of(4, "model_runner"), "sample", sample)
    logits = torch.zeros(2, engine.vocab_size)
    assert engine.runner.sample(output.sampled, logits)[0] == [[300], [301]]
    [sampling] = drawn
    assert sampling.seeds.tolist() == [[-1], [9]]
    assert sampling.choices.tolist() == [[2], [0]]
    assert sampling.positions.tolist() == [[3], [7]]
    assert sampling.top_k.tolist() == [[5], [0]]
    assert np.allclose(sampling.temperature, [[1.0], [0.0]])
    biased = sampling.biased(logits)
    assert biased[0, 1] == -torch.inf and (biased[1] == 0).all(), "not its end before min_tokens"
    half = module_of(4, "scheduler").SchedulerOutput()
    half.run(new, 2)
    assert half.sampled == [], "sampled only after its last token"
    assert engine.runner.prepare(half).logits_indices.tolist() == []


def test_a_step_says_what_it_holds() -> None:
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    stats = engine.stats()
    per_token = 2 * engine.runner.model.config.num_layers * engine.kv.data[0, 0, 0, 0].nbytes
    assert stats["kv_cache_bytes"] == 64 * 4 * per_token
    assert stats["weight_bytes"] == engine.runner.model.num_bytes > 0


@pytest.mark.parametrize(
    ("budget", "lengths"),
    [(30, [1] * 40), (60, [12, 10] + [1] * 38), (5, [1] * 40)],
)
def test_the_largest_step(budget: int, lengths: list[int]) -> None:
    """What a GPU's memory is sized by; here it must only run. And more rows than tokens of context."""
    engine = engine_with(
        max_model_len=12, max_num_seqs=40, max_num_batched_tokens=budget, num_blocks=40
    )
    runner = engine.runner
    largest = runner.largest_step(12)
    batch = runner.prepare(largest)
    assert batch.metadata.seq_lens.tolist() == lengths
    assert len(batch.token_ids) == largest.num_tokens == sum(lengths)
    tokens, _ = runner.sample(largest.sampled, runner.forward(batch)[0])
    assert len(tokens) == 40
    runner.run_step(runner.largest_step(12))
    outputs = engine.generate([[2]] * 45, replace(GREEDY, max_tokens=4), progress=False)
    assert len({tuple(output.token_ids) for output in outputs}) == 1


def test_the_largest_step_has_the_longest_prompt() -> None:
    """The first prompt of a step may be longer than the budget."""
    runner = engine_with(max_model_len=64, max_num_seqs=3, max_num_batched_tokens=8).runner
    batch = runner.prepare(runner.largest_step(64))
    assert batch.metadata.seq_lens.tolist() == [62, 1, 1]


# A sequence's status.

LEGAL = {
    "waiting": {"loading", "running", "finished"},
    "loading": {"running", "finished"},
    "running": {"waiting", "ending", "finished"},
    "ending": {"finished"},
    "finished": set(),
}


def statuses(part: int) -> dict[str, Any]:
    """Each status by its name."""
    return {status.value: status for status in module_of(part, "sequence").Status}


def sequence_of(part: int, **fields: Any) -> Any:
    return module_of(part, "sequence").Sequence(
        Request("x", [2, 3], GREEDY), 0, frozenset(), 10, **fields
    )


@pytest.mark.parametrize("part", distinct_files("scheduler.py"))
def test_an_illegal_transition_names_both_statuses(part: int) -> None:
    """Every pair of statuses: what is legal happens, the rest is an error and changes nothing."""
    scheduler = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4).scheduler
    known = statuses(part)
    later = ({"ending"} if part == 4 else set()) | ({"loading"} if part < 12 else set())
    assert known.keys() == LEGAL.keys() - later
    for was in known:
        for status in known:
            sequence = sequence_of(part, status=known[was])
            if status in LEGAL[was]:
                scheduler.become(sequence, known[status])
                assert sequence.status is known[status]
            else:
                with pytest.raises(AssertionError, match=f"^x: {was} -> {status}"):
                    scheduler.become(sequence, known[status])
                assert sequence.status is known[was]


@pytest.mark.parametrize("part", distinct_files("scheduler.py"))
def test_what_may_not_happen_to_a_sequence_leaves_it_as_it_was(part: int) -> None:
    """By the methods that change a status: the error comes before anything is moved or freed."""
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    scheduler = engine.scheduler
    for name in ("a", "b"):
        engine.add_request(Request(name, [2, 3, 4], GREEDY))
    engine.step()
    engine.add_request(Request("waiting", [5], GREEDY))
    running, waiting = engine.sequences["a"], engine.sequences["waiting"]

    def refused(method: Any, sequence: Any, transition: str) -> None:
        before = list(scheduler.running), list(scheduler.waiting), list(sequence.block_table)
        with pytest.raises(AssertionError, match=f"^{sequence.request_id}: {transition}$"):
            method(sequence)
        assert before == (
            list(scheduler.running),
            list(scheduler.waiting),
            list(sequence.block_table),
        )

    refused(scheduler.start, running, "running -> running")
    refused(scheduler.preempt, waiting, "waiting -> waiting")
    if part > 4:
        refused(scheduler.end, waiting, "waiting -> ending")
        scheduler.end(engine.sequences["b"])
        refused(scheduler.end, engine.sequences["b"], "ending -> ending")
        refused(scheduler.preempt, engine.sequences["b"], "ending -> waiting")
        refused(scheduler.start, engine.sequences["b"], "ending -> running")
    engine.check_integrity()
    engine.abort("a")
    for method, status in ((scheduler.preempt, "waiting"), (scheduler.finish, "finished")):
        refused(method, running, f"finished -> {status}")
    engine.shutdown()
    engine.check_integrity()


@pytest.mark.parametrize("part", distinct_files("scheduler.py"))
def test_a_status_that_is_not_true_is_noticed(part: int) -> None:
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    engine.add_request(Request("a", [2, 3, 4], GREEDY))
    sequence, known = engine.sequences["a"], statuses(part)
    for right in ("waiting", "running"):
        for wrong in known.keys() - {right}:
            sequence.status = known[wrong]
            with pytest.raises(AssertionError, match=f"a: Status.{wrong.upper()}"):
                engine.check_integrity()
        sequence.status = known[right]
        engine.check_integrity()
        engine.step()
    engine.shutdown()


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 4])
def test_nothing_but_the_scheduler_changes_a_status(part: int) -> None:
    places = [
        (path.name, line.strip())
        for path in folder_of(part).glob("*.py")
        for line in path.read_text().splitlines()
        if ".status = " in line
    ]
    assert places == [("scheduler.py", "sequence.status = status")]
