"""Structured output: outputs follow their grammars, whatever else the engine does meanwhile."""

import asyncio
import ctypes
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.models.tokenizer import Tokenizer
from common.requests import Request
from common.sampling import SamplingParams
from common.structured import compiler as compilers
from common.structured.compiler import GrammarCompiler, GrammarsBusy
from common.structured.grammar import MAX_DEPTH, MAX_GRAMMAR, Grammar
from common.structured.matcher import Matcher, num_words
from common.testing.parts import PARTS, make_engine
from common.testing.structured import EOS, write_model

PART = PARTS[-1]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "yes"]}, "maxItems": 3},
        "nothing": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "nothing"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar.of_schema(PERSON),
    Grammar("regex", r"[a-c]{3,9}(-[0-9]{2}){1,4}"),
    Grammar.of_choices(["yes", "yes, but 12 times", 'no "é" \n <|im_end|>']),
    Grammar("grammar", 'root ::= "(" root ")" | [x-z]+\n'),
    Grammar("grammar", 'start: "a" num ("," num)*\nnum: /[0-9]{1,3}/'),
    Grammar.of_schema(
        {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 9}
    ),
]
PATTERNS = {1: r"[a-c]{3,9}(-[0-9]{2}){1,4}", 4: r"a[0-9]{1,3}(,[0-9]{1,3})*"}
KINDS = [
    SamplingParams(temperature=0.0, max_tokens=64),
    SamplingParams(seed=5, temperature=1.0, max_tokens=64),
    SamplingParams(seed=2**63, temperature=1.4, top_k=40, max_tokens=64, logprobs=2),
    SamplingParams(seed=9, presence_penalty=0.5, frequency_penalty=0.4, max_tokens=64),
    SamplingParams(seed=4, max_tokens=64, ignore_eos=True, min_p=0.01),
    SamplingParams(seed=6, max_tokens=64, logit_bias={40: 3.0}, top_p=0.9),
]


@dataclass
class Answer:
    token_ids: list[int]
    reason: str | None = None
    error: str | None = None


