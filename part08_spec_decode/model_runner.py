"""From scheduled sequences to tensors, through the model, and back to sampled tokens.

The runner does not know prefill from decode: a sequence has so many new tokens, and their keys and
values go to such places in the cache. What it needs of a sequence step after step it keeps in
tables, a row for each running sequence, so that a step costs a few operations on whole arrays.

The device is ahead of the host's knowledge: a token that the host has not read yet is put into the
input on the device, from what its row has drawn last.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import context_length, iter_weights, load_config, resolve
from common.device import release_openmp_workers, resolve_device, usable_cores
from common.kernels import AttentionMetadata, select_ops
from common.prompt_logprobs import PromptPiece, PromptScores, prompt_pieces
from common.sampling import (
    NO_TOKEN,
    SMALLEST_TOP_P,
    LogitBiases,
    SamplingBatch,
    SamplingParams,
    as_int64,
)

from .config import EngineConfig
from .device_queue import Work, device_queue
from .input_buffers import FIELDS, SAMPLING_FIELDS, BatchShape, InputBuffers
from .kv_cache import KVCache, choose_num_blocks, longest_sequence
from .model import CausalLM, ModelConfig
from .rejection_sampler import RejectionRows, target_probs, verify
from .sampler import Sampled, sample, with_logprobs
from .scheduler import SchedulerOutput
from .sequence import Sequence


@dataclass(frozen=True)
class Batch:
    """The model's input: the new tokens of all sequences, flat."""

    buffers: InputBuffers  # where it lies
    token_ids: torch.Tensor  # [num_tokens] int64; below 0: not known, see `fill_in`
    positions: torch.Tensor  # [num_tokens] int64
    metadata: AttentionMetadata
    # (row, output so far) of those who join and whose output is counted. Copies: by the time that the
    # device comes to it, a sequence may have ended or given up its row.
    counted: list[tuple[int, list[int]]]
    sampled: list[Sequence]  # those whose last token is in the batch
    # Of their last tokens, and of the drafts behind those:
    sampled_tokens: torch.Tensor  # [num_sampled] int64: places in the batch
    rows: torch.Tensor  # [num_sampled] int64: rows in the tables
    sampling: SamplingBatch
    num_drafts: torch.Tensor  # [len(sampled)] int64
    has_drafts: bool
    prompts: list[tuple[Sequence, PromptPiece]] = field(default_factory=list)  # to be scored


class Tables:
    """What the host knows of each running sequence, a row each."""

    def __init__(self, num_rows: int, table_width: int) -> None:
        self.block_tables = np.zeros((num_rows, table_width), np.int32)
        self.sampling = {name: np.zeros(num_rows, FIELDS[name][0]) for name in SAMPLING_FIELDS}

    def admit(self, sequence: Sequence, vocab_size: int) -> None:
        """Write what does not change while a sequence runs."""
        params = sequence.params
        values = {
            "seeds": as_int64(sequence.seed),
            "choices": sequence.choice,
            # A top_k of the whole vocabulary keeps all.
            "top_k": params.top_k if 0 < params.top_k < vocab_size else 0,
            "temperature": params.temperature,
            "top_p": max(params.top_p, SMALLEST_TOP_P),
            "min_p": params.min_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
        }
        for name, value in values.items():
            self.sampling[name][sequence.row] = value


