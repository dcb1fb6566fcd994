"""What part 07 says over HTTP of its prefix cache, and the salt that keeps tenants apart.

Token ids and a random model, in a thread of this process, so that the tests see the engine too.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.http.run import ServerConfig
from common.testing.http import check_error
from common.testing.parts import PARTS, engine_of, module_of
from common.testing.server import serving_thread

MODEL = "random:tiny-llama"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = [(7 * i) % 500 + 2 for i in range(30)]  # blocks of 4: at most 28 of its tokens are found
BASE: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", params=["hash", "radix"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """(base URL, engine) of part 07."""
    config = {"prefix_cache": request.param, "num_blocks": 256, "block_size": 4, "max_num_seqs": 8}
    engine = engine_of(7, MODEL, threads=1, **config)
    with serving_thread(module_of(7, "server").create_app(engine, ServerConfig(port=0))) as url:
        yield url, engine


@pytest.fixture
def client(served: tuple[str, Any]) -> Iterator[httpx.Client]:
    """A client of the server, whose cache is empty."""
    url, engine = served
    cache = engine.scheduler.cache
    cache.pool.free(cache.allocate(cache.num_free))  # which forgets all
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def usage(client: httpx.Client, path: str = COMPLETIONS, **change: Any) -> dict[str, Any]:
    """The usage of an answer, whole or streamed; the chunks before the last have none."""
    body = {name: value for name, value in {**BASE, **change}.items() if value is not ...}
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()["usage"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert len(chunks) >= 4 and all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    return last["usage"]


def cached(*args: Any, **change: Any) -> int:
    return usage(*args, **change)["prompt_tokens_details"]["cached_tokens"]


# What usage says.


@pytest.mark.parametrize("stream", [False, True])
def test_usage_says_what_was_found(client: httpx.Client, stream: bool) -> None:
    for found in (0, 28):
        assert usage(client, stream=stream) == {
            "prompt_tokens": 30,
            "completion_tokens": 4,
            "total_tokens": 34,
            "prompt_tokens_details": {"cached_tokens": found},
        }
    assert cached(client, stream=not stream) == 28
    assert cached(client, stream=stream, prompt=PROMPT[:9] + [3] * 9) == 8
    assert cached(client, stream=stream, prompt=[3, *PROMPT]) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_choices_of_a_prompt_count_once(client: httpx.Client, stream: bool) -> None:
    """As its tokens do: `cached_tokens` is never more than `prompt_tokens`."""
    change = {"n": 3, "temperature": 1, "seed": 5, "stream": stream}
    usage(client)
    answer = usage(client, **change)
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (30, 12)
    assert answer["prompt_tokens_details"] == {"cached_tokens": 28}


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_summed(client: httpx.Client, stream: bool) -> None:
    """Each with what was found for its first choice, whoever ends first."""
    usage(client, prompt=PROMPT)
    usage(client, prompt=PROMPT[10:])
    prompts = [PROMPT, [3] * 10, PROMPT[10:], PROMPT[:13]]
    for n in (1, 2):
        answer = usage(client, prompt=prompts, n=n, stream=stream)
        assert answer["prompt_tokens"] == 30 + 10 + 20 + 13
        assert answer["completion_tokens"] == 4 * 4 * n
        found = 28 + (0 if n == 1 else 8) + 16 + 12
        assert answer["prompt_tokens_details"] == {"cached_tokens": found}


def test_a_client_that_stops_reading_is_told_nothing_wrong(client: httpx.Client) -> None:
    """Its request is aborted; what it had computed is found by the next."""
    body = {**BASE, "stream": True, "max_tokens": 400}
    with client.stream("POST", COMPLETIONS, json=body) as answer:
        next(answer.iter_lines())
    assert cached(client) == 28


def test_chats_say_it_too() -> None:
    """With a tokenizer. The second question of a conversation finds the first and its answer."""
    engine = engine_of(7, "smollm2-135m", threads=2, num_blocks=64, max_num_seqs=4)
    cache = engine.scheduler.cache
    cache.pool.free(cache.allocate(cache.num_free))
    messages = [{"role": "user", "content": "Say: one, two, three, four, five, six."}]
    with serving_thread(module_of(7, "server").create_app(engine, ServerConfig(port=0))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        kwargs = {"model": "smollm2-135m", "temperature": 0, "max_tokens": 12}

        def ask(**change: Any) -> Any:
            return client.chat.completions.create(messages=messages, **{**kwargs, **change})

        first = ask()
        length = first.usage.prompt_tokens
        assert first.usage.prompt_tokens_details.cached_tokens == 0 and length > 32
        *_, last = ask(stream=True, stream_options={"include_usage": True}, n=2, temperature=1)
        assert last.usage.prompt_tokens_details.cached_tokens == (length - 1) // 16 * 16
        messages += [
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "And then?"},
        ]
        found = ask().usage.prompt_tokens_details.cached_tokens
        assert found >= length // 16 * 16
        for salt in ("alice", "bob"):
            assert (
                ask(extra_body={"cache_salt": salt}).usage.prompt_tokens_details.cached_tokens == 0
            )
        again = ask(extra_body={"cache_salt": "alice"}, stop=["e"])
        assert again.usage.prompt_tokens_details.cached_tokens >= found


# What Prometheus reads.


def counters(client: httpx.Client) -> dict[str, float]:
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "num_preemptions")
    found = {name: families[f"vllm:{name}"] for name in names}
    assert all(family.type == "counter" for family in found.values())
    samples = {name: family.samples for name, family in found.items()}
    assert all(len(of) == 1 and of[0].name.endswith("_total") for of in samples.values())
    return {name: of[0].value for name, of in samples.items()}


def test_queries_and_hits_are_counted_in_tokens(client: httpx.Client) -> None:
    """Every choice asks by itself: it is a request of its own to the engine."""
    before = counters(client)

    def grown() -> tuple[float, float]:
        now = counters(client)
        names = ("prefix_cache_queries", "prefix_cache_hits")
        return tuple(now[name] - before[name] for name in names)

    usage(client)
    assert grown() == (30, 0)
    usage(client, stream=True)
    assert grown() == (60, 28)
    usage(client, n=3)
    assert grown() == (150, 28 + 3 * 28)
    usage(client, prompt=[[3] * 9, PROMPT[:8]])
    assert grown() == (167, 4 * 28 + 4)
    usage(client, cache_salt="x")
    assert grown() == (197, 4 * 28 + 4)
    assert counters(client)["prompt_tokens"] - before["prompt_tokens"] == 197


def test_parts_without_a_cache_do_not_count_it() -> None:
    engine = engine_of(6, MODEL, threads=1)
    with serving_thread(module_of(6, "server").create_app(engine, ServerConfig(port=0))) as url:
        assert "prefix_cache" not in httpx.get(f"{url}/metrics").text


# The salt.


@pytest.mark.parametrize("stream", [False, True])
def test_salts_never_share(client: httpx.Client, stream: bool) -> None:
    """Not with each other, and not with those who give none."""
    salts = ["alice", "bob", "Alice", "alice ", "ä", "a" * 256, "a" * 255 + "b", "\0", ...]
    for found in (0, 28):
        for salt in salts:
            assert cached(client, cache_salt=salt, stream=stream) == found, salt
    assert cached(client, cache_salt=None) == 28, "null is none"
    assert cached(client, cache_salt="carol", n=2) == 0


def test_answers_do_not_depend_on_the_salt(client: httpx.Client) -> None:
    texts = set()
    for change in ({}, {}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}):
        body = {**BASE, "temperature": 1, "seed": 7, "max_tokens": 12, "logprobs": 0, **change}
        [choice] = client.post(COMPLETIONS, json=body).json()["choices"]
        texts.add(tuple(choice["logprobs"]["tokens"]))
    assert len(texts) == 1


def test_openais_client_passes_a_salt(served: tuple[str, Any], client: httpx.Client) -> None:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as sdk:
        for salt, found in (("alice", 0), ("bob", 0), ("alice", 28)):
            answer = sdk.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=4, extra_body={"cache_salt": salt}
            )
            assert answer.usage.prompt_tokens_details.cached_tokens == found, salt
        with pytest.raises(openai.BadRequestError, match="cache_salt"):
            sdk.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=4, extra_body={"cache_salt": ""}
            )


BAD_SALTS = [
    "",
    "x" * 257,
    "x" * 100_000,
    5,
    0,
    1.5,
    True,
    False,
    [],
    ["x"],
    {},
    {"x": "y"},
    "\ud800",
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("salt", BAD_SALTS, ids=lambda salt: ascii(salt)[:20])
def test_bad_salts_are_refused_by_name(client: httpx.Client, path: str, salt: Any) -> None:
    body = {name: value for name, value in BASE.items() if path == COMPLETIONS or name != "prompt"}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": "hi"}]
    headers = {"Content-Type": "application/json"}
    content = json.dumps(body | {"cache_salt": salt})  # ASCII, which httpx would not make it
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code == 400
    check_error(answer.status_code, answer.text, "cache_salt")
    if path == COMPLETIONS:
        assert cached(client) == 0, "nothing of a refused request was run"


@pytest.mark.parametrize("part", range(1, 7))
def test_parts_without_a_cache_refuse_a_salt(part: int) -> None:
    """Who thinks that it separates tenants must not be left in the belief."""
    engine = engine_of(part, MODEL, threads=1)
    app = module_of(part, "server").create_app(engine, ServerConfig(port=0))
    with serving_thread(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        for stream in {False, part > 1}:
            answer = client.post(COMPLETIONS, json=BASE | {"cache_salt": "a", "stream": stream})
            error = check_error(answer.status_code, answer.text, "cache_salt")
            assert answer.status_code == 400
            assert error["message"] == "cache_salt is not supported by this part; part 07 has it"
        answer = client.post(COMPLETIONS, json=BASE | {"cache_salt": None})
        assert answer.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


@pytest.mark.parametrize("part", [part for part in PARTS if part > 7])
def test_later_parts_keep_it(part: int) -> None:
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, block_size=4, max_num_seqs=8)
    app = module_of(part, "server").create_app(engine, ServerConfig(port=0))
    with serving_thread(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        salts = ["alice", "bob", "alice", ..., ...]
        found = [cached(client, cache_salt=salt, max_tokens=1) for salt in salts]
        assert found == [0, 0, 28, 0, 28]
