"""OpenAI's wire format: requests checked, responses and stream chunks built, errors as objects.

A field that is accepted is honoured; one that is not supported is refused by name with a 400, never
ignored. `null` counts as not given, and so does a value that asks for nothing (`common.http.neutral`).
"""

import json
import operator
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from common.completions import Completion, Delta, OutputProcessor, TokenLogprobs
from common.http import neutral
from common.models.tokenizer import Tokenizer
from common.requests import Request, fan_out
from common.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, shown

MAX_CHOICES = 128  # prompts times n in one request
MAX_MESSAGES = 4096
MAX_KEYS = 16  # of an object inside a request
MAX_SALT = 256  # characters
MAX_LOGPROBS_TOTAL = 1 << 19  # in one answer: some 50 MB of JSON
LEAST_LOGPROB = -9999.0  # what is shown for less, as in OpenAI's and vLLM's answers
NO_DEFAULTS: Mapping[str, Any] = {}


class ApiError(Exception):
    """An error the client is told about, in OpenAI's form, with this HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 503: "overloaded_error"}.get(self.status, kind)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def internal_error() -> ApiError:
    """What a client learns of an exception in the server: that there was one."""
    return ApiError(500, "internal server error", code="internal_error")


def failure(error: str | None) -> ApiError:
    """What a client learns of a completion that ended in an error: what it was, where that is known."""
    return ApiError(500, error, code="generation_failed") if error else internal_error()


def field_error(message: str) -> ApiError:
    """A 400 from a ValueError whose message begins with the field's name."""
    name = message.split(" ")[0].rstrip(":")
    return ApiError(400, message, param=name if name.isidentifier() else None)


SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "include_stop_str_in_output",
)

Number = StrictFloat | StrictInt

# The first wrong item ends the check of a list. Without it a megabyte of wrong items becomes a
# gigabyte of error objects.
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]


def _few(value: Any) -> Any:
    """Refuse a map of biases that is too large before each of its items is an error of its own."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens, not {len(value)}")
    return value


Biases = Annotated[dict[StrictStr, Number], BeforeValidator(_few)]


class _Object(BaseModel):
    """An object inside a request, with known keys only."""

    model_config = ConfigDict(extra="forbid")
    rules: ClassVar[dict[str, neutral.Rule]]  # what else it may hold, as it asks for nothing

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        """Each unknown key is an error of its own: refuse before there are a million of them.

        What asks for nothing is left out: messages that come back as a client dumped them are full
        of it.
        """
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_KEYS:
            raise ValueError(f"at most {MAX_KEYS} keys, not {len(value)}")
        return {
            name: item
            for name, item in value.items()
            if not neutral.asks_for_nothing(cls.rules, name, item)
        }


class StreamOptions(_Object):
    rules = neutral.STREAM_OPTIONS

    include_usage: StrictBool = False


class _Request(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow")
    rules: ClassVar[dict[str, neutral.Rule]]

    model: StrictStr | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    max_tokens: StrictInt | None = None
    stop: StrictStr | Texts | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: StrictBool | None = None
    n: StrictInt | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    min_tokens: StrictInt | None = None
    include_stop_str_in_output: StrictBool | None = None
    logit_bias: Biases | None = None
    prompt_logprobs: StrictInt | None = None
    speculative: StrictBool | None = None
    cache_salt: Annotated[StrictStr, Field(min_length=1, max_length=MAX_SALT)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    def check(
        self,
        streaming: bool,
        max_n: int,
        cache_salt: bool = False,
        speculative: bool = False,
        prompt_logprobs: bool = False,
    ) -> None:
        """Refuse what is not supported. Raises ApiError naming the field."""
        for name, value in (self.model_extra or {}).items():
            if not neutral.asks_for_nothing(self.rules, name, value):
                field = name if len(name) <= 64 else name[:64] + "…"
                raise ApiError(400, f"{field} is not supported", param=field, code="unsupported")
        if self.stream and not streaming:
            raise ApiError(
                400, "stream is not supported by this part; part 02 has it", param="stream"
            )
        if self.cache_salt is not None and not cache_salt:
            raise ApiError(
                400, "cache_salt is not supported by this part; part 07 has it", param="cache_salt"
            )
        if self.speculative and not speculative:
            raise ApiError(
                400,
                "speculative is not supported by this server; part 08 has it, with --speculative",
                param="speculative",
            )
        if (
            self.stream_options is not None
            and self.stream_options.include_usage
            and not self.stream
        ):
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
        if field := self.scored_by():
            if not prompt_logprobs:
                raise ApiError(
                    400, f"{field} is not supported by this part; part 04 has it", param=field
                )
            if self.stream:
                raise ApiError(400, f"{field} is not supported with stream", param=field)
        if self.n is not None and self.n > max_n:
            raise ApiError(
                400, f"n must be at most {max_n} in this part, not {shown(self.n)}", param="n"
            )

    def scored_by(self) -> str | None:
        """The field that asks for log probabilities of the prompt, if one does."""
        return None if self.prompt_logprobs is None else "prompt_logprobs"

    def _sampling_params(self, defaults: Mapping[str, Any], **values: Any) -> SamplingParams:
        """SamplingParams from the fields that were given, and the model's defaults. Raises ApiError."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        values = {"prompt_logprobs": self.prompt_logprobs} | values
        try:
            biases = {_token_id(key): value for key, value in (self.logit_bias or {}).items()}
            return SamplingParams(**{**defaults, **given}, **values, logit_bias=biases)
        except ValueError as error:
            raise field_error(str(error)) from None


