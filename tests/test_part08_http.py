"""What part 08 says over HTTP of its drafts, and how a request does without them.

Token ids and tiny models, in a thread of this process, so that the tests see the engine too. Two
servers: at one a twin of the model drafts, which is always right but where it is made to slip; at
the other the model says one text again and again, and n-grams draft it. So it is known which drafts
stay, and where in a draft an answer ends.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from common.http.run import ServerConfig
from common.models.checkpoint import resolve
from common.models.tokenizer import Tokenizer
from common.testing.http import check_error
from common.testing.oracle import check_greedy
from common.testing.parts import PARTS, engine_of, module_of
from common.testing.server import serving_thread

MODEL = "random:tiny-llama"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MOST = 5  # tokens of a draft
SLIP = 7  # of so many tokens of a text, one is drafted wrong
PROMPT = [(7 * i) % 500 + 2 for i in range(16)]
REAL: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
TEXT = "ab€cd.\n"  # what the other model repeats, byte by byte; € has three of them


class Answer:
    """A completion of one choice, whole or streamed, put together."""

    def __init__(self, pieces: list[dict[str, Any]], usage: dict[str, Any]) -> None:
        choices = [choice for piece in pieces for choice in piece["choices"]]
        logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        self.num_chunks, self.usage = len(pieces), usage
        self.text = "".join(choice["text"] for choice in choices)
        self.reason = choices[-1]["finish_reason"]
        self.tokens, self.values, self.tops, self.offsets = (
            [item for entry in logprobs for item in entry[name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )

    @property
    def drafts(self) -> tuple[int, int]:
        """How many draft tokens were accepted, and how many rejected."""
        details = dict(self.usage["completion_tokens_details"])
        accepted, rejected, rate, length = (
            details.pop(name)
            for name in (
                "accepted_prediction_tokens",
                "rejected_prediction_tokens",
                "acceptance_rate",
                "mean_accepted_length",
            )
        )
        assert not details
        assert rate == round(accepted / (accepted + rejected), 4)
        assert length == 0 if accepted == 0 else 0 < length <= MOST
        return accepted, rejected


def ask(client: httpx.Client, body: dict[str, Any], stream: bool = False) -> Answer:
    if stream:
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    if not stream:
        return Answer([answer.json()], answer.json()["usage"])
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    *chunks, last = map(json.loads, lines)
    assert all(chunk["usage"] is None for chunk in chunks) and last["choices"] == []
    return Answer(chunks, last["usage"])


def drafting_engine(**flags: Any) -> Any:
    """It drafts in every step, as much as there is room for."""
    config = module_of(8, "config").EngineConfig(
        model=MODEL,
        threads=1,
        num_blocks=128,
        block_size=4,
        max_num_seqs=8,
        num_speculative_tokens=MOST,
        **flags,
    )
    engine = module_of(8, "engine").LLMEngine(config)
    engine.speculator.lengths.choose = lambda sequences, limits, num_tokens: list(limits)
    return engine


def make_it_slip(proposer: Any) -> None:
    """Let the drafts be wrong at each text's every so many'th place."""
    propose = proposer.propose

    def slipping(sequences: list[Any], max_lengths: list[int]) -> list[Any]:
        drafts = propose(sequences, max_lengths)
        for sequence, draft in zip(sequences, drafts, strict=True):
            for place, token_id in enumerate(draft.token_ids, start=sequence.num_tokens):
                if place % SLIP == 0:
                    draft.token_ids[place - sequence.num_tokens] = token_id ^ 1
        return drafts

    proposer.propose = slipping


def serve(engine: Any, part: int = 8) -> Any:
    return serving_thread(module_of(part, "server").create_app(engine, ServerConfig(port=0)))


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Any]]:
    """(base URL, engine) of the server whose drafts are right but in places."""
    engine = drafting_engine(speculative="draft", draft_model=MODEL)
    make_it_slip(engine.speculator.proposer)
    with serve(engine) as url:
        yield url, engine


@pytest.fixture
def client(served: tuple[str, Any]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served[0], timeout=60) as client:
        yield client
    served[1].check_integrity()


# What usage says.


def counts(engine: Any) -> tuple[int, int]:
    """Accepted and rejected tokens of all drafts so far."""
    stats = engine.stats()
    accepted = stats["num_accepted_tokens"]
    return accepted, stats["num_draft_tokens"] - accepted


@pytest.mark.parametrize("stream", [False, True])
def test_usage_counts_drafts(served: tuple[str, Any], client: httpx.Client, stream: bool) -> None:
    before = counts(served[1])
    answer = ask(client, REAL, stream)
    accepted, rejected = answer.drafts
    assert accepted > 0 and rejected > 0
    assert (before[0] + accepted, before[1] + rejected) == counts(served[1])
    assert accepted < answer.usage["completion_tokens"] == 24
    assert answer.usage["total_tokens"] == len(PROMPT) + 24
    assert answer.drafts == ask(client, REAL, not stream).drafts


@pytest.mark.parametrize("stream", [False, True])
def test_usage_sums_over_prompts_and_choices(
    served: tuple[str, Any], client: httpx.Client, stream: bool
) -> None:
    before = counts(served[1])
    body = {**REAL, "prompt": [PROMPT, PROMPT[5:12]], "n": 2, "temperature": 0.5, "seed": 4}
    usage = ask(client, body, stream).usage
    assert usage["completion_tokens"] == 4 * 24
    details = usage["completion_tokens_details"]
    now = counts(served[1])
    assert details["accepted_prediction_tokens"] == now[0] - before[0] > 0
    assert details["rejected_prediction_tokens"] == now[1] - before[1] > 0


def test_openais_client_reads_it(served: tuple[str, Any]) -> None:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as sdk:
        body = {"ignore_eos": True}
        kwargs = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        details = sdk.completions.create(**kwargs, extra_body=body).usage.completion_tokens_details
        assert details.accepted_prediction_tokens > 0
        body["speculative"] = False
        usage = sdk.completions.create(**kwargs, extra_body=body).usage
        assert usage.completion_tokens_details is None and usage.completion_tokens == 24


# A request that wants none.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("change", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "seeded"])
def test_without_drafts_the_same_tokens(
    served: tuple[str, Any], client: httpx.Client, change: dict[str, Any], stream: bool
) -> None:
    body = {**REAL, **change, "logprobs": 2}
    with_drafts = ask(client, body, stream)
    before = counts(served[1])
    without = ask(client, body | {"speculative": False}, stream)
    assert counts(served[1]) == before
    assert with_drafts.drafts[0] > 0 and with_drafts.drafts[1] > 0
    assert "completion_tokens_details" not in without.usage
    assert with_drafts.tokens == without.tokens and len(without.tokens) == 24
    assert with_drafts.values == pytest.approx(without.values, abs=1e-4)
    token_ids = [int(token.removeprefix("token_id:")) for token in without.tokens]
    if not change:
        assert check_greedy(MODEL, [(PROMPT, token_ids)]).is_right
    if stream:
        assert without.num_chunks == 24 > with_drafts.num_chunks


@pytest.mark.parametrize("value", [True, None])
def test_who_asks_for_drafts_has_them(client: httpx.Client, value: bool | None) -> None:
    assert ask(client, REAL | {"speculative": value}).drafts == ask(client, REAL).drafts


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_have_no_drafts(client: httpx.Client, penalty: str) -> None:
    for value in (True, None):
        usage = ask(client, REAL | {penalty: 0.5, "speculative": value}).usage
        assert "completion_tokens_details" not in usage
        assert usage["completion_tokens"] == 24


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "value", [0, 1, 1.0, "true", "ngram", "", [], [True], {}, {"type": "ngram"}], ids=repr
)
def test_wrong_types_are_refused_by_name(client: httpx.Client, path: str, value: Any) -> None:
    messages = {"messages": [{"role": "user", "content": "hi"}]}
    answer = client.post(
        path, json=(REAL if path == COMPLETIONS else messages) | {"speculative": value}
    )
    assert answer.status_code == 400
    check_error(answer.status_code, answer.text, "speculative")


@pytest.mark.parametrize("part", PARTS)
def test_a_server_without_drafts_says_so(part: int) -> None:
    """Who asks for them must not believe to have them; who does not want them has his wish."""
    engine = engine_of(part, MODEL, threads=1)
    with serve(engine, part) as url, httpx.Client(base_url=url, timeout=60) as client:
        for stream in {False, part > 1}:
            answer = client.post(COMPLETIONS, json=REAL | {"speculative": True, "stream": stream})
            assert answer.status_code == 400
            error = check_error(answer.status_code, answer.text, "speculative")
            assert error["message"].endswith("part 08 has it, with --speculative")
        for value in (False, None):
            usage = ask(client, REAL | {"max_tokens": 2, "speculative": value}).usage
            assert "completion_tokens_details" not in usage and usage["completion_tokens"] == 2
        if part >= 4:
            assert "spec_decode" not in client.get("/metrics").text


# What Prometheus reads.


def counters(client: httpx.Client) -> list[float]:
    """Drafts, their tokens, those that stayed; and the tokens of all answers."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = {family.name: family for family in families}
    drafts = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    names = [*(f"vllm:spec_decode_{name}" for name in drafts), "vllm:generation_tokens"]
    for name in names:
        assert found[name].type == "counter"
        assert [sample.name for sample in found[name].samples] == [f"{name}_total"]
    return [found[name].samples[0].value for name in names]


