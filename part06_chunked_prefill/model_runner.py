"""From scheduled sequences to tensors, through the model, and back to sampled tokens.

The runner does not know prefill from decode: a sequence has so many new tokens, and their keys and
values go to such places in the cache.

The device is ahead of the host: a token that the host has not read yet is put into the input on the
device, from what its row has drawn last.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.device import release_openmp_workers, resolve_device, usable_cores
from common.kernels import select_ops
from common.kv_memory import choose_num_blocks, longest_sequence, peak_memory
from common.logprobs import SampledLogprobs
from common.models.architecture import ModelConfig
from common.models.checkpoint import context_length, iter_weights, load_config
from common.prompt_logprobs import PromptScores
from common.requests import Request
from common.sampling import SamplingParams

from .config import EngineConfig
from .device_queue import Work, device_queue
from .input_batch import Batch, InputBatch
from .kv_cache import KVCache
from .model import CausalLM
from .sampler import Sampled, sample
from .scheduler import SchedulerOutput
from .sequence import Sequence


class ModelRunner:
    """The model, its KV cache, and the way in and out of them."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        """Load the model and allocate the cache. Raises ValueError."""
        self.device, self.dtype = resolve_device(config.device, config.dtype)
        threads = config.threads or usable_cores()
        torch.set_num_threads(threads)
        self.ops = select_ops(config.kernels, self.device, threads)
        self.config = config = config.resolved(self.device, self.ops.default_block_size)
        max_model_len = context_length(load_config(folder), config.max_model_len)
        self.model = self.load_model(folder, max_model_len)
        shape = self.model.config
        self.inputs = InputBatch(config, max_model_len, shape.vocab_size, self.device)
        self.queue = device_queue(self.device)
        # What follows belongs to the device: only work in the queue touches it.
        rows = config.max_num_seqs
        self.last_token_ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.counts: torch.Tensor | None = None  # [rows, vocab]: how often tokens were generated
        reserved = self.profile(shape)
        num_blocks = choose_num_blocks(config, shape, self.dtype, self.device, reserved)
        self.max_model_len = longest_sequence(config, shape, num_blocks)
        self.kv = KVCache(num_blocks, config.block_size, shape, self.dtype, self.device)
        release_openmp_workers()  # from now on the queue's thread does the work

    def load_model(self, folder: Path, max_model_len: int) -> CausalLM:
        """Load a model's weights. Raises ValueError."""
        shape = ModelConfig.from_transformers(load_config(folder), max_model_len)
        self.ops.check_kv_cache(self.config.block_size, shape.head_dim, self.dtype)
        tensors = iter_weights(folder, self.device)
        return CausalLM(shape, self.ops, tensors, self.dtype, self.device)

    def profile(self, shape: ModelConfig) -> int:
        """Bytes that the largest step takes on a GPU beside weights and cache. Raises ValueError."""
        self.kv = KVCache(1, self.config.block_size, shape, self.dtype, self.device)
        try:
            return peak_memory(self.device, lambda: self.run_largest_step(shape.max_model_len))
        except torch.OutOfMemoryError as error:
            most = self.config.max_num_batched_tokens
            raise ValueError(
                f"max_num_batched_tokens is {most}: no memory on the GPU for such a step"
            ) from error

    def run_largest_step(self, max_model_len: int) -> None:
        """Run the step that takes most memory."""
        self.inputs.block_tables[:] = 0
        self.launch(self.prepare(self.largest_step(max_model_len))).result()
        self.counts = None

    def largest_step(self, max_model_len: int) -> SchedulerOutput:
        """As many tokens as one step may run, in max_num_seqs sequences; all in block 0."""
        largest = SchedulerOutput()
        params = SamplingParams(presence_penalty=1.0, top_p=0.9, prompt_logprobs=0)  # takes most
        left = self.config.max_num_batched_tokens
        most_seqs = min(self.config.max_num_seqs, left)
        for i in range(most_seqs):
            count = min(left - (most_seqs - i - 1), max_model_len)
            left -= count
            request = Request(f"largest-{i}", [0] * count, params)
            sequence = Sequence(request, i, frozenset(), count, row=i)
            largest.admitted.append(sequence)
            largest.run(sequence, count)
        return largest

    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """Tensors for the next tokens of each sequence."""
        return self.inputs.prepare(scheduled)

    @property
    def num_buffer_bytes(self) -> int:
        """What a step's input takes, and the counts of tokens."""
        counts = 0 if self.counts is None else self.counts.nbytes
        return self.inputs.num_bytes + self.last_token_ids.nbytes + counts

    def launch(self, batch: Batch) -> Work:
        """Give the device the batch; its tokens can be read from what this returns."""
        work = self.queue.submit(lambda: self.run(batch))
        self.inputs.launched(work)
        return work

    @torch.inference_mode()
    def run(self, batch: Batch) -> Sampled:
        """All that the device does in a step."""
        for row, token_ids in batch.counted:
            self.count_output(row, token_ids)
        self.fill_in(batch)
        logits, scores = self.forward(batch)
        return replace(self.sample(batch, logits), prompts=scores)

    def fill_in(self, batch: Batch) -> None:
        """Put the tokens that were not known to the host into the batch."""
        drawn = self.last_token_ids[(-1 - batch.token_ids).clamp(min=0)]
        batch.token_ids.copy_(torch.where(batch.token_ids < 0, drawn, batch.token_ids))

    def count_output(self, row: int, token_ids: list[int]) -> None:
        """Count the tokens that a row's sequence has generated so far; `sample` counts on.

        The host knows all of them: no sequence joins with a token in flight.
        """
        vocab_size = self.model.config.vocab_size
        if self.counts is None:
            shape = (self.config.max_num_seqs, vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        counts = np.bincount(np.array(token_ids, np.int64), minlength=vocab_size)
        self.counts[row] = torch.from_numpy(counts.astype(np.int32)).to(self.device)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[PromptScores]]:
        """Logits after each sampled sequence's last token, [num_sampled, vocab]; and the scores of
        prompts that ask for them."""
        hidden = self.model.forward(batch.token_ids, batch.positions, self.kv.data, batch.metadata)
        scores = [piece.score(hidden, self.model.logits) for piece in batch.prompts]
        return self.model.logits(hidden[batch.logits_indices]), scores

    def sample(self, batch: Batch, logits: torch.Tensor) -> Sampled:
        """The next token of each sampled sequence, and log probabilities if asked for."""
        sampling = batch.sampling
        if batch.has_penalties:
            sampling = replace(sampling, output_counts=self.counts[batch.rows])
        token_ids = sample(self.ops, logits, sampling)
        last = token_ids.clamp(min=0)  # NO_TOKEN is no input
        if batch.has_penalties:
            self.counts[batch.rows, last] += 1
        self.last_token_ids[batch.rows] = last
        logprobs = SampledLogprobs.of(logits, token_ids, sampling.num_logprobs)
        return Sampled(token_ids, logprobs)
