"""Part 15's techniques, two by two: each pair gives the right tokens while requests crowd and abort each
other, or is refused in the words of the README's table.

The right tokens are those of part 01, which the oracle has checked; of rounded weights those that part 01
gives with them in float32. Where inputs or the cache are rounded as well, each greedy token must lie near the
largest logit that the reference operations give at its place, without any technique.
"""

import atexit
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from part15.quantized_layers import QuantizedSource, Recipe
from safetensors.torch import save_file

from common.models.checkpoint import resolve
from common.models.weight_slices import open_weights
from common.sampling import SamplingParams
from common.testing.compositions import (
    FOLDER,
    LLAMA,
    NAMED,
    TECHNIQUES,
    TRIPLES,
    Technique,
    flags_of,
    pairs,
    refusal,
    written,
)
from common.testing.parts import folder_of, make_engine, module_of
from common.testing.rank_threads import engine_in_threads
from common.testing.schedules import Drive, Event, Known, known_requests
from common.testing.transfer_pair import SECRET, pair

PART = 15
SMALL = {"block_size": 4, "num_blocks": 17, "max_num_seqs": 8, "max_num_batched_tokens": 20}
SPACIOUS = {"block_size": 16, "num_blocks": 80, "max_num_seqs": 16, "kernels": "reference"}
ROUNDING = ("quantization", "activations", "kv_cache_dtype")
SCORING = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
NEAR = 0.3  # of a logit; two tokens that are not likely lie some 3 apart
CHOICES = (6, 7)  # requests that are completed three times: one greedy, one seeded
Techniques = Sequence[Technique]
TOKENIZER: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def tokenizer(tokenizer_json: str) -> None:
    TOKENIZER.append(tokenizer_json)


# What is right.


