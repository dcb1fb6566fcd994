"""The options of a request over HTTP, in OpenAI's and vLLM's form: scored and echoed prompts, biases,
sampling defaults of a checkpoint, and the routes that count tokens."""

import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.completions import OutputProcessor
from common.http import neutral
from common.http.errors import ApiError
from common.http.run import ServerConfig
from common.http.schemas import ChatCompletionRequest
from common.models.checkpoint import resolve
from common.models.generation_config import sampling_defaults
from common.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from common.testing.http import check_error
from common.testing.oracle import reference_logits, reference_model
from common.testing.parts import PARTS, engine_of, http_parts, module_of
from common.testing.server import serving_thread

TINY, EMBEDDED = "random:tiny-llama", "smollm2-135m"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [7, 77, 130, 9, 400, 21]
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
TEXT = "The capital of France is Paris. The capital of Italy is"


def client_of(part: int, model: str, **flags: Any) -> Iterator[httpx.Client]:
    engine = engine_of(part, model, threads=1, **flags)
    app = module_of(part, "server").create_app(engine, ServerConfig(port=0))
    with serving_thread(app) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module", params=http_parts(4), ids=lambda part: f"part{part:02d}")
def part(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def tiny(part: int) -> Iterator[httpx.Client]:
    yield from client_of(part, TINY)


@pytest.fixture(scope="module")
def real() -> Iterator[httpx.Client]:
    """The latest part with a real model, which has a tokenizer."""
    yield from client_of(PARTS[-1], EMBEDDED, max_model_len=512)


def ask(client: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return json.loads(answer.text, parse_constant=pytest.fail)


def refused(client: httpx.Client, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    return check_error(answer.status_code, answer.text)


def tokens_of(choice: dict[str, Any]) -> list[str]:
    return choice["logprobs"]["tokens"]


# What the sampler is told


def test_biases_and_least_lengths_arrive(tiny: httpx.Client) -> None:
    [choice] = ask(tiny, **GREEDY, logprobs=0, logit_bias={"300": 100})["choices"]
    assert tokens_of(choice) == ["token_id:300"] * 4
    ending = GREEDY | {"stop_token_ids": [300], "logit_bias": {"300": 100.0}}
    assert ask(tiny, **ending)["usage"]["completion_tokens"] == 1
    assert ask(tiny, **ending, min_tokens=2)["usage"]["completion_tokens"] == 3


def test_usage_so_far_is_in_each_chunk(tiny: httpx.Client, part: int) -> None:
    """vLLM's `continuous_usage_stats`, by which load generators count the tokens of each chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    alone = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    if part == 1:
        assert refused(tiny, **GREEDY, **alone)["param"] == "stream"
        return
    body = GREEDY | {"prompt": [PROMPT, PROMPT[:2]], "stream": True, "stream_options": options}
    with tiny.stream("POST", COMPLETIONS, json=body) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    *chunks, last = [json.loads(line)["usage"] for line in lines]
    assert {chunk["prompt_tokens"] for chunk in chunks} == {last["prompt_tokens"]} == {8}
    counts = [chunk["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] < 3 and counts[-1] == 8
    assert [chunk["total_tokens"] for chunk in chunks] == [8 + count for count in counts]
    assert last["completion_tokens"] == 8
    named = refused(tiny, **GREEDY, **alone)["param"]
    assert named == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"logit_bias": {"512": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"logit_bias": {"1.5": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1e3}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {str(i): 0 for i in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"min_tokens": "1"}, "min_tokens"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": MAX_LOGPROBS + 1}, "prompt_logprobs"),
        ({"echo": 1}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(
    tiny: httpx.Client, part: int, fields: dict[str, Any], name: str
) -> None:
    assert refused(tiny, **(GREEDY | fields))["param"].startswith(name)
    assert ask(tiny, **GREEDY)["usage"]["completion_tokens"] == 4


def test_minus_one_is_no_seed(tiny: httpx.Client) -> None:
    sampled = GREEDY | {"temperature": 1.0, "seed": -1, "logprobs": 0, "max_tokens": 12}
    first, second = (tokens_of(ask(tiny, **sampled)["choices"][0]) for _ in range(2))
    assert first != second


# Prompts that are scored


def check_scores(choice: dict[str, Any], prompt: list[int], num_top: int) -> None:
    """A choice with the prompt echoed: OpenAI's form, the values transformers'."""
    shown = choice["logprobs"]
    names = [f"token_id:{token_id}" for token_id in prompt]
    assert shown["tokens"][: len(prompt)] == names
    assert shown["token_logprobs"][0] is None and shown["top_logprobs"][0] is None
    rows = reference_logits(TINY, prompt[:1], prompt[1:]).log_softmax(-1)
    for i, row in enumerate(rows, start=1):
        assert shown["token_logprobs"][i] == pytest.approx(float(row[prompt[i]]), abs=1e-3)
        top = shown["top_logprobs"][i]
        assert top[names[i]] == shown["token_logprobs"][i]
        assert len(top) in (num_top, num_top + 1)
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-3) or num_top == 0


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_evaluations_get_the_prompts_log_probabilities(
    tiny: httpx.Client, part: int, num_top: int
) -> None:
    """What lm-eval sends: one token is completed, or none, and the prompt's are looked at."""
    scoring = GREEDY | {"echo": True, "logprobs": num_top}
    if part < 4:
        assert refused(tiny, **scoring)["param"] == "logprobs"
        return
    plain = ask(tiny, **GREEDY, logprobs=num_top)["choices"][0]["logprobs"]
    [choice] = ask(tiny, **scoring)["choices"]
    check_scores(choice, PROMPT, num_top)
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert choice["logprobs"][name][len(PROMPT) :] == plain[name]
    alone = ask(tiny, **(scoring | {"max_tokens": 0}))
    assert alone["usage"]["completion_tokens"] == 0
    assert alone["usage"]["total_tokens"] == len(PROMPT)
    [choice] = alone["choices"]
    assert choice["finish_reason"] == "length"
    assert len(tokens_of(choice)) == len(PROMPT)
    check_scores(choice, PROMPT, num_top)


def test_prompts_of_a_list_and_choices_of_a_prompt_are_scored_each(
    tiny: httpx.Client, part: int
) -> None:
    if part < 4:
        pytest.skip("this part scores no prompts")
    prompts = [PROMPT, [5], list(range(10, 60))]
    fields = GREEDY | {"prompt": prompts, "echo": True, "logprobs": 2, "n": 2}
    choices = ask(tiny, **fields)["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for choice, prompt in zip(choices, [p for p in prompts for _ in range(2)], strict=True):
        check_scores(choice, prompt, 2) if len(prompt) > 1 else None
        assert len(tokens_of(choice)) == len(prompt) + 4


def test_scores_in_vllms_form(tiny: httpx.Client, part: int) -> None:
    if part < 4:
        assert refused(tiny, **GREEDY, prompt_logprobs=1)["param"] == "prompt_logprobs"
        return
    [choice] = ask(tiny, **GREEDY, prompt_logprobs=2)["choices"]
    assert choice["logprobs"] is None and choice["text"] == ""
    first, *scores = choice["prompt_logprobs"]
    assert first is None and len(scores) == len(PROMPT) - 1
    rows = reference_logits(TINY, PROMPT[:1], PROMPT[1:]).log_softmax(-1)
    for token_id, score, row in zip(PROMPT[1:], scores, rows, strict=True):
        own = score[str(token_id)]
        assert own["logprob"] == pytest.approx(float(row[token_id]), abs=1e-3)
        assert own["rank"] == int((row > row[token_id]).sum()) + 1
        ranks = [entry["rank"] for entry in score.values()]
        assert ranks[:2] == [1, 2] and len(ranks) == (2 if own["rank"] <= 2 else 3)


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}], ids=str)
def test_scores_are_not_streamed(tiny: httpx.Client, part: int, fields: dict[str, Any]) -> None:
    if part > 1:
        assert refused(tiny, **GREEDY, **fields, stream=True)["param"] in fields


def test_scores_are_bounded(tiny: httpx.Client, part: int) -> None:
    """Over all prompts, and over all choices, which show them each."""
    if part < 4:
        pytest.skip("this part scores no prompts")
    fields = {"prompt": [[5] * 900] * 64, "max_tokens": 1, "prompt_logprobs": 20}
    assert refused(tiny, **fields)["param"] == "prompt_logprobs"
    fields |= {"prompt": [5] * 300, "n": 128}
    assert refused(tiny, **fields)["param"] == "prompt_logprobs"


def test_scores_of_both_forms_are_each_as_many_as_asked(tiny: httpx.Client, part: int) -> None:
    if part < 4:
        pytest.skip("this part scores no prompts")
    for first, second in ((3, 1), (1, 3), (0, 2)):
        fields = GREEDY | {"echo": True, "logprobs": first, "prompt_logprobs": second}
        [choice] = ask(tiny, **fields)["choices"]
        check_scores(choice, PROMPT, first)
        assert all(len(score) in (second, second + 1) for score in choice["prompt_logprobs"][1:])


def test_nothing_but_the_prompt_is_not_ended_by_a_token_that_is_not_shown(
    tiny: httpx.Client, part: int
) -> None:
    alone = GREEDY | {"echo": True, "max_tokens": 0, "logit_bias": {"300": 100}}
    [choice] = ask(tiny, **alone, stop_token_ids=[300])["choices"]
    assert choice["finish_reason"] == "length"
    assert refused(tiny, **alone, min_tokens=1)["param"] == "min_tokens"


def test_an_echo_is_the_text_that_was_sent(real: httpx.Client) -> None:
    fields = {"prompt": TEXT, "max_tokens": 3, "temperature": 0}
    plain = ask(real, **fields)["choices"][0]["text"]
    [choice] = ask(real, **fields, echo=True, logprobs=1)["choices"]
    assert choice["text"] == TEXT + plain
    shown = choice["logprobs"]
    for token, offset in zip(shown["tokens"], shown["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    ids = ask(real, path="/tokenize", prompt=TEXT)["tokens"]
    [again] = ask(real, **(fields | {"prompt": ids}), echo=True)["choices"]
    assert again["text"] == choice["text"]
    lines = real.post(COMPLETIONS, json=fields | {"echo": True, "stream": True}).text.split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    alone = fields | {"echo": True, "max_tokens": 0}
    assert ask(real, **alone)["choices"][0]["text"] == TEXT
    lines = real.post(COMPLETIONS, json=alone | {"stream": True}).text.split("\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_offsets_of_an_echo_count_the_special_tokens_that_were_written(real: httpx.Client) -> None:
    text = "<|im_start|>user\nAn apple<|im_end|>\n"
    fields = {"max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 0}
    ids = ask(real, "/tokenize", prompt=text)["tokens"]
    for prompt in (text, ids):
        [choice] = ask(real, **fields, prompt=prompt)["choices"]
        assert choice["text"].startswith(text)
        shown = choice["logprobs"]
        pairs = list(zip(shown["tokens"], shown["text_offset"], strict=True))
        assert all(text.startswith(token, offset) for token, offset in pairs[: len(ids)])
        assert pairs[0] == ("<|im_start|>", 0) and pairs[1] == ("user", 12)
        assert shown["text_offset"][len(ids)] == len(text)


def test_a_chats_scores_are_in_one_place(real: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi", "type": "text"}]
    answer = ask(real, CHAT, messages=messages, n=2, prompt_logprobs=0, max_tokens=1)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert ["prompt_logprobs" in choice for choice in answer["choices"]] == [False, False]


def test_scoring_does_not_use_the_prefix_cache_but_fills_it(real: httpx.Client) -> None:
    prompt = "Scored once. " * 20
    fields = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    scored = [ask(real, **fields, echo=True, logprobs=1) for _ in range(2)]
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in scored] == [
        0
    ] * 2
    first, second = (answer["choices"][0]["logprobs"]["token_logprobs"] for answer in scored)
    assert first[1:] == pytest.approx(second[1:], abs=1e-3)
    assert ask(real, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# Stop strings


def pieces(params: SamplingParams, text: str) -> tuple[str, str | None]:
    """A text through the output processor, one character a token."""
    output = OutputProcessor(None, params)
    shown = [output._release(piece) for piece in feed(output, text)]
    if not output.finished:
        shown.append(output._held)
    return "".join(shown), output.finish_reason


def feed(output: OutputProcessor, text: str) -> Iterator[str]:
    for character in text:
        output.token_ids.append(0)
        yield character
        if output.finished:
            return


@given(
    st.text("ab", max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 12),
)
def test_stop_strings_count_beyond_min_tokens_and_may_be_kept(
    text: str, stops: list[str], least: int
) -> None:
    ends = [
        (start + len(stop), start)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > least
    ]
    end, start = min(ends, default=(len(text), len(text)))
    for kept in (False, True):
        params = SamplingParams(
            max_tokens=None, stop=tuple(stops), min_tokens=least, include_stop_str_in_output=kept
        )
        expected = (text[: end if kept else start], "stop" if ends else None)
        assert pieces(params, text) == expected


def test_a_stop_string_in_the_answer(real: httpx.Client) -> None:
    fields = {"prompt": TEXT, "max_tokens": 12, "temperature": 0}
    text = ask(real, **fields)["choices"][0]["text"]
    stop = text[4:7]
    for extra, expected in (
        ({}, text[: text.index(stop)]),
        ({"include_stop_str_in_output": True}, text[: text.index(stop) + len(stop)]),
        ({"min_tokens": 12}, text),
    ):
        [choice] = ask(real, **fields, stop=stop, **extra)["choices"]
        assert choice["text"] == expected


# Chats


def test_a_final_message_goes_on(real: httpx.Client) -> None:
    """A prefilled answer is continued: the chat's tokens end with it, and so do a raw prompt's."""
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    tokens = ask(real, "/tokenize", messages=messages, continue_final_message=True)["tokens"]
    text = ask(real, "/detokenize", tokens=tokens)["prompt"]
    assert text.endswith("<|im_start|>assistant\nThe capital of France is")
    fields = {"max_tokens": 4, "temperature": 0}
    chat = ask(real, CHAT, messages=messages, continue_final_message=True, **fields)
    assert chat["usage"]["prompt_tokens"] == len(tokens)
    assert "Paris" in chat["choices"][0]["message"]["content"]
    closed = ask(real, "/tokenize", messages=messages, add_generation_prompt=False)["tokens"]
    opened = ask(real, "/tokenize", messages=messages)["tokens"]
    assert closed[: len(tokens)] == tokens and len(closed) > len(tokens)
    assert opened[: len(closed)] == closed and len(opened) > len(closed)
    for wrong in (
        {"continue_final_message": True, "add_generation_prompt": True, "messages": messages},
        {"continue_final_message": True, "messages": messages[:1]},
    ):
        assert refused(real, CHAT, **wrong)["param"] == "continue_final_message"


FIELDS = st.one_of(
    *(
        st.tuples(st.just(name), st.sampled_from([*rule, None]) if rule else st.none())
        for name, rule in neutral.CHAT.items()
        if not callable(rule)
    ),
    st.tuples(st.sampled_from(sorted(neutral.NOTES.keys() - {"metadata"})), st.text(max_size=5)),
    st.tuples(st.just("metadata"), st.dictionaries(st.text(max_size=3), st.text(max_size=3))),
)


@given(
    st.lists(FIELDS, max_size=6), st.sampled_from([{}, {"top_logprobs": 0}, {"logprobs": False}])
)
def test_fields_that_ask_for_nothing_change_nothing(
    fields: list[tuple[str, Any]], more: dict[str, Any]
) -> None:
    plain = {"messages": [{"role": "user", "content": "Hi"}]}
    message = plain["messages"][0] | {"tool_calls": [], "refusal": None, "name": ""}
    request = ChatCompletionRequest.model_validate(dict(fields) | more | {"messages": [message]})
    request.check(streaming=True, max_n=1)
    bare = ChatCompletionRequest.model_validate(plain)
    assert request.sampling_params() == bare.sampling_params()
    assert [m.as_dict() for m in request.messages] == [m.as_dict() for m in bare.messages]


@given(
    st.sampled_from(sorted(name for name, rule in neutral.CHAT.items() if not callable(rule))),
    st.sampled_from([True, False, 0, 1, 2.5, -1, "x", ["x"], {"x": 1}]),
)
def test_fields_that_ask_for_something_are_refused(name: str, value: Any) -> None:
    """Also where the value equals a neutral one and is of another type."""
    rule = neutral.CHAT[name]
    body = {"messages": [{"role": "user", "content": "Hi"}], name: value}
    request = ChatCompletionRequest.model_validate(body)
    if any(type(item) is type(value) and item == value for item in rule):
        request.check(streaming=True, max_n=1)
        return
    with pytest.raises(ApiError) as caught:
        request.check(streaming=True, max_n=1)
    assert (caught.value.status, caught.value.param) == (400, name)


# Sampling defaults of a checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with sampling defaults of its own."""
    folder = tmp_path_factory.mktemp("model")
    model = reference_model(TINY)
    config = json.dumps(model.config.to_dict())
    (folder / "config.json").write_text(config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve(EMBEDDED) / file, folder)
    write_defaults(folder, temperature=0.0, top_k=7, repetition_penalty=1.05, do_sample=True)
    return folder


def write_defaults(folder: Path, **values: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | values))


def test_defaults_are_taken_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sampling_defaults(folder) == {"temperature": 0.0, "top_k": 7}
    assert "temperature 0, top_k 7" in caplog.text and "--generation-config none" in caplog.text
    assert "repetition_penalty 1.05, which is not supported" in caplog.text
    assert sampling_defaults(folder, "none") == {}


def test_defaults_that_no_request_could_ask_for_are_refused(tmp_path: Path) -> None:
    for values in ({"temperature": -1}, {"top_p": "0.9"}, {"top_k": 1.5}, {"min_p": math.inf}):
        write_defaults(tmp_path, **values)
        with pytest.raises(ValueError, match=next(iter(values))) as caught:
            sampling_defaults(tmp_path)
        assert str(tmp_path) in str(caught.value)
    write_defaults(tmp_path, temperature=None, top_k=50)
    assert sampling_defaults(tmp_path) == {"top_k": 50}


@pytest.mark.parametrize("use", ["auto", "none"])
def test_defaults_hold_where_a_request_says_nothing(folder: Path, use: str) -> None:
    """Greedy by default, so two answers are one; and what a request says goes first."""
    flags = {"generation_config": use}
    clients = client_of(PARTS[-1], str(folder), **flags)
    client = next(clients)
    fields = {"prompt": PROMPT, "max_tokens": 16, "ignore_eos": True, "logprobs": 0}
    answers = [ask(client, **fields)["choices"][0] for _ in range(3)]
    assert len({str(tokens_of(choice)) for choice in answers}) == (1 if use == "auto" else 3)
    fields |= {"temperature": 1.0, "top_k": 0}
    answers = [ask(client, **fields)["choices"][0] for _ in range(3)]
    assert len({str(tokens_of(choice)) for choice in answers}) == 3
    next(clients, None)
    engine = engine_of(PARTS[-1], str(folder), threads=1, **flags)
    found = {str(engine.generate(PROMPT, progress=False)[0].token_ids) for _ in range(3)}
    assert len(found) == (1 if use == "auto" else 3)


# Routes


def test_models_and_version(tiny: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/models/"):
        [card] = tiny.get(path).json()["data"]
        assert card["id"] == TINY
    assert tiny.get(f"/v1/models/{TINY}").json()["id"] == TINY
    assert tiny.get("/v1/models/other").status_code == 404
    assert set(tiny.get("/version").json()) == {"version"}


def test_tokens_of_a_text_and_back(real: httpx.Client) -> None:
    for text in (TEXT, "", " a  1 é😀\n", "<|im_start|>x", "x" * 5000):
        answer = ask(real, "/tokenize", prompt=text, return_token_strs=True)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 512
        assert ask(real, "/detokenize", tokens=answer["tokens"])["prompt"] == text
    chat = ask(real, "/tokenize", messages=[{"role": "user", "content": "Hi"}])
    assert chat["token_strs"] is None
    answer = ask(real, CHAT, messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == chat["count"]


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "x" * (1 << 20) + "x"}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "nosuchfield": 1}, "nosuchfield"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [49152]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens"),
        ("/detokenize", {"tokens": [1], "nosuchfield": 1}, "nosuchfield"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_input_to_the_tokenizer_routes(
    real: httpx.Client, path: str, fields: dict[str, Any], name: str | None
) -> None:
    body = json.dumps(fields)
    answer = real.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = check_error(answer.status_code, answer.text)
    assert (error["param"] or "").startswith(name or "")


def test_the_part_of_a_message_that_is_wrong_is_named(real: httpx.Client) -> None:
    part = {"type": "text", "text": "a"}
    for wrong, name in (
        (part | {"nosuch": 1}, "messages[0].content[0].nosuch"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "messages[0].content[0]"),
        ({"type": "text", "text": 5}, "messages[0].content[0].text"),
        (5, "messages[0].content[0]"),
    ):
        error = refused(real, CHAT, messages=[{"role": "user", "content": [wrong]}])
        assert error["param"].startswith(name)


def test_others_are_served_while_long_texts_are_tokenized(real: httpx.Client) -> None:
    """A few at a time, in threads; the answer is written there too."""
    body = {"prompt": "aZ" * 200_000, "return_token_strs": True}
    with ThreadPoolExecutor(4) as pool:
        url = f"{real.base_url}/tokenize"
        long = [pool.submit(httpx.post, url, json=body, timeout=120) for _ in range(4)]
        assert ask(real, prompt=TEXT, max_tokens=2)["usage"]["completion_tokens"] == 2
        answers = [future.result() for future in long]
    assert {answer.status_code for answer in answers} == {200}
    assert "".join(answers[0].json()["token_strs"]) == body["prompt"]


def test_a_model_without_a_tokenizer_says_so(tiny: httpx.Client) -> None:
    assert "no tokenizer" in refused(tiny, "/tokenize", prompt="a")["message"]
    assert "no tokenizer" in refused(tiny, "/detokenize", tokens=[5])["message"]


def test_the_openai_client_can_ask_for_it_all(real: httpx.Client) -> None:
    client = openai.OpenAI(base_url=f"{real.base_url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(
        model=EMBEDDED,
        prompt=TEXT,
        max_tokens=2,
        temperature=0,
        echo=True,
        logprobs=2,
        logit_bias={"7": -100},
        user="ada",
        extra_body={"min_tokens": 2, "seed": -1, "include_stop_str_in_output": True},
    )
    [choice] = answer.choices
    assert choice.text.startswith(TEXT)
    assert choice.logprobs.token_logprobs[0] is None
    chat = client.chat.completions.create(
        model=EMBEDDED,
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        max_tokens=2,
        metadata={"run": "1"},
        store=False,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert chat.usage.completion_tokens <= 2
