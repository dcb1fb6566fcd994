"""The trace: bounded, whole even when a step fails, safe to read while the engine writes."""

import json
import random
import threading
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from common.http.trace_routes import add_trace_routes
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.page.engine_page import random_trace
from common.testing.parts import PARTS, engine_of
from common.trace import FEW, EngineState, StepRecord, Trace, phase, to_perfetto


def run_steps(trace: Trace, count: int) -> None:
    for i in range(count):
        with trace.step():
            with trace.phase("schedule"):
                trace.scheduled(f"request-{i}", i + 1)
            with trace.phase("forward"):
                pass


def test_ring_keeps_the_last_steps() -> None:
    trace = Trace(capacity=5)
    run_steps(trace, 12)
    assert [record.step for record in trace.records()] == [7, 8, 9, 10, 11]
    assert trace.records()[0].scheduled == {"request-7": 8}


def test_phases_are_in_order_within_their_step() -> None:
    trace = Trace()
    run_steps(trace, 3)
    end_of_last = 0.0
    for record in trace.records():
        assert [name for name, _, _ in record.phases] == ["schedule", "forward"]
        times = [record.begin, *(t for _, *span in record.phases for t in span), record.end]
        assert times == sorted(times), "a phase overlaps another or leaves its step"
        assert record.begin >= end_of_last
        end_of_last = record.end
        assert set(record.phase_seconds()) == {"schedule", "forward"}
        assert sum(record.phase_seconds().values()) <= record.end - record.begin


def test_phases_nest() -> None:
    trace = Trace()
    with trace.step(), trace.phase("outer"), trace.phase("inner"):
        pass
    spans = {name: (begin, end) for name, begin, end in trace.records()[0].phases}
    assert spans["outer"][0] <= spans["inner"][0] <= spans["inner"][1] <= spans["outer"][1]


def test_a_step_that_raises_is_kept_with_its_open_phase() -> None:
    trace = Trace()
    with pytest.raises(RuntimeError), trace.step(), trace.phase("forward"):
        trace.scheduled("a", 3)
        raise RuntimeError("out of memory")
    [record] = trace.records()
    assert record.scheduled == {"a": 3}
    [(name, begin, end)] = record.phases
    assert (name, record.begin <= begin <= end <= record.end) == ("forward", True)
    run_steps(trace, 1)  # and the next step is a new one
    assert [r.step for r in trace.records()] == [0, 1]
    assert trace.records()[1].scheduled == {"request-0": 1}


def test_what_happens_between_steps_is_in_the_next() -> None:
    trace = Trace()
    with trace.phase("forward"):
        trace.arrived("a", 1)
        trace.finished("a", "abort")
    run_steps(trace, 1)
    trace.finished("b", "abort")
    [record] = trace.records()
    assert (record.arrived, record.finished) == ({"a": 1}, {"a": "abort"})
    assert [name for name, _, _ in record.phases] == ["schedule", "forward"], "none outside a step"
    run_steps(trace, 1)
    assert trace.records()[1].finished == {"b": "abort"}


def run_two_requests(trace: Trace) -> None:
    """a runs, b joins and is preempted for a, comes back, and both end."""
    trace.arrived("a", 3)
    trace.arrived("b", 2)
    with trace.step():
        trace.allocated("a", [0])
        trace.scheduled("a", 3)
    with trace.step():
        trace.allocated("b", [1])
        trace.scheduled("b", 2)
    with trace.step():
        trace.preempted("b")
        trace.freed("b", [1])
        trace.scheduled("a", 1)
        trace.finished("a", "length")
        trace.freed("a", [0])
    trace.arrived("c", 1)
    with trace.step():
        trace.scheduled("a", 1)  # computed in vain, as in a static batch
        trace.allocated("b", [0])
        trace.scheduled("b", 3)
    with trace.step():
        trace.finished("b", "abort")
        trace.freed("b", [0])


EXPECTED = [
    ({"b": 0}, {"a": 3}, {"a": [0]}),
    ({}, {"a": 3, "b": 2}, {"a": [0], "b": [1]}),
    ({"b": 0}, {}, {}),
    ({"c": 0}, {"b": 3}, {"b": [0]}),
    ({"c": 0}, {}, {}),
]


@pytest.mark.parametrize("capacity", [1, 2, 4, 100])
def test_states_are_the_sum_of_the_changes(capacity: int, tmp_path: Path) -> None:
    """Also when the steps that made them are no longer kept, and after a round through a file."""
    trace = Trace(capacity, num_blocks=2, block_size=16)
    with trace.follow() as records:
        run_two_requests(trace)
        after = trace.catch_up(records)
        assert not records and after.step == 4
    trace.save(tmp_path / "trace.jsonl")
    for kept in (trace, Trace.load(tmp_path / "trace.jsonl")):
        states = [(s.waiting | {}, s.running | {}, dict(s.blocks)) for _, s in kept.states()]
        assert states == EXPECTED[-capacity:]
    last = EngineState(2, 16, 4, waiting={"c": 0})
    assert after == last
    assert [state for _, state in trace.states()][-1] == last


