"""Proposers draft: they guess a sequence's next tokens, which one forward of the model then verifies.

A decode step reads all weights for one token; the same step over a few tokens takes hardly longer. A
proposer that guesses the next tokens cheaply and often rightly makes several tokens of one step.

N-gram drafts ("prompt lookup") cost no model at all. When the last tokens occurred before in the
sequence, what followed them there is the guess. Answers that quote, correct or complete what is in
the prompt are full of such repeats.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .sequence import Sequence

MOST_AT_ONCE = 2048  # tokens that are indexed in one step: some milliseconds


@dataclass(frozen=True)
class Draft:
    """A guess at what follows a sequence.

    probs: q, the distribution that each token was drawn from, [len(token_ids), vocab], after
        temperature and filters, for a row that accepts by rejection; None for one that matches.
    """

    token_ids: list[int]
    probs: Tensor | None = None


class Proposer(Protocol):
    """Drafts for sequences whose tokens are all known to the host.

    is_free: drafting runs no model. Then drafts are asked for as long as they may be, and cut to
        what is worth verifying; otherwise the worth is weighed first.
    """

    is_free: bool

    def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
        """A draft for each, of at most so many tokens; it may be shorter, or empty. Returns when the
        host knows the tokens: the time that takes is measured."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence, if anything: it has ended."""


@dataclass
class NgramIndex:
    """Where each n-gram of one sequence first ended, for every n in [min_n, max_n].

    Extended as tokens arrive, so a step costs the same at any length. At most some 400 bytes a token,
    in each of which a sequence holds kilobytes of keys and values.
    """

    min_n: int
    max_n: int
    token_ids: list[int] = field(default_factory=list)
    first_ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    match: int | None = None  # where the longest n-gram at the end ended before, the first time

    def extend(self, token_ids: list[int]) -> None:
        """Append tokens, and note the n-grams that end with each."""
        begin, tokens = len(self.token_ids), self.token_ids
        tokens += token_ids
        for end in range(begin + 1, len(tokens) + 1):
            match = None
            for n in range(self.min_n, min(self.max_n, end) + 1):
                first_end = self.first_ends.setdefault(tuple(tokens[end - n : end]), end)
                if first_end < end:
                    match = first_end
            self.match = match

    def lookup(self, max_length: int) -> list[int]:
        """At most max_length of the tokens after that match."""
        return [] if self.match is None else self.token_ids[self.match : self.match + max_length]


class NgramProposer:
    """Prompt lookup, by the rules of vLLM's `ngram`: the longest match of the last min_n to max_n
    tokens, and of equally long ones the earliest, which has the most tokens after it."""

    is_free = True

    def __init__(self, min_n: int, max_n: int) -> None:
        self.min_n, self.max_n = min_n, max_n
        self.indexes: dict[Sequence, NgramIndex] = {}

    def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
        lengths = zip(sequences, max_lengths, strict=True)
        return [Draft(self.draft(sequence, length)) for sequence, length in lengths]

    def draft(self, sequence: Sequence, max_length: int) -> list[int]:
        """At most max_length tokens. A sequence that may have none is not looked at."""
        if max_length <= 0:
            return []
        index = self.indexes.get(sequence)
        if index is None:
            index = self.indexes[sequence] = NgramIndex(self.min_n, self.max_n)
        num_indexed = len(index.token_ids)
        end = min(sequence.num_tokens, num_indexed + MOST_AT_ONCE)
        index.extend(sequence.tokens(num_indexed, end))
        if end < sequence.num_tokens:
            return []  # a long prompt takes some steps
        return index.lookup(max_length)

    def forget(self, sequence: Sequence) -> None:
        self.indexes.pop(sequence, None)
