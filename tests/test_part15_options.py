"""Part 15's one configuration space: every switch turns something off, presets fill in what is not given."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from part15.compatibility import check_machine
from part15.config import EngineConfig
from part15.presets import PRESETS

from common.http.run import ServerConfig
from common.options import parse
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import make_engine
from common.testing.schedules import Drive, Event

LLAMA = "random:tiny-llama"
SMALL = {"block_size": 4, "num_blocks": 17, "max_num_seqs": 8, "max_num_batched_tokens": 20}
ROOMY = {"block_size": 4, "num_blocks": 200, "max_num_seqs": 16}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
Making = Callable[..., Any]


@pytest.fixture
def making() -> Iterator[Making]:
    """Makes engines, and ends them."""
    engines: list[Any] = []

    def make(**flags: Any) -> Any:
        engines.append(make_engine(15, flags.pop("model", LLAMA), threads=1, **flags))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(2, 512) for _ in range(length)]


def watch(engine: Any) -> list[dict[str, tuple[int, int]]]:
    """For each step, of each sequence: (new tokens, tokens that it had not computed)."""
    steps: list[dict[str, tuple[int, int]]] = []
    schedule = engine.scheduler.schedule

    def watched() -> Any:
        output = schedule()
        steps.append(
            {
                s.request_id: (count, s.num_total_tokens - s.num_computed_tokens)
                for s, count in output.num_new_tokens.items()
            }
        )
        return output

    engine.scheduler.schedule = watched
    return steps


def crowd(seed: int) -> list[Event]:
    generator = random.Random(seed)
    first = [Event(number, 24, None, None, 0) for number in (8, 7, 6)]
    return first + [
        Event(
            generator.randrange(12),
            generator.randint(1, 24),
            None,
            generator.choice((None, None, generator.randrange(i + 3))),
            generator.randrange(6),
        )
        for i in range(8)
    ]


# Switches.


@pytest.mark.parametrize(("flags", "most"), [({}, 2), ({"async_scheduling": False}, 1)])
def test_no_second_step_is_in_flight(flags: dict[str, Any], most: int, making: Making) -> None:
    engine = making(**SMALL, **flags)
    seen: list[int] = []
    wait = engine.wait
    engine.wait = lambda pending: (seen.append(len(engine.in_flight) + 1), wait(pending))[1]
    Drive(engine, LLAMA).run(crowd(1))
    assert max(seen) == most
    assert engine.config.async_scheduling is (most == 2)


def test_asynchronous_steps_are_on_where_nothing_forbids_it(making: Making) -> None:
    assert EngineConfig().async_scheduling is None
    assert making(**SMALL, speculative="ngram").config.async_scheduling is False


@pytest.mark.parametrize("is_on", [True, False])
def test_whole_prompts_run_in_steps_of_their_own(is_on: bool, making: Making) -> None:
    """With slices some steps mix them with decodes, and cut prompts; without, none does."""
    engine = making(**ROOMY, max_num_batched_tokens=20, enable_chunked_prefill=is_on)
    steps = watch(engine)
    params = GREEDY
    for i, length in enumerate((30, 9, 9, 50, 3)):
        engine.add_request(Request(f"r{i}", prompt(length, i), params))
        for _ in range(2):
            engine.step()
    while engine.has_unfinished():
        engine.step()
    mixed = [s for s in steps if len({left > 1 for _, left in s.values()}) == 2]
    sliced = [s for s in steps if any(count < left for count, left in s.values())]
    over = [s for s in steps if sum(count for count, _ in s.values()) > 20]
    assert bool(mixed) is bool(sliced) is is_on
    assert bool(over) is not is_on, "two prompts are longer than the budget"
    assert all(len(step) == 1 for step in over), "which nothing shares"


@pytest.mark.parametrize("offload", ["off", "both"])
@pytest.mark.parametrize("budget", [1, 20, 2048])
@pytest.mark.parametrize("seed", range(2))
def test_whole_prompts_of_any_length(offload: str, budget: int, seed: int, making: Making) -> None:
    flags = SMALL | {"max_num_batched_tokens": budget, "offload": offload}
    engine = making(enable_chunked_prefill=False, **flags)
    if offload != "off":
        engine.connector.rates.swap_pays = lambda num_blocks, num_tokens: True
    steps = watch(engine)
    Drive(engine, LLAMA).run(crowd(seed))
    assert engine.stats()["num_preemptions"] > 0
    assert not [s for s in steps if any(count < left for count, left in s.values())]


def test_a_whole_prompt_fits_into_the_buffers_however_small_the_budget(making: Making) -> None:
    """Also one that is preempted when it is as long as the context."""
    engine = making(
        block_size=16, num_blocks=64, max_num_batched_tokens=1, enable_chunked_prefill=False
    )
    assert engine.max_model_len == 1024
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    [whole] = engine.generate([prompt(1020)], params, progress=False)
    [sliced] = making(block_size=16, num_blocks=64).generate([prompt(1020)], params, progress=False)
    assert whole.token_ids == sliced.token_ids


@pytest.mark.parametrize("is_on", [True, False])
def test_a_static_batch_begins_and_ends_as_one(is_on: bool, making: Making) -> None:
    """Six requests, more than one step's budget, and three that come while these run."""
    engine = making(**ROOMY, max_num_batched_tokens=20, continuous_batching=is_on)
    scheduler = engine.scheduler
    joined: list[tuple[str, set[str]]] = []  # and who has not ended by then
    start = scheduler.start

    def watched(*arguments: Any) -> None:
        held = {s.request_id for s in [*scheduler.running, *scheduler.ending]}
        joined.append((scheduler.waiting[0].request_id, held))
        start(*arguments)

    scheduler.start = watched
    for i in range(6):
        params = SamplingParams(temperature=0.0, max_tokens=3 + 4 * i, ignore_eos=True)
        engine.add_request(Request(f"early{i}", prompt(15, i), params))
    for _ in range(9):
        engine.step()
    for i in range(3):
        engine.add_request(Request(f"late{i}", prompt(9, i), GREEDY))
    while engine.has_unfinished():
        engine.step()
    assert [name for name, _ in joined] == [f"early{i}" for i in range(6)] + [
        f"late{i}" for i in range(3)
    ]
    found = {name for _, held in joined[6:] for name in held if name.startswith("early")}
    assert bool(found) is is_on