def test_blocks_taken_and_given_up_in_one_step_are_counted() -> None:
    """A last token may take a block that is free again before the step ends; and a sequence may
    give up its blocks and take some of them again."""
    state = EngineState(num_blocks=8)

    def step(allocated: list[int], freed: list[int]) -> dict[str, list[int]]:
        state.apply(StepRecord(0, 0.0, allocated={"a": allocated}, freed={"a": freed}))
        return state.blocks

    assert step([3], [3]) == {}
    assert step([1, 2], []) == {"a": [1, 2]}
    assert step([5, 1], [2, 1]) == {"a": [5, 1]}
    assert step([4], [4, 1, 5]) == {}


def test_tokens_that_were_found_count_as_there() -> None:
    """They are no tokens run, but their blocks are full; after a preemption it is looked anew."""
    state = EngineState(num_blocks=8, block_size=4)

    def step(**changes: dict) -> tuple[dict, dict, dict]:
        state.apply(StepRecord(0, 0.0, **changes))
        return state.waiting, state.running, state.cached

    assert step(arrived={"a": 11, "b": 5}, cached={"a": 8}) == ({"b": 0}, {"a": 8}, {"a": 8})
    assert step(scheduled={"a": 3}) == ({"b": 0}, {"a": 11}, {"a": 8})
    assert step(preempted=["a"]) == ({"a": 0, "b": 0}, {}, {})
    found = {"a": 4, "b": 0}
    assert step(cached=found, scheduled={"a": 7}) == ({}, {"a": 11, "b": 0}, found)
    copy = state.copy()
    assert step(finished={"a": "stop"}) == ({}, {"b": 0}, {"b": 0})
    assert copy.cached == found, "a copy changes by itself"
    assert step(cached={"a": 4}) == ({}, {"b": 0}, {"b": 0}), "one that has ended joins no more"


def test_drafts_that_did_not_stay_do_not_count() -> None:
    state = EngineState()
    state.apply(StepRecord(0, 0.0, arrived={"a": 5}, scheduled={"a": 5}))
    state.apply(StepRecord(1, 0.0, scheduled={"a": 4}, rejected={"a": 3}))
    assert state.running == {"a": 6}
    state.apply(StepRecord(2, 0.0, scheduled={"a": 4}, rejected={"a": 1}, finished={"a": "stop"}))
    assert state.running == {}


def test_a_trace_of_before_there_were_caches_is_read(tmp_path: Path) -> None:
    trace = Trace()
    run_steps(trace, 2)
    lines = [json.loads(line) for line in trace.lines()]
    for line in lines:
        del line["cached"]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Trace.load(tmp_path / "old.jsonl").records() == trace.records()


def test_decorated_methods_are_phases_under_their_name() -> None:
    class Engine:
        trace = Trace()

        @phase
        def forward(self, x: int, *, y: int) -> int:
            """Its words stay."""
            return x + y

    engine = Engine()
    with engine.trace.step():
        assert engine.forward(1, y=2) == 3
    assert [name for name, _, _ in engine.trace.records()[0].phases] == ["forward"]
    assert Engine.forward.__doc__ == "Its words stay."


def test_a_follower_that_falls_behind_loses_the_oldest() -> None:
    trace = Trace()
    with trace.follow(backlog=4) as records:
        run_steps(trace, 10)
        assert [record.step for record in records] == [6, 7, 8, 9]
    run_steps(trace, 1)
    assert len(records) == 4, "a follower that has left gets nothing more"


def test_one_follower_leaving_takes_no_other_with_it() -> None:
    """Two queues with the same content are equal, which is not to say the same."""
    trace = Trace()
    with trace.follow() as stays:
        with trace.follow():
            pass
        run_steps(trace, 2)
        with trace.follow() as late:
            run_steps(trace, 1)
        run_steps(trace, 1)
        assert [record.step for record in stays] == [0, 1, 2, 3]
        assert [record.step for record in late] == [2]


