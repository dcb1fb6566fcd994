"""From scheduled sequences to tensors, through the model, and back to sampled tokens.

The runner does not know prefill from decode: a sequence has so many new tokens, and their keys and
values go to such places in the cache.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.completions import TokenLogprobs
from common.device import resolve_device, usable_cores
from common.kernels import AttentionMetadata, select_ops
from common.kv_memory import choose_num_blocks, longest_sequence
from common.logprobs import SampledLogprobs
from common.models.architecture import ModelConfig
from common.models.checkpoint import context_length, iter_weights, load_config
from common.sampling import SamplingBatch

from .config import EngineConfig
from .kv_cache import KVCache
from .model import CausalLM
from .sampler import sample
from .sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """The model's input: the new tokens of all sequences, flat."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    metadata: AttentionMetadata
    logits_indices: torch.Tensor  # [num_seqs] int64: where logits are needed, each last token


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
        num_blocks = choose_num_blocks(config, shape, self.dtype, self.device)
        self.max_model_len = longest_sequence(config, shape, num_blocks)
        self.kv = KVCache(num_blocks, config.block_size, shape, self.dtype, self.device)

    def load_model(self, folder: Path, max_model_len: int) -> CausalLM:
        """Load a model's weights. Raises ValueError."""
        shape = ModelConfig.from_transformers(load_config(folder), max_model_len)
        self.ops.check_kv_cache(self.config.block_size, shape.head_dim, self.dtype)
        tensors = iter_weights(folder, self.device)
        return CausalLM(shape, self.ops, tensors, self.dtype, self.device)

    def prepare(self, scheduled: dict[Sequence, int]) -> Batch:
        """Tensors for the next `scheduled[sequence]` tokens of each sequence."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends = [0]
        block_size = self.kv.block_size
        sequences, counts = list(scheduled), scheduled.values()
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
        logits_indices = tensor([end - 1 for end in ends[1:]], torch.int64)
        # A finished sequence may end with NO_TOKEN, which is no input.
        inputs = tensor(token_ids, torch.int64).clamp(min=0)
        return Batch(inputs, tensor(positions, torch.int64), metadata, logits_indices)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits after each sequence's last token, [num_seqs, vocab]."""
        hidden = self.model.forward(batch.token_ids, batch.positions, self.kv.data, batch.metadata)
        return self.model.logits(hidden[batch.logits_indices])

    @torch.inference_mode()
    def sample(
        self, sequences: list[Sequence], logits: torch.Tensor
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The next token of each sequence, and its log probabilities where asked for."""
        batch = SamplingBatch.build(
            logits,
            [sequence.params for sequence in sequences],
            [sequence.seed for sequence in sequences],
            [len(sequence.prompt_token_ids) for sequence in sequences],
            [sequence.output_token_ids for sequence in sequences],
            [sequence.ending_token_ids for sequence in sequences],
        )
        drawn = sample(self.ops, logits, batch)
        token_ids = drawn.tolist()
        return token_ids, SampledLogprobs.of(logits, drawn, batch.num_logprobs).lists(token_ids)