@pytest.mark.parametrize("stream", [False, True])
def test_counters(served: tuple[str, Any], client: httpx.Client, stream: bool) -> None:
    before = counters(client)
    answer = ask(client, REAL, stream)
    num_drafts, num_tokens, num_accepted, num_generated = (
        now - then for now, then in zip(counters(client), before, strict=True)
    )
    length = answer.usage["completion_tokens_details"]["mean_accepted_length"]
    assert length == round(num_accepted / num_drafts, 4)
    assert (num_accepted, num_tokens - num_accepted) == answer.drafts
    assert num_generated == 24
    num_drafts_ever, num_tokens_ever, num_accepted_ever, _ = counters(client)
    gauges = {
        "draft_acceptance_rate": num_accepted_ever / num_tokens_ever,
        "mean_accepted_length": num_accepted_ever / num_drafts_ever,
    }
    families = text_string_to_metric_families(client.get("/metrics").text)
    found = {family.name: family.samples[0].value for family in families if family.samples}
    for name, value in gauges.items():
        assert found[f"vllm:spec_decode_{name}"] == pytest.approx(value)
    assert 24 / (MOST + 1) <= num_drafts <= 24 - num_accepted, "a step has a draft or none"
    assert num_drafts <= num_tokens <= MOST * num_drafts
    before = counters(client)
    ask(client, REAL | {"speculative": False}, stream)
    now = counters(client)
    assert now[:3] == before[:3] and now[3] == before[3] + 24


