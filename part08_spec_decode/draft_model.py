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

import torch

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

    def catch_up(self, sequences: list[Sequence], max_lengths: list[int]) -> list[int]:
        """A slice as large as a step may be; the last two tokens are left to `propose`."""
        lengths, slices, budget = list(max_lengths), {}, self.budget
        for i, sequence in enumerate(sequences):
            missing = sequence.num_tokens - 2 - self.num_read(sequence)
            if lengths[i] > 0 and missing > 0:
                count = min(missing, budget)
                budget -= count
                if count > 0:
                    slices[sequence] = count
                if count < missing:
                    lengths[i] = 0
        if slices:
            begins = [self.num_read(sequence) for sequence in slices]
            self.launch(list(slices), begins, list(slices.values()), []).result()
            for sequence, count in slices.items():
                sequence.num_drafter_tokens += count
        return lengths

    def num_read(self, sequence: Sequence) -> int:
        """Tokens whose keys and values are there."""
        if self.is_smaller_model:
            return min(sequence.num_drafter_tokens, sequence.num_tokens - 1)
        return sequence.num_tokens - 1

    def propose(self, sequences: list[Sequence], max_lengths: list[int]) -> list[Draft]:
        """Each forward takes what the one before it has drawn from the device: tokens are read when
        all are launched. After a draft that stayed whole the first takes two tokens: the last of
        the draft was not run yet."""
        limits = dict(zip(sequences, max_lengths, strict=True))
        rounds: list[tuple[list[Sequence], list[torch.Tensor], Work]] = []
        running = [sequence for sequence in sequences if limits[sequence] > 0]
        begins = [self.num_read(sequence) for sequence in running]
        counts = [s.num_tokens - begin for s, begin in zip(running, begins, strict=True)]
        while running:
            probs: list[torch.Tensor] = []
            rounds.append((running, probs, self.launch(running, begins, counts, probs)))
            running = [sequence for sequence in running if limits[sequence] > len(rounds)]
            begins = [sequence.num_tokens + len(rounds) - 1 for sequence in running]
            counts = [1] * len(running)
        drawn: dict[Sequence, list[int]] = {sequence: [] for sequence in sequences}
        rows: dict[Sequence, list[torch.Tensor]] = {sequence: [] for sequence in sequences}
        for running, probs, work in rounds:
            for sequence, token_id in zip(running, work.result().token_ids.tolist(), strict=True):
                drawn[sequence].append(token_id)
                sequence.num_drafter_tokens = sequence.num_tokens + len(drawn[sequence]) - 1
            for sequence, row in zip(filter(self.will_reject, running), probs, strict=True):
                rows[sequence].append(row)
        return [Draft(drawn[s], torch.stack(rows[s]) if rows[s] else None) for s in sequences]

    def launch(
        self,
        sequences: list[Sequence],
        begins: list[int],
        counts: list[int],
        probs: list[torch.Tensor],
    ) -> Work:
        """Run so many tokens of each sequence, and draw the next where it has no more.

        probs: gets what they were drawn from, of the sequences that will reject.
        """
        batch = self.runner.inputs.lay_out(sequences, begins, counts)
        rejecting = [i for i, sequence in enumerate(sequences) if self.will_reject(sequence)]
        work = self.runner.queue.submit(lambda: self.run(batch, rejecting, probs))
        self.runner.inputs.launched(work)
        return work

    @torch.inference_mode()
    def run(self, batch: Batch, rejecting: list[int], probs: list[torch.Tensor]) -> Sampled:
        """On the device."""
        self.runner.fill_in(batch)
        logits, _ = self.runner.forward(batch, self.runner.drafter)
        if not batch.draft_lengths:  # no token is drawn
            return Sampled(batch.rows, SampledLogprobs([]))
        sampling = replace(batch.sampling, biases=None)  # they are in the logits
        logits = batch.sampling.biased(logits)
        if rejecting:
            rows = torch.tensor(rejecting, device=logits.device)
            probs += target_probs(
                logits[rows],
                sampling.temperature[rows, 0],
                sampling.top_k[rows, 0],
                sampling.top_p[rows, 0],
                sampling.min_p[rows, 0],
            )
        token_ids = sample(self.runner.ops, logits, sampling).clamp(min=0)  # any draft will do
        self.runner.last_token_ids[batch.rows] = token_ids
        return Sampled(token_ids, SampledLogprobs([]))

    def will_reject(self, sequence: Sequence) -> bool:
        """Whether a sequence's drafts stay by rejection: where no seed promises what is drawn."""
        params = sequence.params
        return params.seed is None and params.temperature > 0 and not self.repeats

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept here."""
