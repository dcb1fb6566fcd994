"""A request as the engine sees it: tokens, progress and status. Text is not here."""

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from common.completions import NO_DRAFTS, DraftCounts, TokenLogprobs
from common.requests import Request
from common.sampling import NO_TOKEN
from common.structured.matcher import Matcher


class Status(Enum):
    """Where a sequence is in its life. `scheduler.py` alone changes it."""

    WAITING = "waiting"  # in the queue; it holds nothing on the device
    LOADING = "loading"  # it holds blocks and a row, and waits for keys and values from elsewhere
    RUNNING = "running"  # it holds blocks, and a row in the runner's tables
    ENDING = "ending"  # its last token is launched and not read; it holds blocks until it is
    FINISHED = "finished"


TRANSITIONS = {
    Status.WAITING: {Status.LOADING, Status.RUNNING, Status.FINISHED},
    Status.LOADING: {Status.RUNNING, Status.FINISHED},
    Status.RUNNING: {Status.WAITING, Status.ENDING, Status.FINISHED},
    Status.ENDING: {Status.FINISHED},
    Status.FINISHED: set(),
}


@dataclass(eq=False)
class Sequence:
    """One request's tokens and progress."""

    # set when it is added
    request: Request
    seed: int  # the request's, or a random one
    ending_token_ids: frozenset[int]  # each of them ends the output
    limit: int  # tokens that it may have, prompt and output together

    # set by the engine, step by step
    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None  # of its prompt, so far, if it asks
    matcher: Matcher | None = None  # where its output stands in its grammar, if it has one

    # set by the scheduler
    status: Status = Status.WAITING
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache, or launched
    block_table: list[int] = field(default_factory=list)
    row: int | None = None  # its row in the runner's tables while it runs
    num_cached_tokens: int | None = None  # found in the cache when it first joined
    num_lost_tokens: int = 0  # computed before it was preempted, and not kept
    num_kept_tokens: int = 0  # those that were kept on the host

    # set by the speculator
    draft_token_ids: list[int] = field(default_factory=list)  # guesses that the next step verifies
    draft_probs: Tensor | None = None  # what they were drawn from, [most, vocab]
    draft_counts: DraftCounts = NO_DRAFTS
    num_drafter_tokens: int = 0  # tokens whose keys and values a draft model has, in its own tensor

    # set by the prefix cache
    block_keys: list[bytes] = field(default_factory=list)  # of its first full blocks
    num_published_blocks: int = 0  # of its table, that other sequences can find

    # set by the host tier
    host_keys: list[bytes] = field(default_factory=list)  # of its first full blocks
    num_saved_blocks: int = 0  # published ones that were looked at for the host

    def __post_init__(self) -> None:
        """What each step asks of each sequence is kept here, and not computed anew."""
        self.request_id, self.params = self.request.request_id, self.request.params
        self.prompt_token_ids = self.request.prompt_token_ids
        self.num_tokens = len(self.prompt_token_ids)  # of prompt and output
        self.num_total_tokens = self.num_tokens  # also those that are launched and not read
        # Penalties change with every token, so a sequence that has them drafts nothing.
        self.may_draft = self.request.may_draft and not self.params.has_penalties

    def extend(self, token_ids: list[int]) -> str | None:
        """Add tokens that are read to the output, up to the one that ends it; those behind it are taken
        off the list. Returns why it ends, with `stop`, `length` or `error`; None: it goes on."""
        num_before = self.num_tokens
        for token_id in token_ids:
            self.output_token_ids.append(token_id)
            self.num_tokens += 1
            if token_id == NO_TOKEN:
                reason = "error"
            elif token_id in self.ending_token_ids:
                reason = "stop"
            elif self.num_tokens == self.limit:
                reason = "length"
            else:
                continue
            del token_ids[self.num_tokens - num_before :]
            return reason
        return None

    @property
    def num_placeholders(self) -> int:
        """Output tokens that are launched and not read."""
        return self.num_total_tokens - self.num_tokens

    @property
    def num_cacheable_tokens(self) -> int:
        """Tokens whose keys and values may come out of the cache: all that are known but the last,
        and none where the prompt's are to be scored."""
        return 0 if self.params.prompt_logprobs is not None else self.num_tokens - 1

    @property
    def rejects(self) -> bool:
        """Whether its drafts stay by rejection sampling, and not by being what is drawn."""
        return self.draft_probs is not None and bool(self.draft_token_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids `begin` to `end` of prompt and output together.

        One that is not read yet is written as -1 - row: the device puts in what that row has drawn.
        Behind the known tokens lie the drafts.
        """
        if begin >= self.num_tokens:
            return [-1 - self.row] * (end - begin)
        offset = len(self.prompt_token_ids)
        output = self.output_token_ids[max(begin - offset, 0) : max(end - offset, 0)]
        drafts = self.draft_token_ids[: max(end - self.num_tokens, 0)]
        return self.prompt_token_ids[begin:end] + output + drafts
