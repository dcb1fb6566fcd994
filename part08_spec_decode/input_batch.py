"""A step's input: from scheduled sequences to tensors, written while the last step runs.

What a step needs of a sequence time after time is kept in tables, with a row for each running
sequence: a step then costs a few operations on whole arrays. It is written into one of two buffers,
since the step in flight reads the other.

A batch holds tensors and plain numbers, no sequence: the host changes sequences while the device
still reads the batch.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from common.kernels import AttentionMetadata
from common.prompt_logprobs import PromptPiece, prompt_pieces
from common.sampling import SMALLEST_TOP_P, LogitBiases, SamplingBatch, as_int64

from .config import EngineConfig
from .device_queue import Work
from .input_buffers import FIELDS, SAMPLING_FIELDS, BatchShape, InputBuffers
from .scheduler import SchedulerOutput
from .sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """The model's input: the new tokens of all sequences, flat."""

    token_ids: torch.Tensor  # [num_tokens] int64; below 0: not known, see `ModelRunner.fill_in`
    positions: torch.Tensor  # [num_tokens] int64
    metadata: AttentionMetadata
    # [num_sampled] int64: where logits are needed, each last token and the drafts behind it
    logits_indices: torch.Tensor
    rows: torch.Tensor  # [num_sampled] int64: rows in the tables
    sampling: SamplingBatch
    has_penalties: bool
    # (row, output so far) of the sequences that join and have penalties
    counted: list[tuple[int, list[int]]] = field(default_factory=list)
    prompts: list[PromptPiece] = field(default_factory=list)  # to be scored
    # of each sequence that is sampled: how many drafts it has, here and on the device [int64]
    draft_lengths: list[int] = field(default_factory=list)
    num_draft_tokens: torch.Tensor | None = None
    rejecting: list[int] = field(default_factory=list)  # sequences whose drafts stay by rejection
    draft_probs: torch.Tensor | None = None  # [drafts of these, vocab]: what they were drawn from


