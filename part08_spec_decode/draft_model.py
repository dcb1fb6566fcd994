"""Drafts from a model: a smaller one with the same vocabulary, or some layers of the model itself.

Either writes keys and values into the blocks that its sequences have already. A model of its own
has a tensor of its own under the same block numbers, so whatever happens to a block happens to both:
preemption, sharing, and drafts that did not stay, which are written over. The model's own layers
use what the model has computed for the tokens before; what they write for drafts, its verification
overwrites (Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via
Self-Speculative Decoding", ACL 2024).

Drafts are drawn with the noise that the model will draw its own tokens with: where the two models
agree roughly, they then draw the same. Requests without a seed are verified by rejection, which has
noise of its own.
"""

from dataclasses import replace

import torch

from .config import EngineConfig
from .model_runner import Batch, ModelRunner
from .rejection_sampler import target_probs
from .sampler import Sampled, sample
from .sequence import Sequence
from .speculative import Draft


class ModelProposer:
    """Drafts token after token, all sequences side by side."""

    is_free = False

    def __init__(self, config: EngineConfig, runner: ModelRunner) -> None:
        """Raises ValueError."""
        self.runner, self.budget = runner, config.max_num_batched_tokens
        self.repeats = config.seed is not None  # so what is drawn may not depend on draft lengths
        self.has_own_kv = config.speculative == "draft"
        self.model = runner.draft_model if self.has_own_kv else runner.model
        self.kv_data = (runner.draft_kv if self.has_own_kv else runner.kv).data
        self.layers = None if self.has_own_kv else layers_to_run(config, runner)
        self.was_catching_up = False

    def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
        """Each forward takes what the one before it has drawn from the device: tokens are read when
        all are launched."""
        limits = dict(zip(sequences, max_lengths, strict=True))
        rounds, probs = [], {sequence: [] for sequence in sequences}
        running, begins, counts = self.first_round(limits)
        # Behind a draft that has stayed whole there are two: its last token was not run yet.
        self.was_catching_up = max(counts, default=0) > 2
        while running:
            batch = self.runner.lay_out(running, begins, counts, admitted=[])
            work = self.runner.queue.submit(lambda batch=batch: self.run(batch, probs))
            batch.buffers.reader = work
            rounds.append((batch.sampled, work))
            running = [sequence for sequence in batch.sampled if limits[sequence] > len(rounds)]
            begins = [sequence.num_tokens + len(rounds) - 1 for sequence in running]
            counts = [1] * len(running)
        drawn: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        for sampled, work in rounds:
            for sequence, token_id in zip(sampled, work.result().token_ids.tolist(), strict=True):
                drawn[sequence].append(token_id)
                sequence.num_drafted_kv = sequence.num_tokens + len(drawn[sequence]) - 1
        return [
            Draft(drawn[sequence], torch.stack(probs[sequence]) if probs[sequence] else None)
            for sequence in sequences
        ]

    def first_round(
        self, limits: dict[Sequence, int]
    ) -> tuple[list[Sequence], list[int], list[int]]:
        """Who runs, from where, and how many tokens: those that the model has not seen yet.

        A model of its own has to catch up on a prompt, in slices as large as a step may be; until
        then it drafts nothing for it.
        """
        running, begins, counts, budget = [], [], [], self.budget
        for sequence, limit in limits.items():
            begin = sequence.num_tokens - 1
            if self.has_own_kv:  # all but what was drafted and has not stayed
                begin = min(sequence.num_drafted_kv, begin)
            count = min(sequence.num_tokens - begin, budget)
            if limit > 0 and count > 0:
                running.append(sequence)
                begins.append(begin)
                counts.append(count)
                budget -= count
                sequence.num_drafted_kv = begin + count
        return running, begins, counts

    @torch.inference_mode()
    def run(self, batch: Batch, probs: dict[Sequence, list[torch.Tensor]]) -> Sampled:
        """Draw the next token of each sampled sequence; note what it was drawn from, if it matters.

        On the device.
        """
        runner, about = self.runner, batch.sampling
        runner.fill_in(batch)
        hidden = self.model.forward(
            batch.token_ids, batch.positions, self.kv_data, batch.metadata, self.layers
        )
        if not batch.sampled:
            return Sampled(batch.rows, [])
        logits = about.biased(self.model.logits(hidden[batch.sampled_tokens]))
        rejecting = [i for i, sequence in enumerate(batch.sampled) if self.will_reject(sequence)]
        if rejecting:
            rows = torch.tensor(rejecting, device=logits.device)
            columns = (about.temperature, about.top_k, about.top_p, about.min_p)
            columns = [column[rows, 0] for column in columns]
            found = target_probs(runner.ops, logits[rows], *columns)
            for i, row in zip(rejecting, found, strict=True):
                probs[batch.sampled[i]].append(row)
        unbiased = replace(about, biases=None)  # they are in the logits
        token_ids = sample(runner.ops, logits, unbiased).clamp(min=0)  # any draft will do
        runner.last_token_ids[batch.rows] = token_ids
        return Sampled(token_ids, about.num_logprobs)

    def will_reject(self, sequence: Sequence) -> bool:
        """Whether a sequence's drafts stay by rejection: where no seed promises what is drawn."""
        params = sequence.params
        return params.seed is None and params.temperature > 0 and not self.repeats

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept here."""


def layers_to_run(config: EngineConfig, runner: ModelRunner) -> list[int]:
    """The layers that draft: the first and the last ones, without some in between.

    Raises ValueError.
    """
    num_layers = runner.model.config.num_layers
    count = config.draft_layers or max(1, round(num_layers * 2 / 3))
    if count > num_layers:
        raise ValueError(f"draft_layers is {count}: the model has {num_layers}")
    num_first = (count + 1) // 2
    return [*range(num_first), *range(num_layers - (count - num_first), num_layers)]
