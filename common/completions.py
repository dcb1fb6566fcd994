"""From an engine's tokens to a user's text: detokenizing, stop strings, finish reasons.

Engines know tokens only. An `OutputProcessor` follows one completion: it turns tokens into text,
finds stop strings even where they straddle tokens, and holds back what may yet become one.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm import tqdm

from common.models.tokenizer import Tokenizer
from common.requests import Request
from common.sampling import NO_TOKEN, SamplingParams

NOT_FINITE = (
    "the model's logits are NaN or infinite: its weights are damaged, or its numbers are too large"
    " for the dtype it runs in"
)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's distribution before temperature.

    top: (token id, logprob) of the most likely tokens, most likely first.
    rank: of the token among all, 1 for the most likely; known for tokens of a prompt.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class DraftCounts(NamedTuple):
    """What became of a completion's drafts so far."""

    num_drafts: int = 0  # guesses at what follows, of some tokens each, that were verified
    num_draft_tokens: int = 0  # all their tokens
    num_accepted_tokens: int = 0  # those that stayed

    def plus(self, num_tokens: int, num_accepted: int) -> "DraftCounts":
        """After one more draft, of so many tokens; without any it was none."""
        if num_tokens == 0:
            return self
        num_drafts, num_draft_tokens, num_accepted_tokens = self
        return DraftCounts(
            num_drafts + 1, num_draft_tokens + num_tokens, num_accepted_tokens + num_accepted
        )


NO_DRAFTS = DraftCounts()


@dataclass(slots=True)
class RequestOutput:
    """What one step of an engine adds to a request.

    token_ids: after them NO_TOKEN where no token could be drawn, with the reason `error`.
    finish_reason: `stop`, `length`, `abort` or `error` on the last output of a request, else None.
        With `stop` the last token ended the output.
    prompt_logprobs: where asked for, of all tokens of the prompt but the first; in a request's first
        output, and in later ones at the engine's choice.
    num_cached_tokens: how many of its prompt's tokens were not computed but found.
    draft_counts: what became of its drafts so far. Of new tokens the drafts come first.
    error: what went wrong, where the engine knows.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    draft_counts: DraftCounts = NO_DRAFTS
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Completion:
    """One finished completion. `token_ids` includes the token that ended it.

    finish_reason: `stop` (EOS, a stop token or string), `length`, `abort` or `error`.
    index: the place in the list that `generate` returns.
    prompt_logprobs: of the prompt's tokens but the first, where they are asked for; on the first of a
        prompt's n completions.
    error: what went wrong, where it is known.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    index: int
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    num_drafts: int = 0  # as DraftCounts has them
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    error: str | None = None

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class Delta:
    """What one or more new tokens add to a completion. `finish_reason` is set on the last."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None  # what went wrong, where it is known


class OutputProcessor:
    """Follows one completion, token by token.

    prompt_token_ids: what the completion continues; its text depends on the prompt's end.
    With no tokenizer (`random:*` models) the text stays empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids) if tokenizer else None
        self.params = params
        self._held = ""  # text that may be the start of a stop string
        self._text: list[str] = []
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_cached_tokens = 0
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.began = 0.0  # when it took what is newest, in seconds of time.perf_counter

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def process(self, new: RequestOutput) -> Delta:
        """Take an engine's new tokens. Once finished, more tokens are dropped.

        With `stop` the last token counts, and its text is left out unless the request wants it. When
        a stop string appears the completion finishes here and the caller aborts the request in the
        engine. Drafts that stayed beyond a stop string have not stayed. NaN among the scores of the
        prompt is an error.
        """
        self.began = time.perf_counter()
        if self.finished:
            return Delta("", [])
        token_ids, finish_reason = new.token_ids, new.finish_reason
        if new.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = new.prompt_logprobs
            if any(math.isnan(item.logprob) for item in new.prompt_logprobs):
                token_ids, finish_reason = [NO_TOKEN], "error"
        if token_ids[-1:] == [NO_TOKEN]:
            token_ids, self.error = token_ids[:-1], NOT_FINITE
        self.error = new.error or self.error
        self.num_cached_tokens = new.num_cached_tokens
        self.num_drafts, self.num_draft_tokens, num_accepted_tokens = new.draft_counts
        text = ""
        taken = 0
        for i, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            taken += 1
            ends_output = finish_reason == "stop" and i == len(token_ids) - 1
            ends_output = ends_output and not self.params.include_stop_str_in_output
            if self._detokenizer is not None and not ends_output:
                text += self._release(self._detokenizer.push(token_id))
            if self.finished:
                break
        self.num_accepted_tokens += min(num_accepted_tokens - self.num_accepted_tokens, taken)
        if finish_reason is not None and not self.finished:
            if self._detokenizer is not None:
                text += self._release(self._detokenizer.flush())
            if not self.finished:
                text, self._held = text + self._held, ""
                self.finish_reason = finish_reason
        new_logprobs = new.logprobs[:taken] if self.params.logprobs is not None else []
        self.logprobs += new_logprobs
        self._text.append(text)
        return Delta(text, token_ids[:taken], new_logprobs, self.finish_reason, self.error)

    def _release(self, new: str) -> str:
        """Add text; return what can be given out, cut at the first stop string or behind it.

        First means the one that is complete first, so that the result does not depend on how the
        text was cut into tokens. One that is complete within min_tokens does not count.
        """
        if not self.params.stop:
            return new
        text, found = self._held + new, []
        if len(self.token_ids) > self.params.min_tokens:
            for stop in self.params.stop:
                # What is held back was looked through before.
                start = text.find(stop, max(len(self._held) - len(stop) + 1, 0))
                if start >= 0:
                    found.append((start + len(stop), start))
        if found:
            self.finish_reason, self._held = "stop", ""
            end, start = min(found)
            return text[: end if self.params.include_stop_str_in_output else start]
        longest = max(map(len, self.params.stop)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.params.stop):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text

    def completion(self, index: int = 0) -> Completion:
        """The finished completion."""
        assert self.finish_reason is not None, "completion() before the end"
        scores = self.prompt_logprobs
        if self.params.prompt_logprobs is not None and self.num_prompt_tokens == 1:
            scores = []  # the first token has none
        return Completion(
            text="".join(self._text),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            index=index,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            num_drafts=self.num_drafts,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            prompt_logprobs=scores,
            error=self.error,
        )


def run_to_completion(
    engine: Any, requests: Sequence[Request], progress: bool = True
) -> list[Completion]:
    """What `generate` does once the requests are made: step an engine until all have ended.

    progress: show a bar. Whatever happens, nothing is left behind in the engine. Raises ValueError
    when it has requests already: their outputs would be lost.
    """
    if engine.has_unfinished():
        raise ValueError("generate needs an engine that has no requests of add_request")
    outputs: dict[str, OutputProcessor] = {}
    for request in requests:
        output = OutputProcessor(engine.tokenizer, request.params, request.prompt_token_ids)
        outputs[request.request_id] = output
    try:
        for request in requests:
            engine.add_request(request)
        with tqdm(total=len(outputs), desc="Completions", disable=not progress) as bar:
            while not all(output.finished for output in outputs.values()):
                for new in engine.step():
                    output = outputs[new.request_id]
                    was_finished = output.finished
                    output.process(new)
                    if output.finished and not was_finished:
                        engine.abort(new.request_id)  # ended by a stop string, perhaps
                        bar.update()
    finally:
        engine.drop_requests()
    return [output.completion(index) for index, output in enumerate(outputs.values())]