# Several tokens a step: a model that repeats a text.


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each single byte."""
    ids = {}
    for token_id in range(512):
        token_bytes = tokenizer.token_bytes(token_id)
        if token_bytes is not None and len(token_bytes) == 1:
            ids.setdefault(token_bytes[0], token_id)
    return ids


@pytest.fixture(scope="module")
def repeating() -> Iterator[tuple[str, Any, list[int]]]:
    """(base URL, engine, token ids of the text); what follows the prompt is the text's begin."""
    engine = drafting_engine(speculative="ngram")
    engine.tokenizer = Tokenizer.load(resolve("smollm2-135m"))
    ids = byte_ids(engine.tokenizer)
    cycle = [ids[byte] for byte in TEXT.encode()]
    following = torch.zeros(engine.vocab_size, dtype=torch.int64)
    following[cycle] = torch.tensor(cycle[1:] + cycle[:1])

    def forward(batch: Any, what: Any = None) -> tuple[torch.Tensor, list[Any]]:
        token_ids = following[batch.token_ids[batch.logits_indices]]
        return 9.0 * torch.nn.functional.one_hot(token_ids, engine.vocab_size).float(), []

    engine.runner.forward = forward
    with serve(engine) as url:
        yield url, engine, cycle


@pytest.fixture
def body(repeating: tuple[str, Any, list[int]]) -> dict[str, Any]:
    return REAL | {"prompt": repeating[2] * 2, "max_tokens": 25}


@pytest.fixture
def repeats(repeating: tuple[str, Any, list[int]]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=repeating[0], timeout=60) as client:
        yield client
    assert repeating[1].stats()["num_used_blocks"] == 0
    repeating[1].check_integrity()