def test_following_from_another_thread_while_the_engine_writes() -> None:
    """Every record arrives once, in order and whole; readers of the ring never see a torn one."""
    trace = Trace(capacity=16)
    count = 2000
    followed: list[int] = []
    problems: list[str] = []
    ready, done = threading.Event(), threading.Event()

    def follow() -> None:
        with trace.follow(backlog=count) as records:
            ready.set()
            while len(followed) < count and not (done.is_set() and not records):
                if records:
                    record = records.popleft()
                    followed.append(record.step)
                    if record.end < record.begin or len(record.phases) != 2:
                        problems.append(f"step {record.step} is not whole")

    def read() -> None:
        while not done.is_set():
            steps = [record.step for record in trace.records()]
            if steps != list(range(steps[0], steps[0] + len(steps)) if steps else []):
                problems.append(f"not consecutive: {steps}")
            if len(steps) > 16:
                problems.append(f"{len(steps)} records in a ring of 16")
            json.dumps(trace.to_perfetto())

    threads = [threading.Thread(target=target) for target in (follow, read, read)]
    for thread in threads:
        thread.start()
    assert ready.wait(30)
    run_steps(trace, count)
    done.set()
    for thread in threads:
        thread.join(30)
    assert not problems, problems[:3]
    assert followed == list(range(count))


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    trace = Trace()
    run_steps(trace, 3)
    with trace.step():
        trace.scheduled("naïve \u2028 \n 😀", 1)  # names that a line format could trip over
        trace.finished("naïve \u2028 \n 😀", "stop")
    trace.save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl").records() == trace.records()
    assert len((tmp_path / "trace.jsonl").read_text().split("\n")) == 1 + 4 + 1


def replay(trace: Trace, record: StepRecord) -> None:
    """A step in which the same happens."""
    with trace.step() as step:
        vars(step).update(vars(record) | {"step": step.step, "begin": step.begin})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [1, 7, 4096])
def test_the_last_state_is_the_sum_whenever_somebody_asks(seed: int, capacity: int) -> None:
    """At once, after a few steps, and after more than the ring keeps; asking changes nothing."""
    rng = random.Random(f"{seed} {capacity}")
    source = random_trace(seed, num_steps=300)
    trace = Trace(capacity, num_blocks=24, block_size=4)
    expected = EngineState(num_blocks=24, block_size=4)
    with trace.follow() as records:
        for record in source.records():
            replay(trace, record)
            expected.apply(trace.last_record)
            if rng.random() < 0.05:
                for _ in range(2):
                    assert trace.catch_up(records) == expected and not records
        assert trace.catch_up(records) == expected
    assert expected.waiting and [state for _, state in trace.states()][-1] == expected


def test_who_asks_while_the_engine_writes_loses_no_step() -> None:
    """The state and what comes after it fit together, though steps come in while it is added up."""
    source, trace = random_trace(5, num_steps=2000).records(), Trace(64, num_blocks=24)
    done = threading.Event()

    def write() -> None:
        for record in source:
            replay(trace, record)
        done.set()

    asked = 0
    with trace.follow(backlog=len(source)) as records:
        writer = threading.Thread(target=write)
        writer.start()
        while not done.is_set():
            state = trace.catch_up(records)
            steps = [record.step for record in list(records)]
            assert steps == list(range(state.step + 1, state.step + 1 + len(steps)))
            asked += 1
        writer.join(30)
        rest = list(records)
        for record in rest:
            state.apply(record)
        assert asked > 1 and state == trace.catch_up(records)
    expected = EngineState(num_blocks=24)
    for record in source:
        expected.apply(record)
    assert vars(state) == vars(expected)


