"""A request as the engine sees it: tokens, progress and status. Text is not here."""

from dataclasses import dataclass, field
from enum import Enum

from common.completions import TokenLogprobs
from common.requests import Request
from common.sampling import SamplingParams


class Status(Enum):
    """Where a sequence is in its life. `scheduler.py` alone changes it."""

    WAITING = "waiting"  # in the queue; it holds nothing
    RUNNING = "running"  # it holds blocks
    FINISHED = "finished"


TRANSITIONS = {
    Status.WAITING: {Status.RUNNING, Status.FINISHED},
    Status.RUNNING: {Status.WAITING, Status.FINISHED},
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

    # set by the scheduler
    status: Status = Status.WAITING
    num_computed_tokens: int = 0  # tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.request.prompt_token_ids

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, begin: int, end: int) -> list[int]:
        """Token ids `begin` to `end` of prompt and output together."""
        offset = len(self.prompt_token_ids)
        if begin >= offset:
            return self.output_token_ids[begin - offset : end - offset]
        return (self.prompt_token_ids + self.output_token_ids)[begin:end]
