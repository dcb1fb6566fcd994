"""The acceptance test of every part: OpenAI's own client against the real server and a real model."""

import subprocess
from collections.abc import Iterator

import openai
import pytest

from common.testing.parts import http_parts
from common.testing.server import running_server

MODEL = "smollm2-135m"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module", params=http_parts(), ids=lambda part: f"part{part:02d}")
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, str]]:
    """(part, base URL) of a running server with the embedded model."""
    with running_server(request.param, "--model", MODEL) as url:
        yield request.param, url


@pytest.fixture
def client(server: tuple[int, str]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12
    )
    [choice] = answer.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.prompt_tokens == 37 and 0 < usage.completion_tokens <= 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_completions_of_text_tokens_and_lists(client: openai.OpenAI) -> None:
    """Text and its token ids are one prompt; a list gives one choice each, in order."""
    kwargs = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    text = client.completions.create(prompt="The capital of France is", **kwargs)
    assert text.choices[0].text.startswith(" Paris")
    ids = client.completions.create(prompt=[504, 3575, 282, 4649, 314], **kwargs)
    assert ids.choices[0].text == text.choices[0].text
    both = client.completions.create(prompt=["The capital of France is", "1, 2, 3,"], **kwargs)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == text.choices[0].text
    assert both.usage.completion_tokens == 8


def test_stream_is_the_whole_answer_in_pieces(server: tuple[int, str], client) -> None:
    """Same text, finish reason and usage; part 01 refuses instead."""
    part, _ = server
    kwargs = {"model": MODEL, "messages": MESSAGES, "temperature": 0.8, "seed": 5, "max_tokens": 20}
    if part == 1:
        with pytest.raises(openai.BadRequestError, match="stream is not supported"):
            client.chat.completions.create(stream=True, **kwargs)
        return
    whole = client.chat.completions.create(**kwargs)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(stream=True, stream_options=options, **kwargs))
    *body, last = chunks
    assert last.choices == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):  # cached ones differ
        assert getattr(last.usage, name) == getattr(whole.usage, name)
    assert body[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in body)
    assert text == whole.choices[0].message.content
    assert body[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(body) > 10, "one chunk a token, not one a completion"


def test_stop_and_unicode(server: tuple[int, str], client: openai.OpenAI) -> None:
    """A stop string is cut; with logprobs every token's bytes join to the text."""
    kwargs = {"model": MODEL, "prompt": "😀 日本語 naïve 😀 日本語 naïve 😀 日本", "temperature": 0}
    free = client.completions.create(max_tokens=16, **kwargs).choices[0].text
    assert "�" not in free[:-1]
    stop = free[2:5]
    cut = client.completions.create(max_tokens=16, stop=[stop], **kwargs).choices[0]
    assert cut.text == free[: free.index(stop)] and cut.finish_reason == "stop"
    if server[0] > 1:
        stream = client.completions.create(max_tokens=16, stream=True, **kwargs)
        pieces = [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == free
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    joined = bytes(byte for item in content for byte in item.bytes).decode()
    assert joined.startswith(answer.choices[0].message.content)
    assert all(len(item.top_logprobs) == 2 for item in content)


def test_n_completions(server: tuple[int, str], client: openai.OpenAI) -> None:
    """n choices of one prompt, with noise of their own; parts that run one at a time refuse."""
    part, _ = server
    kwargs = {"model": MODEL, "messages": MESSAGES, "seed": 1, "max_tokens": 10, "n": 3}
    if part < 4:
        with pytest.raises(openai.BadRequestError, match="n must be"):
            client.chat.completions.create(**kwargs)
        return
    whole = client.chat.completions.create(**kwargs)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.usage.prompt_tokens == 37, "a prompt counts once"
    assert 10 < whole.usage.completion_tokens <= 30
    pieces = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **kwargs):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == texts
    one = client.chat.completions.create(**(kwargs | {"n": 1}))
    assert one.choices[0].message.content == texts[0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 1000}, "n"),
        ({"messages": []}, "messages"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_refusals_reach_the_client_as_its_own_errors(client, change: dict, param: str) -> None:
    kwargs = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**kwargs)
    assert caught.value.param == param and param in caught.value.message


def test_curl(server: tuple[int, str]) -> None:
    """The README's command line."""
    body = '{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}'
    command = ["curl", "-sf", f"{server[1]}/v1/chat/completions", "-d", body]
    result = subprocess.run(
        [*command, "-H", "Content-Type: application/json"], capture_output=True, text=True
    )
    assert result.returncode == 0 and '"finish_reason":"length"' in result.stdout
