"""The length of drafts: one more token is drafted as long as that makes the sequences faster.

A step of T seconds from which a sequence expects E tokens gives it E / T tokens a second. One more
draft token, accepted with probability p, raises E to E + p for one sequence, and T by the token's
price for all. `DraftLength` takes draft tokens in the order of the factor (E + p) / E, over all
sequences, and stops where the geometric mean of the speeds E / T is largest. (The largest sum of
the speeds would let sequences that are easy to guess run ahead; the others would end later, in a
smaller batch.)

The acceptance rate a of each sequence is counted: with K drafts E = 1 + a + … + a^K (Leviathan et
al., "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192). The price is
measured: `StepTime` learns T by the number of query tokens from the steps that the engine runs.
Verification costs almost nothing on an idle GPU, part of a step on a CPU, and its full share where
a batch keeps the device busy.
"""

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from statistics import median

import numpy as np

from .proposer import Draft, Proposer
from .sequence import Sequence

# Drafts must promise that much, or it is noise; where most sequences have none, cost at most that.
SMALLEST_GAIN, LARGEST_LOSS = 1.05, 1.03
MEMORY = 0.98  # weight of old trials after one more: about the last 50 count
PRIOR_TRIALS = 4  # at the rate of all sequences, added to a sequence's own trials
NUM_SAMPLES, ENOUGH = 9, 3  # durations that are kept, and how many are needed to believe them
RETRY_AFTER = 256  # steps from probe to probe, and steps after which a duration is forgotten
UNKNOWN = [(0, 1, 1.0), (0, 4, 1.0)]  # steps before any is measured: their size changes nothing


def expected_tokens(acceptance: float, length: int) -> float:
    """E, the tokens of a step that verifies `length` drafts: (1 - a^(K + 1)) / (1 - a)."""
    return sum(acceptance**i for i in range(length + 1))


