"""From scheduled sequences to tensors, through the model, and back to sampled tokens.

The runner does not know prefill from decode: a sequence has so many new tokens, and their keys and
values go to such places in the cache.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.completions import TokenLogprobs
from common.device import resolve_device, usable_cores
from common.kernels import AttentionMetadata, select_ops
from common.kv_memory import choose_num_blocks, largest_counts, longest_sequence, peak_memory
from common.logprobs import SampledLogprobs
from common.models.architecture import ModelConfig
from common.models.checkpoint import context_length, iter_weights, load_config
from common.prompt_logprobs import PromptPiece, PromptScores, prompt_pieces
from common.requests import Request
from common.sampling import SamplingBatch, SamplingParams

from .config import EngineConfig
from .kv_cache import KVCache
from .model import CausalLM
from .sampler import sample
from .scheduler import SchedulerOutput
from .sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """The model's input: the new tokens of all sequences, flat."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    metadata: AttentionMetadata
    logits_indices: torch.Tensor  # [num_sampled] int64: where logits are needed, each last token
    prompts: list[PromptPiece] = field(default_factory=list)  # to be scored


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
        reserved = self.profile(shape)
        num_blocks = choose_num_blocks(config, shape, self.dtype, self.device, reserved)
        self.max_model_len = longest_sequence(config, shape, num_blocks)
        self.kv = KVCache(num_blocks, config.block_size, shape, self.dtype, self.device)

    def load_model(self, folder: Path, max_model_len: int) -> CausalLM:
        """Load a model's weights. Raises ValueError."""
        shape = ModelConfig.from_transformers(load_config(folder), max_model_len)
        self.ops.check_kv_cache(self.config.block_size, shape.head_dim, self.dtype)
        tensors = iter_weights(folder, self.device)
        return CausalLM(shape, self.ops, tensors, self.dtype, self.device)

    def profile(self, shape: ModelConfig) -> int:
        """Bytes that the largest step takes on a GPU beside weights and cache. Raises ValueError."""
        self.kv = KVCache(1, self.config.block_size, shape, self.dtype, self.device)
        largest = self.largest_step(shape.max_model_len)
        return peak_memory(self.device, lambda: self.run_step(largest), largest.num_tokens)

    def run_step(self, scheduled: SchedulerOutput) -> None:
        """Forward and sampling, for the memory that they take."""
        logits, _ = self.forward(self.prepare(scheduled))
        self.sample(scheduled.sampled, logits)

    def largest_step(self, max_model_len: int) -> SchedulerOutput:
        """As many tokens as one step may run, in max_num_seqs sequences; all in block 0."""
        largest, rows = SchedulerOutput(), self.config.max_num_seqs
        params = SamplingParams(presence_penalty=1.0, top_p=0.9, prompt_logprobs=0)  # takes most
        most = max(self.config.max_num_batched_tokens, max_model_len, rows)
        for i, count in enumerate(largest_counts(most, rows, max_model_len)):
            request = Request(f"largest-{i}", [0] * count, params)
            table = [0] * self.kv.blocks_for(count)
            largest.run(Sequence(request, i, frozenset(), count, block_table=table), count)
        return largest

    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """Tensors for the next tokens of each sequence."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends = [0]
        block_size = self.kv.block_size
        sequences, counts = list(scheduled.num_new_tokens), scheduled.num_new_tokens.values()
        starts = [sequence.num_computed_tokens for sequence in sequences]
        for sequence, start, count in zip(sequences, starts, counts, strict=True):
            new = range(start, start + count)
            token_ids += sequence.tokens(start, start + count)
            positions += new
            table = sequence.block_table
            slots += [table[i // block_size] * block_size + i % block_size for i in new]
            ends.append(len(token_ids))
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        width = max(len(sequence.block_table) for sequence in sequences)
        tables = [s.block_table + [0] * (width - len(s.block_table)) for s in sequences]

        def tensor(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        metadata = AttentionMetadata(
            cu_seqlens_q=tensor(ends, torch.int32),
            seq_lens=tensor(lengths, torch.int32),
            block_tables=tensor(tables, torch.int32),
            slot_mapping=tensor(slots, torch.int64),
            max_query_len=max(counts),
            max_seq_len=max(lengths),
        )
        is_sampled = set(scheduled.sampled)
        last = [end - 1 for s, end in zip(sequences, ends[1:], strict=True) if s in is_sampled]
        return Batch(
            tensor(token_ids, torch.int64),
            tensor(positions, torch.int64),
            metadata,
            logits_indices=tensor(last, torch.int64),
            prompts=prompt_pieces(sequences, starts, counts),
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[PromptScores]]:
        """Logits after each sampled sequence's last token, [num_sampled, vocab]; and the scores of
        prompts that ask for them."""
        hidden = self.model.forward(batch.token_ids, batch.positions, self.kv.data, batch.metadata)
        scores = [piece.score(hidden, self.model.logits) for piece in batch.prompts]
        return self.model.logits(hidden[batch.logits_indices]), scores

    @torch.inference_mode()
    def sample(
        self, sequences: list[Sequence], logits: torch.Tensor
    ) -> tuple[list[list[int]], list[list[TokenLogprobs | None]]]:
        """The next tokens of each sampled sequence, and their log probabilities if asked for."""
        batch = SamplingBatch.build(
            logits,
            [sequence.params for sequence in sequences],
            [sequence.seed for sequence in sequences],
            [len(sequence.prompt_token_ids) for sequence in sequences],
            [sequence.output_token_ids for sequence in sequences],
            [sequence.ending_token_ids for sequence in sequences],
            [sequence.request.choice for sequence in sequences],
        )
        drawn = sample(self.ops, logits, batch)
        token_ids = drawn.tolist()
        logprobs = SampledLogprobs.of(logits, drawn, batch.num_logprobs).lists(token_ids)
        return [[token_id] for token_id in token_ids], [[logprob] for logprob in logprobs]