def run(engine: Any, requests: list[Request], stagger: int = 0) -> list[Answer]:
    """Run requests side by side, one more every `stagger` steps; all is well after each step."""
    answers = {request.request_id: Answer([]) for request in requests}
    waiting = list(requests)
    while waiting or engine.has_unfinished():
        if waiting:
            engine.add_request(waiting.pop(0))
        for _ in range(stagger if waiting else 1000):
            for output in engine.step():
                answer = answers[output.request_id]
                answer.token_ids += output.token_ids
                answer.reason, answer.error = output.finish_reason, output.error
            engine.check_integrity()
            if not engine.has_unfinished():
                break
    stats = engine.stats()
    assert stats["num_running"] == stats["num_waiting"] == stats["num_used_blocks"] == 0
    return list(answers.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another model with the same tokenizer, which guesses rightly at times."""
    return write_model(tmp_path_factory.mktemp("models") / "drafter", num_hidden_layers=2)


@pytest.fixture(scope="module")
def engine_with(folder: str) -> Iterator[Callable[..., Any]]:
    engines: list[Any] = []

    @cache
    def make(**flags: Any) -> Any:
        engines.append(make_engine(PART, folder, threads=1, **flags))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def engine(engine_with: Callable[..., Any]) -> Any:
    return engine_with()


numbers = itertools.count()


def request(
    prompt: list[int], params: SamplingParams, grammar: Grammar | None, **fields: Any
) -> Request:
    return Request(f"r{next(numbers)}", prompt, params, grammar=grammar, **fields)


def mix() -> list[Request]:
    """Grammars of all kinds and all ways to sample, each beside a request without a grammar."""
    requests = []
    for i, params in enumerate(KINDS):
        for j in range(2):
            grammar = GRAMMARS[(2 * i + j) % len(GRAMMARS)]
            requests.append(request([(7 * i + 3 * k) % 250 for k in range(5 + i)], params, grammar))
        plain = replace(params, max_tokens=30, ignore_eos=True)
        requests.append(request([20 + i, 30, 40 + i], plain, None))
    return requests


def text_of(engine: Any, answer: Answer) -> str:
    return engine.tokenizer.decode([id for id in answer.token_ids if id != EOS], False)


def check(engine: Any, grammar: Grammar | None, answer: Answer) -> None:
    """A finished output is in its language."""
    assert answer.error is None and answer.reason in ("stop", "length")
    if grammar is None or answer.reason == "length":
        return
    text, number = text_of(engine, answer), GRAMMARS.index(grammar)
    if grammar.kind == "json":
        jsonschema.validate(json.loads(text), json.loads(grammar.text))
    elif number in PATTERNS:
        assert re.fullmatch(PATTERNS[number], text)
    elif grammar.kind == "choice":
        assert text in json.loads(grammar.text)
    else:
        depth = text.count("(")
        assert re.fullmatch(r"\(*[x-z]+\)*", text) and text.endswith(")" * depth)


@pytest.fixture(scope="module")
def alone(engine: Any) -> list[Answer]:
    """What each request of the mix gives when nothing runs beside it."""
    answers = [run(engine, [each])[0] for each in mix()]
    for each, answer in zip(mix(), answers, strict=True):
        check(engine, each.grammar, answer)
    reasons = [answer.reason for answer, each in zip(answers, mix(), strict=True) if each.grammar]
    assert reasons.count("stop") >= 9, "else little is shown"
    return answers


CONFIGS: dict[str, dict[str, Any]] = {
    "batch": {},
    "no prefix cache": {"prefix_cache": "off", "max_num_batched_tokens": 7},
    "radix, slices": {"prefix_cache": "radix", "long_prefill_threshold": 2},
    "preemption": {"num_blocks": 29, "block_size": 4, "max_num_seqs": 12},
    "swap": {"num_blocks": 29, "block_size": 4, "max_num_seqs": 12, "offload": "swap"},
    "ngram": {"speculative": "ngram", "prompt_lookup_min": 1},
    "draft": {"speculative": "draft"},
    "self": {"speculative": "self"},
    "draft, preemption": {"speculative": "draft", "num_blocks": 31, "block_size": 4},
    "ngram, swap": {"speculative": "ngram", "num_blocks": 31, "block_size": 4, "offload": "both"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_runs_beside_it_changes_no_output(
    engine_with: Callable[..., Any],
    alone: list[Answer],
    drafter: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two steps in flight, preempted, swapped, speculated on: token for token what it is alone,
    and so are its neighbours without a grammar."""
    flags = CONFIGS[name]
    if flags.get("speculative") == "draft":
        flags = flags | {"draft_model": drafter}
    other = engine_with(**flags)
    if "speculative" in flags:  # always, and not only where it pays
        monkeypatch.setattr(other.speculator.lengths, "choose", lambda _, limits, __: limits)
    assert run(other, mix(), 2) == alone
    stats = other.stats()
    if "num_blocks" in flags:
        assert stats["num_preemptions"] > 0
    if "speculative" in flags:
        assert 0 < stats["num_accepted_tokens"] < stats["num_draft_tokens"]


def test_drafts_that_stay_by_rejection(
    engine_with: Callable[..., Any], drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests without a seed: no two runs are alike, and each output follows its grammar."""
    engine = engine_with(speculative="draft", draft_model=drafter)
    params = SamplingParams(temperature=1.0, max_tokens=64)
    requests = [request([i, 50], params, GRAMMARS[i % len(GRAMMARS)]) for i in range(24)]
    monkeypatch.setattr(engine.speculator.lengths, "choose", lambda _, limits, __: limits)
    before = engine.stats()["num_accepted_tokens"]
    for each, answer in zip(requests, run(engine, requests), strict=True):
        check(engine, each.grammar, answer)
    assert engine.stats()["num_accepted_tokens"] > before


names = st.sampled_from(["a", "b", "name", "é", 'q"', "<|im_end|>", "x y"])
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-1000, 1000),
        st.integers(0, 2000),
    ),
    st.builds(
        lambda values: {"enum": values},
        st.lists(names | st.integers(-5, 5) | st.none(), min_size=1, max_size=3),
    ),
    st.just({"const": {"a": [1, None, "é"]}}),
    st.just({"type": "string", "pattern": "^[A-Z]{2}[0-9]{1,2}$"}),
)


def grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(
            lambda item, low, more: {
                "type": "array",
                "items": item,
                "minItems": low,
                "maxItems": low + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 1),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
        st.builds(
            lambda properties, count: {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:count],
                "additionalProperties": False,
            },
            st.dictionaries(names, inner, max_size=3),
            st.integers(0, 3),
        ),
    )


@settings(max_examples=40)
@given(st.recursive(leaves, grown, max_leaves=5), st.integers(0, 3), st.booleans())
def test_complete_outputs_are_valid(engine: Any, schema: Any, seed: int, ignore_eos: bool) -> None:
    params = SamplingParams(seed=seed, max_tokens=300, ignore_eos=ignore_eos)
    [answer] = run(engine, [request([seed, 9, 99], params, Grammar.of_schema(schema))])
    assert answer.error is None
    if answer.reason == "stop":
        assert answer.token_ids[-1] == EOS
        jsonschema.validate(json.loads(text_of(engine, answer)), schema)
    else:
        assert len(answer.token_ids) == 300


def test_generate_with_choices_logprobs_and_stops(engine: Any) -> None:
    params = SamplingParams(seed=1, n=3, max_tokens=300, logprobs=3)
    completions = engine.generate([[5, 6]], params, progress=False, grammar=GRAMMARS[0])
    texts = {completion.text for completion in completions}
    assert len(texts) == 3 and all(
        jsonschema.validate(json.loads(t), PERSON) is None for t in texts
    )
    for completion in completions:  # the model's own, before any mask
        tops = [sum(np.exp([p for _, p in item.top])) for item in completion.logprobs]
        assert max(tops) <= 1 + 1e-5
        assert any(item.top[0][0] != item.token_id for item in completion.logprobs)
    stopped = replace(params, n=1, stop=("name",))
    [completion] = engine.generate([[5, 6]], stopped, progress=False, grammar=GRAMMARS[0])
    assert completion.finish_reason == "stop" and "name" not in completion.text
    long = replace(params, n=1, max_tokens=4)
    [completion] = engine.generate([[5, 6]], long, progress=False, grammar=GRAMMARS[0])
    assert completion.finish_reason == "length" and len(completion.token_ids) == 4


def test_min_tokens(engine: Any) -> None:
    """An output goes on while its grammar admits it; where it cannot, it ends with what is wrong."""
    params = SamplingParams(seed=1, max_tokens=60, min_tokens=30)
    ones, four = Grammar("regex", "1+"), Grammar("regex", "1{4}")
    first, second = run(engine, [request([5], params, grammar) for grammar in (ones, four)])
    assert first.reason in ("stop", "length") and len(first.token_ids) >= 30
    assert second.reason == "error" and "min_tokens is 30" in second.error


def test_ignore_eos_ends_where_the_grammar_does(engine: Any) -> None:
    params = SamplingParams(seed=1, max_tokens=50, ignore_eos=True, logit_bias={EOS: 100.0})
    ones, few = Grammar("regex", "1+"), Grammar("regex", "1{1,7}")
    first, second = run(engine, [request([5], params, grammar) for grammar in (ones, few)])
    assert first.reason == "length" and EOS not in first.token_ids
    assert second.reason == "stop" and text_of(engine, second) == "1111111"


def test_a_grammar_that_cannot_go_on_ends_with_an_error(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a hang, and its neighbours go on."""
    limits = compilers.LIMITS | {"step_max_items": 300, "max_items_in_row": 60}
    monkeypatch.setattr(compilers, "LIMITS", limits)
    words = " | ".join(f'"{a}{b}" a' for a in "abcdefgh" for b in "abcdefgh")
    hard = Grammar("grammar", f"start: a a\na: {words} | /[a-h]/ | a a")
    params = SamplingParams(seed=1, max_tokens=200, ignore_eos=True)
    plain = request([5, 7], replace(params, max_tokens=40), None)
    expected = run(engine, [replace(plain, request_id="alone")])
    bad, neighbour = run(engine, [request([5], params, hard), plain])
    assert bad.reason == "error" and bad.error.startswith("the grammar")
    assert [neighbour] == expected


BAD = {
    "json type": Grammar("json", '{"type": "nonsense"}'),
    "no schema": Grammar("json", "[1, 2]"),
    "not JSON": Grammar("json", "{"),
    "unsatisfiable": Grammar.of_schema({"type": "object", "properties": {"a": False}, "required": ["a"]}),
    "keyword": Grammar.of_schema({"type": "array", "uniqueItems": True}),
    "reference to itself": Grammar.of_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "reference to a file": Grammar.of_schema({"$ref": "file:///etc/passwd"}),
    "reference to a host": Grammar.of_schema({"$ref": "http://127.0.0.1:9/x.json"}),
    "brackets in a regex": Grammar("regex", "(" * 30_000),
    "brackets of classes": Grammar("regex", "[" * 30_000),
    "closed brackets": Grammar("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "brackets in a grammar": Grammar("grammar", "start: " + "(" * 30_000),
    "EBNF brackets": Grammar("grammar", "root ::= " + "(a|" * 2700),
    "EBNF rule": Grammar("grammar", "root ::= nowhere"),
    "back reference": Grammar("regex", r"(a)\1"),
    "look-ahead": Grammar("regex", r"(?=a)a"),
    "no start": Grammar("grammar", 'a: "x"'),
    "empty class": Grammar("regex", r"[^\s\S]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_grammars(engine: Any, name: str) -> None:
    """An error that says what is wrong: of `generate` before any work, of a request at its end."""
    with pytest.raises(ValueError, match=r"cannot be used: .") as caught:
        engine.generate([[5]], SamplingParams(max_tokens=5), progress=False, grammar=BAD[name])
    assert len(str(caught.value)) < 400
    [answer] = run(engine, [request([5], SamplingParams(max_tokens=5), BAD[name])])
    assert answer.reason == "error" and "cannot be used" in answer.error
    assert answer.token_ids == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar("regex", ""),
        lambda: Grammar("regex", "a" * (MAX_GRAMMAR + 1)),
        lambda: Grammar("regex", "a{1000000}"),
        lambda: Grammar("regex", "(a{2,99999}b)*"),
        lambda: Grammar("regex", "\ud800"),
        lambda: Grammar("grammar", "root ::= " + "a" * 9000),
        lambda: Grammar("yaml", "a"),
        lambda: Grammar.of_schema(json.loads('{"a":' * 900 + "1" + "}" * 900)),
    ],
)
def test_grammars_that_are_not_looked_into(make: Callable[[], Grammar]) -> None:
    with pytest.raises(ValueError):
        make()


def test_depth_is_counted_without_recursion() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match=f"deeper than {MAX_DEPTH}"):
        Grammar.of_schema(deep)
    while isinstance(deep, list):  # else it is freed by recursion
        deep = deep.pop()


def test_evil_grammars_do_not_stop_other_streams(engine: Any) -> None:
    """While one is compiled for long, others' steps go on."""
    started, release = threading.Event(), threading.Event()
    compile_one = engine.grammars.compiler._compile

    def slow(grammar: Grammar) -> Any:
        started.set()
        assert release.wait(60)
        return compile_one(grammar)

    engine.grammars.compiler._compile = slow
    try:
        params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
        evil = request([5], params, Grammar("regex", "(a+)+b{1,9}"))
        gone = request([5], params, Grammar("regex", "(a+)+c{1,9}"))
        plain = request([5, 6], params, None)
        for each in (evil, gone, plain):
            engine.add_request(each)
        assert started.wait(60)
        tokens: list[int] = []
        while len(tokens) < 20:
            tokens += [id for output in engine.step() for id in output.token_ids]
            engine.check_integrity()
        assert engine.stats()["num_waiting"] == 2 and engine.has_unfinished()
        engine.abort(gone.request_id)
        assert engine.stats()["num_waiting"] == 1
        release.set()
        outputs = list(engine.step())
        while engine.has_unfinished():
            outputs += engine.step()
        reasons = {o.request_id: o.finish_reason for o in outputs if o.finished}
        assert reasons[gone.request_id] == "abort" and evil.request_id in reasons
    finally:
        release.set()
        engine.grammars.compiler._compile = compile_one


def test_what_is_kept_is_bounded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many schemas that differ: as many are kept as there is room for, the newest, and memory stays."""
    compiler = GrammarCompiler(Tokenizer.load(Path(folder)), 288, [EOS])
    monkeypatch.setattr(compilers, "MAX_KEPT", 16)

    def compile_some(begin: int) -> int:
        for i in range(begin, begin + 200):
            schema = {"type": "object", "properties": {f"k{i}": {"type": "string"}}}
            compiler.compile(Grammar.of_schema(schema)).result()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    sizes = [compile_some(begin) for begin in range(0, 1000, 200)]
    assert len(compiler._compiled) <= 17
    assert max(sizes[2:]) - sizes[1] < 4 << 20, sizes
    monkeypatch.setattr(compilers, "MAX_KEPT_CHARACTERS", 1000)
    for i in range(20):
        compiler.compile(Grammar("regex", f"a{i}" + "b" * 200)).result()
    assert compiler._num_characters <= 1000 + 204
    assert sum(len(grammar.text) for grammar in compiler._compiled) == compiler._num_characters


def test_few_wait_and_equal_ones_share(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(Tokenizer.load(Path(folder)), 288, [EOS])
    monkeypatch.setattr(compilers, "MAX_WAITING", 3)
    release = threading.Event()
    compiler._thread.submit(release.wait, 60)
    grammars = [Grammar("regex", f"a{{1,{i + 1}}}") for i in range(4)]
    futures: list[Future[Any]] = [compiler.compile(grammar) for grammar in grammars[:3]]
    assert compiler.compile(grammars[0]) is futures[0]
    with pytest.raises(GrammarsBusy, match=r"^3 grammars are being compiled$"):
        asyncio.run(compiler.check(grammars[3]))
    release.set()
    assert all(future.result() for future in futures)
    asyncio.run(compiler.check(grammars[3]))


def test_a_grammar_behind_others_is_not_to_blame(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come again; one that is itself slow may not."""
    compiler = GrammarCompiler(Tokenizer.load(Path(folder)), 288, [EOS])
    asyncio.run(compiler.check(Grammar("regex", "a+")))
    monkeypatch.setattr(compilers, "COMPILE_SECONDS", 0.2)
    release = threading.Event()
    compiler._thread.submit(release.wait, 60)
    with pytest.raises(GrammarsBusy, match=r"waits behind others' for 0\.2 s"):
        asyncio.run(compiler.check(Grammar("regex", "b+")))
    release.set()
    asyncio.run(compiler.check(Grammar("regex", "b+")))
    real, slow = compilers.to_llguidance, threading.Event()
    monkeypatch.setattr(compilers, "to_llguidance", lambda g: [slow.wait(60), real(g)][1])
    with pytest.raises(ValueError, match=r"takes longer than 0.2 s to compile"):
        asyncio.run(compiler.check(Grammar("regex", "c+")))
    slow.set()


def test_masks_at_each_place_of_a_draft(folder: str) -> None:
    """As if the draft's tokens had been output one by one; the matcher stands where it stood."""
    tokenizer = Tokenizer.load(Path(folder))
    compiler = GrammarCompiler(tokenizer, 288, [EOS])
    state = compiler.compile(Grammar("regex", "(yes|ab){1,3}")).result()
    yes, a, b = (tokenizer.encode(text, False) for text in ("yes", "a", "b"))
    draft = [*yes, *a, *b, EOS, *a]
    matcher, slow = (compiler.matcher(state, False) for _ in range(2))
    masks = np.empty((len(draft) + 1, num_words(288)), np.int32)
    for _ in range(2):
        matcher.fill(masks, draft)
        one = np.empty((1, num_words(288)), np.int32)
        slow = compiler.matcher(state, False)
        for place, token_id in enumerate(draft[:4]):
            slow.fill(one)
            assert (masks[place] == one[0]).all(), place
            slow.advance([token_id])
        assert (masks[4:] == -1).all(), "behind the end nothing is said"
    matcher.fill(masks[:2], b)  # "b" may not come first
    assert not masks[0][b[0] // 32] >> b[0] % 32 & 1 and (masks[1] == -1).all()
    assert matcher.error is None


def test_models_without_text_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(PART, "random:tiny-llama", threads=1)
    with pytest.raises(ValueError, match="tokenizer"):
        engine.add_request(request([5], SamplingParams(), GRAMMARS[0]))
    assert not engine.has_unfinished()
    engine.shutdown()


def test_without_grammars_nothing_is_loaded_or_waited_for(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("called without a grammar")

    for name in ("submit",):
        monkeypatch.setattr(engine.runner.masks.thread, name, never)
        monkeypatch.setattr(engine.grammars.compiler._thread, name, never)
    params = SamplingParams(seed=1, max_tokens=9, logprobs=1, min_tokens=3)
    [answer] = run(engine, [request([5], params, None)])
    assert answer.reason in ("stop", "length")


def test_sequences_end_while_masks_are_made(engine: Any) -> None:
    """Aborts at every step; what runs beside them is what it is alone."""
    params = SamplingParams(seed=8, max_tokens=40)
    stays = request([1, 2, 3], params, GRAMMARS[5])
    [expected] = run(engine, [replace(stays, request_id="alone")])
    for step in range(8):
        each = replace(stays, request_id=f"stays{step}")
        goes = request([3, step], params, GRAMMARS[0])
        engine.add_request(each)
        engine.add_request(goes)
        tokens: list[int] = []
        deadline = time.monotonic() + 60
        for number in itertools.count():
            if number == step + 2:
                engine.abort(goes.request_id)
            tokens += [
                id for o in engine.step() if o.request_id == each.request_id for id in o.token_ids
            ]
            engine.check_integrity()
            if not engine.has_unfinished() and number > step + 2:
                break
            assert time.monotonic() < deadline
        assert tokens == expected.token_ids


class AllAllowed:
    """In the place of llguidance's matcher: every token may come next."""

    def unsafe_compute_mask_ptr(self, address: int, num_bytes: int) -> None:
        ctypes.memset(address, 0xFF, num_bytes)

    def is_error(self) -> bool:
        return False


@pytest.mark.parametrize("eos", [0, 30, 31, 63])
def test_every_bit_of_a_word_may_be_the_end_that_is_ignored(eos: int) -> None:
    masks = np.zeros((1, 2), np.int32)
    Matcher(AllAllowed(), {eos}, ignore_eos=True).fill(masks)
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits == 0).tolist() == [eos]
