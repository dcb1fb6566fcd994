"""Part 05's own invariants: two steps in flight, what may happen to a sequence meanwhile, a step's input."""

import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_seeded
from common.testing.parts import PARTS, engine_of, module_of, wrap_model

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = [2, 3, 4]


def engine_with(**flags: Any) -> Any:
    return engine_of(5, MODEL, threads=1, **flags)


@pytest.fixture
def engine() -> Any:
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    engine.drain()
    assert not engine.has_unfinished()
    return engine


def step(engine: Any) -> tuple[dict[str, int], dict[str, list[int]]]:
    """One step: (request id -> tokens launched, request id -> tokens read)."""
    outputs = {output.request_id: output.token_ids for output in engine.step()}
    engine.check_integrity()
    return dict(engine.trace.last_record.scheduled), outputs


def finish(engine: Any) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = tokens.get(output.request_id, []) + output.token_ids
        engine.check_integrity()
    assert engine.kv.pool.num_free == engine.kv.num_blocks
    return tokens


def alone(prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    engine = engine_of(4, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    return engine.generate([prompt], params, progress=False)[0].token_ids


@pytest.fixture
def gate(engine: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """The device runs as many steps as the semaphore lets through."""
    gate = threading.Semaphore(0)

    def run(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
        assert gate.acquire(timeout=60), "nobody lets the device go on"
        return real()

    wrap_model(engine, monkeypatch, run)
    return gate


def test_the_next_step_is_launched_before_the_last_is_read(engine: Any) -> None:
    engine.add_request(Request("a", PROMPT, replace(GREEDY, max_tokens=3)))
    expected = alone(PROMPT)[:3]
    assert step(engine) == ({"a": 3}, {})
    assert step(engine) == ({"a": 1}, {"a": expected[:1]})
    assert step(engine) == ({"a": 1}, {"a": expected[1:2]})
    assert step(engine) == ({}, {"a": expected[2:]}), "no fourth token is computed in vain"
    assert not engine.has_unfinished()


def test_with_one_step_in_flight_every_step_reads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(num_blocks=64, block_size=4, max_num_seqs=8)
    monkeypatch.setattr(engine, "num_in_flight", 1)
    engine.add_request(Request("a", PROMPT, replace(GREEDY, max_tokens=2)))
    expected = alone(PROMPT)[:2]
    assert step(engine) == ({"a": 3}, {"a": expected[:1]})
    assert step(engine) == ({"a": 1}, {"a": expected[1:]})
    assert not engine.has_unfinished()


def test_the_host_does_not_wait_for_the_device(engine: Any, gate: threading.Semaphore) -> None:
    """The device does nothing yet: the host has two steps out, in buffers of their own, and only a
    third would wait."""
    engine.add_request(Request("a", PROMPT, GREEDY))
    assert step(engine) == ({"a": 3}, {})
    buffers = engine.runner.inputs.buffers
    first = buffers.turn
    done = threading.Event()

    def second() -> None:
        assert step(engine)[1] == {"a": alone(PROMPT)[:1]}
        done.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not done.wait(0.3), "it waits for the first step's tokens"
    assert [len(pending.scheduled.sampled) for pending in engine.in_flight] == [1]
    assert buffers.turn != first and None not in buffers.readers
    gate.release()
    thread.join(60)
    assert done.is_set()
    for _ in range(10):
        gate.release()
    finish(engine)


def test_a_stop_costs_one_discarded_token(engine: Any) -> None:
    """Not known beforehand, unlike the last token of max_tokens."""
    whole = alone(PROMPT)
    for place in range(8):
        if whole[place] in whole[:place]:
            continue
        params = replace(GREEDY, max_tokens=20, stop_token_ids=(whole[place],))
        engine.add_request(Request("a", PROMPT, params))
        before = engine.trace.last_record.step if engine.trace.last_record else -1
        assert finish(engine)["a"] == whole[: place + 1]
        records = [record for record in engine.trace.records() if record.step > before]
        ran = sum(sum(record.scheduled.values()) for record in records)
        assert ran == len(PROMPT) + place + 1, "as many forwards as tokens, and one"


def test_who_gets_its_last_token_makes_room_at_once() -> None:
    """A pool for one sequence: the next starts while the last token of the first is on its way."""
    engine = engine_with(num_blocks=3, block_size=4, max_num_seqs=1)
    expected = alone([5] * 9)[:2]
    engine.add_request(Request("a", PROMPT, replace(GREEDY, max_tokens=2)))
    engine.add_request(Request("b", [5] * 9, replace(GREEDY, max_tokens=2)))
    assert step(engine)[0] == {"a": 3}
    assert step(engine)[0] == {"a": 1}
    assert engine.stats()["num_running"] == 1 and engine.stats()["num_used_blocks"] == 0
    launched, read = step(engine)
    assert launched == {"b": 9} and read == {"a": alone(PROMPT)[1:2]}
    assert finish(engine)["b"] == expected


def test_a_preempted_sequence_keeps_the_token_that_was_on_its_way() -> None:
    engine = engine_with(num_blocks=6, block_size=2, max_num_seqs=8)
    long = replace(GREEDY, max_tokens=7)
    for name in ("a", "b"):
        engine.add_request(Request(name, PROMPT, long))
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    caught = 0
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
        for request_id in engine.trace.last_record.preempted:
            assert request_id == "b"
            sequence = engine.sequences.get("b")
            # Its step was in flight when it lost its blocks; it has been read since.
            caught += sequence is not None and len(sequence.output_token_ids) > 0
            assert sequence not in engine.trace.last_record.scheduled
    assert caught and tokens["a"] == tokens["b"] == alone(PROMPT, long)


def test_nobody_joins_with_a_token_on_its_way(engine: Any, gate: threading.Semaphore) -> None:
    """Preempted at once after its launch: it waits until that step is read."""
    engine.add_request(Request("a", PROMPT, GREEDY))
    step(engine)
    [sequence] = engine.scheduler.running
    engine.scheduler.preempt(sequence)
    assert sequence.num_placeholders == 1
    assert not engine.scheduler.schedule().num_new_tokens
    for _ in range(20):
        gate.release()
    assert finish(engine)["a"] == alone(PROMPT)


@pytest.mark.parametrize("same_id", [True, False])
def test_an_abort_in_flight(engine: Any, same_id: bool) -> None:
    """What it still computes is dropped, also where its id has a new owner by then."""
    engine.add_request(Request("a", PROMPT, GREEDY))
    step(engine)
    step(engine)
    engine.abort("a")
    name = "a" if same_id else "b"
    engine.add_request(Request(name, [9, 8], GREEDY))
    launched, outputs = step(engine)
    assert launched == {name: 2}
    assert outputs["a"] == [], "the abort's own output, and not a token"
    assert finish(engine)[name] == alone([9, 8])


def test_aborting_all_leaves_a_step_to_read(engine: Any) -> None:
    engine.add_request(Request("a", PROMPT, GREEDY))
    step(engine)
    engine.abort("a")
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert not engine.has_unfinished() and not engine.in_flight


@pytest.mark.parametrize("where", ["prepare", "device"])
def test_a_failing_step_ends_only_what_it_ran(
    engine: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whether it fails when it is launched or on the device, where it is seen a step later."""

    def fail(token_ids: list[int], num_rows: int, real: Callable[[], Any]) -> Any:
        if 13 in token_ids:
            raise RuntimeError("the model failed")
        return real()

    prepare = engine.runner.prepare

    def fail_to_prepare(scheduled: Any) -> Any:
        if any(13 in sequence.prompt_token_ids for sequence in scheduled.admitted):
            raise RuntimeError("no input")
        return prepare(scheduled)

    if where == "device":
        wrap_model(engine, monkeypatch, fail)
    else:
        monkeypatch.setattr(engine.runner, "prepare", fail_to_prepare)
    got: dict[str, list[int]] = {"good": [], "bad": [], "beside": []}
    reasons: dict[str, str] = {}
    engine.add_request(Request("good", PROMPT, GREEDY))
    for number in range(30):
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
            got[output.request_id] += output.token_ids
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
    assert reasons == {"good": "length", "bad": "error", "beside": "error"}
    assert got == {"good": alone(PROMPT), "bad": [], "beside": []}
    assert engine.kv.pool.num_free == 64 and not engine.has_unfinished()


def test_an_interrupted_generate_leaves_nothing_in_flight(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def interrupt(scheduled: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return prepare(scheduled)

    prepare = engine.runner.prepare
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.runner, "prepare", interrupt)
        engine.generate([PROMPT, [7]], GREEDY, progress=False)
    assert not engine.has_unfinished()
    outputs = engine.generate([PROMPT, [7]], GREEDY, progress=False)
    assert [output.token_ids for output in outputs] == [alone(PROMPT), alone([7])]


def test_penalties_count_tokens_that_the_host_has_not_read() -> None:
    """And go on after a preemption, maybe in another row."""
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


def test_log_probabilities_are_those_of_part_04(engine: Any) -> None:
    """Rows that want none, some and only their own, side by side."""
    wishes = [None, 3, 0, 20, None, 1]
    params = [replace(GREEDY, logprobs=wish) for wish in wishes]
    prompts = [[i + 3] * (i + 1) for i in range(6)]
    ours = engine.generate(prompts, params, progress=False)
    other = engine_of(4, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    theirs = other.generate(prompts, params, progress=False)
    for wish, mine, its in zip(wishes, ours, theirs, strict=True):
        assert mine.token_ids == its.token_ids
        for left, right in zip(mine.logprobs or [], its.logprobs or [], strict=True):
            assert left.token_id == right.token_id and len(left.top) == len(right.top) == wish
            assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
            for (id_left, of_left), (id_right, of_right) in zip(left.top, right.top, strict=True):
                assert id_left == id_right and of_left == pytest.approx(of_right, abs=1e-4)
        assert (mine.logprobs is None) == (its.logprobs is None)


def test_the_trace_tells_when_the_device_worked(engine: Any) -> None:
    """Each launched step once, one after the other, begun after its launch began."""
    before = engine.trace.last_record.step if engine.trace.last_record else -1
    engine.generate([PROMPT, [7] * 30], GREEDY, progress=False)
    records = [record for record in engine.trace.records() if record.step > before]
    launches = {
        record.step: begin
        for record in records
        for name, begin, _ in record.phases
        if name == "launch"
    }
    spans = [span for record in records for span in record.device]
    assert [number for number, _, _ in spans] == sorted(launches)
    ends = 0.0
    for number, begin, end in spans:
        assert launches[number] <= begin <= end and begin >= ends
        ends = end
    steady = records[2]
    assert [name for name, _, _ in steady.phases] == [
        "schedule", "prepare", "launch", "wait", "postprocess"
    ]  # fmt: skip
    assert [number for number, _, _ in steady.device] == [steady.step - 1]


def test_shutdown_waits_for_what_is_in_flight_and_the_thread_ends_with_the_engine() -> None:
    config = module_of(5, "config").EngineConfig(model=MODEL, num_blocks=8, threads=1)
    engine = module_of(5, "engine").LLMEngine(config)
    engine.add_request(Request("a", PROMPT, GREEDY))
    engine.step()
    engine.shutdown()
    assert not engine.in_flight and engine.kv.pool.num_free == 8
    [thread] = engine.runner.queue.thread._threads
    assert thread.is_alive()
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 5])
def test_penalties_of_others_do_not_notice_who_leaves(part: int) -> None:
    """One whose only token is launched gives up its row before the device has counted its output:
    once that wiped out the counts of everybody."""
    params = SamplingParams(
        temperature=0.0, presence_penalty=1.5, frequency_penalty=1.0, max_tokens=24, ignore_eos=True
    )
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    [alone] = engine.generate([PROMPT], params, progress=False)
    engine.add_request(Request("a", PROMPT, params))
    tokens: list[int] = []
    for number in range(60):
        if not engine.has_unfinished():
            break
        engine.add_request(Request(f"b{number}", [5, 6 + number], replace(params, max_tokens=1)))
        tokens += [t for o in engine.step() if o.request_id == "a" for t in o.token_ids]
        if len(tokens) == 24:
            break
    while engine.has_unfinished():
        tokens += [t for o in engine.step() if o.request_id == "a" for t in o.token_ids]
    assert tokens == alone.token_ids


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 5])
def test_eos_at_every_position(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end is seen when the next step is under way: what that draws belongs to nobody. Some
    requests end there, others pass it by, and one ignores it; all begin together."""
    flags: dict[str, Any] = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "threads": 1}
    engine = engine_of(part, MODEL, **flags)
    prompts = [PROMPT, [9, 8, 7, 6, 5], [4] * 9]
    params = replace(GREEDY, max_tokens=10)
    outputs = [alone(prompt, params) for prompt in prompts]
    for output in outputs:
        for eos in output:
            monkeypatch.setattr(engine, "eos_token_ids", frozenset({eos}))
            wishes = [replace(params, ignore_eos=False)] * 3 + [params]
            completions = engine.generate([*prompts, prompts[0]], wishes, progress=False)
            engine.check_integrity()
            assert completions[3].token_ids == outputs[0]
            for completion, whole in zip(completions, outputs, strict=False):
                ends = eos in whole
                expected = whole[: whole.index(eos) + 1] if ends else whole
                assert completion.token_ids == expected
                assert completion.finish_reason == ("stop" if ends else "length")
    assert not engine.in_flight
