"""OpenAI's wire format: what a request means, what is refused, and answers its own types accept."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import openai.types
import openai.types.chat
import pytest
from pydantic import BaseModel, ValidationError

from common.completions import Completion, Delta, OutputProcessor, RequestOutput, TokenLogprobs
from common.http import neutral
from common.http.errors import ApiError, field_error, internal_error
from common.http.responses import Job, to_json
from common.http.schemas import (
    MAX_KEYS,
    MAX_LOGPROBS_TOTAL,
    MAX_MESSAGES,
    ChatCompletionRequest,
    CompletionRequest,
    check_logprobs,
)
from common.models.checkpoint import resolve
from common.models.tokenizer import Tokenizer
from common.sampling import MAX_LOGPROBS, SamplingParams
from common.testing.threads import longest_wait

TOKENIZER = Tokenizer.load(resolve("smollm2-135m"))
assert TOKENIZER is not None
MESSAGES = [{"role": "user", "content": "Hi"}]


def completion_request(**fields: Any) -> CompletionRequest:
    """As it comes over the wire: through JSON."""
    return CompletionRequest.model_validate(json.loads(json.dumps({"prompt": "Hi", **fields})))


def chat_request(**fields: Any) -> ChatCompletionRequest:
    body = {"messages": MESSAGES, **fields}
    return ChatCompletionRequest.model_validate(json.loads(json.dumps(body)))


BOTH = pytest.mark.parametrize("request_of", [completion_request, chat_request])


class TestRequests:
    def test_defaults_of_completions(self) -> None:
        """OpenAI's and vLLM's: 16 tokens, temperature 1."""
        assert completion_request().sampling_params() == SamplingParams(max_tokens=16)

    def test_defaults_of_chat(self) -> None:
        """A chat goes on up to the context."""
        assert chat_request().sampling_params() == SamplingParams(max_tokens=None)

    FIELDS = (
        ("temperature", 0.5),
        ("temperature", 0),
        ("top_p", 0.5),
        ("top_k", 7),
        ("top_k", -1),
        ("min_p", 0.25),
        ("seed", -3),
        ("seed", 2**64 - 1),
        ("max_tokens", 5),
        ("ignore_eos", True),
        ("presence_penalty", -1.5),
        ("frequency_penalty", 2),
        ("n", 3),
    )

    @BOTH
    @pytest.mark.parametrize(("name", "value"), FIELDS)
    def test_every_field_arrives(self, request_of: Any, name: str, value: Any) -> None:
        params = request_of(**{name: value}).sampling_params()
        assert getattr(params, name) == value
        default = request_of().sampling_params()
        changed = [f for f in vars(params) if getattr(params, f) != getattr(default, f)]
        assert changed in ([name], []), "and no other"

    @BOTH
    def test_stops_arrive(self, request_of: Any) -> None:
        assert request_of(stop="a").sampling_params().stop == ("a",)
        assert request_of(stop=["a", "b"]).sampling_params().stop == ("a", "b")
        assert request_of(stop=[]).sampling_params().stop == ()
        assert request_of(stop_token_ids=[3, 4]).sampling_params().stop_token_ids == (3, 4)

    @BOTH
    def test_null_counts_as_not_given(self, request_of: Any) -> None:
        names = [name for name, _ in self.FIELDS]
        names += ["stop", "stop_token_ids", "logprobs", "stream", "stream_options", "model", "user"]
        request = request_of(**dict.fromkeys([*names, *neutral.CHAT]))
        request.check(streaming=False, max_n=1)
        assert request.sampling_params() == request_of().sampling_params()

    @BOTH
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", "hot"),
            ("temperature", True),
            ("temperature", [1]),
            ("top_p", "1"),
            ("top_k", 1.5),
            ("top_k", True),
            ("seed", 1.0),
            ("seed", "1"),
            ("max_tokens", 2.5),
            ("max_tokens", True),
            ("stop", 5),
            ("stop", [1]),
            ("stop", {"a": 1}),
            ("stop_token_ids", 5),
            ("stop_token_ids", [1.0]),
            ("stop_token_ids", [True]),
            ("ignore_eos", 1),
            ("ignore_eos", "true"),
            ("n", "1"),
            ("stream", 1),
            ("stream", "yes"),
            ("stream_options", True),
            ("stream_options", {"include_usage": 1}),
            ("stream_options", {"surprise": True}),
            ("model", 5),
        ],
    )
    def test_wrong_types_are_refused(self, request_of: Any, name: str, value: Any) -> None:
        with pytest.raises(ValidationError) as caught:
            request_of(**{name: value})
        assert caught.value.errors()[0]["loc"][0] == name

    @BOTH
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", -1),
            ("temperature", 10**400),
            ("top_p", 0),
            ("top_p", 1.5),
            ("top_k", -2),
            ("min_p", 2),
            ("seed", 2**64),
            ("max_tokens", 0),
            ("max_tokens", 10**400),
            ("stop", ""),
            ("stop", ["a"] * 17),
            ("stop_token_ids", [-1]),
            ("n", 0),
            ("presence_penalty", 3),
            ("frequency_penalty", -3),
        ],
    )
    def test_values_out_of_range_are_refused_by_name(
        self, request_of: Any, name: str, value: Any
    ) -> None:
        with pytest.raises(ApiError) as caught:
            request_of(**{name: value}).sampling_params()
        assert (caught.value.status, caught.value.param) == (400, name)
        assert caught.value.message.startswith(name)

    @BOTH
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("best_of", 2),
            ("best_of", True),
            ("use_beam_search", True),
            ("store", 0),
            ("suffix", "x"),
            ("length_penalty", 2.0),
            ("tools", [{"type": "function"}]),
            ("tool_choice", "required"),
            ("response_format", {"type": "json_object"}),
            ("modalities", ["text", "audio"]),
            ("user", 5),
            ("metadata", {"a": 1}),
            ("metadata", {f"key{i}": "" for i in range(17)}),
            ("repetition_penalty", 1.1),
            ("temprature", 0.5),
            ("x" * 1000, 1),
        ],
    )
    def test_what_is_not_supported_is_refused_by_name(
        self, request_of: Any, name: str, value: Any
    ) -> None:
        """Never ignored: a client that asked for JSON and got prose would not know why."""
        with pytest.raises(ApiError) as caught:
            request_of(**{name: value}).check(streaming=True, max_n=1)
        assert (caught.value.status, caught.value.code) == (400, "unsupported")
        assert caught.value.param == (name if len(name) <= 64 else name[:64] + "…")
        assert len(caught.value.message) < 200

    @BOTH
    def test_values_that_ask_for_nothing_are_taken(self, request_of: Any) -> None:
        texts = dict.fromkeys(neutral.NOTES, ("", "u-1")) | {"metadata": ({}, {"a": "b"})}
        for name, rule in request_of().rules.items():
            for value in texts[name] if callable(rule) else rule:
                request_of(**{name: value}).check(streaming=False, max_n=1)

    @BOTH
    def test_what_only_some_parts_can_do(self, request_of: Any) -> None:
        for fields, name in (
            ({"stream": True}, "stream"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
            ({"n": 2}, "n"),
        ):
            with pytest.raises(ApiError) as caught:
                request_of(**fields).check(streaming=False, max_n=1)
            assert (caught.value.status, caught.value.param) == (400, name)
        request_of(stream=False, n=1).check(streaming=False, max_n=1)
        options = {"include_usage": True}
        request_of(stream=True, stream_options=options, n=2).check(streaming=True, max_n=2)

    @pytest.mark.parametrize(
        ("prompt", "prompts"),
        [
            ("a", ["a"]),
            ([1, 2], [[1, 2]]),
            (["a", "b"], ["a", "b"]),
            ([[1], [2, 3]], [[1], [2, 3]]),
        ],
    )
    def test_every_form_of_prompt(self, prompt: Any, prompts: Any) -> None:
        assert completion_request(prompt=prompt).prompts() == prompts

    @pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [[1], []]])
    def test_empty_prompts(self, prompt: Any) -> None:
        with pytest.raises(ApiError, match="prompt must not be empty") as caught:
            completion_request(prompt=prompt).prompts()
        assert caught.value.param == "prompt"

    @pytest.mark.parametrize("prompt", [None, 5, {}, [1, "a"], [["a"]], [1.0], [True], [None]])
    def test_prompts_of_other_types(self, prompt: Any) -> None:
        with pytest.raises(ValidationError):
            completion_request(prompt=prompt)

    def test_forms_of_logprobs(self) -> None:
        for given in (None, 0, 5, MAX_LOGPROBS):
            assert completion_request(logprobs=given).sampling_params().logprobs == given
        for fields, wanted in (
            ({}, None),
            ({"logprobs": False}, None),
            ({"logprobs": True}, 0),
            ({"logprobs": True, "top_logprobs": 0}, 0),
            ({"logprobs": True, "top_logprobs": 5}, 5),
        ):
            assert chat_request(**fields).sampling_params().logprobs == wanted

    def test_wrong_forms_of_logprobs(self) -> None:
        for value in (True, "1", 1.0):
            with pytest.raises(ValidationError):
                completion_request(logprobs=value)
        for value in (-1, MAX_LOGPROBS + 1):
            with pytest.raises(ApiError) as caught:
                completion_request(logprobs=value).sampling_params()
            assert caught.value.param == "logprobs"
        for fields in ({"logprobs": 1}, {"logprobs": True, "top_logprobs": MAX_LOGPROBS + 1}):
            with pytest.raises(ValidationError):
                chat_request(**fields)
        for fields in ({"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 1}):
            with pytest.raises(ApiError) as caught:
                chat_request(**fields).sampling_params()
            assert caught.value.param == "top_logprobs"

    def test_two_names_for_one_limit(self) -> None:
        assert chat_request(max_tokens=5).sampling_params().max_tokens == 5
        assert chat_request(max_completion_tokens=6).sampling_params().max_tokens == 6
        both = chat_request(max_tokens=7, max_completion_tokens=7)
        assert both.sampling_params().max_tokens == 7
        with pytest.raises(ApiError, match=r"max_tokens \(5\) and max_completion_tokens \(6\)"):
            chat_request(max_tokens=5, max_completion_tokens=6).sampling_params()
        for value in (0, -4):
            with pytest.raises(ApiError, match=str(value)) as caught:
                chat_request(max_completion_tokens=value).sampling_params()
            assert caught.value.param == "max_completion_tokens"

    def test_completions_have_no_other_name_for_it(self) -> None:
        with pytest.raises(ApiError) as caught:
            completion_request(max_completion_tokens=5).check(streaming=True, max_n=1)
        assert caught.value.param == "max_completion_tokens"


class TestMessages:
    def texts(self, *messages: dict[str, Any]) -> list[dict[str, str]]:
        return [m.as_dict() for m in chat_request(messages=list(messages)).messages]

    def test_parts_are_joined_by_lines(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert self.texts({"role": "user", "content": parts}) == [
            {"role": "user", "content": "a\nb"}
        ]
        assert self.texts({"role": "user", "content": []})[0]["content"] == ""

    def test_developer_is_system(self) -> None:
        """The name newer clients use; no template of our models knows it."""
        assert self.texts({"role": "developer", "content": "x"})[0]["role"] == "system"

    def test_an_answer_that_a_client_dumped_is_taken_back(self) -> None:
        """`message.model_dump()` has a null for all that the answer did not have."""
        answer = openai.types.chat.ChatCompletionMessage(role="assistant", content="ok")
        dumped = answer.model_dump()
        assert None in dumped.values()
        assert self.texts(dumped) == [{"role": "assistant", "content": "ok"}]

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "user"},
            {"content": "a"},
            {"role": "tool", "content": "a"},
            {"role": "User", "content": "a"},
            {"role": "user", "content": None},
            {"role": "user", "content": 5},
            {"role": "user", "content": ["a"]},
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            {"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]},
            {"role": "user", "content": "a", "tool_calls": [{"id": "1"}]},
            {"role": "user", "content": "a", **{f"key{i}": 1 for i in range(MAX_KEYS)}},
            "hi",
            None,
        ],
    )
    def test_other_messages_are_refused(self, message: Any) -> None:
        with pytest.raises(ValidationError):
            chat_request(messages=[message])

    @pytest.mark.parametrize("messages", [[], None, {}, "hi", MESSAGES * (MAX_MESSAGES + 1)])
    def test_no_messages_and_too_many(self, messages: Any) -> None:
        with pytest.raises(ValidationError):
            chat_request(messages=messages)


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (404, "invalid_request_error"),
            (500, "server_error"),
            (503, "overloaded_error"),
        ],
    )
    def test_the_body(self, status: int, kind: str) -> None:
        error = ApiError(status, "no", param="n", code="c", headers={"Retry-After": "1"})
        assert error.body() == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}
        assert error.headers == {"Retry-After": "1"}

    def test_the_field_is_the_messages_first_word(self) -> None:
        assert field_error("top_p must be 1").param == "top_p"
        assert field_error("messages: no template").param == "messages"
        assert field_error("(what) is this").param is None

    def test_an_internal_error_says_nothing_of_the_inside(self) -> None:
        assert internal_error().body()["error"]["message"] == "internal server error"
        assert internal_error().status == 500


def job(chat: bool, tokenizer: Tokenizer | None = TOKENIZER, **fields: Any) -> Job:
    params = fields.pop("params", SamplingParams())
    values = {"prompts": [[1, 2, 3]], "stream": False, "include_usage": False, **fields}
    return Job(chat=chat, model="m", params=params, tokenizer=tokenizer, **values)


def whole_of(job: Job, *completions: Completion) -> dict[str, Any]:
    """The answer as the client reads it."""
    return json.loads(to_json(job.response(completions)))


def validated(model: type[BaseModel], value: dict[str, Any]) -> Any:
    """The value as OpenAI's own type: every field of the right type, and none that it lacks."""
    parsed = model.model_validate(json.loads(json.dumps(value, allow_nan=False)), strict=True)

    def check_known(item: Any) -> None:
        if isinstance(item, BaseModel):
            assert not item.model_extra, f"{type(item).__name__} has no {item.model_extra}"
            for name in type(item).model_fields:
                check_known(getattr(item, name))
        elif isinstance(item, list):
            for element in item:
                check_known(element)

    check_known(parsed)
    return parsed


