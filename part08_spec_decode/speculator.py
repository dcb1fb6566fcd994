"""Between the engine and whoever drafts: how long drafts are, and what became of them."""

from typing import Any

from .config import EngineConfig
from .draft_length import DraftLength
from .draft_model import ModelProposer
from .model_runner import ModelRunner
from .scheduler import Scheduler
from .sequence import Sequence
from .speculative import NgramProposer, Proposer


class Speculator:
    """Asks a proposer for drafts, as many as pay, and counts what becomes of them."""

    def __init__(self, proposer: Proposer, most: int) -> None:
        self.proposer, self.most = proposer, most
        self.lengths = DraftLength()
        self.proposed: dict[Sequence, list[int]] = {}  # whole drafts, also what is not verified
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0

    def propose(self, scheduler: Scheduler) -> None:
        """Give drafts to those who decode."""
        self.proposed = {}
        ready = [s for s in scheduler.running if s.num_tokens - s.num_computed_tokens == 1]
        limits = [self.limit(sequence, scheduler) for sequence in ready]
        num_tokens = max(scheduler.num_tokens_ahead(), len(ready))
        drafts, lengths = self.lengths.propose(self.proposer, ready, limits, num_tokens)
        spare = scheduler.max_num_batched_tokens - num_tokens  # drafts get what is left of a step
        for sequence, draft, wanted in zip(ready, drafts, lengths, strict=True):
            length = max(min(wanted, spare), 0)
            spare -= length
            self.proposed[sequence] = draft.token_ids
            sequence.draft_token_ids = draft.token_ids[:length]
            sequence.draft_probs = draft.probs
            if not self.proposer.is_free:
                scheduler.note_drafted(sequence)

    def limit(self, sequence: Sequence, scheduler: Scheduler) -> int:
        """The longest draft that a sequence may have: there must be room for it, and for the token
        that follows it."""
        room = sequence.limit - sequence.num_tokens - 1
        if not self.proposer.is_free:  # its keys and values are written before the next step
            blocks = len(sequence.block_table) * scheduler.kv.block_size
            room = min(room, blocks - sequence.num_tokens)
        return min(self.most, max(room, 0)) if sequence.may_draft else 0

    def verified(self, sequence: Sequence, token_ids: list[int]) -> None:
        """A step has drawn these tokens after a sequence: drafts that stayed, and one more."""
        if sequence.draft_token_ids:
            self.num_drafts += 1
            self.num_draft_tokens += len(sequence.draft_token_ids)
            self.num_accepted_tokens += len(token_ids) - 1
        if proposed := self.proposed.pop(sequence, None):
            self.lengths.observe(sequence, proposed, token_ids)
        sequence.draft_token_ids, sequence.draft_probs = [], None

    def ran(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self.lengths.observe_step(num_tokens, seconds)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence: it has ended."""
        self.proposer.forget(sequence)
        self.lengths.forget(sequence)
        self.proposed.pop(sequence, None)

    def stats(self) -> dict[str, Any]:
        return {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
        }


def make_speculator(config: EngineConfig, runner: ModelRunner) -> Speculator | None:
    """What `--speculative` asks for. Raises ValueError."""
    if config.speculative == "off":
        return None
    proposer: Proposer
    if config.speculative == "ngram":
        proposer = NgramProposer(config.prompt_lookup_min or 2, config.prompt_lookup_max or 4)
    else:
        proposer = ModelProposer(config, runner)
    return Speculator(proposer, config.num_speculative_tokens)