@pytest.mark.parametrize("seed", range(3))
def test_static_batches_give_the_same_tokens(seed: int, making: Making) -> None:
    engine = making(continuous_batching=False, **SMALL)
    Drive(engine, LLAMA).run(crowd(seed))
    assert engine.stats()["num_preemptions"] > 0


# Presets.


def parsed(*words: str) -> EngineConfig:
    engine, _ = parse([EngineConfig, ServerConfig], list(words), prog="prog")
    return engine


def test_what_is_given_goes_before_the_preset_and_that_before_the_default() -> None:
    config = parsed("--preset", "long-documents", "--max-num-seqs", "7", "--device", "cpu")
    assert (config.max_num_seqs, config.speculative) == (7, "ngram")
    assert config.prefix_cache == EngineConfig().prefix_cache
    off = parsed("--preset", "long-documents", "--speculative", "off", "--device", "cpu")
    assert (off.speculative, off.max_num_seqs) == ("off", 4)


def test_a_value_whose_company_is_sent_away_goes_with_it() -> None:
    """Given explicitly, it is refused as ever."""
    words = ["--preset=long-documents", "--device=cpu", "--no-enable-chunked-prefill"]
    assert parsed(*words).long_prefill_threshold is None
    with pytest.raises(SystemExit):
        parsed(*words, "--long-prefill-threshold", "256")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_on_both_kinds_of_machine(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = PRESETS[name]
    for num_gpus, values in ((0, preset.on_cpu), (8, preset.on_gpu)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda n=num_gpus: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=num_gpus: n)
        engine, server = parse([EngineConfig, ServerConfig], [f"--preset={name}"], prog="prog")
        found = vars(server) | vars(engine)
        assert {field: found[field] for field in values} == values
        assert found["model"] == values.get("model", "smollm2-135m")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_on_a_cpu(name: str, making: Making) -> None:
    """With a tiny model, and on one rank: processes are other tests' matter."""
    values = PRESETS[name].on_cpu | {"tensor_parallel_size": 1}
    model = values.pop("model", LLAMA)
    engine = making(model=model, **values)
    plain = making(model=model)
    prompts = [prompt(length, length) for length in (3, 20, 40)]
    found = engine.generate(prompts, GREEDY, progress=False)
    assert [len(c.token_ids) for c in found] == [12] * 3
    if not values.keys() & {"quantization", "kv_cache_dtype"}:
        expected = plain.generate(prompts, GREEDY, progress=False)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_too_few_gpus_are_refused_before_a_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = parsed("--preset", "api-70b")
    message = "tensor_parallel_size is 4: torch sees 2 GPUs from cuda:0 on"
    with pytest.raises(ValueError, match=message):
        check_machine(config)
    with pytest.raises(ValueError, match=message):
        make_engine(15, "no/such-model", tensor_parallel_size=4)
    check_machine(parsed("--preset", "api-70b", "--tp", "2"))


def test_the_settings_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "chat", "--device", "cpu", "--api-key", "secret", "--print-config"]
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    assert caught.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    known = PRESETS["chat"].on_cpu | {"device": "cpu", "dtype": "float32", "block_size": 16}
    known |= {"api_key": "***", "async_scheduling": True, "max_num_batched_tokens": 256}
    assert {name: printed[name] for name in known} == known
    assert "kv_secret" not in printed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--preset", "fast"], "invalid choice: 'fast'"),
        (["--preset", "chat", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (
            ["--preset", "long-documents", "--device", "cpu", "--async-scheduling"],
            "one step is in flight (--preset long-documents has speculative ngram)",
        ),
        (
            ["--async-scheduling", "--speculative=self"],
            "--async-scheduling is on: speculative self",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*words, "--print-config")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and line in error and error.count("\n") == 1


def test_help_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, preset in PRESETS.items():
        assert f"{name}: {preset.about}" in text
    assert "--no-async-scheduling" in text and "--no-enable-chunked-prefill" in text
