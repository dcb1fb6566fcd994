"""Numbers that say how far two models are apart, from their logits on the same tokens."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Scores:
    """Sums over tokens; `+=` adds those of others.

    loss: of the next token. kl: of the whole vocabulary, in nats, from the reference to the model.
    same: tokens at which both have the same first choice.
    """

    num_tokens: int = 0
    num_predicted: int = 0
    loss: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, logits: Tensor, reference: Tensor, token_ids: Tensor) -> None:
        """One window of text: logits and the reference's log probabilities [n, vocab], tokens [n]."""
        logprobs = logits.float().log_softmax(dim=-1)
        self.kl += kl_divergence(reference, logprobs).double().sum().item()
        self.same += int((reference.argmax(dim=-1) == logprobs.argmax(dim=-1)).sum())
        self.loss -= logprobs[:-1].gather(1, token_ids[1:, None]).double().sum().item()
        self.num_tokens += len(token_ids)
        self.num_predicted += len(token_ids) - 1

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.num_predicted)

    @property
    def mean_kl(self) -> float:
        return self.kl / self.num_tokens

    @property
    def agreement(self) -> float:
        """Percent."""
        return 100 * self.same / self.num_tokens


def kl_divergence(reference: Tensor, logprobs: Tensor) -> Tensor:
    """Sum of p log(p / q) over the vocabulary, [n]; both are log probabilities [n, vocab]."""
    return (reference.exp() * (reference - logprobs)).sum(dim=-1)


def first_difference(output: list[int], expected: list[int]) -> int:
    """How many tokens at the beginning are the same."""
    pairs = zip(output, expected, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(expected))