@cache
def rounded_folder(model: str, format_name: str) -> str:
    """A folder with what a format makes of a model's weights, in float32."""
    folder, recipe = resolve(model), Recipe.of(format_name, "auto", "off")
    source = QuantizedSource(open_weights(folder, quantized=True), folder, recipe)
    tensors = {}
    for name in sorted(source.names):
        shape = tuple(source.source.shapes[name])
        weight = source.quantized(name, shape) if len(shape) == 2 else None
        tensors[name] = source.read(name, shape) if weight is None else weight.dequantize()
    target = Path(tempfile.mkdtemp(prefix="rounded-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, target / "model.safetensors")
    shutil.copy(folder / "config.json", target)
    (target / "tokenizer.json").write_text(TOKENIZER[0])
    return str(target)


@cache
def reference(model: str, **rounding: str) -> Any:
    """An engine without any technique."""
    return make_engine(PART, model, threads=1, prefix_cache="off", **SPACIOUS, **rounding)


@cache
def expected(model: str, is_exact: bool, **rounding: str) -> list[Known]:
    """The known requests, and behind them three completions each of some."""
    source = (
        rounded_folder(model, rounding["quantization"]) if "quantization" in rounding else model
    )
    known, engine = known_requests(source if is_exact else model), reference(model, **rounding)
    prompts, params = [k.prompt for k in known], [k.params for k in known]
    outputs = [c.token_ids for c in engine.generate(prompts, params, progress=False)]
    if is_exact:
        assert outputs == [k.output for k in known]
    found = [replace(k, output=output) for k, output in zip(known, outputs, strict=True)]
    for i in CHOICES:
        several = engine.generate([prompts[i]], replace(params[i], n=3), progress=False)
        found += [replace(known[i], output=c.token_ids, choice=c.index) for c in several]
    return found


class Crowd(Drive):
    """Large numbers are written, after each step, where nothing lies that may be read."""

    def steps(self, count: int) -> None:
        while count > 0 and self.engine.has_unfinished():
            super().steps(1)
            if hasattr(self.engine, "runner"):  # a pair of engines does it itself
                self.poison()
            count -= 1

    def poison(self) -> None:
        """On the device, in its order: a step in flight may yet read what is free for the next."""
        kv, cached = self.engine.kv, getattr(self.engine.scheduler.cache, "key_of", {})
        free = [block for block in kv.pool.free_blocks if block not in cached]

        def write() -> None:
            kv.data[free] = 1e4 if kv.data.is_floating_point() else 127
            if kv.draft_data is not None:
                kv.draft_data[free] = 1e4

        self.engine.runner.queue.aside(write)

    def check_scores(self, tolerance: float) -> None:
        """Prompts are scored as the reference scores them."""
        ended = [name for name, reason in self.reasons.items() if reason != "abort"]
        prompts = [self.requests[name].prompt for name in ended]
        for name, scored in zip(
            ended, self.reference.generate(prompts, SCORING, False), strict=True
        ):
            for one, other in zip(self.scores[name], scored.prompt_logprobs, strict=True):
                assert one.token_id == other.token_id, (name, one, other)
                assert abs(one.logprob - other.logprob) < tolerance, (name, one, other)
        assert any(map(self.scores.get, ended))


class Nearly(Crowd):
    """What is greedy must be near the largest logit of the reference operations at its place. A sum in
    another order may round another way, and then another token is drawn."""

    def check(self) -> None:
        assert set(self.reasons) == set(self.expected), "requests without an end"
        assert self.engine.stats()["num_used_blocks"] == 0
        greedy = [name for name, known in self.requests.items() if known.params.temperature == 0]
        texts = [self.requests[name].prompt + self.outputs[name] for name in greedy]
        for name, scored in zip(
            greedy, self.reference.generate(texts, SCORING, False), strict=True
        ):
            for place in scored.prompt_logprobs[len(self.requests[name].prompt) - 1 :]:
                gap = place.top[0][1] - place.logprob
                assert gap < NEAR, f"{name}: {place.token_id} lies {gap:.2f} below the first"


def crowd(seed: str, has_choices: bool) -> list[Event]:
    """Three requests that all join and then outgrow the pool; others that come, stop and are aborted; and a
    prompt that comes back when its blocks are gone."""
    generator = random.Random(seed)
    numbers = [10, *(generator.randrange(12) for _ in range(3)), 11, 10]
    if has_choices:
        numbers[1:1] = range(12, 18)
    others = [
        Event(
            number,
            generator.randint(1, 16),
            generator.choice((None, None, generator.randrange(16))),
            generator.choice((None, None, generator.randrange(3, i + 4))),
            generator.randrange(6),
        )
        for i, number in enumerate(numbers)
    ]
    return [Event(number, 24, None, None, 0) for number in (8, 7, 6)] + others


# Engines.


def model_of(techniques: Techniques) -> str:
    """The mixture of experts, where one of them needs it."""
    return next((t.model for t in techniques if t.model != LLAMA), LLAMA)


def flags_in(folder: Path, techniques: Techniques) -> dict[str, Any]:
    flags = flags_of(*techniques)
    return {name: str(folder) if value == FOLDER else value for name, value in flags.items()}


def engine_with(folder: Path, techniques: Techniques) -> tuple[Any, Callable[[], None]]:
    """An engine, or a pair of them, and what ends it."""
    flags, model = SMALL | flags_in(folder, techniques), model_of(techniques)
    if flags.pop("role", None):
        flags |= {"model": model, "num_blocks": 24}
        both = pair(flags, flags, part=PART)
        return both, both.close
    if (size := flags.pop("tensor_parallel_size", 1)) == 1:
        engine = make_engine(PART, model, threads=1, **flags)
        return engine, engine.shutdown
    engine, others = engine_in_threads(PART, model, size, **flags)

    def end() -> None:
        engine.shutdown()
        assert not others.errors, others.errors

    return engine, end


def decide(engine: Any) -> None:
    """What an engine decides by the clock is decided for the technique."""
    if hasattr(engine.speculator, "lengths"):
        engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: limits
    if hasattr(engine.connector, "rates"):
        engine.connector.rates.swap_pays = lambda num_blocks, num_tokens: True


def run(folder: Path, *techniques: Technique) -> dict[str, Any]:
    """Drive an engine with these techniques through a crowd. Returns its counts."""
    is_exact = all(technique.is_exact for technique in techniques)
    flags = flags_of(*techniques)
    rounding = {name: flags[name] for name in ROUNDING if name in flags}
    known = expected(model_of(techniques), is_exact, **rounding)
    more = {name: value for t in techniques for name, value in t.params.items()}
    has_choices = any(technique.has_choices for technique in techniques)
    engine, end = engine_with(folder, techniques)
    decide(getattr(engine, "decode", engine))
    drive = (Crowd if is_exact else Nearly)(engine, "", known, more)
    drive.reference = reference(model_of(techniques), **rounding)
    drive.run(crowd(named(techniques), has_choices))
    if "prompt_logprobs" in more:
        drive.check_scores(1e-3 if is_exact else NEAR)
    counts = engine.stats() | getattr(engine, "counts", dict)()
    if hasattr(engine, "settle"):
        engine.settle()
    end()
    return counts


def named(techniques: Techniques) -> str:
    return " + ".join(technique.name for technique in techniques)


# Pairs that the short form leaves out: the hash prefix cache is in every engine that has no other, and
# these have little to do with each other.
SELDOM = {
    "whole prompts",
    "static batches",
    "no prefix cache",
    "int8 weights and inputs",
    "expert parallel",
    "n completions",
    "prompt_logprobs",
}


# The hash prefix cache and captured steps are in every run that does not ask for something else; ranks
# that are processes have tests of their own.
OFTEN = {"hash prefix cache", "captured steps", "expert parallel", "pipeline parallel"}


def marks(a: Technique, b: Technique) -> list[Any]:
    names = {a.name, b.name}
    is_seldom = names <= SELDOM | {"tensor parallel", "int4 weights", "self-speculation"}
    is_seldom = is_seldom or bool(names & OFTEN)
    return [pytest.mark.long] if is_seldom else []


RUNS = [
    pytest.param(pair, id=named(pair), marks=marks(*pair))
    for pair in pairs()
    if refusal(*pair) is None
]
REFUSED = [pair for pair in pairs() if refusal(*pair) is not None]


@pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda technique: technique.name)
def test_one_alone_does_something(technique: Technique, tmp_path: Path) -> None:
    counts = run(tmp_path, technique)
    assert technique.counter is None or counts[technique.counter] > 0, counts
    assert "role" in technique.flags or counts["num_preemptions"] > 0, "nothing was crowded"


@pytest.mark.parametrize("techniques", RUNS)
def test_two_together_give_the_right_tokens(techniques: Techniques, tmp_path: Path) -> None:
    run(tmp_path, *techniques)


@pytest.mark.parametrize("names", TRIPLES, ids=" + ".join)
def test_three_that_broke_other_engines(names: tuple[str, ...], tmp_path: Path) -> None:
    techniques = [NAMED[name] for name in names]
    assert refusal(*techniques) is None
    run(tmp_path, *techniques)


@pytest.mark.parametrize("techniques", REFUSED, ids=named)
def test_what_is_refused_says_why(techniques: Techniques, tmp_path: Path) -> None:
    """Before a model is looked for."""
    flags = flags_in(tmp_path, techniques)
    if "role" in flags:
        flags["kv_secret"] = SECRET
    with pytest.raises(ValueError) as caught:
        module_of(PART, "config").EngineConfig(model="no/such-model", **flags)
    assert str(caught.value) == refusal(*techniques).format(**flags)


def test_the_readme_has_the_table_that_was_tested() -> None:
    readme = (folder_of(PART) / "README.md").read_text()
    assert readme == written(readme), "run `python -m common.testing.compositions`"


def test_a_wrong_token_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 30 is another: both kinds of comparison must fail."""
    runner = module_of(PART, "model_runner").ModelRunner
    sample, calls = runner.sample, []

    def spoilt(*arguments: Any) -> Any:
        sampled = sample(*arguments)
        calls.append(1)
        if len(calls) % 10 == 0:
            sampled.token_ids[:] = (sampled.token_ids + 1) % 512
        return sampled

    expected(LLAMA, True), expected(LLAMA, False, kv_cache_dtype="int8")
    monkeypatch.setattr(runner, "sample", spoilt)
    for name in ("swap", "int8 keys and values"):
        with pytest.raises(AssertionError):
            run(tmp_path, NAMED[name])


def test_what_is_read_after_it_was_freed_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that are taken from the cache without an owner are poisoned."""
    monkeypatch.setattr(module_of(PART, "kv_cache").BlockPool, "share", lambda self, blocks: None)
    with pytest.raises(AssertionError):
        run(tmp_path, NAMED["hash prefix cache"])
