"""Part 08's own invariants: drafts change how many tokens a step makes, and never which."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded, reference_logits
from common.testing.parts import engine_of, module_of, wrap_model
from common.testing.schedules import MODELS, Drive, Event, known_requests

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
            final = min(sequence.num_computed_tokens, sequence.num_tokens)
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
    engine.add_request(Request("a", PROMPT, GREEDY))
    tokens = [t for _ in range(3) for output in engine.step() for t in output.token_ids]
    sequence = engine.sequences["a"]
    engine.scheduler.preempt(sequence)
    assert sequence.draft_token_ids == []
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
        engine.add_request(Request("a", [3, 4, 5] * 4, GREEDY))
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


def test_a_model_that_drafts_catches_up_in_slices() -> None:
    """On a prompt of 30 tokens, 7 a step; from then on it drafts."""
    engine = engine_with("twin", max_num_batched_tokens=7, num_speculative_tokens=3)
    [c] = run(engine, [PROMPT], GREEDY)
    assert c.num_accepted_tokens == c.num_draft_tokens > 6


def test_what_was_drafted_wrongly_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin whose drafts are spoilt every other time: all others stay, whatever its cache held."""
    engine = engine_with("twin", num_speculative_tokens=3)
    propose, calls = engine.speculator.proposer.propose, []

    def spoilt(sequences: list[Any], limits: list[int]) -> list[Any]:
        drafts = propose(sequences, limits)
        calls.append(len(drafts))
        if len(calls) % 2:
            for draft in drafts:
                draft.token_ids[:1] = [(token + 1) % 512 for token in draft.token_ids[:1]]
        return drafts

    monkeypatch.setattr(engine.speculator.proposer, "propose", spoilt)
    [c] = run(engine, [PROMPT], replace(GREEDY, max_tokens=50))
    assert c.num_accepted_tokens >= c.num_draft_tokens / 2 - 3


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