def test_the_engine_does_not_wait_for_the_ring_to_be_added_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the steps that nobody has asked about, all but a few are added up without the lock; a step
    itself adds up one at most, the one that leaves the ring."""
    trace = Trace(capacity=100)
    held: list[bool] = []
    apply = EngineState.apply

    def counted(state: EngineState, record: StepRecord) -> None:
        held.append(trace._lock.locked())
        apply(state, record)

    monkeypatch.setattr(EngineState, "apply", counted)
    run_steps(trace, 100)
    assert not held, "while nobody looks and the ring is not full, nothing is added up"
    run_steps(trace, 20)
    assert len(held) == 20
    held.clear()
    with trace.follow() as records:
        assert trace.catch_up(records).step == 119
        assert len(held) == 100 and sum(held) <= FEW
        held.clear()
        trace.catch_up(records)
        assert not held, "each step is added up once"


def test_lines_are_of_one_moment_and_the_engine_goes_on_meanwhile(tmp_path: Path) -> None:
    trace = Trace(capacity=4, num_blocks=2)
    run_two_requests(trace)
    trace.save(tmp_path / "trace.jsonl")
    lines = trace.lines()
    read = [next(lines)]
    run_steps(trace, 10)  # would wait for ever if a reader held the lock, and changes every state
    assert "".join([*read, *lines]) == (tmp_path / "trace.jsonl").read_text()


def test_states_are_copied_whole() -> None:
    """Whoever asked for a state keeps it, whatever the engine does next."""
    trace = Trace(num_blocks=2)
    with trace.follow() as records:
        trace.arrived("a", 3)
        trace.arrived("b", 3)
        with trace.step():
            trace.allocated("a", [0])
            trace.scheduled("a", 3)
        state = trace.catch_up(records)
    before = json.dumps(vars(state))
    with trace.step():
        trace.allocated("a", [1])
        trace.scheduled("a", 1)
        trace.finished("b", "abort")
    assert json.dumps(vars(state)) == before


@pytest.mark.parametrize("count", [0, 5, 200])
def test_the_steps_kept_can_be_downloaded(count: int, tmp_path: Path) -> None:
    trace = Trace(capacity=100)
    run_steps(trace, count)
    app = FastAPI()
    add_trace_routes(app, trace)
    answer = TestClient(app).get("/trace.jsonl")
    assert answer.headers["content-disposition"] == 'attachment; filename="trace.jsonl"'
    trace.save(tmp_path / "trace.jsonl")
    assert answer.content == (tmp_path / "trace.jsonl").read_bytes()
    answer = TestClient(app).get("/trace.perfetto.json")
    assert answer.headers["content-disposition"].endswith('"trace.perfetto.json"')
    assert answer.json() == trace.to_perfetto()


def test_an_empty_trace_is_saved_and_loaded(tmp_path: Path) -> None:
    Trace().save(tmp_path / "trace.jsonl")
    assert Trace.load(tmp_path / "trace.jsonl").records() == []


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "5",
        "null",
        '"text"',
        "[]",
        "{}",
        '{"step": 1, "begin": 0.0}',
        '{"step": 1, "phases": []}',
        '{"step": 1, "begin": 0.0, "phases": [["forward", 1.0]]}',
        '{"step": 1, "begin": 0.0, "phases": [], "surprise": 1}',
        '{"step": 1, "begin": 0.0, "phases": [], ',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    trace = Trace()
    run_steps(trace, 2)
    path = tmp_path / "trace.jsonl"
    trace.save(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl line 4 is not a step record"):
        Trace.load(path)


@pytest.mark.parametrize("text", ["", "x\n", "[]\n", "null\n", '{"surprise": 1}\n'])
def test_a_bad_first_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"trace\.jsonl line 1 is not an engine state"):
        Trace.load(path)


def test_perfetto_events_are_complete_and_in_microseconds() -> None:
    record = StepRecord(7, begin=2.0, end=2.5, scheduled={"a": 3}, finished={"a": "stop"})
    record.phases = [("schedule", 2.0, 2.125), ("forward", 2.125, 2.5)]
    record.device = [(6, 1.5, 2.25)]
    trace = json.loads(json.dumps(to_perfetto([record]), allow_nan=False))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    tracks = {event["tid"]: event["args"]["name"] for event in names}
    assert tracks == {1: "steps", 2: "phases", 3: "device"}
    assert [(e["name"], e["tid"], e["ts"], e["dur"]) for e in spans] == [
        ("step 7", 1, 2e6, 0.5e6),
        ("schedule", 2, 2e6, 0.125e6),
        ("forward", 2, 2.125e6, 0.375e6),
        ("step 6", 3, 1.5e6, 0.75e6),
    ]
    assert spans[0]["args"] == {"scheduled": {"a": 3}, "finished": {"a": "stop"}}


@pytest.mark.parametrize("part", [part for part in PARTS if part > 2])
def test_the_state_is_the_engines(part: int) -> None:
    """After every step of a random schedule in a small pool: who waits, and how many blocks are
    used. Requests end at once, are aborted, and where the part preempts, are preempted. Half of them
    begin alike, and where the part has a prefix cache they share blocks."""
    engine = engine_of(part, "random:tiny-llama", threads=1, num_blocks=7, max_num_seqs=6)
    trace, rng = engine.trace, random.Random(part)
    preempted = shared = 0
    with trace.follow() as records:
        state = trace.catch_up(records)
        for number in range(60):
            length = rng.choice([1, 1, 30, 50])
            params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
            token = rng.randrange(2, 500) if number % 2 else 7
            engine.add_request(Request(f"r{number}", [token] * rng.randint(1, 40), params))
            for _ in range(rng.choice([1, 5, 15])):
                if rng.random() < 0.05:
                    engine.abort(f"r{rng.randrange(number + 1)}")
                if engine.has_unfinished():
                    engine.step()
                    state.apply(records.pop())
                    preempted += len(trace.last_record.preempted)
                    stats = engine.stats()
                    used = [block for blocks in state.blocks.values() for block in blocks]
                    assert len(set(used)) == stats["num_used_blocks"]
                    shared += len(used) - len(set(used))
                    assert len(state.waiting) == stats["num_waiting"]
                    for name in state.cached:
                        computed = engine.sequences[name].num_computed_tokens
                        assert state.running[name] == computed, "found and run"
        while engine.has_unfinished():
            engine.step()
            state.apply(records.pop())
            preempted += len(trace.last_record.preempted)
    assert state.running == state.waiting == state.blocks == {}
    assert state.step > 200 and not records and (part == 3 or preempted > 0)
    assert (shared > 0) == (part > 6)
