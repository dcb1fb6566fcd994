"""A step's input: from scheduled sequences to tensors, written while the last step runs.

What a step needs of a sequence time after time is kept in tables, with a row for each running
sequence: a step then costs a few operations on whole arrays. It is written into one of two buffers,
since the step in flight reads the other, and reaches a GPU in one copy.

A batch holds tensors and plain numbers, no sequence: the host changes sequences while the device
still reads the batch.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from common.kernels import AttentionMetadata
from common.packed_fields import Arrays, Tensors
from common.prompt_logprobs import PromptPiece, prompt_pieces
from common.sampling import LogitBiases, SamplingBatch, as_int64
from common.token_counts import JoiningOutputs

from .block_tables import BlockTables
from .config import EngineConfig
from .device_queue import Work
from .input_buffers import FORMATS, PENALTIES, SAMPLING_FIELDS, BatchShape, InputBuffers
from .scheduler import SchedulerOutput
from .sequence import Sequence
from .structured_output import Constrained, Masks


@dataclass(frozen=True)
class Bucket:
    """What a batch of decoding sequences is padded to. Work on batches of one bucket is launched
    alike: with the same sizes, on the same addresses."""

    num_seqs: int
    max_seq_len: int  # no sequence is longer
    num_tokens_each: int = 1  # that a sequence runs: its last one, and drafts


@dataclass(frozen=True)
class Batch:
    """The model's input: the new tokens of all sequences, flat."""

    token_ids: torch.Tensor  # [num_tokens] int64; below 0: not known, see `ModelRunner.fill_in`
    positions: torch.Tensor  # [num_tokens] int64
    metadata: AttentionMetadata
    table_rows: torch.Tensor  # [num_seqs] int64: rows of the block tables that attention reads
    # [2, num_changes] int32: places in all tables, blocks written there
    table_changes: torch.Tensor
    # [num_sampled] int64: where logits are needed, each last token and the drafts behind it
    logits_indices: torch.Tensor
    rows: torch.Tensor  # [num_sampled] int64: rows in the tables
    sampling: SamplingBatch
    has_penalties: bool
    joining: JoiningOutputs | None = None  # of the sequences that join and have penalties
    prompts: list[PromptPiece] = field(default_factory=list)  # to be scored
    # of each sequence that is sampled: how many drafts it has, here and on the device [int64]
    draft_lengths: list[int] = field(default_factory=list)
    num_draft_tokens: torch.Tensor | None = None
    rejecting: list[int] = field(default_factory=list)  # sequences whose drafts stay by rejection
    draft_probs: torch.Tensor | None = None  # [drafts of these, vocab]: what they were drawn from
    shape: BatchShape | None = None
    constrained: list[Constrained] = field(
        default_factory=list
    )  # the sampled sequences with a grammar
    masks: Future[Masks] | None = None  # which tokens they may draw
    packed: torch.Tensor | None = None  # all tensors of this shape in one piece, for other ranks
    bucket: Bucket | None = None  # that it fills, where the forward may be launched as a graph