def test_a_text_that_repeats_itself_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that counts to seven and begins again: after the first time each draft stays."""
    engine = engine_with("ngram", num_speculative_tokens=5)

    def count(batch: Any, what: Any = None) -> tuple[torch.Tensor, list[Any]]:
        last = batch.token_ids[batch.logits_indices]
        return 50.0 * torch.nn.functional.one_hot((last + 1) % 7, engine.vocab_size).float(), []

    monkeypatch.setattr(engine.runner, "forward", count)
    start = engine.trace.last_record.step if engine.trace.last_record else -1
    [c] = run(engine, [[0]], replace(GREEDY, max_tokens=200))
    assert c.token_ids == [(i + 1) % 7 for i in range(200)]
    num_steps = engine.trace.last_record.step - start
    assert c.num_accepted_tokens == c.num_draft_tokens == 200 - num_steps
    assert num_steps <= 8 + -(-192 // 6) + 5


class KnownProposer:
    """Drafts what will come, with an error now and then: drafts stay up to any place."""

    is_free = True

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def propose(self, sequences: list[Any], max_lengths: list[int]) -> list[Any]:
        outputs = {tuple(known.prompt): known.output for known in known_requests(MODEL)}
        drafts = []
        for sequence, most in zip(sequences, max_lengths, strict=True):
            begin = len(sequence.output_token_ids)
            draft = outputs[tuple(sequence.prompt_token_ids)][begin : begin + most]
            draft = [t if self.rng.random() < 0.8 else self.rng.randrange(512) for t in draft]
            drafts.append(module_of(8, "proposer").Draft(draft))
        return drafts

    def forget(self, sequence: Any) -> None:
        pass


@pytest.mark.parametrize("prefix_cache", ["hash", "radix"])
def test_random_schedules_with_drafts_that_mostly_stay(prefix_cache: str) -> None:
    rng = random.Random(8)
    proposer, accepted = KnownProposer(rng), 0
    for number in range(60):
        pool = POOLS[number % len(POOLS)] | {"prefix_cache": prefix_cache}
        budget = {"max_num_batched_tokens": rng.choice([1, 3, 20, 256])}
        engine = engine_with(
            "ngram", num_speculative_tokens=rng.choice([1, 4, 7]), **pool, **budget
        )
        before = engine.stats()["num_accepted_tokens"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.speculator, "proposer", proposer)
            schedule = [
                Event(
                    rng.randrange(12),
                    rng.randint(1, 24),
                    rng.choice([None, None, rng.randrange(24)]),
                    rng.choice([None, None, rng.randrange(14)]),
                    rng.randrange(8),
                )
                for _ in range(rng.randint(1, 14))
            ]
            Drive(engine, MODELS[0]).run(schedule)
        accepted += engine.stats()["num_accepted_tokens"] - before
    assert accepted > 500


def test_who_has_penalties_or_does_not_want_drafts_has_none() -> None:
    engine = engine_with("self")
    prompt = [3, 4, 5] * 6
    assert run(engine, [prompt], GREEDY)[0].num_draft_tokens > 0
    assert run(engine, [prompt], GREEDY, may_draft=False)[0].num_draft_tokens == 0
    params = replace(SEEDED, presence_penalty=1.0, frequency_penalty=0.5)
    [c] = run(engine, [prompt], params)
    assert c.num_draft_tokens == 0
    assert check_seeded(MODEL, [(prompt, c.token_ids, params)]).is_right


@pytest.mark.parametrize("proposer", ["stranger", "twin", "self"])
def test_unseeded_tokens_have_the_models_distribution(proposer: str) -> None:
    """Rejection in the engine, against exact probabilities: 1,500 answers of three tokens."""
    params = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, ignore_eos=True, n=128)
    flags = {"max_num_seqs": 32, "num_blocks": 400, "max_num_batched_tokens": 512}
    engine = engine_with(proposer, num_speculative_tokens=2, **flags)
    num_drafts = engine.stats()["num_draft_tokens"]
    outputs = [c.token_ids for _ in range(12) for c in run(engine, [PROMPT[:9]], params)]
    assert engine.stats()["num_draft_tokens"] - num_drafts > 1500
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


def test_drafting_that_fails_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once an answer that had just ended was lost with the exception, and its client waited on."""
    engine = engine_with("twin")
    engine.add_request(Request("short", PROMPT[:9], replace(GREEDY, max_tokens=1)))
    engine.add_request(Request("long", PROMPT, GREEDY))

    def fail(*_: Any) -> Any:
        raise RuntimeError("drafting failed")

    ends: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(engine.speculator.proposer, "propose", fail)
        for _ in range(6):
            try:
                outputs = engine.step() if engine.has_unfinished() else []
            except RuntimeError:
                engine.fail_step()
                continue
            ends |= {o.request_id: o.finish_reason for o in outputs if o.finished}
    assert ends == {"short": "length", "long": "error"}
    engine.check_integrity()


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("where", ["host", "device"])
def test_what_was_ready_when_drafting_failed_comes_with_the_next_step(
    proposer: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of the step that failed, of requests that it ends and of others, in the outbox."""
    engine = engine_with(proposer)
    short, long = PROMPT[:9], PROMPT
    expected = {
        "short": run(engine, [short], replace(GREEDY, max_tokens=1))[0].token_ids,
        "long": run(engine, [long], GREEDY)[0].token_ids[:1],
    }
    engine.add_request(Request("short", short, replace(GREEDY, max_tokens=1)))
    engine.add_request(Request("long", long, GREEDY))

    forward = engine.runner.forward

    def fail(*_: Any) -> Any:
        raise RuntimeError("drafting failed")

    def fail_to_draft(batch: Any, drafter: Any = None) -> Any:
        return forward(batch) if drafter is None else fail()

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="drafting failed"):
        if where == "device" and proposer != "ngram":
            patch.setattr(engine.runner, "forward", fail_to_draft)
        else:
            patch.setattr(engine.speculator.proposer, "propose", fail)
        engine.step()
    ready = {output.request_id: output for output in engine.outbox}
    assert {name: output.token_ids for name, output in ready.items()} == expected
    assert ready["short"].finish_reason == "length" and ready["long"].finish_reason is None
    assert engine.has_unfinished()
    engine.fail_step()
    engine.add_request(Request("later", short, GREEDY))
    outputs = engine.step()
    assert outputs[:2] == list(ready.values())
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs[2:3]] == [
        ("long", [], "error")
    ]
    assert engine.outbox == []
    engine.check_integrity()
    rest = [token for output in outputs[3:] for token in output.token_ids]
    assert check_greedy(MODEL, [(short, rest + finish(engine)["later"])]).is_right


def test_drafts_of_the_old_take_no_token_from_the_young() -> None:
    """Eight sequences and a budget of 20: all of them get a token in every step."""
    engine = engine_with("twin", max_num_batched_tokens=20, num_speculative_tokens=6)
    for number in range(8):
        engine.add_request(Request(f"r{number}", [5, 6 + number], replace(GREEDY, max_tokens=30)))
    drafted = 0
    while len(engine.sequences) == 8:
        engine.step()
        scheduled = engine.trace.last_record.scheduled
        assert len(scheduled) == 8 and sum(scheduled.values()) <= 20
        drafted += sum(scheduled.values()) - 8
    assert drafted > 20
    finish(engine)


@pytest.mark.parametrize("prefix_cache", ["hash", "radix"])
def test_blocks_that_no_draft_model_has_seen_are_caught_up_on(prefix_cache: str) -> None:
    """A prompt that somebody without drafts has left in the cache: a twin's drafts all stay."""
    engine = engine_with("twin", prefix_cache=prefix_cache, num_speculative_tokens=3)
    prompt = [(11 * i) % 490 + 3 for i in range(25)]
    run(engine, [prompt], GREEDY, may_draft=False)
    for _ in range(2):
        [c] = run(engine, [prompt], GREEDY)
        assert c.num_cached_tokens > 0 and c.num_accepted_tokens == c.num_draft_tokens > 9


def test_a_pause_in_drafting_leaves_nothing_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoilt drafts, then steps without any: what comes after is right again."""
    engine = engine_with("twin", num_speculative_tokens=3)
    propose, calls, kept = engine.speculator.proposer.propose, [], []

    def choose(sequences: list[Any], limits: list[int], num_tokens: int) -> list[int]:
        calls.append(1)
        return limits if len(calls) % 4 < 2 else [0] * len(limits)

    def spoilt(sequences: list[Any], limits: list[int]) -> list[Any]:
        drafts = propose(sequences, limits)
        if len(calls) % 4 == 1:
            for draft in drafts:
                draft.token_ids[:1] = [(token + 1) % 512 for token in draft.token_ids[:1]]
        else:
            kept.append(sum(len(draft.token_ids) for draft in drafts))
        return drafts

    monkeypatch.setattr(engine.speculator.lengths, "choose", choose)
    monkeypatch.setattr(engine.speculator.proposer, "propose", spoilt)
    [c] = run(engine, [PROMPT], replace(GREEDY, max_tokens=60))
    assert c.num_accepted_tokens >= sum(kept) - 3 > 10


def test_accepted_tokens_beyond_a_stop_do_not_count() -> None:
    engine = engine_with("twin", num_speculative_tokens=8)
    [whole] = run(engine, [PROMPT], GREEDY)
    params = replace(GREEDY, stop_token_ids=(whole.token_ids[3],))
    [c] = run(engine, [PROMPT], params)
    assert c.token_ids == whole.token_ids[:4] and c.num_accepted_tokens <= 3


def test_a_draft_model_reads_a_prompt_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 30 tokens, 16 a step: no draft while it is read, and then one in every step."""
    engine = engine_with("twin", num_speculative_tokens=3, max_num_batched_tokens=16)
    propose, seen = engine.speculator.proposer.propose, []

    def listen(sequences: list[Any], limits: list[int]) -> list[Any]:
        drafts = propose(sequences, limits)
        for sequence, limit, draft in zip(sequences, limits, drafts, strict=True):
            if limit > 0:
                assert len(draft.token_ids) in (0, limit)
                seen.append(
                    (len(draft.token_ids), sequence.num_drafter_tokens, sequence.num_tokens)
                )
        return drafts

    monkeypatch.setattr(engine.speculator.proposer, "propose", listen)
    engine.add_request(Request("a", PROMPT, replace(GREEDY, max_tokens=10)))
    finish(engine)
    assert seen[:2] == [(0, 16, 31), (3, 34, 32)]
    assert all(length > 0 for length, _, _ in seen[1:])
    assert all(read == num_tokens + length - 1 for length, read, num_tokens in seen[1:])


class Twins(Drive):
    """After each step, compares what the draft model has of each sequence with the model's own."""

    num_compared = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.engine.has_unfinished():
                break
            super().steps(1)
            kv = self.engine.kv
            for sequence in self.engine.scheduler.running:
                num_tokens = min(sequence.num_drafter_tokens, sequence.num_computed_tokens)
                blocks = sequence.block_table[: kv.blocks_for(num_tokens)]
                drafts, own = (
                    x[blocks].movedim(3, 1).flatten(0, 1) for x in (kv.draft_data, kv.data)
                )
                torch.testing.assert_close(drafts[:num_tokens], own[:num_tokens], rtol=0, atol=1e-4)
                self.num_compared += num_tokens


@pytest.mark.parametrize(
    ("pool", "prefix_cache"), [(0, "off"), (0, "hash"), (1, "radix"), (2, "off"), (3, "hash")]
)
def test_what_a_draft_model_has_is_what_it_would_compute(
    pool: int, prefix_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin: its keys and values are the model's, after preemptions, hits in the prefix cache,
    drafts that were wrong, and steps in which nothing was drafted."""
    rng = random.Random(pool)
    flags = POOLS[pool] | {"prefix_cache": prefix_cache, "num_speculative_tokens": 3}
    engine = engine_with("twin", max_num_batched_tokens=20, **flags)
    propose = engine.speculator.proposer.propose

    def choose(sequences: list[Any], limits: list[int], num_tokens: int) -> list[int]:
        return [limit if rng.random() < 0.7 else 0 for limit in limits]

    def spoilt(sequences: list[Any], limits: list[int]) -> list[Any]:
        drafts = propose(sequences, limits)
        for draft in drafts:
            if draft.token_ids and rng.random() < 0.3:
                place = rng.randrange(len(draft.token_ids))
                draft.token_ids[place] = (draft.token_ids[place] + 1) % 512
        return drafts

    monkeypatch.setattr(engine.speculator.lengths, "choose", choose)
    monkeypatch.setattr(engine.speculator.proposer, "propose", spoilt)
    before = engine.stats()
    for _ in range(2):
        drive = Twins(engine, MODEL)
        drive.run([Event(i * 5 % 12, 24, None, i - 4 if i == 11 else None, 0) for i in range(14)])
        assert drive.num_compared > 1000
    after = engine.stats()
    assert after["num_preemptions"] - before["num_preemptions"] >= 4
    num_hits = after["num_prefix_cache_hits"] - before["num_prefix_cache_hits"]
    assert (num_hits > 0) == (prefix_cache != "off")
    assert after["num_accepted_tokens"] - before["num_accepted_tokens"] > 100


@pytest.mark.parametrize("prefix_cache", ["off", "hash", "radix"])
def test_a_twin_is_right_after_every_preemption(prefix_cache: str) -> None:
    """It reads again what was freed; where the model finds its own, the draft model does not."""
    engine = engine_with("twin", prefix_cache=prefix_cache, num_speculative_tokens=3)
    engine.add_request(Request("a", PROMPT, replace(GREEDY, max_tokens=60)))
    sequence, tokens = engine.sequences["a"], []
    for _ in range(4):
        for _ in range(3):
            tokens += [token for output in engine.step() for token in output.token_ids]
        assert sequence.num_drafter_tokens > len(PROMPT)
        engine.scheduler.preempt(sequence)
        assert sequence.num_drafter_tokens == 0 and sequence.draft_token_ids == []
    tokens += finish(engine)["a"]
    counts = sequence.draft_counts
    assert len(tokens) == 60 and check_greedy(MODEL, [(PROMPT, tokens)]).is_right
    assert counts.num_accepted_tokens == counts.num_draft_tokens > 20


@pytest.mark.parametrize("proposer", ["self", "twin", "ngram"])
def test_the_largest_step_has_all_that_rejection_needs(proposer: str) -> None:
    """What a GPU's memory is kept for: the probabilities of every draft, and of the model."""
    engine = engine_with(proposer, num_speculative_tokens=3, max_num_seqs=5)
    runner = engine.runner
    batch = runner.prepare(runner.largest_step(20))
    logits = torch.zeros(len(batch.logits_indices), engine.vocab_size)
    rows = runner.rejection_rows(batch, logits)
    if proposer == "ngram":
        assert rows is None
    else:
        assert len(rows.target_probs) == 5 * 4 and len(rows.draft_probs) == 5 * 3
    runner.launch(batch).result()


def test_an_engine_with_a_seed_repeats_whatever_was_drafted() -> None:
    """Draft lengths depend on measured time; what is drawn may not."""
    outputs = []
    for most in (1, 4):
        flags = PROPOSERS["stranger"] | {"seed": 5, "num_speculative_tokens": most}
        config = module_of(8, "config").EngineConfig(
            model=MODEL, num_blocks=64, block_size=4, threads=1, **flags
        )
        engine = module_of(8, "engine").LLMEngine(config)
        engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: list(limits)
        outputs.append(run(engine, [PROMPT], replace(SEEDED, seed=None))[0].token_ids)
    assert outputs[0] == outputs[1]


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
