"""Drafts from a model: a smaller one with the same vocabulary, or some layers of the model itself.

Either writes keys and values into the blocks that its sequences have already. A smaller model has a
tensor of its own in the KV cache, under the same block numbers. It reads a sequence only once that
is to draft, so a sequence that never drafts costs it nothing; what was found in the prefix cache it
reads too. The model's own layers use what the model has computed for the tokens before; what they
write for drafts, its verification overwrites (Zhang et al., "Draft & Verify: Lossless Large Language
Model Acceleration via Self-Speculative Decoding", ACL 2024).

Drafts are drawn with the noise that the model will draw its own tokens with: where the two models
agree roughly, they then draw the same. Requests without a seed are verified by rejection, which has
noise of its own.
"""

from dataclasses import replace
from functools import partial

import torch

from common.device import to_device
from common.logprobs import SampledLogprobs

from .config import EngineConfig
from .device_queue import Work
from .input_batch import Batch
from .model_runner import ModelRunner
from .proposer import Draft
from .rejection_sampler import target_probs
from .sampler import Sampled, sample
from .sequence import Sequence


class ModelProposer:
    """Drafts token after token, all sequences side by side."""

    is_free = False

    def __init__(self, config: EngineConfig, runner: ModelRunner) -> None:
        self.runner, self.budget = runner, config.max_num_batched_tokens
        self.repeats = config.seed is not None  # so what is drawn may not depend on draft lengths
        self.is_smaller_model = config.speculative == "draft"

    def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
        """Each forward takes what the one before it has drawn from the device: tokens are read when
        all are launched."""
        limits = dict(zip(sequences, max_lengths, strict=True))
        drawn: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        probs: dict[Sequence, list[torch.Tensor]] = {sequence: [] for sequence in sequences}
        rounds: list[tuple[list[Sequence], Work]] = []
        running, counts = self.unread([s for s in sequences if limits[s] > 0])
        begins = [self.num_read(sequence) for sequence in running]
        while running:
            for sequence, begin, count in zip(running, begins, counts, strict=True):
                sequence.num_drafter_tokens = begin + count
            drawing = [s for s in running if s.num_drafter_tokens >= s.num_tokens]
            batch = self.runner.inputs.lay_out(running, begins, counts)
            work = self.launch(batch, {s: probs[s] for s in drawing})
            rounds.append((drawing, work))
            running = [sequence for sequence in drawing if limits[sequence] > len(rounds)]
            begins = [sequence.num_drafter_tokens for sequence in running]
            counts = [1] * len(running)
        for drawing, work in rounds:
            for sequence, token_id in zip(drawing, work.result().token_ids.tolist(), strict=True):
                drawn[sequence].append(token_id)
        return [Draft(drawn[s], torch.stack(probs[s]) if probs[s] else None) for s in sequences]

    def unread(self, sequences: list[Sequence]) -> tuple[list[Sequence], list[int]]:
        """The sequences that run first, and how many tokens of each: those that were not read yet.

        Mostly one; two after a draft that stayed whole, whose last token was not run. A prompt is
        read in slices as large as a step may be, and nothing is drafted until it is read.
        """
        running, counts, budget = [], [], self.budget
        for sequence in sequences:
            count = min(sequence.num_tokens - self.num_read(sequence), budget)
            if count > 0:
                running.append(sequence)
                counts.append(count)
                budget -= count
        return running, counts

    def num_read(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are there. The model's own layers find those of all but the
        last."""
        if self.is_smaller_model:
            return min(sequence.num_drafter_tokens, sequence.num_tokens - 1)
        return sequence.num_tokens - 1

    def launch(self, batch: Batch, probs: dict[Sequence, list[torch.Tensor]]) -> Work:
        """Give the device one round.

        probs: what each sequence that draws a token has drawn its draft from so far; the device adds
        to it where drafts stay by rejection.
        """
        rejecting = [(i, rows) for i, (s, rows) in enumerate(probs.items()) if self.will_reject(s)]
        work = self.runner.queue.submit(
            partial(self.run, batch, rejecting), batch.shape.num_tokens, 1
        )
        self.runner.inputs.launched(work)
        return work

    @torch.inference_mode()
    def run(self, batch: Batch, rejecting: list[tuple[int, list[torch.Tensor]]]) -> Sampled:
        """Run one round of drafting, on the device."""
        self.runner.fill_in(batch, self.runner.drafter)
        logits, _ = self.runner.forward(batch, self.runner.drafter)
        if not batch.draft_lengths:  # no token is drawn
            return Sampled(batch.rows, SampledLogprobs([]))
        sampling = replace(batch.sampling, biases=None)  # they are in the logits
        logits = batch.sampling.biased(logits)
        if rejecting:
            numbers = [place for place, _ in rejecting]
            places = to_device(numbers, torch.int64, logits.device)
            filters = sampling.filters(places)
            found = target_probs(self.runner.ops, logits[places], **filters)
            for (_, rows), row in zip(rejecting, found, strict=True):
                rows.append(row)
        token_ids = sample(self.runner.ops, logits, sampling).clamp(min=0)  # any draft will do
        self.runner.last_token_ids[batch.rows] = token_ids
        return Sampled(token_ids, SampledLogprobs([]))

    def will_reject(self, sequence: Sequence) -> bool:
        """Whether a sequence's drafts stay by rejection: where no seed promises what is drawn."""
        params = sequence.params
        return params.seed is None and params.temperature > 0 and not self.repeats

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept here."""
