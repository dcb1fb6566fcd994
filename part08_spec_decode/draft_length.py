"""How many tokens to draft: as many as make the sequences faster, and none where none do.

A draft token that stays saves a part of a step; one that does not has made a step longer for nothing.
How likely it stays is counted, sequence by sequence. What it costs is measured while the engine runs:
next to nothing on an idle GPU, a part of a step on a CPU, its full price in any batch that keeps the
device busy. Nothing is assumed about the device, and where drafts do not pay they end.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from .proposer import Draft, Proposer
from .sequence import Sequence

NUM_SAMPLES = 9  # durations that a bucket of StepCost keeps
ENOUGH = 3  # of them, before it is believed: one slow step tells nothing
FORGET_AFTER = 500  # steps, after which what was not measured again is not believed any more
FIRST_HORIZON = 8  # tokens that a step may have before anything is known of larger ones

MEMORY = 0.93  # what a trial weighs after one more of its sequence: about the last 14 count
MEMORY_OF_EVERYONE = 0.99  # and after one more of any sequence
PRIOR_TRIALS = 4.0  # what everyone's acceptance weighs at first against a sequence's own trials
FIRST_ACCEPTANCE = 0.5  # everyone's, before anything is known
SMALLEST_GAIN = 1.05  # drafts must promise that much, or it is noise
LARGEST_LOSS = 1.03  # so much longer a step may get by drafts that most sequences have none of
FIRST_WAIT, LONGEST_WAIT = 32, 1024  # steps between the probes of a sequence that drafts nothing
IDLE_AFTER = 8  # steps without a draft, after which a free proposer is not asked in every step
MOST_IDLE = 8  # how many of such sequences it is asked for in a step
NO_DRAFT = Draft([])


def expected_tokens(acceptance: float, length: int) -> float:
    """Tokens of a step that verifies `length` drafts, each of which stays with that probability if
    those before it do: (1 - a^(K + 1)) / (1 - a). (Leviathan et al., arXiv 2211.17192)"""
    return sum(acceptance**i for i in range(length + 1))


@dataclass
class Bucket:
    """Steps of about the same size: the last of them, and when that was."""

    sizes: deque[int] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_SAMPLES))
    last_step: int = 0


class StepCost:
    """Seconds that a step takes, by its number of tokens; learnt from the steps that were run.

    Sizes are put together by powers of two, each with the median of its last durations; between those
    lie straight lines. So it fits a GPU, flat up to some hundred tokens, as well as a CPU. A size that
    was not run for long is forgotten. Larger ones than any known are taken to go on as those do, and
    smaller ones to cost in proportion; both invite to try them, and a few steps later they are known.
    """

    def __init__(self) -> None:
        self.buckets: dict[int, Bucket] = {}
        self.num_steps = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step that ran so many tokens took so long."""
        self.num_steps += 1
        oldest = self.num_steps - FORGET_AFTER
        for place in [i for i, b in self.buckets.items() if b.last_step < oldest]:
            del self.buckets[place]
        bucket = self.buckets.setdefault((num_tokens - 1).bit_length(), Bucket())  # 1, 2, 3-4, …
        bucket.sizes.append(num_tokens)
        bucket.seconds.append(seconds)
        bucket.last_step = self.num_steps

    def estimate(self, num_tokens: int, most: int) -> np.ndarray:
        """Seconds of steps of num_tokens, num_tokens + 1, … tokens: up to `most` more, but not beyond
        twice of what was run. At least one number."""
        known = [b for _, b in sorted(self.buckets.items()) if len(b.sizes) >= ENOUGH]
        if not known:
            return np.ones(1 + min(most, max(FIRST_HORIZON - num_tokens, 0)))
        sizes = [0.0, *(sum(b.sizes) / len(b.sizes) for b in known)]
        seconds = [0.0, *(median(b.seconds) for b in known)]
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]) if len(known) > 1 else 0.0
        horizon = max(2 * sizes[-1], FIRST_HORIZON)
        seconds.append(seconds[-1] + max(slope, 0.0) * (horizon - sizes[-1]))
        sizes.append(horizon)
        # A larger step is not faster: where it seems so, the smaller one was disturbed.
        rising = np.minimum.accumulate(seconds[::-1])[::-1]
        most = min(most, max(int(horizon) - num_tokens, 0))
        return np.interp(num_tokens + np.arange(most + 1), sizes, rising)