class InputBatch:
    """Tables of the running sequences, and the buffers of two steps."""

    def __init__(
        self, config: EngineConfig, max_model_len: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size, self.vocab_size, self.device = config.block_size, vocab_size, device
        rows, width = config.max_num_seqs, -(-max_model_len // config.block_size)
        self.block_tables = np.zeros((rows, width), np.int32)
        self.sampling = {name: np.zeros(rows, FIELDS[name][0]) for name in SAMPLING_FIELDS}
        most_sampled = rows * (1 + (config.num_speculative_tokens or 0))
        largest = BatchShape(config.max_num_batched_tokens, rows, most_sampled, width)
        self.buffers = [InputBuffers(largest, device) for _ in range(2)]

    @property
    def num_bytes(self) -> int:
        """On the host and on the device."""
        buffers = {id(x): x for buffer in self.buffers for x in (buffer.host, buffer.device)}
        arrays = [self.block_tables, *self.sampling.values(), *buffers.values()]
        return sum(x.nbytes for x in arrays)

    def update(self, scheduled: SchedulerOutput) -> None:
        """Note the sequences that joined, and new blocks."""
        for sequence in scheduled.admitted:
            self.admit(sequence)
        for sequence, blocks in scheduled.new_blocks.items():
            end = len(sequence.block_table)
            self.block_tables[sequence.row, end - len(blocks) : end] = blocks

    def admit(self, sequence: Sequence) -> None:
        """Write the table of a sequence, and what does not change while it runs."""
        self.block_tables[sequence.row, : len(sequence.block_table)] = sequence.block_table
        params = sequence.params
        values = {
            "seeds": as_int64(sequence.seed),
            "choices": sequence.request.choice,
            # A top_k of the whole vocabulary keeps all.
            "top_k": params.top_k if 0 < params.top_k < self.vocab_size else 0,
            "temperature": params.temperature,
            "top_p": max(params.top_p, SMALLEST_TOP_P),
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
        }
        for name, value in values.items():
            self.sampling[name][sequence.row] = value

    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """Tensors for the next tokens of each sequence."""
        self.update(scheduled)
        sequences = list(scheduled.num_new_tokens)
        counts = list(scheduled.num_new_tokens.values())
        starts = [sequence.num_computed_tokens for sequence in sequences]
        batch = self.lay_out(sequences, starts, counts)
        sampled = scheduled.sampled
        probs = [s.draft_probs[: len(s.draft_token_ids)] for s in sampled if s.rejects]
        return replace(
            batch,
            rejecting=[i for i, sequence in enumerate(sampled) if sequence.rejects],
            draft_probs=torch.cat(probs) if probs else None,
            counted=[
                (sequence.row, list(sequence.output_token_ids))
                for sequence in scheduled.admitted
                if sequence.params.has_penalties
            ],
            prompts=prompt_pieces(sequences, starts, counts),
        )

    def lay_out(self, sequences: list[Sequence], begins: list[int], counts: list[int]) -> Batch:
        """Tensors for `counts` tokens of each sequence, from `begins` on. A token is drawn after a
        sequence's last one, and after each draft behind it."""
        starts, new = np.array(begins), np.array(counts)
        lengths, ends = starts + new, new.cumsum()
        num_tokens = np.array([sequence.num_total_tokens for sequence in sequences])
        num_drawn = np.clip(lengths - num_tokens + 1, 0, new)  # 1 + number of drafts, or none
        draft_lengths = num_drawn[num_drawn > 0] - 1
        width = -(-int(lengths.max()) // self.block_size)
        shape = BatchShape(int(new.sum()), len(sequences), int(num_drawn.sum()), width)

        self.buffers.reverse()
        buffers = self.buffers[0]
        buffers.wait()
        arrays, tensors = buffers.views(shape)
        rows = np.array([sequence.row for sequence in sequences])
        positions = np.arange(shape.num_tokens) + np.repeat(starts - (ends - new), new)
        blocks = self.block_tables[np.repeat(rows, new), positions // self.block_size]
        slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        arrays["token_ids"][:] = [
            token_id
            for sequence, begin, end in zip(sequences, starts, lengths, strict=True)
            for token_id in sequence.tokens(begin, end)
        ]
        arrays["positions"][:] = positions
        arrays["slot_mapping"][:] = slots
        arrays["cu_seqlens_q"][0] = 0
        arrays["cu_seqlens_q"][1:] = ends
        arrays["seq_lens"][:] = lengths
        arrays["block_tables"].reshape(-1, width)[:] = self.block_tables[rows, :width]
        arrays["num_draft_tokens"][: len(draft_lengths)] = draft_lengths
        is_drawn = np.repeat(ends, new) - np.arange(shape.num_tokens) <= np.repeat(num_drawn, new)
        arrays["logits_indices"][:] = is_drawn.nonzero()[0]
        arrays["rows"][:] = rows = np.repeat(rows, num_drawn)
        arrays["sample_positions"][:] = positions[is_drawn] + 1
        for name, column in self.sampling.items():
            arrays[name][:] = column[rows]
        buffers.copy_to_device(shape)
        drawn = [s for s, n in zip(sequences, num_drawn.tolist(), strict=True) for _ in range(n)]
        return Batch(
            tensors["token_ids"],
            tensors["positions"],
            attention_metadata(tensors, width, int(new.max()), int(lengths.max())),
            logits_indices=tensors["logits_indices"],
            rows=tensors["rows"],
            sampling=self.sampling_batch(drawn, tensors, positions[is_drawn] + 1),
            has_penalties=any(sequence.params.has_penalties for sequence in drawn),
            draft_lengths=draft_lengths.tolist(),
            num_draft_tokens=tensors["num_draft_tokens"][: len(draft_lengths)],
        )

    def sampling_batch(
        self, drawn: list[Sequence], tensors: dict[str, torch.Tensor], positions: np.ndarray
    ) -> SamplingBatch:
        """What decides about each token that is drawn.

        drawn: the sequence of each. positions: [num_sampled], the number of tokens before it.
        """
        biases = None
        if any(sequence.params.has_biases for sequence in drawn):
            rows = [
                sequence.params.biases(
                    sequence.ending_token_ids, position - len(sequence.prompt_token_ids)
                )
                for sequence, position in zip(drawn, positions.tolist(), strict=True)
            ]
            biases = LogitBiases.build(rows, self.device)
        return SamplingBatch(
            **{name: tensors[name].unsqueeze(1) for name in SAMPLING_FIELDS},
            positions=tensors["sample_positions"].unsqueeze(1),
            output_counts=None,
            num_logprobs=[sequence.params.logprobs for sequence in drawn],
            biases=biases,
        )

    def launched(self, work: Work) -> None:
        """The batch that was prepared last is read by this work."""
        self.buffers[0].reader = work


def attention_metadata(
    tensors: dict[str, torch.Tensor], table_width: int, max_query_len: int, max_seq_len: int
) -> AttentionMetadata:
    """What attention is told about a batch; the tensors by the names of their fields."""
    return AttentionMetadata(
        cu_seqlens_q=tensors["cu_seqlens_q"],
        seq_lens=tensors["seq_lens"],
        block_tables=tensors["block_tables"].view(-1, table_width),
        slot_mapping=tensors["slot_mapping"],
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
    )
