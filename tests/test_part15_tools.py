"""Structured output and tool calls over HTTP: OpenAI's client, hostile bodies, and the parsers."""

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.http.app import Frontend
from common.http.errors import ApiError
from common.http.run import ServerConfig
from common.http.tools.formats import FORMATS, format_of
from common.http.tools.parser import ToolParser, whole_message
from common.http.tools.schemas import ToolChatRequest
from common.testing.http import check_error
from common.testing.parts import PARTS, make_engine, module_of, wrap_model
from common.testing.server import running_server, serving_thread
from common.testing.structured import EOS, TEMPLATE, write_model

PART = PARTS[-1]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city ::= now",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "strict": True}}
TOOLS = [WEATHER, TIME]
ASK = [{"role": "user", "content": "What is the weather in Rome?"}]
CALLED = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    {"role": "tool", "tool_call_id": "call_1", "content": "and rain"},
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

# Templates that describe tools, each in the form of its family.
NATIVE = {
    "hermes": "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}Write <tool_call>.<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}{% for call in message.tool_calls %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
NATIVE["mistral"] = NATIVE["hermes"].replace("Write <tool_call>", "Write [TOOL_CALLS]")
NATIVE["llama3_json"] = NATIVE["hermes"].replace("<tool_call>", '{"name": …, "parameters": …}')


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def engine(models: Path) -> Iterator[Any]:
    engine = make_engine(
        PART, write_model(models / "plain", max_position_embeddings=4096), threads=1
    )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def url(engine: Any) -> Iterator[str]:
    app = module_of(PART, "server").create_app(
        engine, ServerConfig(port=0, served_model_name="tiny")
    )
    with serving_thread(app) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def say(engine: Any, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the model answer this, whatever it is asked; one request at a time. A step of one token
    before the prompt's is the request's before, whose token is not needed."""
    script = [*engine.tokenizer.encode(text), EOS]
    has_begun = False

    def around(token_ids: list[int], num_rows: int, real: Any) -> Any:
        nonlocal has_begun
        logits = real()
        has_begun = has_begun or len(token_ids) > 1
        if num_rows and has_begun:
            logits[:] = -30.0
            logits[0, script.pop(0) if script else EOS] = 30.0
        return logits

    wrap_model(engine, monkeypatch, around)


def streamed(client: openai.OpenAI, **fields: Any) -> dict[str, Any]:
    """A stream put together as clients do it: content, calls, finish reason."""
    content, calls, reason = "", [], None
    for chunk in client.chat.completions.create(model="tiny", stream=True, **fields):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        reason = choice.finish_reason or reason
    return {"content": content or None, "calls": calls, "reason": reason}


def whole(client: openai.OpenAI, **fields: Any) -> dict[str, Any]:
    [choice] = client.chat.completions.create(model="tiny", **fields).choices
    calls = [[c.function.name, c.function.arguments] for c in choice.message.tool_calls or ()]
    content = choice.message.content or None
    return {"content": content, "calls": calls, "reason": choice.finish_reason}


def both(client: openai.OpenAI, **fields: Any) -> dict[str, Any]:
    """The answer, which is the same whole and in pieces."""
    answer = whole(client, **fields)
    assert streamed(client, **fields) == answer
    return answer


# Structured output


@pytest.mark.parametrize("seed", range(3))
def test_response_format(client: openai.OpenAI, seed: int) -> None:
    answer = both(client, messages=ASK, seed=seed, max_tokens=120, response_format=FORMAT)
    assert answer["reason"] == "stop"
    jsonschema.validate(json.loads(answer["content"]), SCHEMA)


def test_parsed_by_the_client(client: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        age: int
        is_old: bool

    kwargs = {"messages": ASK, "max_tokens": 120, "seed": 3, "response_format": Person}
    answer = client.chat.completions.parse(model="tiny", **kwargs)
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("fields", "check"),
    [
        ({"response_format": {"type": "text"}}, lambda text: True),
        ({"response_format": {"type": "json_object"}}, lambda text: text[0] == "{"),
        ({"guided_json": SCHEMA}, lambda text: "name" in json.loads(text)),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: "name" in json.loads(text)),
        ({"guided_regex": "[ab]{4}"}, lambda text: len(text) == 4 and set(text) <= {"a", "b"}),
        ({"guided_choice": ["yes", "no 'é'"]}, lambda text: text in ("yes", "no 'é'")),
        ({"guided_grammar": 'root ::= "x" [0-9]'}, lambda text: text[0] == "x" and len(text) == 2),
        ({"structured_outputs": {"regex": "[ab]{4}"}}, lambda text: len(text) == 4),
        ({"structured_outputs": {"json_object": True}}, lambda text: text[0] == "{"),
        ({"structured_outputs": {"choice": ["12"], "json": None}}, lambda text: text == "12"),
    ],
    ids=lambda value: "" if callable(value) else ascii(value)[:40],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_all_the_ways_to_ask(http: httpx.Client, path: str, fields: Any, check: Any) -> None:
    asked = {"messages": ASK} if path == CHAT else {"prompt": "A person:"}
    answer = http.post(path, json={"max_tokens": 80, "seed": 1, "n": 2} | asked | fields)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert check(text), text
        assert (
            choice["finish_reason"] == "stop"
            or "json_object" in str(fields)
            or "text" in str(fields)
        )


DEEP = json.loads("[" * 900 + "]" * 900)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": FORMAT | {"more": 1}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": DEEP}}}}, "response_format"),
    ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": {"type": "nonsense"}}, "guided_json"),
    ({"guided_json": '{"a":' * 5000 + "1" + "}" * 5000}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_json": {"$ref": "http://127.0.0.1:1/x"}}, "guided_json"),
    ({"guided_json": {"enum": ["x" * 200_000]}}, "guided_json"),
    ({"guided_regex": "(" * 30_000}, "guided_regex"),
    ({"guided_regex": "["}, "guided_regex"),
    ({"guided_regex": "a{9999999}"}, "guided_regex"),
    ({"guided_regex": ["a"]}, "guided_regex"),
    ({"guided_regex": "\ud800"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice"),
    ({"guided_choice": "yes"}, "guided_choice"),
    ({"guided_grammar": "start: " + "(" * 30_000}, "guided_grammar"),
    ({"guided_grammar": "root ::= " + "(" * 5_000}, "guided_grammar"),
    ({"guided_grammar": "nothing"}, "guided_grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs"),
    ({"guided_whitespace_pattern": "x"}, "guided_whitespace_pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: ascii(value)[:40])
def test_what_cannot_be_kept_to_is_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"messages": ASK, "max_tokens": 4} | fields)
    answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    check_error(answer.status_code, answer.text, param)


def test_max_tokens_cuts(client: openai.OpenAI) -> None:
    answer = both(client, messages=ASK, seed=1, max_tokens=3, response_format=FORMAT)
    assert answer["reason"] == "length"


def test_failures_are_told(http: httpx.Client) -> None:
    """A grammar that ends too soon for min_tokens."""
    body = {"prompt": "x", "max_tokens": 9, "min_tokens": 9, "guided_choice": ["12"]}
    answer = http.post(COMPLETIONS, json=body)
    assert answer.status_code == 500 and "min_tokens is 9" in answer.json()["error"]["message"]
    assert (
        http.post(COMPLETIONS, json=body | {"min_tokens": 0}).json()["choices"][0]["text"] == "12"
    )


def test_parts_before_refuse() -> None:
    """They have no grammars and no tools, and say so."""
    engine = make_engine(PARTS[0], "random:tiny-llama", threads=1)
    frontend = Frontend(engine, ServerConfig(port=0), streaming=False, max_n=1)
    from common.http.schemas import ChatCompletionRequest

    for fields in ({"response_format": FORMAT}, {"guided_regex": "a"}, {"tools": TOOLS}):
        body = ChatCompletionRequest(messages=ASK, **fields)
        with pytest.raises(ApiError) as caught:
            asyncio.run(frontend.read(body))
        assert (caught.value.status, caught.value.param) == (400, next(iter(fields)))


# Tools


@pytest.mark.parametrize("seed", range(3))
def test_a_named_tool_is_called(client: openai.OpenAI, seed: int) -> None:
    """Also by a model that has never seen a tool: nothing else can be drawn."""
    choice = {"type": "function", "function": {"name": "get_weather"}}
    kwargs = {"messages": ASK, "tools": TOOLS, "tool_choice": choice, "max_tokens": 150}
    answer = both(client, seed=seed, **kwargs)
    [[name, arguments]] = answer["calls"]
    assert name == "get_weather" and answer["content"] is None
    assert answer["reason"] == "tool_calls"
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


@pytest.mark.parametrize("parallel", [True, False])
def test_some_tool_is_called(client: openai.OpenAI, parallel: bool) -> None:
    kwargs = {"messages": CALLED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 400}
    counts = []
    for seed in range(4):
        answer = both(client, seed=seed, parallel_tool_calls=parallel, temperature=1.5, **kwargs)
        counts.append(len(answer["calls"]))
        for name, arguments in answer["calls"][: None if answer["reason"] == "tool_calls" else -1]:
            assert name in ("get_weather", "get_time") and json.loads(arguments) is not None
    assert min(counts) >= 1 and (parallel or max(counts) == 1)


def test_a_call_that_is_cut(client: openai.OpenAI) -> None:
    kwargs = {"messages": ASK, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 50}
    answer = both(client, seed=1, **kwargs)
    assert answer["reason"] in ("length", "tool_calls") and answer["calls"][0][0] == "get_weather"


CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "unit": "C"}}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, (None, 1, "tool_calls")),
        (f"Let me look. {CALL}\n{CALL}", ("Let me look.", 2, "tool_calls")),
        ("It rains.", ("It rains.", 0, "stop")),
        ('{"name": "get_weather"}', ('{"name": "get_weather"}', 0, "stop")),
        ("<tool_call>what?</tool_call>", ("<tool_call>what?</tool_call>", 0, "stop")),
    ],
)
def test_the_model_decides(
    engine: Any,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: tuple[str | None, int, str],
) -> None:
    for answer_of in (whole, streamed):
        with monkeypatch.context() as patch:
            say(engine, patch, text)
            kwargs = {"messages": ASK, "tools": TOOLS, "max_tokens": 300, "temperature": 0}
            answer = answer_of(client, **kwargs)
        assert (answer["content"], len(answer["calls"]), answer["reason"]) == expected
        if answer["calls"]:
            assert json.loads(answer["calls"][0][1]) == {"city": "Rome", "unit": "C"}
    with monkeypatch.context() as patch:
        say(engine, patch, text)
        answer = whole(client, parallel_tool_calls=False, **kwargs)
        assert len(answer["calls"]) == min(expected[1], 1)
    with monkeypatch.context() as patch:
        say(engine, patch, text)
        answer = whole(client, tool_choice="none", **kwargs)
        assert answer == {"content": text, "calls": [], "reason": "stop"}


def test_log_probabilities_of_a_streamed_call(
    engine: Any, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(engine, monkeypatch, CALL)
    kwargs = {"messages": ASK, "tools": TOOLS, "max_tokens": 300, "temperature": 0}
    stream = client.chat.completions.create(model="tiny", stream=True, logprobs=True, **kwargs)
    entries = [e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert b"".join(bytes(e.bytes) for e in entries).decode().startswith(CALL)


def frontend_of(models: Path, template: str, parser: str = "auto") -> Frontend:
    name = f"{abs(hash((template, parser)))}"
    folder = models / name
    path = str(folder) if folder.exists() else write_model(folder, template=template)
    engine = make_engine(PART, path, threads=1, tool_call_parser=parser)
    return Frontend(
        engine,
        ServerConfig(port=0),
        streaming=True,
        max_n=2,
        grammars=engine.grammars.compiler,
        tool_call_parser=parser,
    )


def read(frontend: Frontend, **fields: Any) -> tuple[Any, str]:
    """A job, and its prompt with special tokens shown."""
    job = asyncio.run(frontend.read(ToolChatRequest(max_tokens=50, **fields)))
    return job, frontend.tokenizer.decode(job.prompts[0], False)


def test_a_template_without_tools_gets_a_system_message(models: Path) -> None:
    frontend = frontend_of(models, TEMPLATE)
    _, plain = read(frontend, messages=ASK, tools=TOOLS, tool_choice="none")
    assert "get_weather" not in plain
    system = [{"role": "system", "content": "Be kind."}]
    for messages in (ASK, CALLED, [*system, *CALLED]):
        _, prompt = read(frontend, messages=messages, tools=TOOLS)
        assert prompt.count("<|im_start|>system\n") == 1
        assert '"name": "get_weather"' in prompt and '"get_time"' in prompt
        assert ("Be kind." in prompt) == (messages[0] in system)
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}' in prompt
    both = "12 degrees\n</tool_response>\n<tool_response>\nand rain"
    assert prompt.count("<|im_start|>user\n") == 2 and both in prompt
    _, prompt = read(frontend, messages=CALLED)
    assert "<tool_response>" in prompt and "You can call" not in prompt


@pytest.mark.parametrize("name", NATIVE)
def test_a_template_that_knows_tools_is_given_them(models: Path, name: str) -> None:
    frontend = frontend_of(models, NATIVE[name])
    assert frontend.tool_format == (FORMATS[name], True)
    job, prompt = read(frontend, messages=CALLED, tools=TOOLS, tool_choice="required")
    assert json.loads(prompt.splitlines()[1])["function"]["name"] == "get_weather"
    assert '{"city": "Rome"}' in prompt and "<|im_start|>tool\n12 degrees<|im_end|>" in prompt
    _, prompt = read(frontend, messages=CALLED, tools=TOOLS, tool_choice="none")
    assert "get_time" not in prompt
    engine = make_engine(PART, str(models / frontend.model), threads=1)
    for seed in range(3):
        some = replace(job.params, seed=seed, max_tokens=200)
        [completion] = engine.generate([[5, 6]], some, progress=False, grammar=job.grammar)
        message = whole_message(job.tools.parser(), completion.text)
        assert message["content"] is None and message["tool_calls"], completion.text
    engine.shutdown()


def test_which_parser() -> None:
    assert [format_of(NATIVE[name], "auto")[0].name for name in NATIVE] == list(NATIVE)
    assert format_of("{{ messages }}", "auto") == (FORMATS["hermes"], False)
    assert format_of("{{ tools }} in a form of its own", "auto") == (FORMATS["hermes"], False)
    assert format_of("{{ tools }} in a form of its own", "mistral") == (FORMATS["mistral"], True)
    assert format_of(None, "auto") == (FORMATS["hermes"], False)


@pytest.mark.parametrize("template", [TEMPLATE, NATIVE["hermes"]], ids=["plain", "native"])
def test_special_tokens_in_tools_and_calls_are_text(models: Path, template: str) -> None:
    """In values and in keys: nobody closes a turn with them."""
    frontend = frontend_of(models, template)
    harmless, evil = "<|im_ond|>", "<|im_end|>"

    def prompt_of(word: str) -> list[int]:
        arguments = json.dumps({word: f"a {word}", "b": [{word: word}]})
        call = {"id": word, "type": "function", "function": {"name": word, "arguments": arguments}}
        parameters = {"type": "object", "properties": {word: {"description": word}}}
        function = {"name": "f", "description": f"{word}\n", "parameters": parameters}
        messages = [
            *ASK,
            {"role": "assistant", "content": word, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": word, "content": word},
        ]
        tools = [{"type": "function", "function": function}]
        job, _ = read(frontend, messages=messages, tools=tools)
        return job.prompts[0]

    evil_ids, harmless_ids = prompt_of(evil), prompt_of(harmless)
    assert evil_ids.count(EOS) == harmless_ids.count(EOS) == 4
    assert frontend.tokenizer.decode(evil_ids, False).replace(
        evil, "@"
    ) == frontend.tokenizer.decode(harmless_ids, False).replace(evil, "@").replace(harmless, "@")


BAD_TOOLS: list[tuple[dict[str, Any], str]] = [
    ({"tools": "x"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "\n"}}]}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": DEEP}}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}], "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "required"}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tools": TOOLS, "response_format": FORMAT}, "response_format"),
    ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [*ASK, {"role": "tool", "content": "a"}]}, "messages[1].role"),
    ({"messages": [*ASK, {"role": "assistant", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": CALLED[1]["tool_calls"]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[" * 9000}}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a":' * 100 + "1" + "}" * 100}}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": 5}]}]}, "messages[0].tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD_TOOLS, ids=lambda value: ascii(value)[:40])
def test_bad_tools_are_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    body = json.dumps({"messages": ASK, "max_tokens": 4} | fields)
    answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    check_error(answer.status_code, answer.text, param)


# Parsers

NAMES = ("f", "g")
OUTPUTS: list[tuple[str, str, str | None, list[tuple[str, str]]]] = [
    ("hermes", 'Hi <tool_call>\n{"name": "f", "arguments": {"a": "x}<y\\"", "b": [1,{"c":2}]}}\n</tool_call>\n<tool_call>{"arguments":{"q":1},"name":"g"}</tool_call> bye', "Hi bye", [("f", '{"a": "x}<y\\"", "b": [1,{"c":2}]}'), ("g", '{"q":1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, [("other", "{}")]),
    ("hermes", "<tool_call>not json</tool_call> x", "<tool_call>not json</tool_call> x", []),
    ("hermes", "a < b <tool_c", "a < b <tool_c", []),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":', None, [("f", '{"a":')]),
    ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', None, [("f", '{"a":1}')]),
    ("hermes", '<tool_call>{"name":"f","arguments":null}</tool_call>', None, [("f", "{}")]),
    ("hermes", '<tool_call>{"name":5}</tool_call>', '<tool_call>{"name":5}</tool_call>', []),
    ("hermes", '<tool_call>{"name":"\\ud800"}', '<tool_call>{"name":"\\ud800"}', []),
    ("hermes", '<tool_call>{"name":"f"', None, [("f", "")]),
    ("hermes", '<tool_call>{"na', '<tool_call>{"na', []),
    ("hermes", '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    ("hermes", "  text  ", "  text  ", []),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', None, [("f", '{"a": 1}'), ("g", "{}")]),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", 'so {"name": "f"}', 'so {"name": "f"}', []),
    ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', None, [("f", '{"a": 1}')]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', None, [("f", '{"a": 1}'), ("g", "{}")]),
    ("mistral", ' [{"name": "f", "arguments": {"a": 1}}]', None, [("f", '{"a": 1}')]),
    ("mistral", "[1, 2, 3] is a list", "[1, 2, 3] is a list", []),
    ("mistral", '[{"x": 1}, {"y": 2}]', '[{"x": 1}, {"y": 2}]', []),
    ("mistral", 'text [TOOL_CALLS] [{"name": "f", "arguments": {}}]', "text", [("f", "{}")]),
]  # fmt: skip


def parser_of(name: str) -> ToolParser:
    return ToolParser(FORMATS[name], NAMES, True)


def pieces(parser: ToolParser, texts: list[str]) -> tuple[str | None, list[tuple[str, str]]]:
    content, calls = "", []
    for delta in [d for text in texts for d in parser.push(text)] + parser.end():
        content += delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append([call["function"]["name"], call["function"]["arguments"]])
            else:
                calls[call["index"]][1] += call["function"]["arguments"]
    return content or None, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), OUTPUTS)
def test_calls_are_read_however_they_come(
    name: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    message = whole_message(parser_of(name), text)
    assert (message["content"] or None, len(message.get("tool_calls", []))) == (content, len(calls))
    for seed in range(40):
        generator, texts, place = random.Random(seed), [], 0
        while place < len(text):
            size = generator.randint(1, 1 + seed // 4)
            texts.append(text[place : place + size])
            place += size
        assert pieces(parser_of(name), texts) == (content, calls)


@given(
    st.sampled_from(list(FORMATS)),
    st.text('{}[]":,\\ nafx1<>/_tolc;', max_size=60),
    st.integers(1, 7),
)
def test_no_output_breaks_a_parser(name: str, text: str, size: int) -> None:
    """Whole and in pieces the same; without a call the content is the text, character for character."""
    text = text.replace("tc", "<tool_call>").replace("nx", '{"name": "f", "arguments": {')
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    content, calls = pieces(parser_of(name), cut)
    assert (content, calls) == pieces(parser_of(name), [text])
    if not calls:
        assert (content or "") == text


HOSTILE = [
    "<tool_call>", "<tool_call>{", '<tool_call>{"name":"f",x}', "{", '{"a":', "<", "<tool_cal", "[", " ", "x ",
    '\\"', "</tool_call>", '<tool_call>{"name":"f","arguments":{}}</tool_call>', '[TOOL_CALLS][{"name":"f"}]',
]  # fmt: skip
OPENINGS = [
    "",
    '<tool_call>{"name":"',
    '<tool_call>{"name":"f","arguments":{"a":"',
    '[{"name":"f","arguments":"',
]


@pytest.mark.parametrize("name", FORMATS)
def test_hostile_outputs_take_linear_work(name: str) -> None:
    """Lines of Python that are run, for an output and one twice as long; and 100 KB come to an end."""

    def lines_of(text: str) -> int:
        count = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            return trace

        parser = parser_of(name)
        sys.settrace(trace)
        try:
            for i in range(0, len(text), 5):
                parser.push(text[i : i + 5])
            parser.end()
        finally:
            sys.settrace(None)
        return count

    for opening in OPENINGS:
        for piece in HOSTILE:
            short, long = (lines_of(opening + piece * (n // len(piece))) for n in (200, 400))
            assert long < 2.3 * short + 50, (opening, piece)
            text = opening + piece * (100_000 // len(piece))
            parser = parser_of(name)
            for i in range(0, len(text), 64):
                parser.push(text[i : i + 64])
            parser.end()


# The real model


@pytest.mark.long
def test_the_embedded_model_end_to_end() -> None:
    """OpenAI's client, the server in a process of its own, a template without tools."""
    with running_server(PART, "--model", "smollm2-135m", "--max-model-len", "1024") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        kwargs: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 80}
        question = [{"role": "user", "content": "What is the capital of France? Answer in JSON."}]
        schema = {
            "type": "object",
            "properties": {"capital": {"type": "string", "maxLength": 20}},
            "required": ["capital"],
            "additionalProperties": False,
        }
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = client.chat.completions.create(messages=question, response_format=wanted, **kwargs)
        assert "Paris" in json.loads(answer.choices[0].message.content)["capital"]
        answer = client.chat.completions.create(
            messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **kwargs
        )
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert "Rome" in json.loads(call.function.arguments)["city"]
