"""OpenAI's wire format, outwards: whole answers, stream chunks, log probabilities and usage.

A `Job` is a request that has been checked; it knows how its answers look.
"""

import json
import operator
import secrets
import time
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from common.completions import Completion, Delta, OutputProcessor, TokenLogprobs
from common.http.errors import failure
from common.http.tools.parser import ToolParser, whole_message
from common.http.tools.use import ToolUse
from common.kv_transfer.ticket import Ticket
from common.models.tokenizer import Tokenizer
from common.requests import Request, fan_out
from common.sampling import SamplingParams
from common.structured.grammar import Grammar

# Completions side by side: (index, its output so far, what is new), as tokens are born. Closing it
# ends what is unfinished.
Completing = AsyncGenerator[tuple[int, OutputProcessor, Delta], None]

LEAST_LOGPROB = -9999.0  # what is shown for less, as in OpenAI's and vLLM's answers


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


@dataclass
class Job:
    """One HTTP request, checked: what to run, and how to answer.

    marks: name of a stage -> when it was reached, in seconds of `time.perf_counter`, as all times.
    taken, detokenized: of each output of the engine, when work on it began and ended.
    """

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
    continuous_usage: bool = False  # in each chunk of a stream, of the request so far
    kv_ticket: Ticket | None = None  # where the prompt may be computed
    grammar: Grammar | None = None  # what the outputs must be like
    tools: ToolUse | None = None  # what a chat's model may call
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    request_ids: list[str] = field(default_factory=list)  # of what the engine was asked for
    marks: dict[str, float] = field(default_factory=dict)
    taken: array = field(default_factory=lambda: array("d"))
    detokenized: array = field(default_factory=lambda: array("d"))
    _offsets: dict[int, "TextOffsets"] = field(default_factory=dict)  # of each choice streamed
    _parsers: dict[int, ToolParser] = field(default_factory=dict)  # of each choice streamed

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def requests(self) -> list[Request]:
        """What an engine is asked for: a request for each choice, prompt by prompt."""
        prompts = [(prompt, self.params) for prompt in self.prompts]
        requests = fan_out(prompts, self.cache_salt, self.may_draft, self.grammar)
        self.request_ids = [request.request_id for request in requests]
        self.marks["submitted"] = time.perf_counter()
        if (ticket := self.kv_ticket) is None:
            return requests
        return [replace(r, kv_ticket=ticket.child(i)) for i, r in enumerate(requests)]

    def response(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The whole answer, for `to_json`: log probabilities, and messages that may have tool calls,
        are functions that make them.

        Raises ApiError when a completion ended in an error.
        """
        for failed in (c for c in completions if c.finish_reason == "error"):
            raise failure(failed.error)
        choices = []
        for index, completion in enumerate(completions):
            reason = self._reason(completion.finish_reason)
            choice: dict[str, Any] = {"index": index, "finish_reason": reason}
            if self.tools is not None:
                message = cache(partial(whole_message, self.tools.parser(), completion.text))
                choice["message"] = message
                if reason == "stop":
                    choice["finish_reason"] = partial(self._stop_reason, message)
            elif self.chat:
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

    def _stop_reason(self, message: Callable[[], dict[str, Any]]) -> str:
        """Why a completion stopped by itself. message: makes the choice's message."""
        return "tool_calls" if "tool_calls" in message() else "stop"

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

    def chunks_of(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The stream chunks of choice `index` for what is new: several where calls are read."""
        if self.tools is None:
            yield self.chunk(index, delta)
            return
        if index not in self._parsers:
            self._parsers[index] = self.tools.parser()
        parser, reason = self._parsers[index], delta.finish_reason
        pieces = parser.push(delta.text) + (parser.end() if reason else [])
        if reason == "stop" and parser.num_calls:
            reason = "tool_calls"
        if delta.logprobs:
            first = pieces.pop(0) if pieces else {"content": ""}
            chunk = self.chunk(index, replace(delta, text="", finish_reason=None))
            chunk["choices"][0]["delta"] = first
            yield chunk
        for piece in pieces:
            yield self._chunk(index, piece)
        if reason is not None:
            yield self._chunk(index, {}, reason)

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
        async with aclosing(stream):
            async for index, output, _ in stream:
                self._note(output)
                outputs[index] = output
        return self.response([outputs[index].completion(index) for index in sorted(outputs)])

    async def chunks(self, stream: Completing) -> AsyncIterator[dict[str, Any]]:
        """A stream of completions in OpenAI's wire format. Raises ApiError, when the other
        completions have been ended."""
        outputs: dict[int, OutputProcessor] = {}
        async with aclosing(stream):
            for chunk in self.opening_chunks():
                yield self._counted(chunk, outputs)
            async for index, output, delta in stream:
                self._note(output)
                outputs[index] = output
                if delta.finish_reason == "error":
                    raise failure(delta.error)
                if self.has_news(delta):
                    for chunk in self.chunks_of(index, delta):
                        yield self._counted(chunk, outputs)
        if self.include_usage:
            yield self.usage_chunk([outputs[index] for index in sorted(outputs)])

    def _counted(
        self, chunk: dict[str, Any], outputs: dict[int, OutputProcessor]
    ) -> dict[str, Any]:
        """A chunk with the tokens so far, where the client asked for them in each."""
        if self.continuous_usage:
            prompt = sum(map(len, self.prompts))
            completion = sum(len(output.token_ids) for output in outputs.values())
            total = {"total_tokens": prompt + completion}
            chunk["usage"] = {"prompt_tokens": prompt, "completion_tokens": completion} | total
        return chunk

    def _note(self, output: OutputProcessor) -> None:
        self.taken.append(output.began)
        self.detokenized.append(time.perf_counter())

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
