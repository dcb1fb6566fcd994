"""OpenAI's wire format, inwards: requests and their fields, checked.

A field that is accepted is honoured; one that is not supported is refused by name with a 400, never
ignored. `null` counts as not given, and so does a value that asks for nothing (`common.http.neutral`).
"""

import re
from collections.abc import Mapping, Sequence
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

from common.http import neutral
from common.http.errors import ApiError, field_error
from common.http.structured import READERS
from common.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams, shown

MAX_CHOICES = 128  # prompts times n in one request
MAX_MESSAGES = 4096
MAX_KEYS = 16  # of an object inside a request
MAX_SALT = 256  # characters
MAX_LOGPROBS_TOTAL = 1 << 19  # in one answer: some 50 MB of JSON
NO_DEFAULTS: Mapping[str, Any] = {}

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
    continuous_usage_stats: StrictBool = False  # vLLM's: so far, in each chunk


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
        structured: bool = False,
    ) -> None:
        """Refuse what is not supported. Raises ApiError naming the field."""
        for name, value in (self.model_extra or {}).items():
            if structured and name in READERS:
                continue
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
        options = self.stream_options
        if options is not None and options.continuous_usage_stats and not options.include_usage:
            raise ApiError(
                400,
                "stream_options.continuous_usage_stats needs include_usage to be true",
                param="stream_options.continuous_usage_stats",
            )
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