class InputBatch:
    """Tables of the running sequences, and the buffers of two steps."""

    def __init__(
        self, config: EngineConfig, max_model_len: int, vocab_size: int, device: torch.device
    ) -> None:
        self.block_size, self.vocab_size, self.device = config.block_size, vocab_size, device
        rows, width = config.max_num_seqs, -(-max_model_len // config.block_size)
        self.tables = BlockTables(rows, width, device)
        self.sampling = {name: np.zeros(rows, FORMATS[name]) for name in SAMPLING_FIELDS}
        # What few sequences ask for is looked for only in batches that have one of these.
        self.is_special = np.zeros(rows, np.bool_)
        self.most_drafts = config.num_speculative_tokens or 0
        # The bucket of a batch in which sequences run so many tokens, all of them drawn after.
        self.find_bucket: Callable[[list[int]], Bucket | None] = lambda counts: None
        sampled = rows * (1 + self.most_drafts)
        most_tokens = max(config.most_tokens(max_model_len), sampled)
        capacities = [BatchShape(n, rows, sampled, rows * width) for n in (sampled, most_tokens)]
        # A model that drafts reads a batch for each of a draft's tokens, while the host goes on.
        num_hosts = max(2, num_stages := config.pipeline_parallel_size)
        num_hosts += self.most_drafts if config.speculative in ("draft", "self") else 0
        self.buffers = InputBuffers(capacities, device, num_hosts, overlaps=num_stages > 1)

    @property
    def num_bytes(self) -> int:
        """On the host and on the device."""
        columns = sum(column.nbytes for column in self.sampling.values())
        return self.buffers.num_bytes + self.tables.num_bytes + columns

    def update(self, scheduled: SchedulerOutput) -> None:
        """Note the sequences that joined, and new blocks."""
        for sequence in scheduled.admitted:
            self.admit(sequence)
        for sequence, blocks in scheduled.new_blocks.items():
            self.tables.write(sequence.row, len(sequence.block_table) - len(blocks), blocks)

    def admit(self, sequence: Sequence) -> None:
        """Write the table of a sequence, and what does not change while it runs."""
        self.tables.write(sequence.row, 0, sequence.block_table)
        params = sequence.params
        wishes = (params.logprobs, params.prompt_logprobs, sequence.matcher)
        self.is_special[sequence.row] = params.has_biases or wishes != (None, None, None)
        values = {"seeds": as_int64(sequence.seed), "choices": sequence.request.choice}
        for name, value in (values | params.numbers(self.vocab_size)).items():
            self.sampling[name][sequence.row] = value

    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """Tensors for the next tokens of each sequence."""
        self.update(scheduled)
        sequences = list(scheduled.num_new_tokens)
        counts = list(scheduled.num_new_tokens.values())
        starts = [sequence.num_computed_tokens for sequence in sequences]
        batch = self.lay_out(sequences, starts, counts)
        counted = [s for s in scheduled.admitted if s.params.has_penalties]
        rows, outputs = [s.row for s in counted], [s.output_token_ids for s in counted]
        pieces, constrained = [], []
        if self.is_special[[sequence.row for sequence in sequences]].any():
            pieces = prompt_pieces(sequences, starts, counts)
            constrained = Constrained.of(scheduled.sampled)
        sampled = scheduled.sampled
        probs = [s.draft_probs[: len(s.draft_token_ids)] for s in sampled if s.rejects]
        return replace(
            batch,
            joining=JoiningOutputs.build(rows, outputs, self.vocab_size, self.device),
            prompts=pieces,
            constrained=constrained,
            rejecting=[i for i, sequence in enumerate(sampled) if sequence.rejects],
            draft_probs=torch.cat(probs) if probs else None,
        )

    def lay_out(self, sequences: list[Sequence], begins: list[int], counts: list[int]) -> Batch:
        """Tensors for `counts` tokens of each sequence, from `begins` on. A token is drawn after a
        sequence's last one, and after each draft behind it.

        Padding, up to a bucket's size, lies behind the sequences: as many tokens each, in the row of
        the tables that no sequence has. What is computed for it is not kept.
        """
        bucket = None
        if all(b + 1 >= s.num_total_tokens for s, b in zip(sequences, begins, strict=True)):
            bucket = self.find_bucket(counts)
        padding = 0 if bucket is None else bucket.num_seqs - len(sequences)
        each = 1 if bucket is None else bucket.num_tokens_each
        rows = np.array([s.row for s in sequences] + [self.tables.padding_row] * padding)
        starts, new = np.array(begins + [0] * padding), np.array(counts + [each] * padding)
        lengths, ends = starts + new, new.cumsum()
        first_drawn = np.array([s.num_total_tokens for s in sequences] + [each + 1] * padding)
        num_drawn = np.clip(lengths - first_drawn + 1, 0, new)  # 1 + number of drafts, or none
        draft_lengths = num_drawn[num_drawn > 0] - 1
        sampled = np.repeat(np.arange(len(rows)), num_drawn)
        changes = self.tables.take_changes()
        shape = BatchShape(int(ends[-1]), len(rows), len(sampled), len(changes[0]))

        arrays, tensors = self.buffers.next(shape)
        arrays["table_changes"].reshape(2, -1)[:] = changes
        write_sequences(arrays, rows, lengths, new)
        self.write_tokens(arrays, np.repeat(rows, new), sequences, begins, counts)
        arrays["num_draft_tokens"][: len(draft_lengths)] = draft_lengths
        is_drawn = np.repeat(ends, new) - np.arange(shape.num_tokens) <= np.repeat(num_drawn, new)
        arrays["logits_indices"][:] = is_drawn.nonzero()[0]
        arrays["rows"][:] = rows[sampled]
        arrays["sample_positions"][:] = arrays["positions"][is_drawn] + 1
        for name, column in self.sampling.items():
            arrays[name][:] = column[rows[sampled]]
        self.buffers.copy_to_device(shape)
        max_seq_len = int(lengths.max()) if bucket is None else bucket.max_seq_len
        return Batch(
            tensors["token_ids"],
            tensors["positions"],
            self.attention_metadata(tensors, new, max_seq_len),
            table_rows=tensors["table_rows"],
            table_changes=tensors["table_changes"].view(2, -1),
            logits_indices=tensors["logits_indices"],
            rows=tensors["rows"],
            sampling=self.sampling_batch([sequences[i] for i in sampled], arrays, tensors),
            has_penalties=any(arrays[name].any() for name in PENALTIES),
            draft_lengths=draft_lengths.tolist(),
            num_draft_tokens=tensors["num_draft_tokens"][: len(draft_lengths)],
            shape=shape,
            packed=self.buffers.packed(shape),
            bucket=bucket,
        )

    def received(self, shape: BatchShape, bounds: list[int], each: int) -> Batch:
        """A batch that another rank has laid out; its numbers come when the device gets there.

        bounds: the numbers of its metadata; each: the tokens of a sequence, 0 unless it fills a bucket.
        Of its sampling nothing is known.
        """
        _, tensors = self.buffers.next(shape)
        names = "cu_seqlens_q", "seq_lens", "slot_mapping"
        begins, lengths, slots = (tensors[name] for name in names)
        tables = self.tables.of_batch[: shape.num_seqs]
        return Batch(
            tensors["token_ids"],
            tensors["positions"],
            AttentionMetadata(begins, lengths, tables, slots, *bounds),
            table_rows=tensors["table_rows"],
            table_changes=tensors["table_changes"].view(2, -1),
            logits_indices=tensors["logits_indices"],
            rows=tensors["rows"],
            sampling=self.sampling_batch([], {"rows": np.zeros(0, np.int64)}, tensors),
            has_penalties=False,
            shape=shape,
            packed=self.buffers.packed(shape),
            bucket=Bucket(shape.num_seqs, bounds[1], each) if each else None,
        )

    def write_tokens(
        self,
        arrays: Arrays,
        rows: np.ndarray,
        sequences: list[Sequence],
        begins: list[int],
        counts: list[int],
    ) -> None:
        """The new tokens, and their slots in the cache. rows: of each token."""
        positions, token_ids = arrays["positions"], arrays["token_ids"]
        blocks = self.tables.host[rows, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        arrays["slot_mapping"][:] = np.where(rows == self.tables.padding_row, -1, slots)
        token_ids[:] = -1 - rows  # where the host has not read them yet
        if any(b < s.num_tokens for s, b in zip(sequences, begins, strict=True)):
            batch = zip(sequences, begins, counts, strict=True)
            known = [token_id for s, b, n in batch for token_id in s.tokens(b, b + n)]
            token_ids[: len(known)] = known

    def attention_metadata(
        self, tensors: Tensors, new: np.ndarray, max_seq_len: int
    ) -> AttentionMetadata:
        """What attention is told about a batch; the tensors by the names of their fields.

        new: [num_seqs], how many new tokens each sequence has.
        """
        decodes = new <= 1 + self.most_drafts
        return AttentionMetadata(
            cu_seqlens_q=tensors["cu_seqlens_q"],
            seq_lens=tensors["seq_lens"],
            block_tables=self.tables.of_batch[: len(tensors["seq_lens"])],
            slot_mapping=tensors["slot_mapping"],
            max_query_len=int(new.max()),
            max_seq_len=max_seq_len,
            max_decode_query_len=int((new * decodes).max()),
            num_leading_decodes=int(decodes.cumprod().sum()),
        )

    def sampling_batch(
        self, drawn: list[Sequence], arrays: Arrays, tensors: Tensors
    ) -> SamplingBatch:
        """What decides about each token that is drawn; `drawn`: the sequence of each."""
        biases, num_logprobs = None, [None] * len(drawn)
        if self.is_special[arrays["rows"]].any():
            positions = arrays["sample_positions"].tolist()
            biases = LogitBiases.of_sequences(drawn, positions, self.device)
            num_logprobs = [sequence.params.logprobs for sequence in drawn]
        return SamplingBatch(
            **{name: tensors[name].unsqueeze(1) for name in SAMPLING_FIELDS},
            positions=tensors["sample_positions"].unsqueeze(1),
            output_counts=None,
            num_logprobs=num_logprobs,
            biases=biases,
        )

    def launched(self, work: Work) -> None:
        """The batch that was prepared last is read by this work."""
        self.buffers.read_by(work)


def write_sequences(arrays: Arrays, rows: np.ndarray, lengths: np.ndarray, new: np.ndarray) -> None:
    """Which tokens belong to which sequence. rows, lengths, new: [num_seqs], with its new tokens."""
    ends = new.cumsum()
    arrays["cu_seqlens_q"][0] = 0
    arrays["cu_seqlens_q"][1:] = ends
    arrays["seq_lens"][:] = lengths
    arrays["table_rows"][:] = rows
    arrays["positions"][:] = np.arange(ends[-1]) + np.repeat(lengths - ends, new)