def _token_id(key: str) -> int:
    """A key of logit_bias. Raises ValueError."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", key):  # one way to write each
        raise ValueError(f"logit_bias must be a map of token ids to numbers, not {shown(key)}")
    return int(key)


class CompletionRequest(_Request):
    """POST /v1/completions. A prompt is text or token ids, or a list of either.

    With `echo` the prompt comes back before the completion, and with max_tokens 0 alone.
    """

    rules = neutral.COMPLETION

    prompt: StrictStr | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: StrictInt | None = None
    echo: StrictBool | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one. Raises ApiError."""
        single = isinstance(self.prompt, str) or (
            bool(self.prompt) and isinstance(self.prompt[0], int)
        )
        prompts = [self.prompt] if single else list(self.prompt)
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise ApiError(400, "prompt must not be empty", param="prompt")
        return prompts

    @property
    def is_prompt_alone(self) -> bool:
        """Whether nothing is to be completed: the engine runs for one token, which is dropped."""
        return bool(self.echo) and self.max_tokens == 0

    def scored_by(self) -> str | None:
        return "logprobs" if self.echo and self.logprobs is not None else super().scored_by()

    def sampling_params(self, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if self.is_prompt_alone and self.min_tokens:
            raise field_error(f"min_tokens is {shown(self.min_tokens)}, more than max_tokens, 0")
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return self._sampling_params(
            defaults,
            max_tokens=1 if self.is_prompt_alone else max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=max((n for n in wanted if n is not None), default=None),
        )


class TextPart(_Object):
    rules = neutral.CONTENT_PART

    type: Literal["text"]
    text: StrictStr


class Message(_Object):
    """One message of a conversation; content as text, or as a list of text parts."""

    rules = neutral.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(fail_fast=True)]

    def as_dict(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions."""

    rules = neutral.CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: StrictInt | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None

    def template_options(self) -> dict[str, bool]:
        asked = self.add_generation_prompt, self.continue_final_message
        return template_options(self.messages, *asked)

    def sampling_params(self, defaults: Mapping[str, Any] = NO_DEFAULTS) -> SamplingParams:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(
                400,
                f"max_tokens ({shown(self.max_tokens)}) and max_completion_tokens"
                f" ({shown(self.max_completion_tokens)}) differ; give one of them",
                param="max_tokens",
            )
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            wrong = shown(self.max_completion_tokens)
            raise field_error(f"max_completion_tokens must be at least 1, not {wrong}")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return self._sampling_params(
            defaults,
            max_tokens=limits.pop() if limits else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def template_options(
    messages: Sequence[Message],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
) -> dict[str, bool]:
    """How a chat's end is laid out: with the opening of an answer, or so that the last message goes
    on. Raises ApiError where both are asked for, or the last message is not the model's."""
    goes_on = bool(continue_final_message)
    if goes_on and messages[-1].role != "assistant":
        raise ApiError(
            400,
            "continue_final_message needs a last message whose role is assistant,"
            f" not {messages[-1].role}",
            param="continue_final_message",
        )
    if goes_on and add_generation_prompt:
        raise ApiError(
            400,
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    opens = not goes_on if add_generation_prompt is None else add_generation_prompt
    return {"add_generation_prompt": opens, "continue_final_message": goes_on}


def check_logprobs(
    prompts: Sequence[Sequence[int]], params: SamplingParams, limit: int, chat: bool
) -> None:
    """Refuse a request whose log probabilities would take gigabytes. Raises ApiError.

    limit: the context in tokens; it bounds the output where max_tokens is not given.
    """
    num_tokens = sum(params.max_tokens or limit - len(prompt) for prompt in prompts)
    total = 0 if params.logprobs is None else params.n * num_tokens * (1 + params.logprobs)
    if params.prompt_logprobs is not None:
        # Each choice shows them.
        num_scored = params.n * sum(map(len, prompts)) * (1 + params.prompt_logprobs)
        if num_scored > MAX_LOGPROBS_TOTAL:
            raise ApiError(
                400,
                f"prompt_logprobs ({params.prompt_logprobs}) for {len(prompts)} prompts with n"
                f" ({params.n}) would be {num_scored} log probabilities; one request may ask for"
                f" {MAX_LOGPROBS_TOTAL}",
                param="prompt_logprobs",
            )
        total += num_scored
    if params.logprobs is not None and total > MAX_LOGPROBS_TOTAL:
        name = "top_logprobs" if chat else "logprobs"
        asked = "not given" if params.max_tokens is None else params.max_tokens
        raise ApiError(
            400,
            f"{name} ({params.logprobs}) for {len(prompts)} prompts with n ({params.n}) and"
            f" max_tokens ({asked}) may be {total} log probabilities; one request may ask for"
            f" {MAX_LOGPROBS_TOTAL}",
            param=name,
        )


def to_json(answer: dict[str, Any]) -> str:
    """An answer of `Job.response` as JSON. Takes long where there are many log probabilities.

    For a thread: json's C code, which holds the interpreter, calls back for each of their
    positions, and there other threads have their turn.
    """
    return json.dumps(
        answer,
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
        default=lambda late: late(),
    )


def _finite(logprob: float) -> float:
    """As JSON can carry it: a token that a model rules out has -infinity."""
    return max(logprob, LEAST_LOGPROB)


class TextOffsets:
    """Where each token's text begins in a completion's text.

    Counted in the text itself and not in what `tokens` shows: special tokens have no place in it,
    and the tokens of one character share one. Text that is held back for a stop string counts, so
    a stream has the same offsets as a whole answer.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int] = (), echo: str = ""
    ) -> None:
        """prompt_token_ids: what the completion continues. echo: the text of the tokens that come,
        where it is of a prompt: special tokens that were written in it have a place."""
        self._tokenizer, self._echo = tokenizer, echo
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids) if tokenizer else None
        self._length = 0

    def push(self, token_id: int) -> int:
        """The offset of the next token."""
        begin = self._length
        if self._detokenizer is None:
            return begin
        self._length += len(self._detokenizer.push(token_id))
        special = self._tokenizer.special_ids.get(token_id)
        if special is not None and self._echo.startswith(special, self._length):
            self._length += len(special)
        return begin


# Completions side by side: (index, its output so far, what is new), as tokens are born.
Completing = AsyncIterator[tuple[int, OutputProcessor, Delta]]


@dataclass
class Job:
    """One HTTP request, checked: what to run, and how to answer."""

    chat: bool
    model: str
    prompts: list[list[int]]
    params: SamplingParams
    stream: bool
    include_usage: bool
    tokenizer: Tokenizer | None
    cache_salt: str | None = None
    may_draft: bool = True
    echoes: list[str] | None = None  # the prompts' texts, to come back before the completions
    is_prompt_alone: bool = False  # and without them
    prompt_logprobs: int | None = None  # how many are shown in vLLM's form, beside an echo's
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, "TextOffsets"] = field(default_factory=dict)  # of each choice streamed

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def requests(self) -> list[Request]:
        """What an engine is asked for: a request for each choice, prompt by prompt."""
        prompts = [(prompt, self.params) for prompt in self.prompts]
        return fan_out(prompts, self.cache_salt, self.may_draft)

    def response(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer, for `to_json`: log probabilities are functions that make them.

        Raises ApiError when a completion ended in an error.
        """
        for failed in (c for c in completions if c.finish_reason == "error"):
            raise failure(failed.error)
        choices = []
        for index, completion in enumerate(completions):
            reason = self._reason(completion.finish_reason)
            choice: dict[str, Any] = {"index": index, "finish_reason": reason}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": completion.text}
            else:
                choice["text"] = self._echo(index) + self._shown(completion.text)
            choice["logprobs"] = None
            scores = completions[index - index % self.params.n].prompt_logprobs or []
            if completion.logprobs is not None:
                make = partial(self._all_logprobs, index, completion.logprobs, scores)
                choice["logprobs"] = make
            if self.prompt_logprobs is not None:
                choice["prompt_logprobs"] = [None, *(partial(self._score, x) for x in scores)]
            choices.append(choice)
        head = self._head("chat.completion" if self.chat else "text_completion")
        answer = {**head, "choices": choices, "usage": self.usage(completions)}
        if self.chat and self.prompt_logprobs is not None:  # vLLM has them in these two places
            [answer["prompt_logprobs"], *_] = [choice.pop("prompt_logprobs") for choice in choices]
        return answer

    def _prompt_of(self, index: int) -> int:
        """Which prompt a choice completes."""
        return index // self.params.n

    def _echo(self, index: int) -> str:
        return "" if self.echoes is None else self.echoes[self._prompt_of(index)]

    def _shown(self, text: str) -> str:
        return "" if self.is_prompt_alone else text

    def _reason(self, finish_reason: str | None) -> str | None:
        return "length" if self.is_prompt_alone and finish_reason else finish_reason

    def usage(self, completions: Sequence[Any]) -> dict[str, Any]:
        """Token counts; a prompt counts once, however many choices it has.

        completions: in their order, all choices of a prompt one after the other.
        """
        prompt = sum(map(len, self.prompts))
        first_choices = completions[:: self.params.n]
        completion = sum(len(c.token_ids) for c in completions)
        completion = 0 if self.is_prompt_alone else completion
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(c.num_cached_tokens for c in first_choices)
            },
        }
        if num_drafts := sum(c.num_drafts for c in completions):
            num_tokens = sum(c.num_draft_tokens for c in completions)
            num_accepted = sum(c.num_accepted_tokens for c in completions)
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": num_tokens - num_accepted,
                "acceptance_rate": round(num_accepted / num_tokens, 4),
                "mean_accepted_length": round(num_accepted / num_drafts, 4),
            }
        return usage

    def opening_chunks(self) -> Iterator[dict[str, Any]]:
        """What opens each choice of a stream: a chat's role, or the prompt where it is echoed."""
        for index in range(self.num_choices):
            if self.chat:
                yield self._chunk(index, {"role": "assistant", "content": ""})
            elif self.echoes is not None:
                yield self._chunk(index, self._echo(index))

    def has_news(self, delta: Delta) -> bool:
        """Whether a delta is worth a chunk: half a character is not. A model without a tokenizer
        has no text, and each of its tokens is."""
        news = delta.text or delta.logprobs or delta.finish_reason
        return bool(news) or (self.tokenizer is None and bool(delta.token_ids))

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A stream chunk of choice `index`."""
        content = {"content": delta.text} if self.chat else self._shown(delta.text)
        logprobs = None
        if delta.logprobs:
            if index not in self._offsets:
                self._offsets[index] = self._new_offsets(index)
            logprobs = self._logprobs(delta.logprobs, self._offsets[index])
        return self._chunk(index, content, self._reason(delta.finish_reason), logprobs)

    async def collect(self, stream: Completing) -> dict[str, Any]:
        """The whole answer, when a stream of completions has ended. Raises ApiError."""
        outputs: dict[int, OutputProcessor] = {}
        async for index, output, _ in stream:
            outputs[index] = output
        return self.response([outputs[index].completion(index) for index in sorted(outputs)])

    async def chunks(self, stream: Completing) -> AsyncIterator[dict[str, Any]]:
        """A stream of completions in OpenAI's wire format. Raises ApiError."""
        outputs: dict[int, OutputProcessor] = {}
        for chunk in self.opening_chunks():
            yield chunk
        async for index, output, delta in stream:
            outputs[index] = output
            if delta.finish_reason == "error":
                raise failure(delta.error)
            if self.has_news(delta):
                yield self.chunk(index, delta)
        if self.include_usage:
            yield self.usage_chunk([outputs[index] for index in sorted(outputs)])

    def usage_chunk(self, completions: Sequence[Any]) -> dict[str, Any]:
        """The chunk before the end of a stream that asked for usage."""
        return {**self._stream_head(), "choices": [], "usage": self.usage(completions)}

    def _chunk(
        self,
        index: int,
        content: Any,
        finish_reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta" if self.chat else "text": content}
        if self.chat and finish_reason and not content.get("content"):
            choice["delta"] = {}
        choice |= {"logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._stream_head(), "choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def _stream_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _all_logprobs(
        self, index: int, logprobs: list[TokenLogprobs], scores: list[TokenLogprobs]
    ) -> dict[str, Any]:
        """The log probabilities of a choice: of its prompt, where that is echoed, and its tokens.

        scores: the prompt's, without its first token, which nothing comes before.
        """
        prompt = self.prompts[self._prompt_of(index)]
        logprobs = [] if self.is_prompt_alone else logprobs
        shown = self._logprobs(logprobs, self._new_offsets(index), late=True)
        if self.echoes is None:
            return shown
        most = self.params.logprobs or 0
        scores = [replace(item, top=item.top[:most]) for item in scores]
        begin = len(self._echo(index))
        offsets = TextOffsets(self.tokenizer, echo=self._echo(index))
        offsets.push(prompt[0])
        echoed = self._logprobs(scores, offsets, late=True)
        places = [0, *(min(place, begin) for place in echoed["text_offset"])]
        return {
            "tokens": [self._token_text(prompt[0]), *echoed["tokens"], *shown["tokens"]],
            "token_logprobs": [None, *echoed["token_logprobs"], *shown["token_logprobs"]],
            "top_logprobs": [None, *echoed["top_logprobs"], *shown["top_logprobs"]],
            "text_offset": [*places, *(begin + place for place in shown["text_offset"])],
        }

    def _score(self, item: TokenLogprobs) -> dict[str, Any]:
        """A prompt token's log probability in vLLM's form: by token id, with its rank."""
        top = item.top[: self.prompt_logprobs]
        ranked = {id: (value, rank) for rank, (id, value) in enumerate(top, start=1)}
        ranked.setdefault(item.token_id, (item.logprob, item.rank))
        return {
            str(id): {
                "logprob": _finite(value),
                "rank": rank,
                "decoded_token": self._token_text(id),
            }
            for id, (value, rank) in ranked.items()
        }

    def _new_offsets(self, index: int) -> "TextOffsets":
        return TextOffsets(self.tokenizer, self.prompts[self._prompt_of(index)])

    def _logprobs(
        self, logprobs: list[TokenLogprobs], offsets: "TextOffsets", late: bool = False
    ) -> dict[str, Any]:
        """late: the entries of a position are made when it is written."""
        make = partial if late else operator.call
        if self.chat:
            return {"content": [make(self._entry, item) for item in logprobs]}
        return {
            "tokens": [self._token_text(item.token_id) for item in logprobs],
            "token_logprobs": [_finite(item.logprob) for item in logprobs],
            "top_logprobs": [make(self._top, item) for item in logprobs],
            "text_offset": [offsets.push(item.token_id) for item in logprobs],
        }

    def _entry(self, item: TokenLogprobs) -> dict[str, Any]:
        top = [self._token_entry(*pair) for pair in item.top]
        return {**self._token_entry(item.token_id, item.logprob), "top_logprobs": top}

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens by their names, and the sampled one, whose name is as in `tokens`.

        A name that another token has already (`<0x41>` beside "A") gives way to `token_id:N`.
        """
        sampled = self._token_text(item.token_id)
        top: dict[str, float] = {}
        for token_id, value in item.top:
            name = self._token_text(token_id)
            if token_id == item.token_id:
                value = item.logprob
            elif name == sampled or name in top:
                name = f"token_id:{token_id}"
            top[name] = _finite(value)
        return top | {sampled: _finite(item.logprob)}

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_name(token_id) if self.tokenizer else f"token_id:{token_id}"

    def _token_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = self.tokenizer.token_bytes(token_id) if self.tokenizer else None
        name = self._token_text(token_id)
        return {"token": name, "logprob": _finite(logprob), "bytes": token_bytes}
