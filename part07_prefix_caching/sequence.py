"""A request as the engine sees it, and what a step says about it. Tokens only: text is not here."""

import sys
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
    limit: int = sys.maxsize  # tokens that it may have, prompt and output together
    cache_salt: str | None = None  # it shares blocks only with those that have the same

    # set by the engine, step by step
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None  # of its prompt, so far, if it asks
    num_placeholders: int = 0  # output tokens that are on their way: launched and not yet read
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache, or on their way

    # set by the scheduler
    block_table: list[int] = field(default_factory=list)
    row: int | None = None  # its row in the runner's tables while it runs
    num_cached_tokens: int | None = None  # that were found in the cache when it first joined

    # set by the prefix cache
    block_keys: list[bytes] = field(default_factory=list)  # of its first full blocks
    num_published_blocks: int = 0  # of its table, that others can find

    @property
    def num_cacheable_tokens(self) -> int:
        """Tokens whose keys and values may come out of the cache: all that are known but the last,
        and none where the prompt's are to be scored."""
        return 0 if self.params.prompt_logprobs is not None else self.num_known_tokens - 1

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Also those that are on their way."""
        return self.num_known_tokens + self.num_placeholders

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids `begin` to `end` of prompt and output together.

        One that is on its way is written as -1 - row: the device puts in what that row has drawn.
        """
        offset = len(self.prompt_token_ids)
        if begin >= self.num_known_tokens:
            return [-1 - self.row] * (end - begin)
        if begin >= offset:
            return self.output_token_ids[begin - offset : end - offset]
        return (self.prompt_token_ids + self.output_token_ids)[begin:end]


@dataclass(frozen=True)
class RequestOutput:
    """What one step adds to a request.

    token_ids: after them NO_TOKEN where no token could be drawn, with the reason `error`.
    finish_reason: `stop`, `length`, `abort` or `error` on the last output of a request, else None.
    prompt_logprobs: where asked for, of all tokens of the prompt but the first.
    num_cached_tokens: how many of its prompt's tokens were not computed but found.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