def said(num_tokens: int) -> str:
    """The text of so many tokens; a character that is not whole is one that cannot be read."""
    return (TEXT.encode() * 10)[:num_tokens].decode(errors="replace")


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_inside_of_a_draft(
    repeats: httpx.Client, body: dict[str, Any], stream: bool
) -> None:
    """Drafts end where an answer must: none of their tokens is beyond it."""
    for count in range(1, 26):
        answer = ask(repeats, body | {"max_tokens": count}, stream)
        assert (answer.text, answer.reason) == (said(count), "length")
        assert answer.usage["completion_tokens"] == count
        # A token after the prompt, and then steps of MOST drafts and a token more.
        num_steps = 1 + -(-(count - 1) // (MOST + 1))
        if count > 2:
            assert answer.drafts == (count - num_steps, 0)
        if stream:
            assert answer.num_chunks <= num_steps


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_inside_of_a_draft(
    repeats: httpx.Client, body: dict[str, Any], stream: bool
) -> None:
    """Each place where a stop string may end, in a step's tokens and over the border of two."""
    text = said(25)
    for begin in range(1, 15):
        for length in (1, 2, 5):
            stop = text[begin : begin + length]
            end = text.index(stop)
            answer = ask(repeats, body | {"stop": stop, "logprobs": 0}, stream)
            assert (answer.text, answer.reason) == (text[:end], "stop"), stop
            num_tokens = len((text[:end] + stop).encode())
            assert answer.usage["completion_tokens"] == len(answer.tokens) == num_tokens, stop
            place = num_tokens - 1  # of a token behind the first; each sixth is the model's own
            assert not place or answer.drafts[0] == place - place // (MOST + 1), stop
    answer = ask(repeats, body | {"stop": ["zz", "d.\nb"]}, stream)
    assert (answer.text, answer.reason) == (text, "length"), "one that begins and never comes"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_tokens_inside_of_a_draft(
    repeats: httpx.Client,
    body: dict[str, Any],
    repeating: tuple[str, Any, list[int]],
    stream: bool,
) -> None:
    """Here the engine itself ends in the middle of a step's tokens; the last one has no text."""
    for place, token_id in enumerate(repeating[2]):
        answer = ask(repeats, body | {"stop_token_ids": [token_id], "logprobs": 0}, stream)
        assert answer.usage["completion_tokens"] == len(answer.tokens) == place + 1
        assert answer.reason == "stop"
        assert answer.text == said(place)
        if place:  # the first token is the prompt's, then each sixth is the model's own
            accepted, rejected = answer.drafts
            assert accepted == place - place // (MOST + 1)
            assert accepted + rejected == MOST * -(-place // (MOST + 1))


def test_logprobs_belong_to_their_tokens(repeats: httpx.Client, body: dict[str, Any]) -> None:
    """Several in a chunk; text offsets go on from chunk to chunk."""
    bodies = [body | {"logprobs": count} for count in (0, 3)]
    for asked in bodies:
        whole, streamed = ask(repeats, asked), ask(repeats, asked, stream=True)
        plain = ask(repeats, asked | {"speculative": False}, stream=True)
        assert whole.tokens == streamed.tokens == plain.tokens and len(whole.tokens) == 25
        assert whole.offsets == streamed.offsets == plain.offsets
        assert streamed.num_chunks == 5 < plain.num_chunks
        assert whole.values == streamed.values == plain.values
        for answer in (whole, streamed, plain):
            assert answer.text == said(25)
            for token, value, top in zip(answer.tokens, answer.values, answer.tops, strict=True):
                assert top[token] == value == max(top.values())
                assert len(top) == max(asked["logprobs"], 1)


@pytest.mark.parametrize("temperature", [0, 1])
def test_logprobs_of_the_real_model(client: httpx.Client, temperature: float) -> None:
    """Where drafts are rejected too: each entry is that of its token, at its place."""
    body = REAL | {"temperature": temperature, "seed": 3, "logprobs": 4, "max_tokens": 40}
    answers = [ask(client, body, stream) for stream in (False, True)]
    plain = ask(client, body | {"speculative": False})
    for answer in answers:
        assert answer.drafts[0] > 0 and answer.drafts[1] > 0
        assert answer.tokens == plain.tokens
        assert answer.values == pytest.approx(plain.values, abs=1e-4)
        for token, value, top, expected in zip(
            answer.tokens, answer.values, answer.tops, plain.tops, strict=True
        ):
            assert top[token] == value
            assert top == pytest.approx(expected, abs=1e-4)


def test_a_client_that_stops_reading(
    repeats: httpx.Client, body: dict[str, Any], repeating: tuple[str, Any, list[int]]
) -> None:
    """Its request is aborted with drafts in it, and the next is answered as ever."""
    with repeats.stream("POST", COMPLETIONS, json=body | {"max_tokens": 400, "stream": True}) as it:
        next(it.iter_lines())
    answer = ask(repeats, body)
    assert (answer.text, answer.drafts) == (said(25), (20, 0))
    deadline = time.monotonic() + 60
    while repeating[1].has_unfinished() and time.monotonic() < deadline:
        time.sleep(0.01)
