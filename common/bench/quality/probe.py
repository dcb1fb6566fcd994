"""An engine's own model and KV cache, asked for the logits of every token of some sequences."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.kernels import AttentionMetadata

TOKENS = 512  # in one forward, about


class Probe:
    """The engine must be idle and without a prefix cache: its first blocks are written to."""

    def __init__(self, engine: Any) -> None:
        self.runner = engine.runner
        self.model, self.kv = engine.runner.model, engine.runner.kv
        self.device = engine.runner.device

    def hidden(self, sequences: list[list[int]]) -> Tensor:
        """The last hidden states of sequences, one after another, [num_tokens, hidden].

        Raises ValueError where the KV cache is too small.
        """
        size = self.kv.block_size
        counts = [len(sequence) for sequence in sequences]
        blocks = [-(-count // size) for count in counts]
        if sum(blocks) > self.kv.num_blocks:
            raise ValueError(f"num_blocks is {self.kv.num_blocks}: {sum(blocks)} are needed")
        begins = torch.tensor([0, *blocks]).cumsum(0)
        tables = begins[:-1, None] + torch.arange(max(blocks))
        positions = torch.cat([torch.arange(count) for count in counts])
        sequence = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        slots = tables[sequence, positions // size] * size + positions % size
        bounds = torch.tensor([0, *counts]).cumsum(0)
        tables = tables.clamp(max=self.kv.num_blocks - 1)
        metadata = AttentionMetadata(
            cu_seqlens_q=bounds.int().to(self.device),
            seq_lens=torch.tensor(counts, dtype=torch.int32, device=self.device),
            block_tables=tables.int().to(self.device),
            slot_mapping=slots.to(self.device),
            max_query_len=max(counts),
            max_seq_len=max(counts),
        )
        token_ids = torch.tensor([t for one in sequences for t in one], device=self.device)
        self.model.start_step([len(token_ids)])
        return self.model.forward(token_ids, positions.to(self.device), self.kv.data, metadata)

    @torch.inference_mode()
    def logits(self, sequences: list[list[int]], last: bool = False) -> Iterator[Tensor]:
        """Of each sequence in turn, after every token [n, vocab], or after the last one [1, vocab],
        in float32 on the CPU."""
        for group in groups(sequences, TOKENS):
            hidden = self.hidden(group)
            pieces = hidden.split([len(one) for one in group])
            if last:
                pieces = torch.cat([piece[-1:] for piece in pieces]).split(1)
            for piece in pieces if not last else [torch.cat(pieces)]:
                logits = self.model.logits(piece).float().cpu()
                yield from logits.split(1) if last else [logits]


def groups(sequences: list[list[int]], num_tokens: int) -> Iterator[list[list[int]]]:
    """Sequences in their order, about so many tokens together."""
    group: list[list[int]] = []
    for sequence in sequences:
        if group and sum(map(len, group)) + len(sequence) > num_tokens:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group
