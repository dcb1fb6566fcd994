"""Speculation as the engine sees it: after each step, drafts for the next; and what became of them.

A proposer makes the drafts, `draft_length.py` says how long they are worth to be, and
`rejection_sampler.py` decides on the device which of their tokens stay.
"""

from typing import Any

from common.completions import NO_DRAFTS
from common.trace import Trace, phase

from .config import EngineConfig
from .draft_length import DraftLength
from .draft_model import ModelProposer
from .model_runner import ModelRunner
from .proposer import NgramProposer, Proposer
from .scheduler import Scheduler
from .sequence import Sequence


class NoSpeculator:
    """Drafts nothing."""

    num_in_flight = 2  # steps

    def propose(self, scheduler: Scheduler, num_tokens: int, seconds: float) -> None:
        """Give drafts to the sequences that decode.

        num_tokens, seconds: of the step before.
        """

    def settle(self, sequences: list[Sequence], token_ids: list[list[int]]) -> None:
        """A step has drawn these tokens after each sequence: drafts that stayed, and one more."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence: it has ended."""

    def stats(self) -> dict[str, Any]:
        return {}


class Speculator(NoSpeculator):
    """Asks a proposer for drafts, as many as pay, and counts what becomes of them."""

    num_in_flight = 1  # what is drafted depends on what was drawn

    def __init__(self, proposer: Proposer, most: int, trace: Trace) -> None:
        self.proposer, self.most, self.trace = proposer, most, trace
        self.lengths = DraftLength()
        self.proposed: dict[Sequence, list[int]] = {}  # whole drafts, also what is not verified
        self.counts = NO_DRAFTS  # of all sequences
        self.accepted_at = [0] * most  # tokens that stayed, by their place in the draft

    @phase
    def propose(self, scheduler: Scheduler, num_tokens: int, seconds: float) -> None:
        self.lengths.observe_step(num_tokens, seconds)
        self.proposed = {s: draft for s, draft in self.proposed.items() if s.num_placeholders}
        ready = [s for s in scheduler.running if s.num_tokens - s.num_computed_tokens == 1]
        limits = [self.limit(sequence, scheduler) for sequence in ready]
        num_ahead = max(scheduler.num_tokens_ahead(), len(ready))
        drafts, lengths = self.lengths.propose(self.proposer, ready, limits, num_ahead)
        spare = scheduler.max_num_batched_tokens - num_ahead  # drafts get what is left of a step
        for sequence, draft, wanted in zip(ready, drafts, lengths, strict=True):
            length = max(min(wanted, spare), 0)
            spare -= length
            if draft.token_ids:
                self.proposed[sequence] = draft.token_ids
            sequence.draft_token_ids = draft.token_ids[:length]
            sequence.draft_probs = draft.probs

    def limit(self, sequence: Sequence, scheduler: Scheduler) -> int:
        """The longest draft that a sequence may have: there must be room for it, and for the token
        that follows it."""
        if not sequence.may_draft:
            return 0
        room = sequence.limit - sequence.num_tokens - 1
        if not self.proposer.is_free:  # its keys and values are written before the next step
            blocks = len(sequence.block_table) * scheduler.kv.block_size
            room = min(room, blocks - sequence.num_tokens)
        return min(self.most, max(room, 0))

    def settle(self, sequences: list[Sequence], token_ids: list[list[int]]) -> None:
        for sequence, new in zip(sequences, token_ids, strict=True):
            if sequence.draft_token_ids or sequence in self.proposed:  # and has not ended
                self.settle_draft(sequence, new)

    def settle_draft(self, sequence: Sequence, token_ids: list[int]) -> None:
        """What was computed for rejected drafts is as if it had never been: the tokens that come
        instead are computed in their place."""
        num_drafts, num_accepted = len(sequence.draft_token_ids), len(token_ids) - 1
        sequence.num_computed_tokens -= num_drafts - num_accepted
        sequence.num_total_tokens += num_accepted
        sequence.num_drafter_tokens = min(sequence.num_drafter_tokens, sequence.num_computed_tokens)
        sequence.draft_counts = sequence.draft_counts.plus(num_drafts, num_accepted)
        if num_drafts > num_accepted:
            self.trace.rejected(sequence.request_id, num_drafts - num_accepted)
        self.counts = self.counts.plus(num_drafts, num_accepted)
        for place in range(num_accepted):
            self.accepted_at[place] += 1
        self.lengths.observe(sequence, self.proposed.pop(sequence), token_ids)
        sequence.draft_token_ids, sequence.draft_probs = [], None

    def forget(self, sequence: Sequence) -> None:
        self.proposer.forget(sequence)
        self.lengths.forget(sequence)
        self.proposed.pop(sequence, None)

    def stats(self) -> dict[str, Any]:
        return self.counts._asdict() | {"num_accepted_at": list(self.accepted_at)}


def make_speculator(config: EngineConfig, runner: ModelRunner, trace: Trace) -> NoSpeculator:
    """What `--speculative` asks for. Raises ValueError."""
    if config.speculative == "off":
        return NoSpeculator()
    proposer: Proposer
    if config.speculative == "ngram":
        proposer = NgramProposer(config.prompt_lookup_min or 2, config.prompt_lookup_max or 4)
    else:
        proposer = ModelProposer(config, runner)
    return Speculator(proposer, config.num_speculative_tokens, trace)