@dataclass
class Acceptance:
    """How often a draft token stays whose predecessors do; old trials weigh less."""

    hits: float = 0.0
    trials: float = 0.0
    memory: float = MEMORY
    prior_trials: float = PRIOR_TRIALS  # what everyone's acceptance counts for
    wait: int = FIRST_WAIT  # steps between probes
    num_idle: int = 0  # steps since something was drafted

    def observe(self, hits: int, trials: int) -> None:
        weight = self.memory**trials
        self.hits, self.trials = weight * self.hits + hits, weight * self.trials + trials
        self.prior_trials *= weight

    def rate(self, prior: float) -> float:
        """Between 0 and 1, and the prior without any trials."""
        return (self.hits + self.prior_trials * prior) / (self.trials + self.prior_trials)


class DraftLength:
    """Divides a step's drafts among its sequences, so that they are fast."""

    def __init__(self) -> None:
        self.step_cost = StepCost()
        self.draft_seconds: deque[float] = deque(maxlen=NUM_SAMPLES)  # of drafting one place
        self.last_drafting = 0  # the step when they were measured last
        self.everyone = Acceptance(memory=MEMORY_OF_EVERYONE)
        self.acceptances: dict[Sequence, Acceptance] = {}
        self.num_steps = 0

    def propose(
        self, proposer: Proposer, sequences: list[Sequence], limits: list[int], num_tokens: int
    ) -> tuple[list[Draft], list[int]]:
        """(a draft for each sequence that decodes in this step, how much of it to verify).

        limits: most tokens that each draft may have. num_tokens: how many the step runs without drafts,
        all sequences and prompts together. `observe` wants each draft back, the whole of it.
        """
        self.num_steps += 1
        if proposer.is_free:
            drafts = proposer.propose(sequences, self.worth_asking(sequences, limits))
            lengths = [len(draft.token_ids) for draft in drafts]
            return drafts, self.choose(sequences, lengths, num_tokens)
        limits = self.choose(sequences, limits, num_tokens)
        if not any(limits):
            return [NO_DRAFT] * len(sequences), limits
        begin = time.perf_counter()
        drafts = proposer.propose(sequences, limits)
        self.observe_drafting(max(limits), time.perf_counter() - begin)
        return drafts, [len(draft.token_ids) for draft in drafts]

    def worth_asking(self, sequences: list[Sequence], limits: list[int]) -> list[int]:
        """The limits, but 0 for some of those who drafted nothing for long.

        Such are asked by turns, about MOST_IDLE of them in a step: even a look into a table adds up.
        """
        num_turns = 1 + len(sequences) // MOST_IDLE
        if num_turns == 1:
            return limits
        turn = self.num_steps % num_turns
        return [
            0 if i % num_turns != turn and self.of(sequence).num_idle > IDLE_AFTER else limit
            for i, (sequence, limit) in enumerate(zip(sequences, limits, strict=True))
        ]

    def choose(self, sequences: list[Sequence], limits: list[int], num_tokens: int) -> list[int]:
        """How much to draft for each, at most its limit."""
        lengths = [0] * len(limits)
        if any(limits):
            lengths = self.most_worth(sequences, limits, num_tokens)
        for i, sequence in enumerate(sequences):
            acceptance = self.of(sequence)
            if lengths[i] > 0:
                acceptance.wait, acceptance.num_idle = FIRST_WAIT, 0
                continue
            acceptance.num_idle += 1
            if limits[i] > 0 and self.num_steps % acceptance.wait == 0:
                # Waits are multiples of each other, so those who probe mostly do so in one step.
                lengths[i] = 1
                acceptance.wait = min(2 * acceptance.wait, LONGEST_WAIT)
        return lengths

    def most_worth(
        self, sequences: list[Sequence], limits: list[int], num_tokens: int
    ) -> list[int]:
        """The lengths with which the sequences are fastest on geometric average.

        A sequence's speed is its expected tokens by the step's seconds. So draft tokens are taken in
        the order of the factors that they make their sequences faster by, over all sequences; each
        makes the step longer for all. (The most tokens a second in sum would let those who are
        easy to guess run ahead at the cost of the rest, who then end later, in a smaller batch.) And
        while less than half of them have a draft, the rest may lose no more than LARGEST_LOSS.
        """
        places = np.arange(1, max(limits) + 1)
        prior = self.everyone.rate(FIRST_ACCEPTANCE)  # what is not known of one is as of everyone
        rates = np.array([self.of(sequence).rate(prior) for sequence in sequences])
        tokens = 1 + (rates[:, None] ** places).cumsum(axis=1)  # expected_tokens(rate, place)
        gains = np.diff(np.log(tokens), axis=1, prepend=0.0)  # [num_sequences, places], falling
        gains[places > np.array(limits)[:, None]] = -1
        order = np.argsort(-gains, axis=None, kind="stable")[: sum(limits)]
        verify_seconds = self.step_cost.estimate(num_tokens, len(order))
        order = order[: len(verify_seconds) - 1]
        depth = np.append(0, np.maximum.accumulate(order % len(places) + 1))  # forwards to draft
        seconds = verify_seconds + depth * self.seconds_per_place
        speed = np.append(0, gains.flat[order].cumsum()) / len(sequences) - np.log(seconds)
        num_drafting = np.append(0, (order % len(places) == 0).cumsum())  # sequences
        is_for_few = 2 * num_drafting < len(sequences)
        speed[is_for_few & (seconds > LARGEST_LOSS * seconds[0])] = -np.inf
        best = int(speed.argmax())
        if speed[best] < speed[0] + np.log(SMALLEST_GAIN):
            best = 0
        return np.bincount(order[:best] // len(places), minlength=len(limits)).tolist()

    @property
    def seconds_per_place(self) -> float:
        """What the proposer takes to draft one token of every sequence.

        0 until it is measured, and again when that was long ago: then drafts are tried once more.
        """
        if self.num_steps - self.last_drafting > FORGET_AFTER:
            self.draft_seconds.clear()
        return median(self.draft_seconds) if self.draft_seconds else 0.0

    def of(self, sequence: Sequence) -> Acceptance:
        """What is known of a sequence's drafts."""
        acceptance = self.acceptances.get(sequence)
        if acceptance is None:
            acceptance = self.acceptances[sequence] = Acceptance()
        return acceptance

    def observe(
        self, sequence: Sequence, draft_token_ids: list[int], emitted_token_ids: list[int]
    ) -> None:
        """What a sequence's draft was and what came.

        The draft is the whole one, also what was not verified: it is compared with what came anyway,
        so a proposer that is free goes on being judged where its drafts are not used.
        """
        num_compared = min(len(draft_token_ids), len(emitted_token_ids))
        if num_compared == 0:
            return
        hits = 0
        while hits < num_compared and draft_token_ids[hits] == emitted_token_ids[hits]:
            hits += 1
        trials = hits + (hits < num_compared)
        self.of(sequence).observe(hits, trials)
        self.everyone.observe(hits, trials)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step ran so many tokens, drafts among them, in so long; drafting them does not count."""
        self.step_cost.observe(num_tokens, seconds)

    def observe_drafting(self, num_places: int, seconds: float) -> None:
        """Drafting at most num_places tokens a sequence took so long."""
        self.draft_seconds.append(seconds / num_places)
        self.last_drafting = self.num_steps

    def forget(self, sequence: Sequence) -> None:
        """Drop what is kept for a sequence: it has ended."""
        self.acceptances.pop(sequence, None)
