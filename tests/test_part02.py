"""Part 02's own invariants: the step, the queue, aborts, and the thread behind asyncio."""

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.requests import Request, fan_out
from common.sampling import SamplingParams
from common.testing.parts import PARTS, engine_of, module_of

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine() -> Any:
    engine = engine_of(2, MODEL)
    yield engine
    engine.shutdown()


def drain(engine: Any) -> dict[str, tuple[list[int], str | None]]:
    """Step until idle; request id -> (tokens, finish reason)."""
    results: dict[str, tuple[list[int], str | None]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            token_ids, reason = results.get(output.request_id, ([], None))
            assert reason is None, "an output after the last one"
            results[output.request_id] = (token_ids + output.token_ids, output.finish_reason)
        engine.check_integrity()
    return results


def test_first_come_first_served(engine: Any) -> None:
    prompts = {f"r{i}": [2 + i, 3, 4] for i in range(4)}
    for request_id, prompt in prompts.items():
        engine.add_request(Request(request_id, prompt, GREEDY))
    assert engine.stats()["num_waiting"] == 4
    results = drain(engine)
    assert list(results) == list(prompts)
    alone = engine.generate(list(prompts.values()), GREEDY, progress=False)
    assert [tokens for tokens, _ in results.values()] == [c.token_ids for c in alone]
    assert not engine.has_unfinished()
    assert engine.stats()["kv_cache_bytes"] == 0


def test_one_step_is_one_token(engine: Any) -> None:
    """The first step is the prefill, and the trace says so."""
    engine.add_request(Request("a", [2, 3, 4, 5], GREEDY))
    for number in range(8):
        [output] = engine.step()
        assert len(output.token_ids) == 1
        record = engine.trace.records()[-1]
        assert record.scheduled == {"a": 4 if number == 0 else 1}
        names = [name for name, _, _ in record.phases]
        assert names == ["schedule", "prepare", "forward", "sample", "postprocess"]
    assert output.finish_reason == "length" and record.finished == {"a": "length"}
    assert not engine.has_unfinished()
    assert engine.step() == []


def test_abort_waiting_running_and_unknown(engine: Any) -> None:
    for name in "abc":
        engine.add_request(Request(name, [2, 3], GREEDY))
    engine.step()
    engine.step()
    engine.abort("a")
    engine.abort("b")
    engine.abort("nobody")
    assert [output.finish_reason for output in engine.step()[:2]] == ["abort", "abort"]
    assert engine.trace.records()[-1].finished == {"a": "abort", "b": "abort"}
    results = drain(engine)
    assert list(results) == ["c"] and results["c"][1] == "length"


def test_requests_are_checked(engine: Any) -> None:
    engine.add_request(Request("a", [2], GREEDY))
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add_request(Request("a", [2], GREEDY))
    with pytest.raises(ValueError, match="ids go from 0 to 511"):
        engine.add_request(Request("b", [512], GREEDY))


def test_generate_leaves_nothing_behind_when_interrupted(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "sample", broken)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[2], [3]], GREEDY, progress=False)
    assert not engine.has_unfinished()
    monkeypatch.undo()
    assert len(engine.generate([[2], [3]], GREEDY, progress=False)) == 2


def test_generate_does_not_mix_with_add_request(engine: Any) -> None:
    """Its loop would swallow the other requests' outputs."""
    engine.add_request(Request("a", [2], GREEDY))
    with pytest.raises(ValueError, match="requests of add_request"):
        engine.generate([[2]], GREEDY, progress=False)
    assert drain(engine)["a"][1] == "length"


@pytest.mark.parametrize(("length", "max_tokens"), [(5, 16), (1008, 16), (1020, 4), (1023, 1)])
def test_default_max_tokens_is_what_is_left_of_the_context(
    engine: Any, length: int, max_tokens: int
) -> None:
    """A client that did not send max_tokens must not be told that it is too large."""
    from common.http.app import Frontend
    from common.http.errors import ApiError
    from common.http.run import ServerConfig
    from common.http.schemas import CompletionRequest

    frontend = Frontend(engine, ServerConfig(), streaming=True, max_n=1)
    job = asyncio.run(frontend.read(CompletionRequest(prompt=[2] * length)))
    assert job.params.max_tokens == max_tokens
    with pytest.raises(ApiError, match="max_tokens is 1020"):
        asyncio.run(frontend.read(CompletionRequest(prompt=[2] * length, max_tokens=1020)))


