"""A request as the engine sees it, and what a step says about it. Tokens only: text is not here."""

from dataclasses import dataclass, field

from common.completions import TokenLogprobs
from common.sampling import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One request's tokens and progress."""

    # set by the request
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    ending_token_ids: frozenset[int] = frozenset()  # each of them ends the output
    choice: int = 0  # which of n completions of one prompt

    # set by the engine, step by step
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None  # of its prompt, so far, if it asks
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache

    # set by the scheduler
    block_table: list[int] = field(default_factory=list)
    row: int | None = None  # its row in the runner's tables while it runs

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids `begin` to `end` of prompt and output together."""
        offset = len(self.prompt_token_ids)
        if begin >= offset:
            return self.output_token_ids[begin - offset : end - offset]
        return (self.prompt_token_ids + self.output_token_ids)[begin:end]


@dataclass(frozen=True)
class RequestOutput:
    """What one step adds to a request.

    token_ids: after them NO_TOKEN where no token could be drawn, with the reason `error`.
    finish_reason: `stop`, `length`, `abort` or `error` on the last output of a request, else None.
    prompt_logprobs: where asked for, of all tokens of the prompt but the first.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
