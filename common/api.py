"""OpenAI's wire format: requests checked, responses and stream chunks built, errors as objects.

A field that is accepted is honoured; one that is not supported is refused by name with a 400, never
ignored. `null` counts as not given, and so does a value that asks for nothing (`NEUTRAL`).
"""

import json
import operator
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from common.output import Completion, Delta, TokenLogprobs
from common.sampling import MAX_LOGPROBS, SamplingParams, shown
from common.tokenizer import Tokenizer

MAX_CHOICES = 128  # prompts times n in one request
MAX_MESSAGES = 4096
MAX_KEYS = 16  # of an object inside a request
MAX_SALT = 256  # characters
MAX_LOGPROBS_TOTAL = 1 << 19  # in one answer: some 50 MB of JSON

# Fields of OpenAI's interface that no part implements, with the value that asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "function_call": ("none",),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "repetition_penalty": (1.0, 1),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "functions": ([],),
}


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
)

Number = StrictFloat | StrictInt

# The first wrong item ends the check of a list. Without it a megabyte of wrong items becomes a
# gigabyte of error objects.
Ids = Annotated[list[StrictInt], Field(fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]


class _Object(BaseModel):
    """An object inside a request, with known keys only."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        """Each unknown key is an error of its own: refuse before there are a million of them.

        A null is left out: messages that come back as a client dumped them are full of them.
        """
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_KEYS:
            raise ValueError(f"at most {MAX_KEYS} keys, not {len(value)}")
        return {name: item for name, item in value.items() if item is not None}


class StreamOptions(_Object):
    include_usage: StrictBool = False


class _Request(BaseModel):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow")

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
    speculative: StrictBool | None = None
    cache_salt: Annotated[StrictStr, Field(min_length=1, max_length=MAX_SALT)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    def check(
        self, streaming: bool, max_n: int, cache_salt: bool = False, speculative: bool = False
    ) -> None:
        """Refuse what is not supported. Raises ApiError naming the field."""
        for name, value in (self.model_extra or {}).items():
            neutral = NEUTRAL.get(name, ())
            # With the type, because 0 == False and 1 == True.
            if value is not None and (type(value), value) not in [(type(v), v) for v in neutral]:
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
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
        if self.n is not None and self.n > max_n:
            raise ApiError(
                400, f"n must be at most {max_n} in this part, not {shown(self.n)}", param="n"
            )

    def _sampling_params(self, **values: Any) -> SamplingParams:
        """SamplingParams from the fields that were given. Raises ApiError."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return SamplingParams(**given, **values)
        except ValueError as error:
            raise field_error(str(error)) from None


class CompletionRequest(_Request):
    """POST /v1/completions. A prompt is text or token ids, or a list of either."""

    prompt: StrictStr | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: StrictInt | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one. Raises ApiError."""
        single = isinstance(self.prompt, str) or (
            bool(self.prompt) and isinstance(self.prompt[0], int)
        )
        prompts = [self.prompt] if single else list(self.prompt)
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise ApiError(400, "prompt must not be empty", param="prompt")
        return prompts

    def sampling_params(self) -> SamplingParams:
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        return self._sampling_params(max_tokens=max_tokens, logprobs=self.logprobs)


class TextPart(_Object):
    type: Literal["text"]
    text: StrictStr


class Message(_Object):
    """One message of a conversation; content as text, or as a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | Annotated[list[TextPart], Field(fail_fast=True)]

    def as_dict(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: StrictInt | None = None

    def sampling_params(self) -> SamplingParams:
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
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return self._sampling_params(
            max_tokens=limits.pop() if limits else None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def check_logprobs(
    prompts: Sequence[Sequence[int]], params: SamplingParams, limit: int, chat: bool
) -> None:
    """Refuse a request whose log probabilities would take gigabytes. Raises ApiError.

    limit: the context in tokens; it bounds the output where max_tokens is not given.
    """
    if params.logprobs is None:
        return
    num_tokens = sum(params.max_tokens or limit - len(prompt) for prompt in prompts)
    total = params.n * num_tokens * (1 + params.logprobs)
    if total > MAX_LOGPROBS_TOTAL:
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


class TextOffsets:
    """Where each token's text begins in a completion's text.

    Counted in the text itself and not in what `tokens` shows: special tokens have no place in it,
    and the tokens of one character share one. Text that is held back for a stop string counts, so
    a stream has the same offsets as a whole answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int] = ()) -> None:
        """prompt_token_ids: what the completion continues."""
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids) if tokenizer else None
        self._length = 0

    def push(self, token_id: int) -> int:
        """The offset of the next token."""
        begin = self._length
        if self._detokenizer is not None:
            self._length += len(self._detokenizer.push(token_id))
        return begin


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
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, "TextOffsets"] = field(default_factory=dict)  # of each choice streamed

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def response(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer, for `to_json`: log probabilities are functions that make them.

        Raises ApiError when a completion ended in an error.
        """
        if any(c.finish_reason == "error" for c in completions):
            raise internal_error()
        choices = []
        for index, completion in enumerate(completions):
            choice: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": completion.text}
            else:
                choice["text"] = completion.text
            offsets = self._new_offsets(index)
            choice["logprobs"] = None
            if completion.logprobs is not None:
                make = partial(self._logprobs, completion.logprobs, offsets, late=True)
                choice["logprobs"] = make
            choices.append(choice)
        head = self._head("chat.completion" if self.chat else "text_completion")
        return {**head, "choices": choices, "usage": self.usage(completions)}

    def usage(self, completions: Sequence[Any]) -> dict[str, Any]:
        """Token counts; a prompt counts once, however many choices it has.

        completions: in their order, all choices of a prompt one after the other.
        """
        prompt = sum(map(len, self.prompts))
        first_choices = completions[:: self.params.n]
        completion = sum(len(c.token_ids) for c in completions)
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

    def role_chunk(self, index: int) -> dict[str, Any]:
        """What opens choice `index` of a chat's stream."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def has_news(self, delta: Delta) -> bool:
        """Whether a delta is worth a chunk: half a character is not. A model without a tokenizer
        has no text, and each of its tokens is."""
        news = delta.text or delta.logprobs or delta.finish_reason
        return bool(news) or (self.tokenizer is None and bool(delta.token_ids))

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        """A stream chunk of choice `index`."""
        content = {"content": delta.text} if self.chat else delta.text
        logprobs = None
        if delta.logprobs:
            if index not in self._offsets:
                self._offsets[index] = self._new_offsets(index)
            logprobs = self._logprobs(delta.logprobs, self._offsets[index])
        return self._chunk(index, content, delta.finish_reason, logprobs)

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

    def _new_offsets(self, index: int) -> "TextOffsets":
        return TextOffsets(self.tokenizer, self.prompts[index // self.params.n])

    def _logprobs(
        self, logprobs: list[TokenLogprobs], offsets: "TextOffsets", late: bool = False
    ) -> dict[str, Any]:
        """late: the entries of a position are made when it is written."""
        make = partial if late else operator.call
        if self.chat:
            return {"content": [make(self._entry, item) for item in logprobs]}
        return {
            "tokens": [self._token_text(item.token_id) for item in logprobs],
            "token_logprobs": [item.logprob for item in logprobs],
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
            top[name] = value
        return top | {sampled: item.logprob}

    def _token_text(self, token_id: int) -> str:
        return self.tokenizer.token_name(token_id) if self.tokenizer else f"token_id:{token_id}"

    def _token_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = self.tokenizer.token_bytes(token_id) if self.tokenizer else None
        return {"token": self._token_text(token_id), "logprob": logprob, "bytes": token_bytes}