def logprobs_of(token_ids: list[int]) -> list[TokenLogprobs]:
    """Two alternatives for each token: itself and its neighbour."""
    return [TokenLogprobs(id, -0.25, ((id, -0.25), (id + 1, -1.5))) for id in token_ids]


def run(
    token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer | None = TOKENIZER
) -> tuple[Completion, list[Delta]]:
    """A completion of these tokens, the last of which is an end of sequence."""
    output = OutputProcessor(tokenizer, params, [1] * 3)
    deltas = []
    for place, item in enumerate(logprobs_of(token_ids)):
        is_last = place == len(token_ids) - 1
        delta = output.process(
            RequestOutput("a", [item.token_id], [item], "stop" if is_last else None)
        )
        deltas.append(delta)
        if output.finished:
            break
    return output.completion(), deltas


TEXT_IDS = [*TOKENIZER.encode("naïve 😀👨‍👩‍👧 end"), 2]


class TestResponses:
    @pytest.mark.parametrize("logprobs", [None, 0, 2])
    def test_a_completion_is_openais(self, logprobs: int | None) -> None:
        completion, _ = run(TEXT_IDS, SamplingParams(logprobs=logprobs))
        answer = validated(openai.types.Completion, whole_of(job(chat=False), completion))
        [choice] = answer.choices
        assert choice.text == "naïve 😀👨‍👩‍👧 end"
        assert (choice.index, choice.finish_reason) == (0, "stop")
        assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "m", "cmpl-")
        assert (choice.logprobs is None) == (logprobs is None)

    @pytest.mark.parametrize("logprobs", [None, 0, 2])
    def test_a_chat_completion_is_openais(self, logprobs: int | None) -> None:
        completion, _ = run(TEXT_IDS, SamplingParams(logprobs=logprobs))
        value = whole_of(job(chat=True), completion)
        answer = validated(openai.types.chat.ChatCompletion, value)
        [choice] = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == "naïve 😀👨‍👩‍👧 end"
        assert (choice.index, choice.finish_reason) == (0, "stop")
        assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
        assert (choice.logprobs is None) == (logprobs is None)

    def test_usage_of_several_prompts(self) -> None:
        """Every prompt counts once, every completion by its tokens, and all in one sum."""
        prompts = [[1], [1, 2], [1, 2, 3]]
        completions = [
            Completion("", [7] * n, "length", i, len(prompt), num_cached_tokens=i)
            for i, (n, prompt) in enumerate(zip((5, 1, 9), prompts, strict=True))
        ]
        value = whole_of(job(chat=False, prompts=prompts), *completions)
        answer = validated(openai.types.Completion, value)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 15, 21)
        assert usage.prompt_tokens_details.cached_tokens == 3

    def test_a_prompt_counts_once_for_all_its_choices(self) -> None:
        two = job(chat=True, prompts=[[1, 2, 3]], params=SamplingParams(n=2))
        completions = [Completion("", [7, 7], "length", i, 3) for i in range(2)]
        assert two.num_choices == 2
        assert two.usage(completions)["prompt_tokens"] == 3
        assert two.usage(completions)["total_tokens"] == 7

    @pytest.mark.parametrize("chat", [True, False])
    def test_an_error_is_no_answer(self, chat: bool) -> None:
        good, bad = Completion("a", [1], "stop", 0, 3), Completion("a", [1], "error", 1, 3)
        with pytest.raises(ApiError) as caught:
            job(chat, prompts=[[1], [2]]).response([good, bad])
        assert caught.value.status == 500

    def test_logprobs_of_a_completion(self) -> None:
        completion, _ = run(TEXT_IDS, SamplingParams(logprobs=2))
        answer = validated(openai.types.Completion, whole_of(job(chat=False), completion))
        logprobs = answer.choices[0].logprobs
        assert logprobs.tokens == [TOKENIZER.token_name(id) for id in TEXT_IDS]
        assert logprobs.token_logprobs == [-0.25] * len(TEXT_IDS)
        for id, top in zip(TEXT_IDS, logprobs.top_logprobs, strict=True):
            assert top[TOKENIZER.token_name(id)] == -0.25
            assert set(top) == {TOKENIZER.token_name(id), TOKENIZER.token_name(id + 1)}

    def test_offsets_are_places_in_the_text(self) -> None:
        """Of text a client can cut there: whole tokens begin where it says."""
        completion, _ = run(TEXT_IDS, SamplingParams(logprobs=0))
        value = whole_of(job(chat=False), completion)["choices"][0]
        tokens, offsets = value["logprobs"]["tokens"], value["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)
        assert offsets[0] == 0 and offsets[-1] == len(value["text"])  # EOS comes after all of it
        whole = [
            (token, offset)
            for token, offset in zip(tokens[:-1], offsets, strict=False)
            if not token.startswith("bytes:")
        ]
        assert [token for token, _ in whole] == ["na", "ïve", " end"]
        for token, offset in whole:
            assert value["text"][offset:].startswith(token)

    def test_logprobs_of_a_chat(self) -> None:
        completion, _ = run(TEXT_IDS, SamplingParams(logprobs=2))
        value = whole_of(job(chat=True), completion)
        content = validated(openai.types.chat.ChatCompletion, value).choices[0].logprobs.content
        assert len(content) == len(TEXT_IDS)
        joined = b""
        for id, entry in zip(TEXT_IDS, content, strict=True):
            assert entry.token == TOKENIZER.token_name(id)
            assert entry.logprob == -0.25
            assert [top.logprob for top in entry.top_logprobs] == [-0.25, -1.5]
            assert entry.top_logprobs[1].bytes == TOKENIZER.token_bytes(id + 1)
            joined += bytes(entry.bytes)
        assert joined.decode() == "naïve 😀👨‍👩‍👧 end<|im_end|>"

    @pytest.mark.parametrize("chat", [True, False])
    def test_many_logprobs_leave_others_their_turn(self, chat: bool) -> None:
        """In a thread: as one call into C they would stop the event loop until all are written."""
        items = [TokenLogprobs(5, -1.5, tuple((id, -1.5) for id in range(20)))] * 5000
        completion = Completion("", [5] * len(items), "length", 0, 3, logprobs=items)
        answer = job(chat, None).response([completion])
        share = min(longest_wait(lambda: to_json(answer)) for _ in range(3))
        assert share < 0.5, share

    @pytest.mark.parametrize(
        ("lengths", "n", "max_tokens", "logprobs", "total"),
        [
            ([1], 128, 2000, 20, 5_376_000),
            ([1] * 128, 1, 4096, 0, 524_288),
            ([1] * 128, 1, 4097, 0, 524_416),
            ([96, 1096], 1, None, 4, 10 * (50_000 - 96 - 500)),
            ([96, 1096], 2, None, 4, 20 * (50_000 - 96 - 500)),
            ([1], 128, None, None, 0),
        ],
    )
    def test_logprobs_are_bounded(
        self, lengths: list[int], n: int, max_tokens: int | None, logprobs: int | None, total: int
    ) -> None:
        """n x prompts x max_tokens x (1 + top_logprobs), before anything is computed."""
        prompts = [[5] * length for length in lengths]
        params = SamplingParams(n=n, max_tokens=max_tokens, logprobs=logprobs)
        for chat, name in ((True, "top_logprobs"), (False, "logprobs")):
            if total <= MAX_LOGPROBS_TOTAL:
                check_logprobs(prompts, params, 50_000, chat)
                continue
            with pytest.raises(ApiError) as caught:
                check_logprobs(prompts, params, 50_000, chat)
            assert (caught.value.status, caught.value.param) == (400, name)
            for shown in (f"{name} ({logprobs})", f"n ({n})", "max_tokens (", f"be {total} log"):
                assert shown in caught.value.message

    def test_without_a_tokenizer(self) -> None:
        completion, _ = run([5, 6], SamplingParams(logprobs=1), tokenizer=None)
        value = whole_of(job(False, None), completion)
        choice = validated(openai.types.Completion, value).choices[0]
        assert (choice.text, choice.logprobs.tokens) == ("", ["token_id:5", "token_id:6"])
        value = whole_of(job(True, None), completion)
        choice = validated(openai.types.chat.ChatCompletion, value).choices[0]
        assert choice.logprobs.content[0].bytes is None


class TestStreams:
    def chunks(self, stream: Job, deltas: list[Delta]) -> list[dict[str, Any]]:
        return [stream.chunk(0, delta) for delta in deltas if stream.has_news(delta)]

    @pytest.mark.parametrize("stop", [(), ("zzz", " end of"), ("👩",), ("end",)])
    @pytest.mark.parametrize("logprobs", [None, 1])
    @pytest.mark.parametrize("tokenizer", [TOKENIZER, None])
    def test_completion_chunks_add_up_to_the_whole(
        self, stop: tuple[str, ...], logprobs: int | None, tokenizer: Tokenizer | None
    ) -> None:
        """Text, ids of the answer, logprobs and offsets: streamed they are what they are whole,
        also while text is held back because a stop string may have begun."""
        completion, deltas = run(TEXT_IDS, SamplingParams(logprobs=logprobs, stop=stop), tokenizer)
        whole = whole_of(job(False, tokenizer), completion)["choices"][0]
        streamed = job(False, tokenizer, stream=True)
        chunks = self.chunks(streamed, deltas)
        for chunk in chunks:
            [choice] = chunk["choices"]
            # OpenAI's type for whole answers does not know that a reason comes last.
            assert choice["finish_reason"] in ("stop" if chunk is chunks[-1] else None,)
            reason = {**choice, "finish_reason": "stop"}
            validated(openai.types.Completion, {**chunk, "choices": [reason]})
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        if logprobs is None:
            assert all(choice["logprobs"] is None for choice in choices)
            return
        for name, values in whole["logprobs"].items():
            parts = [choice["logprobs"][name] for choice in choices]
            assert [item for part in parts for item in part] == values, name

    @pytest.mark.parametrize("stop", [(), ("zzz", " end of"), ("end",)])
    @pytest.mark.parametrize("logprobs", [None, 1])
    def test_chat_chunks_add_up_to_the_whole(
        self, stop: tuple[str, ...], logprobs: int | None
    ) -> None:
        completion, deltas = run(TEXT_IDS, SamplingParams(logprobs=logprobs, stop=stop))
        whole = whole_of(job(True), completion)["choices"][0]
        stream = job(True, stream=True)
        values = [*stream.opening_chunks(), *self.chunks(stream, deltas)]
        chunks = [validated(openai.types.chat.ChatCompletionChunk, value) for value in values]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].delta.role for chunk in chunks[1:]] == [None] * (len(chunks) - 1)
        reasons = [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["stop"]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole["message"]["content"]
        assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
        parts = [value["choices"][0]["logprobs"] for value in values]
        if logprobs is None:
            assert parts == [None] * len(parts)
        else:
            entries = [entry for part in parts if part for entry in part["content"]]
            assert entries == whole["logprobs"]["content"]

    def test_half_a_character_is_no_chunk(self) -> None:
        """Unless it brings logprobs, or the model has no text at all."""
        assert not job(True).has_news(Delta("", [5]))
        assert job(True).has_news(Delta("", [5], logprobs_of([5])))
        assert job(True).has_news(Delta("", [5], finish_reason="stop"))
        assert job(True, None).has_news(Delta("", [5]))
        assert not job(True, None).has_news(Delta("", []))

    def test_offsets_of_choices_are_apart(self) -> None:
        stream = job(False, stream=True, prompts=[[1], [2]])
        ids = TOKENIZER.encode("one two")
        offsets = []
        for id in ids:
            for index in (0, 1):
                delta = Delta(TOKENIZER.token_text(id), [id], logprobs_of([id]))
                [choice] = stream.chunk(index, delta)["choices"]
                assert choice["index"] == index
                offsets.append(choice["logprobs"]["text_offset"])
        assert offsets == [[0], [0], [3], [3]]

    @pytest.mark.parametrize("chat", [True, False])
    def test_usage_comes_last_and_only_when_asked_for(self, chat: bool) -> None:
        completion, deltas = run(TEXT_IDS, SamplingParams())
        asked = job(chat, stream=True, include_usage=True)
        model = openai.types.chat.ChatCompletionChunk if chat else openai.types.Completion
        assert all(chunk["usage"] is None for chunk in self.chunks(asked, deltas))
        last = validated(model, asked.usage_chunk([completion]))
        assert last.choices == []
        assert last.usage.prompt_tokens == 3
        assert last.usage.completion_tokens == len(TEXT_IDS)
        assert last.usage.total_tokens == 3 + len(TEXT_IDS)
        not_asked = job(chat, stream=True)
        assert all("usage" not in chunk for chunk in self.chunks(not_asked, deltas))


# What an engine yields: (index of the choice, finish reason or None), each with one more token.
Events = Iterable[tuple[int, str | None]]


async def played(
    events: Events, params: SamplingParams, ended: list[str] | None = None
) -> AsyncIterator[Any]:
    """A stream of completions as `AsyncEngine.generate` gives it, one token a time.

    ended: gets a word when the stream has been read to its end, or closed.
    """
    outputs: dict[int, OutputProcessor] = {}
    try:
        for index, reason in events:
            output = outputs.setdefault(index, OutputProcessor(TOKENIZER, params, [1] * 3))
            token_id = TEXT_IDS[len(output.token_ids)]
            new = RequestOutput(str(index), [token_id], logprobs_of([token_id]), reason)
            yield index, output, output.process(new)
    finally:
        if ended is not None:
            ended.append("ended")


def collected(job: Job, events: Events) -> dict[str, Any]:
    answer = asyncio.run(job.collect(played(events, job.params)))
    return json.loads(to_json(answer))


def streamed(job: Job, events: Events) -> list[dict[str, Any]]:
    """The chunks, up to the error that ends them."""

    async def read() -> list[dict[str, Any]]:
        return [chunk async for chunk in job.chunks(played(events, job.params))]

    return asyncio.run(read())


# Three choices side by side: the last ends first, the first is the longest.
SIDE_BY_SIDE = [
    (2, None), (0, None), (1, None), (2, "length"), (0, None), (1, "length"), (0, None),
    (0, "length"),
]  # fmt: skip
LENGTHS = (4, 2, 2)


@pytest.mark.parametrize("chat", [True, False])
class TestJobs:
    """The whole way from a stream of an engine's to an answer, in one piece and in chunks."""

    PARAMS = SamplingParams(n=3, logprobs=1)

    def test_it_asks_for_each_choice(self, chat: bool) -> None:
        """Prompt by prompt, as `response` reads them; the salt and the rest go with each."""
        asked = job(
            chat, prompts=[[1], [2, 3]], params=SamplingParams(n=2), cache_salt="s", may_draft=False
        )
        requests = asked.requests()
        assert [(r.prompt_token_ids, r.choice) for r in requests] == [
            ([1], 0), ([1], 1), ([2, 3], 0), ([2, 3], 1),
        ]  # fmt: skip
        assert len(requests) == asked.num_choices
        assert {(r.cache_salt, r.may_draft, r.params.n) for r in requests} == {("s", False, 1)}
        again = {r.request_id for r in asked.requests()}
        assert not again & {r.request_id for r in requests}, "asked twice, its ids are others"

    def test_choices_are_collected_in_their_order(self, chat: bool) -> None:
        answer = collected(job(chat, params=self.PARAMS), SIDE_BY_SIDE)
        choices = answer["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        texts = [TOKENIZER.decode(TEXT_IDS[:length]) for length in LENGTHS]
        assert [c["message"]["content"] if chat else c["text"] for c in choices] == texts
        assert answer["usage"]["completion_tokens"] == sum(LENGTHS)
        assert answer["usage"]["prompt_tokens"] == 3

    def test_chunks_add_up_to_what_is_collected(self, chat: bool) -> None:
        whole = collected(job(chat, params=self.PARAMS), SIDE_BY_SIDE)
        chunks = streamed(
            job(chat, params=self.PARAMS, stream=True, include_usage=True), SIDE_BY_SIDE
        )
        for index, expected in enumerate(whole["choices"]):
            mine = [c["choices"][0] for c in chunks if c["choices"]]
            mine = [choice for choice in mine if choice["index"] == index]
            if chat:
                assert mine[0]["delta"]["role"] == "assistant"
                text = "".join(choice["delta"].get("content", "") for choice in mine)
                assert text == expected["message"]["content"]
                parts = [choice["logprobs"]["content"] for choice in mine if choice["logprobs"]]
                assert [item for part in parts for item in part] == expected["logprobs"]["content"]
            else:
                assert "".join(choice["text"] for choice in mine) == expected["text"]
                parts = [choice["logprobs"]["tokens"] for choice in mine if choice["logprobs"]]
                assert [item for part in parts for item in part] == expected["logprobs"]["tokens"]
            reasons = [choice["finish_reason"] for choice in mine]
            assert reasons == [None] * (len(mine) - 1) + ["length"]
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks[:-1])

    def test_no_usage_where_none_is_asked_for(self, chat: bool) -> None:
        chunks = streamed(job(chat, params=self.PARAMS, stream=True), SIDE_BY_SIDE)
        assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)

    def test_an_error_ends_both(self, chat: bool) -> None:
        """The chunks before it have left; nothing comes after it."""
        events = [(0, None), (1, "error"), (0, None), (0, "length")]
        failing = job(chat, params=SamplingParams(n=2))
        with pytest.raises(ApiError) as caught:
            collected(failing, events)
        assert caught.value.status == 500
        chunks, ended = [], []

        async def read() -> int:
            try:
                async for chunk in failing.chunks(played(events, failing.params, ended)):
                    chunks.append(chunk)
            except ApiError as error:
                assert ended, "the other choice is still computed while the error is written"
                return error.status
            raise AssertionError("no error")

        assert asyncio.run(read()) == 500
        news = [c["choices"][0] for c in chunks[2 if chat else 0 :]]
        assert [choice["index"] for choice in news] == [0]

    @pytest.mark.parametrize("num_read", [1, 4])
    def test_closing_the_chunks_closes_the_stream(self, chat: bool, num_read: int) -> None:
        """At once, and not when the garbage is collected: its requests are aborted by that."""
        ended: list[str] = []
        asked = job(chat, params=self.PARAMS, echoes=None if chat else ["the prompt"])

        async def leave() -> None:
            chunks = asked.chunks(played(SIDE_BY_SIDE, asked.params, ended))
            for _ in range(num_read):
                await anext(chunks)
            assert not ended
            await chunks.aclose()
            assert ended or num_read < 4  # before the first token nothing has begun

        asyncio.run(leave())

    def test_a_stream_opens_before_the_first_token(self, chat: bool) -> None:
        """A chat's role, and the prompt where it is echoed, for every choice."""
        echoing = job(chat, params=self.PARAMS, echoes=None if chat else ["the prompt"])

        async def first_three() -> list[dict[str, Any]]:
            async def nothing_yet() -> AsyncIterator[Any]:
                raise AssertionError("asked for tokens first")
                yield

            chunks = echoing.chunks(nothing_yet())
            return [await anext(chunks) for _ in range(3)]

        choices = [chunk["choices"][0] for chunk in asyncio.run(first_three())]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        shown = {"role": "assistant", "content": ""} if chat else "the prompt"
        assert [choice["delta" if chat else "text"] for choice in choices] == [shown] * 3