class StepTime:
    """Seconds of a step by its number of query tokens: medians of recent steps.

    Sizes up to each power of two share a bucket. Straight lines lead from the origin to the
    smallest bucket, from bucket to bucket, and on to twice the largest. Beyond that a step costs
    infinitely much: larger steps are tried one doubling at a time.
    """

    def __init__(self) -> None:
        self.buckets: dict[int, deque[tuple[int, int, float]]] = {}  # (step, num_tokens, seconds)
        self.step = 0  # the number of the latest

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note the duration of a step; forget sizes that were not run for long."""
        self.step += 1
        self.buckets = {i: b for i, b in self.buckets.items() if b[-1][0] > self.step - RETRY_AFTER}
        bucket = self.buckets.setdefault((num_tokens - 1).bit_length(), deque(maxlen=NUM_SAMPLES))
        bucket.append((self.step, num_tokens, seconds))

    def estimate(self, num_tokens: np.ndarray) -> np.ndarray:
        """Seconds of steps of these sizes."""
        full = [bucket for _, bucket in sorted(self.buckets.items()) if len(bucket) >= ENOUGH]
        known = [[median(column) for column in zip(*b, strict=True)] for b in full] or UNKNOWN
        _, sizes, seconds = (list(column) for column in zip((0, 0, 0.0), *known, strict=True))
        # More tokens take no less time: where they seem to, the smaller step was disturbed.
        seconds = np.minimum.accumulate(seconds[::-1])[::-1].tolist()
        slope = np.diff(seconds)[-1] / np.diff(sizes)[-1] if len(known) > 1 else 0.0
        sizes, seconds = [*sizes, 2 * sizes[-1]], [*seconds, seconds[-1] + slope * sizes[-1]]
        return np.interp(num_tokens, sizes, seconds, right=np.inf)


@dataclass
class Acceptance:
    """How often a draft token is accepted if those before it are; old trials weigh less."""

    hits: float = 0.0
    trials: float = 0.0

    def observe(self, hits: int, trials: int) -> None:
        """Count trials, so many of which were hits."""
        weight = MEMORY**trials
        self.hits, self.trials = weight * self.hits + hits, weight * self.trials + trials

    def rate(self, prior: float) -> float:
        """Between 0 and 1; the prior without any trials."""
        return (self.hits + PRIOR_TRIALS * prior) / (self.trials + PRIOR_TRIALS)


class DraftLength:
    """Decides how many tokens each sequence of a step drafts, from what earlier steps have shown."""

    def __init__(self) -> None:
        self.step_time = StepTime()
        self.place_seconds: deque[float] = deque(maxlen=NUM_SAMPLES)  # of a model: to draft a token
        self.shared = Acceptance()  # of all sequences
        self.acceptances: dict[Sequence, Acceptance] = defaultdict(Acceptance)

    def propose(
        self, proposer: Proposer, sequences: list[Sequence], limits: list[int], num_tokens: int
    ) -> tuple[list[Draft], list[int]]:
        """(a draft for each sequence that decodes in this step, how much of it to verify).

        limits: the most tokens that each draft may have. num_tokens: query tokens of the step
        without drafts, prompts among them. `observe` wants each draft back whole, also what is not
        verified.
        """
        if proposer.is_free:
            drafts = proposer.propose(sequences, limits)
            return drafts, self.choose(sequences, [len(d.token_ids) for d in drafts], num_tokens)
        lengths = self.choose(sequences, limits, num_tokens)
        if self.step_time.step % RETRY_AFTER == RETRY_AFTER - 1:
            # A probe, of all sequences in one step; it counts for more without what came long ago.
            lengths = [max(n, min(most, 1)) for n, most in zip(lengths, limits, strict=True)]
            self.acceptances.clear()
        begin = time.perf_counter()
        drafts = proposer.propose(sequences, lengths)
        lengths = [len(draft.token_ids) for draft in drafts]
        if any(lengths):  # none while the model catches up on a long prompt
            self.place_seconds.append((time.perf_counter() - begin) / max(lengths))
        return drafts, lengths

    def choose(self, sequences: list[Sequence], limits: list[int], num_tokens: int) -> list[int]:
        """The length of each draft, at most its limit, with which the sequences are fastest."""
        most = max(limits, default=0)
        if most == 0:
            return limits
        prior = self.shared.rate(0.5)
        rates = np.array([self.acceptances[sequence].rate(prior) for sequence in sequences])
        # log (E + p) - log E: [num_sequences, most], falling in each row
        gains = np.diff(np.log((rates[:, None] ** np.arange(most + 1)).cumsum(axis=1)), axis=1)
        gains[np.arange(most) >= np.array(limits)[:, None]] = -1
        order = np.argsort(-gains, axis=None, kind="stable")[: sum(limits)]
        seconds = self.step_time.estimate(num_tokens + np.arange(len(order) + 1))  # T
        if len(self.place_seconds) >= ENOUGH:  # the fastest: others had to catch up on a prompt
            depth = np.append(0, np.maximum.accumulate(order % most + 1))  # forwards to draft
            seconds += depth * min(self.place_seconds)
        speeds = np.exp(np.append(0, gains.flat[order].cumsum()) / len(limits)) / seconds
        num_drafting = np.append(0, (order % most == 0).cumsum())  # sequences
        speeds[(2 * num_drafting < len(limits)) & (seconds > LARGEST_LOSS * seconds[0])] = 0
        best = int(speeds.argmax()) if speeds.max() > SMALLEST_GAIN * speeds[0] else 0
        return np.bincount(order[:best] // most, minlength=len(limits)).tolist()

    def observe(self, sequence: Sequence, draft: list[int], emitted: list[int]) -> None:
        """Compare the tokens of a sequence's draft with those that came.

        The whole draft counts, also what was not verified: a proposer that is free goes on being
        judged where its drafts are not used.
        """
        num_compared = min(len(draft), len(emitted))
        hits = next((i for i in range(num_compared) if draft[i] != emitted[i]), num_compared)
        trials = min(hits + 1, num_compared)
        self.acceptances[sequence].observe(hits, trials)
        self.shared.observe(hits, trials)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Note how long a step took that ran num_tokens, drafts among them; drafting does not
        count."""
        self.step_time.observe(num_tokens, seconds)

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence: it has ended."""
        self.acceptances.pop(sequence, None)