class ModelRunner:
    """The model, its KV cache, and the way in and out of them."""

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        """Load the model and allocate the cache. Raises ValueError."""
        self.device, self.dtype = resolve_device(config.device, config.dtype)
        threads = config.threads or usable_cores()
        torch.set_num_threads(threads)
        self.ops = select_ops(config.kernels, self.device, threads)
        self.config = config = config.resolved(self.device, self.ops.default_block_size)
        hf_config = load_config(folder)
        max_model_len = context_length(hf_config, config.max_model_len)
        shape = ModelConfig.from_transformers(hf_config, max_model_len)
        self.ops.check_kv_cache(config.block_size, shape.head_dim, self.dtype)
        tensors = iter_weights(folder, self.device)
        self.model = CausalLM(shape, self.ops, tensors, self.dtype, self.device)
        draft_shape = self.load_draft_model(max_model_len)
        width = -(-max_model_len // config.block_size)
        rows = config.max_num_seqs
        # Two: one is read by the step in flight while the next batch is written.
        most = rows * (1 + (config.num_speculative_tokens or 0))
        largest = BatchShape(config.max_num_batched_tokens, rows, most, width)
        self.buffers = [InputBuffers(largest, self.device) for _ in range(2)]
        self.tables = Tables(rows, width)
        self.queue = device_queue(self.device)
        # What follows belongs to the device: only work in the queue touches it.
        self.last_token_ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.counts: torch.Tensor | None = None  # [rows, vocab]: how often tokens were generated
        reserved = self.profile(shape) if self.device.type == "cuda" else 0
        where = self.dtype, self.device
        num_blocks = choose_num_blocks(config, shape, *where, reserved, draft_shape)
        self.max_model_len = longest_sequence(config, shape, num_blocks)
        self.kv = KVCache(num_blocks, config.block_size, shape, *where)
        if draft_shape is not None:
            self.draft_kv = KVCache(num_blocks, config.block_size, draft_shape, *where)
        release_openmp_workers()  # from now on the queue's thread does the work

    def load_draft_model(self, max_model_len: int) -> ModelConfig | None:
        """Load the model that drafts, if there is one. Raises ValueError."""
        self.draft_model: CausalLM | None = None
        if self.config.draft_model is None:
            return None
        folder = resolve(self.config.draft_model)
        hf_config = load_config(folder)
        try:
            limit = context_length(hf_config, max_model_len)
        except ValueError as error:
            raise ValueError(f"draft_model cannot follow the model that far: {error}") from error
        shape = ModelConfig.from_transformers(hf_config, limit)
        if shape.vocab_size != self.model.config.vocab_size:
            raise ValueError(
                f"draft_model has a vocabulary of {shape.vocab_size} tokens, the model one of"
                f" {self.model.config.vocab_size}: its tokens would mean something else"
            )
        self.ops.check_kv_cache(self.config.block_size, shape.head_dim, self.dtype)
        tensors = iter_weights(folder, self.device)
        self.draft_model = CausalLM(shape, self.ops, tensors, self.dtype, self.device)
        return shape

    def profile(self, shape: ModelConfig) -> int:
        """Bytes that the largest step takes on the GPU beside weights and cache: by running it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.kv = KVCache(1, self.config.block_size, shape, self.dtype, self.device)
        try:
            batch = self.prepare(self.largest_step(shape.max_model_len))
            self.launch(batch).result()
        except torch.OutOfMemoryError as error:
            most = self.config.max_num_batched_tokens
            raise ValueError(
                f"max_num_batched_tokens is {most}: no memory on the GPU for such a step"
            ) from error
        self.counts = None
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        return peak - before

    def largest_step(self, max_model_len: int) -> SchedulerOutput:
        """As many tokens as one step may run, of as many sequences; all in block 0."""
        largest = SchedulerOutput()
        params = SamplingParams(presence_penalty=1.0, top_p=0.9, prompt_logprobs=0)  # takes most
        left = self.config.max_num_batched_tokens
        most_seqs = min(self.config.max_num_seqs, left)
        each = min(1 + (self.config.num_speculative_tokens or 0), left // most_seqs)
        for row in range(most_seqs):
            count = min(left - each * (most_seqs - row - 1), max_model_len)
            left -= count
            sequence = Sequence(f"profile-{row}", [0] * count, params, seed=row, row=row)
            num_drafts = min(self.config.num_speculative_tokens or 0, count - 1)
            del sequence.prompt_token_ids[count - num_drafts :]
            sequence.draft_token_ids = [0] * num_drafts
            if self.config.speculative in ("draft", "self"):  # what rejection compares with
                shape = (num_drafts, self.model.config.vocab_size)
                probs = torch.ones(shape, dtype=torch.float64, device=self.device)
                sequence.draft_probs = probs / shape[1]
            largest.admitted.append(sequence)
            largest.num_new_tokens[sequence] = count
        return largest

    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """Tensors for the next tokens of each sequence."""
        self.update_tables(scheduled)
        sequences = list(scheduled.num_new_tokens)
        new = list(scheduled.num_new_tokens.values())
        starts = [sequence.num_computed_tokens for sequence in sequences]
        batch = self.lay_out(sequences, starts, new, scheduled.admitted)
        return replace(batch, prompts=prompt_pieces(sequences, starts, new))

    def lay_out(
        self,
        sequences: list[Sequence],
        begins: list[int],
        counts: list[int],
        admitted: list[Sequence],
    ) -> Batch:
        """Tensors for so many tokens of each sequence, from where each begins.

        Tokens are drawn after the last of those that a sequence has, and after each draft.
        """
        new, starts = np.array(counts), np.array(begins)
        lengths = starts + new
        num_tokens = np.array([sequence.num_tokens for sequence in sequences])
        num_drawn = np.clip(lengths - num_tokens + 1, 0, new)  # 1 + number of drafts, or none
        is_sampled = num_drawn > 0
        sampled = [sequences[i] for i in np.flatnonzero(is_sampled)]
        width = self.kv.blocks_for(int(lengths.max()))
        shape = BatchShape(int(new.sum()), len(sequences), int(num_drawn.sum()), width)

        self.buffers.reverse()
        buffers = self.buffers[0]
        buffers.wait()
        arrays = buffers.arrays(shape)
        rows = np.array([sequence.row for sequence in sequences])
        tables = self.tables.block_tables
        ends = new.cumsum()
        positions = np.arange(shape.num_tokens) + np.repeat(starts - (ends - new), new)
        blocks = tables[np.repeat(rows, new), positions // self.kv.block_size].astype(np.int64)
        arrays["token_ids"][:] = [
            token_id
            for sequence, begin, end in zip(sequences, starts, lengths, strict=True)
            for token_id in sequence.tokens(begin, end)
        ]
        arrays["positions"][:] = positions
        arrays["slot_mapping"][:] = blocks * self.kv.block_size + positions % self.kv.block_size
        arrays["cu_seqlens_q"][0] = 0
        arrays["cu_seqlens_q"][1:] = ends
        arrays["seq_lens"][:] = lengths
        arrays["block_tables"].reshape(-1, width)[:] = tables[rows, :width]
        num_drafts = num_drawn[is_sampled] - 1
        arrays["num_drafts"][: len(sampled)] = num_drafts
        is_drawn = np.repeat(ends, new) - np.arange(shape.num_tokens) <= np.repeat(num_drawn, new)
        arrays["sampled_tokens"][:] = is_drawn.nonzero()[0]
        arrays["rows"][:] = rows = np.repeat(rows, num_drawn)
        arrays["sample_positions"][:] = positions[is_drawn] + 1
        for name, column in self.tables.sampling.items():
            arrays[name][:] = column[rows]
        longest = int(new.max()), int(lengths.max())
        return self.batch_of(buffers, shape, admitted, sampled, num_drafts, *longest)

    def batch_of(
        self,
        buffers: InputBuffers,
        shape: BatchShape,
        admitted: list[Sequence],
        sampled: list[Sequence],
        num_drafts: np.ndarray,
        max_query_len: int,
        max_seq_len: int,
    ) -> Batch:
        """The batch that lies in the buffers, on the device."""
        buffers.copy_to_device(shape)
        tensors = buffers.tensors(shape)
        metadata = AttentionMetadata(
            cu_seqlens_q=tensors["cu_seqlens_q"],
            seq_lens=tensors["seq_lens"],
            block_tables=tensors["block_tables"].view(-1, shape.table_width),
            slot_mapping=tensors["slot_mapping"],
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
        )
        columns = {name: tensors[name].unsqueeze(1) for name in SAMPLING_FIELDS}
        drawn = [
            sequence
            for sequence, count in zip(sampled, num_drafts.tolist(), strict=True)
            for _ in range(1 + count)
        ]
        sampling = SamplingBatch(
            **columns,
            positions=tensors["sample_positions"].unsqueeze(1),
            output_counts=None,
            num_logprobs=[sequence.params.logprobs for sequence in drawn],
            biases=self.biases(drawn, buffers.arrays(shape)["sample_positions"]),
        )
        return Batch(
            buffers,
            tensors["token_ids"],
            tensors["positions"],
            metadata,
            [
                (sequence.row, list(sequence.output_token_ids))
                for sequence in admitted
                if sequence.params.has_penalties
            ],
            sampled,
            tensors["sampled_tokens"],
            tensors["rows"],
            sampling,
            tensors["num_drafts"][: len(sampled)],
            bool(num_drafts.any()),
        )

    def biases(self, sequences: list[Sequence], positions: np.ndarray) -> LogitBiases | None:
        """What is added to single logits of each row.

        positions: the number of tokens before the one that a row draws.
        """
        if not any(sequence.params.has_biases for sequence in sequences):
            return None
        rows = [
            sequence.params.biases(
                sequence.ending_token_ids, place - len(sequence.prompt_token_ids)
            )
            for sequence, place in zip(sequences, positions.tolist(), strict=True)
        ]
        return LogitBiases.build(rows, self.device)

    @property
    def num_weight_bytes(self) -> int:
        """Of the model, and of the one that drafts."""
        models = [self.model] if self.draft_model is None else [self.model, self.draft_model]
        return sum(model.num_bytes for model in models)

    @property
    def num_kv_bytes(self) -> int:
        """The same of their keys and values."""
        return self.kv.data.nbytes + (self.draft_kv.data.nbytes if self.draft_model else 0)

    @property
    def num_buffer_bytes(self) -> int:
        """What a step's input takes, on the host and on the device, and the counts of tokens."""
        both = [x for buffers in self.buffers for x in (buffers.host, buffers.device)]
        buffers = {id(x): x.nbytes for x in [*both, self.last_token_ids]}
        tables = [self.tables.block_tables, *self.tables.sampling.values()]
        counts = 0 if self.counts is None else self.counts.nbytes
        return sum(buffers.values()) + sum(table.nbytes for table in tables) + counts

    def update_tables(self, scheduled: SchedulerOutput) -> None:
        """Note who joined, and who has new blocks."""
        for sequence in scheduled.admitted:
            self.tables.admit(sequence, self.model.config.vocab_size)
        for sequence, blocks in scheduled.new_blocks.items():
            end = len(sequence.block_table)
            self.tables.block_tables[sequence.row, end - len(blocks) : end] = blocks

    def launch(self, batch: Batch) -> Work:
        """Give the device the batch; its tokens can be read from what this returns."""
        work = self.queue.submit(lambda: self.run(batch))
        batch.buffers.reader = work
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

        All of them are known, and stay so until this step is read: nobody joins with a token on
        its way.
        """
        vocab_size = self.model.config.vocab_size
        if self.counts is None:
            shape = (self.config.max_num_seqs, vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        counts = np.bincount(np.array(token_ids, np.int64), minlength=vocab_size)
        self.counts[row] = torch.from_numpy(counts.astype(np.int32)).to(self.device)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[PromptScores]]:
        """Logits after each sampled sequence's last token and its drafts, [num_sampled, vocab]; and
        the scores of prompts that ask for them."""
        hidden = self.model.forward(batch.token_ids, batch.positions, self.kv.data, batch.metadata)
        scores = [piece.score(hidden, self.model.logits) for _, piece in batch.prompts]
        return self.model.logits(hidden[batch.sampled_tokens]), scores

    def sample(self, batch: Batch, logits: torch.Tensor) -> Sampled:
        """The next tokens of each sampled sequence, and log probabilities if asked for."""
        sampling = batch.sampling
        counted = any(sequence.params.has_penalties for sequence in batch.sampled)
        if counted:
            sampling = replace(sampling, output_counts=self.counts[batch.rows])
        token_ids = sample(self.ops, logits, sampling)
        last = token_ids.clamp(min=0)  # NO_TOKEN is no input
        if counted:
            self.counts[batch.rows, last] += 1
        self.last_token_ids[batch.rows] = last
        if batch.has_drafts:
            token_ids, num_accepted = self.verify(batch, sampling.biased(logits), token_ids)
            return with_logprobs(logits, token_ids, sampling, num_accepted, batch.num_drafts)
        return with_logprobs(logits, token_ids, sampling)

    def verify(
        self, batch: Batch, logits: torch.Tensor, drawn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a batch with drafts emits at each sampled place, and how many drafts stay.

        drawn: the model's own draws. Returns [num_sampled] and [len(batch.sampled)], int64.
        """
        lengths = batch.num_drafts
        most = max(len(sequence.draft_token_ids) for sequence in batch.sampled)
        places = torch.arange(most + 1, device=lengths.device)
        begins = ((lengths + 1).cumsum(0) - (lengths + 1)).unsqueeze(1)
        first = batch.sampled_tokens[begins]  # the place of each sequence's last token
        inside = (first + places[1:]).clamp(max=len(batch.token_ids) - 1)
        drafts = batch.token_ids[inside]
        verified = verify(drafts, lengths, drawn, self.rejection_rows(batch, logits))
        is_own = places <= lengths.unsqueeze(1)
        token_ids = verified.token_ids[is_own].where(drawn != NO_TOKEN, NO_TOKEN)
        return token_ids, verified.num_accepted

    def rejection_rows(self, batch: Batch, logits: torch.Tensor) -> RejectionRows | None:
        """The sequences whose drafts were drawn from a known distribution, if any."""
        sequences = [sequence for sequence in batch.sampled if sequence.rejects]
        if not sequences:
            return None
        counts = [1 + len(sequence.draft_token_ids) for sequence in batch.sampled]
        ends = np.cumsum(counts)
        rows = [i for i, sequence in enumerate(batch.sampled) if sequence.rejects]
        places = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in rows])
        own = torch.from_numpy(places).to(self.device)
        first = torch.tensor([ends[i] - counts[i] for i in rows], device=self.device)
        about = batch.sampling
        columns = (about.temperature, about.top_k, about.top_p, about.min_p)
        return RejectionRows(
            torch.tensor(rows, device=self.device),
            target_probs(self.ops, logits[own], *(column[own, 0] for column in columns)),
            torch.cat([s.draft_probs[: len(s.draft_token_ids)] for s in sequences]),
            about.seeds[first, 0],
            about.positions[first, 0],
            about.choices[first, 0],
        )