class QueueMachine(RuleBasedStateMachine):
    """Adds, aborts, failures and steps in any order: every request ends exactly once, with a prefix
    of what it gives alone, and the engine is empty when all have."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = engine_of(2, MODEL)
        self.engine.shutdown()
        self.count = 0
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    @rule(
        prompt=st.lists(st.integers(2, 511), min_size=1, max_size=6),
        max_tokens=st.integers(1, 5),
        seed=st.none() | st.integers(0, 9),
    )
    def add(self, prompt: list[int], max_tokens: int, seed: int | None) -> None:
        temperature = 0.0 if seed is None else 1.0
        params = replace(GREEDY, temperature=temperature, seed=seed, max_tokens=max_tokens)
        request_id = f"q{self.count}"
        self.count += 1
        self.engine.add_request(Request(request_id, prompt, params))
        self.requests[request_id] = (prompt, params)
        self.outputs[request_id] = []

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.requests))))

    @rule()
    def fail(self) -> None:
        self.engine.fail_step()

    @rule()
    def step(self) -> None:
        for output in self.engine.step():
            assert output.request_id not in self.reasons, "an output after the last one"
            self.outputs[output.request_id] += output.token_ids
            if output.finished:
                self.reasons[output.request_id] = output.finish_reason

    @invariant()
    def whole(self) -> None:
        self.engine.check_integrity()

    def teardown(self) -> None:
        while self.engine.has_unfinished():
            self.step()
        assert set(self.reasons) == set(self.requests)
        for request_id, (prompt, params) in self.requests.items():
            [alone] = self.engine.generate([prompt], params, progress=False)
            token_ids, reason = self.outputs[request_id], self.reasons[request_id]
            assert token_ids == alone.token_ids[: len(token_ids)]
            assert (reason == "length") == (token_ids == alone.token_ids and reason != "abort")


QueueMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20)
test_any_order_of_requests = QueueMachine.TestCase


def run_async(engine: Any, body: Any) -> Any:
    """Run `body(async_engine)` with the engine's thread alive."""

    async def main() -> Any:
        async_engine = module_of(2, "async_engine").AsyncEngine(engine)
        async with async_engine.lifespan():
            result = await body(async_engine)
        assert not async_engine.thread.is_alive()
        return result

    return asyncio.run(main())


async def collect(async_engine: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    token_ids: list[int] = []
    async for _, _, delta in async_engine.generate(fan_out([(prompt, params)])):
        token_ids += delta.token_ids
    return token_ids


def test_streams_side_by_side_give_what_they_give_alone(engine: Any) -> None:
    prompts = [[2 + i, 9] for i in range(6)]
    expected = [c.token_ids for c in engine.generate(prompts, GREEDY, progress=False)]

    async def body(async_engine: Any) -> list[list[int]]:
        return await asyncio.gather(*(collect(async_engine, p, GREEDY) for p in prompts))

    assert run_async(engine, body) == expected


@pytest.mark.parametrize("part", [2, PARTS[-1]])
def test_a_step_that_hangs_does_not_keep_the_server_alive(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = engine_of(part, "random:tiny-llama", threads=1), threading.Event()
    module = module_of(part, "async_engine")
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.2)
    monkeypatch.setattr(engine, "schedule", lambda: gate.wait(60) and None)

    async def main() -> threading.Thread:
        async_engine = module.AsyncEngine(engine)
        async with async_engine.lifespan():
            stream = async_engine.generate(fan_out([([2, 3], GREEDY)]))
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.1)
            waiting.cancel()
        return async_engine.thread

    thread = asyncio.run(asyncio.wait_for(main(), 20))
    assert thread.is_alive(), "it hangs still"
    monkeypatch.undo()
    gate.set()
    thread.join(20)
    assert not thread.is_alive()


def test_a_dropped_stream_frees_the_engine_within_one_token(engine: Any) -> None:
    """Counted in tokens, by the trace: after the consumer goes, at most one more step runs."""
    long = replace(GREEDY, max_tokens=900)

    async def body(async_engine: Any) -> int:
        stream = async_engine.generate(fan_out([([2, 3], long)]))
        async for _, output, _ in stream:
            if len(output.token_ids) == 5:
                break
        # Hold the engine's thread between steps, so that what follows is not a race.
        gate = threading.Event()
        real = engine.schedule
        engine.schedule = lambda: (gate.wait(10), real())[1]
        await asyncio.sleep(0.05)
        await stream.aclose()
        before = len(engine.trace.records())
        gate.set()
        del engine.schedule
        while engine.has_unfinished():
            await asyncio.sleep(0.001)
        later = engine.trace.records()[before:]
        return sum(bool(record.scheduled) for record in later)

    assert run_async(engine, body) <= 1


def test_event_loop_runs_while_the_engine_steps(engine: Any) -> None:
    """The loop goes on turning inside one long step; nothing here depends on how fast."""
    turns = 0

    async def body(async_engine: Any) -> None:
        nonlocal turns
        real = engine.forward
        engine.forward = lambda *a: (time.sleep(0.3), real(*a))[1]
        task = asyncio.ensure_future(collect(async_engine, [2], replace(GREEDY, max_tokens=1)))
        while not task.done():
            turns += 1
            await asyncio.sleep(0.001)
        del engine.forward
        await task

    run_async(engine, body)
    assert turns > 10


def test_stop_string_ends_the_engines_work() -> None:
    """The output processor finds it, the engine is told, tokens that still arrive are dropped."""
    engine = engine_of(2, "smollm2-135m")
    prompt = engine.tokenizer.encode("The capital of France is")
    params = SamplingParams(temperature=0.0, max_tokens=500, stop=("answer",))

    async def body(async_engine: Any) -> tuple[str, int, str | None]:
        text, last = "", None
        async for _, output, delta in async_engine.generate(fan_out([(prompt, params)])):
            text, last = text + delta.text, output
        while engine.has_unfinished():
            await asyncio.sleep(0.001)
        return text, len(last.token_ids), last.finish_reason

    text, count, reason = run_async(engine, body)
    assert reason == "stop" and "answer" not in text and count < 50
    [whole] = engine.generate([prompt], params, progress=False)
    assert (whole.text, whole.num_completion_tokens) == (text, count)
